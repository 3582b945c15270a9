"""Keras' own tests of its attention layers, run against `RingAttention`.

The wheel of a release of Keras ships them. Each module is loaded a second time
under a name of ours, with `RingAttention` in the place of the stock layer in
its namespace alone. A case that does not pass stands in `DIFFERENCES` with the
reason why it should not.
"""

import importlib.util
import pathlib
import types
import warnings

import keras
import pytest

from keras_ring.layers import RingAttention

SOURCE = pathlib.Path(keras.__file__).parent / "src/layers/attention"
if ".dev" in keras.__version__ and not list(SOURCE.glob("*_test.py")):
    pytest.skip(
        "Keras' development releases come without its tests",
        allow_module_level=True,
    )

DIFFERENCES = {
    "GroupedQueryAttentionTest": {
        "test_shape_mismatch_error_query_value_dim_mismatch": (
            "wants a value of another width than the query refused; "
            "RingAttention projects each from its own width, as "
            "MultiHeadAttention does and its tests demand (different_qv_last_"
            "dims)"
        ),
    },
    "MultiHeadAttentionTest": {
        "test_masking_with_different_shapes": (
            "casts floating-point masks to booleans; RingAttention refuses "
            "them, because an additive mask would hide what it should show"
        ),
    },
}


def load(module_name, layer_name, class_name):
    """Keras' test case with `RingAttention` as the layer it tests."""
    spec = importlib.util.spec_from_file_location(
        f"{__name__}_{module_name}", SOURCE / f"{module_name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        # Keras registers a mark of its own with its own pytest set-up.
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        spec.loader.exec_module(module)
    assert hasattr(module.layers, layer_name)
    module.layers = types.SimpleNamespace(
        **{**vars(module.layers), layer_name: RingAttention}
    )
    case = getattr(module, class_name)
    for name, reason in DIFFERENCES[class_name].items():
        mark = pytest.mark.xfail(reason=reason, strict=True)
        setattr(case, name, mark(getattr(case, name)))
    return pytest.mark.dealt(tests=True)(case)


@pytest.fixture(autouse=True, scope="module")
def restore_keras_settings():
    """Keras' test cases turn global settings off and leave them so."""
    filtered = keras.config.is_traceback_filtering_enabled()
    yield
    keras.config.enable_flash_attention()
    if filtered:
        keras.config.enable_traceback_filtering()


TestMultiHead = load(
    "multi_head_attention_test", "MultiHeadAttention", "MultiHeadAttentionTest"
)
TestGroupedQuery = load(
    "grouped_query_attention_test",
    "GroupedQueryAttention",
    "GroupedQueryAttentionTest",
)


@pytest.mark.parametrize(
    ("case", "at_least"), [(TestMultiHead, 50), (TestGroupedQuery, 20)]
)
def test_the_cases_were_found(case, at_least):
    """A wheel without its tests, or with other ones, must not pass."""
    found = [name for name in dir(case) if name.startswith("test")]
    assert len(found) >= at_least
    assert set(DIFFERENCES[case.__name__]) <= set(found)
