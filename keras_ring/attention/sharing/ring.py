"""Ring attention: the loop over visiting K/V blocks.

Ring Attention (Liu, Zaharia and Abbeel 2023, arXiv 2310.01889, section 3):
every member of the ring keeps its queries. Chunks of keys and values hop
from member to member, and each member adds attention over the chunk that
visits it to its partial result. The backward sends keys and values around
once more with the gradients that belong to them, and recomputes the
probabilities from the log-sum-exp of the forward.

The loop knows no framework: a transport moves the blocks, a kernel computes
one of them.
"""

import dataclasses
import itertools
from typing import Any

from keras import ops

from keras_ring import precision
from keras_ring.attention.kernel import (
    Gradients,
    Inputs,
    Rows,
    no_gradients,
    nothing,
)
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.sharing import balance
from keras_ring.attention.sharing.balance import Balanced
from keras_ring.attention.sharing.base import cast_each
from keras_ring.attention.visit import Visit
from keras_ring.distribution import placement
from keras_ring.distribution.placement import Portion, QueryBand
from keras_ring.masks import Carried
from keras_ring.shapes import sizes

Tensor = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Queries:
    """A band of this member's queries, with what belongs to them.

    Attributes:
        starts: global position of the first of each part, see `Visit`.
        query: (batch, heads, length, head_dim).
        carried: what the scoring has of these queries.
        rows: in the backward.
    """

    starts: tuple[Any, ...]
    query: Tensor
    carried: tuple[Tensor, ...]
    rows: Rows | None = None


@dataclasses.dataclass(frozen=True)
class Ring(Balanced):
    """Attention around one ring, forward and backward."""

    def enter(self, inputs: Inputs, scoring: Scoring) -> tuple[Inputs, Scoring]:
        if not self.balanced:
            return inputs, scoring
        carried = scoring.carried()
        tensors = [*inputs, *carried.query, *carried.key]
        axes = [2, 2, 2] + [1] * (len(tensors) - 3)
        moved = iter(balance.enter(self.transport, tensors, axes))
        inputs = Inputs(*itertools.islice(moved, 3))
        query = tuple(itertools.islice(moved, len(carried.query)))
        return inputs, scoring.replace(
            Carried(query, tuple(moved), carried.shared)
        )

    def leave(self, grads: list[Tensor], dtype: Any) -> list[Tensor]:
        return self.leave_rows(cast_each(grads, dtype))

    def forward(self, inputs: Inputs, scoring: Scoring) -> Partial:
        return _Loop(self, scoring).forward(inputs)

    def backward(
        self,
        inputs: Inputs,
        partial: Partial,
        grads: Partial,
        scoring: Scoring,
    ) -> Gradients:
        return _Loop(self, scoring).backward(inputs, partial, grads)


class _Loop:
    """One call of a ring: the loop, with the scoring of that call."""

    def __init__(self, ring: Ring, scoring: Scoring):
        self.transport, self.kernel = ring.transport, ring.kernel
        self.balanced, self.scoring = ring.balanced, scoring

    def forward(self, inputs: Inputs) -> Partial:
        """`Ring.forward` with the scoring."""
        query, key, value = inputs
        hops = self._hops(query, key)
        queries = self._queries(query)
        partials: list[Any] = []
        for portion in self._portions(key):
            self._forward(portion, hops, partials, queries, key, value)
        lses = [partial.lse for partial in partials]
        outs = [partial.out for partial in partials]
        partials.clear()
        return Partial(
            placement.joined(outs, 1, axis=2), placement.joined(lses, 1, axis=2)
        )

    def _forward(
        self,
        portion: Portion,
        hops: tuple[int, int],
        partials: list[Any],
        queries: list[Queries],
        key: Tensor,
        value: Tensor,
    ) -> None:
        """One portion of every member's keys, all around the ring.

        Args:
            portion: of the chunks of keys.
            hops: the first and the last.
            partials: of each band, over the portions before; empty at the
                first. This portion is added.
            queries: all bands.
            key, value: see `forward`.
        """
        first, last = hops
        length = sizes(key)[2]

        def step(
            own: Queries,
            starts: tuple[Any, ...],
            visiting: list[Tensor],
            partial: Partial | None,
        ) -> Partial:
            key, value, *tensors = visiting
            nonempty, visit = self._visit(own, starts, key, tensors)
            inputs = Inputs(own.query, key, value)
            found: Partial = self.kernel.branch(
                nonempty,
                lambda: self.kernel.forward(inputs, visit, partial),
                lambda: (
                    nothing(own.query, value) if partial is None else partial
                ),
            )
            return found

        def meet(hop: Any, visiting: Any, partials: list[Any]) -> None:
            starts = self._key_starts(hop, length, portion)
            # One after the other, so that what is old is there for one band.
            for i, own in enumerate(queries):
                partials[i] = step(own, starts, visiting, partials[i])

        def hop_body(hop: Any, carry: Any) -> Any:
            visiting, partials = carry
            arriving = self.transport.start_shift(visiting)
            meet(hop, visiting, partials)
            return arriving.wait(), partials

        visiting = self._first_visit(first, portion, key, value)
        if not partials:
            # A loop that is compiled carries tensors from the start.
            begin = first == last or self.transport.eager
            partials.extend(
                None if begin else nothing(own.query, value) for own in queries
            )
        visiting, partials[:] = self.transport.repeat(
            last - first, hop_body, (visiting, partials), first
        )
        meet(last, visiting, partials)

    def backward(
        self, inputs: Inputs, partial: Partial, grads: Partial
    ) -> Gradients:
        """`Ring.backward` with the scoring.

        The gradients of a chunk travel with it, one hop behind: what is
        sent at a hop is what was complete before its compute began, so that
        the transfer and the compute do not wait for each other.
        """
        query, key, value = inputs
        dtype = precision.accumulation_dtype(query.dtype)
        rows = self.kernel.rows(partial, grads, dtype)
        hops = self._hops(query, key)
        queries = self._queries(query, rows)
        staying: list[dict[str, Tensor]] = [{} for _ in queries]
        found = [
            self._backward(portion, hops, staying, queries, key, value)
            for portion in self._portions(key)
        ]
        grad_keys, grad_values = (
            list(side) for side in zip(*found, strict=True)
        )
        del found
        parts = self._parts()
        grad_key = placement.joined(grad_keys, parts, axis=2)
        grad_keys.clear()
        grad_value = placement.joined(grad_values, parts, axis=2)
        grad_values.clear()
        grad_bias = None
        if "bias" in staying[0]:
            grad_bias = placement.joined(
                [own.pop("bias") for own in staying], 1, axis=1
            )
        slopes: list[Tensor] = []
        for own in staying:
            if "slopes" in own:
                slopes = self._plus(slopes, [own.pop("slopes")])
        grad_query = placement.joined(
            [own.pop("query") for own in staying], 1, axis=2
        )
        return Gradients(
            grad_query,
            grad_key,
            grad_value,
            grad_bias,
            slopes[0] if slopes else None,
        )

    def _backward(
        self,
        portion: Portion,
        hops: tuple[int, int],
        staying: list[dict[str, Tensor]],
        queries: list[Queries],
        key: Tensor,
        value: Tensor,
    ) -> list[Tensor]:
        """One portion of every member's keys, all around the ring.

        Args:
            portion: of the chunks of keys.
            hops: the first and the last.
            staying: of each band, the gradients of what stays where it is,
                over the portions before; empty at the first. This portion is
                added.
            queries: all bands, with their rows.
            key, value: see `backward`.

        Returns:
            The gradients of the local keys and values in the portion.
        """
        first, last = hops
        length = sizes(key)[2]

        def step(
            own: Queries,
            starts: tuple[Any, ...],
            visiting: list[Tensor],
            grad_query: Tensor | None,
        ) -> Gradients:
            key, value, *tensors = visiting
            nonempty, visit = self._visit(own, starts, key, tensors)
            inputs, rows = Inputs(own.query, key, value), own.rows
            assert rows is not None
            found: Gradients = self.kernel.branch(
                nonempty,
                lambda: self.kernel.backward(inputs, rows, visit, grad_query),
                lambda: no_gradients(grad_query, inputs, visit.scoring),
            )
            return found

        def meet(
            hop: Any, visiting: list[Tensor], staying: list[dict[str, Tensor]]
        ) -> list[Tensor]:
            """Compute a ring step: what it adds to its keys and values."""
            starts = self._key_starts(hop, length, portion)
            grads: list[Tensor] = []
            # One after the other, so that what is old is there for one band.
            for i, own in enumerate(queries):
                share = step(own, starts, visiting, staying[i].get("query"))
                staying[i] = self._staying(starts, length, staying[i], share)
                grads = self._plus(grads, [share.key, share.value])
            return grads

        def add(
            hop: Any, visiting: Any, travelling: Any, staying: Any
        ) -> list[Tensor]:
            """Compute a ring step while `travelling` is under way."""
            grads = meet(hop, visiting, staying)
            return self._plus(travelling.wait(), grads)

        def hop_body(hop: Any, carry: Any) -> Any:
            visiting, grads, staying = carry
            arriving = self.transport.start_shift(visiting)
            travelling = self.transport.start_shift(grads)
            grads = add(hop, visiting, travelling, staying)
            return arriving.wait(), grads, staying

        visiting = self._first_visit(first, portion, key, value)
        home: list[Tensor] = []
        if first == 0 < last and self.transport.eager:
            # The local chunk is at home: its gradients wait for the others'.
            arriving = self.transport.start_shift(visiting)
            home = meet(first, visiting, staying)
            visiting, first = arriving.wait(), 1
        if first == last:
            grads = meet(first, visiting, staying)
        else:
            arriving = self.transport.start_shift(visiting)
            grads = meet(first, visiting, staying)
            visiting, grads, staying[:] = self.transport.repeat(
                last - first - 1,
                hop_body,
                (arriving.wait(), grads, staying),
                first=first + 1,
            )
            travelling = self.transport.start_shift(grads)
            grads = add(last, visiting, travelling, staying)
        # The chunk is `last` hops away from its owner: all of them at once.
        if last % self.transport.size:
            grads = self.transport.shift(grads, by=-last)
        return self._plus(grads, home) if home else grads

    def _staying(
        self,
        key_starts: tuple[Any, ...],
        length: Any,
        staying: dict[str, Tensor],
        share: Gradients,
    ) -> dict[str, Tensor]:
        """The gradients of what stays where it is, with those of a visit,
        which has its own columns of the bias; empty before the first.

        Args:
            key_starts: of the visit.
            length: of a chunk of keys.
            staying: so far.
            share: of the visit; the query's gradient is over all visits.
        """
        found = {"query": share.query}
        if share.slopes is not None:
            found["slopes"] = share.slopes
            if staying:
                found["slopes"] = self.kernel.add(
                    staying["slopes"], share.slopes
                )
        if share.bias is not None:
            # Padding of the keys may make their chunks reach past the bias.
            shape = *sizes(share.bias)[:3], length * self.transport.size
            found["bias"] = _with_columns(
                staying["bias"]
                if staying
                else ops.zeros(shape, dtype=share.bias.dtype),
                key_starts,
                share.bias,
            )
        return found

    def _plus(self, sums: list[Tensor], more: list[Tensor]) -> list[Tensor]:
        """Each of the sums with one more tensor; none is nothing so far. The
        old sums may be overwritten."""
        if not sums:
            return more
        pairs = zip(sums, more, strict=True)
        return [self.kernel.add(total, share) for total, share in pairs]

    def _queries(
        self, query: Tensor, rows: Rows | None = None
    ) -> list[Queries]:
        """This member's queries in bands as long as a portion: what a ring
        step adds to is then no longer than that, however long the chunk is.

        Args:
            query: of the chunk.
            rows: of its queries, in the backward.
        """
        carried = self.scoring.carried().query
        length = sizes(query)[2]
        starts = self._starts(self.transport.index(), length)
        return [
            Queries(
                band.starts(starts),
                band.of(query, axis=2),
                tuple(band.of(tensor, axis=1) for tensor in carried),
                None if rows is None else _in_band(rows, band),
            )
            for band in placement.bands(length, self._parts(), self._most())
        ]

    def _hops(self, query: Tensor, key: Tensor) -> tuple[int, int]:
        """The first and the last hop at which some member has work."""
        size, mask = self.transport.size, self.scoring.mask
        if mask is None or self.balanced:
            return 0, size - 1
        lengths = sizes(query)[2], sizes(key)[2]
        return placement.hops(size, *lengths, mask.reach())

    def _parts(self) -> int:
        """Of how many contiguous parts a chunk is."""
        return 2 if self.balanced else 1

    def _portions(self, key: Tensor) -> list[Portion]:
        """Cut the chunks of keys into the portions that go around the ring
        together."""
        length = sizes(key)[2]
        return placement.portions(length, self._parts(), self._most())

    def _most(self) -> int | None:
        """Positions that are computed together at most. A chunk that stays
        at home is not cut."""
        return self.transport.portion if self.transport.size > 1 else None

    def _first_visit(
        self, first: int, portion: Portion, key: Tensor, value: Tensor
    ) -> list[Tensor]:
        """The portion that visits first, with what travels with its keys."""
        visiting = [
            *(portion.of(tensor, axis=2) for tensor in (key, value)),
            *(portion.of(t, axis=1) for t in self.scoring.carried().key),
        ]
        return self.transport.shift(visiting, by=first) if first else visiting

    def _starts(self, index: Any, length: Any) -> tuple[Any, ...]:
        """First positions of a member, of each part of its chunk."""
        size = self.transport.size
        return placement.starts(index, length, size, self.balanced)

    def _key_starts(
        self, hop: Any, length: Any, portion: Portion
    ) -> tuple[Any, ...]:
        """First visiting positions, of each part of their chunk, which has a
        length."""
        index = self.transport.index()
        source = placement.source(index, hop, self.transport.size)
        starts = self._starts(source, length)
        return tuple(start + portion.begin for start in starts)

    def _visit(
        self,
        own: Queries,
        key_starts: tuple[Any, ...],
        key: Tensor,
        key_tensors: list[Tensor],
    ) -> tuple[Any, Visit]:
        """True if some pair of a ring step is allowed, and its visit."""
        lengths = sizes(own.query)[2], sizes(key)[2]
        carried = self.scoring.carried()._replace(
            query=own.carried, key=tuple(key_tensors)
        )
        visit = Visit(
            query_starts=own.starts,
            key_starts=key_starts,
            scoring=self.scoring.replace(carried),
        )
        nonempty, full = visit.relation(*lengths)
        if self.balanced and not isinstance(nonempty, bool):
            # As good as always: not worth a branch of the program.
            nonempty = True
        if full is True:
            # Known before anything runs: nothing is masked in this step.
            visit = dataclasses.replace(
                visit, scoring=dataclasses.replace(visit.scoring, mask=None)
            )
        return nonempty, visit


def _in_band(rows: Rows, band: QueryBand) -> Rows:
    """The rows of some of the queries; a kernel may have no delta."""
    return Rows(*(None if t is None else band.of(t, axis=2) for t in rows))


def _with_columns(
    bias: Tensor, starts: tuple[Any, ...], columns: Tensor
) -> Tensor:
    """The gradient of the bias with the columns of one visit, which begin
    at `starts`, as many at each."""
    parts = ops.split(columns, len(starts), axis=3)
    for start, part in zip(starts, parts, strict=True):
        zero = start * 0  # JAX wants all of them in one dtype.
        bias = ops.slice_update(bias, (zero, zero, zero, start), part)
    return bias
