"""Layer 2: pure losses. Arrays in, unreduced float32 arrays out."""
