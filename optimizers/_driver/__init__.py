"""The driver: groups, views, units, buckets, finite flags, clocks, the write, checkpoints."""
