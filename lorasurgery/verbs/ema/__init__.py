"""Post-hoc EMA of checkpoints."""
