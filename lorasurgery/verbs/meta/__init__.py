"""A file's metadata and hashes."""
