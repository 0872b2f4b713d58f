"""Quantizers: how the matrices of a checkpoint are stored in few bits."""
