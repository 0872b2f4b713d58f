"""Small evaluations: so many items, and of two groups of documents a task for each."""

from __future__ import annotations

from moe_lab.evaluate.suite import Suite

NUM_ITEMS = 32  # of each tiny task

SUITE = Suite(num_items=2, num_fewshot=0, group_task=["tiny_{group}", "tiny_perplexity_{group}"])
GROUPS = ("arithmetic", "prose")
