"""Splash attention on TPUs, as JAX has it.

The operation is public (`jax.experimental.pallas.ops.tpu`) and returns the
log-sum-exp; its gradient takes none that belongs to a longer sequence, which
is what a ring needs (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4).
The two private operations behind the gradient do, and `delta` as well. Their
presence is checked here. They want lengths that are multiples of 128, take
queries that are scaled already, and multiply in half precision whatever they
get, so that float32 is left to another kernel.

It was compared with the oracle in Pallas' interpreter and compiled ahead of
time for TPUs, but has not run on one. So it is there by name only: "auto"
does not take it.
"""

import functools
from typing import Any, NamedTuple

import jax

from keras_ring.attention.kernel import Inputs, Kernel, Rows
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels import local
from keras_ring.backends.jax.kernels.fused import FusedKernel

# The one dtype that the matrix units of a TPU take as it is.
DTYPE = "bfloat16"
TILES = (512, 256, 128)
WIDEST = 256


class SplashKernel(FusedKernel):
    """Splash attention where it fits, another kernel where it does not.

    Args:
        fallback: computes what does not fit.
        interpret: run in Pallas' interpreter, which is slow, on any device.

    Legend: B batch, H query heads, K key/value heads, Q and S query and key
    lengths, D and E the head dimensions of query/key and of value.
    """

    name = "splash"
    description = (
        "JAX's splash attention on TPUs, by name only: not run on one yet"
    )

    def __init__(self, fallback: Kernel, interpret: bool = False):
        super().__init__(fallback)
        self.interpret = interpret

    def available(self) -> bool:
        return (
            self.interpret or local.platform() == "tpu"
        ) and _operations() is not None

    def preferred(self, device: str | None, dtype: str) -> bool:
        """By name only, see above."""
        return False

    def rounds(self, dtype: str) -> bool:
        return dtype == DTYPE

    def takes(self, inputs: Inputs, visit: Visit) -> bool:
        query, key, value = inputs
        parts = (
            query.shape[2] / len(visit.query_starts),
            key.shape[2] / len(visit.key_starts),
        )
        return (
            self.available()
            and str(query.dtype) == DTYPE
            and all(part % TILES[-1] == 0 for part in parts)
            and max(query.shape[3], value.shape[3]) <= WIDEST
        )

    def call_forward(
        self, inputs: Inputs, scale: float, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        def on_device(*tensors: jax.Array) -> Any:
            splash = self._made(causal, *tensors[:2])

            def of_sample(*sample: jax.Array) -> Any:
                out, (lse,) = splash(*sample)
                return out, lse

            return jax.vmap(of_sample)(*tensors)

        found: tuple[jax.Array, jax.Array] = local.on_each_device(
            on_device, (_scaled(inputs.query, scale), *inputs[1:])
        )
        return found

    def call_backward(
        self, inputs: Inputs, rows: Rows, scale: float, causal: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # What `out` says is in delta already.
        def on_device(*tensors: jax.Array) -> Any:
            splash = self._made(causal, *tensors[:2])
            sizes = splash.kwargs["block_sizes"]
            options = {
                "is_mqa": False,
                "mask_value": splash.kwargs["mask_value"],
                "attn_logits_soft_cap": None,
                "q_layout": sizes.q_layout,
                "k_layout": sizes.k_layout,
                "v_layout": sizes.v_layout,
                "mask_function": splash.kwargs["mask_function"],
                "interpret": self.interpret,
            }

            def of_sample(
                query: jax.Array,
                key: jax.Array,
                value: jax.Array,
                *rows: jax.Array,
            ) -> Any:
                inputs = query, key, value, None, None, *rows
                _, grad_key, grad_value = _ready().grad_keys(
                    *inputs,
                    bq=sizes.block_q_dkv,
                    bkv=sizes.block_kv_dkv,
                    bkv_compute=sizes.block_kv_dkv_compute,
                    mask_info=splash.dkv_mask_info,
                    use_fused_bwd_kernel=False,
                    **options,
                )
                grad_query = _ready().grad_query(
                    *inputs,
                    bq=sizes.block_q_dq,
                    bkv=sizes.block_kv_dq,
                    mask_info=splash.dq_mask_info,
                    **options,
                )
                return grad_query, grad_key, grad_value

            return jax.vmap(of_sample)(*tensors)

        grad_query, grad_key, grad_value = local.on_each_device(
            on_device,
            (
                *(_scaled(inputs.query, scale), *inputs[1:], rows.lse),
                *(rows.grad_out.astype(inputs.query.dtype), rows.delta),
            ),
        )
        return grad_query.astype("float32") * scale, grad_key, grad_value

    def _made(self, causal: bool, query: jax.Array, key: jax.Array) -> Any:
        """The operation for the tensors of one device."""
        heads, rows, columns = query.shape[1], query.shape[2], key.shape[2]
        row, column = (
            next(tile for tile in TILES if length % tile == 0)
            for length in (rows, columns)
        )
        ready = _ready()
        mask = ready.causal if causal else ready.full
        return ready.make(
            ready.of_heads([mask((rows, columns)) for _ in range(heads)]),
            block_sizes=ready.sizes(
                block_q=row,
                block_kv=column,
                block_q_dkv=row,
                block_kv_dkv=column,
                block_q_dq=row,
                block_kv_dq=column,
            ),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=True,
            interpret=self.interpret,
        )


class _Operations(NamedTuple):
    """The parts of the module that are used."""

    make: Any
    sizes: Any
    grad_query: Any
    grad_keys: Any
    of_heads: Any
    causal: Any
    full: Any


@functools.cache
def _operations() -> _Operations | None:
    """None in a release of JAX that has them elsewhere."""
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as kernel,
        )
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_mask as mask,
        )

        return _Operations(
            kernel.make_splash_mha,
            kernel.BlockSizes,
            kernel._splash_attention_bwd_dq,
            kernel._splash_attention_bwd_dkv,
            mask.MultiHeadMask,
            mask.CausalMask,
            mask.FullMask,
        )
    except (ImportError, AttributeError):
        return None


def _ready() -> _Operations:
    operations = _operations()
    assert operations is not None
    return operations


def _scaled(query: jax.Array, scale: float) -> jax.Array:
    return (query.astype("float32") * scale).astype(query.dtype)
