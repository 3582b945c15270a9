"""`DistributedStrategy`: how a model is spread over devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np

from keras_ring import arguments, backends, errors, tensor_arguments
from keras_ring.distribution.mesh import SEQUENCE
from keras_ring.distribution.settings import Settings
from keras_ring.distribution.world import World


@dataclasses.dataclass(frozen=True)
class DistributedStrategy(Settings):
    """Spread every sequence, and optionally the batch, over devices.

    Models are built, compiled and trained inside `scope()`; `fit`,
    `evaluate` and `predict` then keep only a part of every sequence on each
    device, and `keras_ring.layers.RingAttention` attends over the whole of
    it. The mesh has the axes `"batch"`, `"seq"` and `"model"`.

    JAX and TensorFlow use the devices of this process: `python train.py`.
    PyTorch uses one process per device:
    `torchrun --nproc-per-node N train.py`.

    Args:
        sequence_parallel: number of devices that share one sequence, or -1
            for all the devices that are left.
        data_parallel: number of groups that each take a part of the batch.
        model_parallel: number of devices that share the heads of attention
            and the hidden units of feed-forwards, and so the weights of
            these (tensor parallelism; Shoeybi et al. 2019,
            https://arxiv.org/abs/1909.08053). JAX only.
        devices: device names such as `"gpu:0"`, in mesh order; all devices
            of the framework's default kind if None. On PyTorch one name per
            process.
        balance: whether attention under a causal mask exchanges half chunks
            first, so that every device has the same work; what goes in and
            comes out stays in natural order. "auto" does so where it pays
            (chunks of 256 positions and more), True wherever the length of
            a chunk is known and even, False never.
        timeout: seconds after which a transfer that does not finish ends
            the run with an error (PyTorch, TensorFlow).
        attention: how devices share the attention of a sequence, with the
            same result. "ring": blocks of keys and values go around.
            "all_to_all": each device gets all positions of a part of the
            heads, whose number must be a multiple of `sequence_parallel`.
            "all_gather": each device gets all keys and values. "mixed":
            groups of `heads_parallel` devices share heads, and a ring joins
            the groups. "auto": what moves the fewest bytes.
        heads_parallel: number of devices in a group of "mixed"; as many as
            the heads allow if None.
        shard: what the devices of the data and the sequence axis keep in
            parts, with the same result. "none": each has everything.
            "optimizer": what the optimizer keeps of each weight, such as
            moments (ZeRO-1). "weights": that, the weights and their
            gradients as well (ZeRO-3, fully sharded data parallelism); each
            weight is gathered where it is used. Not on TensorFlow.
        layout_map: how devices of the model axis share other weights than
            those of this package's layers, of stock attention and of
            embeddings: axes of the mesh by regular expressions of variable
            paths (`{".*dense/kernel": (None, "model")}`), a
            `keras.distribution.LayoutMap`, or a function that makes one of a
            `keras.distribution.DeviceMesh`, such as `get_layout_map` of a
            KerasHub backbone. Its rules go before the package's own.

    Raises:
        ValueError: for sizes that are no positive integers, or that do not
            fit the devices (when the strategy is first used).
        NotImplementedError: for `model_parallel` other than 1 on other
            backends than JAX, and for `shard` on TensorFlow.

    Example:

    ```python
    strategy = keras_ring.DistributedStrategy(sequence_parallel=8)
    with strategy.scope():
        model = build_model()
        model.compile("adam", "mse")
        model.fit(x, y)
    ```

    Reference:
        Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers
        for Near-Infinite Context", 2023, https://arxiv.org/abs/2310.01889
    """

    @functools.cached_property
    def world(self) -> World:
        """This strategy on the devices of the running backend."""
        return backends.load().runtime.World(self)

    def scope(self) -> AbstractContextManager[None]:
        """Make this strategy the one under which models are built and used.

        Returns:
            A context manager, for `with strategy.scope():`.

        Raises:
            ValueError: if the devices do not suffice or another strategy is
                active.
        """
        return self.world.scope()

    def run(self, function: Callable[..., Any], *tensors: Any) -> Any:
        """Run a function of tensors under the strategy.

        Inside, `function` sees what a layer sees: on JAX the global tensors
        (sharded over the devices), on TensorFlow and PyTorch its own shard.

        On TensorFlow and JAX `function` is traced and compiled at each call,
        so that what it reads of Python is always as it is now. A
        `tf.function` is traced once for each set of shapes, as everywhere
        (but without AutoGraph): decorate the steps of a loop.

        Args:
            function: takes as many tensors as are given here, returns a
                tensor or a nested structure of tensors, None nowhere in it.
                A `tf.function` on TensorFlow, if it is to be called often.
            *tensors: global arrays, the same on every process. Those of rank
                2 and more, `(batch, length, ...)`, are split over batch and
                length, rank 1 over the batch; rank 0 is given to all.

        Returns:
            What `function` returns as global tensors in natural order, on
            every process: results of rank 2 and more are joined along batch
            and length, rank 1 along the batch; scalars are averaged over
            the devices. Batches and lengths that the devices cannot split
            equally are padded, by copies of the last element, while
            `function` runs, and results come without the padding.

        Raises:
            ValueError: for what is no function, for an empty tensor, and for
                a result that holds something else than tensors.
        """
        arguments.function("function", function)
        for number, tensor in enumerate(tensors):
            _check_shared(f"tensors[{number}]", tensor)

        with errors.as_raised():
            return self.world.run(function, list(tensors), _checked_result)

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Print the mesh, the devices, the way to share a sequence and the
        kernel that is used.

        Args:
            print_fn: called once per line.

        Raises:
            ValueError: if `print_fn` is no function.
        """
        arguments.function("print_fn", print_fn)
        world, backend = self.world, backends.load()
        kernel = world.kernel_name(keras.config.floatx())
        lines = [
            "DistributedStrategy",
            f"  backend            {backend.name}",
            f"  data parallel      {world.data_size}",
            f"  sequence parallel  {world.sequence_size}",
            f"  model parallel     {self.model_parallel}",
            f"  devices            {world.layout.size()}",
            f"  attention          {self._shared_by()}",
            f"  sharded            {self.shard}",
            f"  kernel             {kernel}",
            "  a layer sees       "
            + ("its shard" if world.layers_see_shards else "the whole sequence")
            + f" (each device holds 1/{world.sequence_size})",
        ]
        for number, ranks in enumerate(world.layout.groups(SEQUENCE)):
            ring = " -> ".join(world.devices[rank] for rank in ranks)
            lines.append(f"  ring {number}             {ring}")
        for line in lines:
            print_fn(line)

    def _shared_by(self) -> str:
        """The way to share a sequence, for `summary`."""
        group = (
            ""
            if self.heads_parallel is None
            else f", heads in groups of {self.heads_parallel}"
        )
        if self.attention == "auto":
            return f"auto ({_CHOICE}{group})"
        return f"{self.attention}{group}"


_CHOICE = "what of ring, all_to_all and mixed moves the fewest bytes"


def _check_shared(name: str, tensor: Any) -> None:
    """Refuse what is no tensor, and one without a row or a position for the
    devices to share."""
    tensor_arguments.numeric(name, tensor)
    shape = tuple(getattr(tensor, "shape", None) or np.shape(tensor))
    if 0 in shape[:2]:
        raise ValueError(
            "A tensor that devices share must have a batch and a length of 1 "
            f"or more. Received: {name}.shape={shape}. Leave the call out "
            "where there is nothing to compute."
        )


def _checked_result(value: Any) -> Any:
    """One result as a tensor, which `run` can join over devices."""
    if keras.ops.is_tensor(value):
        return value
    known = (int, float, np.ndarray, np.generic, keras.Variable)
    if isinstance(value, known):
        return keras.ops.convert_to_tensor(value)
    raise ValueError(
        "The function that is run under a strategy must return a tensor or a "
        "nested structure of tensors. Received: "
        f"{arguments.shown(value)} in what it returned. Return the tensors, "
        "and 0.0 where there is nothing to tell."
    )


_SUSPENDED: ContextVar[bool] = ContextVar("keras_ring_suspended", default=False)


def current() -> World | None:
    """The world of the strategy that is active here, or None."""
    if _SUSPENDED.get():
        return None
    return backends.load().runtime.current()


@contextmanager
def suspended() -> Iterator[None]:
    """Run code that was given the whole sequence: to it there is no
    strategy, so that nothing in it takes the whole for a shard."""
    token = _SUSPENDED.set(True)
    try:
        yield
    finally:
        _SUSPENDED.reset(token)
