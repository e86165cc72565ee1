"""Layer 4: evaluators. Each yields (name, value) pairs."""
