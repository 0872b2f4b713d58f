"""Families whose checkpoints transformers does not read, a file each, named as their model_type."""
