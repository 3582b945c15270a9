"""The ring on TensorFlow: the replicas of a mirrored strategy.

Replica `r` of the strategy is member `r % size` of ring `r // size`. Two
ways to move tensors exist, and both cost one copy per hop:

-   *placed copies*: `merge_call` brings the replicas together while the
    program is traced, and `tf.identity` on the receiver's device is the
    transfer. It works eagerly and in a `tf.function`, for every dtype and
    for sizes that are only known at run time, but within one process.
-   *broadcast pairs*: `CollectiveBcastSendV2` and `CollectiveBcastRecvV2` in
    a group of the two replicas. It crosses processes and has a timeout, but
    blocks, and so runs in compiled functions only.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_ring.distribution.transport import (
    Pending,
    PointToPoint,
    check_permutation,
)

# Groups of Keras and TensorFlow are numbered from 1 up; those of a ring
# start here, and those whose tensors have sizes known at run time only at
# `_DYNAMIC_GROUPS`, where the shape is part of the number.
_GROUPS = 1 << 20
_DYNAMIC_GROUPS = 1 << 30

# What a broadcast can carry as it is; the others travel as one of these.
_CARRIED = frozenset(
    (tf.bool, tf.float16, tf.float32, tf.float64, tf.int32, tf.int64)
)
_SMALL_INTEGERS = frozenset((tf.int8, tf.uint8, tf.int16, tf.uint16))


class InstanceKeys:
    """Names for broadcasts, the same on every replica and worker.

    Sender and receiver of a transfer meet under a number. The first replica
    that comes to the n-th transfer of a program draws a new number, the
    others find it; as every replica of every worker traces the same
    transfers in the same order, all agree. A number is never used by two
    programs, because the runtime remembers the shape that belongs to it.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._drawn: Any = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def draw(self, graph: Any, replica: int) -> int:
        """The number of the next transfer of a replica in a program."""
        with self._lock:
            drawn, positions = self._drawn.setdefault(graph, ([], {}))
            position = positions.get(replica, 0)
            positions[replica] = position + 1
            if position == len(drawn):
                drawn.append(next(self._numbers))
            return drawn[position]


class RingTransport(PointToPoint):
    """The ring of one replica, used inside `tf.distribute.Strategy.run`.

    Args:
        replica: number of this replica, in all workers.
        members: replicas of the ring, in order; this one is among them.
        devices: a number below 1024 for the device of each replica; one
            device has one number for as long as the process lives.
        timeout: seconds after which a broadcast that does not finish fails.
        keys: names for broadcasts; one object for the process.
        placed: move tensors by placed copies, which needs all replicas in
            this process. Broadcast pairs otherwise.
    """

    def __init__(
        self,
        replica: int,
        members: Sequence[int],
        *,
        devices: Sequence[int],
        timeout: float,
        keys: InstanceKeys,
        placed: bool,
    ):
        self.size = len(members)
        self._replica = replica
        self._members = members
        self._devices = devices
        self._timeout = timeout
        self._keys = keys
        self._placed = placed

    def index(self) -> int:
        return self._members.index(self._replica)

    def start_exchange(
        self, tensors: Sequence[tf.Tensor], permutation: Sequence[int]
    ) -> Pending:
        check_permutation(permutation, self.size)
        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        if self.size == 1 or not tensors:
            return Pending(lambda: tensors)
        inverse = [list(permutation).index(i) for i in range(self.size)]
        move = self._copy if self._placed else self._broadcast

        @tf.custom_gradient
        def moved(*tensors: tf.Tensor) -> Any:
            def gradient(*gradients: tf.Tensor) -> Any:
                floating = [t.dtype.is_floating for t in tensors]
                back = iter(
                    move(
                        list(itertools.compress(gradients, floating)),
                        inverse,
                        permutation,
                    )
                )
                return tuple(next(back) if f else None for f in floating)

            return tuple(move(tensors, permutation, inverse)), gradient

        arrived = list(moved(*tensors))
        return Pending(lambda: arrived)

    def repeat(
        self,
        count: int,
        body: Callable[[Any, Any], Any],
        carry: Any,
        first: int = 0,
    ) -> Any:
        for hop in range(first, first + count):
            carry = body(hop, self._finished(carry))
        # A transfer needs no result of the hop before; without the order all
        # chunks of the sequence would arrive at once and wait in memory.
        return self._finished(carry)

    def _finished(self, carry: Any) -> Any:
        """The same tensors, available once all of them have been computed."""
        leaves = tf.nest.flatten(carry)
        if (
            not self._placed
            or tf.executing_eagerly()
            or not all(isinstance(leaf, tf.Tensor) for leaf in leaves)
        ):
            return after(carry, leaves)
        # One operation for all: they are most of a step that is traced. Four
        # replicas that broadcast wait for one another for ever with it.
        return tf.nest.pack_sequence_as(carry, tf.identity_n(leaves))

    def _copy(
        self,
        tensors: Sequence[tf.Tensor],
        permutation: Sequence[int],
        inverse: Sequence[int],
    ) -> list[tf.Tensor]:
        del permutation
        size = self.size

        def merged(strategy: Any, tensors: Any) -> Any:
            devices = strategy.extended.worker_devices
            everyones = [
                strategy.experimental_local_results(t) for t in tensors
            ]
            rows = []
            for replica, device in enumerate(devices):
                first = replica // size * size
                source = first + inverse[replica - first]
                with tf.device(device):
                    rows.append(
                        [
                            # Equal on all replicas: a single result. What a
                            # gradient goes through looks for variables behind
                            # its results, and shall not do so in all of
                            # another replica's program.
                            tf.stop_gradient(
                                each[source if len(each) > 1 else 0]
                            )
                            for each in everyones
                        ]
                    )
            return rows

        context = tf.distribute.get_replica_context()
        try:
            rows = context.merge_call(merged, args=(list(tensors),))
        except RuntimeError as error:
            if "merge_call" in str(error):
                raise _nested() from error
            raise
        return rows[self._replica]

    def _broadcast(
        self,
        tensors: Sequence[tf.Tensor],
        permutation: Sequence[int],
        inverse: Sequence[int],
    ) -> list[tf.Tensor]:
        if tf.executing_eagerly():
            raise NotImplementedError(
                "A ring across processes runs in compiled functions only, "
                "because every transfer waits for its other side. Received: "
                "an eager step. Use `run_eagerly=False`."
            )
        graph = tf.compat.v1.get_default_graph()
        # The graph that the strategy runs the replicas in, where it is known.
        if getattr(threading.current_thread(), "graph", graph) is not graph:
            raise _nested()
        index, arrived = self.index(), []
        target = self._members[permutation[index]]
        source = self._members[inverse[index]]
        if target == self._replica:
            # The others draw for theirs, and all must agree afterwards.
            for _ in tensors:
                self._keys.draw(graph, self._replica)
            return list(tensors)
        for tensor in tensors:
            message = _pack(tensor)
            key = self._keys.draw(graph, self._replica)
            sent = tf.raw_ops.CollectiveBcastSendV2(
                input=message,
                group_size=2,
                group_key=self._group(self._replica, target, message),
                instance_key=key,
                timeout_seconds=self._timeout,
            )
            received = tf.raw_ops.CollectiveBcastRecvV2(
                group_size=2,
                group_key=self._group(source, self._replica, message),
                instance_key=key,
                shape=tf.shape(message),
                T=message.dtype,
                timeout_seconds=self._timeout,
            )
            received.set_shape(message.shape)
            # Nothing uses what was sent: without this it is pruned.
            with tf.control_dependencies([sent]):
                arrived.append(_unpack(tf.identity(received), tensor.dtype))
        return arrived

    def _group(self, source: int, target: int, message: tf.Tensor) -> Any:
        """The number of the group of two devices, in one direction."""
        edge = self._devices[source] * 1024 + self._devices[target]
        if message.shape.is_fully_defined():
            return _GROUPS + edge
        # A number belongs to one shape for good. A collision of hashes ends
        # in the runtime's error about shapes or members.
        group = tf.constant(edge, tf.int64)
        for size in tf.unstack(tf.shape(message, tf.int64)):
            group = (group * 1000003 + size) % 1000000007
        return _DYNAMIC_GROUPS + tf.cast(group, tf.int32)


def after(structure: Any, finished: Sequence[Any]) -> Any:
    """The same tensors, available once others have been computed."""
    if tf.executing_eagerly():
        return structure
    tensors = [t for t in finished if isinstance(t, tf.Tensor)]
    with tf.control_dependencies(tensors):
        return tf.nest.map_structure(
            lambda t: tf.identity(t) if isinstance(t, tf.Tensor) else t,
            structure,
        )


def _pack(tensor: tf.Tensor) -> tf.Tensor:
    if tensor.dtype in _CARRIED:
        return tensor
    if tensor.dtype == tf.bfloat16:
        return tf.bitcast(tensor, tf.float16)
    if tensor.dtype in _SMALL_INTEGERS:
        return tf.cast(tensor, tf.int32)
    raise NotImplementedError(
        "A tensor of this dtype cannot be sent to another process. Received: "
        f"dtype={tensor.dtype.name}. Cast it to a float, an integer or a bool."
    )


def _unpack(message: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    if message.dtype == dtype:
        return message
    if dtype == tf.bfloat16:
        return tf.bitcast(message, dtype)
    return tf.cast(message, dtype)


def _nested() -> NotImplementedError:
    return NotImplementedError(
        "A ring cannot move tensors inside a tf.function, tf.cond or "
        "tf.while_loop that is nested in the step: its replicas are not "
        "traced together there. Call the layer in the step itself."
    )
