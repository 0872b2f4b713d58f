"""Pruning ratios: a file each, how many experts stay in each layer."""
