"""The engine of attention: kernels, visits, ways to share a sequence.

It knows no trainer and no framework.
"""
