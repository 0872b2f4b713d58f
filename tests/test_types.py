"""The values that pass between rooms: light to import, and whole after a way through JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from families import tiny_model

from moe_lab.models.layers import moe_layers
from moe_lab.types import LayerInfo, UserError


def test_a_layer_is_described_in_json() -> None:
    infos = [layer.info for layer in moe_layers(tiny_model("deepseek_v3"))]
    assert infos
    for info in infos:
        assert LayerInfo(**json.loads(json.dumps(dataclasses.asdict(info)))) == info
        with pytest.raises(dataclasses.FrozenInstanceError):
            info.top_k = 1


def test_a_mistake_in_a_request_is_a_wrong_value() -> None:
    assert issubclass(UserError, ValueError)


def test_importing_the_ground_is_light() -> None:
    code = "import sys, moe_lab.types; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
