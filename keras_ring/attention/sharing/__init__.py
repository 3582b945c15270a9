"""Ways in which attention crosses the shards of a sequence.

A `Sharing` has the queries, keys and values of one device and the transport to
the others, and computes exact attention over all of them. `choose` picks one.
The ring is the first; others go beside it, one a file
(docs/adding-a-sharing.md).
"""

from keras_ring.attention.sharing.base import Sharing
from keras_ring.attention.sharing.choice import choose

__all__ = ["Sharing", "choose"]
