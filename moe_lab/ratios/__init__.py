"""Pruning ratios: how many experts stay, per layer."""
