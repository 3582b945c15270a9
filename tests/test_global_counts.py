"""Losses and metrics by the global count, on lengths and batches that the
devices cannot split equally, against stock Keras on one device."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ring
from tests.test_lengths import check
from tests.thinning import extra_on

WIDTH = 6
BACKEND = keras.backend.backend()


def attend(kind, x, other=None, **options):
    """Self- or cross-attention, stock or around the ring."""
    other = x if other is None else other
    if kind == "stock":
        return layers.MultiHeadAttention(2, 3)(x, other, **options)
    return keras_ring.layers.RingAttention(2, 3)(x, other, **options)


def pooled(kind, x):
    pool = layers.GlobalAveragePooling1D()
    return pool(x) if kind == "stock" else keras_ring.layers.Gathered(pool)(x)


def compiled(model, loss, clip=None, **options):
    optimizer = keras.optimizers.SGD(0.05, global_clipnorm=clip)
    model.compile(optimizer, loss, **options)
    return model


def masked(kind, loss=None):
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, WIDTH, mask_zero=True)(tokens)
    x = attend(kind, x)
    return compiled(
        keras.Model(tokens, layers.Dense(9)(x)),
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="w")],
    )


def unmasked(kind, loss, **options):
    x = keras.Input((None, WIDTH))
    y = attend(kind, layers.Dense(WIDTH)(x))
    return compiled(keras.Model(x, layers.Dense(3)(y)), loss, **options)


def ignoring(kind):
    return unmasked(
        kind,
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=0
        ),
    )


def weighted_mean(kind):
    return unmasked(
        kind,
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=["accuracy"],
    )


def summed(kind):
    return unmasked(
        kind,
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="sum"
        ),
    )


def two_outputs(kind):
    x = keras.Input((None, WIDTH))
    y = attend(kind, layers.Dense(WIDTH, kernel_regularizer="l2")(x))
    outputs = [
        layers.Dense(3, name="each")(y),
        layers.Dense(1, name="all", activation="sigmoid")(pooled(kind, y)),
    ]
    return compiled(
        keras.Model(x, outputs),
        [
            keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="sum"
            ),
            keras.losses.BinaryCrossentropy(),
        ],
        loss_weights=[0.1, 2.0],
        metrics=[
            ["accuracy"],
            [keras.metrics.TruePositives(name="hits"), "accuracy"],
        ],
        # Stock Keras weights the loss of an output by the static size of its
        # batch, and counts each batch once where that is not known.
        run_eagerly=kind == "stock" and BACKEND == "tensorflow",
    )


def several(kind):
    """What five of the other models have alone, as outputs of one, and a sum
    over what is pooled: each has a loss, metrics, weights of samples and a
    layer of its own."""
    x = keras.Input((None, WIDTH))
    y = attend(kind, layers.Dense(WIDTH, kernel_regularizer="l2")(x))
    entropy = functools.partial(
        keras.losses.SparseCategoricalCrossentropy, from_logits=True
    )
    losses = {
        "ignoring": entropy(ignore_class=0),
        "weighted": entropy(reduction="mean_with_sample_weight"),
        "summed": entropy(reduction="sum"),
        "flat": keras.losses.MeanSquaredError(),
        "pooled": keras.losses.BinaryCrossentropy(),
        "total": keras.losses.BinaryCrossentropy(reduction="sum"),
    }
    whole = pooled(kind, y)
    outputs = [layers.Dense(3, name=name)(y) for name in list(losses)[:3]]
    flat = layers.Dense(1)(y)
    outputs += [
        layers.Lambda(lambda t: t[..., 0], output_shape=(None,), name="flat")(
            flat
        ),
        *(
            layers.Dense(1, name=name, activation="sigmoid")(whole)
            for name in ("pooled", "total")
        ),
    ]
    weights = (1.0, 0.5, 0.1, 1.5, 2.0, 0.2)
    return compiled(
        keras.Model(x, dict(zip(losses, outputs, strict=True))),
        losses,
        loss_weights=dict(zip(losses, weights, strict=True)),
        metrics={
            "flat": ["mae"],
            "pooled": [keras.metrics.TruePositives(name="hits"), "accuracy"],
        },
        weighted_metrics={"weighted": ["accuracy"]},
        # As above.
        run_eagerly=kind == "stock" and BACKEND == "tensorflow",
    )


def classifier(kind):
    x = keras.Input((None, WIDTH))
    y = pooled(kind, attend(kind, layers.Dense(WIDTH)(x)))
    return compiled(
        keras.Model(x, layers.Dense(1, activation="sigmoid")(y)),
        "binary_crossentropy",
        metrics=[keras.metrics.TruePositives(name="hits"), "accuracy"],
    )


def flat(kind):
    """An output `(batch, length)`, over which the loss itself averages."""
    x = keras.Input((None, WIDTH))
    y = layers.Dense(1)(attend(kind, layers.Dense(WIDTH)(x)))
    y = layers.Lambda(lambda t: t[..., 0], output_shape=(None,))(y)
    return compiled(keras.Model(x, y), "mse", metrics=["mae"])


def crossing(kind):
    """Two sequences; gradients that are clipped."""
    x, other = keras.Input((None, WIDTH)), keras.Input((None, WIDTH))
    y = attend(kind, layers.Dense(WIDTH)(x), layers.Dense(WIDTH)(other))
    model = keras.Model([x, other], layers.Dense(3)(y))
    return compiled(model, "mse", clip=0.1)


def pairwise(kind):
    """Which pairs of positions attend, as an input of its own; gradients
    that are clipped."""
    x, pairs = keras.Input((None, WIDTH)), keras.Input((None, None), dtype=bool)
    y = attend(kind, layers.Dense(WIDTH)(x), attention_mask=pairs)
    model = keras.Model([x, pairs], layers.Dense(3)(y))
    return compiled(model, "mse", clip=0.1)


class Watched(layers.Layer):
    """Adds to the loss, and has a metric of its own."""

    sequence_parallel_safe = True

    def __init__(self, metric):
        super().__init__()
        self.metric = metric

    def call(self, x):
        squares = ops.square(x)
        self.add_loss(0.1 * ops.mean(squares))
        if self.metric is not None:
            self.metric.update_state(squares)
        return x

    def compute_output_shape(self, shape):
        return shape


# Keras itself has no metrics in a layer's call on JAX.
MEAN = None if BACKEND == "jax" else keras.metrics.Mean


def watched(kind, metric=MEAN):
    x = keras.Input((None, WIDTH))
    y = attend(kind, layers.Dense(WIDTH, kernel_regularizer="l2")(x))
    y = Watched(metric and metric(name="own"))(y)
    return compiled(keras.Model(x, layers.Dense(3)(y)), "mse")


def data(kind, rows, length, seed):
    """A batch for the models above."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, length, WIDTH)).astype("float32")
    classes = draw.integers(0, 3, (rows, length)).astype("int32")
    weights = draw.random((rows, length)).astype("float32")
    one = draw.integers(0, 2, (rows, 1)).astype("float32")
    samples = 0.5 + draw.random(rows).astype("float32")
    if kind == "masked":
        tokens = draw.integers(1, 9, (rows, length)).astype("int32")
        for row in range(rows):
            tokens[row, max(length - 3 * row, 1) :] = 0
        return tokens, tokens, weights
    if kind == "two_outputs":
        return x, (classes, one)
    if kind == "several":
        targets = dict.fromkeys(("ignoring", "weighted", "summed"), classes)
        targets |= {"flat": weights, "pooled": one, "total": one}
        own = dict.fromkeys(targets, weights)
        by_sample = dict.fromkeys(("flat", "pooled", "total"), samples)
        return x, targets, own | by_sample
    if kind == "classifier":
        return x, one
    if kind == "flat":
        return x, weights
    if kind == "crossing":
        other = draw.normal(size=(rows, length + 1, WIDTH)).astype("float32")
        return (x, other), x[..., :3]
    if kind == "pairwise":
        pairs = draw.random((rows, length, length)) < 0.5
        return (x, pairs | np.eye(length, dtype=bool)), x[..., :3]
    if kind == "watched":
        return x, x[..., :3]
    return x, classes, weights


MODELS = {
    "masked": masked,
    "several": several,
    "ignoring": ignoring,
    "weighted_mean": weighted_mean,
    "summed": summed,
    "two_outputs": two_outputs,
    "classifier": classifier,
    "flat": flat,
    "crossing": crossing,
    "pairwise": pairwise,
}


def check_model(name, mesh):
    """On batches of which the devices have unequal shares, and other ones
    each time."""
    sizes = [(3, 5), (1, 7)] if mesh[0] > 1 else [(2, 7), (2, 12)]
    if name == "ignoring" and mesh[0] > 1:
        # The devices share all samples equally, then not.
        sizes = [(4, 7), (3, 5), (1, 7)]
    elif name == "masked":
        # On PyTorch Keras itself scales the weights of the metrics by the
        # loss' mask, another factor in every batch.
        sizes = sizes[:1]
    elif name == "two_outputs" and mesh[0] > 1:
        # Twice a batch that needs no padding, of another size.
        sizes = [(4, 7), (2, 5), (1, 7)]
    elif name == "pairwise":
        # Batches of two sizes in one program on TensorFlow.
        sizes = [(4, 7), (2, 5)]
    batches = [data(name, *size, seed=i) for i, size in enumerate(sizes)]
    # A masked query attends to nothing: zeros here, the mean of all values
    # in stock Keras.
    valid = np.bool_ if name == "masked" else None
    # The losses of all batches are compared; of each size of outputs there
    # would be a program more.
    check(mesh, MODELS[name], batches, valid, predicted=slice(-1, None))


# Each by itself with `--all`. On TensorFlow open sizes of a mask that only the
# blockwise kernel knows are long to trace, and on JAX losses see whole tensors:
# there tests/test_attention.py has pairs of lengths that cannot be split.
INSIDE_SEVERAL = {
    *("ignoring", "weighted_mean", "summed", "two_outputs", "flat"),
    "classifier",
}


@pytest.mark.mostly(mesh=(2, 2))
@pytest.mark.parametrize("mesh", [(1, 3), (2, 2)], ids=["1x3", "2x2"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.extra]
            if name in INSIDE_SEVERAL
            else extra_on("jax", "tensorflow")
            if name == "pairwise"
            # Programs of four replicas, and "several" has most of it.
            else extra_on("tensorflow")
            if name != "several"
            else [],
        )
        for name in MODELS
    ],
)
def test_losses_and_metrics(on_devices, name, mesh):
    on_devices(mesh[0] * mesh[1], check_model, name, mesh)


def check_what_layers_add(mesh):
    """Means over equal shards are those of one device; sums are not."""
    check(mesh, watched, [data("watched", 4, 4 * mesh[1], seed=0)])
    strategy = keras_ring.DistributedStrategy(
        data_parallel=mesh[0], sequence_parallel=mesh[1]
    )
    if not strategy.world.layers_see_shards:
        return
    lengths = 4 * mesh[1], 4 * mesh[1] - 1
    even, odd = (data("watched", 4, length, seed=0) for length in lengths)
    with strategy.scope():
        for metric, batch, reason in (
            (keras.metrics.Sum, even, r"must be a ratio.*metrics \['own'\]"),
            (keras.metrics.Mean, odd, r"update themselves.*\['own'\]"),
            (None, odd, r"add_loss in \['watched"),
        ):
            with pytest.raises(NotImplementedError, match=reason):
                watched("ring", metric).train_on_batch(*batch)


@pytest.mark.mostly(mesh=(2, 2))
@pytest.mark.parametrize("mesh", [(1, 3), (2, 2)], ids=["1x3", "2x2"])
def test_what_layers_add(on_devices, mesh):
    on_devices(mesh[0] * mesh[1], check_what_layers_add, mesh)
