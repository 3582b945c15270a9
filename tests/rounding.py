"""How far from the oracle a correct calculation may be.

A bound for each element of each result, computed from the magnitudes that
the oracle found, by ordinary forward error analysis (Higham, "Accuracy and
Stability of Numerical Algorithms", chapters 2 and 3). Nothing is fitted to
what the package gives. `unit` is the relative error of one rounding of the
accumulation dtype, `half` that of the inputs and outputs where these have
fewer bits, else the same.

With `e` the error of a score, a softmax that is normalised by its own sum
is off by at most `p * (1 - p) * (exp(2e) - 1)`, and one that is recomputed
from a log-sum-exp by `p * (exp(e) - 1)` with the error of that one added.
What is multiplied and summed after it carries the sum of the magnitudes
times that, plus one rounding for each term of the sum.

A number of few bits that is smaller than all normal ones is rounded to a
multiple of the smallest: by up to half of that, however small it is.
"""

import numpy as np

from tests.reference import heads_first, pairs, sum_like, ungroup

UNIT = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
# Half of the smallest number, where numbers so small come up.
LEAST = {"float16": 2.0**-25}
# The functions exp, tanh and log of the frameworks are right to some units.
FUNCTION = 16
# Operations that a formula has beside the sums: scaling, merging, dividing.
STEPS = 24


def bounds(found, query, key, value, grad_out, grad_lse, options, dtype):
    """The largest error of each result, as a dict of arrays.

    Args:
        found: the oracle's `FullAttention`.
        query, key, value, grad_out, grad_lse: what it was given; the last
            may be None.
        options: its keyword arguments.
        dtype: of the tensors.

    Returns:
        `out`, `lse` and `grad_...` with the shapes that `found` has.
    """
    unit = UNIT["float64" if dtype == "float64" else "float32"]
    half = UNIT[dtype] if UNIT[dtype] > unit else unit
    least = LEAST.get(dtype, 0.0)

    def to_half(size):
        """Results in few bits are rounded once, once more after sinks."""
        return 3 * (half * size + least)

    query, key, value, grad_out = (
        np.abs(np.asarray(t, np.float64)) for t in (query, key, value, grad_out)
    )
    group = query.shape[2] // key.shape[2]
    keys, values = (np.repeat(t, group, axis=2) for t in (key, value))
    depth, width = query.shape[3], value.shape[3]
    rows, columns = found.p.shape[2:]
    cap = options.get("soft_cap")
    scale = options.get("scale")
    scale = abs(depth**-0.5 if scale is None else scale)

    # Scores. A cap never makes an error larger.
    at_product = (depth + 4) * unit * found.magnitude
    size = found.magnitude
    score = at_product
    if cap is not None:
        size = cap * np.abs(found.tanh)
        score = at_product + FUNCTION * unit * size
    if options.get("slopes") is not None:
        slopes = np.abs(np.asarray(options["slopes"], np.float64))
        alibi = slopes[None, :, None, None] * found.distance
        size = size + alibi
    if options.get("bias") is not None:
        bias = np.abs(np.nan_to_num(options["bias"], neginf=0.0))
        size = size + np.swapaxes(bias, 1, 2)
    score = score + 4 * unit * size
    seen = np.isfinite(found.scores)
    score = np.where(seen, score, 0.0)
    worst = score.max(-1)
    if options.get("sinks") is not None:
        sink = np.abs(np.asarray(options["sinks"], np.float64))
        # Relative to the log-sum-exp of the keys, itself in few bits.
        worst = worst + 4 * unit * sink[None, :, None]
        worst = worst + 4 * unit * np.where(seen, size, 0.0).max(-1)
    lse = heads_first(found.lse)
    level = np.abs(np.where(np.isfinite(lse), lse, 0.0))
    at_lse = worst + (4 * level + STEPS + FUNCTION + columns) * unit

    # Probabilities, normalised in the forward, recomputed in the backward.
    p = found.p
    apart = np.expm1(np.minimum(2 * worst[..., None], 700.0))
    forward = p * ((1 - p) * apart + (STEPS + FUNCTION) * unit)
    forward = np.minimum(forward, 1.0)
    logit = np.where(seen, np.abs(found.scores), 0.0)
    off = score + at_lse[..., None]
    off = off + (4 * (logit + level[..., None]) + FUNCTION) * unit
    backward = np.minimum(p * np.expm1(np.minimum(off, 700.0)), 1.0)

    keep = found.keep
    magnitude = times_values(p * keep, values)
    sums = (columns + STEPS) * unit
    at_out = times_values(forward * keep, values) + sums * magnitude
    of_out = at_out + to_half(np.abs(found.out))

    # Gradients. With a sink, or in few bits, the cotangent is rounded too.
    sinks = options.get("sinks") is not None
    again = half if sinks else 0.0
    # It is rounded where it has the share of the keys, and counts there with
    # attention over the keys alone, whose probabilities are larger by that.
    share = found.p.sum(-1)
    over = 1 / np.maximum(np.where(share == 0, 1.0, share), 1e-100)
    cotangent = (least * over if sinks else np.zeros_like(over))[..., None]
    terms = pairs(grad_out, values) * keep
    at_grad_p = ((width + STEPS) * unit + again) * terms
    at_grad_p = at_grad_p + cotangent * keep * pairs(
        np.ones_like(grad_out), values
    )
    carried = np.einsum("bqhe,bqhe->bhq", grad_out, np.abs(found.out))
    at_inner = np.einsum("bqhe,bqhe->bhq", grad_out, of_out)
    at_inner = at_inner + ((width + STEPS) * unit + 2 * again) * carried
    at_inner = at_inner + (cotangent[..., 0] * over) * heads_first(
        np.abs(found.out).sum(-1)
    )
    from_lse = 0.0 if grad_lse is None else np.abs(heads_first(grad_lse))
    lse_part = np.broadcast_to(np.asarray(from_lse), lse.shape)
    at_inner = at_inner + STEPS * unit * lse_part
    if sinks:
        # What goes to the keys is a share of attention over the keys alone,
        # whose output is larger by that share.
        over_keys = carried * over
        again_off = np.minimum(np.expm1(np.minimum(2 * at_lse, 700.0)), 1.0)
        at_inner = at_inner + again_off * (over_keys + lse_part)
        at_inner = at_inner + 2 * to_half(over_keys) + STEPS * unit * over_keys
        at_inner = at_inner + 6 * least * heads_first(grad_out.sum(-1))
    difference = found.grad_p - found.inner[..., None]
    if grad_lse is not None:
        difference = difference + heads_first(grad_lse)[..., None]
    at_score = backward * np.abs(difference)
    at_score = at_score + (p + backward) * (at_grad_p + at_inner[..., None])
    factor = 1 - found.tanh**2
    at_raw = scale * at_score * factor
    if cap is not None:
        slope = FUNCTION * unit + 2 * at_product / cap
        # Where the cap is reached the derivative is nearly 0, and what it is
        # off by counts with the error of what it multiplies as well.
        pulled = np.abs(found.grad_scores) + at_score
        at_raw = at_raw + scale * pulled * np.minimum(slope, 1.0)
    raw = scale * np.abs(found.grad_scores) * factor
    along_keys = at_raw + sums * raw
    along_rows = at_raw + (rows * group + STEPS) * unit * raw
    grad_key = np.einsum("bhqk,bqhd->bkhd", along_rows, query)
    at_value = backward + (rows * group + STEPS) * unit * p
    at_value = (at_value + again * p) * keep
    grad_value = np.einsum("bhqk,bqhe->bkhe", at_value, grad_out)
    # A probability times what the rounded cotangent is off by.
    grad_value = grad_value + np.einsum(
        "bhqk,bqhe->bkhe", cotangent * p * keep, np.ones_like(grad_out)
    )
    result = {
        "out": of_out,
        "lse": np.swapaxes(at_lse, 1, 2),
        "grad_query": times_values(along_keys, keys)
        + to_half(np.abs(found.grad_query)),
        "grad_key": ungroup(grad_key, group) + to_half(np.abs(found.grad_key)),
        "grad_value": ungroup(grad_value, group)
        + to_half(np.abs(found.grad_value)),
    }
    entries = p.size * unit
    full = at_score + entries * np.abs(found.grad_scores)
    if found.grad_bias is not None:
        shape = found.grad_bias.shape
        result["grad_bias"] = sum_like(
            np.swapaxes(full, 1, 2), shape
        ) + to_half(np.abs(found.grad_bias))
    if found.grad_slopes is not None:
        # Each member rounds its term of the sum.
        entry = full + to_half(np.abs(found.grad_scores))
        result["grad_slopes"] = (entry * found.distance).sum((0, 2, 3))
    if found.grad_sinks is not None:
        weight = found.p_sink
        off = np.expm1(np.minimum(2 * at_lse, 700.0)) + STEPS * unit
        total = np.abs(found.inner) + lse_part + carried
        at_sink = np.minimum(weight * off, 1.0) * total
        at_sink = at_sink + weight * at_inner
        # Frameworks take s * (1 - s) as the derivative of a sigmoid s.
        at_sink = at_sink + 4 * unit * over_keys
        at_sink = at_sink + p.shape[0] * rows * unit * weight * total
        at_sink = at_sink + to_half(weight * total)
        result["grad_sinks"] = at_sink.sum((0, 2))
    return result


def times_values(weights, values):
    """(b, h, q, k) and (b, k, h, e) -> (b, q, h, e)."""
    return np.einsum("bhqk,bkhe->bqhe", weights, values, optimize=True)


def rounded(array, dtype):
    """The nearest numbers of a dtype, as float32 (float64 for float64)."""
    if dtype == "float64":
        return np.asarray(array, np.float64)
    array = np.asarray(array, np.float32)
    if dtype == "float16":
        return array.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        # To nearest even: the upper half of a float32.
        bits = array.view(np.uint32)
        up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        near = ((bits + up) & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isfinite(array), near, array)
    return array
