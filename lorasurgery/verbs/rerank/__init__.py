"""Smaller ranks of DyLoRA and other LoRA files."""
