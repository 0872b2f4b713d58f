"""Importance metrics: a score per routed expert [E] from one layer's statistics; higher stays.

A metric is a function of `LayerStatistics`, named as in its paper. One file, one yaml.
"""
