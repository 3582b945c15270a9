"""Attention in Triton on GPUs, of the package's own.

What cuDNN cannot compute: float32, and masks by position or by tensor, where
chunks may lie anywhere. See `triton_programs` for what runs on the device.

It agrees with the oracle in Pallas' interpreter and on an H100, where it is
slower than cuDNN and, in float32, than the blockwise kernel. So it is there by
name only: "auto" does not take it.
"""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from keras_ring.attention import numerics
from keras_ring.attention.kernel import (
    FallbackKernel,
    Gradients,
    Inputs,
    Kernel,
    Rows,
    merged,
    summed,
)
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels import local
from keras_ring.backends.jax.kernels.parts import add, joined
from keras_ring.masks import Mask

DTYPES = ("float32", "float16", "bfloat16")
# A dot product of Triton has at least this many rows, columns and terms.
LEAST = 16
WIDEST = 128
# Queries and keys; what fits the shared memory of a GPU with 99 KiB of it.
TILES = ((64, 64), (64, 32), (32, 32))


class TritonKernel(FallbackKernel):
    """Triton where it fits, another kernel where it does not.

    Args:
        fallback: computes what does not fit.
        interpret: run in Pallas' interpreter, which is slow, on any device.

    Legend: B batch, H query heads, K key/value heads, Q and S query and key
    lengths, D and E the head dimensions of query/key and of value.
    """

    name = "triton"
    description = (
        "this package's own in Triton on GPUs, by name only: others are faster"
    )

    def __init__(self, fallback: Kernel, interpret: bool = False):
        super().__init__(fallback)
        self.interpret = interpret

    def available(self) -> bool:
        return self._runs()

    def preferred(self, device: str | None, dtype: str) -> bool:
        """By name only, see above."""
        return False

    def rounds(self, dtype: str) -> bool:
        return dtype != "float32"

    def compute(
        self, inputs: Inputs, visit: Visit, carry: Partial | None
    ) -> Partial:
        query, key, value = inputs
        width = value.shape[3]
        rows = []
        for own in _parts(visit.query_starts, query.shape[2]):
            found: Partial | None = None
            for seen in _parts(visit.key_starts, key.shape[2]):
                program, carried, starts, padded = self._program(
                    visit, own, seen, query.shape[3], width, query.dtype
                )
                out, lse = local.on_each_device(
                    lambda q, k, v, *rest, call=program.forward: call(
                        q, k, v, rest[:-1], rest[-1]
                    ),
                    (
                        padded(query, 0),
                        padded(key, 1),
                        padded(value, 1),
                        *carried,
                    ),
                    (starts,),
                )
                length = own[1]
                part = Partial(out[:, :, :length, :width], lse[:, :, :length])
                found = merged(found, part)
            rows.append(found)
        whole = Partial(*(joined(t) for t in zip(*rows, strict=True)))
        return merged(carry, whole)

    def compute_gradients(
        self,
        inputs: Inputs,
        rows: Rows,
        visit: Visit,
        carry: jax.Array | None,
    ) -> Gradients:
        query, key, value = inputs
        lse = numerics.without_empty_rows(rows.lse)
        grad_out = rows.grad_out.astype(query.dtype)
        shapes = query.shape, key.shape, value.shape
        grads: list[dict[int, Any]] = [{}, {}, {}]
        for row, own in enumerate(_parts(visit.query_starts, shapes[0][2])):
            for column, seen in enumerate(
                _parts(visit.key_starts, shapes[1][2])
            ):
                program, carried, starts, padded = self._program(
                    visit, own, seen, shapes[0][3], shapes[2][3], query.dtype
                )
                shares = local.on_each_device(
                    lambda *tensors, call=program.backward: call(
                        *tensors[:6], tensors[6:-1], tensors[-1]
                    ),
                    (
                        padded(query, 0),
                        padded(key, 1),
                        padded(value, 1),
                        padded(lse, 0, fill=jnp.inf),
                        padded(rows.delta, 0),
                        padded(grad_out, 0),
                        *carried,
                    ),
                    (starts,),
                )
                places = (row, own), (column, seen), (column, seen)
                for found, share, (number, (_, length, _)), shape in zip(
                    grads, shares, places, shapes, strict=True
                ):
                    add(found, number, share[:, :, :length, : shape[3]])
        whole = Gradients(*(joined(list(g.values())) for g in grads))
        return summed(carry, whole)

    def _runs(self) -> bool:
        if self.interpret:
            return True
        return local.platform() == "gpu" and _is_there()

    def fits(
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool:
        query, _, value = inputs
        scoring = visit.scoring
        sizes = [size for tensor in inputs for size in tensor.shape]
        return (
            self._runs()
            and str(query.dtype) in DTYPES
            and all(isinstance(size, int) and size for size in sizes)
            and max(query.shape[3], value.shape[3]) <= WIDEST
            and scoring.only_products
            and (scoring.mask is None or scoring.mask.has_tile())
            and not _wide_ids(scoring.mask)
        )

    def _program(
        self,
        visit: Visit,
        own: tuple[int, int, Any],
        seen: tuple[int, int, Any],
        key_width: int,
        value_width: int,
        dtype: Any,
    ) -> Any:
        """The program of a part of a visit, the mask's tensors and the
        starts of both sides, and a function that pads a tensor of one."""
        # Here, since it imports Pallas.
        from keras_ring.backends.jax.kernels import triton_programs

        sides, mask = (own, seen), visit.scoring.mask
        # What a tile holds of float32, or of wide heads, is twice as large.
        large = (dtype == jnp.float32) + (max(key_width, value_width) > 64)
        tiles = tuple(
            min(size, _power(length))
            for size, (_, length, _) in zip(TILES[large], sides, strict=True)
        )
        program = triton_programs.Program(
            mask,
            visit.scoring.scale,
            (tiles[0], tiles[1]),
            (own[1], seen[1]),
            self._options(),
        )

        def padded(tensor: jax.Array, side: int, fill: Any = 0) -> jax.Array:
            """(B, H, length, ...) -> (B, H, tiles, ...) of one part."""
            first, length, _ = sides[side]
            tensor = tensor[:, :, first : first + length]
            widths = [(0, 0), (0, 0), (0, -length % tiles[side])]
            if tensor.ndim == 4:
                width = tensor.shape[3]
                widths.append((0, _power(width) - width))
            return jnp.pad(tensor, widths, constant_values=fill)

        carried = [] if mask is None else list(mask.carried()[:2])
        tensors = [
            padded(tensor.astype(jnp.int32)[:, None], side)[:, 0]
            for side, tensors in enumerate(carried)
            for tensor in tensors
        ]
        starts = jnp.stack([jnp.asarray(s[2], jnp.int32) for s in sides])
        return program, tensors, starts, padded

    def _options(self) -> dict[str, Any]:
        if self.interpret:
            return {"interpret": True}
        from jax.experimental.pallas import triton as pallas

        return {
            "compiler_params": pallas.CompilerParams(num_warps=4, num_stages=2)
        }


@functools.cache
def _is_there() -> bool:
    """JAX 0.11 warns that a later release will have no Triton in Pallas."""
    try:
        return (
            importlib.util.find_spec("jax.experimental.pallas.triton")
            is not None
        )
    except ImportError:
        return False


def _parts(starts: tuple[Any, ...], length: int) -> list[tuple[int, int, Any]]:
    """First index of each part of a chunk, its length, its global position."""
    part = length // len(starts)
    return [(i * part, part, start) for i, start in enumerate(starts)]


def _wide_ids(mask: Mask | None) -> bool:
    """True if what a mask carries may not survive as int32."""
    own, seen = ((), ()) if mask is None else mask.carried()[:2]
    return any(
        tensor.dtype not in (bool, "int8", "uint8", "int16", "int32")
        for tensor in (*own, *seen)
    )


def _power(size: int) -> int:
    """The power of two that holds a size."""
    return max(LEAST, 1 << (size - 1).bit_length())
