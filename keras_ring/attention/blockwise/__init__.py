"""The reference kernel, tile by tile."""
