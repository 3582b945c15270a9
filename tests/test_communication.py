"""What the ring moves, and how much each member of it computes."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import backends
from keras_ring.attention.kernel import Inputs, Kernel
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.sharing import balance
from keras_ring.attention.sharing.ring import Ring
from keras_ring.distribution import placement, strategy
from keras_ring.distribution.transport import Transport
from keras_ring.masks import BlockCausal, Causal, Padding, PrefixLM
from keras_ring.masks import SlidingWindow as Window
from tests import worlds
from tests.thinning import extra_on

SIZES = [size for size in (2, 3, 4, 8) if size <= worlds.DEVICES]
BATCH, HEADS, KEY_HEADS, DIM = 2, 4, 2, 8
CHUNK = 12
# Bytes of an entry of what travels.
BYTES = {"float32": 4, "bfloat16": 2}


class Counting(Transport):
    """Another transport, and the bytes that a member sends by it."""

    def __init__(self, transport, portion=None):
        self.transport, self.size = transport, transport.size
        self.portion, self.eager = portion, transport.eager
        self.sent, self.times, self.largest = 0, 1, 0
        self.collectives = set()

    def index(self):
        return self.transport.index()

    def _count(self, tensors, share=1):
        message = 0
        for tensor in tensors:
            dtype = keras.backend.standardize_dtype(tensor.dtype)
            message += math.prod(tensor.shape) * BYTES[dtype]
        self.sent += self.times * share * message
        self.largest = max(self.largest, message)

    def start_exchange(self, tensors, permutation):
        self._count(tensors)
        return self.transport.start_exchange(tensors, permutation)

    def all_gather(self, tensor, axis):
        self.collectives.add("all_gather")
        self._count([tensor], self.size - 1)
        return self.transport.all_gather(tensor, axis)

    def all_to_all(self, tensor, split_axis, concat_axis):
        return self.all_to_alls([tensor], split_axis, concat_axis)[0]

    def all_to_alls(self, tensors, split_axis, concat_axis):
        self.collectives.add("all_to_all")
        self._count(tensors, (self.size - 1) / self.size)
        return self.transport.all_to_alls(tensors, split_axis, concat_axis)

    def sum(self, tensor):
        raise AssertionError("Attention sums nothing over members.")

    def repeat(self, count, body, carry, first=0):
        calls = 0

        def counted(hop, carry):
            # A compiled loop is traced once, or more often, for all hops.
            nonlocal calls
            calls += 1
            before, self.times = self.sent, self.times * count
            result = body(hop, carry)
            self.times //= count
            self._each = self.sent - before
            self.sent = before
            return result

        result = self.transport.repeat(count, counted, carry, first)
        if count:
            self.sent += self._each
        return result


class Looking(Kernel):
    """Another kernel, and the most queries of a visit."""

    name = description = "looking"

    def __init__(self, kernel):
        self.kernel, self.most = kernel, 0

    def available(self):
        return True

    def preferred(self, device, dtype):
        return True

    def forward(self, inputs, *others):
        self.most = max(self.most, inputs.query.shape[2])
        return self.kernel.forward(inputs, *others)

    def backward(self, inputs, *others):
        self.most = max(self.most, inputs.query.shape[2])
        return self.kernel.backward(inputs, *others)

    def branch(self, *arguments):
        return self.kernel.branch(*arguments)


def measured(size, dtype, mask, portion=None, balanced=False):
    """Bytes that a member of a ring sends, forward and backward, those of
    its largest message, the most queries of a visit, and the gradients."""
    sent = {}

    def body(transport, query, key, value):
        inputs = Inputs(
            *(
                ops.cast(ops.transpose(t, (0, 2, 1, 3)), dtype)
                for t in (query, key, value)
            )
        )
        counting = Counting(transport, portion)
        kernel = Looking(backends.load().kernel.KERNEL)
        ring, scoring = Ring(counting, kernel, balanced), Scoring(0.3, mask)
        partial = ring.forward(inputs, scoring)
        sent["forward"], counting.sent = counting.sent, 0
        pulls = Partial(ops.ones_like(partial.out), partial.lse * 0)
        grads = ring.backward(inputs, partial, pulls, scoring)
        sent["backward"], sent["largest"] = counting.sent, counting.largest
        sent["queries"] = kernel.most
        assert not counting.collectives, "The ring shifts, and no more."
        sent["eager"] = counting.eager
        return ops.concatenate(
            [ops.transpose(g, (0, 2, 1, 3)) for g in grads[:3]], axis=2
        )

    length = size * CHUNK
    draw = np.random.default_rng(0)
    arrays = [
        draw.normal(size=(BATCH, length, heads, DIM)).astype("float32")
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)

    def per_shard(*shards):
        return strategy.current().per_shard(body, list(shards))

    sent["gradients"] = ring.run(per_shard, *arrays)
    return sent


def check_bytes(size, dtype, mask, hops):
    sent = measured(size, dtype, mask)
    entries = 2 * BATCH * CHUNK * KEY_HEADS * DIM  # Keys and values.
    moved = entries * BYTES[dtype] * hops
    assert sent["forward"] == moved
    # The gradients end at their owner, where those of the first visit wait
    # unless they are part of a program; they travel in the accumulation dtype.
    further = hops > 0 and not sent["eager"]
    assert sent["backward"] == moved + 4 * entries * (hops + further)


@pytest.mark.mostly(size=3, every=2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_a_hop_are_keys_and_values_as_they_are(
    on_devices, size, dtype
):
    """Own dtype, own heads (grouped-query), one hop less than members."""
    on_devices(size, check_bytes, size, dtype, Causal(), size - 1)


def check_portions(size, balanced):
    mask = Causal()
    whole = measured(size, "float32", mask, balanced=balanced)
    cut = measured(size, "float32", mask, 5, balanced)  # Three of four each.
    for way in ("forward", "backward"):
        assert cut[way] == whole[way]
    assert cut["largest"] * 3 == whole["largest"]
    assert whole["queries"] == CHUNK
    assert cut["queries"] == (3 if balanced else 4)
    np.testing.assert_allclose(cut["gradients"], whole["gradients"], atol=1e-5)


# They have no portions.
WHERE_IT_IS_CUT = extra_on("jax", "tensorflow")


@pytest.mark.parametrize(
    "balanced",
    [pytest.param(b, marks=WHERE_IT_IS_CUT) for b in (False, True)],
)
def test_portions_move_as_much_and_less_at_once(on_devices, balanced):
    """On every backend, although not all of them cut what travels."""
    on_devices(3, check_portions, 3, balanced)


def test_a_window_makes_only_the_hops_that_it_needs(on_devices):
    size = worlds.DEVICES
    narrow = Causal() & Window(CHUNK + 1)
    on_devices(size, check_bytes, size, "float32", narrow, 1)
    on_devices(size, check_bytes, size, "float32", Causal() & Window(1), 0)
    # One more key reaches into one more chunk.
    wider = Causal() & Window(CHUNK + 2)
    on_devices(size, check_bytes, size, "float32", wider, 2)


@pytest.mark.parametrize(
    ("mask", "hops"),
    [
        (Window(CHUNK + 1), (-1, 1)),
        (Window(1), (0, 0)),
        (Causal() & Window(2 * CHUNK), (0, 2)),
        (Causal(), (0, 7)),
        (Causal() | Window(3), (0, 7)),
        (Window(3) | Window(3 * CHUNK), (-3, 3)),
        (Window(7 * CHUNK), (0, 7)),
        (BlockCausal(CHUNK) & Window(2), (-1, 1)),
        (PrefixLM(3) & Window(2), (-1, 1)),
    ],
)
def test_hops_of_a_mask(mask, hops):
    assert placement.hops(8, CHUNK, CHUNK, mask.reach()) == hops


def test_hops_are_those_of_the_allowed_pairs():
    """Against the pairs themselves, for chunks of different lengths too."""
    for size, rows, columns in ((4, 5, 5), (3, 4, 7), (5, 6, 3)):
        for mask in (Window(4), Causal() & Window(5), BlockCausal(3), Causal()):
            first, last = placement.hops(size, rows, columns, mask.reach())
            made = {hop % size for hop in range(first, last + 1)}
            pairs = ops.convert_to_numpy(
                mask.allowed(
                    ops.arange(size * rows), ops.arange(size * columns)
                )
            )[0, 0]
            needed = {
                (i - j // columns) % size
                for i in range(size)
                for j in range(size * columns)
                if pairs[i * rows : (i + 1) * rows, j].any()
            }
            assert needed <= made
            # Nothing is visited twice.
            assert last - first < size


def check_enter(size):
    """`enter` moves what `placement` says, `leave` brings it back."""
    length = size * CHUNK
    positions = np.arange(length, dtype="float32").reshape(1, length, 1)

    def enter(transport, shard):
        moved, twice = balance.enter(
            transport, [shard, ops.swapaxes(shard, 1, 2) * 2], [1, 2]
        )
        starts = placement.starts(transport.index(), CHUNK, size, True)
        inside = ops.arange(CHUNK // 2, dtype="int32")
        expected = ops.concatenate([s + inside for s in starts])
        right = ops.all(ops.cast(moved[0, :, 0], "int32") == expected)
        same = ops.all(twice[0, 0] == 2 * moved[0, :, 0])
        back = balance.leave(transport, [moved], [1])[0]
        ok = ops.cast(ops.logical_and(right, same), "float32")
        return ops.concatenate([back, back * 0 + ok], axis=2)

    ring = keras_ring.DistributedStrategy(sequence_parallel=size)

    def body(shard):
        return strategy.current().per_shard(enter, [shard])

    result = ops.convert_to_numpy(ring.run(body, positions))
    np.testing.assert_array_equal(result[..., :1], positions)
    assert (result[..., 1] == 1).all()


@pytest.mark.parametrize("size", SIZES)
def test_halves_go_where_placement_says_and_come_back(on_devices, size):
    on_devices(size, check_enter, size)


def work(size, chunk, balanced):
    """Pairs under a causal mask that each member computes."""
    counts = []
    for index in range(size):
        parts = placement.starts(index, chunk, size, balanced)
        inside = np.arange(chunk // len(parts))
        rows = np.concatenate([start + inside for start in parts])
        counts.append(int((rows + 1).sum()))
    return np.array(counts)


def test_balanced_members_have_equal_work():
    equal, natural = work(8, 128, True), work(8, 128, False)
    assert equal.sum() == natural.sum() == 1024 * 1025 // 2
    assert equal.max() == equal.mean()
    assert natural.max() > 1.8 * natural.mean()


@pytest.mark.parametrize(
    ("choice", "size", "mask", "lengths", "expected"),
    [
        ("auto", 4, Causal(), (256, 256), True),
        ("auto", 4, Causal(), (254, 254), False),  # Too little work.
        (True, 4, Causal(), (12, 12), True),
        (True, 4, Causal(), (13, 13), False),
        (True, 4, Causal(), (12, 24), False),
        (True, 4, Causal(), (None, None), False),
        (True, 1, Causal(), (256, 256), False),
        (False, 4, Causal(), (256, 256), False),
        (True, 4, None, (256, 256), False),
        (True, 4, Window(3), (256, 256), False),
        (True, 4, Causal() & Window(3), (256, 256), False),
        (True, 4, Causal() & Padding(np.ones((1, 4))), (256, 256), True),
        (True, 4, PrefixLM(3), (256, 256), True),
        (True, 4, Causal() | Window(3), (256, 256), True),
    ],
)
def test_where_balance_pays(choice, size, mask, lengths, expected):
    assert balance.pays(choice, size, mask, *lengths) is expected


def check_balanced_attention():
    """Balanced and not: the same results, and what is exchanged is small."""
    size, length = 4, 4 * CHUNK
    draw = np.random.default_rng(3)
    arrays = [
        draw.standard_normal((BATCH, length, heads, DIM)).astype("float32")
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    results = []
    for choice in (True, False):
        ring = keras_ring.DistributedStrategy(
            sequence_parallel=size, balance=choice
        )
        results.append(
            ops.convert_to_numpy(
                ring.run(
                    lambda q, k, v: keras_ring.ops.ring_attention(
                        q, k, v, mask=Causal()
                    ),
                    *arrays,
                )
            )
        )
    np.testing.assert_allclose(*results, atol=2e-6)
    # Other sums: otherwise nothing was balanced at all.
    assert (results[0] != results[1]).any()


def test_balance_changes_no_result(on_devices):
    on_devices(4, check_balanced_attention)


@pytest.mark.parametrize("choice", ["yes", 1, None])
def test_balance_is_checked(choice):
    with pytest.raises(ValueError, match="`balance` must be"):
        keras_ring.DistributedStrategy(balance=choice)
