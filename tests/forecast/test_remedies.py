"""Options that make a stage fit, each tried on the forecast."""

from __future__ import annotations

from dataclasses import replace

from foreseen_work import some_work

from moe_lab.forecast.costs import Costs
from moe_lab.forecast.need import Need
from moe_lab.forecast.remedies import remedy_of
from moe_lab.forecast.stages import needs
from moe_lab.forecast.work import Work

# A forward takes ten times what its states do, and a backward pass what it saves.
COSTS = Costs(
    {"profile": {"states": 10.0}, "profile_layerwise": {"states": 10.0},
     "finetune": {"saved_states": 100.0}, "evaluate_tasks": {"states": 10.0},
     "evaluate_held_out": {"states": 10.0}}, {}, {}, 0.0, 1e9,
)  # fmt: skip


def remedy(stage: str, work: Work, share: float) -> str | None:
    """For a stage that may take this share of what it needs."""
    need = next(one for one in needs(work, COSTS) if one.stage == stage)

    def fits(other: Need) -> bool:
        return other.memory <= share * need.memory

    return remedy_of(need, work, COSTS, fits)


def test_a_profile_goes_layer_by_layer() -> None:
    work = some_work()
    assert remedy("profile", work, 0.99) == "compute.layerwise=true"
    assert remedy("profile", work, 0.9) == "compute.layerwise=true compute.batch_size=2"


def test_then_in_smaller_batches() -> None:
    work = some_work()
    layerwise = replace(work, profiling=replace(work.profiling, layerwise=True))
    assert remedy("profile", layerwise, 0.95) == "compute.batch_size=2"
    assert remedy("profile", layerwise, 0.01) is None


def test_a_tuning_computes_activations_again() -> None:
    work = some_work()
    assert remedy("finetune", work, 0.9999) == "finetune.gradient_checkpointing=true"
    assert remedy("finetune", work, 0.1) == "finetune=none"


def test_what_cannot_be_smaller_is_left_out() -> None:
    work = some_work()
    assert remedy("measure", work, 0.9) == "measure=none"
    assert remedy("evaluate_compressed", work, 0.1) == "eval=none"
    assert remedy("compress", work, 0.9) is None
