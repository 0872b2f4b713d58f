"""`--to constant-v1`: removed experts as constants, as vLLM's open pull request 50415 reads them.

"Expert substitution", version 1: config.json, which is the family's otherwise, says under
compression_config.transform_config.expert_substitution which experts of which block return a vector
times their router weight, and in which tensor it lies. The experts that are left keep the numbers
that the router knows them by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from moe_lab.export.folder import stored_tensors, write_folder
from moe_lab.export.given import Given
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import layer_index, moe_layers
from moe_lab.models.own_config import is_own_form, read_config, without_structures
from moe_lab.models.reading_back import NotReadBack
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stored import Stored, stored_in
from moe_lab.models.weight_files import weight_files
from moe_lab.types import UserError

ENDING = "-constant-v1"
OPTIONS = ()
TAKES = "checkpoints and plans with method.replacement=constant or zero"
PLACES, CONSTANTS = "place_E", "constants"
SEMANTICS = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


def export(given: Given, out: Path) -> list[str]:
    """Write a checkpoint with constant stand-ins, or what a plan with them makes of its model."""
    with _with_stand_ins(given) as folder:
        blocks = _blocks(folder)
        write_folder(out, _tensors(folder, blocks), _config(folder, blocks), folder)
        _compare(folder, blocks, out)
    number = sum(len(block.places) - block.num_experts for block in blocks)
    return [
        f"{number} experts of {len(blocks)} layers are constants; read by vLLM with its pull "
        "request 50415 alone, whose format may still change (expert_substitution, version 1)",
    ]


@contextmanager
def _with_stand_ins(given: Given) -> Iterator[Path]:
    """A checkpoint in our own form, in which every layer can be said."""
    if given.checkpoint_folder is not None:
        folder = given.checkpoint().path
        _check(folder)
        yield folder
        return
    dense, plan = given.dense(), given.plan()
    with TemporaryDirectory(prefix="moe_lab_constant_") as place:
        model = dense.load()
        apply_plan(model, plan)
        save_checkpoint(model, Path(place), dense.path)
        _check(Path(place))
        yield Path(place)


def _check(folder: Path) -> None:
    """Refuse a checkpoint of which a layer has something else than stand-ins that are constants."""
    values = read_config(folder / "config.json")
    if not is_own_form(values):
        raise UserError(
            f"--to constant-v1: no layer of {folder} has stand-ins for removed experts: it is in "
            "its family's own form, which engines read as it is"
        )
    config = without_structures(Checkpoint(folder).config)
    whole = {str(one.info.index): one.info.num_experts for one in moe_layers(meta_model(config))}
    for index, layer in values["moe_lab"]["layers"].items():
        rows, stand_in = layer.get("rows"), layer.get("stand_in")
        untouched = layer == {"num_experts": whole[index]}
        constant = rows == whole[index] and stand_in in ("constant", "zero")
        if not untouched and not (constant and len(layer) == 3):
            raise UserError(
                f"--to constant-v1: it takes layers with all router rows whose removed experts are "
                f"constants or zeros (method.replacement=constant), and layers as the family has "
                f"them: layer {index} is {json.dumps(layer)}"
            )


@dataclass(frozen=True)
class Block:
    """An experts module of our own form with stand-ins, in its files.

    path: its place there; places: for each router row the number of its expert, or `num_experts`
    and more for a stand-in; zero: whether the stand-ins are zeros.
    """

    path: str
    places: tuple[int, ...]
    num_experts: int
    zero: bool

    def said(self, one: Stored) -> dict[str, Tensor]:
        """A tensor of the module by its names in the exported files."""
        number, _, rest = one.key.removeprefix(f"{self.path}.").partition(".")
        if number == PLACES:
            return {}
        if number == CONSTANTS:
            first = self.num_experts
            return {self.name(first + r): value.clone() for r, value in enumerate(one.load())}
        if not number.isdigit():
            raise UserError(
                f"--to constant-v1: it names tensors by the expert's number, and this family's "
                f"files have all experts in one tensor ({one.key})"
            )
        return {f"{self.path}.{self.places.index(int(number))}.{rest}": one.load()}

    def name(self, place: int) -> str:
        """What the tensor of the stand-in at a place is called."""
        block = self.path.rpartition(".")[0]
        return f"{block}.expert_replacements.{self.places.index(place)}.value"

    def target(self) -> dict[str, Any]:
        """What config.json says of it."""
        gone = range(self.num_experts, len(self.places))
        return {
            "num_logical_experts": len(self.places),
            "weight_layout": "compact_retained_experts",
            "replacements": {
                str(self.places.index(place)): {
                    "format": "constant-v1",
                    "tensors": {"value": self.name(place)},
                }
                for place in sorted(gone, key=self.places.index)
            },
        }


def _blocks(folder: Path) -> list[Block]:
    layers, found = read_config(folder / "config.json")["moe_lab"]["layers"], []
    for key, one in stored_tensors(folder).items():
        if key.endswith(f".{PLACES}"):
            path = key.removesuffix(f".{PLACES}")
            layer = layers[str(layer_index(path))]
            places, zero = tuple(one.load().tolist()), layer["stand_in"] == "zero"
            found.append(Block(path, places, layer["num_experts"], zero))
    return found


def _tensors(folder: Path, blocks: list[Block]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The name of each weight file, and what it has of the exported tensors."""
    config = Checkpoint(folder).config.get_text_config()
    for file in weight_files(folder):
        tensors: dict[str, Tensor] = {}
        for one in stored_in(file):
            block = next((b for b in blocks if one.key.startswith(f"{b.path}.")), None)
            tensors |= block.said(one) if block else {one.key: one.load()}
            if block and block.zero and one.key.endswith(f".{PLACES}"):
                for place in range(block.num_experts, len(block.places)):
                    zeros = torch.zeros(config.hidden_size, dtype=config.dtype)
                    tensors[block.name(place)] = zeros
        yield file.name, tensors


def _config(folder: Path, blocks: list[Block]) -> dict[str, Any]:
    """The family's config.json, and what the constants are in it."""
    values = read_config(folder / "config.json")
    del values["moe_lab"]
    substitution = {
        "version": 1,
        "router_semantics": SEMANTICS,
        "targets": {block.path: block.target() for block in blocks},
    }
    return values | {
        "compression_config": {
            "producer": {"name": "moe_lab"},
            "transform_config": {"expert_substitution": substitution},
        }
    }


def _compare(folder: Path, blocks: list[Block], out: Path) -> None:
    """Read what was written, and ask of each router row whether it leads to what it led to."""
    was, now = stored_tensors(folder), stored_tensors(out)
    config = read_config(out / "config.json")["compression_config"]["transform_config"]
    for block in blocks:
        said = config["expert_substitution"]["targets"][block.path]["replacements"]
        constants = was.pop(f"{block.path}.{CONSTANTS}", None)
        del was[f"{block.path}.{PLACES}"]
        for row, place in enumerate(block.places):
            if str(row) in said:
                value = now.pop(said[str(row)]["tensors"]["value"]).load()
                rank = place - block.num_experts
                expected = constants.load()[rank] if constants else torch.zeros_like(value)
                _require(rank >= 0 and torch.equal(value, expected), block.path, out)
                continue
            ours, theirs = f"{block.path}.{place}.", f"{block.path}.{row}."
            parts = [key for key in was if key.startswith(ours)]
            _require(bool(parts), block.path, out)
            for key in parts:
                other = now.pop(theirs + key.removeprefix(ours), None)
                same = other is not None and torch.equal(was.pop(key).load(), other.load())
                _require(same, key, out)
    _require(was.keys() == now.keys(), str(sorted(was.keys() ^ now.keys())[:3]), out)
    for key, one in was.items():
        _require(torch.equal(one.load(), now[key].load()), key, out)


def _require(same: bool, what: str, out: Path) -> None:
    if not same:
        raise NotReadBack(f"{out} does not say what it was made from: {what}. Please report this")
