"""A head that is the embedding, written as a tensor of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edited_models import in_fresh_process, moe_indices, prune
from families import FAMILIES, tiny_batch, tiny_model
from llama_cpp import in_llama_cpp
from safetensors.torch import load_file, save_file

from moe_lab.measure.speed import active_parameters, parameters
from moe_lab.models.checkpoint import Checkpoint, load, resolve
from moe_lab.models.edits.plan import Plan, apply_plan, read_edit
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.forms import Form
from moe_lab.models.head import check_head, sized_with_head
from moe_lab.models.layers import moe_layers, num_parameters
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError

KEPT = [0, 1, 4, 5]
SPARSE = {"qwen2_moe": {"mlp_only_layers": []}}  # no layer dense, as llama.cpp has them


def tied_prune(family: str, folder: Path, how: str, **changes: object) -> Form:
    """Half the experts of a tiny model with a tied head removed, and what it computed."""
    changes = SPARSE.get(family, {}) | {"tie_word_embeddings": True} | changes
    model, batch = tiny_model(family, **changes), tiny_batch()
    model.save_pretrained(folder / "source")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    edits = [prune(i, KEPT) | {"name": name} for i, name in names.items()]
    apply_plan(model, Plan(tuple(map(read_edit, edits))))
    with torch.no_grad():
        logits = model(**batch).logits
    form = save_checkpoint(model, folder / "model", folder / "source", lm_head=how)
    save_file(batch | {"logits": logits}, folder / "expected.safetensors")
    return form


def told(folder: Path) -> tuple[bool, bool]:
    """Whether a checkpoint's config ties the head, and whether its files have one."""
    values = json.loads((folder / "model" / "config.json").read_text())
    return values["tie_word_embeddings"], "lm_head.weight" in load_file(
        folder / "model" / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("family", "how", "tied"),
    [
        ("qwen2_moe", "auto", False),
        ("qwen2_moe", "tied", True),
        ("olmoe", "auto", False),
        ("qwen3_moe", "auto", True),
        ("qwen3_moe", "untied", False),
    ],
)
def test_a_tied_head_gets_a_tensor_where_it_is_wanted(
    family: str, how: str, tied: bool, tmp_path: Path
) -> None:
    form = tied_prune(family, tmp_path / "x", how)
    assert told(tmp_path / "x") == (tied, not tied)
    assert bool(form.head) != tied
    assert in_fresh_process("stock", [tmp_path / "x"])["x"] < 1e-5
    if not tied:
        tensors = load_file(tmp_path / "x" / "model" / "model.safetensors")
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
        assert "which no number of parameters counts" in form.to_json()["head"]


def test_what_no_converter_reads_keeps_its_head(tmp_path: Path) -> None:
    """Dense layers, which llama.cpp's qwen2moe has not, and moe_lab's own form."""
    assert not tied_prune("qwen2_moe", tmp_path / "dense", "auto", mlp_only_layers=[0]).head
    model = tiny_model("qwen2_moe", mlp_only_layers=[], tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    name = moe_layers(model)[0].info.name
    apply_plan(model, Plan((read_edit(prune(0, KEPT) | {"name": name}),)))
    form = save_checkpoint(model, tmp_path / "own", tmp_path / "source")
    assert not form.stock and not form.head


def test_an_untied_checkpoint_is_saved_again_as_it_is(tmp_path: Path) -> None:
    tied_prune("qwen2_moe", tmp_path / "x", "auto")
    again = save_checkpoint(
        load(tmp_path / "x" / "model"), tmp_path / "y", tmp_path / "x" / "model"
    )
    assert not again.head
    one, other = (
        load_file(f / "model.safetensors") for f in (tmp_path / "x/model", tmp_path / "y")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_head_takes_the_dtype_of_the_embedding(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", mlp_only_layers=[], tie_word_embeddings=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    save_checkpoint(load(tmp_path / "source", dtype="float32"), tmp_path / "x", tmp_path / "source")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_sizes_of_a_plan_count_the_head_that_will_be_written(tmp_path: Path) -> None:
    tied_prune("qwen2_moe", tmp_path / "x", "auto")
    source, made = Checkpoint(tmp_path / "x" / "source"), Checkpoint(tmp_path / "x" / "model")
    layers = source.layers()
    sized = sized_with_head(source, layers, "auto")
    gone = len(layers) * (8 - len(KEPT)) * layers[0].expert_bytes
    headers = abs(sized[0].model_bytes - gone - made.layers()[0].model_bytes)
    assert headers < 8192 < 4 * 96 * 32  # what the head takes
    assert sized_with_head(source, layers, "tied") == layers


def test_a_head_that_is_written_twice_is_counted_once(tmp_path: Path) -> None:
    """And one that was trained, twice: it is no copy any more."""
    for how in ("auto", "tied"):
        tied_prune("qwen2_moe", tmp_path / how, how)
    auto, tied = (load(tmp_path / how / "model") for how in ("auto", "tied"))
    assert num_parameters(auto) == num_parameters(tied) + 96 * 32
    assert parameters(auto) == parameters(tied) == num_parameters(tied)
    assert active_parameters(auto) == active_parameters(tied)
    with torch.no_grad():
        auto.lm_head.weight[5, 7] += 1
    assert parameters(auto) == num_parameters(auto)


def test_a_head_of_its_own_cannot_be_tied() -> None:
    with pytest.raises(UserError, match=r"method.lm_head=tied.*qwen2_moe has a head of its own"):
        check_head(tiny_model("qwen2_moe").config, "tied")
    check_head(tiny_model("qwen2_moe", tie_word_embeddings=True).config, "tied")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_a_head_that_was_untied(family: str, tmp_path: Path) -> None:
    tied_prune(family, tmp_path / family, "untied")
    assert told(tmp_path / family) == (False, True)
    assert load(tmp_path / family / "model").lm_head.weight.shape == (96, 32)
    assert len(moe_indices(family))


def test_llama_cpp_decodes_a_tied_qwen2_moe_that_was_pruned(tmp_path: Path) -> None:
    """The shipped model, half its experts removed; without the head it would be refused."""
    source = resolve("shipped:tiny_qwen2_moe", dtype="float32")
    model, layers = source.load(), source.layers()
    apply_plan(model, Plan(tuple(PruneExperts(i.index, i.name, kept=range(15)) for i in layers)))
    prompt = source.tokenizer()("def square(number):\n    return", return_tensors="pt")
    number = 24
    with torch.no_grad():
        made = model.generate(
            **prompt, do_sample=False, max_new_tokens=number, min_new_tokens=number
        )
    length = prompt["input_ids"].shape[1]
    save_checkpoint(model, tmp_path / "tied", source.path, lm_head="tied")
    save_checkpoint(model, tmp_path / "auto", source.path)
    ids = prompt["input_ids"][0].tolist()
    assert "'output.weight' not found" in in_llama_cpp(tmp_path / "tied", ids, number)
    assert in_llama_cpp(tmp_path / "auto", ids, number) == made[0, length:].tolist()
