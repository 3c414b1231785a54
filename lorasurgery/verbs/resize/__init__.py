"""Plans for other ranks."""
