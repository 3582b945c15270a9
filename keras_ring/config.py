"""Settings of the process, in the style of `keras.config`."""

from keras_ring import backends

__all__ = ["kernel", "kernels", "set_kernel"]

# The one setting of the process; `set_kernel` is the only place that writes.
_SETTINGS = {"kernel": "auto"}


def kernel() -> str:
    """Return the name of the kernel that computes attention.

    Returns:
        The name that `set_kernel` was given; "auto" by default.
    """
    return _SETTINGS["kernel"]


def kernels() -> dict[str, str]:
    """Return the kernels that this process can use.

    To ask may take long the first time: one may have to be compiled.

    Returns:
        What each is and where it runs, by name, in the order in which "auto"
        prefers them.

    Example:

    ```python
    for name, description in keras_ring.config.kernels().items():
        print(f"{name}: {description}")
    ```
    """
    there = (k for k in backends.load().kernel.KERNELS if k.available())
    return {k.name: k.description for k in there}


def set_kernel(name: str) -> None:
    """Choose the kernel that computes attention.

    What was traced or compiled before keeps the kernel that it has.

    Args:
        name: "auto" for the fastest kernel that is there and agrees with
            "blockwise" on a small problem; or the name of one of `kernels()`,
            which is then used without that check. "blockwise" is there on
            every backend. Others leave to it what they cannot compute.

    Returns:
        None.

    Raises:
        ValueError: for a name that the running backend does not have.

    Example:

    ```python
    keras_ring.config.set_kernel("blockwise")
    ```
    """
    # Of the others nobody asks: one may have to be compiled first.
    asked = [k for k in backends.load().kernel.KERNELS if k.name == name]
    if name != "auto" and not any(k.available() for k in asked):
        known = ", ".join(repr(known) for known in ["auto", *kernels()])
        why = next((k.reason() for k in asked), "")
        raise ValueError(
            "`name` must be that of a kernel of the running backend "
            f"({backends.load().name}). Received: name={name!r}. Choose one "
            f"of {known}.{why and ' '}{why}"
        )
    _SETTINGS["kernel"] = name
