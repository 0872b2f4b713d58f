"""Checkpoints in few bits: written as the stage writes them, and what each kind of reader makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import fresh
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.matrices import matrices_of
from moe_lab.models.packed_writing import Lost, WrittenForm, write_packed
from moe_lab.quantize.base import QuantizeJob, Quantizer

# Loads folders as a plain user does, and writes all tensors that each model has behind a forward.
PLAIN = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
if sys.argv[1] == "ours":
    import moe_lab
assert ("moe_lab" in sys.modules) == (sys.argv[1] == "ours")
found = {}
for folder in sys.argv[2:]:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        with torch.no_grad():
            model(input_ids=torch.arange(3, 9)[None])
        tensors = {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}
        save_file(tensors, folder + ".read")
        found[folder] = "read"
    except (RuntimeError, ValueError, KeyError) as error:
        found[folder] = "refused: " + str(error)[:300]
print("RESULT" + json.dumps(found))
"""


def quantised(source: Path, quantizer: Quantizer, out: Path) -> tuple[WrittenForm, Lost]:
    """Write a checkpoint's matrices in few bits into a folder, which must be in one of its own."""
    checkpoint = Checkpoint(source)
    matrices = matrices_of(checkpoint)
    chosen = quantizer.chosen(matrices)
    quantizer.check(chosen)
    job = QuantizeJob(checkpoint, matrices, chosen, out.parent)
    at_work = quantizer.begin(job)
    form = quantizer.form(job, at_work)
    return form, write_packed(checkpoint, matrices, chosen, form, at_work.layer, out)


def meant(source: Path, quantizer: Quantizer, folder: Path) -> dict[str, Tensor]:
    """What parameters are to be: matrices quantised by themselves, read as plain ones."""
    checkpoint = Checkpoint(source)
    matrices = matrices_of(checkpoint)
    chosen = matrices.chosen(quantizer.what)
    job = QuantizeJob(checkpoint, matrices, chosen, folder)
    at_work = quantizer.begin(job)
    form, instead = quantizer.form(job, at_work), dict[str, Tensor]()
    for layer, these in matrices.by_layer().items():
        picked = [one for one in these if one in chosen]
        for matrix, one in at_work.layer(layer, picked):
            read = form.meant(one)
            instead[matrix.key] = read if matrix.axis == -1 else read.mT.contiguous()
    return by_layer(LayerwiseModel(checkpoint, instead=instead))


def by_layer(model: LayerwiseModel) -> dict[str, Tensor]:
    """All parameters of a model that is read a decoder layer at a time."""
    found = {n: p.detach() for n, p in model.model.named_parameters() if not p.is_meta}
    for index in range(len(model.layers)):
        with model.layer(index) as decoder:
            prefix = f"{model.path}.{index}."
            found |= {prefix + n: p.detach().clone() for n, p in decoder.named_parameters()}
    return found


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All parameters, as `moe_lab.load` reads them."""
    return {name: one.detach() for name, one in load(folder).named_parameters()}


def read_plainly(which: str, folders: list[Path]) -> dict[str, dict[str, Tensor] | str]:
    """By folder's name, what `from_pretrained` reads in a fresh process, or how it refuses.

    which: "stock" without moe_lab, "ours" behind `import moe_lab`.
    """
    told = fresh.result(PLAIN, which, *folders)
    return {
        f"{folder.parent.name}": load_file(f"{folder}.read")
        if told[str(folder)] == "read"
        else told[str(folder)]
        for folder in folders
    }


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether all tensors of the first are in the other, bit for bit."""
    return bool(one) and all(name in other and torch.equal(one[name], other[name]) for name in one)
