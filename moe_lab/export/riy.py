"""`--to riy`: the profile of vLLM's open pull request 37824 (RIY), which prunes while it loads.

The dense model is served with `--riy-expert-profile FILE`: its routers' logits get -inf for the
experts that are listed, whose weights are not loaded. Written is version 1, as its documentation
has it: {"version": 1, "model": name, "pruned_experts": [[decoder layer, expert], ...]}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from moe_lab.export.given import Given, pruned_by
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.types import LayerInfo, UserError

ENDING = ".riy.json"
OPTIONS = ()
TAKES = "plans of plain prunes: experts that go with their router rows"
# Added to the scores behind the logits, before experts are chosen.
_ADDED = re.compile(r"correction_bias|expert_bias|moe_statics")


def export(given: Given, out: Path) -> list[str]:
    """Write the profile of a plan, or of the plan that a checkpoint carries out."""
    kept = pruned_by(given, "riy")
    dense = given.dense()
    _check_biases(dense, kept)
    pruned = [
        [info.index, expert]
        for info, stay in kept.items()
        for expert in range(info.num_experts)
        if expert not in stay
    ]
    profile = {"version": 1, "model": dense.path.name, "pruned_experts": pruned}
    out.write_text(json.dumps(profile) + "\n")
    if read_profile(out, list(kept)) != {info.index: sorted(kept[info]) for info in kept}:
        raise RuntimeError(f"{out} does not say the plan: please report this")
    total = sum(info.num_experts for info in kept)
    return [
        f"{len(pruned)} of {total} experts of {dense.path} are pruned; serve that model with "
        "--riy-expert-profile (vLLM's pull request 37824, not in a release of vLLM)"
    ]


def read_profile(path: Path, layers: Sequence[LayerInfo]) -> dict[int, list[int]]:
    """For each of these layers the experts that a profile leaves."""
    values = json.loads(path.read_text())
    gone = {(layer, expert) for layer, expert in values["pruned_experts"]}
    return {
        info.index: [one for one in range(info.num_experts) if (info.index, one) not in gone]
        for info in layers
    }


def _check_biases(dense: Checkpoint, kept: dict[LayerInfo, tuple[int, ...]]) -> None:
    """Refuse where experts masked by their logits are chosen all the same.

    A score of 0 and a high bias behind it is chosen before a retained expert with a low one.
    """
    held = dense.held_by(meta_model(dense.config)).by_name
    for info, stay in kept.items():
        for name, parts in held.items():
            if not (name.startswith(f"{info.name}.") and _ADDED.search(name)):
                continue
            if not _never_chosen(parts[0].load().flatten().float(), stay, info):
                raise UserError(
                    f"--to riy: layer {info.index} adds a bias to its scores ({name}) behind the "
                    "logits that the engine masks, and that of an expert to be pruned is high "
                    "enough to be chosen all the same: serve the pruned checkpoint itself"
                )


def _never_chosen(bias_E: Tensor, kept: Sequence[int], info: LayerInfo) -> bool:
    """Whether enough of the kept experts come before all others, whatever their logits are."""
    gone = sorted(set(range(info.num_experts)) - set(kept))
    if not gone:
        return True
    enough = info.top_k if info.groups == 1 else len(kept)
    return bool(bias_E[list(kept)].sort(descending=True).values[enough - 1] >= bias_E[gone].max())
