"""Kernels of TensorFlow."""
