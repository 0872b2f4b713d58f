"""Importance metrics: a file each, one score for each expert of a layer."""
