"""In which form matrices are packed, and which schemes vLLM reads."""

from __future__ import annotations

import re

import pytest
from families import tiny_model

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.matrices import WeightMatrices, matrices_of
from moe_lab.models.packed_form import PackedForm, packed_form, vllm_obstacle
from moe_lab.models.rounding import Scheme


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("mixtral")
    tiny_model("mixtral").save_pretrained(folder)
    return Checkpoint(folder)


def form_of(
    checkpoint: Checkpoint, what: str, *schemes: Scheme
) -> tuple[PackedForm, WeightMatrices]:
    matrices = matrices_of(checkpoint)
    chosen = matrices.chosen(what)
    by_key = {one.key: schemes[number % len(schemes)] for number, one in enumerate(chosen)}
    return packed_form(checkpoint, matrices, by_key), matrices


def test_one_symmetric_scheme_for_all_experts_is_compressed_tensors(mixtral: Checkpoint) -> None:
    form, matrices = form_of(mixtral, "experts", Scheme(4, 8))
    assert form.stock
    values = form.values({"model_type": "mixtral"})["quantization_config"]
    (group,) = values["config_groups"].values()
    assert group["weights"]["group_size"] == 8 and group["weights"]["strategy"] == "group"
    attention = {one.key.removesuffix(".weight") for one in matrices.chosen("attention")}
    routers = {f"model.layers.{i}.block_sparse_moe.gate" for i in range(4)}
    assert {*attention, *routers, "lm_head"} <= set(values["ignore"])
    assert not any(".experts." in path for path in values["ignore"])


@pytest.mark.parametrize(("what", "schemes", "reason"), [
    ("experts", (Scheme(4, 8), Scheme(3, 8)), r"different schemes \(3 bits, 4 bits\)"),
    ("experts", (Scheme(4, 8, False),), "drops the zero points"),
    ("attention", (Scheme(8),), "finds no experts where other matrices are packed"),
])  # fmt: skip
def test_what_stock_readers_would_read_wrongly_is_in_our_own(
    mixtral: Checkpoint, what: str, schemes: tuple[Scheme, ...], reason: str
) -> None:

    form, _ = form_of(mixtral, what, *schemes)
    assert not form.stock and re.search(reason, form.reason)
    values = form.values({"model_type": "mixtral"})
    assert "quantization_config" not in values
    told = values["moe_lab"]["quantised"]["bits"]
    assert sum(told.values()) == len(form.schemes)
    assert set(told) == {str(scheme.bits) for scheme in schemes}


def test_what_vllm_does_not_read_comes_with_a_scheme_that_it_reads(mixtral: Checkpoint) -> None:
    matrices = matrices_of(mixtral).chosen("experts")  # of 32 and 16 inputs
    channel = "quantize.bits=4 quantize.group_size=null"
    for scheme, told in (
        (Scheme(3), f"3 bits need its HUMMING kernel.*{channel}"),
        (Scheme(4, None, False), f"own form.*{channel}"),
        (Scheme(4, 16), f"groups are of 32, 64 or 128.*{channel}"),
    ):
        assert re.search(told, vllm_obstacle(matrices, scheme) or "")
    assert vllm_obstacle(matrices, Scheme(4)) is None and vllm_obstacle(matrices, Scheme(8)) is None
    ups = [one for one in matrices if not one.of_units]
    assert "quantize.group_size=32" in (vllm_obstacle(ups, Scheme(2, 32)) or "")
