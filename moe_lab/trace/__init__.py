"""Traces: which experts each token of each forward pass was sent to, while a model generates."""
