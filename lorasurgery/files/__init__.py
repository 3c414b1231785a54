"""Files in and out: the one road from keys to an adapter."""
