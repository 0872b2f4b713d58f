"""Checkpoints in moe_lab's own form, and what moe_lab.load makes of them; run by moe_lab's Python.

    python plugins/vllm/tests/make_cases.py FOLDER [NAME...]

NAME: how the names of the wanted cases begin; all without. Each case is a folder
FOLDER/<family>-<structure> with the checkpoint `model`, and beside it `reference.safetensors`:
three prompts, the next-token log-probabilities along 16 greedy tokens each, and these tokens. The
tests of the plugin read nothing else.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from families import tiny_model  # noqa: E402

import moe_lab  # noqa: E402
from moe_lab.models.editing import constants_name  # noqa: E402
from moe_lab.models.edits.plan import Plan, apply_plan, read_edit  # noqa: E402
from moe_lab.models.layers import moe_layers  # noqa: E402
from moe_lab.models.saving import save_checkpoint  # noqa: E402
from moe_lab.types import LayerInfo  # noqa: E402

FAMILIES = "qwen2_moe qwen3_moe mixtral olmoe deepseek_v2 deepseek_v3 glm4_moe".split()
PROMPTS = ([5, 17, 60, 33, 9], [80, 3, 44, 44, 12, 71, 30, 8, 95, 21, 4], [50, 51, 52])
TOKENS = 16
# Sizes that vLLM's attention for CPUs takes, and two heads to be shared out.
SIZES = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
# Those of the real models: the only ones that vLLM has latent attention for CPUs for.
LATENT = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32)
CHANGES: dict[str, dict] = {
    "qwen3_moe": dict(head_dim=32),
    "glm4_moe": dict(head_dim=32, use_qk_norm=True),
    "deepseek_v2": LATENT,
    # What stock vLLM asks of a config; that of real checkpoints has it.
    "deepseek_v3": LATENT | dict(scoring_func="sigmoid", topk_method="noaux_tc"),
}

Layers = Sequence[LayerInfo]


def counts(layers: Layers) -> Plan:
    """Unequal numbers of experts; within the two router groups of deepseek_v3 the same."""
    kept = ([0, 1, 2, 4, 5, 6], [6, 1, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 5, 7])
    return _plan(layers, [dict(edit="prune", kept=tuple(some)) for some in kept])


def dense(layers: Layers) -> Plan:
    """Dense layers of different widths, and one whose block is gone."""
    edits = [
        dict(edit="condense", experts=(5, 2, 6), gates=(0.3, 0.4, 0.5), shared_gate=0.4),
        dict(edit="drop_layer"),
        dict(edit="condense", experts=(1,), gates=(0.6,), shared_gate=0.7),
    ]
    return _plan(layers, edits)


def stand_ins(layers: Layers) -> Plan:
    """Kept router rows: constants, copies, zeros."""
    kept = dict(constant=(6, 1, 3, 4), copy=(0, 2, 5, 7, 1), zero=(3, 2, 0))
    edits = [dict(edit="prune", kept=some, replacement=kind) for kind, some in kept.items()]
    removed = layers[0].num_experts - len(kept["constant"])
    generator = torch.Generator().manual_seed(1)
    constants = torch.randn(removed, layers[0].hidden_size, generator=generator)
    return replace(_plan(layers, edits), tensors={constants_name(layers[0].index): constants})


def shared_rows(layers: Layers) -> Plan:
    """Several rows that lead to one merged expert, within deepseek_v3's two router groups."""
    groups = ((0, 1, 2), (3,), (5, 4), (7, 6))
    weights = tuple((1 / len(group),) * len(group) for group in groups)
    kept = tuple(group[0] for group in groups)
    edit = dict(edit="merge", kept=kept, groups=groups, weights=weights, router="all")
    return _plan(layers, [edit] * len(layers))


def _plan(layers: Layers, edits: Sequence[dict]) -> Plan:
    placed = zip(layers, edits, strict=False)
    return Plan(tuple(read_edit({"index": i.index, "name": i.name} | edit) for i, edit in placed))


STRUCTURES: dict[str, Callable[[Layers], Plan]] = {
    "counts": counts,
    "dense": dense,
    "stand_ins": stand_ins,
    "shared_rows": shared_rows,
    "narrow": counts,
}

# What no edit of moe_lab's makes, or not in this size, of the first layers: `cut`.
CUTS: dict[str, Sequence[dict[str, int]]] = {
    "narrow": ({"expert_width": 12}, {"top_k": 1}, {"expert_width": 8, "top_k": 1}),
    "dense": ({"width": 31},),
}
MATRICES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def make(family: str, structure: str, folder: Path) -> None:
    """One case, from a tiny model with random weights."""
    folder.mkdir(parents=True)
    model = tiny_model(family, **(SIZES | CHANGES.get(family, {})))
    with torch.no_grad():
        for parameter in model.parameters():  # log-probabilities of a size that rounding leaves
            parameter.mul_(0.6 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder / "source")
    save_case(model, structure, folder, folder / "source")


def make_shipped(folder: Path) -> None:
    """The shipped qwen2_moe, with its tokenizer and its tied head."""
    folder.mkdir(parents=True)
    source = ROOT / "moe_lab" / "checkpoints" / "tiny_qwen2_moe"
    save_case(moe_lab.load(source, dtype="float32"), "stand_ins", folder, source)


def save_case(model: PreTrainedModel, structure: str, folder: Path, source: Path) -> None:
    """Edit a model, save it, and write what moe_lab.load makes of it."""
    layers = [layer.info for layer in moe_layers(model)]
    before = along_greedy(model)
    apply_plan(model, STRUCTURES[structure](layers))
    form = save_checkpoint(model, folder / "model", source, padding=0.0)
    assert not form.stock, form.reason
    if structure in CUTS:
        cut(folder / "model", CUTS[structure])
    reference = along_greedy(moe_lab.load(folder / "model", dtype="float32"))
    differs = max(float((reference[name] - before[name]).abs().max()) for name in reference)
    assert differs > 0.1, f"{folder.name}: the edits change too little to be tested by"
    save_file(reference, folder / "reference.safetensors")


@torch.no_grad()
def along_greedy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model makes of the prompts."""
    tensors: dict[str, torch.Tensor] = {}
    for number, prompt in enumerate(PROMPTS):
        ids, rows = torch.tensor([prompt]), []
        for _ in range(TOKENS):
            rows.append(model(input_ids=ids).logits[0, -1].log_softmax(-1))
            ids = torch.cat([ids, rows[-1].argmax().view(1, 1)], dim=1)
        tensors |= {
            f"prompt.{number}": torch.tensor(prompt),
            f"tokens.{number}": ids[0, len(prompt) :].contiguous(),
            f"logprobs.{number}": torch.stack(rows),
        }
    return tensors


def cut(folder: Path, changes: Sequence[dict[str, int]]) -> None:
    """Cut the first layers' MLPs by hand, or have fewer experts chosen, as docs/form.md has it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    layers = config["moe_lab"]["layers"]
    for index, change in zip(sorted(layers), changes, strict=False):
        layers[index] |= change
    path.write_text(json.dumps(config, indent=2))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        found = re.search(r"layers\.(\d+)\.\w+\.(experts\.\d+\.)?(\w+)\.weight$", name)
        if found is None or found[3] not in MATRICES or found[1] not in layers:
            continue
        width = layers[found[1]].get("expert_width" if found[2] else "width", None)
        if width is not None:
            down = found[3] in ("down_proj", "w2")
            tensors[name] = (tensor[:, :width] if down else tensor[:width]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main(target: Path, asked: Sequence[str]) -> None:
    """Make the cases whose names begin with one of `asked`, or all."""
    cases = {
        f"{family}-{structure}": partial(make, family, structure)
        for family in FAMILIES
        for structure in STRUCTURES
    }
    for name, make_it in {**cases, "shipped": make_shipped}.items():
        if not asked or name.startswith(tuple(asked)):
            make_it(target / name)
            print(name, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
