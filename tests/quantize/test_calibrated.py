"""GPTQ along a checkpoint, against GPTQ of each matrix on what a loaded model hands it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_runs import job_of, tiny_checkpoint, tokens, written
from torch import Tensor

from moe_lab.models.checkpoint import load
from moe_lab.models.layers import moe_layers
from moe_lab.models.rounding import Scheme, dequantised, rounded
from moe_lab.models.stream import LayerStream, States
from moe_lab.profile.routed_tokens import RoutedTokens
from moe_lab.quantize.calibrated import STARVED
from moe_lab.quantize.column_rounding import HessianSum, LevelChoice, gptq
from moe_lab.quantize.gptq import Gptq


def hessian(x: Tensor) -> Tensor:
    total = HessianSum()
    total.add(x)
    return total.value()


def parameters(folder: Path) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in load(folder).named_parameters()}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_layer_is_quantised_on_the_states_behind_the_quantised_ones(
    family: str, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", family)
    quantizer = Gptq(bits=3, group_size=8, token_weight="gate_squared")
    job = job_of(checkpoint, quantizer, tmp_path / "job")
    at_work = written(job, quantizer)
    assert at_work.figures() == {"starved_experts": 0}
    found, source = parameters(job.folder / "checkpoint"), load(checkpoint.path)
    stream = LayerStream(source, tokens().batches(6, "cpu"))
    turned = family == "gpt_oss"
    for layer in moe_layers(source):
        states = States(stream)
        states.move_to(layer.info.index)
        seen = RoutedTokens(stream.moe[layer.info.index], states)
        for expert in (1, 6):
            one = seen.of(expert)
            gate_N1 = one.gate_N[:, None]
            by = {"gate_up_proj": one.x_ND, "down_proj": seen.hidden(expert, one)}
            for name, x in by.items():
                weight = getattr(layer.experts, name)[expert].detach()
                matrix = weight.T if turned else weight
                read = dequantised(gptq(matrix, hessian(x * gate_N1), LevelChoice(Scheme(3, 8))))
                key = f"{layer.info.name}.experts.{name}"
                ours = found[key][expert].T if turned else found[key][expert]
                assert (ours != matrix).any()
                # A weight between two levels may go either way with the rounding of other sums.
                assert (torch.isclose(ours, read, atol=1e-6)).float().mean() > 0.98, key
        for name, parameter in layer.experts.named_parameters():
            parameter.data.copy_(found[f"{layer.info.name}.experts.{name}"])


def test_linear_layers_by_the_hessian_of_their_inputs(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "qwen2_moe")
    quantizer = Gptq(bits=4, group_size=8, what="attention")
    job = job_of(checkpoint, quantizer, tmp_path / "job")
    written(job, quantizer)
    source, inputs = load(checkpoint.path), list[Tensor]()
    first = source.model.layers[0].self_attn.k_proj
    [batch] = tokens().batches(6, "cpu")
    first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        source(**batch)
    x = inputs[0][batch["attention_mask"].bool()]
    expected = dequantised(gptq(first.weight.detach(), hessian(x), LevelChoice(Scheme(4, 8))))
    ours = parameters(job.folder / "checkpoint")["model.layers.0.self_attn.k_proj.weight"]
    assert torch.isclose(ours, expected, atol=1e-6).float().mean() > 0.98


def test_starved_experts_are_rounded_to_nearest_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "mixtral")
    quantizer = Gptq(bits=3, group_size=8, least_tokens=1000)
    job = job_of(checkpoint, quantizer, tmp_path / "job")
    with caplog.at_level("INFO"):
        assert written(job, quantizer).figures() == {"starved_experts": 32}
    told = json.loads((job.folder / STARVED).read_text())
    assert told == {str(layer): list(range(8)) for layer in range(4)}
    assert "layer 3: experts [0, 1, 2, 3, 4, 5, 6, 7] get fewer than 1000 tokens" in caplog.text
    source, found = parameters(checkpoint.path), parameters(job.folder / "checkpoint")
    name = "model.layers.2.mlp.experts.down_proj"
    assert torch.equal(found[name][4], dequantised(rounded(source[name][4], Scheme(3, 8))))


def test_a_run_that_was_killed_goes_on_at_its_layer(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", "mixtral")
    quantizer = Gptq(bits=3, group_size=8)
    whole = job_of(checkpoint, quantizer, tmp_path / "whole")
    written(whole, quantizer)
    job = job_of(checkpoint, quantizer, tmp_path / "job")
    asked: list[int] = []

    def watched(until: int) -> Any:
        at_work: Any = quantizer.begin(job)
        plain = at_work.layer

        def layer(index: int, matrices: Any) -> Iterator[Any]:
            if index == until:
                raise InterruptedError
            asked.append(index)
            yield from plain(index, matrices)

        at_work.layer = layer
        return at_work

    with pytest.raises(InterruptedError):
        written(job, quantizer, watched(2))
    at_work = written(job, quantizer, watched(9))
    assert asked == [0, 1, 2, 3] and at_work.figures() == {"starved_experts": 0}
    starved = [one.folder / STARVED for one in (whole, job)]
    assert starved[0].read_text() == starved[1].read_text()
    once, twice = parameters(whole.folder / "checkpoint"), parameters(job.folder / "checkpoint")
    assert all(torch.equal(once[name], twice[name]) for name in once)
