"""Layer 2: models as free functions over nested dicts of arrays."""
