"""What a header says beside the tensors: hashes, and what programs load by."""
