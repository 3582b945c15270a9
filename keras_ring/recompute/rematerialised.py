"""A function whose backward starts from its inputs alone.

What happens inside is computed once more when its gradients are asked for
(Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv
1604.06174). The checkpoints of the frameworks are not used: they differ in
what they do with random state, variables and collectives, while here all
that the function depends on is handed to it.
"""

from collections.abc import Callable
from typing import Any

from keras_ring import backends
from keras_ring.precision import is_floating

Tensor = Any


def rematerialised(
    function: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """The same function, of which the backward keeps the inputs only.

    Args:
        function: of tensors; returns a tuple of floating-point tensors. It
            depends on no other tensor that has a gradient, and gives the same
            result each time.

    Returns:
        A function of tensors. Those that are not floating point have no
        gradient.
    """
    runtime = backends.load().runtime

    def forward(*tensors: Tensor) -> tuple[tuple, tuple]:
        return tuple(function(*tensors)), tensors

    def backward(tensors: tuple, *grads: Tensor) -> tuple:
        places = [i for i, t in enumerate(tensors) if is_floating(t)]

        def of_floating(*floating: Tensor) -> tuple[Tensor, ...]:
            inputs = list(tensors)
            for place, tensor in zip(places, floating, strict=True):
                inputs[place] = tensor
            return function(*inputs)

        found = runtime.vjp(of_floating, [tensors[i] for i in places], grads)
        gradients: list[Tensor | None] = [None] * len(tensors)
        for place, gradient in zip(places, found, strict=True):
            gradients[place] = gradient
        return tuple(gradients)

    with_gradient = runtime.custom_gradient(forward, backward)

    def computed(*tensors: Tensor) -> tuple[Tensor, ...]:
        exporting = runtime.exporting(tensors[0])
        return function(*tensors) if exporting else with_gradient(*tensors)

    return computed
