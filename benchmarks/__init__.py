"""What the project has measured, and how to measure it again."""
