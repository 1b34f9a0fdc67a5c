"""Each method once more: one matrix, float64, plain loops, nothing shared with the package."""
