"""Devices: the strategy, its mesh, what moves between them and what pads."""
