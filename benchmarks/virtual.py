"""A ring whose members run one after the other on one device.

What each member computes in the real ring, visit by visit, with the same
kernel and the same merge, and no transfers: what being cut into chunks
costs, and how the work is shared. A ring of one is the monolithic call.
"""

import functools

import keras
import numpy as np
from keras import ops

from benchmarks import contestants
from keras_ring import backends, masks, numerics, placement
from keras_ring.scoring import Scoring
from keras_ring.tiling import TILE, Block

PLACEMENTS = ("contiguous", "balanced")


def spans(kind, index, size, length):
    """The positions that a member holds, as `(start, length)` pairs.

    `keras_ring.placement.spans(kind, index, size, length)` is asked where
    there is one; here stands what it would say.
    """
    asked = getattr(placement, "spans", None)
    if asked is not None:
        return asked(kind, index, size, length)
    chunk = length // size
    if kind == "contiguous":
        return [(placement.start(index, chunk), chunk)]
    half = chunk // 2
    return [(index * half, half), ((2 * size - 1 - index) * half, half)]


def visits(kind, index, size, length, mask):
    """What visits a member, hop by hop: lists of pairs of spans of which
    some entry is allowed."""
    found = []
    for hop in range(size):
        source = placement.source(index, hop, size)
        found.append(
            [
                (queries, keys)
                for queries in spans(kind, index, size, length)
                for keys in spans(kind, source, size, length)
                if _block(queries[0], keys[0], mask).relation(
                    queries[1], keys[1]
                )[0]
            ]
        )
    return found


def tiles(queries, keys, mask):
    """Tiles of a pair of spans that are computed."""
    count = 0
    for row in range(queries[0], queries[0] + queries[1], TILE):
        for column in range(keys[0], keys[0] + keys[1], TILE):
            rows = min(TILE, queries[0] + queries[1] - row)
            columns = min(TILE, keys[0] + keys[1] - column)
            some, _ = _block(row, column, mask).relation(rows, columns)
            count += bool(some)
    return count


def _block(query_start, key_start, mask, scale=1.0):
    scoring = Scoring(scale=scale, mask=mask)
    return Block(query_start=query_start, key_start=key_start, scoring=scoring)


class VirtualRing:
    """Causal attention, forward and backward, member by member."""

    def __init__(
        self,
        length,
        size,
        kind="contiguous",
        heads=contestants.HEADS,
        head_dim=contestants.HEAD_DIM,
    ):
        self.size = size
        self.mask = masks.Causal()
        self.scale = head_dim**-0.5
        shape = (1, heads, length, head_dim)
        query, key, value, grad_out = contestants.draw(shape)
        self.spans = [spans(kind, i, size, length) for i in range(size)]
        self.visits = [
            visits(kind, i, size, length, self.mask) for i in range(size)
        ]

        def cut(tensor):
            return {
                (start, count): ops.convert_to_tensor(
                    tensor[:, :, start : start + count]
                )
                for own in self.spans
                for start, count in own
            }

        self.query, self.key, self.value, self.grad_out = (
            cut(tensor) for tensor in (query, key, value, grad_out)
        )
        self.outs, self.lses, self.grads = {}, {}, {}
        kernel = backends.load().kernel.KERNEL

        def forward(query, key, value, out, lse, starts):
            block = self._visit(starts)
            partial = kernel.block_forward(query, key, value, block)
            return tuple(numerics.merge(numerics.Partial(out, lse), partial))

        def first(query, key, value, starts):
            block = self._visit(starts)
            return tuple(kernel.block_forward(query, key, value, block))

        def delta(out, lse, grad_out):
            return numerics.row_delta(out, grad_out, ops.zeros_like(lse))

        def backward(query, key, value, rows, grads, starts):
            share = kernel.block_backward(
                query, key, value, *rows, self._visit(starts)
            )
            return tuple(
                have + new for have, new in zip(grads, share[:3], strict=True)
            )

        self._first, self._forward = compiled(first), compiled(forward)
        self._delta, self._backward = compiled(delta), compiled(backward)

    def _visit(self, starts):
        return _block(starts[0], starts[1], self.mask, self.scale)

    def member_forward(self, index):
        """The visits of one member, forward."""
        for pairs in self.visits[index]:
            for queries, keys in pairs:
                tensors = self.query[queries], self.key[keys], self.value[keys]
                starts = places(queries[0], keys[0])
                if queries not in self.outs:
                    found = self._first(*tensors, starts)
                else:
                    found = self._forward(
                        *tensors, self.outs[queries], self.lses[queries], starts
                    )
                self.outs[queries], self.lses[queries] = found

    def member_backward(self, index):
        """The visits of one member, backward; after everyone's forward."""
        rows = {}
        for own in self.spans[index]:
            out, lse = self.outs[own], self.lses[own]
            grad_out = self.grad_out[own]
            delta = self._delta(out, lse, grad_out)
            rows[own] = out, lse, delta, grad_out
        for pairs in self.visits[index]:
            for queries, keys in pairs:
                held = (
                    self.grads.setdefault(
                        (name, span), ops.zeros_like(tensors[span])
                    )
                    for name, tensors, span in (
                        ("query", self.query, queries),
                        ("key", self.key, keys),
                        ("value", self.value, keys),
                    )
                )
                found = self._backward(
                    *(self.query[queries], self.key[keys], self.value[keys]),
                    rows[queries],
                    tuple(held),
                    places(queries[0], keys[0]),
                )
                names = (("query", queries), ("key", keys), ("value", keys))
                self.grads.update(zip(names, found, strict=True))

    def run(self):
        """Everybody's forward, then everybody's backward."""
        self.outs, self.lses, self.grads = {}, {}, {}
        for index in range(self.size):
            self.member_forward(index)
        for index in range(self.size):
            self.member_backward(index)
        self.wait()

    def wait(self):
        """Until everything that was issued is computed."""
        done(list(self.outs.values()) + list(self.grads.values()))

    def result(self):
        """Everything as NumPy arrays of the whole sequence."""

        def whole(parts):
            return np.concatenate(
                [ops.convert_to_numpy(parts[span]) for span in sorted(parts)],
                axis=2,
            )

        named = {
            name: {s: g for (n, s), g in self.grads.items() if n == name}
            for name in ("query", "key", "value")
        }
        return [whole(self.outs), *(whole(named[name]) for name in named)]


def places(*starts):
    """Positions as the programs of the framework take them."""
    if keras.backend.backend() == "torch":
        return starts
    return tuple(ops.convert_to_tensor(start, "int32") for start in starts)


def compiled(function):
    """A function that the framework compiles where it does so."""
    match keras.backend.backend():
        case "jax":
            import jax

            return jax.jit(function)
        case "tensorflow":
            import tensorflow as tf

            return tf.function(function, autograph=False, jit_compile=False)
        case _:
            import torch

            @functools.wraps(function)
            def without_gradients(*arguments):
                with torch.no_grad():
                    return function(*arguments)

            return without_gradients


def done(tensors):
    """Wait for tensors."""
    match keras.backend.backend():
        case "jax":
            import jax

            jax.block_until_ready(tensors)
        case "tensorflow":
            contestants.ready(tensors)
        case _:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
