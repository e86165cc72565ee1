"""Layer 3: the process of masked diffusion, without a model."""
