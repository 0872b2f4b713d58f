"""NaN and infinities decide nothing: where one is, the run ends, names it, and says what to try.

A table of where the number is and what the run does; the first layer and expert have to be named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from broken_weights import PLACES, broken, scaled
from running import Job, Outcome

NAN, INF = float("nan"), float("inf")
EXPERT = "layer 2, expert 3: "
# What is said of a number in each place, by whoever sees it first; the tensor is named in any case.
SEEN: dict[str, str] = {
    "down": EXPERT,
    "gate": EXPERT,
    "up": EXPERT,
    "router": f"{EXPERT}the norm of its router row",
    "shared": "layer 2: what leaves it",
    "shared gate": "layer 2: ",
    "norm": "layer 2, each expert: the router's logit",
    "attention": "layer 2, each expert: the router's logit",
    "embedding": "layer 1, each expert: the router's logit",
    "dense": "layer 1, each expert: the router's logit",
    "final norm": "the edited model's logits",
    "head": "the edited model's logits",
}
RUNS: dict[str, list[str]] = {
    "routers": ["metric=frequency", "compute.profile=routers"],
    "no text": ["metric=aimer"],
    "layer by layer": ["metric=reap", "compute.layerwise=true"],
    "every expert": ["metric=leave_one_out"],
    "propagated": ["method.propagate=true"],
    "merge": ["method=merge"],
    "condense": ["method=condense"],
    "drop_layers": ["method=drop_layers"],
    "drop_blocks": ["method=drop_blocks"],
    "dense": ["method=none"],
    "diagnose": ["method=none", "diagnose=full"],
    "tune": ["finetune=experts"],
    "seer": ["finetune=seer"],
    "router_kd": ["finetune=router_kd"],
}


def assert_named(outcome: Outcome, *words: str) -> None:
    """Exit code 2, one message with all words, no traceback, and a report that says so."""
    assert outcome.code == 2, outcome.text
    assert "Traceback" not in outcome.text
    assert outcome.report["status"] == "failed"
    missing = [word for word in words if word not in outcome.report["error"]]
    assert not missing, outcome.report["error"]


@pytest.fixture
def spoilt(checkpoint: Path, tmp_path: Path) -> Callable[..., str]:
    """The option for a copy of the small checkpoint with one number in one place."""
    return lambda place, value: f"model.path={broken(checkpoint, tmp_path / 'bad', {place: value})}"


# An infinite gate logit is none of these: its sigmoid is 1, and all that follows is a number.
@pytest.mark.parametrize(
    ("place", "value"),
    [(place, NAN) for place in SEEN] + [(place, INF) for place in ("up", "router", "norm", "head")],
)
def test_the_place_is_named(job: Job, spoilt: Callable[..., str], place: str, value: float) -> None:
    outcome = job("metric=reap", spoilt(place, value))
    held = "NaN" if value != value else "infinite"
    tensor, index = PLACES[place]
    assert_named(outcome, SEEN[place], f"{tensor} in model.safetensors holds {held} at")
    assert str(list(index)) in outcome.report["error"]
    assert outcome.stages() in (["plan", "profile"], []), "nothing is built on it"


@pytest.mark.parametrize("run", RUNS)
def test_every_run_refuses_it(job: Job, spoilt: Callable[..., str], run: str) -> None:
    outcome = job(*RUNS[run], spoilt("down", NAN))
    assert_named(outcome, EXPERT, "model.layers.2.mlp.experts.3.down_proj.weight", "damaged")
    assert outcome.stages() == []


def test_tasks_are_no_accuracy_of_nan(job: Job, spoilt: Callable[..., str]) -> None:
    tiny = ["method=none", "eval=tiny", "eval.num_items=2", "eval.held_out=null"]
    outcome = job(*tiny, "eval.tasks=[tiny_prose]", spoilt("head", NAN))
    assert_named(
        outcome, "task tiny_prose, document 0: the log-likelihood is NaN", "lm_head.weight"
    )
    assert not any(key.startswith("dense/eval") for key in outcome.report)


def test_held_out_text_names_its_document(job: Job, spoilt: Callable[..., str]) -> None:
    outcome = job(
        "method=none", "eval=perplexity", "eval.held_out.num_samples=4", spoilt("head", NAN)
    )
    assert_named(outcome, "the predictions for document ", "of the held-out text", "loss NaN")


def test_what_float16_cannot_hold_is_told_from_damage(
    job: Job, checkpoint: Path, tmp_path: Path
) -> None:
    """Weights that are too large, and weights that only give what is; float32 computes both."""
    large = scaled(checkpoint, tmp_path / "large", {"down": 1e6})
    deep = scaled(checkpoint, tmp_path / "deep", {"gate": 600.0, "up": 600.0, "down": 600.0})
    outcome = job("metric=reap", f"model.path={large}", "model.dtype=float16")
    assert_named(outcome, EXPERT, "experts.3.down_proj.weight", "float16 ends at 65504",
                 "try model.dtype=bfloat16")  # fmt: skip
    outcome = job("metric=reap", f"model.path={deep}", "model.dtype=float16")
    assert_named(outcome, EXPERT, "All weights looked at are finite", "model.dtype=bfloat16")
    assert "damaged" not in outcome.report["error"]
    assert job("metric=reap", f"model.path={deep}").code == 0
    assert job("metric=reap", f"model.path={deep}", "model.dtype=bfloat16").code == 0


OWN = """
import torch

def undefined(layer):
    return torch.where(layer["count"] > 0, layer["norm_sum"], torch.nan) / 0.0

def short(layer):
    return layer["count"][:3]

def gates(statistics):
    return statistics["gate_sum"] / 0.0
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["metric._target_=own_numbers.undefined"],
         ["layer 1, ", "the metric undefined is", "its formula"]),
        (["metric._target_=own_numbers.short"], ["shape [3]", "8 experts"]),
        (["method=condense", "condense.gates=own_numbers.gates"],
         ["layer 1, ", "condense.gates=own_numbers.gates", "its formula"]),
    ],
    ids=["metric", "shape", "gates"],
)  # fmt: skip
def test_a_formula_of_ones_own_is_held_to_it(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: list[str]
) -> None:
    (tmp_path / "own_numbers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    outcome = job("metric=frequency", *options)
    assert_named(outcome, *words)
    assert "model.dtype" not in outcome.report["error"], "no dtype would help"
