"""MTP layers of a written checkpoint: what they hold, and that the folder can be read."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import pytest
import torch
from families import logits_of, tiny_batch
from mtp_checkpoints import CHANGES, DECODERS, WITH_EXPERTS, stored, write_shards, write_with_mtp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.mtp_saving import MTP_COUNTS, Quantised, foresee_mtp
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


def pruned(source: Path, kept: dict[int, int] | int) -> nn.Module:
    """The model at `source`; each layer keeps so many experts of each of its router's groups."""
    model = load(source)
    apply_plan(model, Plan(prunes(source, kept)))
    return model


def prunes(source: Path, kept: dict[int, int] | int) -> tuple[PruneExperts, ...]:
    edits = []
    for info in Checkpoint(source).layers():
        number = kept if isinstance(kept, int) else kept.get(info.index, info.num_experts)
        size = info.num_experts // info.groups
        firsts = range(0, info.num_experts, size)
        some = tuple(first + i for first in firsts for i in range(number // info.groups))
        edits.append(PruneExperts(info.index, info.name, kept=some))
    return tuple(edits)


def longest(made: dict[str, Tensor], family: str, number: int) -> list[int]:
    """By hand: the experts with the longest router rows, half of them of each group of four."""
    rows = made[f"{DECODERS[family]}mlp.gate.weight"].double()
    length = (rows**2).sum(dim=1).sqrt().tolist()
    parts = [range(8)] if family != "deepseek_v3" else [range(4), range(4, 8)]
    best = [sorted(part, key=lambda e: -length[e])[: number // len(parts)] for part in parts]
    return sorted(expert for part in best for expert in part)


def expected(made: dict[str, Tensor], family: str, kept: list[int]) -> dict[str, Tensor]:
    """The MTP tensors with the kept experts alone, by hand."""
    path, result = f"{DECODERS[family]}mlp.", dict(made)
    for name in made:
        if name.startswith(f"{path}experts."):
            del result[name]
    for place, expert in enumerate(kept):
        for part in ("gate_proj", "up_proj", "down_proj"):
            tensor = made[f"{path}experts.{expert}.{part}.weight"]
            result[f"{path}experts.{place}.{part}.weight"] = tensor
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        if path + name in made:
            result[path + name] = made[path + name][kept]
    return result


def same(read: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Every tensor of `wanted`, and no other beside those of the model's own layers."""
    others = read.keys() - wanted.keys()
    assert not [name for name in others if "mtp." in name or ".layers.4." in name]
    for name, tensor in wanted.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
read = []
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(json.loads(sys.argv[1]))).logits
    assert not info["missing_keys"] and "moe_lab" not in sys.modules
    read.append([sorted(info["unexpected_keys"]), logits.tolist()])
print("RESULT" + json.dumps(read))
"""


def in_fresh_process(*folders: Path) -> list[tuple[list[str], Tensor]]:
    """What stock transformers does not take of each, and the logits of a batch."""
    ids = tiny_batch(padding=False)["input_ids"].tolist()
    read = fresh.result(FRESH, json.dumps(ids), *folders)
    return [(unexpected, torch.tensor(logits)) for unexpected, logits in read]


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}


def set_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def counts(folder: Path) -> dict[str, int]:
    values = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in values.items() if key in MTP_COUNTS}


@pytest.mark.parametrize("family", CHANGES)
def test_they_are_pruned_as_the_others_and_stock_transformers_loads_the_rest(
    family: str, tmp_path: Path
) -> None:
    made = write_with_mtp(family, tmp_path / "source", shards=family == "glm4_moe")
    model = pruned(tmp_path / "source", 4)
    form = save_checkpoint(model, tmp_path / "out", tmp_path / "source")
    assert form.stock
    kept = longest(made, family, 4) if family in WITH_EXPERTS else []
    same(stored(tmp_path / "out"), expected(made, family, kept) if kept else made)
    assert counts(tmp_path / "out") == counts(tmp_path / "source") != {}
    folders = tmp_path / "source", tmp_path / "out"
    [(before, _), (unexpected, logits)] = in_fresh_process(*folders)
    assert torch.equal(logits, logits_of(model, tiny_batch(padding=False)))
    # Those of the source that its patterns do not silence, without the experts that went.
    patterned = [name for name in before if not any(f".experts.{e}." in name for e in range(4, 8))]
    assert unexpected == patterned
    assert ("from 8 to 4" in form.to_json()["mtp"]) == bool(kept)

    again = save_checkpoint(load(tmp_path / "out"), tmp_path / "again", tmp_path / "out")
    assert (f"{len(made) - 3 * 4 * bool(kept)} tensors come along") in again.mtp
    first, second = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_transformers_drafts_with_what_is_left(family: str, tmp_path: Path) -> None:
    """The pruned MTP block is the whole one, whose router is not let choose the others."""
    made = write_with_mtp(family, tmp_path / "source")
    save_checkpoint(pruned(tmp_path / "source", 4), tmp_path / "out", tmp_path / "source")
    drafts = []
    for folder in (tmp_path / "source", tmp_path / "out"):
        main = AutoModelForCausalLM.from_pretrained(folder)
        main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\."]  # of the real size: 61
        drafts.append(MtpModel.from_pretrained(main).layers[0].mtp_block.mlp)
    whole, left = drafts
    gone = [expert for expert in range(8) if expert not in longest(made, family, 4)]
    x_BLD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        unmasked = whole(x_BLD)
        whole.gate.e_score_correction_bias[gone] = -torch.inf
        assert torch.allclose(left(x_BLD), whole(x_BLD), atol=1e-6)
    assert (unmasked - left(x_BLD)).abs().max() > 1e-2, "the mask decides something"
    ids = tiny_batch(padding=False, batch=1)["input_ids"]
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\."]
    plain = main.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(main.generate(ids, max_new_tokens=6, do_sample=False, use_mtp=True), plain)


def test_as_another_family_they_are_promised_as_before(tmp_path: Path) -> None:
    write_with_mtp("deepseek_v3", tmp_path / "source")
    model = load(tmp_path / "source")
    info = moe_layers(model)[-1].info
    edit = CondenseLayer(info.index, info.name, experts=(5, 2), gates=(0.7, 0.4))
    apply_plan(model, Plan((edit,)))
    form = save_checkpoint(
        model, tmp_path / "out", tmp_path / "source", padding=1.0, convert="superset"
    )
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert form.stock and values["model_type"] == "glm4_moe_lite"
    assert values["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("family", CHANGES)
def test_dropped_they_are_neither_there_nor_promised(family: str, tmp_path: Path) -> None:
    made = write_with_mtp(family, tmp_path / "source")
    form = save_checkpoint(
        pruned(tmp_path / "source", 4), tmp_path / "out", tmp_path / "source", mtp="drop"
    )
    assert form.mtp == f"MTP layers: {len(made)} tensors left out"
    assert not made.keys() & load_file(tmp_path / "out" / "model.safetensors").keys()
    assert set(counts(tmp_path / "out").values()) == {0}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not read[1]["unexpected_keys"]


def test_a_checkpoint_that_never_had_any_promises_none(tmp_path: Path) -> None:
    write_with_mtp("glm4_moe", tmp_path / "source")
    load(tmp_path / "source").save_pretrained(tmp_path / "without")  # as transformers writes it
    assert counts(tmp_path / "without") == {"num_nextn_predict_layers": 1}
    form = save_checkpoint(load(tmp_path / "without"), tmp_path / "out", tmp_path / "without")
    assert counts(tmp_path / "out") == {"num_nextn_predict_layers": 0} and form.mtp == ""
    assert "mtp" not in form.to_json()


def test_left_whole_beside_fewer_experts_is_refused_before_any_work(tmp_path: Path) -> None:
    write_with_mtp("glm4_moe", tmp_path / "source")
    source = Checkpoint(tmp_path / "source")
    alike, uneven = prunes(source.path, 4), prunes(source.path, {1: 4})
    with pytest.raises(UserError, match=r"method.mtp=keep.*8 experts.*have 4"):
        foresee_mtp(source, alike, "keep")
    foresee_mtp(source, alike, "prune")
    foresee_mtp(source, uneven, "keep")
    foresee_mtp(source, (), "keep")
    with pytest.raises(UserError, match=r"method.mtp=keep"):
        save_checkpoint(pruned(source.path, 4), tmp_path / "out", source.path, mtp="keep")


def test_beside_layers_of_different_sizes_they_stay_whole(tmp_path: Path) -> None:
    made = write_with_mtp("qwen3_next", tmp_path / "source", shards=True)
    model = pruned(tmp_path / "source", {1: 4, 2: 6})
    form = save_checkpoint(model, tmp_path / "out", tmp_path / "source")
    assert not form.stock and "with all 8 experts" in form.mtp
    same(stored(tmp_path / "out"), made)
    own = json.loads((tmp_path / "out" / "config.json").read_text())["moe_lab"]
    assert own["mtp_experts"] == {"mtp.layers.0.mlp": 8}
    read = load(tmp_path / "out")
    assert torch.equal(logits_of(read), logits_of(model))
    apply_plan(read, Plan(prunes(tmp_path / "out", 4)))  # then all are alike: a family's form again
    assert save_checkpoint(read, tmp_path / "again", tmp_path / "out").stock
    same(stored(tmp_path / "again"), expected(made, "qwen3_next", longest(made, "qwen3_next", 4)))


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next"])
def test_decoder_layers_in_front_go_and_their_numbers_follow(family: str, tmp_path: Path) -> None:
    changes = {"layer_types": ["full_attention"] * 4} if family == "qwen3_next" else {}
    made = write_with_mtp(family, tmp_path / "source", **changes)
    model = load(tmp_path / "source")
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    apply_plan(model, Plan((DropBlock(2, names[2]),)))
    form = save_checkpoint(model, tmp_path / "out", tmp_path / "source", mtp="keep")
    assert form.stock
    read = stored(tmp_path / "out")
    moved = {name.replace("model.layers.4.", "model.layers.3."): one for name, one in made.items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in moved.items())
    assert not [name for name in read if ".layers.4." in name]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(again), logits_of(model))


def test_every_bit_stays_whatever_the_type(tmp_path: Path) -> None:
    """As DeepSeek-V3 stores them: quantised in blocks, with factors of their own."""
    made = write_with_mtp("deepseek_v3", tmp_path / "source")
    source = tmp_path / "source" / "model.safetensors"
    own = {name: tensor for name, tensor in load_file(source).items() if name not in made}
    generator = torch.Generator().manual_seed(3)
    stored_as = {}
    for name, tensor in made.items():
        if ".experts." in name and "shared" not in name:
            stored_as[name] = tensor.to(torch.float8_e4m3fn)
            factors = torch.rand(1, 1, generator=generator)
            stored_as[name.replace(".weight", ".weight_scale_inv")] = factors
        else:
            stored_as[name] = tensor if "gate" in name else tensor.to(torch.bfloat16)
    write_shards(tmp_path / "source", own, stored_as)
    save_checkpoint(pruned(tmp_path / "source", 4), tmp_path / "out", tmp_path / "source")
    read, path = stored(tmp_path / "out"), "model.layers.4.mlp.experts"
    for place, expert in enumerate(longest(made, "deepseek_v3", 4)):
        for part in ("weight", "weight_scale_inv"):
            one = read[f"{path}.{place}.up_proj.{part}"]
            other = stored_as[f"{path}.{expert}.up_proj.{part}"]
            assert one.dtype == other.dtype
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert len([name for name in read if path in name]) == 4 * 3 * 2
    assert read["model.layers.4.eh_proj.weight"].dtype == torch.bfloat16


def test_quantised_they_are_dequantised_where_all_others_are(tmp_path: Path) -> None:
    """transformers dequantises fp8 where there is no GPU: the config then says nothing of it."""
    made = write_with_mtp("deepseek_v3", tmp_path / "source")
    file, tensors = tmp_path / "source" / "model.safetensors", {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_file(file).items():
        tensors[name] = tensor
        if "_proj.weight" in name and "eh_proj" not in name:
            rows, columns = (-(-size // 8) for size in tensor.shape)
            factors = torch.rand(rows, columns, generator=generator) + 0.5
            tensors |= {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": factors}
    save_file(tensors, file, metadata={"format": "pt"})
    set_config(tmp_path / "source", quantization_config=FP8)
    save_checkpoint(pruned(tmp_path / "source", 4), tmp_path / "out", tmp_path / "source")
    read, path = stored(tmp_path / "out"), "model.layers.4.mlp.experts"
    assert not [name for name in read if name.endswith("_scale_inv")]
    for place, expert in enumerate(longest(made, "deepseek_v3", 4)):
        weight = tensors[f"{path}.{expert}.down_proj.weight"].float()
        factors = tensors[f"{path}.{expert}.down_proj.weight_scale_inv"]
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                weight[row, column] *= factors[row // 8, column // 8]
        assert torch.equal(read[f"{path}.{place}.down_proj.weight"], weight)
    # The same of a layer that transformers has dequantised itself.
    own = Quantised(8, 8, torch.float32)
    first = "model.layers.3.mlp.experts.0.up_proj.weight"
    ours = own.undone(tensors[first], tensors[f"{first}_scale_inv"])
    assert torch.equal(read[first], ours)


def test_another_quantisation_is_refused(tmp_path: Path) -> None:
    write_with_mtp("glm4_moe", tmp_path / "source")
    model = pruned(tmp_path / "source", 4)
    set_config(tmp_path / "source", quantization_config=FP8 | {"quant_method": "awq"})
    with pytest.raises(UserError, match=r"quantised by awq.*method.mtp=drop"):
        save_checkpoint(model, tmp_path / "out", tmp_path / "source")


def test_fused_experts_are_cut(tmp_path: Path) -> None:
    """As Qwen3.5 stores them: all experts of a projection in one tensor."""
    made = write_with_mtp("qwen3_next", tmp_path / "source")
    source, path = tmp_path / "source" / "model.safetensors", "mtp.layers.0.mlp.experts"
    parts = {
        part: torch.stack([made[f"{path}.{e}.{part}.weight"] for e in range(8)])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    fused = {name: one for name, one in load_file(source).items() if not name.startswith(path)}
    fused[f"{path}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
    fused[f"{path}.down_proj"] = parts["down_proj"]
    save_file(fused, source, metadata={"format": "pt"})
    save_checkpoint(pruned(tmp_path / "source", 6), tmp_path / "out", tmp_path / "source")
    read, kept = stored(tmp_path / "out"), longest(made, "qwen3_next", 6)
    assert torch.equal(read[f"{path}.gate_up_proj"], fused[f"{path}.gate_up_proj"][kept])
    assert torch.equal(read[f"{path}.down_proj"], parts["down_proj"][kept])
    gate = "mtp.layers.0.mlp.gate.weight"
    assert torch.equal(read[gate], made[gate][kept])
