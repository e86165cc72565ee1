"""Layer 4: a workdir's metrics and evaluations as one self-contained page."""
