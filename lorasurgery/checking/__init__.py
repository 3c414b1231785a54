"""What a program will make of an adapter file: the rules of every loader as data, and the one engine that applies them."""
