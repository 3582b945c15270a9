"""Kernels of JAX."""
