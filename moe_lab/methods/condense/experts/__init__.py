"""Ways to choose the routed experts of a condensed layer: condense.experts=<file>."""
