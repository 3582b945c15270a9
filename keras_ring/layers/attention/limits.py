"""Limits of an attention layer, refused with the way out."""

import math
from typing import Any

from keras_ring.attention.sharing import Heads, choose_way
from keras_ring.distribution import strategy
from keras_ring.layers.attention.axes import AttentionAxes
from keras_ring.layers.attention.options import AttentionOptions


def check_overridden(overridden: bool) -> None:
    """Refuse a bias where a subclass computes its own attention."""
    if overridden:
        raise NotImplementedError(
            "A layer whose class overrides `_compute_attention` takes no "
            "`attention_bias`: the method is not told of it. Received: an "
            "attention_bias. Add it inside the method."
        )


def check_scores(scores: bool, flash_attention: bool | None) -> None:
    """Refuse to write out scores where it was promised not to."""
    if scores and flash_attention:
        raise ValueError(
            "Returning attention scores is not supported when flash "
            "attention is enabled. Please disable flash attention to access "
            "attention scores. Received: flash_attention=True, "
            "return_attention_scores=True."
        )


def check_positions(axes: AttentionAxes, **by_position: Any) -> None:
    """Refuse what goes by position where there is more than one position."""
    given = {
        name: value
        for name, value in by_position.items()
        if value is not None and value is not False
    }
    if given and len(axes.axes) > 1:
        received = ", ".join(f"{name}={value}" for name, value in given.items())
        raise NotImplementedError(
            "A causal mask, a sliding window, a prefix, ALiBi and rotary "
            "embedding need one sequence axis. Received: attention over the "
            f"axes {axes.axes}, {received}. Pass the allowed pairs as "
            "`attention_mask`."
        )


def check_heads(options: AttentionOptions) -> None:
    """Refuse heads that the devices cannot share as they were asked to."""
    world = strategy.current()
    if world is not None:
        heads = Heads(options.heads.query, options.heads.key_value)
        devices = world.model_size
        if heads.query % devices == 0:  # Each has a part of them.
            key = math.lcm(heads.key, devices)
            heads = Heads(heads.query // devices, key // devices)
        choose_way(
            world.sequence_size,
            heads,
            world.sequence_size - 1,
            options.attention or world.strategy.attention,
            world.strategy.heads_parallel,
        )


def check_ring(axes: AttentionAxes, scores: bool, overridden: bool) -> None:
    """Refuse what needs the whole sequence, where no device holds it.

    Args:
        axes: the axes attended over.
        scores: whether the scores are asked for.
        overridden: whether a subclass computes its own attention.
    """
    world = strategy.current()
    if world is None or world.sequence_size == 1:
        return
    size = f"Received: sequence_parallel={world.sequence_size}"
    if scores or overridden:
        raise NotImplementedError(
            "Attention scores are not supported around a ring, where no "
            f"device holds them. {size}, return_attention_scores="
            f"{bool(scores)}, _compute_attention overridden: {overridden}. "
            "Ask for them outside the strategy's scope, on one device."
        )
    if axes.axes != (1,):
        raise NotImplementedError(
            "Attention around a ring is over axis 1, the one that is spread "
            f"over the devices. {size}, attention over the axes {axes.axes} "
            f"of inputs of rank {axes.rank}. Set attention_axes=1, or flatten "
            "the axes into one sequence before the layer."
        )
