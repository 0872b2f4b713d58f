"""Checkpoints and plans in the words of serving engines: `python -m moe_lab.export`."""
