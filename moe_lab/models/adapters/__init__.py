"""Families that transformers reads but whose layers do not keep the common contract, a file each."""
