"""What several commands do to an adapter, a module or a model."""
