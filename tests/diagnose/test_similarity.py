"""Similarity of experts, of weights and of outputs, against slow references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from families import ROUTER_KINDS, tiny_batch, tiny_model
from torch.nn import functional as F

from moe_lab.diagnose import similarity
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile import all_experts


@pytest.mark.parametrize("family", [*ROUTER_KINDS, "gpt_oss"])
def test_similarity_of_weights_is_the_cosine_of_each_pair(family: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(similarity, "CHUNK", 600)  # several parts
    for layer in moe_layers(tiny_model(family))[:2]:
        found = similarity.of_weights(layer)
        experts = layer.experts
        both = experts.gate_up_proj.transpose(1, 2) if family == "gpt_oss" else experts.gate_up_proj
        halves = (both[:, ::2], both[:, 1::2]) if family == "gpt_oss" else both.chunk(2, dim=1)
        rows = {"gate": halves[0], "up": halves[1], "down": experts.down_proj}
        rows["router"] = layer.router.weight
        assert found.keys() == rows.keys()
        for name, matrix in found.items():
            for a in range(8):
                for b in range(8):
                    one, other = (rows[name][e].detach().flatten().double() for e in (a, b))
                    expected = float(F.cosine_similarity(one, other, dim=0))
                    assert matrix[a, b] == pytest.approx(expected, abs=1e-6)


@dataclass
class Chunk:
    index_TK: torch.Tensor
    outputs_ETD: torch.Tensor


@pytest.mark.parametrize("at_once", [similarity.CHUNK, 2 * 4 * 5, 1])
def test_similarity_of_outputs_is_the_mean_over_tokens(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(similarity, "CHUNK", at_once)
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 7, 5, generator=generator)
    outputs[2, 3] = 0  # an output of zeros is like none
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(7)])
    chunks = [Chunk(index[:3], outputs[:, :3]), Chunk(index[3:], outputs[:, 3:])]
    found = similarity.of_outputs(chunks)
    for a in range(4):
        for b in range(4):
            cosines = [
                float(F.cosine_similarity(outputs[a, t].double(), outputs[b, t].double(), dim=0))
                for t in range(7)
            ]
            assert found["output"][a, b] == pytest.approx(np.mean(cosines), abs=1e-6)
    norms = outputs.double().norm(dim=-1)
    shares = [norms[index[t], t].mean() / norms[:, t].mean() for t in range(7)]
    assert float(found["chosen_norm"]) == pytest.approx(float(np.mean(shares)), rel=1e-5)


def test_outputs_are_those_of_the_models_own_tokens() -> None:
    model, batch = tiny_model("mixtral"), tiny_batch(0)
    layers = moe_layers(model)
    for layer in layers:
        with torch.no_grad():  # the same function, but for its sign
            layer.experts.gate_up_proj[6] = layer.experts.gate_up_proj[1]
            layer.experts.down_proj[6] = -layer.experts.down_proj[1]
    inputs: dict[int, torch.Tensor] = {}
    for layer in layers:
        layer.experts.register_forward_pre_hook(
            lambda _, args, index=layer.info.index: inputs.update({index: args[0].detach()})
        )
    with torch.no_grad():
        model(**batch)
    valid = batch["attention_mask"].bool().flatten()
    known = {index: x.reshape(-1, 32)[valid] for index, x in inputs.items()}
    sample = all_experts.ExpertSample(LayerStream(model, [batch]))
    for layer in layers:
        with sample.open(layer.info.index) as experts:
            found = similarity.of_outputs(experts.chunks())["output"]
        x, own = known[layer.info.index], layer.experts
        outputs = []
        for expert in range(8):
            gate, up = (x @ own.gate_up_proj[expert].T).chunk(2, dim=1)
            outputs.append(((F.silu(gate) * up) @ own.down_proj[expert].T).detach().double())
        for a in range(8):
            for b in range(8):
                cosines = [
                    float(one @ other / (one.norm() * other.norm()))
                    for one, other in zip(outputs[a], outputs[b], strict=True)
                ]
                assert found[a, b] == pytest.approx(np.mean(cosines), abs=1e-5)
        assert found[1, 6] == pytest.approx(-1.0)
