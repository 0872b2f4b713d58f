"""config.json of our own form: refused by others, read and written by us in both versions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from edited_models import condense, edited, in_fresh_process, prune
from families import logits_of
from stand_ins import saved
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from moe_lab.models.checkpoint import Checkpoint, load, resolve
from moe_lab.models.folder import copy_beside
from moe_lab.models.own_config import family_values, own_values
from moe_lab.types import UserError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "form.md"


def test_values_survive_being_wrapped() -> None:
    values = {"model_type": "x", "dtype": "float32", "moe_lab": {"version": 2, "layers": {"1": {}}}}
    whole = own_values(values)
    assert whole["model_type"] == "moe_lab" and whole["architectures"] == ["MoeLabForCausalLM"]
    assert whole["moe_lab"]["config"] == {"model_type": "x", "dtype": "float32"}
    assert family_values(whole) == values
    plain = {"model_type": "x"}
    assert family_values(plain) == plain


def test_auto_classes_read_the_familys_config_and_model(tmp_path: Path) -> None:
    assert not edited("mixtral", [condense(1, [0, 4])], tmp_path / "x")
    folder = tmp_path / "x" / "model"
    config = AutoConfig.from_pretrained(folder, num_experts_per_tok=1)
    assert type(config) is MixtralConfig and config.num_experts_per_tok == 1
    assert set(config.moe_lab["layers"]) == {"0", "1", "2", "3"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert torch.equal(logits_of(model), logits_of(load(folder)))
    as_object = MixtralConfig.from_dict(model.config.to_dict())
    assert as_object.moe_lab == model.config.moe_lab


def test_the_page_for_other_readers_names_all_that_is_written(tmp_path: Path) -> None:
    saved("qwen2_moe", tmp_path / "x")
    edited("gpt_oss", [condense(0, [3]) | {"shared_gate": 1.0}], tmp_path / "y")
    edited("mixtral", [condense(0, [3])], tmp_path / "z")
    words, page = set[str](), PAGE.read_text()
    for name in "xyz":
        values = json.loads((tmp_path / name / "model" / "config.json").read_text())
        words |= values.keys() | values["moe_lab"].keys()
        for layer in values["moe_lab"]["layers"].values():
            words |= layer.keys()
    assert {"rows", "stand_in", "width", "in_place", "num_routed"} <= words
    assert [
        word for word in sorted(words) if f"`{word}`" not in page and f'"{word}"' not in page
    ] == []
    example = json.loads(page.split("```json\n")[1].split("```")[0])
    assert own_values(family_values(example)) == example


def test_a_familys_own_class_refuses_it_in_words(tmp_path: Path) -> None:
    """Also where nobody asks for the model type: sizes may be those that the class has anyway."""
    assert not edited("qwen2_moe", [prune(1, [0, 1, 2, 3])], tmp_path / "x")
    folder = tmp_path / "x" / "model"
    for file in resolve("shipped:tiny_qwen2_moe").path.glob("token*"):
        copy_beside(file, file.parent, folder)
    code = (
        "import json, sys, transformers\n"
        "names = 'Qwen2MoeConfig Qwen2MoeForCausalLM MixtralConfig Llama4Config Gemma4Config'\n"
        "said = []\n"
        "for name in names.split():\n"
        "    try: getattr(transformers, name).from_pretrained(sys.argv[1])\n"
        "    except Exception as error: said.append(str(error))\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(json.dumps([said, tokenizer('def f(x)').input_ids]))\n"
    )
    arguments = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    said, ids = json.loads(done.stdout)
    assert len(said) == 5
    assert all("in moe_lab's own form: import moe_lab first" in one for one in said), said
    assert ids == resolve("shipped:tiny_qwen2_moe").tokenizer()("def f(x)").input_ids


def test_the_older_form_is_read_and_written_as_the_new_one(tmp_path: Path) -> None:
    """Version 1 was the family's config.json with one key more."""
    assert not edited("mixtral", [condense(1, [0, 4]), prune(2, [0, 1, 5])], tmp_path / "x")
    folder = tmp_path / "x" / "model"
    new = json.loads((folder / "config.json").read_text())
    own = new["moe_lab"]
    old = own.pop("config") | {"moe_lab": own | {"version": 1}}
    assert old["model_type"] == "mixtral" and old["architectures"] == ["MixtralForCausalLM"]
    (folder / "config.json").write_text(json.dumps(old))
    assert in_fresh_process("ours", [tmp_path / "x"]) == {"x": 0.0}
    model = load(folder)
    model.save_pretrained(tmp_path / "again")  # as a user's own script would
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert said["model_type"] == "moe_lab" and said["moe_lab"]["version"] == 2
    assert said["moe_lab"]["layers"] == own["layers"]
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(model))


def test_a_form_that_is_not_known_is_refused_in_words(tmp_path: Path) -> None:
    assert not edited("mixtral", [prune(2, [0, 1, 5])], tmp_path / "x")
    path = tmp_path / "x" / "model" / "config.json"
    values = json.loads(path.read_text())
    cases = {
        "version 5, and this version of moe_lab reads up to 4: update": {"version": 5},
        "no family's config stands in moe_lab.config": {"config": {}},
        "the family 'nobody', which this version": {"config": {"model_type": "nobody"}},
    }
    for words, wrong in cases.items():
        path.write_text(json.dumps(values | {"moe_lab": values["moe_lab"] | wrong}))
        with pytest.raises(UserError, match=words):
            _ = Checkpoint(path.parent).config
        with pytest.raises(UserError, match=words):
            load(path.parent)


def test_a_newer_version_is_written_only_where_it_is_needed() -> None:
    def version(**layer: object) -> int:
        values = {"model_type": "x", "moe_lab": {"layers": {"1": {"num_experts": 2} | layer}}}
        whole: dict = own_values(values)["moe_lab"]
        return int(whole["version"])

    assert version() == version(expert_width=3, top_k=1) == 2
    assert version(expert_widths=[2, 0]) == version(shared_width=3) == 3


@pytest.mark.parametrize("widths", [[2], [2, -1], [0, 0], [2, True], [2, "3"], 4])
def test_widths_that_are_none_are_refused(widths: object) -> None:
    layer = {"num_experts": 2, "expert_widths": widths}
    values = own_values({"model_type": "x", "moe_lab": {"layers": {"1": layer}}})
    with pytest.raises(ValueError, match=r"layers\.1\.expert_widths=.* is not possible"):
        family_values(values)
