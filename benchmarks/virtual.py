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
from benchmarks.child import accelerators
from keras_ring import backends, masks
from keras_ring.attention import selection
from keras_ring.attention.blockwise.tiles import TILE
from keras_ring.attention.kernel import Inputs, Rows
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Side, Visit, relations
from keras_ring.distribution import placement


def spans(kind, index, size, length):
    """The positions that a member holds, as `(start, length)` pairs in the
    order in which they stand in its chunk."""
    chunk = length // size
    starts = placement.starts(index, chunk, size, kind == "balanced")
    return [(start, chunk // len(starts)) for start in starts]


def visits(kind, index, size, length, mask):
    """Whose chunk visits a member, hop by hop; None where no pair of the
    visit is allowed."""
    found = []
    for hop in range(size):
        source = placement.source(index, hop, size)
        visit = _visit(*_starts(kind, index, source, size, length), mask)
        some, _ = visit.relation(length // size, length // size)
        found.append(source if some else None)
    return found


def tiles(kind, index, source, size, length, mask):
    """Tiles of a visit that are computed."""
    if source is None:
        return 0
    sides = [
        Side(starts, length // size, TILE)
        for starts in _starts(kind, index, source, size, length)
    ]
    some, _ = relations(mask, *sides)
    shape = [side.count for side in sides]
    return int(np.broadcast_to(some, shape).sum())


def _starts(kind, index, source, size, length):
    return [
        tuple(start for start, _ in spans(kind, member, size, length))
        for member in (index, source)
    ]


def _visit(query_starts, key_starts, mask, scale=1.0):
    scoring = Scoring(scale=scale, mask=mask)
    return Visit(tuple(query_starts), tuple(key_starts), scoring)


class VirtualRing:
    """Causal attention, forward and backward, member by member."""

    def __init__(
        self,
        length,
        size,
        kind="contiguous",
        heads=contestants.HEADS,
        head_dim=contestants.HEAD_DIM,
        dtype="float32",
    ):
        self.size = size
        mask, scale = masks.Causal(), head_dim**-0.5
        shape = (1, heads, length, head_dim)
        self.places = [
            np.concatenate([np.arange(s, s + n) for s, n in own])
            for own in (spans(kind, i, size, length) for i in range(size))
        ]
        self.starts = [
            places(*(start for start, _ in spans(kind, i, size, length)))
            for i in range(size)
        ]
        self.visits = [visits(kind, i, size, length, mask) for i in range(size)]
        self.query, self.key, self.value, self.grad_out = (
            [
                ops.convert_to_tensor(tensor[:, :, own], dtype)
                for own in self.places
            ]
            for tensor in contestants.draw(shape)
        )
        self.parts, self.grads = {}, {}
        kernel = ring_kernel(dtype)

        def visits_of(own, theirs):
            return [_visit(own, starts, mask, scale) for starts in theirs]

        def forward(query, keys, values, own, theirs):
            part = None
            for key, value, visit in zip(
                keys, values, visits_of(own, theirs), strict=True
            ):
                part = kernel.forward(Inputs(query, key, value), visit, part)
            return tuple(part)

        def backward(query, keys, values, rows, sums, own, theirs):
            out, lse, grad_out = rows
            grad_out = ops.cast(grad_out, out.dtype)
            delta = kernel.row_delta(out, grad_out, ops.zeros_like(lse))
            rows = Rows(out, lse, delta, grad_out)
            grad_query, found = None, []
            for held, key, value, visit in zip(
                sums, keys, values, visits_of(own, theirs), strict=True
            ):
                inputs = Inputs(query, key, value)
                share = kernel.backward(inputs, rows, visit, grad_query)
                grad_query = share.query
                found.append(
                    tuple(
                        new if have is None else kernel.add(have, new)
                        for have, new in zip(held, share[1:3], strict=True)
                    )
                )
            return grad_query, tuple(found)

        self._forward = compiled(forward)
        self._backward = compiled(backward)
        self._everyone = one_program(self._run)

    def member_forward(self, index):
        """The visits of one member, forward: one program, as in a ring."""
        self.parts.pop(index, None)
        _, *visitors = self._visitors(index)
        self.parts[index] = self._forward(self._next_query(index), *visitors)

    def member_backward(self, index):
        """The visits of one member, backward; after everyone's forward."""
        sources, keys, values, *starts = self._visitors(index)
        rows = *self.parts[index], self.grad_out[index]
        # What comes with the visitors belongs to nobody else.
        sums = tuple(
            tuple(self.grads.pop((name, i), None) for name in ("key", "value"))
            for i in sources
        )
        self.grads["query", index], sums = self._backward(
            self._next_query(index), keys, values, rows, sums, *starts
        )
        for i, (key, value) in zip(sources, sums, strict=True):
            self.grads["key", i], self.grads["value", i] = key, value

    def _next_query(self, index):
        """The queries of the member whose turn it is."""
        return behind([self.parts, self.grads], self.query[index])

    def _visitors(self, index):
        """Who visits a member, their keys and values, the member's places
        and theirs."""
        sources = [i for i in self.visits[index] if i is not None]
        keys, values, theirs = (
            tuple(held[i] for i in sources)
            for held in (self.key, self.value, self.starts)
        )
        return sources, keys, values, self.starts[index], theirs

    def run(self):
        """Everybody's forward, then everybody's backward."""
        self.parts, self.grads = self._everyone()
        self.wait()

    def _run(self):
        self.parts, self.grads = {}, {}
        for visits in self.member_forward, self.member_backward:
            for index in range(self.size):
                visits(index)
        return self.parts, self.grads

    def wait(self):
        """Until everything that was issued is computed."""
        outs = [out for out, _ in self.parts.values()]
        done(outs + list(self.grads.values()))

    def result(self):
        """Everything as NumPy arrays of the whole sequence."""
        order = np.argsort(np.concatenate(self.places))

        def whole(parts):
            arrays = [ops.convert_to_numpy(part) for part in parts]
            return np.concatenate(arrays, axis=2)[:, :, order]

        members = range(self.size)
        return [
            whole(self.parts[index][0] for index in members),
            *(
                whole(self.grads[name, index] for index in members)
                for name in ("query", "key", "value")
            ),
        ]


def ring_kernel(dtype):
    """What the members of a real ring on this machine compute with. A CPU that
    stands for several devices has another kernel than one that does not."""
    if accelerators(keras.backend.backend()) == 0 and dtype == "float32":
        for kernel in backends.load().kernel.KERNELS:
            if kernel.name == "native" and kernel.available():
                return kernel
    return selection.choose(dtype, device())


def device():
    """The kind of device that tensors are on by default, for
    `selection.choose`."""
    kernel = backends.load().kernel.KERNEL
    return kernel.device(ops.zeros(()))


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


def one_program(function):
    """A function of nothing, in one call where many cost time of their own:
    each of TensorFlow's takes a millisecond or two, which no step of a model
    spends."""
    if keras.backend.backend() == "tensorflow":
        return compiled(function)
    return function


def behind(others, tensor):
    """The tensor, which in a program is there after the others."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Where a function is put in place of its call, nothing waits for the
        # call or before it: only for tensors.
        there = [tf.identity(other) for other in tf.nest.flatten(others)]
        with tf.control_dependencies(there):
            return tf.identity(tensor)
    return tensor


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
