"""The dtype in which sums are kept."""

import keras


def accumulation_dtype(dtype: str) -> str:
    """The dtype of sums, statistics and partial results for an input dtype.

    `float64` stays `float64`; everything else accumulates in `float32`.
    """
    return (
        "float64"
        if keras.backend.standardize_dtype(dtype) == "float64"
        else "float32"
    )
