"""What changes have in common: products, norms, pairs of modules."""
