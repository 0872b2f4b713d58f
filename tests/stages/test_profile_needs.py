"""What a profile needs is said before its work, and refused where it cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import tiny_model

from moe_lab.compute import Compute
from moe_lab.profile.bounds import Bounds
from moe_lab.stages import profile_needs
from moe_lab.types import UserError

COMPUTE = Compute("cpu", layerwise=True, cache_gib=0.0)
SHAPES = [(0, 4, 64), (1, 1, 256)]


@pytest.fixture
def needed() -> Bounds:
    return profile_needs.bounds_of(tiny_model("qwen2_moe"), 4, asked())


def asked(shapes: list[tuple[int, int, int]] = SHAPES) -> profile_needs.ProfileRequest:
    return profile_needs.request_of(shapes, COMPUTE)


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(profile_needs, "free_memory", lambda device: int(size))


def test_what_is_asked_is_counted() -> None:
    found = asked()
    assert found.batches == [(4, 64), (1, 256)]
    assert (found.groups, found.cache, found.neurons) == (2, 0, False)


def test_it_is_said(needed: Bounds, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        profile_needs.check_needs(needed, asked(), COMPUTE, tmp_path)
    (record,) = caplog.records
    assert record.levelname == "INFO" and needed.in_words() in record.message


def test_what_may_not_fit_is_warned_of(
    needed: Bounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    free(monkeypatch, needed.memory - 1)
    profile_needs.check_needs(needed, asked(), COMPUTE, tmp_path)
    assert "compute.batch_tokens and calibration.max_length make it less" in caplog.text


@pytest.mark.parametrize(
    "left, shapes, way_out",
    [
        (lambda needed: needed.least - 1, SHAPES, r"compute.batch_tokens=256"),
        (lambda needed: needed.least - 1, [(0, 1, 256)], "calibration.max_length"),
        (lambda needed: needed.weights - 1, SHAPES, "one decoder layer and the embedding take"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_way_out(
    left: Callable[[Bounds], int], shapes: list[tuple[int, int, int]], way_out: str,
    needed: Bounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    free(monkeypatch, left(needed))
    with pytest.raises(UserError, match=way_out):
        profile_needs.check_needs(needed, asked(shapes), COMPUTE, tmp_path)


def test_a_result_that_the_disk_cannot_take_is_refused(
    needed: Bounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = profile_needs.shutil.disk_usage(tmp_path)._replace(free=needed.result - 1)
    monkeypatch.setattr(profile_needs.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="store=<folder>"):
        profile_needs.check_needs(needed, asked(), COMPUTE, tmp_path)
