"""Drop-in ``torch.optim`` classes for matrix-aware and memory-lean methods."""
