"""Two groups of documents, and a task for each."""

from __future__ import annotations

from moe_lab.evaluate.suite import Suite

SUITE = Suite(num_items=2, num_fewshot=0, group_task=["tiny_{group}", "tiny_perplexity_{group}"])
GROUPS = ("arithmetic", "prose")
