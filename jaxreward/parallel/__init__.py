"""Layer 1: the mesh, logical axes, and the spec tree from which parameters are made."""
