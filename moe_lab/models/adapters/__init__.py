"""Families that transformers reads but that keep a contract of their own: a file each."""
