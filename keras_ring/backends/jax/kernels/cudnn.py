"""The attention of NVIDIA's cuDNN on GPUs, as JAX has it.

JAX's `dot_product_attention` returns the log-sum-exp, but its gradient takes
none that belongs to a longer sequence, which is what a ring needs (Dao et
al. 2022, arXiv 2205.14135, algorithms 1 and 4). The private operations behind
it do. Their presence is checked here, their results in
`keras_ring.attention.selection`. They compute in half precision, round each
partial result to it, and want widths that are multiples of 8.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from keras_ring import precision
from keras_ring.attention.kernel import Inputs, Rows
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels import local
from keras_ring.backends.jax.kernels.fused import FusedKernel
from keras_ring.masks import Causal

try:
    from jax._src.cudnn import fused_attention_stablehlo as private

    FORWARD = private._dot_product_attention_fwd_p_wrapper
    BACKWARD = private._dot_product_attention_bwd_p_wrapper
    FULL = private.MaskType.NO_MASK
    CAUSAL = private.MaskType.CAUSAL
    HEADS_FIRST = private.AttentionLayout.BNTH.value
except (ImportError, AttributeError):  # Another release of JAX.
    FORWARD = BACKWARD = FULL = CAUSAL = HEADS_FIRST = None

HALF = ("float16", "bfloat16")
WIDEST, MULTIPLE = 128, 8


class CuDnnKernel(FusedKernel):
    """cuDNN where it fits, another kernel where it does not.

    Legend: B batch, H query heads, K key/value heads, Q and S query and key
    lengths, D and E the head dimensions of query/key and of value, W the
    width that all tensors of a call have.
    """

    name = "cudnn"
    description = "NVIDIA's cuDNN, on GPUs in half precision"

    def available(self) -> bool:
        return FORWARD is not None and local.platform() == "gpu"

    def preferred(self, device: str | None, dtype: str) -> bool:
        device = device or local.platform()
        return FORWARD is not None and device == "gpu" and dtype in HALF

    def rounds(self, dtype: str) -> bool:
        return dtype in HALF

    def takes(self, inputs: Inputs, visit: Visit) -> bool:
        query, _, value = inputs
        return (
            self.available()
            and str(query.dtype) in HALF
            and max(query.shape[3], value.shape[3]) <= WIDEST
        )

    def call_forward(
        self, inputs: Inputs, scale: float, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        query, _, value = inputs
        width = _width(max(query.shape[3], value.shape[3]))
        out, lse = FORWARD.bind(
            *(_widened(t, width) for t in inputs),
            *_unused(query.dtype),
            **_options(scale, causal),
            is_training=True,
        )
        return out[..., : value.shape[3]], lse

    def call_backward(
        self, inputs: Inputs, rows: Rows, scale: float, causal: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """cuDNN makes delta of `out` and `grad_out`. Where the log-sum-exp
        has a gradient of its own they are given one column more, in which
        the values are 0, and their product is delta; where there is no room
        for one, another kernel computes it."""
        query, _, value = inputs
        lse, delta = rows.lse, rows.delta
        assert rows.out is not None
        assert delta is not None
        dtype = precision.accumulation_dtype(str(query.dtype))
        out, pull = rows.out.astype(dtype), rows.grad_out.astype(dtype)
        products = pull * out
        # The sum that delta was made of may have been added up in another
        # order; what that changes is far below half precision.
        rest = jnp.abs(jnp.sum(products, axis=-1) - delta)
        size = jnp.sum(jnp.abs(products), axis=-1)

        def call(out: jax.Array, pull: jax.Array) -> Any:
            width = _width(max(query.shape[3], out.shape[3]))
            grads = BACKWARD.bind(
                *(_widened(t, width) for t in inputs),
                *_unused(query.dtype),
                lse.astype("float32"),
                _widened(out.astype(query.dtype), width),
                _widened(pull.astype(query.dtype), width),
                **_options(scale, causal),
            )
            return tuple(
                grad[..., : t.shape[3]].astype(dtype)
                for grad, t in zip(grads[:3], inputs, strict=True)
            )

        def with_column() -> Any:
            if value.shape[3] + 1 > WIDEST:
                # A square on the diagonal is one wherever it lies.
                mask = Causal() if causal else None
                visit = Visit((0,), (0,), Scoring(scale=scale, mask=mask))
                whole = rows._replace(out=out)
                grads = self.fallback.backward(inputs, whole, visit, None)
                return grads.query, grads.key, grads.value
            column = delta[..., None]
            return call(
                jnp.concatenate([jnp.zeros_like(out), column], -1),
                jnp.concatenate([pull, jnp.ones_like(column)], -1),
            )

        found: Any = lax.cond(
            jnp.all(rest <= 2.0**-20 * size),
            lambda: call(out, pull),
            with_column,
        )
        return found


def _unused(dtype: Any) -> list[jax.Array]:
    """Stands for bias, lengths, offsets and pages, of which there are none."""
    return [jnp.zeros(0, dtype)] * 7


def _options(scale: float, causal: bool) -> dict[str, Any]:
    return {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": CAUSAL if causal else FULL,
        "layout": HEADS_FIRST,
        "sliding_window_length": None,
    }


def _width(width: int) -> int:
    return -(-width // MULTIPLE) * MULTIPLE


def _widened(tensor: jax.Array, width: int) -> jax.Array:
    more = width - tensor.shape[3]
    if not more:
        return tensor
    return jnp.pad(tensor, ((0, 0),) * 3 + ((0, more),))
