"""What is recorded is what the model does, and recording changes none of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from families import EACH_FAMILY, tiny_model
from stand_ins import KEPT, replaced
from traced import PROMPTS, header, routings, traced

from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.skip_rules import Skipping
from moe_lab.models.skipping import skip
from moe_lab.trace.recorder import NO_EXPERT, Recorder, heaviest_first, traced_layer
from moe_lab.trace.recording import continue_greedily


@EACH_FAMILY
def test_rows_are_what_one_pass_over_the_whole_request_does(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    prompt = PROMPTS[0]
    plain = continue_greedily(model, torch.tensor([prompt]), 5)[0].tolist()
    rows = traced(model, tmp_path, [prompt]).table.to_pylist()
    after = continue_greedily(model, torch.tensor([prompt]), 5)[0].tolist()
    assert plain == after and len(plain) == 9
    seen = routings(model, plain[:-1])
    assert len(rows) == len(seen) * 8
    for row in rows:
        one, position = seen[row["layer"]], row["position"]
        index, weight = heaviest_first(one.index_TK, one.weight_TK)
        assert row["experts"] == index[position].tolist()
        assert np.allclose(row["weights"], weight[position].numpy(), atol=1e-5)
        assert row["phase"] == ("prefill" if position < 4 else "decode")
        assert row["step"] == max(0, position - 3) and row["tokens"] == (4, 1)[position >= 4]


def test_gates_before_they_are_shared_out_and_predictions_by_the_formula(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    ids = continue_greedily(model, torch.tensor([PROMPTS[0]]), 5)[0].tolist()[:-1]
    seen = routings(model, ids)
    routers = {layer.info.index: layer.router.weight for layer in moe_layers(model)}
    for row in traced(model, tmp_path, PROMPTS[:1]).table.to_pylist():
        x_D = seen[row["layer"]].x_TD[row["position"]]
        own = (routers[row["layer"]] @ x_D).softmax(dim=0)
        assert np.allclose(row["scores"], own.topk(2).values.detach().numpy(), atol=1e-5)
        assert np.allclose(row["weights"], np.array(row["scores"]) / sum(row["scores"]), atol=1e-5)
        for distance in (1, 2):
            later = routers.get(row["layer"] + distance)
            asked = None if later is None else (later @ x_D).topk(2).indices.tolist()
            assert row[f"ahead_{distance}"] == asked


def test_stand_ins_are_no_experts(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    apply_plan(model, replaced(model, "constant", "copy"))
    layers = {layer.info.index: layer for layer in moe_layers(model)}
    trace = traced(model, tmp_path, PROMPTS[:1])
    ids = continue_greedily(model, torch.tensor([PROMPTS[0]]), 5)[0].tolist()
    seen = routings(model, ids[:-1])
    for row in trace.table.to_pylist():
        one, experts = seen[row["layer"]], layers[row["layer"]].experts
        rows = heaviest_first(one.index_TK, one.weight_TK)[0][row["position"]].tolist()
        places = experts.place_E.tolist() if row["layer"] < 2 else list(range(8))
        number = len(experts.down_proj)
        assert row["experts"] == [places[r] if places[r] < number else NO_EXPERT for r in rows]
    assert (trace.lists("experts").values == NO_EXPERT).any()
    kept = [len(KEPT["constant"]), len(KEPT["copy"]), 8, 8]
    assert [layer.experts for layer in trace.header.layers] == kept


def test_what_a_rule_leaves_out_is_neither_chosen_nor_predicted(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    for layer in moe_layers(model):
        skip(layer, Skipping("ratio", 0.8))
    trace = traced(model, tmp_path, PROMPTS[:1])
    for column, weights in (("experts", "weights"), ("ahead_1", None)):
        for row in trace.table.to_pylist():
            first, second = row[column] or (0, 0)
            assert first != NO_EXPERT
            assert weights is None or (second == NO_EXPERT) == (row[weights][1] == 0.0)
        left_out = trace.lists(column).values == NO_EXPERT
        assert left_out.any() and not left_out.all()


def test_what_an_expert_is() -> None:
    model = tiny_model("deepseek_v3")  # a router with a bias: neither is the expert's
    layer = traced_layer(moe_layers(model)[0])
    assert (layer.index, layer.experts, layer.top_k, layer.shared) == (1, 8, 2, True)
    assert (layer.parameters, layer.stored_bytes) == (3 * 32 * 16, 4 * 3 * 32 * 16)


def test_nothing_is_kept_outside(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    recorder = Recorder(model, 1)
    with recorder.open():
        model(torch.tensor([PROMPTS[0]]))
    model(torch.tensor([PROMPTS[1]]))
    passes, records = recorder.take()
    assert passes == [4] and [len(one.experts_TK) for one in records] == [4] * 4
    assert [len(one.ahead) for one in records] == [1, 1, 1, 0]
    assert header(model).lookahead == 2


def test_equal_weights_stay_in_the_routers_order() -> None:
    index, weight = torch.tensor([[3, 1, 2]]), torch.tensor([[0.2, 0.5, 0.2]])
    ordered, heaviest = heaviest_first(index, weight)
    assert torch.equal(ordered, torch.tensor([[1, 3, 2]]))
    assert torch.equal(heaviest, torch.tensor([[0.5, 0.2, 0.2]]))
