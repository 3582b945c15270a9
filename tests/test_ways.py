"""Ways to share the attention of a sequence beside the ring: what they move,
what they refuse, and models that train with them."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import backends
from keras_ring.attention.kernel import Inputs
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.sharing.all_gather import AllGather
from keras_ring.attention.sharing.all_to_all import AllToAll
from keras_ring.attention.sharing.choice import Heads, Way, choose_way, moved
from keras_ring.attention.sharing.ring import Ring
from keras_ring.distribution import strategy
from keras_ring.distribution.settings import Settings
from keras_ring.distribution.transport import LocalTransport
from keras_ring.masks import Causal
from tests.test_communication import BYTES, Counting
from tests.thinning import extra_on

SIZE, CHUNK, DIM, BATCH = 4, 6, 8, 2
BACKEND = keras.backend.backend()


def sharing_of(name, counting, heads):
    """A way to share of a ring of four, and the transports that it moves by."""
    kernel = backends.load().kernel.KERNEL
    if name == "all_gather":
        return AllGather(counting, kernel), [counting]
    if name == "all_to_all":
        inner = Ring(LocalTransport(), kernel)
        return AllToAll(counting, kernel, heads, inner), [counting]
    group, ring = map(Counting, counting.transport.split(2))
    return AllToAll(group, kernel, heads, Ring(ring, kernel)), [group, ring]


def check_bytes(name, heads, dtype):
    sent = {}

    def body(transport, *tensors):
        inputs = Inputs(
            *(ops.cast(ops.transpose(t, (0, 2, 1, 3)), dtype) for t in tensors)
        )
        shared, transports = sharing_of(name, Counting(transport), heads)
        sent["eager"] = transport.eager

        def counted(way, function, *arguments):
            for found in transports:
                found.sent = 0
            result = function(*arguments)
            sent[way] = sum(found.sent for found in transports)
            return result

        def forward():
            placed, scoring = shared.enter(inputs, Scoring(0.3, Causal()))
            partial = shared.forward(placed, scoring)
            rows = [ops.cast(partial.out, dtype), partial.lse]
            return placed, scoring, partial, shared.leave_rows(rows)

        placed, scoring, partial, rows = counted("forward", forward)

        def backward():
            pulls = Partial(*shared.enter_rows([rows[0] * 0 + 1, rows[1] * 0]))
            grads = shared.backward(placed, partial, pulls, scoring)
            return shared.leave(list(grads[:3]), dtype)

        grads = counted("backward", backward)
        return ops.concatenate(
            [ops.transpose(g, (0, 2, 1, 3)) for g in grads], axis=2
        )

    draw = np.random.default_rng(0)
    arrays = [
        draw.normal(size=(BATCH, SIZE * CHUNK, n, DIM)).astype("float32")
        for n in (heads.query, heads.key, heads.key)
    ]
    ring = keras_ring.DistributedStrategy(sequence_parallel=SIZE)
    ring.run(
        lambda *shards: strategy.current().per_shard(body, list(shards)),
        *arrays,
    )
    one = BATCH * CHUNK * DIM * BYTES[dtype]  # A head of a chunk.
    wide = one * 4 // BYTES[dtype]
    lse = BATCH * CHUNK * 4 * heads.query
    way = Way(name, {"all_gather": 1, "all_to_all": SIZE, "mixed": 2}[name])
    formula = one * moved(way, SIZE, heads, SIZE - 1)
    if name == "all_gather":
        assert sent["forward"] == formula
        # Gathered once more, and each member's gradients of all others' keys.
        back = formula + 2 * heads.key * wide * (SIZE - 1)
        assert sent["backward"] == back
        return
    share = (way.inner - 1) / way.inner
    keys = math.lcm(heads.key, way.inner)
    assert sent["forward"] == formula + share * lse
    back = share * (heads.query * one + lse)  # What arrives at the rows.
    # Key heads that are repeated are summed before they are rounded.
    back += share * (heads.query + 2 * keys) * one
    if keys > heads.key:
        back += share * 2 * keys * (wide - one) + share * heads.query * (
            wide - one
        )
    hops = SIZE // way.inner - 1
    back += hops * 2 * keys * one
    back += (hops + (hops > 0 and not sent["eager"])) * 2 * keys * wide
    assert sent["backward"] == back


@pytest.mark.parametrize(
    "name",
    [
        "all_gather",
        # The mix has it in it.
        pytest.param("all_to_all", marks=extra_on("tensorflow")),
        "mixed",
    ],
)
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        (Heads(4, 4), "float32"),
        pytest.param(
            Heads(8, 1), "bfloat16", marks=extra_on("tensorflow", "torch")
        ),
    ],
    ids=["equal", "grouped"],
)
def test_bytes_are_those_of_the_formula(on_devices, name, heads, dtype):
    on_devices(SIZE, check_bytes, name, heads, dtype)


@pytest.mark.once
@pytest.mark.parametrize(
    ("size", "heads", "hops", "given", "expected"),
    [
        (1, (4, 4), 0, {"attention": "mixed"}, ("ring", 1)),
        (4, (3, 3), 3, {"attention": "ring"}, ("ring", 1)),
        (4, (3, 3), 3, {"attention": "all_gather"}, ("all_gather", 1)),
        (4, (8, 2), 3, {"attention": "all_to_all"}, ("all_to_all", 4)),
        (8, (4, 4), 7, {"attention": "mixed"}, ("mixed", 4)),
        (
            *(8, (4, 4), 7, {"attention": "mixed", "heads_parallel": 2}),
            ("mixed", 2),
        ),
        (8, (8, 8), 7, {"attention": "auto"}, ("all_to_all", 8)),
        (8, (4, 4), 7, {"attention": "auto"}, ("mixed", 4)),
        (8, (3, 3), 7, {"attention": "auto"}, ("ring", 1)),
        # One head of keys: a ring moves it alone, and all-to-all copies it.
        (8, (8, 1), 7, {"attention": "auto"}, ("ring", 1)),
        # A window that reaches one chunk back.
        (8, (8, 8), 1, {"attention": "auto"}, ("ring", 1)),
        (
            *(8, (8, 8), 7, {"attention": "auto", "heads_parallel": 4}),
            ("mixed", 4),
        ),
    ],
)
def test_the_way_that_is_taken(size, heads, hops, given, expected):
    asked = given.get("heads_parallel")
    way = choose_way(size, Heads(*heads), hops, given["attention"], asked)
    assert way == Way(*expected)


@pytest.mark.once
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention": "ulysses"}, "must be one of 'ring', 'all_to_all'"),
        ({"attention": None}, "attention=None"),
        ({"attention": "mixed", "heads_parallel": 1}, "heads_parallel=1"),
        ({"heads_parallel": 2}, 'set attention="mixed"'),
        ({"attention": "all_to_all", "heads_parallel": 2}, "Leave it out"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        keras_ring.DistributedStrategy(**given)


@pytest.mark.once
@pytest.mark.parametrize("inner", [3, 8])
def test_groups_that_do_not_fit_are_refused(inner):
    found = Settings(8, attention="mixed", heads_parallel=inner)
    with pytest.raises(ValueError, match=f"heads_parallel={inner}, sequence"):
        found.mesh(8)


def check_heads():
    x = np.ones((2, 8, 3, 4), "float32")
    for name, message in (
        ("all_to_all", "3 query heads for sequence_parallel=4. Use attention"),
        ("mixed", "heads_parallel=None. Use attention="),
    ):
        strategy = keras_ring.DistributedStrategy(
            sequence_parallel=4, attention=name
        )
        with strategy.scope():
            layer = keras_ring.layers.RingAttention(3, 4)
            with pytest.raises(ValueError, match=message):
                layer(keras.Input((None, 12)))
        with pytest.raises(ValueError, match=message):
            strategy.run(lambda x: keras_ring.ops.ring_attention(x, x, x), x)


def test_heads_that_cannot_be_shared_are_refused(on_devices):
    on_devices(4, check_heads)


def check_layers():
    """What a layer says goes before the strategy, and is saved."""
    x = np.random.default_rng(0).normal(size=(2, 8, 12)).astype("float32")
    scope = keras_ring.DistributedStrategy(
        sequence_parallel=2, attention="all_to_all"
    ).scope()
    with scope:
        inputs = keras.Input((None, 12))
        for layer in (
            keras_ring.layers.RingAttention(3, 4, attention="ring"),
            keras_ring.layers.RingTransformerBlock(3, 8, attention="ring"),
        ):
            again = type(layer).from_config(layer.get_config())
            model = keras.Model(inputs, again(inputs))
            # Three heads: two devices cannot share them.
            assert model.predict(x, verbose=0).shape == x.shape
    with pytest.raises(ValueError, match="`attention` must be one of 'ring'"):
        keras_ring.layers.RingTransformerBlock(3, 8, attention="rings")


def test_a_layer_may_have_a_way_of_its_own(on_devices):
    on_devices(2, check_layers)


def build():
    keras.utils.set_random_seed(5)
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(11, 16, mask_zero=True)(tokens)
    x = keras_ring.layers.RingTransformerBlock(
        4,
        32,
        num_key_value_heads=1,
        causal=True,
        rotary=True,
        alibi=True,
        sinks=True,
        dropout=0.1,
        attention_dropout=0.2,
        seed=3,
    )(x)
    model = keras.Model(tokens, keras.layers.Dense(11)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # What the softmax does not see has a gradient of rounding alone, which
    # SGD leaves as small as it is.
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


def outcome():
    """Losses, weights and predictions of a model of all that is dropped,
    padded and grouped."""
    draw = np.random.default_rng(1)
    x = draw.integers(1, 11, (5, 13)).astype("int32")
    x[1, 9:] = 0
    y = draw.integers(0, 11, x.shape)
    model = build()
    fitted = model.fit(x, y, batch_size=5, epochs=3, verbose=0, shuffle=False)
    predicted = model.predict(x, batch_size=5, verbose=0)
    return fitted.history["loss"], model.get_weights(), predicted


def check_training(mesh, attention, want):
    strategy = keras_ring.DistributedStrategy(
        data_parallel=mesh[0], sequence_parallel=mesh[1], attention=attention
    )
    with strategy.scope():
        losses, weights, predicted = outcome()
    np.testing.assert_allclose(losses, want[0], rtol=1e-5)
    for have, wanted in zip(weights, want[1], strict=True):
        np.testing.assert_allclose(have, wanted, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(predicted, want[2], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one_device():
    return outcome()


# Replicas are traced one by one: four of them take long.
@pytest.mark.parametrize(
    ("mesh", "attention"),
    [
        pytest.param((1, 2), "all_to_all", marks=extra_on("jax", "torch")),
        pytest.param((2, 2), "all_to_all", marks=extra_on("tensorflow")),
        pytest.param((1, 3), "all_gather", marks=extra_on("tensorflow")),
        pytest.param((1, 4), "mixed", marks=extra_on("jax", "tensorflow")),
    ],
    ids=["all_to_all-1x2", "all_to_all-2x2", "all_gather-1x3", "mixed-1x4"],
)
def test_training_is_that_of_one_device(
    on_devices, mesh, attention, one_device
):
    on_devices(mesh[0] * mesh[1], check_training, mesh, attention, one_device)
