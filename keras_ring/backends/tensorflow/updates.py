"""One program for what all replicas do to their copies of the variables.

Keras' optimizers build the update of each variable for each replica. That is
more operations than all layers of a model have, and differs between replicas
only in the copies. So it is traced for the first replica, as a function that
the others call with their own copies.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

Function = Callable[..., Any]


def distributed_update_step(original: Function) -> Function:
    """Of an optimizer: the replicas of a ring share the program of it."""

    def update(
        self: Any, distribution: Any, grads_and_vars: Any, learning_rate: Any
    ) -> None:
        grads, variables = zip(*grads_and_vars, strict=True)
        if tf.executing_eagerly() or not hasattr(distribution, "ring_world"):
            original(self, distribution, grads_and_vars, learning_rate)
            return

        # A variable is read in there; a schedule's tensor is each replica's.
        rates = [] if _is_variable(learning_rate) else [learning_rate]

        def step(copies: Any, grads: Sequence[Any], rates: Any) -> None:
            pairs = list(zip(grads, variables, strict=True))
            original(self, copies, pairs, *(rates or [learning_rate]))

        on_each_replica(distribution, variables[0], step, grads, rates)

    return update


def on_each_replica(
    strategy: Any, variable: Any, function: Function, *arguments: Any
) -> None:
    """Run a function of one replica's copies for every replica.

    Args:
        strategy: mirrors the variables; no replica's code runs.
        variable: any mirrored variable.
        function: `(copies, *arguments) -> None`, where `copies` stands for the
            strategy and updates the copies of one replica. What it does must
            depend on the replica only by these and by the arguments.
        *arguments: tensors, or values for each replica, nested.
    """
    programs: list[Any] = []

    def of_one_replica(*arguments: Any) -> None:
        function(_Copies(strategy), *arguments)

    def run(copy: Any, *arguments: Any) -> None:
        replica = len(programs)
        if not programs:
            program = tf.function(
                of_one_replica,
                autograph=False,
                # It stays one operation of the step's program, which would
                # take several times as long to optimize otherwise.
                experimental_attributes={"_noinline": True},
            )
            # It runs where it is called.
            with tf.device(None):
                concrete = program.get_concrete_function(*arguments)
            programs.append((concrete, concrete.graph.external_captures))
        else:
            programs.append(programs[0])
        program, captures = programs[-1]
        program.set_external_captures(
            [_of_replica(tensor, replica) for tensor in captures]
        )
        program(*arguments)

    strategy.extended.update(variable, run, args=arguments, group=False)


def _is_variable(value: Any) -> bool:
    return isinstance(value, (keras.Variable, tf.Variable))


class _Copies:
    """Stands for a strategy while the copies of one replica are updated."""

    def __init__(self, strategy: Any):
        self._strategy = strategy
        self.extended = self

    def update(
        self,
        variable: Any,
        function: Function,
        args: Sequence[Any] = (),
        kwargs: Any = None,
        group: bool = True,
    ) -> None:
        copies = self._strategy.experimental_local_results(variable)
        function(copies[0], *args, **(kwargs or {}))


def _of_replica(tensor: Any, replica: int) -> Any:
    """A replica's own tensor in the place of one of the first replica."""
    variable = getattr(tensor, "_distributed_container", lambda: None)()
    if variable is None:
        return tensor
    return variable.values[replica].handle
