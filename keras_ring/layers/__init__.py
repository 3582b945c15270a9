"""Keras layers that know about the ring."""
