"""Models whose lengths are fixed, small enough to compare in seconds."""

import keras
import numpy as np

import keras_ring as kr

L = keras.layers
WIDTH = 8
CLASSES = 5


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def integers(*shape, seed=0, below=CLASSES):
    rng = np.random.default_rng(seed)
    return rng.integers(0, below, shape).astype("int32")


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def block(**options):
    return kr.layers.RingTransformerBlock(
        2, 2 * WIDTH, chunk_size=4, **{"causal": True, **options}
    )


def attention(**options):
    return kr.layers.RingAttention(2, 4, **options)


def features(length):
    """A block over features, as a functional model."""
    x = keras.Input((length, WIDTH))
    model = keras.Model(x, L.Dense(CLASSES)(block()(x)))
    model.compile(
        keras.optimizers.SGD(0.1), cross_entropy(), metrics=["accuracy"]
    )
    return model, (draw(4, length, WIDTH), integers(4, length))


def tokens(length):
    """A language model with learned positions, weights for each token."""
    head = kr.layers.LanguageModelHead(CLASSES)
    x = keras.Input((length,), dtype="int32")
    y = L.Embedding(CLASSES, WIDTH)(x)
    y = y + kr.layers.PositionEmbedding(length)(y)
    y = block(rotary=True)(y)
    model = keras.Model(x, head(L.LayerNormalization()(y)))
    loss = kr.losses.ChunkedCrossEntropy(head, chunk_size=4)
    model.compile(keras.optimizers.SGD(0.1), loss)
    weights = np.abs(draw(4, length, seed=3))
    return model, (
        integers(4, length),
        integers(4, length, seed=1),
        weights,
    )


def crossed(length):
    """Two sequences, features of a sample, a mask and two outputs."""
    x = keras.Input((length, WIDTH), name="x")
    z = keras.Input((length - 3, WIDTH), name="z")
    valid = keras.Input((length - 3,), dtype="bool", name="valid")
    sample = keras.Input((3,), name="sample")
    y = x + L.Dense(WIDTH)(sample)[:, None]
    y = y + attention(causal=True, rotary=True)(y, y)
    y = y + attention()(y, z, value_mask=valid)
    pooled = kr.layers.Gathered(L.GlobalAveragePooling1D())(y)
    outputs = {"each": L.Dense(CLASSES)(y), "all": L.Dense(CLASSES)(pooled)}
    model = keras.Model(
        {"x": x, "z": z, "valid": valid, "sample": sample}, outputs
    )
    model.compile(
        keras.optimizers.SGD(0.1), {"each": cross_entropy(), "all": "mse"}
    )
    inputs = {
        "x": draw(4, length, WIDTH),
        "z": draw(4, length - 3, WIDTH, seed=1),
        "valid": integers(4, length - 3, seed=2) > 0,
        "sample": draw(4, 3, seed=3),
    }
    labels = {"each": integers(4, length), "all": draw(4, CLASSES, seed=4)}
    return model, (inputs, labels)


def nested(length):
    """Models in a model, one of them called twice."""
    inner = keras.Input((length, WIDTH))
    body = keras.Model(inner, block()(inner))
    head = keras.Sequential([keras.Input((length, WIDTH)), L.Dense(CLASSES)])
    x = keras.Input((length, WIDTH))
    model = keras.Model(x, head(body(body(x))))
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    return model, (draw(4, length, WIDTH), integers(4, length))


def images(length):
    """A vision transformer: as many patches as `length` squared."""
    x = keras.Input((2 * length, 2 * length, 3))
    y = L.Conv2D(WIDTH, 2, strides=2)(x)
    y = L.Reshape((length * length, WIDTH))(y)
    y = y + kr.layers.PositionEmbedding(length * length)(y)
    y = block(causal=False)(y)
    y = y + attention(causal=True, sliding_window=3)(y, y)
    y = L.GlobalAveragePooling1D()(y)
    model = keras.Model(x, L.Dense(CLASSES)(y))
    model.compile(
        keras.optimizers.SGD(0.1), cross_entropy(), metrics=["accuracy"]
    )
    return model, (
        draw(4, 2 * length, 2 * length, 3),
        integers(4),
    )


def mixing(length):
    """Layers that know no ring between those that do, and pairs of heads."""
    x = keras.Input((length, WIDTH))
    pairs = keras.Input((2, length, length), dtype="bool")
    y = L.Conv1D(WIDTH, 3, padding="same")(x)
    y = y + attention(alibi=True, sinks=True)(y, y, attention_mask=pairs)
    y = L.LSTM(WIDTH, return_sequences=True)(block()(y))
    y = L.Flatten()(block(remat="block")(y))
    model = keras.Model([x, pairs], L.Dense(CLASSES)(y))
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    inputs = [
        draw(4, length, WIDTH),
        integers(4, 2, length, length, seed=2) > 1,
    ]
    return model, (inputs, integers(4))


def unbuilt(length):
    """Nobody has said how long sequences are."""
    model = keras.Sequential([block(), L.Dense(CLASSES)])
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    return model, (draw(4, length, WIDTH), integers(4, length))


def unbuilt_flat(length):
    """The same, with a layer that needs the whole."""
    model = keras.Sequential([block(), L.Flatten(), L.Dense(CLASSES)])
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    return model, (draw(4, length, WIDTH), integers(4))


class Written(keras.Model):
    """A model without a graph, of which a part has one."""

    def __init__(self, length):
        super().__init__()
        x = keras.Input((length, WIDTH))
        self.body = keras.Model(x, block()(x))
        self.attend = attention(causal=True)
        self.head = L.Dense(CLASSES)

    def call(self, x):
        x = self.body(x)
        return self.head(x + self.attend(x, x))


def written(length):
    model = Written(length)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    return model, (draw(4, length, WIDTH), integers(4, length))


class Viewer(keras.Model):
    """A vision transformer without a graph."""

    def __init__(self, length):
        super().__init__()
        self.parts = [
            L.Conv2D(WIDTH, 2, strides=2),
            L.Reshape((length * length, WIDTH)),
            block(causal=True, rotary=True),
            L.GlobalAveragePooling1D(),
            L.Dense(CLASSES),
        ]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def written_images(length):
    model = Viewer(length)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    return model, (draw(4, 2 * length, 2 * length, 3), integers(4))
