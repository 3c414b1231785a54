"""Files: headers, lazy tensors, atomic streaming writes, hashes."""
