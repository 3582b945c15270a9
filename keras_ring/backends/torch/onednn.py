"""Attention on CPUs by products of oneDNN.

PyTorch's fused operation multiplies with MKL, which on processors of other
makers than Intel gets half of what they can do. oneDNN, which PyTorch carries
for its compiler, gets all of it there. So this is the same algorithm (Dao et
al. 2022, arXiv 2205.14135, algorithms 1 and 4), tile by tile from Python, with
oneDNN's products: `linear(x, w, b)` is `x w^T + b`, at full speed with a `w`
that is a transposed view, but not with such an `x`. That decides which way
each product stands.

The exponential is that of 2, for which PyTorch has a vectorised one: queries
are scaled by `log2(e)` more.

All of it is private to PyTorch: that it is there is checked here, and its
results are in `keras_ring.kernels`. It is preferred only where a trial of a
few milliseconds shows that its products are far ahead.
"""

import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from keras_ring.backends.torch.fused import Call, Operation, accumulation_dtype
from keras_ring.backends.torch.pieces import FINE

# Rows and columns of a tile: of queries and of keys. One head's scores stay
# in the cache.
FORWARD, BACKWARD = (256, 512), (512, 512)
# How much faster oneDNN's products have to be; they are 1.9 times as fast on
# processors where the kernel gains, and as fast as MKL's on the others.
MARGIN = 1.4


class OneDnn(Operation):
    """For float32 and what is accumulated in it."""

    device = "cpu"
    grain = FINE

    def there(self) -> bool:
        return _linear() is not None

    def pays(self) -> bool:
        return pays()

    def dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        found: torch.dtype = accumulation_dtype(dtype)
        return found if found == torch.float32 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, rows, _ = query.shape
        out = query.new_empty((batch, rows, heads, value.shape[3]))
        out = out.transpose(1, 2)
        lse = query.new_empty((batch, heads, rows))

        def head(sample: int, number: int) -> None:
            shared = number * key.shape[1] // heads
            _forward(
                *(query[sample, number], key[sample, shared]),
                *(value[sample, shared], _of(call, sample, number)),
                *(out[sample, number], lse[sample, number]),
            )

        _each(head, [(b, h) for b in range(batch) for h in range(heads)])
        return out, lse

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, heads, _, _ = query.shape
        group = heads // key.shape[1]
        grads = tuple(
            torch.empty_like(t.transpose(1, 2)).transpose(1, 2)
            for t in (query, key, value)
        )

        def key_head(sample: int, shared: int) -> None:
            own = key[sample, shared], value[sample, shared]
            grad_key, grad_value = (
                torch.zeros(t.shape, dtype=t.dtype) for t in own
            )
            for number in range(shared * group, (shared + 1) * group):
                place = sample, number
                grads[0][place] = _backward(
                    *(grad_out[place], query[place], *own),
                    *(out[place], lse[place], _of(call, *place)),
                    *(grad_key, grad_value),
                )
            grads[1][sample, shared] = grad_key.mul_(math.log(2.0))
            grads[2][sample, shared] = grad_value

        _each(
            key_head,
            [(b, k) for b in range(batch) for k in range(key.shape[1])],
        )
        return grads


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    call: Call,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """One head: (R, W), (C, W), (C, W) -> `out` (R, W) and `lse` (R,)."""
    linear = _linear()
    query = (query * (call.scale * math.log2(math.e))).contiguous()
    key, value_turned = key.contiguous(), value.contiguous().t()
    for rows in _tiles(query.shape[0], FORWARD[0]):
        # Of the lowest number: what is hidden is below it, and no difference
        # of two infinities is taken in a row that saw nothing so far.
        lowest = torch.finfo(query.dtype).min
        top = query.new_full((query[rows].shape[0], 1), lowest)
        total = torch.zeros_like(top)
        acc = query.new_zeros((query[rows].shape[0], value.shape[1]))
        for columns in _tiles(key.shape[0], FORWARD[1], _end(call, rows)):
            scores = linear(query[rows], key[columns])
            _hide(scores, call, rows, columns, -math.inf)
            new_top = torch.maximum(top, scores.amax(1, keepdim=True))
            decay = (top - new_top).exp2_()
            p = scores.sub_(new_top).exp2_()
            total = p.sum(1, keepdim=True).addcmul_(total, decay)
            product = linear(p, value_turned[:, columns])
            acc = product.addcmul_(acc, decay)
            top = new_top
        out[rows] = acc.div_(total)
        lse[rows] = total.log2_().add_(top).mul_(math.log(2.0))[:, 0]


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: Call,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
) -> torch.Tensor:
    """One head, with keys as rows.

    Returns:
        The gradient of the query (R, W). What belongs to the key, over
        `log(2)`, and to the value is added to `grad_key` and `grad_value`.
    """
    linear = _linear()
    scaled = (query * (call.scale * math.log2(math.e))).contiguous()
    key, value = key.contiguous(), value.contiguous()
    grad_out = grad_out.contiguous()
    minus_delta = (grad_out * out).sum(-1).neg_()
    minus_lse = lse * -math.log2(math.e)
    turned = torch.zeros(query.shape[::-1], dtype=query.dtype)
    for columns in _tiles(key.shape[0], BACKWARD[1]):
        key_turned = key[columns].t().contiguous()
        for rows in _tiles(query.shape[0], BACKWARD[0]):
            if columns.start >= _end(call, rows):
                continue
            p = linear(key[columns], scaled[rows], minus_lse[rows]).exp2_()
            _hide(p.t(), call, rows, columns, 0.0)
            grad_score = linear.times(
                value[columns], grad_out[rows], minus_delta[rows], p
            )
            grad_value[columns] += linear(p, grad_out[rows].t())
            grad_key[columns] += linear(grad_score, scaled[rows].t())
            turned[:, rows] += linear(key_turned, grad_score.t())
    return turned.mul_(call.scale).t()


def _hide(
    tile: torch.Tensor, call: Call, rows: slice, columns: slice, value: float
) -> None:
    """Write a value where a pair does not count; (r, c), maybe a view."""
    if call.mask is not None:
        tile.masked_fill_(~call.mask[rows, columns], value)
    elif call.causal and columns.stop > rows.start + 1:
        tile.masked_fill_(
            _later(*tile.shape, rows.start - columns.start), value
        )


@functools.lru_cache(maxsize=64)
def _later(rows: int, columns: int, ahead: int) -> torch.Tensor:
    """Which columns lie behind the row, if the first row is the column
    `ahead`."""
    ones = torch.ones((rows, columns), dtype=torch.bool)
    return ones.triu_(ahead + 1)


def _end(call: Call, rows: slice) -> float:
    """The first column that no row of a tile sees."""
    return rows.stop if call.causal else math.inf


def _tiles(length: int, tile: int, end: float = math.inf) -> list[slice]:
    return [
        slice(start, min(start + tile, length))
        for start in range(0, int(min(length, end)), tile)
    ]


def _of(call: Call, sample: int, number: int) -> Call:
    """The call of one head, with its mask (R, C)."""
    mask = call.mask
    if mask is None:
        return call
    batch, heads, _, _ = mask.shape
    return call._replace(
        mask=mask[sample if batch > 1 else 0, number if heads > 1 else 0]
    )


def _each(function: Callable[..., None], items: list[tuple[int, int]]) -> None:
    """Call a function for all heads: each in a thread of its own as far as
    they go, which is faster than products that share threads."""
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        for item in items:
            function(*item)
        return
    pool = _pool(threads)

    def alone(item: tuple[int, int]) -> None:
        with torch.no_grad():  # Threads do not have it from the caller.
            function(*item)

    for _ in pool.map(alone, items):
        pass


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that compute by themselves."""

    def start() -> None:
        # The first question sets a thread up; only then is the answer its own.
        torch.get_num_threads()
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "keras_ring", initializer=start)
    for _ in pool.map(lambda _: time.sleep(1e-3), range(threads)):
        pass
    torch.set_num_threads(threads)
    return pool


class Linear:
    """oneDNN's product with what it does in the same pass."""

    def __init__(self, plain: Any):
        self.plain, self.binary = plain.default, plain.binary

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(n, k), (m, k), (m,) -> (n, m): `x weight^T + bias`."""
        found: torch.Tensor = self.plain(x, weight, bias, "none", [], "")
        return found

    def times(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        factor: torch.Tensor,
    ) -> torch.Tensor:
        """`(x weight^T + bias) * factor`, with a factor (n, m)."""
        found: torch.Tensor = self.binary(x, factor, weight, bias, "mul")
        return found


@functools.cache
def _linear() -> Any:
    """None where this release or processor does not have it."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return Linear(torch.ops.mkldnn._linear_pointwise)
    except (AttributeError, RuntimeError):
        return None


@functools.cache
def pays() -> bool:
    """Whether oneDNN's products are far ahead of MKL's on this processor."""
    linear = _linear()
    if linear is None or not torch.backends.mkl.is_available():
        return False
    x, weight = torch.randn(256, 64), torch.randn(512, 64)
    turned = weight.t()
    best: dict[str, float] = {}
    contestants = {
        "onednn": lambda: linear(x, weight),
        "mkl": lambda: torch.mm(x, turned),
    }
    with torch.no_grad():
        for _ in range(15):
            for name, product in contestants.items():
                start = time.perf_counter()
                for _ in range(4):
                    product()
                taken = time.perf_counter() - start
                best[name] = min(taken, best.get(name, math.inf))
    return best["mkl"] > MARGIN * best["onednn"]
