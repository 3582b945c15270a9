"""Choice of the sharing for one call of attention."""

import math
from typing import Any, NamedTuple

from keras_ring.attention.kernel import Kernel
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.sharing import balance
from keras_ring.attention.sharing.all_gather import AllGather
from keras_ring.attention.sharing.all_to_all import AllToAll
from keras_ring.attention.sharing.base import Sharing
from keras_ring.attention.sharing.ring import Ring
from keras_ring.distribution import placement
from keras_ring.distribution.transport import LOCAL, Transport


class Heads(NamedTuple):
    """Numbers of heads of an attention.

    Attributes:
        query: of the queries.
        key: of keys and values; divides `query`.
    """

    query: int
    key: int


class Way(NamedTuple):
    """A way to share the attention of one sequence.

    Attributes:
        name: of `settings.WAYS`, but not "auto".
        inner: members that share the heads of a part of the sequence: all of
            them in "all_to_all", 1 where heads are not shared.
    """

    name: str
    inner: int = 1


def choose(
    transport: Transport,
    kernel: Kernel,
    scoring: Scoring,
    lengths: tuple[Any, Any],
    heads: Heads,
    balanced: placement.Choice,
    attention: str,
    heads_parallel: int | None,
) -> Sharing:
    """Pick the sharing for one call of attention.

    Args:
        transport: of the devices that hold the sequence.
        kernel: computes one K/V block.
        scoring: of the attention.
        lengths: of one shard of queries and of keys; no integer where one is
            not known.
        heads: of the whole attention.
        balanced: the user's word on balanced chunks, see `balance.pays`.
        attention, heads_parallel: see `choose_way`.

    Raises:
        ValueError: if these heads cannot be shared as asked for.
    """
    size, mask = transport.size, scoring.mask
    hops = size - 1
    if attention == "auto" and mask is not None:
        # To count them takes time that grows with the square of the ring.
        first, last = placement.hops(size, *lengths, mask.reach())
        hops = last - first
    way = choose_way(size, heads, hops, attention, heads_parallel)
    group: Transport
    ring: Transport
    if way.inner == 1:
        group, ring = LOCAL, transport
    elif way.inner == size:
        group, ring = transport, LOCAL
    else:
        group, ring = transport.split(way.inner)
    of_groups = (length * way.inner for length in lengths)
    pays = balance.pays(balanced, ring.size, mask, *of_groups)
    if way.name == "all_gather":
        return AllGather(transport, kernel, pays)
    between = Ring(ring, kernel, pays)
    if way.inner == 1:
        return between
    return AllToAll(group, kernel, heads, between)


def choose_way(
    size: int,
    heads: Heads,
    hops: int,
    name: str,
    asked: int | None = None,
) -> Way:
    """Pick the way to share a sequence.

    "auto" takes what moves the fewest bytes forward, of all-to-all, the mix
    with as many devices a group as the heads allow, and the ring, in this
    order where two move as many.

    Args:
        size: members that share the sequence.
        heads: of the attention.
        hops: that the ring would make.
        name: what the user asked for, of `settings.WAYS`.
        asked: members of a group of "mixed"; as many as the heads allow if
            None.

    Raises:
        ValueError: if these heads cannot be shared as asked for.
    """
    if size == 1 or name == "ring":
        return Way("ring")
    if name == "all_gather":
        return Way(name)
    if name == "all_to_all":
        if heads.query % size:
            raise ValueError(
                'attention="all_to_all" gives each of the devices that share '
                "a sequence as many heads. Received: "
                f"{_counted(heads.query, 'query head')} for "
                f"sequence_parallel={size}. {_instead(heads.query, size)}"
            )
        return Way(name, size)
    inner = asked or _largest(heads.query, size)
    if name == "mixed":
        if inner is None or heads.query % inner or size % inner:
            raise ValueError(
                'attention="mixed" shares the query heads among groups of '
                "`heads_parallel` devices, more than 1 and fewer than share "
                f"the sequence. Received: {_counted(heads.query, 'query head')}"
                f", sequence_parallel={size}, heads_parallel={asked}. "
                f"{_instead(heads.query, size)}"
            )
        return Way(name, inner)
    ways = [Way("all_to_all", size), Way("mixed", inner or 1), Way("ring")]
    if asked is not None:
        ways = ways[1:]
    possible = [
        way
        for way in ways
        if way.name == "ring"
        or (way.inner > 1 and heads.query % way.inner == 0)
    ]
    return min(possible, key=lambda way: moved(way, size, heads, hops))


def moved(way: Way, size: int, heads: Heads, hops: int) -> float:
    """Chunks of a head that a member sends in a forward.

    Args:
        way: how the sequence is shared.
        size: members that share it.
        heads: of the attention.
        hops: that the ring would make.
    """
    if way.name == "all_gather":
        return 2 * heads.key * (size - 1)
    if way.name == "ring":
        return 2 * heads.key * hops
    inner = way.inner
    keys = math.lcm(heads.key, inner)
    exchanged = 2 * (heads.query + keys) * (inner - 1) / inner
    return exchanged + 2 * keys * min(size // inner - 1, hops)


def _largest(heads: int, size: int) -> int | None:
    """The most members that groups can have, fewer than all; None for 1."""
    found = [
        inner
        for inner in range(2, size)
        if size % inner == 0 and heads % inner == 0
    ]
    return max(found, default=None)


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def _instead(heads: int, size: int) -> str:
    """Alternatives for heads that cannot be shared."""
    inner = _largest(heads, size)
    mixed = (
        ""
        if inner is None
        else f'attention="mixed" with heads_parallel={inner}, or '
    )
    return f'Use {mixed}attention="ring", which takes any number of heads.'
