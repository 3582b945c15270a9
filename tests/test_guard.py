"""Layers that would be wrong on a shard are refused by name; others run."""

import contextlib
import types
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring as kr
from keras_ring.distribution import trials
from keras_ring.training import guard

L = keras.layers

# What the guard asks of a world; nothing is computed here.
SHARDS = types.SimpleNamespace(layers_see_shards=True, sequence_size=2)
WHOLE = types.SimpleNamespace(layers_see_shards=False, sequence_size=2)
ALONE = types.SimpleNamespace(layers_see_shards=True, sequence_size=1)


def model_of(layer, shape=(None, 8), **options):
    x = keras.Input(shape, **options)
    return keras.Model(x, layer(x))


class Routes(L.Layer):
    """Gives something of each position of all samples, in a row."""

    def call(self, x):
        flat = ops.reshape(x, (-1, 8))
        return x * 2.0, ops.softmax(flat, axis=-1)


class Draws(L.Layer):
    """Unknown to the guard, and to a trial."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, x):
        return x * keras.random.uniform(ops.shape(x), seed=self.seeds)


class SafeDraws(Draws):
    sequence_parallel_safe = True


class OfOneShape(L.Layer):
    def compute_output_shape(self, input_shape):
        return input_shape


class Scale(OfOneShape):
    """Unknown, and right."""

    def call(self, x):
        return x * 2.0


class FalconAttention(OfOneShape):
    """Attention of its own, without the names of stock layers' parts."""

    def build(self, shape):
        self.query = L.Dense(shape[-1])
        self.query.build(shape)

    def call(self, x):
        scores = ops.einsum("bqf,bkf->bqk", self.query(x), x)
        return ops.einsum("bqk,bkf->bqf", ops.softmax(scores), x)


class Reader(L.Layer):
    """Its trial fails, and its name says nothing."""

    def call(self, x):
        if trials.place() is not None:
            raise RuntimeError("anything")
        return self._compute_attention(x, x, x)

    def _compute_attention(self, query, key, value):
        return ops.einsum("bqf,bkf,bkd->bqd", query, key, value)


class ChannelAttention(L.Layer):
    """Named so, and right."""

    def call(self, x):
        return x * ops.sigmoid(ops.mean(x, axis=-1, keepdims=True))


class Mixer(OfOneShape):
    """A product over positions that nothing but a trial finds; it starts
    without effect."""

    def build(self, shape):
        self.gain = self.add_weight(shape=(shape[-1],), initializer="zeros")

    def call(self, x):
        return x + self.gain * ops.cumsum(x, axis=1)


class OwnStatistics(L.Layer):
    """Mixes in training only."""

    def call(self, x, training=False):
        return x - ops.mean(x, axis=(0, 1)) if training else x


class Counts(L.Layer):
    """Positions of its own, from 0 in every shard."""

    def call(self, x):
        length = ops.shape(x)[1]
        return x + ops.cast(ops.arange(length), "float32")[:, None]


class Positions(L.Layer):
    """Positions of the whole sequence."""

    def call(self, x):
        positions = kr.ops.sequence_positions(x)
        return x + ops.cast(positions, "float32")[:, None]


class RMSNormalization(L.Layer):
    """Of the name of a stock layer, without its `axis`."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],))

    def call(self, x):
        size = ops.sqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + 1e-6)
        return x / size * self.scale


class OwnRingAttention(OfOneShape):
    """Named so, random in training, and right."""

    def __init__(self):
        super().__init__()
        self.dropout = L.Dropout(0.1)

    def call(self, x, training=False):
        x = x[:, :, None, :]
        out = kr.ops.ring_attention(x, x, x, mask=kr.masks.Causal())
        return self.dropout(out[:, :, 0, :], training=training)


class Reads(L.Layer):
    """Two tensors, of which one is no sequence, and tensors of its own."""

    def call(self, inputs, state=None, training=False):
        return inputs * ops.sum(state, axis=-1)[:, None, None]


class Block(L.Layer):
    """Made of other layers."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def build(self, input_shape):
        for part in self.parts:
            part.build(input_shape)
            input_shape = part.compute_output_shape(input_shape)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x

    def compute_output_shape(self, input_shape):
        for part in self.parts:
            input_shape = part.compute_output_shape(input_shape)
        return input_shape


class PositionEmbedding(L.Layer):
    """Known by its name."""

    def call(self, x):
        return x


WRONG = {
    "convolution": lambda: L.Conv1D(4, 3, padding="same"),
    "strided-convolution": lambda: L.Conv1D(4, 1, strides=2),
    "separable": lambda: L.SeparableConv1D(4, 3),
    "transposed": lambda: L.Conv1DTranspose(4, 3),
    "channels-first": lambda: L.GlobalMaxPooling1D(
        data_format="channels_first"
    ),
    "max-pooling": lambda: L.MaxPooling1D(2),
    "average-pooling": lambda: L.AveragePooling1D(2),
    "global-average": L.GlobalAveragePooling1D,
    "global-max": L.GlobalMaxPooling1D,
    "lstm": lambda: L.LSTM(4, return_sequences=True),
    "rnn": lambda: L.RNN(L.GRUCell(4)),
    "bidirectional": lambda: L.Bidirectional(L.GRU(4)),
    "batch-normalisation": L.BatchNormalization,
    "group-normalisation": lambda: L.GroupNormalization(2),
    "per-step-batch-normalisation": lambda: L.TimeDistributed(
        L.BatchNormalization()
    ),
    "softmax": lambda: L.Softmax(axis=1),
    "unit-normalisation": lambda: L.UnitNormalization(axis=(1, 2)),
    "flatten": L.Flatten,
    "reshape": lambda: L.Reshape((-1, 4)),
    "permute": lambda: L.Permute((2, 1)),
    "zero-padding": lambda: L.ZeroPadding1D(1),
    "cropping": lambda: L.Cropping1D((0, 1)),
    "einsum": lambda: L.EinsumDense("abc,cd->adb", (4, None)),
    "regularizer": lambda: L.Dense(4, activity_regularizer="l2"),
    "activity": lambda: L.ActivityRegularization(0.1),
    "regularizer-of-ours": lambda: kr.layers.RingAttention(
        2, 4, activity_regularizer="l2"
    ),
    "position": PositionEmbedding,
    "own-attention": FalconAttention,
    "attention-by-method": Reader,
    "own-mixture": Mixer,
    "own-statistics": OwnStatistics,
    "own-positions": Counts,
    "lambda": lambda: L.Lambda(lambda x: x - ops.max(x, axis=1)[:, None]),
    "own-in-a-block": lambda: Block(L.Dense(8), FalconAttention()),
    "own-beside-ours": lambda: Block(
        kr.layers.RingTransformerBlock(2, 8), Mixer()
    ),
    "in-a-block": lambda: Block(L.Dense(8), L.Conv1D(4, 3)),
    "in-a-model": lambda: keras.Sequential(
        [keras.Input((None, 8)), L.Dense(8), L.Conv1D(4, 3)]
    ),
    "in-a-wrapper": lambda: L.SpectralNormalization(L.Conv1D(4, 3)),
    "self-attention": lambda: lambda x: L.MultiHeadAttention(2, 4)(x, x),
    "grouped-attention": lambda: lambda x: L.GroupQueryAttention(4, 2, 1)(x, x),
    "attention": lambda: lambda x: L.Attention()([x, x]),
    "additive-attention": lambda: lambda x: L.AdditiveAttention()([x, x]),
    "concatenate": lambda: lambda x: L.Concatenate(axis=1)([x, x]),
    "dot": lambda: lambda x: L.Dot(axes=1)([x, x]),
    "mean": lambda: lambda x: ops.mean(x, axis=1),
    "sum-of-all": lambda: lambda x: ops.sum(x),
    "max-from-behind": lambda: lambda x: ops.max(x, axis=-2),
    "flip": lambda: lambda x: ops.flip(x, axis=1),
    "roll": lambda: lambda x: ops.roll(x, 1, axis=1),
    "cumulative": lambda: lambda x: ops.cumsum(x, axis=1),
    "sorted": lambda: lambda x: ops.sort(x, axis=1),
    "of-one-sample": lambda: lambda x: x[0, 0],
    "positions-of-a-tensor": lambda: (
        lambda x: ops.take(x, ops.argmax(x[:, :, 0], axis=-1), axis=1)
    ),
    "shifted": lambda: lambda x: x[:, 1:],
    "every-other": lambda: lambda x: x[..., ::2, :],
    "flattened": lambda: lambda x: ops.reshape(x, (-1, 8)),
    "transpose": lambda: lambda x: ops.transpose(x, (0, 2, 1)),
    "swapped": lambda: lambda x: ops.swapaxes(x, 1, 2),
    "joined": lambda: lambda x: ops.concatenate([x, x], axis=1),
    "padded": lambda: lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 0))),
    "tiled": lambda: lambda x: ops.tile(x, (1, 2, 1)),
    "product": lambda: lambda x: ops.matmul(np.ones((3, 5), "f")[None], x),
    "einsum-op": lambda: lambda x: ops.einsum("blf,bmf->blm", x, x),
    "new-axis": lambda: lambda x: x[:, None],
    "stacked": lambda: lambda x: ops.stack([x, x], axis=1),
    "attention-op": lambda: (
        lambda x: ops.dot_product_attention(*[x[..., None]] * 3)
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_on_a_shard_is_refused(kind):
    model = model_of(WRONG[kind]())
    with pytest.raises(ValueError, match=r"Received: the model.*with\n  - "):
        guard.check(model, SHARDS)
    guard.check(model, ALONE)


class OwnPadding(L.ZeroPadding1D):
    pass


class OwnBatchNormalisation(L.BatchNormalization):
    pass


class NormalisedOverTheLast(L.Layer):
    def call(self, x):
        return ops.softmax(x, axis=-1)


def features_and_then_scores(layer):
    """Call a layer with features, and then with one number each position."""
    return lambda x: L.Multiply()(
        [layer(x), layer(ops.max(x, axis=-1))[..., None]]
    )


TWICE = {
    "softmax": lambda: features_and_then_scores(L.Softmax()),
    "unit-normalisation": lambda: features_and_then_scores(
        L.UnitNormalization()
    ),
    "own": lambda: features_and_then_scores(NormalisedOverTheLast()),
}


@pytest.mark.parametrize("kind", TWICE)
def test_a_layer_is_checked_for_each_rank(kind):
    layer = TWICE[kind]()
    with pytest.raises(ValueError, match=r"Received: the model.*with\n  - "):
        guard.check(model_of(layer), SHARDS)


def test_a_layer_of_several_inputs_is_checked_for_each_rank():
    x = keras.Input((None, 8))
    scores, layer = ops.max(x, axis=-1), L.Concatenate()
    model = keras.Model(x, [layer([x, x]), layer([scores, scores])])
    with pytest.raises(ValueError, match="joins along the sequence"):
        guard.check(model, SHARDS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnPadding(1),
        lambda: L.TimeDistributed(OwnBatchNormalisation()),
    ],
    ids=["padding", "batch-normalisation"],
)
def test_a_subclass_is_held_to_the_rule_of_its_class(make):
    with pytest.raises(ValueError, match=r"with\n  - "):
        guard.check(model_of(make()), SHARDS)
    guard.check(model_of(OwnPadding(0)), SHARDS)


def attend(x):
    return kr.layers.RingAttention(2, 4)(x, x, use_causal_mask=True)


RIGHT = {
    "dense": lambda: L.Dense(4, activation="relu", kernel_regularizer="l2"),
    "einsum": lambda: L.EinsumDense("abc,cd->abd", (None, 4)),
    "einsum-dots": lambda: L.EinsumDense("...x,xy->...y", 4),
    "layer-normalisation": L.LayerNormalization,
    "rms-normalisation": L.RMSNormalization,
    "dropout": lambda: L.Dropout(0.1),
    "activation": lambda: L.Activation("gelu"),
    "softmax": L.Softmax,
    "masking": L.Masking,
    "pointwise-convolution": lambda: L.Conv1D(4, 1),
    "split-features": lambda: L.Reshape((-1, 2, 4)),
    "permuted-features": lambda: (
        lambda x: L.Permute((1, 3, 2))(L.Reshape((-1, 2, 4))(x))
    ),
    "per-step": lambda: L.TimeDistributed(L.Dense(4)),
    "up-sampling": lambda: L.UpSampling1D(2),
    "frozen-statistics": lambda: L.BatchNormalization(trainable=False),
    "declared": SafeDraws,
    "own": Scale,
    "own-ring-attention": OwnRingAttention,
    "own-router": lambda: lambda x: Routes()(x)[0],
    "own-lambda": lambda: L.Lambda(lambda x: x * 2.0),
    "own-normalisation": RMSNormalization,
    "named-attention": ChannelAttention,
    "own-global-positions": Positions,
    "own-around-ours": lambda: Block(
        kr.layers.RingTransformerBlock(2, 8, rotary=True, dropout=0.1), Scale()
    ),
    "first-position": lambda: lambda x: L.BatchNormalization()(x[:, 0, :]),
    "last-position": lambda: lambda x: x[:, -1],
    "some-positions": lambda: lambda x: L.Flatten()(ops.take(x, [0, -1], 1)),
    "block": lambda: Block(L.Dense(8), L.LayerNormalization()),
    "gathered": lambda: kr.layers.Gathered(L.Conv1D(4, 3)),
    "rotary": kr.layers.RotaryEmbedding,
    "learned-positions": lambda: kr.layers.PositionEmbedding(9),
    "attention": lambda: attend,
    "residual": lambda: lambda x: L.Add()([x, x * 2.0 + 1.0]),
    "joined-features": lambda: lambda x: L.Concatenate()([x, x]),
    "after-pooling": lambda: (
        lambda x: keras.Sequential(
            [L.Dense(6), L.BatchNormalization(), L.Reshape((2, 3)), L.Flatten()]
        )(kr.layers.Gathered(L.GlobalAveragePooling1D())(x))
    ),
    "mean-of-features": lambda: lambda x: ops.mean(x, axis=-1, keepdims=True),
    "split-op": lambda: lambda x: ops.concatenate(ops.split(x, 2, -1), -1),
    "features-of-positions": lambda: lambda x: x[:, :, 2:] + x[..., :6],
    "split-features-op": lambda: (
        lambda x: ops.transpose(
            ops.reshape(x, (-1, ops.shape(x)[1], 2, 4)), (0, 1, 3, 2)
        )
    ),
    "product": lambda: lambda x: ops.matmul(x, np.ones((8, 3), "f")),
    "einsum-op": lambda: lambda x: ops.einsum("blf,blf->bl", x, x),
    "positions": lambda: (
        lambda x: x + ops.cast(kr.ops.sequence_positions(x), "float32")[:, None]
    ),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_what_is_right_on_a_shard_is_not_refused(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = model_of(RIGHT[kind]())
        guard.check(model, SHARDS)


def test_tokens_and_their_embedding_are_right():
    model = model_of(L.Embedding(5, 4), (None,), dtype="int32")
    guard.check(model, SHARDS)


def test_counting_tokens_is_refused():
    layer = L.CategoryEncoding(5, output_mode="count")
    with pytest.raises(ValueError, match="CategoryEncoding"):
        guard.check(model_of(layer, (None,), dtype="int32"), SHARDS)


def test_gathering_what_is_whole_is_refused():
    x = keras.Input((None, 8))
    pooled = kr.layers.Gathered(L.GlobalAveragePooling1D())(x)
    whole = L.Reshape((4, 2))(pooled)
    model = keras.Model(x, kr.layers.Gathered(L.Conv1D(3, 2))(whole))
    with pytest.raises(ValueError, match="declare the length as None"):
        guard.check(model, SHARDS)
    guard.check(model, WHOLE)


def test_inputs_without_a_sequence_are_free():
    """A fixed size of axis 1 is no sequence."""
    tokens, features = keras.Input((None,)), keras.Input((6,))
    x = L.BatchNormalization()(L.Dense(4)(features))
    guard.check(keras.Model([tokens, features], [tokens + 1.0, x]), SHARDS)


def test_every_layer_is_named_with_the_way_out():
    x = keras.Input((None, 8))
    y = L.Conv1D(8, 3, name="near")(x)
    y = L.MultiHeadAttention(2, 4, name="far")(y, y)
    model = keras.Model(x, ops.mean(y, axis=1), name="mixed")
    with pytest.raises(ValueError) as error:
        guard.check(model, SHARDS)
    text = str(error.value)
    assert "'mixed'" in text
    assert "Conv1D (name='near'): its window reaches" in text
    assert "keras_ring.layers.Gathered(layer)" in text
    assert "MultiHeadAttention (name='far'): it attends within" in text
    assert "keras_ring.layers.RingAttention" in text
    assert "Mean (name=" in text


class Written(keras.Model):
    """A model without a graph."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_models_without_a_graph():
    wrong = Written(L.Dense(8), L.Conv1D(4, 3, padding="same"))
    right = Written(
        L.Dense(8),
        kr.layers.Gathered(L.GlobalMaxPooling1D()),
        L.BatchNormalization(),
    )
    for model in (wrong, right):
        model(np.zeros((2, 6, 8), "float32"))
    guard.check(right, SHARDS)
    with pytest.raises(ValueError, match="Conv1D"):
        guard.check(wrong, SHARDS)


def test_a_trial_of_several_tensors():
    """Only what carries the sequence is cut."""
    x, state = keras.Input((None, 8)), keras.Input((3,))
    model = keras.Model([x, state], Reads()(x, state=state))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        guard.check(model, SHARDS)


def test_a_trial_leaves_nothing_behind():
    layer = Block(L.Dense(8), Mixer())
    model = model_of(layer)
    before = [ops.convert_to_numpy(w) for w in model.variables]
    with pytest.raises(ValueError, match="gives other results for the halves"):
        guard.check(model, SHARDS)
    for one, two in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(one, ops.convert_to_numpy(two))
    assert not model.losses


def test_unknown_layers_are_named_once():
    layer = Draws()
    x = keras.Input((None, 8))
    model = keras.Model(x, layer(layer(x)))
    with pytest.warns(UserWarning, match="sequence_parallel_safe") as caught:
        guard.check(model, SHARDS)
    ours = [w for w in caught if "sequence_parallel" in str(w.message)]
    assert len(ours) == 1
    assert str(ours[0].message).count(repr(layer.name)) == 1


def test_shared_noise_is_told():
    with pytest.warns(UserWarning, match="SpatialDropout1D"):
        guard.check(model_of(L.SpatialDropout1D(0.1)), SHARDS)


def test_where_the_whole_is_seen_gathers_are_told():
    x = keras.Input((16, 8))
    y = L.Conv1D(8, 3, name="near")(x)
    y = L.MultiHeadAttention(2, 4, name="far")(y, y)
    with pytest.warns(UserWarning, match="'far'") as caught:
        guard.check(keras.Model(x, y), WHOLE)
    assert "'near'" not in str(caught[0].message)


class Classifier(Written):
    """A model of one's own that reads a position of its shard."""

    def call(self, x):
        return super().call(x)[:, 0]


class RightClassifier(Written):
    def call(self, x):
        return super().call(x) * 2.0


def test_models_without_a_graph_are_tried():
    """With the shapes of what they are given."""
    x = np.zeros((2, 6), "int32")
    world = types.SimpleNamespace(**vars(SHARDS), data_size=1, lengths={})
    for make in (Classifier, RightClassifier):
        model = make(
            L.Embedding(5, 8), kr.layers.RingTransformerBlock(2, 8), L.Dense(3)
        )
        model(x)
        if make is Classifier:
            with pytest.raises(ValueError, match=r"Classifier .*halves"):
                guard.check(model, world, x=x)
        guard.check(model, ALONE, x=x)
        if make is RightClassifier:
            guard.check(model, world, x=x)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.MaxPooling1D(3, strides=1),
        lambda: lambda x: ops.max_pool(x, 3, strides=1),
    ],
    ids=["layer", "operation"],
)
def test_what_the_compiler_gets_wrong_is_refused(layer):
    with pytest.raises(ValueError, match="overlapping windows"):
        guard.check(model_of(layer()), WHOLE)
    guard.check(model_of(L.MaxPooling1D(3)), WHOLE)


def regularized_loss(parallel=None):
    """Of a model on one device, or on two by what they share."""
    scope = contextlib.nullcontext()
    if parallel:
        scope = kr.DistributedStrategy(**{parallel: 2}).scope()
    keras.utils.set_random_seed(0)
    with scope:
        x = keras.Input((None, 8))
        pooled = kr.layers.Gathered(L.GlobalAveragePooling1D())(x)
        model = keras.Model(x, L.Dense(4, activity_regularizer="l2")(pooled))
        model.compile("sgd", "mse")
        draw = np.random.default_rng(0)
        x = draw.normal(size=(4, 8, 8)).astype("float32")
        y = draw.normal(size=(4, 4)).astype("float32")
        return model.evaluate(x, y, batch_size=4, verbose=0)


@pytest.mark.parametrize("parallel", ["sequence_parallel", "data_parallel"])
def test_activities_of_what_is_whole_may_be_regularized(on_devices, parallel):
    """Keras adds a mean over samples, and devices are averaged."""
    want = regularized_loss()
    found = on_devices(2, regularized_loss, parallel)
    assert found == pytest.approx(want, rel=1e-5)


def fit_refused(size):
    """The guard runs when training starts, and the model stays usable."""
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        model = model_of(L.MaxPooling1D(3, strides=1, padding="same"))
        model.compile("sgd", "mse")
        x = np.ones((2, 4 * size, 8), "float32")
        with pytest.raises(ValueError, match=r"MaxPooling1D.*Gathered"):
            model.fit(x, x, verbose=0)
    return ops.convert_to_numpy(model(x)).shape


def test_fit_refuses(on_devices):
    assert on_devices(2, fit_refused, 2) == (2, 8, 8)
