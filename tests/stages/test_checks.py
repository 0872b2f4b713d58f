"""What is refused before any work, because parts of a run do not go together."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from mtp_checkpoints import write_with_mtp
from running import Job
from safetensors.torch import load_file

from moe_lab.compute import Compute
from moe_lab.evaluate.decoding.scmoe import SCMoE
from moe_lab.evaluate.suite import Suite
from moe_lab.methods.condense.method import Condense
from moe_lab.methods.drop_blocks import DropBlocks
from moe_lab.methods.factorize import Factorize
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.energy import energy
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.none import Nothing
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.sensitivity import Sensitivity
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.quantize.planned import Planned
from moe_lab.quantize.rtn import RoundToNearest
from moe_lab.stages.checks import (
    announce_form,
    check_decoding,
    check_mtp,
    check_profile,
    check_quantizer,
    compare_architecture,
    in_quick_dtype,
)
from moe_lab.types import UserError


@pytest.fixture
def in_halves(tmp_path: Path, tokenizer: Any) -> Path:
    """A checkpoint in bfloat16."""
    folder = tmp_path / "halves"
    model = tiny_model("qwen2_moe", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_metrics_that_need_more_than_the_routers_are_refused() -> None:
    routers = Compute("cpu", profile="routers")
    for method in (Prune(functools.partial(frequency), Uniform(0.25)), Nothing()):
        check_profile(routers, method)
    for method in (Prune(functools.partial(reap), Uniform(0.25)), Merge(1, 4)):
        check_profile(Compute("cpu"), method)
        with pytest.raises(UserError, match=r"aimer, frequency, .*soft_count.*compute.profile=all"):
            check_profile(routers, method)
    for wrong in ({"profile": "some"}, {"layerwise": "sometimes"}):
        with pytest.raises(UserError, match="there are"):
            Compute("cpu", **wrong).start()


@pytest.mark.parametrize(
    ("asked", "units", "room", "chosen", "told"),
    [
        ("auto", False, True, "float32", "is computed in float32; model.dtype=bfloat16 keeps it"),
        (
            "auto",
            False,
            False,
            "auto",
            "is computed in bfloat16 as it is stored. model.dtype=",
        ),
        ("auto", True, True, "auto", ""),
        ("bfloat16", False, True, "bfloat16", "model.dtype=auto, which chooses that here"),
        ("float32", False, True, "float32", ""),
    ],
)
def test_a_dtype_that_the_device_has_units_for(
    asked: str,
    units: bool,
    room: bool,
    chosen: str,
    told: str,
    in_halves: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dense = Checkpoint(in_halves, asked)
    layers = dense.layers()
    memory = 8 * layers[0].model_parameters - (0 if room else 1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
    monkeypatch.setattr(Compute, "memory", lambda _: memory)
    with caplog.at_level("INFO"):
        assert in_quick_dtype(dense, layers, Compute("cpu")).dtype == chosen
    assert told in caplog.text
    assert bool(told) == bool(caplog.text)


def test_the_chosen_dtype_is_part_of_what_a_result_is(
    job: Job, in_halves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {}
    for units in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=units: {"bf16": has})
        done = job("model.dtype=auto", f"model.path={in_halves}")
        assert done.code == 0, done.text
        results[done.report["dtype"]] = done.report["artifact/profile"]
        written = load_file(Path(done.report["compressed/checkpoint"]) / "model.safetensors")
        assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert sorted(results) == ["bfloat16", "float32"]
    assert len(set(results.values())) == 2
    monkeypatch.undo()
    done = job("model.dtype=float32", f"model.path={in_halves}")
    assert done.report["artifact/profile"] == results["float32"], "the same, asked for by name"


def test_a_form_is_foreseen_only_where_widths_are(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where scores decide how wide experts stay, no width is made up."""
    dense = Checkpoint(checkpoint)
    layers = dense.layers()
    with caplog.at_level("INFO"):
        for ratio in (Uniform(0.5), Global(0.5)):
            caplog.clear()
            announce_form(dense, Prune(energy, ratio, unit="neurons"), layers)
            said = " ".join(caplog.messages)
            assert ("is known with the plan" in said) == isinstance(ratio, Global)
            assert "wide, padded" not in said and "experts 8 " not in said


def test_a_checkpoint_of_another_structure_is_warned_of(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = Checkpoint(checkpoint)
    stated = {"model_type": "qwen2_moe", "num_experts": 8, "num_hidden_layers": 4}
    for silent in ({}, {"architecture": None}, {"architecture": stated}):
        compare_architecture(found, {"name": "mine"} | silent)
    assert caplog.text == ""
    compare_architecture(found, {"name": "mine", "architecture": stated | {"num_experts": 60}})
    assert "is not model=mine as published: num_experts 8 (not 60)." in caplog.text
    assert "model.architecture=null" in caplog.text


def test_factors_are_not_packed(checkpoint: Path) -> None:
    dense = Checkpoint(checkpoint)
    layers, half = dense.layers(), Uniform(0.5)
    rounding = RoundToNearest(bits=4, group_size=None)
    check_quantizer(dense, Factorize(half, layers=[layers[0].index]), None, rounding, layers)
    check_quantizer(dense, Factorize(half), None, replace(rounding, what="all"), layers)
    with pytest.raises(UserError, match=r"quantize.what=experts: .* factors are not packed"):
        check_quantizer(dense, Factorize(half), None, rounding, layers)


def test_bits_that_a_ratio_decides_and_what_stores_them_go_together(checkpoint: Path) -> None:
    dense = Checkpoint(checkpoint)
    layers = dense.layers()
    rounding = RoundToNearest(bits=4, group_size=None)
    of_bits = Prune(reap, Sensitivity(0.4, bits=[16, 4]))
    check_quantizer(dense, of_bits, None, Planned(), layers)
    for other in (None, rounding):
        with pytest.raises(UserError, match=r"^ratio.bits .*: quantize=planned does, or leave"):
            check_quantizer(dense, of_bits, None, other, layers)
    for without in (Prune(reap, Sensitivity(0.4)), Prune(reap, Uniform(0.5)), Nothing()):
        check_quantizer(dense, without, None, rounding, layers)
        with pytest.raises(UserError, match=r"^quantize=planned"):
            check_quantizer(dense, without, None, Planned(), layers)


def test_mtp_layers_left_whole_are_refused_where_fewer_experts_are_foreseen(tmp_path: Path) -> None:
    write_with_mtp("glm4_moe", tmp_path)
    dense = Checkpoint(tmp_path)
    layers = dense.layers()
    half, all_of_them = Uniform(0.5), len(layers)
    for method in (
        Prune(reap, half, mtp="keep"),
        Merge(all_of_them, 4, router="dominant", mtp="keep"),
        Merge(all_of_them, ratio=half, router="mean", mtp="keep"),
    ):
        with pytest.raises(UserError, match=r"method.mtp=keep.*8 experts.*have 4"):
            check_mtp(dense, method, layers)
    for method in (
        Prune(reap, half),
        Prune(reap, Uniform(0.0), mtp="keep"),
        Prune(reap, half, replacement="zero", mtp="keep"),  # all rows stay
        Prune(reap, Global(0.5), mtp="keep"),  # not known before
        Merge(1, 4, layers="first", router="dominant", mtp="keep"),  # layers of different sizes
        Condense(1, 1, mtp="keep"),
        DropBlocks(1, mtp="keep"),
    ):
        check_mtp(dense, method, layers)


def test_a_rank_beyond_the_experts_that_will_be_left_is_refused(checkpoint: Path) -> None:
    """Where the plan's numbers are known; a decoding that is greedy asks for nothing."""
    dense = Checkpoint(checkpoint)
    layers = dense.layers()
    half = Prune(functools.partial(reap), Uniform(0.5))
    suite = Suite(tasks=["tiny_recall_generate"], decoding=SCMoE(rank=5))
    check_decoding(dense, Nothing(), suite, layers)
    with pytest.raises(UserError, match=r"^decoding.rank=5: layer 1 has 4 experts.*1 to 4 is"):
        check_decoding(dense, half, suite, layers)
    check_decoding(dense, half, Suite(tasks=["tiny_recall_generate"]), layers)
    check_decoding(dense, half, None, layers)
    with pytest.raises(UserError, match=r"^decoding.rank=9: layer 1 has 8 experts"):
        check_decoding(dense, Nothing(), replace(suite, decoding=SCMoE(rank=9)), layers)
