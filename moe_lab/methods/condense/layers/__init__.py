"""Ways to choose the layers to condense: condense.layers=<file>."""
