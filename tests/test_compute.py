"""Where and how to compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_lab.compute import LAYERWISE_BYTES, Compute
from moe_lab.types import UserError


def test_auto_goes_layerwise_where_the_model_is_large() -> None:
    compute = Compute("cpu")
    assert not compute.goes_layerwise(compute.memory() // 2 - 1)
    assert compute.goes_layerwise(compute.memory() // 2 + 1)
    assert not Compute("cpu", layerwise=False).goes_layerwise(2**60)
    assert Compute("cpu", layerwise=True).goes_layerwise(1)


def test_a_profile_on_the_cpu_goes_layerwise_where_that_saves_memory() -> None:
    compute = Compute("cpu")
    assert compute.profiles_layerwise(LAYERWISE_BYTES + 1, LAYERWISE_BYTES)
    assert not compute.profiles_layerwise(LAYERWISE_BYTES, 0), "small ones are read faster at once"
    assert not compute.profiles_layerwise(2 * LAYERWISE_BYTES, 2 * LAYERWISE_BYTES), (
        "its text would take as much"
    )
    assert compute.profiles_layerwise(2**60, 2**60), "nothing else fits"
    assert not Compute("cuda").profiles_layerwise(2 * LAYERWISE_BYTES, 0, memory=2**40)
    assert not Compute("cpu", layerwise=False).profiles_layerwise(2**60, 0)
    assert Compute("cpu", layerwise=True).profiles_layerwise(1, 2)


def test_a_start_chooses_a_device_and_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        started = Compute("cpu", threads=before + 1).start()
        assert (started.device, torch.get_num_threads()) == ("cpu", before + 1)
        assert started.machine().endswith(f"CPU, {before + 1} threads")
        assert Compute("cpu").start().machine() == started.machine(), "left as it was set"
    finally:
        torch.set_num_threads(before)
    found = Compute().start().device
    assert found == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "f16c": True}, (False, False)),
        ({"avx512_bf16": True, "amx_bf16": False, "amx_fp16": False}, (True, False)),
        ({"neon": True, "bf16": True, "fp16_arith": True}, (True, True)),
        ({}, (True, True)),
    ],
)
def test_units_for_half_precision(
    capabilities: dict[str, Any], has: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    asked = ("bfloat16", "float16")
    assert tuple(map(Compute("cpu").has_units_for, asked)) == has
    assert all(map(Compute("cpu", card="h200").has_units_for, asked)), "of another machine"
    assert Compute("cpu").has_units_for("float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "compute.batch_size=0: it must be at least 1"),
        ({"threads": 0}, "compute.threads=0: it must be from 1 to 4096, or null"),
        ({"cache_gib": -0.5}, "compute.cache_gib=-0.5: it must be at least 0"),
        ({"profile": "some"}, "compute.profile=some: there are all, routers"),
        ({"layerwise": "no"}, "compute.layerwise=no: there are auto, true, false"),
        ({"device": "cuda:99"}, r"compute.device=cuda:99 is not available here; there is cpu"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Compute(**options).start()
