"""Where and how to compute."""

from __future__ import annotations

from moe_lab.compute import Compute


def test_auto_goes_layerwise_where_the_model_is_large() -> None:
    compute = Compute("cpu")
    assert not compute.goes_layerwise(compute.memory() // 2 - 1)
    assert compute.goes_layerwise(compute.memory() // 2 + 1)
    assert not Compute("cpu", layerwise=False).goes_layerwise(2**60)
    assert Compute("cpu", layerwise=True).goes_layerwise(1)
