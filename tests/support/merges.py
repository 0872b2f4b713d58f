"""Plans of merges of tiny models."""

from __future__ import annotations

from families import tiny_batch
from torch import nn

from moe_lab.methods.merge import Merge
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile

KINDS = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss")


def profile_of(model: nn.Module, seed: int = 0) -> Profile:
    batch = tiny_batch(seed)

    def open_stream(num_samples: int | None = None) -> LayerStream:
        return LayerStream(model, [{name: part[:num_samples] for name, part in batch.items()}])

    return Profile(collect_statistics(model, [batch]), open_stream)


def plan_of(model: nn.Module, **options: object) -> Plan:
    method = Merge(1, **({"num_experts": 4} | options))
    method.check([layer.info for layer in moe_layers(model)])
    return method.plan(profile_of(model))
