"""Layer 3: loops around models that produce answers."""
