"""A function of each position, computed chunk by chunk of the sequence.

What a position needs in between (the hidden features of a feed-forward, the
logits of a vocabulary) is far wider than what goes in and comes out. Here it
exists for one chunk at a time, forward and backward: the forward keeps the
inputs alone, and the backward computes each chunk once more and differentiates
it on the spot (Liu and Abbeel 2023, "Blockwise Parallel Transformer for Large
Context Models", arXiv 2305.19370; Chen et al. 2016, arXiv 1604.06174).

All tensors here are local: the shard that one member of a ring holds.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_ring import backends
from keras_ring.distribution import padding, strategy
from keras_ring.precision import accumulation_dtype, is_floating
from keras_ring.shapes import sizes

Tensor = Any


def map_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    shared: Sequence[Tensor],
    *,
    results: Sequence[tuple[tuple[int, ...], str]],
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """`function(*chunks, *shared)` for every chunk of the sequence.

    `function` must treat the positions of a chunk one by one, be finite for
    positions of zeros (a last chunk is filled up with them) and depend on
    nothing that has a gradient but its arguments.

    Args:
        function: takes one chunk `(batch, chunk, ...)` of each tensor and the
            shared tensors; returns a tuple of `(batch, chunk, ...)`.
        tensors: `(batch, length, ...)`, as a layer sees them. Those that are
            not floating point have no gradient.
        shared: weights, seeds and what else has no sequence axis. The
            gradient of one is summed in float32 (float64 for float64).
        results: of each result the shape after the length, and the dtype.
        chunk_size: positions in a chunk, at most.

    Returns:
        A tuple of `(batch, length, ...)`.
    """
    run = functools.partial(
        _map_local,
        function=function,
        count=len(tensors),
        results=results,
        chunk_size=chunk_size,
    )
    world = strategy.current()
    if world is None and backends.load().runtime.exporting(tensors[0]):
        # Chunks and a gradient of their own do not travel.
        made = function(*tensors, *shared)
        return tuple(
            ops.cast(result, dtype)
            for result, (_, dtype) in zip(made, results, strict=True)
        )
    if world is None or padding.whole():
        return run(None, *tensors, *shared)
    # What is shared may have an entry for each sample, as in a dropout.
    return world.per_shard(run, list(tensors), shared, by_sample=True)


def _map_local(
    transport: Any,
    *arguments: Tensor,
    function: Callable[..., tuple[Tensor, ...]],
    count: int,
    results: Sequence[tuple[tuple[int, ...], str]],
    chunk_size: int,
) -> tuple[Tensor, ...]:
    del transport  # Positions know nothing of each other.
    tiling = _Chunks(sizes(arguments[0])[1], chunk_size)
    runtime = backends.load().runtime
    primitives = backends.load().kernel.KERNEL

    def made_of(*inputs: Tensor) -> tuple[Tensor, ...]:
        made = function(*inputs)
        return tuple(
            ops.cast(result, dtype)
            for result, (_, dtype) in zip(made, results, strict=True)
        )

    def forward(*arguments: Tensor) -> tuple[tuple, tuple]:
        if tiling.is_whole:
            return made_of(*arguments), arguments
        stores = [
            primitives.store(tiling.cut(tensor)) for tensor in arguments[:count]
        ]
        batch = sizes(arguments[0])[0]

        def body(index: Any, filled: tuple) -> tuple:
            chunks = [primitives.read(store, index) for store in stores]
            made = made_of(*chunks, *arguments[count:])
            return tuple(
                primitives.write(store, index, result)
                for store, result in zip(filled, made, strict=True)
            )

        empty = tuple(
            primitives.store(
                ops.zeros((tiling.count, batch, tiling.size, *rest), dtype)
            )
            for rest, dtype in results
        )
        filled = primitives.loop(tiling.count, body, empty)
        outputs = [tiling.join(primitives.stacked(store)) for store in filled]
        return tuple(outputs), arguments

    def backward(arguments: tuple, *grads: Tensor) -> tuple:
        places = [i for i, t in enumerate(arguments) if is_floating(t)]
        local = [i for i in places if i < count]
        common = [i for i in places if i >= count]
        gradients: list[Tensor | None] = [None] * len(arguments)

        def pulled_back(
            given: Sequence[Tensor], grads: Sequence[Tensor]
        ) -> list[Tensor]:
            """Of one chunk, the gradients of what is floating point."""

            def of_floating(*tensors: Tensor) -> tuple[Tensor, ...]:
                inputs = list(given)
                for place, tensor in zip(places, tensors, strict=True):
                    inputs[place] = tensor
                return made_of(*inputs)

            return runtime.vjp(
                of_floating, [given[place] for place in places], grads
            )

        if tiling.is_whole:
            found = pulled_back(arguments, grads)
            for place, grad in zip(places, found, strict=True):
                gradients[place] = ops.cast(grad, arguments[place].dtype)
            return tuple(gradients)
        stores = [
            primitives.store(tiling.cut(tensor)) for tensor in arguments[:count]
        ]
        arriving = [primitives.store(tiling.cut(grad)) for grad in grads]

        def body(index: Any, carry: tuple) -> tuple:
            filled, sums = carry
            found = pulled_back(
                [
                    *(primitives.read(store, index) for store in stores),
                    *arguments[count:],
                ],
                [primitives.read(store, index) for store in arriving],
            )
            filled = tuple(
                primitives.write(store, index, grad)
                for store, grad in zip(filled, found[: len(local)], strict=True)
            )
            sums = tuple(
                total + ops.cast(grad, total.dtype)
                for total, grad in zip(sums, found[len(local) :], strict=True)
            )
            return filled, sums

        start = (
            tuple(
                primitives.store(ops.zeros_like(tiling.cut(arguments[i])))
                for i in local
            ),
            tuple(
                ops.zeros(
                    sizes(arguments[i]),
                    accumulation_dtype(arguments[i].dtype),
                )
                for i in common
            ),
        )
        filled, sums = primitives.loop(tiling.count, body, start)
        for place, store in zip(local, filled, strict=True):
            gradients[place] = tiling.join(primitives.stacked(store))
        for place, total in zip(common, sums, strict=True):
            gradients[place] = ops.cast(total, arguments[place].dtype)
        return tuple(gradients)

    return tuple(runtime.custom_gradient(forward, backward)(*arguments))


class _Chunks:
    """Chunks of a length: `count` chunks of `size`, the last filled up."""

    def __init__(self, length: Any, chunk_size: int):
        self.length = length
        if isinstance(length, int):
            self.count = max(1, -(-length // chunk_size))
            # Equal parts, so that as little as possible is filled up.
            self.size = -(-length // self.count)
        else:
            self.count = -(-length // chunk_size)
            self.size = chunk_size

    @property
    def is_whole(self) -> bool:
        """True if it is known that one chunk is all there is."""
        return isinstance(self.count, int) and self.count == 1

    def cut(self, tensor: Tensor) -> Tensor:
        """(batch, length, ...) -> (count, batch, size, ...)."""
        shape = sizes(tensor)
        padding = self.count * self.size - self.length
        if not isinstance(padding, int) or padding:
            widths: list = [(0, 0)] * len(shape)
            widths[1] = (0, padding)
            tensor = ops.pad(tensor, widths)
        tensor = ops.reshape(
            tensor, (shape[0], self.count, self.size, *shape[2:])
        )
        return ops.transpose(tensor, (1, 0, 2, *range(3, len(shape) + 1)))

    def join(self, chunks: Tensor) -> Tensor:
        """(count, batch, size, ...) -> (batch, length, ...)."""
        shape = sizes(chunks)
        tensor = ops.transpose(chunks, (1, 0, 2, *range(3, len(shape))))
        tensor = ops.reshape(
            tensor, (shape[1], self.count * self.size, *shape[3:])
        )
        return tensor[:, : self.length]
