"""Offloading, simulated: which experts a device would have to fetch, and how long it would wait."""
