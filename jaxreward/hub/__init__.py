"""Layer 4: Hugging Face folders in and out."""
