"""Training from which a critical batch size is measured: sweeps, and branches of a checkpoint."""
