"""How FRUGAL splits a gradient: by coordinates, by a subspace, or by blocks in turn."""
