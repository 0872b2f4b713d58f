"""Constant gates in place of a router: one file each, with a function `choose`."""
