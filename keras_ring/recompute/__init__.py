"""Functions that are computed chunk by chunk or once more, to save memory."""
