"""`--to vllm-ascend`: the experts of each layer in order, of vllm-ascend's pull request 12525.

A line for each MoE layer, {"<decoder layer>": [experts]}, those that stay first; the engine loads
as many of them as its option `expert_prune_ratio` leaves, the same number in each layer.
"""

from __future__ import annotations

import json
from pathlib import Path

from moe_lab.export.given import Given, pruned_by
from moe_lab.types import UserError

ENDING = ".experts.jsonl"
OPTIONS = ()
TAKES = "plans of plain prunes of qwen3_moe with one number of experts for all layers"


def export(given: Given, out: Path) -> list[str]:
    """Write the list of a plan, or of the plan that a checkpoint carries out."""
    kept = pruned_by(given, "vllm-ascend")
    families, numbers = {info.family for info in kept}, {len(stay) for stay in kept.values()}
    if families != {"qwen3_moe"}:
        raise UserError(
            f"--to vllm-ascend: the engine prunes qwen3_moe alone, and {given.dense().path} is "
            f"{', '.join(sorted(families))}"
        )
    if len(numbers) > 1:
        raise UserError(
            f"--to vllm-ascend: layers keep {' and '.join(map(str, sorted(numbers)))} experts, and "
            "the engine keeps one number in all of them (ratio=uniform)"
        )
    rows = [
        {str(info.index): [*stay, *(set(range(info.num_experts)) - set(stay))]}
        for info, stay in kept.items()
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (number,), num_experts = numbers, next(iter(kept)).num_experts
    # The engine keeps int(experts * (1 - ratio)): half an expert away from where that jumps.
    ratio = 1 - (number + 0.5) / num_experts if number < num_experts else 0.0
    options = json.dumps({"expert_list_file": out.name, "expert_prune_ratio": ratio})
    return [
        f"{number} of {num_experts} experts stay in each layer; serve {given.dense().path} with "
        f"--additional-config '{options}' (vllm-ascend's pull request 12525, not in a release)"
    ]
