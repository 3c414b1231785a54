"""Sums of changes in one module."""
