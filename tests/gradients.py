"""Gradients of a function of tensors, on whatever backend Keras runs on."""

import contextlib

import keras


def vjp(function, inputs, cotangents):
    """`function(*inputs)` and its vector-Jacobian product.

    Works outside a strategy and inside `strategy.run`, where tensors,
    cotangents and gradients are what a layer sees: global on JAX, the own
    shard on TensorFlow and PyTorch.

    Args:
        function: takes tensors, returns a tensor or a list of tensors.
        inputs: list of floating-point tensors.
        cotangents: weights of the outputs, structured as the outputs are.

    Returns:
        `(outputs, gradients)`: outputs as `function` returns them, and one
        gradient of `sum(outputs * cotangents)` for each input. An output
        that does not depend on an input gives a gradient of zeros.
    """
    inputs = [keras.ops.convert_to_tensor(tensor) for tensor in inputs]
    single = not isinstance(cotangents, (list, tuple))
    weights = [
        keras.ops.convert_to_tensor(tensor)
        for tensor in ([cotangents] if single else cotangents)
    ]

    def listed(*tensors):
        outputs = function(*tensors)
        return [outputs] if single else list(outputs)

    match keras.backend.backend():
        case "jax":
            outputs, gradients = _jax(listed, inputs, weights)
        case "tensorflow":
            outputs, gradients = _tensorflow(listed, inputs, weights)
        case "torch":
            outputs, gradients = _torch(listed, inputs, weights)
    return (outputs[0] if single else outputs), gradients


def _jax(function, inputs, weights):
    import jax

    outputs, pull_back = jax.vjp(function, *inputs)
    return outputs, list(pull_back(weights))


def _tensorflow(function, inputs, weights):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = function(*inputs)
    gradients = tape.gradient(
        outputs,
        inputs,
        output_gradients=weights,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return outputs, [tf.convert_to_tensor(g) for g in gradients]


def _torch(function, inputs, weights):
    import torch

    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        outputs = function(*inputs)
    gradients = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    gradients = [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(inputs, gradients, strict=True)
    ]
    return [output.detach() for output in outputs], gradients


@contextlib.contextmanager
def in_dtype(dtype):
    """JAX computes in float64 only where it is told to."""
    if keras.backend.backend() == "jax" and dtype == "float64":
        import jax

        with jax.enable_x64(True):
            yield
    else:
        yield
