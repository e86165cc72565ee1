"""Layer 2, host only: records, chat templates, tokens and batches as NumPy arrays."""
