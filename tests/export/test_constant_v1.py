"""Constants in the place of experts, read as the pull request's documentation says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from edited_models import FRESH, edited
from families import logits_of, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_lab.export.constant_v1 import export
from moe_lab.export.given import Given
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError

KEPT = {1: (0, 2, 3, 7), 2: (1, 3, 5, 6), 3: (7, 5, 4, 2)}  # two in each group of deepseek_v3


def planned(folder: Path, family: str, replacement: str) -> tuple[Given, Any]:
    """A model in `folder` with a plan beside it, and what the plan makes of it."""
    model = tiny_model(family)
    model.save_pretrained(folder / "dense")
    layers = {one.info.index: one.info for one in moe_layers(model)}
    generator = torch.Generator().manual_seed(0)
    constants = {
        f"layers.{index}.constants": torch.randn(8 - len(kept), 32, generator=generator)
        for index, kept in KEPT.items()
        if replacement == "constant"
    }
    plan = Plan(
        tuple(
            PruneExperts(index, layers[index].name, kept=kept, replacement=replacement)
            for index, kept in KEPT.items()
        ),
        tensors=constants,
    )
    (folder / "plan.json").write_text(plan.to_text())
    plan.write_tensors(folder / "plan.json")
    apply_plan(model, plan)
    plan_file = folder / "plan.json"
    return Given(str(plan_file), plan_file=plan_file, model=str(folder / "dense")), model


def as_the_engine_reads_it(folder: Path, place: Path) -> Any:
    """The family's stock model with retained experts by their numbers, and constants beside them.

    A substituted expert is one of zeros, and its constant times its router weight is added.
    """
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("compression_config")["transform_config"]["expert_substitution"]
    assert said["version"] == 1 and list(said["router_semantics"].values()) == [True, True, False]
    tensors = load_file(folder / "model.safetensors")
    constants: dict[int, dict[int, Tensor]] = {}
    for path, target in said["targets"].items():
        assert (target["num_logical_experts"], target["weight_layout"]) == (
            8, "compact_retained_experts",
        )  # fmt: skip
        some = next(int(key.split(".")[len(path.split("."))]) for key in tensors
                    if key.startswith(f"{path}."))  # fmt: skip
        like = {key: t for key, t in tensors.items() if key.startswith(f"{path}.{some}.")}
        of_layer = constants.setdefault(int(path.split(".")[2]), {})
        for number, one in target["replacements"].items():
            assert one["format"] == "constant-v1"
            of_layer[int(number)] = tensors.pop(one["tensors"]["value"])
            for key, tensor in like.items():
                name = key.replace(f"{path}.{some}.", f"{path}.{number}.")
                assert name not in tensors
                tensors[name] = torch.zeros_like(tensor)
    place.mkdir()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(place)
    for layer in moe_layers(model):
        if layer.info.index in constants:
            layer.experts.register_forward_hook(adding(constants[layer.info.index]))
    return model


def adding(constants: dict[int, Tensor]) -> Any:
    def hook(module: object, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        _, index_TK, weight_TK = given
        for number, value in constants.items():
            weight_T1 = (weight_TK * (index_TK == number)).sum(dim=-1, keepdim=True)
            out = out + weight_T1 * value
        return out

    return hook


@pytest.mark.parametrize("replacement", ["constant", "zero"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "glm4_moe"])
def test_the_engine_computes_what_the_plan_does(
    family: str, replacement: str, tmp_path: Path
) -> None:
    given, expected = planned(tmp_path, family, replacement)
    (told,) = export(given, tmp_path / "out")
    assert told.startswith("12 experts of 3 layers are constants; ")
    read = as_the_engine_reads_it(tmp_path / "out", tmp_path / "read")
    assert torch.allclose(logits_of(read), logits_of(expected), atol=1e-5)


def test_a_checkpoint_gives_what_its_plan_gives(tmp_path: Path) -> None:
    edits = [{"index": i, "edit": "prune", "kept": kept, "replacement": "zero"}
             for i, kept in KEPT.items()]  # fmt: skip
    assert not edited("qwen3_moe", edits, tmp_path / "own")
    folder = tmp_path / "own" / "model"
    (folder / "tokenizer_config.json").write_text("{}")
    export(Given(str(folder), checkpoint_folder=folder), tmp_path / "out")
    read = as_the_engine_reads_it(tmp_path / "out", tmp_path / "read")
    assert torch.allclose(logits_of(read), logits_of(Checkpoint(folder).load()), atol=1e-5)
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_stock_transformers_refuses_it(tmp_path: Path) -> None:
    """It finds fewer experts than the config says."""
    given, model = planned(tmp_path, "mixtral", "constant")
    export(given, tmp_path / "model")
    batch = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2, dtype=int)}
    save_file(batch | {"logits": logits_of(model)}, tmp_path / "expected.safetensors")
    (said,) = fresh.result(FRESH, "stock", tmp_path).values()
    assert str(said).startswith("refused: ")


@pytest.mark.parametrize(
    ("family", "edits", "message"),
    [
        ("mixtral", [(i, "prune", {"kept": (0, 1, 2)}) for i in range(4)],
         "no layer of .* has stand-ins for removed experts"),
        ("mixtral", [(1, "prune", {"kept": (0, 1), "replacement": "copy"})],
         r'it takes layers with all router rows .*: layer 1 is \{"num_exp'),
        ("mixtral", [(1, "prune", {"kept": (0, 1), "replacement": "zero"}),
                     (2, "prune", {"kept": (0, 1)})], r'layer 2 is \{"num_experts": 2\}'),
        ("qwen3_moe", [(1, "merge", {"kept": (0, 1), "router": "all",
                                     "groups": ((0, 2, 3), (1, 4, 5, 6, 7)),
                                     "weights": ((1, 1, 1), (1, 1, 1, 1, 1))})],
         r'layer 1 is \{"num_experts": 2, "rows": 8\}'),
        ("glm4_moe", [(1, "prune", {"kept": (0, 1), "replacement": "zero"}),
                      (2, "drop_layer", {})], r'layer 2 is \{"width": 0\}'),
        ("gpt_oss", [(1, "prune", {"kept": (0, 1), "replacement": "zero"})],
         "this family's files have all experts in one tensor"),
    ],
)  # fmt: skip
def test_what_it_cannot_say_is_refused(
    family: str, edits: list[tuple[int, str, dict]], message: str, tmp_path: Path
) -> None:
    edited(family, [{"index": i, "edit": kind} | more for i, kind, more in edits], tmp_path / "one")
    folder = tmp_path / "one" / "model"
    with pytest.raises(UserError, match=message):
        export(Given(str(folder), checkpoint_folder=folder), tmp_path / "out")
