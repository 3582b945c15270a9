"""The programs that JAX makes of a model's steps."""

import jax


def train_step(strategy, model, batch):
    """The compiled train step of a model, as Keras' trainer has it.

    Args:
        strategy: whose scope is active, and in which the model was made.
        model: compiled.
        batch: `(x, y)`, on which it is trained once first.
    """
    model.train_on_batch(*batch)
    state = tuple(
        [variable.value for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    )
    strategy.world.model = model
    placed = strategy.world.place_batch(batch)
    layouts = jax.tree.map(lambda array: array.sharding, state)
    step = jax.jit(
        model.train_step, donate_argnums=0, out_shardings=(None, layouts)
    )
    return step.lower(state, placed).compile()
