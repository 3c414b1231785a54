"""Onto a model's weights: what a module does to a tensor."""
