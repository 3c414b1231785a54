"""What can be done to an adapter; Adapter in, Adapter out."""
