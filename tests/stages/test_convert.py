"""Converting: once, and not before what is asked for was looked at."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from moe_lab.compute import Compute
from moe_lab.models.checkpoint import resolve
from moe_lab.models.weight_files import weight_files
from moe_lab.stages.context import Context
from moe_lab.stages.convert import convert
from moe_lab.store import Store
from moe_lab.types import UserError


def test_the_disk_is_looked_at_first(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(UserError, match=r"needs about .* has 0.00 GiB free"):
        convert(Context(Store(tmp_path / "store"), Compute("cpu")), resolve(published))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_converted_copy_is_made_once(condense_published: Callable, published: Path) -> None:
    first = condense_published("condense.experts=[1,2]", "condense.layers=[1]")
    again = condense_published("condense.experts=[1,2]", "condense.layers=[2]")
    assert first.code == again.code == 0, first.text + again.text
    assert not first.report["cached/convert"] and again.report["cached/convert"]
    assert first.stages() == ["compress", "convert", "plan", "profile"]
    native = Path(first.report["dense/checkpoint"])
    assert native.is_relative_to(first.store / "convert")
    with safe_open(weight_files(native)[0], "pt") as shard:
        assert "model.layers.1.self_attn.q_proj.bias" in shard.keys()  # noqa: SIM118
    assert first.report["fingerprint/model"] == resolve(published).fingerprint


def test_a_request_is_refused_before_anything_is_converted(condense_published: Callable) -> None:
    outcome = condense_published("condense.num_layers=9")
    assert outcome.code == 2 and "4 MoE layers" in outcome.report["error"]
    assert outcome.stages() == []
