"""Which modules are meant: blocks, lists of blocks, parts of an adapter."""
