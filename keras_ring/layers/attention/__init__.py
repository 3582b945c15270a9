"""Parts of `RingAttention`: its options, checks, masks and projections."""
