"""World interface: a strategy as one framework carries it.

A `World` is a `DistributedStrategy` made real: the devices it got, the ring
that this device belongs to, and the way in which Keras' trainer feeds it.
Each backend has one in `backends/<name>/runtime.py`.

Two ways to see a sequence exist. On JAX a layer sees the global sequence
and the compiler splits it; on TensorFlow and PyTorch a layer that runs
inside a step sees its own shard. `layers_see_shards` says which, and
`inside()` whether the running code is in such a step. Outside a step (a
model called by hand) TensorFlow and PyTorch compute on what they are given,
whole, on one device; on JAX attention goes around the ring wherever a strategy
is active, and on one device only while shapes are inferred.
"""

import abc
import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras

from keras_ring.distribution.lengths import Lengths
from keras_ring.distribution.mesh import BATCH, MODEL, SEQUENCE, Mesh
from keras_ring.distribution.settings import Settings
from keras_ring.distribution.transport import Transport

Tensor = Any


class World(abc.ABC):
    """One framework's form of a strategy.

    Attributes:
        strategy: what the user asked for.
        layout: the mesh of its devices.
        devices: names of all devices, by rank.
    """

    layers_see_shards: ClassVar[bool]

    strategy: Settings
    layout: Mesh
    devices: tuple[str, ...]
    # The model whose fit, evaluate or predict runs now; see `training`.
    model: Any = None

    @property
    def data_size(self) -> int:
        """Number of groups that each take a part of the batch."""
        return self.layout.size(BATCH)

    @property
    def sequence_size(self) -> int:
        """Number of devices that share one sequence."""
        return self.layout.size(SEQUENCE)

    @property
    def model_size(self) -> int:
        """Number of devices that share the heads of one position."""
        return self.layout.size(MODEL)

    @functools.cached_property
    def lengths(self) -> weakref.WeakKeyDictionary[Any, Lengths]:
        """Knowledge of the lengths of each model; see `training`."""
        return weakref.WeakKeyDictionary()

    @functools.cached_property
    def fixed_lengths(self) -> weakref.WeakKeyDictionary[Any, Any]:
        """Findings of the guard about the fixed ones, which do not change."""
        return weakref.WeakKeyDictionary()

    @functools.cached_property
    def closed_inputs(self) -> list[tuple[Any, Any]]:
        """Models whose inputs are open while steps run, and what they check
        of their inputs otherwise."""
        return []

    @abc.abstractmethod
    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Make this world the current one while models are built and used."""

    def call(self) -> contextlib.AbstractContextManager[None]:
        """Around a call that all devices make; what fails in it leaves the
        next one possible, or is told to those that wait for it."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def inside(self) -> bool:
        """True if the code that runs now sees one shard of the sequence."""

    @abc.abstractmethod
    def ring(self) -> Transport:
        """The ring of this device; only where `inside()` is true."""

    @property
    def everyone(self) -> Transport:
        """All devices of the mesh as one ring; only where `inside()` is
        true."""
        raise NotImplementedError

    def own_rank(self) -> int:
        """Rank of the device on which the code runs; only where `inside()` is
        true."""
        raise NotImplementedError

    def place(self) -> tuple[int, int]:
        """The data index and the sequence index of the part that the running
        code sees; only where `inside()` is true."""
        rank = self.own_rank()
        batch, sequence = (
            self.layout.index(rank, axis) for axis in (BATCH, SEQUENCE)
        )
        return batch, sequence

    def data_index(self) -> int:
        """Index of the part of the batch that the running code sees: a number
        below `data_size` where it sees a part, else 0."""
        return self.place()[0] if self.inside() else 0

    @abc.abstractmethod
    def per_shard(
        self,
        function: Callable[..., Any],
        tensors: list[Tensor],
        shared: Sequence[Tensor] = (),
        by_sample: bool = False,
        by_head: Sequence[bool] = (),
    ) -> Any:
        """`function(transport, *shards, *shared)` on every member.

        `tensors` are as a layer sees them, with the sequence on axis 1, and
        so are the results. `shared` have no sequence axis (weights, seeds)
        and are given to every member as they are; a gradient that `function`
        gives one is the member's term of a sum. Where layers see shards and
        the code is not in a step, and on JAX while shapes are inferred,
        `function` gets a ring of one and the whole tensors. With `by_sample`
        a shared tensor may have an entry for each sample that a layer sees.

        `by_head` tells of each of `tensors` and of `shared` whether it has the
        heads of attention on axis 2, of `shared` on axis 0; the results have
        them on axis 2 then. Where devices share heads `function` gets its own,
        if all of them can be split; `head_index` tells which.
        """

    def head_index(self) -> Any:
        """Index of the part of the heads that the running code of `per_shard`
        sees: a number below `model_size` where it sees a part, else 0."""
        return 0

    @abc.abstractmethod
    def true_length(self, length: Any) -> Any:
        """Length of a sequence without padding.

        Args:
            length: that a layer sees; `per_shard` may pad it further.

        Returns:
            The true length of the whole sequence, an int or an int32 scalar.
            None where what `per_shard` spreads has no padding.
        """

    @abc.abstractmethod
    def run(
        self,
        function: Callable[..., Any],
        tensors: list[Any],
        check: Callable[[Any], Tensor],
    ) -> Any:
        """`function` of global tensors; see `DistributedStrategy.run`.

        Args:
            function: of tensors.
            tensors: its arguments.
            check: makes a tensor of each leaf of the result, or raises.
        """

    def program(
        self, function: Callable[..., Any]
    ) -> Callable[[list[Any]], Any]:
        """`run` of one function, to be called with many lists of tensors.

        Where the framework compiles, it does so once for each set of
        shapes. What the function closes over is then as it was at the first
        call, and that is why `run` itself makes a new program every time.
        """
        return lambda tensors: self.run(
            function, tensors, keras.ops.convert_to_tensor
        )

    @abc.abstractmethod
    def kernel_name(self, dtype: str) -> str:
        """Name of the kernel that its steps use for a dtype."""

    def as_in_a_step(self) -> contextlib.AbstractContextManager[None]:
        """Context in which kernels answer as in its steps."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def prepare(self, model: Any) -> None:
        """Called each time fit, evaluate, predict or a *_on_batch method of
        a model starts, inside the scope and after the guard has passed."""

    def recover(self, model: Any) -> None:
        """Called when one of those has ended, with an error or without:
        leave the model usable and keep nothing of it."""
        del model
