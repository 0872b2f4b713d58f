"""Checkpoints: written, read back in a fresh process by stock transformers, refused when broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_batch, tiny_model
from safetensors.torch import load_file, save_file

from moe_lab.models.checkpoint import load, resolve
from moe_lab.models.editing import apply_plan
from moe_lab.models.forms import form_of
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import Edit, Plan, UserError

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
    except RuntimeError as error:
        found[folder] = "refused: " + str(error)[:200]
print("RESULT" + json.dumps(found))
"""


def in_fresh_process(which: str, folders: list[Path]) -> dict[str, object]:
    """Difference of logits per folder name, or a text where it did not load."""
    arguments = [sys.executable, "-c", FRESH, which, *map(str, folders)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    values = json.loads(done.stdout.split("RESULT")[1])
    return {Path(folder).name: value for folder, value in values.items()}


def edited(
    family: str, edits: list[dict], folder: Path, padding: float = 1.0, **changes: object
) -> bool:
    """Save a tiny model with the edits applied, and what it computed; True where it is stock."""
    folder.mkdir()
    model, batch = tiny_model(family, **changes), tiny_batch()
    model.save_pretrained(folder / "source")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    apply_plan(model, Plan(tuple(Edit(name=names[edit["index"]], **edit) for edit in edits)))
    with torch.no_grad():
        logits = model(**batch).logits
    stock = save_checkpoint(model, folder / "model", folder / "source", padding).stock
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


def test_uniformly_pruned_models_are_stock_in_every_family(tmp_path: Path) -> None:
    folders = []
    for family in FAMILIES:
        edits = [prune(index, [7, 0, 1, 3, 4, 6]) for index in moe_indices(family)]
        if family == "deepseek_v3":  # two groups of three
            edits = [prune(index, [0, 1, 3, 4, 6, 7]) for index in moe_indices(family)]
        folders.append(tmp_path / family)
        assert edited(family, edits, folders[-1]), family
    assert in_fresh_process("stock", folders) == dict.fromkeys(FAMILIES, 0.0)
    values = json.loads((tmp_path / "qwen3_moe" / "model" / "config.json").read_text())
    assert values["num_experts"] == values["num_local_experts"] == 6


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_experts_are_written_one_by_one_as_engines_want_them(family: str, tmp_path: Path) -> None:
    edited(family, [prune(i, [0, 1, 4, 5]) for i in moe_indices(family)], tmp_path / "x")
    names = load_file(tmp_path / "x" / "model" / "model.safetensors")
    assert any(".experts.3." in name for name in names)
    assert not any("gate_up_proj" in name for name in names)


def test_condensed_models_are_stock_where_the_family_can_say_it(tmp_path: Path) -> None:
    stock = {
        "qwen2_moe": [condense(1, [5, 2, 6]), condense(3, [0])],
        "qwen3_moe": [condense(0, [1, 2]), condense(2, [7])],
        "deepseek_v2": [condense(1, [3])],
        "deepseek_v3": [condense(1, [3]), condense(2, [1, 2])],
        "glm4_moe": [condense(1, []), condense(2, [4, 5])],
    }
    for family, edits in stock.items():
        assert edited(family, edits, tmp_path / family), family
    folders = [tmp_path / family for family in stock]
    assert in_fresh_process("stock", folders) == dict.fromkeys(stock, 0.0)


def test_what_a_family_cannot_say_is_loaded_by_us_and_refused_loudly_by_stock(
    tmp_path: Path,
) -> None:
    cases = {
        "different_counts": ("qwen2_moe", [prune(1, [0, 1, 2, 3]), prune(2, [1, 2, 3, 4, 5])]),
        "no_dense_layers": ("mixtral", [condense(1, [0, 4])]),
        "not_a_prefix": ("deepseek_v3", [condense(2, [0, 4])]),
        "both": ("olmoe", [condense(0, [3]), prune(2, [0, 1, 2, 7])]),
        "gpt_oss": ("gpt_oss", [prune(0, [0, 1, 2, 7])]),
    }
    for name, (family, edits) in cases.items():
        assert not edited(family, edits, tmp_path / name), name
    folders = [tmp_path / name for name in cases]
    assert in_fresh_process("ours", folders) == dict.fromkeys(cases, 0.0)
    refused = in_fresh_process("stock", folders)
    assert all(value != 0.0 for value in refused.values()), refused
    for name in cases:
        batch = load_file(tmp_path / name / "expected.safetensors")
        with torch.no_grad():
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            logits = load(tmp_path / name / "model")(**inputs).logits
        assert torch.equal(logits, batch["logits"])


def closed_form(dense_width: int, widths: list[int], padded: bool) -> int:
    """Parameters of the tiny qwen2_moe, layer 0 dense, layers 1, 2, … condensed to `widths`."""
    hidden, layers, vocabulary, experts = 32, 4, 96, 8
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * hidden // 2 + hidden // 2)
    moe = experts * 3 * hidden * 16 + experts * hidden + 3 * hidden * 24 + hidden
    dense = [dense_width, *([max(dense_width, *widths)] * len(widths) if padded else widths)]
    if padded:
        dense[0] = max(dense)
    rest = layers * (attention + 2 * hidden) + hidden + 2 * vocabulary * hidden
    return rest + 3 * hidden * sum(dense) + (layers - len(dense)) * moe


@pytest.mark.parametrize("experts", [[], [5, 2, 6]], ids=["S", "SR"])
@pytest.mark.parametrize("padding", [None, 1.0])
def test_condensed_layers_keep_their_exact_size_unless_padding_may_be_added(
    experts: list[int], padding: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="moe_lab.models.saving")
    edits = [condense(1, experts), condense(2, experts)]
    folder = tmp_path / "x"
    assert edited("qwen2_moe", edits, folder, padding, intermediate_size=400) == (padding == 1.0)
    model, expected = load(folder / "model"), load_file(folder / "expected.safetensors")
    width = 24 + 16 * len(experts)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number == closed_form(400, [width, width], padded=padding == 1.0)
    assert in_fresh_process("stock" if padding else "ours", [folder]) == {"x": 0.0}
    with torch.no_grad():
        inputs = {key: expected[key] for key in ("input_ids", "attention_mask")}
        assert torch.equal(model(**inputs).logits, expected["logits"])
    [line] = caplog.messages
    assert f"dense layers {width} and 400 wide, padded with zeros to 400" in line
    assert "method.padding=0" in line
    # What is written again from there, as after fine-tuning, keeps its form.
    assert save_checkpoint(model, tmp_path / "again", folder / "model").stock == (padding == 1.0)
    again = load(tmp_path / "again")
    assert sum(parameter.numel() for parameter in again.parameters()) == number


def test_a_checkpoint_remembers_how_much_padding_was_allowed(tmp_path: Path) -> None:
    edits = [condense(1, [5, 2, 6]), condense(2, [5, 2])]  # zeros of 16 units: 2 % of this model
    assert not edited("qwen3_moe", edits, tmp_path / "none", padding=0.0)
    assert edited("qwen3_moe", edits, tmp_path / "some", padding=0.05)
    source = tmp_path / "none" / "model"
    assert not save_checkpoint(load(source), tmp_path / "again", source).stock
    assert save_checkpoint(load(source), tmp_path / "native", source, padding=0.05).stock


def test_the_form_is_known_without_weights(tmp_path: Path) -> None:
    cases = {
        "qwen2_moe": [condense(1, [5, 2, 6]), condense(3, [0])],
        "mixtral": [condense(1, [0, 4])],
        "deepseek_v3": [condense(2, [0, 4])],
        "deepseek_v2": [{"index": 2, "edit": "drop_layer"}, condense(1, [1])],
        "olmoe": [prune(1, [0, 1, 2]), prune(2, [1, 2, 3])],
        "glm4_moe": [{"index": 2, "edit": "drop_block"}],
    }
    for family, edits in cases.items():
        for padding in (0.0, 1.0):
            folder = tmp_path / f"{family}{padding}"
            stock = edited(family, edits, folder, padding)
            names = {one.info.index: one.info.name for one in moe_layers(tiny_model(family))}
            plan = [Edit(name=names[edit["index"]], **edit) for edit in edits]
            form = form_of(resolve(folder / "source").config, plan, padding)
            assert form.stock == stock, form.reason
            assert form.config.num_hidden_layers == load(folder / "model").config.num_hidden_layers


def test_a_compressed_model_is_compressed_again(tmp_path: Path) -> None:
    edited("qwen2_moe", [condense(2, [1, 2]), prune(1, [0, 1, 2, 3])], tmp_path / "first")
    source = tmp_path / "first" / "model"
    model, batch = load(source), tiny_batch()
    assert [layer.info.num_experts for layer in moe_layers(model)] == [4, 8]
    apply_plan(model, Plan((Edit(3, "model.layers.3.mlp", "prune", kept=(7, 6, 5, 4)),)))
    with torch.no_grad():
        logits = model(**batch).logits
    assert save_checkpoint(
        model, tmp_path / "second", source
    ).stock  # uniform again: stock once more
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "second")(**batch).logits, logits)


def test_generating_with_the_cache_equals_without(tmp_path: Path) -> None:
    edited("qwen2_moe", [condense(1, [5, 2]), condense(3, [])], tmp_path / "x")
    model = load(tmp_path / "x" / "model")
    prompt = tiny_batch(padding=False, batch=1)
    outputs = [
        model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*outputs)


def test_untouched_tensors_keep_every_bit(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    before = load_file(tmp_path / "source" / "model.safetensors")
    model = load(tmp_path / "source", dtype="float32")
    apply_plan(model, Plan((Edit(2, "model.layers.2.mlp", "prune", kept=(0, 1, 2, 4, 5, 6)),)))
    save_checkpoint(model, tmp_path / "out", tmp_path / "source")
    after = load_file(tmp_path / "out" / "model.safetensors")
    untouched = [name for name in after if ".layers.2.mlp" not in name]
    assert untouched
    for name in untouched:
        assert torch.equal(after[name].to(before[name].dtype), before[name]), name


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder here nor a hub id"):
        resolve(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config.json is missing"):
        resolve(tmp_path / "empty")
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks 1 of {len(shards)} weight files"):
        resolve(tmp_path / "sharded")
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "weights.bin")
    with pytest.raises(UserError, match="convert it to safetensors"):
        resolve(tmp_path / "pickled")


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors"):
        load(tmp_path / "x")


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert resolve(tmp_path / "a").fingerprint == resolve(tmp_path / "b").fingerprint
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "c")
    assert resolve(tmp_path / "c").fingerprint != resolve(tmp_path / "a").fingerprint
