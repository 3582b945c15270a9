"""Processes of PyTorch: their groups, memory, failures and agreement."""
