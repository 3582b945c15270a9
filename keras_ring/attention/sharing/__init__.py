"""Ways in which attention crosses the shards of a sequence.

A `Sharing` has the queries, keys and values of one device and the transport to
the others, and computes exact attention over all of them. `choose` picks one.
They lie one in a file (docs/adding-a-sharing.md).
"""

from keras_ring.attention.sharing.base import Sharing
from keras_ring.attention.sharing.choice import Heads, choose, choose_way

__all__ = ["Heads", "Sharing", "choose", "choose_way"]
