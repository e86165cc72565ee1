"""Layer 5: one loop per kind of training. A recipe takes a config and a workdir."""
