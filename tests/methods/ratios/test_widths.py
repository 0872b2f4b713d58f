"""Ratios that say how wide each expert stays: what they are asked with, how widths are rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from expert_sets import Case
from families import tiny_model
from layer_scores import sized
from neuron_pools import pool
from running import Outcome

from moe_lab.methods.metrics.energy import energy
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.widths import WidthBudget, aligned_widths
from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError


@dataclass(frozen=True)
class Stairs(WidthBudget):
    """Expert e of every layer keeps 2 e hidden units."""

    def widths(self, layers, profile):
        return {one.index: 2 * torch.arange(one.experts) for one, _ in layers}


def test_widths_are_multiples_and_spare_blocks_go_to_the_largest_remainders() -> None:
    width_E = torch.tensor([100, 60, 33, 7, 0, 63])
    rounded_E = aligned_widths(width_E, 100, 16)
    #   100 stays; 60 = 48 + 12, 33 = 32 + 1, 7 = 0 + 7, 63 = 48 + 15: 35 spare, two blocks
    assert rounded_E.tolist() == [100, 64, 32, 0, 0, 64]
    assert aligned_widths(width_E, 100, 1).tolist() == width_E.tolist()
    assert aligned_widths(torch.tensor([90, 90, 90]), 100, 64).tolist() == [100, 100, 64], (
        "no wider"
    )
    assert aligned_widths(torch.tensor([40, 40, 40]), 100, 64).tolist() == [64, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_rounding_never_takes_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width_E = torch.randint(0, 101, (12,), generator=generator)
    for multiple in (1, 7, 16, 64):
        rounded_E = aligned_widths(width_E, 100, multiple)
        assert ((rounded_E % multiple == 0) | (rounded_E == 100)).all()
        assert 0 <= int(width_E.sum() - rounded_E.sum()) < multiple
        assert (rounded_E >= width_E // multiple * multiple).all()
        assert (rounded_E - width_E < multiple).all()


def test_the_plan_has_the_widths_and_each_expert_its_best_units() -> None:
    case = Case("mixtral")
    statistics = collect_statistics(case.model, case.batches, neurons=True)
    plan = Prune(energy, Stairs(0.5), unit="neurons", widths="by_expert").plan(Profile(statistics))
    for layer, edit in zip(statistics, plan.edited(), strict=True):
        kept_EI = plan.tensors[f"layers.{edit.index}.neurons"].bool()
        assert kept_EI.sum(dim=1).tolist() == list(edit.widths) == [2 * e for e in range(8)]
        for score_I, kept_I in zip(energy(layer), kept_EI, strict=True):
            if kept_I.any() and not kept_I.all():
                assert score_I[kept_I].min() >= score_I[~kept_I].max()
    assert plan.notes["kept_per_layer"] == {str(layer.info.index): 56 for layer in statistics}
    assert plan.notes["given"]["hidden_units"] == "288 of 512 hidden units"


def test_widths_stay_behind_narrowed_layers() -> None:
    """With propagate scores are measured again, and the widths are those of the intact model."""
    model, case = tiny_model("mixtral"), Case("mixtral")
    statistics = collect_statistics(model, case.batches, neurons=True)
    profile = Profile(statistics, lambda number=None: LayerStream(model, case.batches))
    method = Prune(energy, Stairs(0.5), unit="neurons", widths="by_expert", propagate=True)
    plan = method.plan(profile)
    assert [edit.widths for edit in plan.edited()] == 4 * [tuple(2 * e for e in range(8))]
    once = Prune(energy, Stairs(0.5), unit="neurons", widths="by_expert").plan(profile)
    assert not torch.equal(plan.tensors["layers.3.neurons"], once.tensors["layers.3.neurons"])
    changed = tiny_model("mixtral")
    apply_plan(changed, plan)
    assert len(moe_layers(changed)) == 4


def test_units_that_have_no_width_of_their_own_are_refused() -> None:
    for layers in ([sized(0)], [pool(0, 4, 16, "by_layer")]):
        with pytest.raises(UserError, match=r"ratio=stairs says.*method\.widths=by_expert"):
            Stairs(0.5).check(layers)
    Stairs(0.5).check([pool(0, 4, 16)])
    with pytest.raises(UserError, match=r"ratio\.floor=5 is no multiple.*ratio\.floor=8"):
        Stairs(0.5, floor=5, round_to=4).check([pool(0, 4, 16)])
    with pytest.raises(UserError, match="only 16 hidden units"):
        Stairs(0.5, floor=128).check([pool(0, 4, 16)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["ratio=slimming", "ratio.floor=0"], "method.unit=neurons method.widths=by_expert"),
        (["method.unit=neurons", "metric=energy", "ratio=slimming", "ratio.floor=0"], "by_expert"),
        (
            ["method.unit=neurons", "method.widths=by_expert", "metric=energy", "ratio=slimming",
             "ratio.floor=0", "method.shared=true"],
            "method.shared=true: this ratio says itself how wide",
        ),
        (
            ["method.unit=neurons", "method.widths=by_expert", "metric=energy", "ratio=slimming",
             "ratio.floor=0", "method.protect=super_experts"],
            "method.protect=super_experts: this ratio says itself",
        ),
        (
            ["method.unit=neurons", "metric=heapr", "method.shared=true"],
            "method.shared=true: the metric Heapr has no score of shared experts",
        ),
        (["method.unit=neurons", "method.widths=by_expert", "metric=energy", "ratio=slimming"],
         "ratio.floor=128"),
    ],
)  # fmt: skip
def test_wrong_requests(job: Callable[..., Outcome], options: list[str], words: str) -> None:
    done = job(*(["metric=reap"] if "metric=" not in " ".join(options) else []), *options)
    assert done.code == 2 and words in done.text.replace("\n", " ")
