"""Positions are those in the whole sequence, wherever a layer sees it."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring as kr
from tests import gradients, worlds
from tests.members import from_each, total

RINGS = [size for size in (1, 2, 3, 4, 8) if size <= worlds.DEVICES]
LENGTH = 24
BATCH, HEADS, FEATURES = 2, 3, 8

# float32 rounding of the same few operations in another order.
TOLERANCE = 2e-6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def rotary_reference(x, positions, wavelength=10000, scale=1.0, rotated=None):
    """Complex rotation in float64, sequence on axis 1, features last."""
    rotated = rotated or x.shape[-1]
    half = rotated // 2
    frequencies = wavelength ** (-np.arange(half) * 2.0 / rotated) / scale
    angles = np.asarray(positions, "float64")[..., None] * frequencies
    if angles.ndim == 2:
        angles = angles[None]
    angles = angles.reshape(angles.shape[0], -1, *[1] * (x.ndim - 3), half)
    pairs = x[..., :half].astype("float64") + 1j * x[..., half:rotated]
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, x[..., rotated:]], -1)


def run_positions(size, shape, axis):
    strategy = kr.DistributedStrategy(sequence_parallel=size)

    def function(x):
        positions = kr.ops.sequence_positions(x, axis=axis)
        wanted = [1] * len(x.shape)
        wanted[axis] = -1
        return ops.broadcast_to(ops.reshape(positions, wanted), ops.shape(x))

    return ops.convert_to_numpy(strategy.run(function, np.zeros(shape, "f")))


@pytest.mark.mostly(size=3, every=3)
@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize("rank", [2, 4])
def test_positions_are_global(on_devices, size, rank):
    shape = (BATCH, LENGTH, 2, 3)[:rank]
    result = on_devices(size, run_positions, size, shape, 1 - rank)
    assert result.dtype == "int32"
    expected = np.arange(LENGTH).reshape(1, -1, *[1] * (rank - 2))
    np.testing.assert_array_equal(result, np.broadcast_to(expected, shape))


def test_positions_without_a_strategy():
    positions = kr.ops.sequence_positions(np.zeros((2, 5, 3), "float32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(positions), range(5))


def test_positions_in_a_functional_model():
    x = keras.Input((None, 4))
    out = x + ops.cast(kr.ops.sequence_positions(x), "float32")[:, None]
    model = keras.Model(x, out)
    given = normal(2, 7, 4)
    expected = given + np.arange(7)[:, None]
    copy = keras.Model.from_config(model.get_config())
    for one in (model, copy):
        np.testing.assert_allclose(
            ops.convert_to_numpy(one(given)), expected, rtol=1e-6
        )


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"Received: axis=2, shape=\(2, 5\)"):
        kr.ops.sequence_positions(np.zeros((2, 5)), axis=2)


def run_rotary(size, x, weight, config, positions):
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        layer = kr.layers.RotaryEmbedding(**config)

    def function(x, weight, *given):
        call = {"positions": given[0]} if given else {"start_index": 5}
        return gradients.vjp(lambda x: layer(x, **call), [x], weight)

    given = [] if positions is None else [positions]
    out, (grad,) = strategy.run(function, x, weight, *given)
    return ops.convert_to_numpy(out), ops.convert_to_numpy(grad)


@pytest.mark.mostly(size=3, every=3)
@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize(
    ("shape", "config", "given"),
    [
        ((BATCH, LENGTH, HEADS, FEATURES), {}, False),
        ((BATCH, LENGTH, FEATURES), {"max_wavelength": 50}, False),
        (
            (BATCH, LENGTH, HEADS, FEATURES),
            {"rotary_dim": 4, "scaling_factor": 2.0},
            True,
        ),
    ],
    ids=["heads", "features", "partial-given"],
)
def test_rotary_embedding_is_that_of_one_device(
    on_devices, size, shape, config, given
):
    x, weight = normal(*shape), normal(*shape, seed=1)
    positions = None
    if given:
        rows = np.random.default_rng(2).permutation(LENGTH)
        positions = np.stack([rows, rows[::-1]]).astype("int32")
    out, grad = on_devices(size, run_rotary, size, x, weight, config, positions)
    reference = {
        "wavelength": config.get("max_wavelength", 10000),
        "scale": config.get("scaling_factor", 1.0),
        "rotated": config.get("rotary_dim"),
    }
    at = np.arange(5, 5 + LENGTH) if positions is None else positions
    np.testing.assert_allclose(
        out, rotary_reference(x, at, **reference), atol=TOLERANCE * 5
    )
    # The transpose of a rotation turns back.
    np.testing.assert_allclose(
        grad, rotary_reference(weight, -at, **reference), atol=TOLERANCE * 5
    )


def test_rotary_embedding_of_other_axes():
    x = normal(2, FEATURES, 3, 6)
    layer = kr.layers.RotaryEmbedding(sequence_axis=-1, feature_axis=1)
    out = np.moveaxis(ops.convert_to_numpy(layer(x)), (3, 1), (1, 3))
    natural = np.moveaxis(x, (3, 1), (1, 3))
    np.testing.assert_allclose(
        out, rotary_reference(natural, np.arange(6)), atol=TOLERANCE * 5
    )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_rotary_embedding_computes_in_float32(policy):
    x = normal(1, 2000, 4)
    layer = kr.layers.RotaryEmbedding(dtype=policy)
    out = layer(x)
    assert keras.backend.standardize_dtype(out.dtype) == layer.compute_dtype
    rounded = ops.cast(ops.cast(x, layer.compute_dtype), "float32")
    expected = rotary_reference(ops.convert_to_numpy(rounded), np.arange(2000))
    # One rounding of the result; positions in half precision would be off
    # by whole turns.
    bits = 8 if "bfloat16" in policy else 11
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.cast(out, "float32")),
        expected,
        atol=4 * 2.0**-bits,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"positions": np.arange(6.0)}, "must be integers"),
        ({"positions": np.arange(5)}, "positions.shape=\\(5,\\)"),
        (
            {"positions": np.zeros((3, 6), "int32")},
            "positions.shape=\\(3, 6\\)",
        ),
        ({"positions": np.arange(6), "start_index": 1}, "start_index=1"),
    ],
    ids=["float", "length", "batch", "both"],
)
@pytest.mark.parametrize("kind", ["rotary", "learned"])
def test_positions_that_do_not_fit_are_refused(kind, call, message):
    layer = {
        "rotary": kr.layers.RotaryEmbedding(),
        "learned": kr.layers.PositionEmbedding(6),
    }[kind]
    with pytest.raises(ValueError, match=message):
        layer(normal(2, 6, 4), **call)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"rotary_dim": 3}, (2, 6, 4)),
        ({"rotary_dim": 6}, (2, 6, 4)),
        ({}, (2, 6, 5)),
        ({"max_wavelength": 0}, (2, 6, 4)),
        ({"sequence_axis": 2}, (2, 6, 4)),
        ({"sequence_axis": 0}, (2, 6, 4)),
    ],
)
def test_rotary_embeddings_that_cannot_be_are_refused(config, shape):
    with pytest.raises(ValueError, match="Received"):
        kr.layers.RotaryEmbedding(**config)(normal(*shape))


def run_learned(size, x, weight, table, positions):
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        layer = kr.layers.PositionEmbedding(len(table))
        layer.build(x.shape)
        layer.position_embeddings.assign(table)

    def function(x, weight, *given):
        call = {"positions": given[0]} if given else {"start_index": 5}

        def embed(table):
            return layer.stateless_call([table], [], x, **call)[0]

        out, (grad,) = gradients.vjp(
            embed, [layer.position_embeddings.value], weight
        )
        return out, from_each(grad)

    given = [] if positions is None else [positions]
    out, grad = strategy.run(function, x, weight, *given)
    return ops.convert_to_numpy(out), total(grad)


@pytest.mark.mostly(size=3, every=3)
@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize("given", [False, True], ids=["natural", "given"])
def test_position_embedding_is_that_of_one_device(on_devices, size, given):
    x = np.zeros((BATCH, LENGTH, FEATURES), "float32")
    weight, table = normal(*x.shape), normal(LENGTH + 7, FEATURES, seed=1)
    positions = None
    at = np.broadcast_to(np.arange(5, 5 + LENGTH), (BATCH, LENGTH))
    if given:
        # Repeated rows: their gradients must be summed.
        at = np.random.default_rng(2).integers(0, 9, (BATCH, LENGTH))
        positions = at.astype("int32")
    out, grad = on_devices(size, run_learned, size, x, weight, table, positions)
    np.testing.assert_array_equal(out, table[at])
    expected = np.zeros(table.shape)
    np.add.at(expected, at, weight)
    np.testing.assert_allclose(grad, expected, atol=TOLERANCE * 5)


def run_too_long(size, x):
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        layer = kr.layers.PositionEmbedding(x.shape[1] - 1)
        layer.build(x.shape)
    with pytest.raises(ValueError, match="sequence_length=23"):
        strategy.run(layer, x)


def test_a_sequence_without_enough_vectors_is_refused(on_devices):
    on_devices(2, run_too_long, 2, normal(BATCH, LENGTH, FEATURES))


@pytest.mark.parametrize(
    "build",
    [
        lambda: kr.layers.PositionEmbedding(0),
        lambda: kr.layers.PositionEmbedding(4.0),
        lambda: kr.layers.PositionEmbedding(4).build((2, 3)),
        lambda: kr.layers.PositionEmbedding(4).build((2, 3, None)),
    ],
)
def test_position_embeddings_that_cannot_be_are_refused(build):
    with pytest.raises(ValueError, match="Received"):
        build()


@pytest.mark.parametrize(
    "layer",
    [
        lambda: kr.layers.RotaryEmbedding(100, 2.0, rotary_dim=4),
        lambda: kr.layers.PositionEmbedding(32, "zeros"),
    ],
    ids=["rotary", "learned"],
)
def test_layers_in_a_model(layer, tmp_path):
    """Symbolic length, a mask that passes through, save and load."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, FEATURES, mask_zero=True)(tokens)
    out = layer()(x)
    assert tuple(out.shape) == (None, None, FEATURES)
    model = keras.Model(tokens, out)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    given = np.array([[1, 2, 0], [3, 0, 0]], "int32")
    result = model(given)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(result._keras_mask), given != 0
    )
    np.testing.assert_array_equal(
        ops.convert_to_numpy(result), ops.convert_to_numpy(loaded(given))
    )
    config = model.layers[-1].get_config()
    assert type(model.layers[-1]).from_config(config).get_config() == config


class Composite(keras.layers.Layer):
    """Has no output shape of its own, so Keras traces its call."""

    def __init__(self):
        super().__init__()
        self.learned = kr.layers.PositionEmbedding(7)
        self.rotary = kr.layers.RotaryEmbedding()

    def call(self, x):
        return self.rotary(x + self.learned(x))


def test_layers_inside_a_traced_layer():
    x = keras.Input((None, FEATURES))
    out = Composite()(x)
    assert tuple(out.shape) == (None, None, FEATURES)
    assert keras.Model(x, out)(normal(2, 5, FEATURES)).shape == (2, 5, FEATURES)
