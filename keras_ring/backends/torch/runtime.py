"""Runtime of PyTorch: one process per device.

Every process runs the same program on the same global batches, keeps its
own rows and its own chunk of every sequence, and a layer sees only those.
The processes meet in the ring, in one sum of the gradients per step and in
one of the metrics. The mesh is numbered row by row: a process is
`data_index * sequence_size + sequence_index`.

Private names of Keras appear in `trainer.py`, `callbacks.py` and `seeds.py`
alone.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch
from keras import tree

from keras_ring.attention import selection
from keras_ring.backends.torch import trainer, weights
from keras_ring.backends.torch.member import Member
from keras_ring.backends.torch.processes import agreement, groups
from keras_ring.backends.torch.training import Step
from keras_ring.distribution import padding, scopes, shards
from keras_ring.distribution.padding import PaddedAxis
from keras_ring.distribution.strategy import DistributedStrategy
from keras_ring.distribution.transport import LOCAL, Transport
from keras_ring.keras_internals import without_values
from keras_ring.training import step as steps
from keras_ring.training import wrappers


class World(Member):
    """A strategy on the processes of this program.

    Attributes:
        rank: number of this process.
    """

    layers_see_shards = True

    def __init__(self, strategy: DistributedStrategy):
        self.strategy = strategy
        self.layout = groups.mesh(strategy)
        self.size = self.layout.size()
        self.devices = groups.device_names(strategy)
        self.rank = groups.rank()
        self.agreement = agreement.Agreement(self)
        self.step: Step | None = None
        self._groups: groups.Groups | None = None
        self._depth = 0
        self._applying = 0

    @property
    def everyone(self) -> Transport:
        """All processes of the mesh."""
        return self._connected().everyone

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        with scopes.entered(self) as outermost:
            if outermost:
                wrappers.install()
                self._connected()
                # Of no use on PyTorch: it would be taken for this one.
                other = keras.distribution.distribution()
                if other is not None:
                    raise ValueError(
                        "Only one distribution can be active at a time. "
                        f"Received: the distribution {other!r} beside the "
                        f"scope of {self.strategy!r}. Leave it, or call "
                        "keras.distribution.set_distribution(None), first."
                    )
            yield

    def call(self) -> contextlib.AbstractContextManager[None]:
        failures = self._connected().failures
        return contextlib.nullcontext() if failures is None else failures.call()

    def inside(self) -> bool:
        return self._depth > 0

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Code in here sees shards."""
        self._depth += 1
        again: contextlib.AbstractContextManager[None]
        again = contextlib.nullcontext()
        if self._depth == 1 and weights.shared(self, "weights"):
            again = weights.gathering_again()
        try:
            with again:
                yield
        finally:
            self._depth -= 1

    @contextlib.contextmanager
    def applying(self) -> Iterator[bool]:
        """Code in here applies gradients; tells whether this is the outermost
        time."""
        self._applying += 1
        try:
            yield self._applying == 1
        finally:
            self._applying -= 1

    def ring(self) -> Transport:
        return self._connected().ring

    def own_rank(self) -> int:
        return self.rank

    def per_shard(
        self,
        function: Callable[..., Any],
        tensors: list[torch.Tensor],
        shared: Sequence[torch.Tensor] = (),
        by_sample: bool = False,
        by_head: Sequence[bool] = (),
    ) -> Any:
        # The code sees the samples of its part of the batch, and all heads.
        del by_sample, by_head
        if not self.inside() or any(map(without_values, tensors)):
            return function(LOCAL, *tensors, *shared)
        if padding.whole() and self.sequence_size > 1:
            return shards.of_whole(function, self.ring(), tensors, shared)
        return function(self.ring(), *tensors, *shared)

    def true_length(self, length: int) -> int | None:
        if not self.inside():
            return None
        return padding.true_length(length, self.sequence_size)

    def run(
        self,
        function: Callable[..., Any],
        tensors: list[Any],
        check: Callable[[Any], Any],
    ) -> Any:
        tensors = [keras.ops.convert_to_tensor(t) for t in tensors]
        with self.call():
            with self.scope():
                own = Step(
                    self, None, (tensors,), ([t.ndim > 1 for t in tensors],)
                )
                with self.stepping(), steps.run(own):
                    results = tree.map_structure(check, function(*own.local[0]))
            return tree.map_structure(
                lambda result: self._joined(result, own.rows, own.lengths),
                results,
            )

    def kernel_name(self, dtype: str) -> str:
        return selection.name_in_steps(self, dtype)

    def prepare(self, model: Any) -> None:
        trainer.prepare(self, model)

    def shard(
        self, tensor: Any, split: bool, rows: PaddedAxis, lengths: PaddedAxis
    ) -> Any:
        """This process's rows of a global array, and its chunk if `split`."""
        if len(tensor.shape) == 0:
            return tensor
        size = padding.local_size(rows, tensor.shape[0])
        data_index, sequence_index = self.place()
        if split:
            chunk = padding.local_size(lengths, tensor.shape[1])
            tensor = padding.part(tensor, 1, sequence_index, chunk)
        return padding.part(tensor, 0, data_index, size)

    def unshard(
        self,
        tensor: torch.Tensor,
        split: bool,
        rows: PaddedAxis,
        lengths: PaddedAxis,
    ) -> torch.Tensor:
        """The global tensor of everyone's part; the inverse of `shard`."""
        tensor = tensor.detach()
        if self.size == 1:
            return tensor
        parts = self.everyone.all_gather(tensor[None], 0)
        size, *rest = tensor.shape
        parts = parts.reshape(self.data_size, self.sequence_size, size, *rest)
        if split:
            length, *rest = rest
            parts = parts.transpose(1, 2).reshape(
                self.data_size * size, self.sequence_size * length, *rest
            )[:, : lengths.true(length)]
        else:
            parts = parts[:, 0].reshape(self.data_size * size, *rest)
        return parts[: rows.true(size)]

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of everyone's tensor."""
        return self.everyone.sum(tensor.detach()) / self.size

    def _joined(
        self, result: Any, rows: PaddedAxis, lengths: PaddedAxis
    ) -> torch.Tensor:
        result = keras.ops.convert_to_tensor(result)
        if result.ndim == 0:
            return self.mean(result)
        return self.unshard(result, result.ndim > 1, rows, lengths)

    def _connected(self) -> groups.Groups:
        if self._groups is None or not self._groups.valid:
            self._groups = groups.connect(self.strategy, self.layout)
        return self._groups


def current() -> World | None:
    """The world whose scope is active, or None."""
    active = scopes.active()
    return active if isinstance(active, World) else None


def custom_gradient(
    forward: Callable[..., tuple[Any, Any]], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with its own gradient, natively.

    Args:
        forward: `tensors -> (outputs, residuals)`, two tuples.
        backward: `(residuals, *output_gradients) -> input gradients`, None
            for an input that has no gradient.
    """

    return functools.partial(_Own.apply, forward, backward)


class _Own(torch.autograd.Function):
    """`custom_gradient`. One class for all: one for each call, with its
    functions and what these hold, would live until Python's collector finds
    it."""

    @staticmethod
    def forward(
        ctx: Any, forward: Callable, backward: Callable, *tensors: Any
    ) -> Any:
        outputs, residuals = forward(*tensors)
        ctx.own, ctx.resumed = backward, _resuming()
        # Only tensors can be saved; what else there is, such as an array that
        # a mask carries, is kept at its place.
        ctx.others = [
            None if isinstance(r, torch.Tensor) else r for r in residuals
        ]
        ctx.save_for_backward(
            *(r for r in residuals if isinstance(r, torch.Tensor))
        )
        ctx.kept = [isinstance(r, torch.Tensor) for r in residuals]
        ctx.mark_non_differentiable(
            *(t for t in outputs if not _differentiable(t))
        )
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        residuals = tuple(
            next(saved) if kept else other
            for kept, other in zip(ctx.kept, ctx.others, strict=True)
        )
        results = tuple(ctx.resumed(ctx.own, residuals, *grads))
        needed = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *(
                g if wanted else None
                for g, wanted in zip(results, needed, strict=True)
            ),
        )


def _resuming() -> Callable[..., Any]:
    """Calls a function as if where this is called. For accelerators PyTorch
    computes gradients in threads of its own, which know no scope, no step and
    no sizes: there a ring would be taken for one device."""
    world, returned = current(), steps.returning()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        if world is None or current() is world:
            return function(*arguments)
        with scopes.entered(world):
            return returned(function, *arguments)

    return call


def vjp(
    function: Callable[..., tuple[Any, ...]],
    tensors: Sequence[Any],
    cotangents: Sequence[Any],
) -> list[Any]:
    """Gradients of `sum(outputs * cotangents)` for floating-point tensors;
    zeros for one that no output depends on. Also inside a gradient, and in
    the body of a loop."""
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        outputs = function(*tensors)
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in tensors]
    gradients = torch.autograd.grad(
        [output for output, _ in pairs],
        tensors,
        [cotangent for _, cotangent in pairs],
        allow_unused=True,
    )
    return [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]


def exporting(tensor: Any) -> bool:
    """True if operations are being recorded for a program that runs without
    Python, such as an ONNX file."""
    del tensor
    # PyTorch 2.6 does not tell of its newer exporter.
    newer = getattr(torch.compiler, "is_exporting", bool)
    return torch.jit.is_tracing() or newer()


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
