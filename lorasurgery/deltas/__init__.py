"""The kinds of change an adapter makes to a weight, one file each, with the same functions in each."""
