"""What is computed without moe_lab, against the models' own arithmetic."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from families import tiny_batch, tiny_model
from torch.nn import functional as F

from moe_lab.families import references, tiny
from moe_lab.families.references import (
    counting_tokens,
    dropped,
    expert_counts,
    generation,
    logits_of,
    masked,
    with_constant_weights,
)
from moe_lab.families.stock_process import REFERENCES


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(REFERENCES.read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    assert names and not [name for name in names if name and name.startswith("moe_lab")]
    assert Path(references.__file__) == REFERENCES


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_experts_are_counted_where_they_are(kind: str) -> None:
    first = 0 if kind == "gpt_oss" else 1
    assert expert_counts(tiny_model(kind)) == dict.fromkeys(range(first, 4), 8)


def test_counts_are_of_valid_tokens() -> None:
    model, batch = tiny_model("qwen2_moe"), tiny_batch()
    with counting_tokens(model, [batch]) as counts:
        logits_of(model, [batch])
    assert {index: int(count.sum()) for index, count in counts.items()} == dict.fromkeys(
        (1, 2, 3), 3 * int(batch["attention_mask"].sum())
    )
    before = {index: count.clone() for index, count in counts.items()}
    logits_of(model, [batch])
    assert all(torch.equal(counts[index], before[index]) for index in before), "hooks are gone"


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_a_masked_router_chooses_none_of_those_that_go(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch()
    plain, kept = logits_of(model, [batch]), [0, 1, 2, 5, 6, 7]
    nobody_goes = masked(model, {}, [batch])
    assert nobody_goes is not None and torch.equal(nobody_goes[0], plain[0])
    with counting_tokens(model, [batch]) as counts:
        logits = masked(model, {str(index): kept for index in range(4)}, [batch])
    assert logits is not None and not torch.equal(logits[0], plain[0])
    assert all(not count[[3, 4]].any() for count in counts.values()) and counts
    assert F.linear.__module__ != references.__name__, "what was replaced is back"


def test_a_router_that_is_not_found_is_said() -> None:
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight = torch.nn.Parameter(layer.mlp.gate.weight[:6].clone())
    assert masked(model, {"0": [0, 1]}, [tiny_batch()]) is None


def test_a_router_that_chooses_otherwise_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By token id, as the first layers of DeepSeek-V4 do, were their table not looked at."""
    monkeypatch.setattr(references, "_rename_in_table", lambda module, gone: None)
    model, batches = tiny.tiny_model("deepseek_v4"), tiny.tiny_batches()
    assert masked(model, {"0": list(range(2, 8))}, batches) is None
    assert masked(model, {"1": list(range(2, 8))}, batches) is not None


@pytest.mark.parametrize("kind", ["dbrx", "jetmoe", "longcat_flash", "llama4_text", "inkling_text"])
def test_families_with_experts_of_their_own_have_references(kind: str) -> None:
    model, batches = tiny.tiny_model(kind), tiny.tiny_batches()
    counts = expert_counts(model)
    assert set(counts.values()) <= {8, 10} and counts
    plain = logits_of(model, batches)[0]
    logits = masked(model, {str(index): list(range(2, 8)) for index in counts}, batches)
    assert logits is not None and not torch.equal(logits[0], plain)


def test_constant_weights_are_the_experts_sum() -> None:
    model, batch = tiny_model("mixtral"), tiny_batch()
    block = model.model.layers[2].mlp
    edit = {"name": "model.layers.2.mlp", "experts": [1, 6], "gates": [0.7, 0.4]}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    block.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with_constant_weights(model, edit, [batch])
    ((x, out),) = seen
    wanted = torch.zeros_like(x)
    for expert, gate in zip(edit["experts"], edit["gates"], strict=True):
        up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
        one, other = F.linear(x, up).chunk(2, dim=-1)
        wanted += gate * F.linear(F.silu(one) * other, down)
    torch.testing.assert_close(out, wanted)


def test_a_shared_expert_gets_its_constant_gate() -> None:
    model, batch = tiny_model("qwen2_moe"), tiny_batch()
    edit = {"name": "model.layers.1.mlp", "experts": [0], "gates": [0.0], "shared_gate": 0.25}
    block, seen = model.model.layers[1].mlp, []
    block.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with_constant_weights(model, edit, [batch])
    ((x, out),) = seen
    torch.testing.assert_close(out, 0.25 * block.shared_expert(x))


def test_a_dropped_block_adds_nothing() -> None:
    model, batch = tiny_model("olmoe"), tiny_batch()
    plain = logits_of(model, [batch])
    logits = dropped(model, {"name": "model.layers.1.mlp"}, [batch])
    assert not torch.equal(plain[0], logits[0])
    model.model.layers[1].mlp.experts.down_proj.data.zero_()
    torch.testing.assert_close(logits_of(tiny_zeroed(), [batch]), logits)


def tiny_zeroed() -> torch.nn.Module:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.experts.down_proj.data.zero_()
    return model


def test_decoding_with_a_broken_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model("mixtral"), tiny_batch(padding=False)
    assert generation(model, batch) == "equal"
    plain = model.forward

    def forgetful(*args: object, **named: object) -> object:
        out = plain(*args, **named)
        if named.get("use_cache") and named.get("past_key_values") is not None:
            out.logits = out.logits.flip(-1)
        return out

    monkeypatch.setattr(model, "forward", forgetful)
    assert generation(model, batch).startswith(("differs at token", "with a cache"))
