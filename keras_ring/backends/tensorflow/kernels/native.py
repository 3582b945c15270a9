"""The C++ attention on TensorFlow: two custom operations.

What is traced with them runs only where their library is loaded. So nobody
gets them by default but the replicas of a strategy, whose programs are not
saved.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import tensorflow as tf

from keras_ring.attention.kernel import Gradients, Inputs, Rows
from keras_ring.attention.native import kernel as native
from keras_ring.attention.native import library
from keras_ring.attention.native.kernel import NativeKernel
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit
from keras_ring.distribution import strategy
from keras_ring.masks.band import Band

_as_it_is = tf.autograph.experimental.do_not_convert

SOURCE = Path(__file__).with_name("native.cpp")


class TensorFlowNativeKernel(NativeKernel):
    """C++ kernel; it overwrites what a visit is added to if nobody else holds
    it."""

    # In a program the last batch of an epoch opens the first axis, and lengths
    # that vary the third, with the place where padding begins.
    open_axes = 3
    open_limits = True
    # Nothing in here is a loop or a branch of a program.
    forward = _as_it_is(NativeKernel.forward)
    backward = _as_it_is(NativeKernel.backward)
    available = _as_it_is(NativeKernel.available)
    preferred = _as_it_is(NativeKernel.preferred)

    def load(self) -> None:
        loaded()

    def preferred_here(self) -> bool:
        world = _world()
        return (
            world is not None
            and len(world.devices) > 1
            and not tf.config.get_visible_devices("GPU")
        )

    def call_forward(
        self, inputs: Inputs, visit: Visit, band: Band, carry: Partial | None
    ) -> Partial:
        found = loaded().keras_ring_forward(
            **_operands(inputs, visit, band),
            before=[] if carry is None else list(carry),
        )
        return Partial(*found)

    def call_backward(
        self,
        inputs: Inputs,
        rows: Rows,
        visit: Visit,
        band: Band,
        carry: tf.Tensor | None,
    ) -> Gradients:
        found = loaded().keras_ring_backward(
            **_operands(inputs, visit, band),
            lse=rows.lse,
            delta=rows.delta,
            grad_out=rows.grad_out,
            before=[] if carry is None else [carry],
        )
        return Gradients(*found)

    def fits(
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool:
        return not _for_xla() and super().fits(inputs, visit, rows)


def _load() -> Any:
    """The module of the operations."""
    flags = (
        *tf.sysconfig.get_compile_flags(),
        # A library belongs to one release.
        f'-DKERAS_RING_TENSORFLOW="{tf.__version__}"',
        *tf.sysconfig.get_link_flags(),
    )
    seconds = library.patience(strategy.current())
    sources = [SOURCE, library.ATTENTION]
    path = library.build("tensorflow", sources, flags, seconds)
    return tf.load_op_library(str(path))


loaded = library.Once(_load)


def _operands(inputs: Inputs, visit: Visit, band: Band) -> dict[str, Any]:
    """Inputs and attributes that both operations have."""
    return {
        **inputs._asdict(),
        "query_starts": tf.convert_to_tensor(visit.query_starts, tf.int32),
        "key_starts": tf.convert_to_tensor(visit.key_starts, tf.int32),
        "limits": _limits(band),
        "least": band.least,
        "most": band.most,
        "scale": visit.scoring.scale,
        "threads": max(1, native.threads() // _neighbours()),
    }


def _limits(band: Band) -> tf.Tensor:
    """`stop` and `rows`, in one operation where they are known."""
    limits = [band.stop, band.rows]
    if not all(isinstance(limit, int) for limit in limits):
        limits = [tf.cast(limit, tf.int64) for limit in limits]
    return tf.convert_to_tensor(limits, tf.int64)


_ASSUMED: ContextVar[Any] = ContextVar("keras_ring_replicas", default=None)


@contextlib.contextmanager
def replicas_of(world: Any) -> Iterator[None]:
    """Context whose code is asked as if it ran on a replica."""
    token = _ASSUMED.set(world)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def _world() -> Any:
    """That of the strategy whose replica runs here, or None."""
    assumed = _ASSUMED.get()
    if assumed is not None:
        return assumed
    world = strategy.current()
    return world if world is not None and world.inside() else None


def _neighbours() -> int:
    """Replicas that compute at the same time in this process."""
    world = _world()
    return 1 if world is None else len(world.devices) // world.workers


def _for_xla() -> bool:
    """True if what is traced is compiled by XLA, which knows no custom
    operations."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        context = getattr(graph, "_get_control_flow_context", lambda: None)()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False
