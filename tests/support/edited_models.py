"""Tiny models that were edited: in memory, on disk, and read by a fresh process."""

from __future__ import annotations

from pathlib import Path

import fresh
import torch
from families import tiny_batch, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.edits.plan import Plan, apply_plan, read_edit
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.weight_files import size_in_bytes, weight_files


def saved_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of a checkpoint's tensors, by the tensors themselves, and of its files."""
    tensors = 0
    for file in weight_files(folder):
        with safe_open(file, "pt") as handle:
            for name in list(handle.keys()):
                tensor = handle.get_tensor(name)
                tensors += tensor.numel() * tensor.element_size()
    return tensors, size_in_bytes(folder)


def pruned_logits(family: str, kept: dict[int, tuple[int, ...]], batch: dict) -> torch.Tensor:
    """Of a model that is really pruned, in double precision at the valid positions."""
    model = tiny_model(family)
    names = {one.info.index: one.info.name for one in moe_layers(model)}
    apply_plan(model, Plan(tuple(PruneExperts(i, names[i], kept=some) for i, some in kept.items())))
    with torch.no_grad():
        logits = model(**batch).logits.double()
    return logits[batch["attention_mask"].bool()]


# Loads each folder and compares its logits with those of the model before it was saved.
FRESH = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
if sys.argv[1] == "ours":
    import moe_lab
assert ("moe_lab" in sys.modules) == (sys.argv[1] == "ours")
found = {}
for folder in sys.argv[2:]:
    want = load_file(folder + "/expected.safetensors")
    try:
        read = AutoModelForCausalLM.from_pretrained
        model, info = read(folder + "/model", output_loading_info=True)
        with torch.no_grad():
            got = model(input_ids=want["input_ids"], attention_mask=want["attention_mask"]).logits
        clean = not info["missing_keys"] and not info["unexpected_keys"]
        found[folder] = float((got - want["logits"]).abs().max()) if clean else str(info)
    except (RuntimeError, ValueError) as error:
        found[folder] = "refused: " + str(error)[:200]
print("RESULT" + json.dumps(found))
"""


def in_fresh_process(which: str, folders: list[Path]) -> dict[str, object]:
    """Difference of logits per folder name, or a text where it did not load."""
    values = fresh.result(FRESH, which, *folders)
    return {Path(folder).name: value for folder, value in values.items()}


def edited(
    family: str,
    edits: list[dict],
    folder: Path,
    padding: float = 1.0,
    convert: str | None = None,
    **changes: object,
) -> bool:
    """Save a tiny model with the edits applied, and what it computed; True where it is stock."""
    folder.mkdir()
    model, batch = tiny_model(family, **changes), tiny_batch()
    model.save_pretrained(folder / "source")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    named = ({"name": names[edit["index"]]} | edit for edit in edits)
    apply_plan(model, Plan(tuple(map(read_edit, named))))
    with torch.no_grad():
        logits = model(**batch).logits
    stock = save_checkpoint(
        model, folder / "model", folder / "source", padding, convert=convert
    ).stock
    save_file(batch | {"logits": logits}, folder / "expected.safetensors")
    return stock


def prune(index: int, kept: list[int]) -> dict:
    return {"index": index, "edit": "prune", "kept": tuple(kept)}


def condense(index: int, experts: list[int]) -> dict:
    gates = tuple(0.3 + 0.1 * i for i in range(len(experts)))
    return {"index": index, "edit": "condense", "experts": tuple(experts), "gates": gates,
            "shared_gate": 0.4}  # fmt: skip


def moe_indices(family: str) -> list[int]:
    return [layer.info.index for layer in moe_layers(tiny_model(family))]


def drop(kind: str, index: int) -> dict:
    return {"index": index, "edit": kind}


def applied(family: str, edits: list[dict]) -> torch.nn.Module:
    model = tiny_model(family)
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    named = ({"name": names[edit["index"]]} | edit for edit in edits)
    apply_plan(model, Plan(tuple(map(read_edit, named))))
    return model


@torch.no_grad()
def make_identical(experts: nn.Module, groups: tuple[tuple[int, ...], ...]) -> None:
    """Make the experts of each group compute the same, with their hidden units shuffled."""
    units, generator = HiddenUnits(experts), torch.Generator().manual_seed(0)
    for first, *others in groups:
        for other in others:
            order = torch.randperm(16, generator=generator)
            copy = units.expert(first, order)
            for name, tensor in units.tensors.items():
                tensor[other] = copy[name]


def assert_written_as_in_memory(source: Checkpoint, plan: Plan, folder: Path) -> None:
    """Every tensor of a written checkpoint is that of the plan carried out on the whole model."""
    edited = source.load()
    apply_plan(edited, plan)
    ours, theirs = load(folder).state_dict(), edited.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
