"""A profile that can open its model."""

from __future__ import annotations

from typing import Any

import pytest
from families import tiny_model

from moe_lab.profile.profile import Profile


@pytest.fixture(scope="module")
def profile(batches: list) -> Profile:
    model = tiny_model("qwen2_moe")

    def open_model(num_samples: int) -> tuple[Any, list]:
        return model, batches[:num_samples]

    return Profile([], open_model=open_model)
