"""A model of the package's layers, without a strategy, as a program that runs
without Python, at other lengths and batches than it was exported with."""

import keras
import numpy as np
import pytest

import keras_ring
from tests.thinning import extra_on

pytestmark = pytest.mark.filterwarnings("ignore")
BACKEND = keras.backend.backend()
VOCABULARY, WIDTH = 16, 8


def build_model(length=None):
    """Every layer, with the options that change its program."""
    tokens = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=True)(tokens)
    x = keras_ring.layers.PositionEmbedding(32)(x)
    x = keras_ring.layers.RingTransformerBlock(
        2, 16, causal=True, rotary=True, remat="block"
    )(x)
    x = keras_ring.layers.RingTransformerBlock(
        2, 16, num_key_value_heads=1, norm="rms", gated=True, chunk_size=4
    )(x)
    x = keras_ring.layers.RingAttention(
        2, 4, sliding_window=3, soft_cap=5.0, alibi=True, sinks=True
    )(x)
    x = keras_ring.layers.BlockwiseFeedForward(16, chunk_size=4)(x)
    x = keras_ring.layers.LanguageModelHead(VOCABULARY)(x)
    return keras.Model(tokens, x)


def batches(length):
    """Inputs with padding at the end, of several lengths and sizes."""
    draw = np.random.default_rng(0)
    for size in [(2, length), (3, 7), (1, 1)]:
        tokens = draw.integers(1, VOCABULARY, size).astype("int32")
        tokens[0, 5:] = 0
        yield tokens


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = build_model()
    for weight in model.weights:
        # Biases, sinks and the like are 0 or 1 at the start.
        if "float" in weight.dtype:
            noise = np.random.default_rng(len(weight.path)).normal(
                size=weight.shape
            )
            weight.assign(weight + 0.3 * noise.astype("float32"))
    model.predict(next(batches(12)), verbose=0)
    return model


def compare(found, want):
    """To rounding: other operations add up in another order, and what comes
    of it is as large as the largest numbers that were added."""
    want = keras.ops.convert_to_numpy(want)
    limit = 2e-5 * np.abs(want).max()
    np.testing.assert_allclose(found, want, rtol=0, atol=limit)


def check(run, model):
    for tokens in batches(12):
        compare(run(tokens), model(tokens))


@pytest.mark.skipif(BACKEND != "torch", reason="a program of PyTorch")
def test_a_traced_program_has_plain_operations_alone(model):
    """What Keras' ONNX export starts from where a size is not known."""
    import torch

    sample = torch.ones((1, 1), dtype=torch.int32)
    with torch.no_grad():
        program = torch.jit.trace(model, (sample,), check_trace=False)
        assert "PythonOp" not in str(program.inlined_graph)
        check(lambda tokens: program(torch.from_numpy(tokens)).numpy(), model)


@pytest.mark.skipif(BACKEND != "torch", reason="a program of PyTorch")
def test_onnx(model, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(path)
    (name,) = (found.name for found in session.get_inputs())
    check(lambda tokens: session.run(None, {name: tokens})[0], model)


@pytest.mark.skipif(BACKEND != "torch", reason="a program of PyTorch")
def test_an_exported_program_of_a_fixed_length(model, tmp_path):
    import torch

    path = str(tmp_path / "model.pt2")
    tokens = next(batches(12))
    signature = [keras.InputSpec(shape=tokens.shape, dtype="int32")]
    model.export(path, "torch", verbose=False, input_signature=signature)
    program = torch.export.load(path).module()
    with torch.no_grad():
        found = program(torch.from_numpy(tokens)).numpy()
    compare(found, model(tokens))


@pytest.mark.skipif(BACKEND == "torch", reason="a program of TensorFlow")
@pytest.mark.parametrize(
    # JAX loads all of TensorFlow for it.
    "kind",
    [pytest.param("tf_saved_model", marks=extra_on("jax"))],
)
def test_a_saved_model(model, tmp_path, kind):
    tensorflow = pytest.importorskip("tensorflow")
    model.export(tmp_path / "model", kind, verbose=False)
    program = tensorflow.saved_model.load(str(tmp_path / "model"))
    check(lambda tokens: program.serve(tokens).numpy(), model)
