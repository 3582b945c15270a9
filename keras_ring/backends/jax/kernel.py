"""The kernels of JAX, by preference."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from keras_ring import precision
from keras_ring.attention.blockwise.kernel import BlockwiseKernel
from keras_ring.backends.jax.kernels import local
from keras_ring.backends.jax.kernels.by_head import ByHeadKernel
from keras_ring.backends.jax.kernels.cudnn import CuDnnKernel
from keras_ring.backends.jax.kernels.native import JaxNativeKernel
from keras_ring.backends.jax.kernels.splash import SplashKernel
from keras_ring.backends.jax.kernels.triton import TritonKernel


class Kernel(BlockwiseKernel):
    """The blockwise kernel in `lax` loops; a store is the array itself, so
    that nothing is laid out anew for it."""

    def device(self, tensor: jax.Array) -> str | None:
        # The compiler decides where a tensor lies, among devices of one kind.
        return local.platform()

    def loop(self, count: Any, body: Callable, carry: Any) -> Any:
        if isinstance(count, int) and count == 1:
            return body(0, carry)
        return lax.fori_loop(0, count, body, carry)

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        if isinstance(predicate, bool):
            return yes() if predicate else no()
        return lax.cond(predicate, yes, no)

    def store(self, tensor: jax.Array, axis: int = 0) -> jax.Array:
        return tensor

    def read(self, store: jax.Array, index: Any, axis: int = 0) -> jax.Array:
        return lax.dynamic_index_in_dim(store, index, axis, keepdims=False)

    def write(
        self, store: jax.Array, index: Any, tile: jax.Array, axis: int = 0
    ) -> jax.Array:
        return lax.dynamic_update_index_in_dim(store, tile, index, axis)

    def stacked(self, store: jax.Array, axis: int = 0) -> jax.Array:
        return store

    def product(
        self, equation: str, left: jax.Array, right: jax.Array
    ) -> jax.Array:
        dtype = precision.accumulation_dtype(left.dtype)
        return jnp.einsum(
            equation,
            left.astype(dtype),
            right.astype(dtype),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )


class CacheKernel(Kernel):
    """The same in tiles of which one head's scores, with what is made of
    them, fit into the cache of one core."""

    tile = 256


KERNEL = Kernel()
BY_HEAD = ByHeadKernel(CacheKernel(), KERNEL)
# By preference; the last is the reference.
KERNELS = (
    JaxNativeKernel(BY_HEAD),
    BY_HEAD,
    CuDnnKernel(KERNEL),
    TritonKernel(KERNEL),
    SplashKernel(KERNEL),
    KERNEL,
)
