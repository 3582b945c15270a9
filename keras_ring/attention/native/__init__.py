"""The attention of this package for CPUs, in C++.

It is compiled where it is used, by the compiler of the machine and for its
processor: `library` does that, `kernel` is what all backends share of the
kernel. How a framework calls it stands with the backend.
"""
