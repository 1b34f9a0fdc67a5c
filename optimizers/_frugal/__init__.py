"""FRUGAL's splits of a gradient: by coordinates, by a subspace, or by a schedule of blocks."""
