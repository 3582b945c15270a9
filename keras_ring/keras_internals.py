"""Private parts of Keras that the shared code needs.

The layers that a layer is made of, the calls that made a functional model,
the operations that index a tensor in one, whether only shapes are inferred,
the masks of tensors, the full values of variables, the functions that losses
and metrics are made of, and what `compile` makes of a model's. All have been in
every Keras 3 release; what cannot be done without one names the release in its
error, and `NEWEST_TESTED`. Private names that only one backend needs are in
that backend's folder.
"""

import importlib
from collections.abc import Callable
from typing import Any

import keras
from keras import tree

# The newest Keras with which the tests have passed on every backend; a
# development release while there is no newer one.
NEWEST_TESTED = "3.16.0.dev2026102704"


def unknown_keras(what: str, received: object) -> NotImplementedError:
    """The error for a release of Keras that has moved a private name.

    Args:
        what: the rest of "This release of Keras ...", which says what it
            does.
        received: what was looked for in vain.
    """
    return NotImplementedError(
        f"This release of Keras {what}. Received: keras {keras.__version__}, "
        f"{received}. Use Keras 3.15, or a release up to {NEWEST_TESTED}, the "
        "newest that keras_ring was tested with."
    )


def sublayers(layer: Any, *, recursive: bool) -> list[Any]:
    """The layers inside a layer or model, itself left out.

    Args:
        layer: a Keras layer or model.
        recursive: those inside of those as well.

    Raises:
        NotImplementedError: for a release of Keras that keeps them elsewhere.
    """
    flatten = getattr(layer, "_flatten_layers", None)
    if flatten is None:
        raise unknown_keras(
            "does not list the layers of a layer in a way that keras_ring "
            "knows",
            type(layer).__name__,
        )
    return list(flatten(include_self=False, recursive=recursive))


def calls(part: Any) -> list[Any]:
    """The calls of a layer or operation in functional models, as nodes with
    `input_tensors` and `output_tensors`; none for one that was never called
    symbolically."""
    return list(getattr(part, "_inbound_nodes", []))


def indexing_operations() -> tuple[Any, Any]:
    """The classes of the operations that `x[key]` and `keras.ops.take` are in
    a functional model; None for one that this release has elsewhere."""
    x = keras.KerasTensor((1, 1))
    made = x[0], keras.ops.take(x, 0, axis=1)
    owners = [getattr(t, "_keras_history", (None,))[0] for t in made]
    item, take = (None if o is None else type(o) for o in owners)
    return item, take


def nodes_of(model: Any) -> list[tuple[Any, Any]]:
    """The calls that make a model's outputs of its inputs, in an order in
    which they can be computed: pairs of a layer or operation and its node.

    Args:
        model: with symbolic `inputs` and `outputs`.
    """
    makers = {
        id(tensor): (part, node)
        for part in getattr(model, "operations", None) or model.layers
        for node in calls(part)
        for tensor in node.output_tensors
    }
    known = {id(tensor) for tensor in model.inputs}
    found: list[tuple[Any, Any]] = []
    left = list(model.outputs)
    while left:
        tensor = left[-1]
        part, node = makers.get(id(tensor), (None, None))
        if id(tensor) in known or node is None:
            left.pop()
            continue
        missing = [
            other
            for other in node.input_tensors
            if id(other) not in known and id(other) in makers
        ]
        if missing:
            left += missing
            continue
        left.pop()
        known.update(id(other) for other in node.output_tensors)
        found.append((part, node))
    return found


def in_symbolic_scope() -> bool:
    """True if Keras is only inferring shapes, with made-up lengths; a release
    that does not tell is taken to compute."""
    try:
        from keras.src.backend.common.symbolic_scope import in_symbolic_scope
    except ImportError:
        return False
    return bool(in_symbolic_scope())


def without_values(tensor: Any) -> bool:
    """True if a tensor has a shape only: Keras' own, or one that is on no
    device (PyTorch)."""
    return isinstance(tensor, keras.KerasTensor) or bool(
        getattr(tensor, "is_meta", False)
    )


def mask_of(tensor: Any) -> Any:
    """The mask that Keras has attached to a tensor, or None."""
    return _common("masking", "get_keras_mask")(tensor)


def attach_mask(tensor: Any, mask: Any) -> None:
    """Attach a mask to a tensor, as layers and losses of Keras do."""
    # Not by the attribute itself: some tensors take none.
    _common("masking", "set_keras_mask")(tensor, mask)


def with_companions(tensor: Any, function: Callable[[Any, str], Any]) -> Any:
    """A tensor made from another one, with what Keras keeps at that.

    Keras keeps a mask at a tensor, and at probabilities the logits that they
    were made from, which losses on TensorFlow use in their place.

    Args:
        tensor: a tensor of the backend.
        function: `(tensor, name) -> tensor`, for the tensor itself (named
            "") and for what is kept, by the name of its attribute.
    """
    result = function(tensor, "")
    names = ["_keras_mask"]
    if keras.backend.backend() == "tensorflow":
        names.append("_keras_logits")
    for name in names:
        kept = getattr(tensor, name, None)
        if kept is not None and getattr(result, name, None) is None:
            setattr(result, name, function(kept, name))
    return result


def scales_losses(optimizer: Any) -> bool:
    """True if an optimizer takes gradients of losses that it has scaled."""
    return (
        isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        or getattr(optimizer, "loss_scale_factor", None) is not None
    )


def full_values(variables: Any) -> list[Any]:
    """The values of variables in their own dtype, also where Keras would
    cast them to that of a mixed-precision layer."""
    with _common("variables", "AutocastScope")(None):
        return [variable.value for variable in variables]


def defining(cls: type, name: str) -> type:
    """The class of which a class has a method, since releases of Keras name
    the classes of a trainer differently.

    Raises:
        AttributeError: if it has no such method.
    """
    for owner in cls.__mro__:
        if name in vars(owner):
            return owner
    raise AttributeError(f"{cls.__name__} has no {name!r}")


def _common(module: str, name: str) -> Any:
    try:
        where = f"keras.src.backend.common.{module}"
        return getattr(importlib.import_module(where), name)
    except (ImportError, AttributeError) as error:
        raise unknown_keras(
            "lacks a name that keras_ring needs", error
        ) from error


def added_losses(model: Any) -> list[str]:
    """The names of the layers of a model, itself included, that added a
    loss in the call that came last."""
    return [
        layer.name
        for layer in (model, *sublayers(model, recursive=True))
        if getattr(layer, "_losses", None)
    ]


def wrapped_function(part: Any) -> Any:
    """The function that a loss or metric is made of; None where there is
    none."""
    function = getattr(part, "fn", None)
    return getattr(part, "_fn", None) if function is None else function


def wrapped_options(part: Any) -> dict[str, Any] | None:
    """The options with which a loss or metric of Keras calls the function that
    it is made of; None where a release does not tell."""
    options = getattr(part, "_fn_kwargs", None)
    return options if isinstance(options, dict) else None


def compiled_metrics(model: Any) -> Any:
    """The metric that holds those that a model was compiled with, or None.

    Raises:
        NotImplementedError: for a release of Keras that keeps it elsewhere.
    """
    return _of_trainer(model, "_compile_metrics")


def compiled_losses(model: Any) -> Any:
    """The object that computes the losses of `compile`, or None.

    Raises:
        NotImplementedError: for a release of Keras that keeps it elsewhere.
    """
    return _of_trainer(model, "_compile_loss")


def assigned_metrics(model: Any) -> list[Any]:
    """The metrics that are attributes of a model, not of its layers; none for
    a release of Keras that does not tell."""
    return list(getattr(model, "_metrics", ()))


def loss_trackers(model: Any) -> list[Any]:
    """The metrics that are the means of a model's losses; none of no model.

    Raises:
        NotImplementedError: for a release of Keras that keeps them elsewhere.
    """
    if model is None:
        return []
    losses = compiled_losses(model)
    return [
        _of_trainer(model, "_loss_tracker"),
        *([] if losses is None else losses.metrics),
    ]


def _of_trainer(model: Any, name: str) -> Any:
    """An attribute that `compile` sets, None before it."""
    try:
        return getattr(model, name)
    except AttributeError as error:
        raise unknown_keras(
            "keeps the losses and metrics of a model elsewhere", error
        ) from error


def compiled_variables(model: Any) -> list[Any]:
    """The variables of a model's optimizer and of its metrics, also of those
    metrics that were given to `compile` and that no step has used yet."""
    compiled = getattr(model, "_compile_metrics", None)
    given = [
        getattr(compiled, name, None)
        for name in ("_user_metrics", "_user_weighted_metrics")
    ]
    metrics = [*model.metrics, *tree.flatten(given)]
    parts = [m for m in metrics if isinstance(m, keras.metrics.Metric)]
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        parts.append(optimizer)
    found = {id(v): v for part in parts for v in part.variables}
    return list(found.values())


def automatic_jit(model: Any) -> Any:
    """Value of `jit_compile="auto"` for a model; None where Keras does not
    tell."""
    resolve = getattr(model, "_resolve_auto_jit_compile", None)
    return None if resolve is None else resolve()
