"""Layer 0: arrays and trees. No models, no input or output."""
