"""Choice of the sharing for one call of attention."""

from typing import Any

from keras_ring.attention.kernel import Kernel
from keras_ring.attention.sharing import balance
from keras_ring.attention.sharing.base import Sharing
from keras_ring.attention.sharing.ring import Ring
from keras_ring.distribution.placement import Choice
from keras_ring.distribution.transport import Transport
from keras_ring.masks import Mask


def choose(
    transport: Transport,
    kernel: Kernel,
    mask: Mask | None,
    query_length: Any,
    key_length: Any,
    balanced: Choice,
) -> Sharing:
    """Pick the sharing for one call of attention.

    Args:
        transport: of the devices that hold the sequence.
        kernel: computes one K/V block.
        mask: of the attention.
        query_length: of one shard; no integer where it is not known.
        key_length: likewise.
        balanced: the strategy's word on balanced chunks, see `balance.pays`.
    """
    lengths = query_length, key_length
    pays = balance.pays(balanced, transport.size, mask, *lengths)
    return Ring(transport, kernel, balanced=pays)
