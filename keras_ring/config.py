"""Settings of the process, in the style of `keras.config`."""

from keras_ring import backends

__all__ = ["kernel", "set_kernel"]

# The one setting of the process; `set_kernel` is the only place that writes.
_SETTINGS = {"kernel": "auto"}


def kernel() -> str:
    """Return the name of the kernel that computes attention.

    Returns:
        The name that `set_kernel` was given; "auto" by default.
    """
    return _SETTINGS["kernel"]


def set_kernel(name: str) -> None:
    """Choose the kernel that computes attention.

    What was traced or compiled before keeps the kernel that it has.

    Args:
        name: "auto" for the fastest kernel that is there and agrees with
            "blockwise" on a small problem; or the name of one, which is then
            used without that check. "blockwise" is there on every backend.
            Fused kernels leave to it what they cannot compute. "native" is
            this package's own for CPUs, in float32: on PyTorch, and on JAX
            and TensorFlow where a CPU stands for several devices. It is
            there if this machine has a C++ compiler. PyTorch has "flash" on
            CPUs, and on CUDA devices "cudnn" and "cuda_flash" in half
            precision and "efficient" in float32 as well. JAX has "by_head" on
            a CPU that stands for several devices, "cudnn" on GPUs in half
            precision, and by name only "triton" on GPUs, which is slower in
            causal attention than what "auto" takes, and "splash" on TPUs,
            which has not been measured.

    Returns:
        None.

    Raises:
        ValueError: for a name that the running backend does not have.

    Example:

    ```python
    keras_ring.config.set_kernel("blockwise")
    ```
    """
    kernels = backends.load().kernel.KERNELS
    # To ask may take long: one that has to be compiled first is.
    asked = [k for k in kernels if k.name == name]
    if name != "auto" and not any(k.available() for k in asked):
        names = ["auto"] + [k.name for k in kernels if k.available()]
        known = ", ".join(repr(known) for known in names)
        why = next((k.reason() for k in asked), "")
        raise ValueError(
            "`name` must be that of a kernel of the running backend "
            f"({backends.load().name}). Received: name={name!r}. Choose one "
            f"of {known}.{why and ' '}{why}"
        )
    _SETTINGS["kernel"] = name
