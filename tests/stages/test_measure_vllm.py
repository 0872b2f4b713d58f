"""The stage that measures through vLLM, and a whole job with it."""

from __future__ import annotations

from pathlib import Path

from fake_vllm import fake_vllm
from running import Job

SMALL = (
    "method=prune", "metric=reap", "ratio.ratio=0.5", "finetune=none", "eval=none", "measure=vllm",
    "measure.prompt_length=8", "measure.decode_tokens=1", "measure.repeats=1", "measure.requests=2",
    "measure.output_tokens=4", "measure.turns=1",
)  # fmt: skip


def test_a_job_tells_what_vllm_serves_and_all_else_that_is_measured(
    job: Job, tmp_path: Path
) -> None:
    found = fake_vllm(tmp_path)
    done = job(*SMALL, f"measure.python={found.python}")
    report = done.report
    assert done.code == 0 and report["measure/engine"] == "vllm 0.32.0"
    for variant in ("dense", "compressed"):
        assert report[f"{variant}/vllm/prefill_tokens_per_second"] > 0
        assert report[f"{variant}/vllm/decode_tokens_per_second"] > 0
        assert report[f"{variant}/parameters"] > 0 and report[f"{variant}/prefill_speedup"] > 0
    assert report["dense/vllm/decode_speedup"] == 1
    assert [Path(one["model"]).parent.parent.name for one in found.asked()][-1] == "compress"
    assert "decode speed in vLLM" in done.text
    again = job(*SMALL, f"measure.python={found.python}")
    assert again.report["cached/measure_vllm"] and len(found.asked()) == 2
    others = ("measure=vllm", "measure.requests=2", "measure.output_tokens=4", "measure.turns=1")
    speed = job(*(one for one in SMALL if one not in others), "measure=speed")
    assert speed.report["cached/measure"] and "cached/measure_vllm" not in speed.report


def test_another_version_or_way_is_measured_anew(job: Job, tmp_path: Path) -> None:
    for name, version, further in (
        ("one", "0.32.0", ()), ("two", "0.32.1", ()), ("three", "0.32.1", ("measure.requests=3",)),
        ("four", "0.32.1", ("measure.requests=3",)),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        found = fake_vllm(tmp_path / name, version=version)
        done = job(*SMALL, f"measure.python={found.python}", *further)
        # The last is of the same content in another place.
        assert done.report["cached/measure_vllm"] == (name == "four")


def test_what_vllm_cannot_serve_is_refused_before_any_work(job: Job, tmp_path: Path) -> None:
    missing = job(*SMALL, f"measure.python={tmp_path}/python")
    own = job(*SMALL, f"measure.python={fake_vllm(tmp_path).python}", "method.replacement=constant")
    assert missing.code == own.code == 2
    assert "is no Python that runs" in missing.text and "make serving" in missing.text
    assert "measure=vllm: the result is in moe_lab's own form" in own.text
    assert not missing.stages() and not own.stages()
