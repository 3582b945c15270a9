"""Gradients and updates of optimizers on the replicas of a ring.

The objective is the mean of the replicas' losses, whoever computes them: so
before an optimizer sees the gradients they are averaged over all replicas. An
optimizer that clips them, or looks for an overflow, then sees those of one
device. The private names of Keras' optimizers are in this file, `trainer` and
`scope`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_ring.keras_internals import scales_losses
from keras_ring.training import wrappers

Function = Callable[..., Any]


def apply(original: Function) -> Function:
    """Of an optimizer: average the gradients over all replicas first."""

    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        world = _world()
        if world is None:
            return original(self, grads, trainable_variables)
        if tf.distribute.in_cross_replica_context():
            raise ValueError(
                "Under a strategy gradients are computed and applied by the "
                "replicas. Received: optimizer.apply of "
                f"{type(self).__name__} in the scope, outside of a step. Do it "
                "in a function that is given to strategy.run(function, ...)."
            )
        if trainable_variables is not None:
            # It may be gone through once only.
            trainable_variables = list(trainable_variables)
        variables = trainable_variables or self._trainable_variables
        wrappers.check_overwritten(world, variables)
        # Optimizers nest, also in threads of their own: what was averaged is
        # not averaged again.
        place = world.place()
        if place in world.applying:
            return original(self, grads, trainable_variables)
        world.applying.add(place)
        try:
            grads = _reduced(list(grads), scales_losses(self))
            return original(self, grads, trainable_variables)
        finally:
            world.applying.discard(place)

    return apply


def scale_loss(original: Function) -> Function:
    """Of an optimizer: each replica's share of a loss that is scaled. Then
    gradients in half precision are as large as on one device, and overflow
    alike."""

    def scale_loss(self: Any, loss: Any) -> Any:
        scaled = original(self, loss)
        world = _world()
        if (
            world is None
            or tf.distribute.in_cross_replica_context()
            or not scales_losses(self)
        ):
            return scaled
        return scaled / len(world.devices)

    return scale_loss


def all_reduce_sum_gradients(original: Function) -> Function:
    """Of an optimizer: not again what `apply` has averaged."""

    def all_reduce(self: Any, grads_and_vars: Any) -> Any:
        world = _world()
        if world is None or tf.distribute.in_cross_replica_context():
            return original(self, grads_and_vars)
        return list(grads_and_vars)

    return all_reduce


def backend_apply_gradients(original: Function) -> Function:
    """Of an optimizer that accumulates gradients or overwrites weights with
    their moving average: decide for all replicas at once. Updates bring the
    replicas together, which a branch of one replica's program cannot."""

    def backend_apply_gradients(
        self: Any, grads: Any, trainable_variables: Any
    ) -> None:
        steps = self.gradient_accumulation_steps
        overwrite = self.use_ema and self.ema_overwrite_frequency
        if (
            _world() is None
            or tf.distribute.in_cross_replica_context()
            or not (steps or overwrite)
        ):
            original(self, grads, trainable_variables)
            return
        if steps:
            _accumulate(self, steps, grads, trainable_variables)
        else:
            _update(self, grads, trainable_variables)
        if not self.use_ema:
            return
        self._update_model_variables_moving_average(self._trainable_variables)
        if overwrite:
            _cond(
                lambda: (self.iterations + 1) % overwrite == 0,
                lambda: _overwrite_with_average(self),
                lambda: None,
            )

    return backend_apply_gradients


def _world() -> Any:
    return getattr(tf.distribute.get_strategy(), "ring_world", None)


def _reduced(grads: list[Any], summed: bool) -> list[Any]:
    """Everyone's mean gradients; their sum where the losses have been divided
    by the number of replicas."""
    operations = tf.distribute.ReduceOp
    present = iter(
        tf.distribute.get_replica_context().all_reduce(
            operations.SUM if summed else operations.MEAN,
            [g for g in grads if g is not None],
        )
    )
    return [None if g is None else next(present) for g in grads]


def _accumulate(
    optimizer: Any, steps: int, grads: Sequence[Any], variables: Any
) -> None:
    """Keras' gradient accumulation."""
    accumulators = [
        optimizer._accumulated_gradients[optimizer._get_variable_index(v)]
        for v in variables
    ]
    grads = [tf.convert_to_tensor(g) for g in grads]

    def update(*grads: Any) -> None:
        _update(
            optimizer,
            [(g + a) / steps for g, a in zip(grads, accumulators, strict=True)],
            variables,
        )
        optimizer._backend_reset_gradient_accumulators()

    def increment(*grads: Any) -> None:
        optimizer._backend_increment_gradient_accumulators(grads, accumulators)

    _cond(
        lambda: (optimizer._iterations + 1) % steps == 0,
        update,
        increment,
        grads,
    )


def _update(optimizer: Any, grads: Any, variables: Any) -> None:
    grads = optimizer._clip_gradients(grads)
    optimizer._apply_weight_decay(variables)
    optimizer._backend_update_step(grads, variables, optimizer.learning_rate)


def _overwrite_with_average(optimizer: Any) -> None:
    pairs = zip(
        optimizer._trainable_variables,
        optimizer._model_variables_moving_average,
        strict=True,
    )
    for variable, average in pairs:
        if average is not None:
            variable.assign(average)


def _cond(
    predicate: Function,
    on_true: Function,
    on_false: Function,
    arguments: Sequence[Any] = (),
) -> None:
    """One branch on all replicas.

    Args:
        predicate: gives a bool; asked outside of the replicas.
        on_true: a replica's code, given its arguments.
        on_false: likewise.
        arguments: tensors of this replica.
    """

    def everywhere(strategy: Any, *arguments: Any) -> None:
        def branch(function: Function) -> Function:
            def run() -> None:
                strategy.extended.call_for_each_replica(
                    function, args=arguments
                )

            return run

        keras.ops.cond(predicate(), branch(on_true), branch(on_false))

    tf.distribute.get_replica_context().merge_call(
        everywhere, args=tuple(arguments)
    )
