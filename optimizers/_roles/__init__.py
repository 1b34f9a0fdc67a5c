"""Which parameter of a model gets which rule, and why."""
