"""What several methods share: moments, projectors, factorizations, row rules."""
