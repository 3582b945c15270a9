"""Agreement of all processes on weights, data, random numbers.

Rank 0 sets the weights and the state of the random number generators.
That the data are the same is checked, since nobody can set it: each process
reads them itself.
"""

import contextlib
import hashlib
import pickle
import random
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import keras
import numpy as np
import torch
import torch.distributed as dist
from keras import tree

from keras_ring import random_bits
from keras_ring.backends.torch import seeds, weights
from keras_ring.backends.torch.member import Member
from keras_ring.backends.torch.processes import groups
from keras_ring.backends.torch.transport import RingTransport
from keras_ring.distribution import padding


class Agreement:
    """Keeps the processes of one world in step.

    Args:
        world: the processes.
    """

    def __init__(self, world: Member):
        self.world = world
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._check_weights = False
        self._check_data = False
        self._check_gradients = False

    def start(self, model: Any) -> None:
        """Called when fit, evaluate, predict or a *_on_batch starts."""
        del model
        self._check_weights = self._check_gradients = True
        self.start_epoch()

    def start_epoch(self) -> None:
        """Give every process rank 0's random state, so that all shuffle the
        same way; look at the next batch."""
        self._check_data = True
        if self.world.size == 1:
            return
        own = (
            torch.get_rng_state(),
            np.random.get_state(),
            random.getstate(),
            seeds.global_seed(),
        )
        states = self.from_rank_0(own)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if states[3] is None:
            seeds.forget_global_seed()
        else:
            seeds.set_global_seed(states[3])

    def check(self, model: Any, batch: Any) -> None:
        """Before a step: compare, once after each start, what this process
        is about to use with what the others are.

        Raises:
            RuntimeError: naming the ranks that differ from rank 0.
        """
        if self.world.size == 1:
            return
        if self._check_weights and model not in self._known:
            self.broadcast(model)
            self._known.add(model)
            # Parts are not sent: they must be of the same values.
            self._check_weights = weights.shared(self.world, "weights")
        if self._check_data or self._check_weights:
            digests = (
                _data_digest(batch) if self._check_data else "",
                _weights_digest(model) if self._check_weights else "",
            )
            self._check_data = self._check_weights = False
            data, values = zip(*self.from_all(digests), strict=True)
            _compare(
                values,
                f"The weights of the model {model.name!r} differ between the "
                "processes",
                "Change weights on every rank alike (load_weights, "
                "set_weights), or load them into a new model before its "
                "first fit: it takes those of rank 0.",
            )
            _compare(
                data,
                "The processes read different data, and every one must read "
                "the same global batches in the same order",
                "Seed what shuffles them (for example "
                "tf.data.Dataset.shuffle(seed=...)), and let no rank draw "
                "random numbers that the others do not draw.",
            )

    def check_gradients(
        self, present: Sequence[bool], variables: Sequence[Any]
    ) -> None:
        """In the first step: all must have gradients of the same variables.

        Raises:
            RuntimeError: if one has a gradient that another does not have.
        """
        if not self._check_gradients or self.world.size == 1:
            return
        self._check_gradients = False
        missing = [
            variable.path
            for variable, here in zip(variables, present, strict=True)
            if not here
        ]
        _compare(
            [str(names) for names in self.from_all(missing)],
            "The processes have no gradient for different variables (here: "
            f"{missing})",
            "A layer must be called on every process or on none.",
        )

    def broadcast(self, model: Any) -> None:
        """Give a model and its optimizer the values they have on rank 0."""
        optimizer = getattr(model, "optimizer", None)
        variables = [*model.variables]
        if optimizer is not None:
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
            variables += optimizer.variables
        device = groups.keras_device()
        for variable in variables:
            if weights.lies_in_parts(variable):
                continue  # It is that of rank 0 from the start.
            value = variable.value.detach()
            # NCCL sends from GPUs only.
            buffer = value.to(device).contiguous()
            with self._everyone.reporting:
                dist.broadcast(buffer, src=0, group=self._everyone.group)
            if buffer is not value:
                value.copy_(buffer)

    @contextlib.contextmanager
    def own_seeds(self, model: Any) -> Iterator[None]:
        """Random numbers of a step: others on every process, the same in
        every run, and afterwards the generators stand as on one device."""
        rank = self.world.rank
        if self.world.size == 1:
            yield
            return
        if padding.whole():
            # Members of a ring do the same, and draw the same.
            rank -= self.world.place()[1]
        offset = (rank * random_bits.STRIDE) & 0xFFFFFFFF
        # As the int32 in which seeds are kept.
        offset -= (offset & 0x80000000) << 1
        states = [
            v.value.detach()
            for v in model.variables
            if v.name == "seed_generator_state" and not random_bits.is_shared(v)
        ]
        with (
            seeds.forked_global_seed(offset),
            _forked_torch_seed(rank),
        ):
            for state in states:
                state[0] += offset
            try:
                yield
            finally:
                for state in states:
                    state[0] -= offset

    def from_rank_0(self, own: Any) -> Any:
        """A picklable object as rank 0 has it."""
        box: list[Any] = [pickle.dumps(own) if self.world.rank == 0 else None]
        with self._everyone.reporting:
            dist.broadcast_object_list(box, src=0, group=self._everyone.group)
        return pickle.loads(box[0])

    def from_all(self, own: Any) -> list[Any]:
        """A picklable object as each rank has it."""
        boxes: list[Any] = [None] * self.world.size
        with self._everyone.reporting:
            dist.all_gather_object(boxes, own, group=self._everyone.group)
        return boxes

    @property
    def _everyone(self) -> RingTransport:
        # Asked for only where there are several processes.
        return cast("RingTransport", self.world.everyone)


def _compare(values: Sequence[Any], rule: str, fix: str) -> None:
    others = [rank for rank, value in enumerate(values) if value != values[0]]
    if others:
        raise RuntimeError(
            f"{rule}. Received: other values than rank 0 on the ranks "
            f"{others}. {fix}"
        )


@contextlib.contextmanager
def _forked_torch_seed(rank: int) -> Iterator[None]:
    """PyTorch's own generator, from which Keras' Dropout without a seed
    draws. A step starts from a seed of its own on every process; one that
    drew numbers moves the generator on by one number on all of them."""
    seed = _crc(torch.get_rng_state())
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.current_device()] if cuda else []

    def states() -> list[int]:
        own = [torch.get_rng_state()]
        if cuda:
            own.append(torch.cuda.get_rng_state())
        return [_crc(state) for state in own]

    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(zlib.crc32(f"{seed} {rank}".encode()))
        before = states()
        yield
        used = states() != before
    if used:
        torch.rand(())


def _crc(state: torch.Tensor) -> int:
    return zlib.crc32(state.numpy().tobytes())


def _data_digest(batch: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree.flatten(batch):
        if leaf is None:
            digest.update(b"none")
            continue
        array = np.ascontiguousarray(keras.ops.convert_to_numpy(leaf))
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _weights_digest(model: Any) -> str:
    """Of a sample of every variable: weights that differ do so nearly
    everywhere, and reading all of a large model costs a step."""
    digest = hashlib.blake2b(digest_size=16)
    optimizer = getattr(model, "optimizer", None)
    for variable in (
        *model.weights,
        *(optimizer.variables if optimizer is not None else ()),
    ):
        part = weights.part_of(variable)
        if part is not None and not part.keeps_whole:
            # No other process has the same, but of the same values.
            digest.update(str(part.digest).encode())
            continue
        digest.update(str(tuple(variable.shape)).encode())
        digest.update(weights.sample(variable.value).tobytes())
    return digest.hexdigest()
