"""Where keras_ring takes part in Keras' losses and metrics on TensorFlow.

What is wrapped only calls what it wraps where no step runs. All private
names of Keras' losses and metrics on TensorFlow are in this file.
"""

import functools

import keras

from keras_ring import counting


def install() -> None:
    """Wrap what `counting` is about, once.

    Raises:
        NotImplementedError: if Keras has moved one of the names.
    """
    try:
        from keras.src.losses import loss as loss_module
        from keras.src.trainers import compile_utils
        from keras.src.trainers.trainer import Trainer

        reduced = functools.partial(
            counting.reduced_loss, loss_module.apply_mask
        )
        counting.wrap_once(
            [
                (Trainer, "compute_loss", counting.model_loss),
                (compile_utils.CompileLoss, "call", counting.compile_loss),
                (keras.losses.Loss, "__call__", counting.loss),
                (loss_module, "reduce_weighted_values", reduced),
                (
                    compile_utils.CompileMetrics,
                    "update_state",
                    counting.compile_metrics,
                ),
                (
                    compile_utils.MetricsList,
                    "update_state",
                    counting.output_metrics,
                ),
                (keras.metrics.Mean, "update_state", counting.mean_metric),
            ]
        )
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(
            "This version of Keras has other losses and metrics than "
            f"keras_ring knows. Received: keras {keras.__version__}, {error}. "
            "Use Keras 3.15."
        ) from error
