"""Fewer experts per token: which of a token's experts stay, a file for each rule."""
