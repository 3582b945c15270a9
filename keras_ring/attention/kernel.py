"""The kernel contract: attention of local queries over one K/V block.

A ring step gives a kernel the tensors (`Inputs`), where they lie and what
makes their scores (`Visit`), and what the steps before it added up to (the
carry). The kernel adds its share. To write one, subclass `Kernel`, or
`FallbackKernel` for a kernel that does not take everything; list it in the
backend's `KERNELS`; and test it with a subclass of the tests' conformance
class (docs/adding-a-kernel.md).

Everything is heads first and local. Legend: B batch, H query heads, K
key/value heads, Q and S query and key lengths, D and E the head dimensions of
query/key and of value.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_ring import precision
from keras_ring.attention import numerics
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.shapes import sizes

Tensor = Any


class Inputs(NamedTuple):
    """The operands of attention, all of one floating-point dtype.

    Attributes:
        query: (B, H, Q, D).
        key: (B, K, S, D).
        value: (B, K, S, E).
    """

    query: Tensor
    key: Tensor
    value: Tensor


class Rows(NamedTuple):
    """Results and gradients of each query, over all keys of the sequence.

    Attributes:
        out: (B, H, Q, E), dtype of the query or the accumulation dtype; None
            where a backend hands on rows to a kernel that needs delta alone.
        lse: (B, H, Q), accumulation dtype; `-inf` for a query that may
            attend to nothing.
        delta: (B, H, Q), accumulation dtype, or what else `Kernel.row_delta`
            made, which may be None.
        grad_out: (B, H, Q, E), dtype of the query.
    """

    out: Tensor | None
    lse: Tensor
    delta: Tensor | None
    grad_out: Tensor


class Gradients(NamedTuple):
    """Gradients of one K/V block's attention, in the accumulation dtype.

    Attributes:
        query: (B, H, Q, D).
        key: (B, K, S, D).
        value: (B, K, S, E).
        bias: (B or 1, Q, H or 1, S), of the columns of the block's keys;
            None without a bias.
        slopes: (H,); None without slopes.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    slopes: Tensor | None = None


class Kernel(abc.ABC):
    """Computes attention over one K/V block and adds it to what was before.

    Attributes:
        name: for `config.set_kernel`.
        description: for users, one clause: what it is and where it runs.
    """

    name: str
    description: str

    @abc.abstractmethod
    def available(self) -> bool:
        """Return True if this process can use it when it is asked for by
        name."""

    @abc.abstractmethod
    def preferred(self, device: str | None, dtype: str) -> bool:
        """Return True if "auto" may choose it, before it is tried.

        Args:
            device: kind of device that holds the tensors, such as "cpu" or
                "cuda"; None where the backend does not say.
            dtype: of query, key and value.
        """

    @abc.abstractmethod
    def forward(
        self, inputs: Inputs, visit: Visit, carry: Partial | None
    ) -> Partial:
        """Add attention over the keys of this block to a partial result.

        Args:
            inputs: the operands.
            visit: where they lie, and what makes the scores.
            carry: the partial result over the blocks before, in the
                accumulation dtype; None if there are none. Nobody uses it
                again, so it may be overwritten.

        Returns:
            `Partial` with `out` (B, H, Q, E) and `lse` (B, H, Q), in the
            accumulation dtype.
        """

    @abc.abstractmethod
    def backward(
        self, inputs: Inputs, rows: Rows, visit: Visit, carry: Tensor | None
    ) -> Gradients:
        """Compute the gradients that this block contributes.

        Args:
            inputs: the operands.
            rows: of the queries, over all keys of the sequence. With their
                log-sum-exp the probabilities of one block are final, so that
                the gradients of blocks add up.
            visit: where the operands lie, and what makes the scores.
            carry: the gradient of the queries over the blocks before; None
                if there are none. It may be overwritten.

        Returns:
            `Gradients`: the query's with the carry, all others of this block
            alone.
        """

    @abc.abstractmethod
    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        """Run and return one of two nullary functions, never both. A
        Python bool decides at once."""

    def reason(self) -> str:
        """Say why it is not available, where more is known than its name
        says; empty otherwise."""
        return ""

    def rounds(self, dtype: str) -> bool:
        """Return True if its partial results have no more precision than
        `dtype`, although they come in the accumulation dtype."""
        return False

    def fits(
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool:
        """Return True if it computes this block itself, and does not leave
        it to another kernel; `rows` are those of the backward."""
        return True

    def eager(self) -> "Kernel":
        """The same kernel for a few calls that are not repeated, where there
        is a shorter way than to trace a program; see
        `attention.selection.agrees`."""
        return self

    def row_delta(
        self, out: Tensor, grad_out: Tensor, grad_lse: Tensor
    ) -> Tensor:
        """Make `Rows.delta` once for all blocks of a backward.

        Args:
            out: (B, H, Q, E).
            grad_out: (B, H, Q, E).
            grad_lse: (B, H, Q), the gradient of the log-sum-exp.

        Returns:
            `numerics.row_delta` in the accumulation dtype, (B, H, Q), or what
            else this kernel wants to have in its place.
        """
        dtype = precision.accumulation_dtype(out.dtype)
        return numerics.row_delta(
            *(ops.cast(tensor, dtype) for tensor in (out, grad_out, grad_lse))
        )

    def rows(self, partial: Partial, grads: Partial, dtype: str) -> Rows:
        """Make the rows of a backward.

        Args:
            partial: over all keys of the sequence.
            grads: the gradients of both.
            dtype: the accumulation dtype.
        """
        return Rows(
            partial.out,
            ops.cast(partial.lse, dtype),
            self.row_delta(partial.out, grads.out, grads.lse),
            grads.out,
        )

    def add(self, total: Tensor, share: Tensor) -> Tensor:
        """The sum of two tensors; `total` may be overwritten."""
        return total + share


class FallbackKernel(Kernel):
    """A kernel that computes what `fits` and leaves the rest to another.

    A subclass says what fits, and computes that.

    Args:
        fallback: the kernel for everything else.
    """

    def __init__(self, fallback: Kernel):
        self.fallback = fallback

    @abc.abstractmethod
    def fits(
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool: ...

    @abc.abstractmethod
    def compute(
        self, inputs: Inputs, visit: Visit, carry: Partial | None
    ) -> Partial:
        """`forward` of what fits."""

    @abc.abstractmethod
    def compute_gradients(
        self, inputs: Inputs, rows: Rows, visit: Visit, carry: Tensor | None
    ) -> Gradients:
        """`backward` of what fits."""

    def forward(
        self, inputs: Inputs, visit: Visit, carry: Partial | None
    ) -> Partial:
        if self.fits(inputs, visit):
            return self.compute(inputs, visit, carry)
        return self.fallback.forward(inputs, visit, carry)

    def backward(
        self, inputs: Inputs, rows: Rows, visit: Visit, carry: Tensor | None
    ) -> Gradients:
        if self.fits(inputs, visit, rows):
            return self.compute_gradients(inputs, rows, visit, carry)
        return self.fallback.backward(inputs, rows, visit, carry)

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        return self.fallback.branch(predicate, yes, no)


def merged(carry: Partial | None, part: Partial) -> Partial:
    """Merge a partial result over one block into those before; what a kernel
    returns that computes each block by itself."""
    return part if carry is None else numerics.merge(carry, part)


def summed(carry: Tensor | None, grads: Gradients) -> Gradients:
    """Add the gradient of the queries over the blocks before."""
    if carry is None:
        return grads
    return grads._replace(query=carry + grads.query)


def nothing(query: Tensor, value: Tensor) -> Partial:
    """The partial result over no keys at all: `out` 0 and `lse` `-inf`."""
    dtype = precision.accumulation_dtype(query.dtype)
    rows = tuple(sizes(query)[:3])
    return Partial(
        ops.zeros((*rows, sizes(value)[3]), dtype=dtype),
        ops.full(rows, -float("inf"), dtype=dtype),
    )


def no_gradients(
    carry: Tensor | None, inputs: Inputs, scoring: Scoring
) -> Gradients:
    """`Kernel.backward` of a block in which no pair counts."""
    query, key, value = inputs
    dtype = precision.accumulation_dtype(query.dtype)

    def zeros(shape: Any) -> Tensor:
        return ops.zeros(tuple(shape), dtype=dtype)

    bias = slopes = None
    if scoring.bias is not None:
        bias = zeros((*sizes(scoring.bias)[:3], sizes(key)[2]))
    if scoring.slopes is not None:
        slopes = zeros(sizes(scoring.slopes))
    if carry is None:
        carry = zeros(sizes(query))
    grad_key, grad_value = (zeros(sizes(t)) for t in (key, value))
    return Gradients(carry, grad_key, grad_value, bias, slopes)
