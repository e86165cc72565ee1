"""Layer 4: state, optimizer, step, checkpoints and the loop."""
