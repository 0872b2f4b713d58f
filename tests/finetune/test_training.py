"""The loop: phases, accumulation, checkpointing, precision, resuming, processes."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from running import run_killed, start_two
from safetensors.torch import load_file
from trainings import PLANS, compressed, rows_of, samples, steps_of, train_one, training

from moe_lab import stopping
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.recipe import Phase
from moe_lab.models.checkpoint import load
from moe_lab.types import NotFinite, UserError

RESUMED = {
    "prune": ("prune", {}, 5, 4),
    "condense": ("condense", {}, 5, 4),
    "bfloat16, gates, both phases, in the first": ("condense", {"gates": True}, 5, 4),
    "bfloat16, gates, both phases, at the border": ("condense", {"gates": True}, 7, 6),
    "bfloat16, gates, both phases, in the second": ("condense", {"gates": True}, 10, 8),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_equals_uninterrupted(case: str, tmp_path: Path, monkeypatch) -> None:
    """To the bit: stopped within a phase, or where one ends, with a step after the last state."""
    kind, changes, stop, save_every = RESUMED[case]
    dtype = "auto" if "bfloat16" in case else "float32"
    if "both" in case:
        changes = changes | {"supervised": True, "dtype": "bfloat16"}
    else:
        changes = changes | {"epochs": 2}
    plan = compressed(kind, tmp_path)
    results = []
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "stopped":
            model = load(tmp_path / "compressed", dtype=dtype)
            first = training(model, plan, folder, **changes)
            run_killed(first, stop, save_every, monkeypatch)
            assert int(load_file(folder / finetune_training.STATE)["done"]) == save_every < stop
            assert len(steps_of(folder)) == stop
        model = load(tmp_path / "compressed", dtype=dtype)
        training(model, plan, folder, **changes).run()
        results.append((model.state_dict(), (folder / "curve.jsonl").read_text()))
    (whole, curve), (resumed, resumed_curve) = results
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert curve == resumed_curve
    assert [row["step"] for row in steps_of(folder)] == list(range(1, 13))


TORN = {
    "the state, cut": lambda folder: os.truncate(folder / finetune_training.STATE, 1000),
    "the state, emptied": lambda folder: (folder / finetune_training.STATE).write_bytes(b""),
    "a bit of the state": lambda folder: flip(folder / finetune_training.STATE),
    "the curve, cut": lambda folder: (folder / "curve.jsonl").write_text("{}\n"),
    "the curve, no text": lambda folder: (folder / "curve.jsonl").write_bytes(b"\xff\xfe"),
    "a bit of the curve": lambda folder: flip(folder / "curve.jsonl"),
    "the curve, gone": lambda folder: (folder / "curve.jsonl").unlink(),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("case", TORN)
def test_torn_state_is_none(case: str, tmp_path: Path, monkeypatch, caplog) -> None:
    """Warned of, and begun again; the curve lies in the state. The end is the same, to the bit."""
    plan = compressed("prune", tmp_path)
    results = []
    for name in ("whole", "torn"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "torn":
            model = load(tmp_path / "compressed", dtype="float32")
            run_killed(training(model, plan, folder), 3, 2, monkeypatch)
            TORN[case](folder)
        model = load(tmp_path / "compressed", dtype="float32")
        training(model, plan, folder).run()
        results.append((model.state_dict(), (folder / "curve.jsonl").read_text()))
    (whole, curve), (again, curve_again) = results
    assert ("cannot be read" in caplog.text and "starts over" in caplog.text) == ("state" in case)
    assert curve == curve_again
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_within_a_step_saves_that_step(name: str, tmp_path: Path, monkeypatch) -> None:
    """Its state is of a whole step, whatever was being computed, and goes on to the same bits."""
    plan, results = compressed("prune", tmp_path), []
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        folder.mkdir()
        if folder.name == "stopped":
            first = training(load(tmp_path / "compressed", dtype="float32"), plan, folder)
            step = first._backward

            def interrupted(*given: Any, step: Any = step, first: Any = first) -> Any:
                if first.done == 2:
                    os.kill(os.getpid(), getattr(signal, name))
                return step(*given)

            monkeypatch.setattr(first, "_backward", interrupted)
            with pytest.raises(stopping.Stopped, match=name):
                first.run()
            assert int(load_file(folder / finetune_training.STATE)["done"]) == 3
            stopping._state.asked = None
        model = load(tmp_path / "compressed", dtype="float32")
        training(model, plan, folder).run()
        results.append((model.state_dict(), (folder / "curve.jsonl").read_text()))
    (whole, curve), (resumed, resumed_curve) = results
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert curve == resumed_curve


def test_it_learns_and_the_curve_says_so(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    training(model, plan, tmp_path, epochs=8).run()
    start, *rows = rows_of(tmp_path)
    assert start.keys() == {"phase", "step", "validation_loss"} and start["step"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert all(row["phase"] == "lm" and row["gradient_norm"] > 0 for row in rows)
    assert rows[-1]["tokens"] == 8 * samples(1, 24).num_tokens
    validated = [row["step"] for row in rows if "validation_loss" in row]
    assert validated == [step for step in range(1, 49) if step % 3 == 0 or step == 48]
    rates = [row["learning_rate"] for row in rows]
    peak = rates.index(max(rates))
    assert 0 < rates[0] < rates[peak] == pytest.approx(1e-2)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_phases_follow_each_other_with_fresh_optimizers(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    training(model, plan, tmp_path, supervised=True, warmup_ratio=0.5).run()
    rows = steps_of(tmp_path)
    assert [row["phase"] for row in rows] == ["lm"] * 6 + ["sft"] * 6
    assert [row["step"] for row in rows] == list(range(1, 13))
    tokens = [row["tokens"] for row in rows]
    assert tokens == sorted(tokens)
    assert tokens[-1] == samples(1, 24).num_tokens + 2 * samples(3, 10).num_tokens
    rates = [row["learning_rate"] for row in rows]
    assert rates[5] < rates[2] == 1e-2 and rates[6] == 5e-3, "each phase has its own schedule"
    counted = json.loads((tmp_path / "trainable.json").read_text())
    assert counted["texts"] == {
        "lm/data": ["the standard library's train split"],
        "lm/validation": ["the standard library's validation split"],
        "sft/data": ["the standard questions' train split"],
    }


def test_a_loss_is_the_mean_over_targets(tmp_path: Path) -> None:
    """Each sample alone, without padding: neither prompts nor first tokens are targets."""
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    trained = training(model, plan, tmp_path, supervised=True)
    rows = trained.tokens["sft/data"]
    found = trained._backward(rows, 4)["loss"].item()
    losses = []
    for sample, prompt in zip(rows.samples, rows.prompts, strict=True):
        with torch.no_grad():
            logits = trained.model(torch.tensor([sample])).logits[0].double()
        logarithms = logits.log_softmax(dim=-1)
        losses += [-logarithms[at - 1, sample[at]].item() for at in range(prompt, len(sample))]
    assert len(losses) == rows.num_targets < rows.num_tokens - len(rows.samples)
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    trained = training(model, plan, tmp_path)  # 24 samples, 4 in a step
    steps = [trained._rows("lm", step).samples for step in range(12)]
    assert all(len(step) == 4 for step in steps)
    epochs = [[one for step in steps[start : start + 6] for one in step] for start in (0, 6)]
    every = sorted(trained.tokens["lm/data"].samples)
    assert sorted(epochs[0]) == sorted(epochs[1]) == every and epochs[0] != epochs[1]
    again = training(model, plan, tmp_path)
    assert [again._rows("lm", step).samples for step in range(12)] == steps, "a seed fixes it"


@pytest.mark.parametrize("kind", PLANS)
def test_accumulated_gradients_are_the_large_batch(kind: str, tmp_path: Path) -> None:
    """Samples differ in length: a mean of the forwards' means would be another gradient."""
    plan = compressed(kind, tmp_path)
    found = []
    for size, times in ((16, 1), (4, 4), (3, 6)):
        model = load(tmp_path / "compressed", dtype="float32")
        trained = training(
            model, plan, tmp_path, batch_size=size, gradient_accumulation=times
        )  # fmt: skip
        rows = trained.tokens["lm/data"].take(range(16))
        loss = trained._backward(rows, size)["loss"]
        found.append((loss.item(), {n: p.grad for n, p in trained.trainable.items()}))
    (loss, gradients), *others = found
    assert len({len(row) for row in rows.samples}) > 3
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            error = (other[name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("kind", PLANS)
def test_gradient_checkpointing_computes_the_same(kind: str, tmp_path: Path) -> None:
    """Layers below the lowest trained one are computed once and stand in no graph."""
    plan = compressed(kind, tmp_path)
    found, calls = [], {}
    for checkpointing in (False, True):
        model = load(tmp_path / "compressed", dtype="float32")
        trained = training(model, plan, tmp_path, gradient_checkpointing=checkpointing)
        count = calls[checkpointing] = [0] * len(model.model.layers)
        graph = [None] * len(model.model.layers)
        for index, layer in enumerate(model.model.layers):

            def counting(module, args, output, index=index, count=count) -> None:
                count[index] += 1

            def note(module, args, output, index=index, graph=graph) -> None:
                graph[index] = (output[0] if isinstance(output, tuple) else output).requires_grad

            layer.self_attn.register_forward_hook(counting)
            layer.register_forward_hook(note)
        loss = trained._backward(trained.tokens["lm/data"].take(range(6)), 6)["loss"]
        found.append((loss, {n: p.grad for n, p in trained.trainable.items()}))
        lowest = plan.edits[0].index
        assert graph == [index >= lowest for index in range(4)]
    assert calls[False] == [1, 1, 1, 1]
    assert calls[True] == [2 if index >= lowest else 1 for index in range(4)]
    (loss, gradients), (other_loss, other) = found
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[name], other[name]) for name in gradients)


def test_a_family_without_checkpointing_says_so(tmp_path: Path) -> None:
    plan = compressed("prune", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"finetune\.gradient_checkpointing=false"):
        training(model, plan, tmp_path, gradient_checkpointing=True)


def test_bfloat16_computes_in_it_and_trains_in_float32(tmp_path: Path) -> None:
    plan = compressed("condense", tmp_path)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = load(tmp_path / "compressed", dtype="float32" if dtype == "float32" else "auto")
        trained = training(model, plan, tmp_path, dtype=dtype, gates=True)
        seen = set()
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda m, a, output, seen=seen: seen.add(output.dtype))
        trained.run()
        assert seen == {getattr(torch, dtype)}
        assert {p.dtype for p in trained.trainable.values()} == {torch.float32}
        losses[dtype] = [row["loss"] for row in steps_of(tmp_path)]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_the_report_line_counts_what_trains(tmp_path: Path, caplog) -> None:
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    total = sum(parameter.numel() for parameter in model.parameters())
    with caplog.at_level(logging.INFO):
        training(model, plan, tmp_path).run()
    number = 2 * 3 * 32 * 56
    share = f"{100 * number / total:.2f} %"
    assert f"fine-tuning trains {number:,} of {total:,} parameters ({share})" in caplog.text


@pytest.mark.parametrize("part", ["data", "validation"])
def test_a_model_that_gives_nan_is_not_told_to_learn_slower(part: str, tmp_path: Path) -> None:
    """One token's embedding is NaN: the documents before its first one are not to blame."""
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    made = training(model, plan, tmp_path)
    text = made.tokens[f"lm/{part}"]
    others = {token for sample in made.tokens["lm/validation"].samples for token in sample}
    rows = (sample[1:] for sample in text.samples)
    token = next(t for row in rows for t in row if part == "validation" or t not in others)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    with pytest.raises(NotFinite) as raised:
        made.run()
    message = str(raised.value)
    (told,) = re.findall(r"document (\d+) of finetune\.phases\.lm\.(\w+)", message)
    assert told[1] == part
    assert token in text.samples[int(told[0])]
    assert "after 0 steps" in message and "learning_rate" not in message


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_divergence_is_reported_with_the_way_out(
    spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What began finite and is not later: the learning rate is to blame, and no weight moves."""
    plan = compressed("condense", tmp_path)
    model = load(tmp_path / "compressed", dtype="float32")
    made = training(model, plan, tmp_path)
    losses, before = made.tuning.losses, {}

    def diverging(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = losses(batch)
        if made.done == 2 and torch.is_grad_enabled():
            before.update({name: p.detach().clone() for name, p in made.trainable.items()})
            if spoilt == "loss":
                return {key: value * torch.nan for key, value in found.items()}
            found["loss"].register_hook(lambda gradient: gradient * torch.inf)
        return found

    monkeypatch.setattr(made.tuning, "losses", diverging)
    with pytest.raises(UserError, match=r"lower finetune\.phases\.lm\.learning_rate") as raised:
        made.run()
    assert f"the {'norm of the ' if spoilt == 'gradient' else ''}{spoilt} is NaN after 2 steps" in (
        str(raised.value)
    )
    for name, parameter in made.trainable.items():
        assert torch.equal(parameter, before[name]), "nothing computed is lost"


PROCESS = """
import sys
from pathlib import Path
import torch
import trainings
torch.set_num_threads(1)
trainings.train_one(Path(sys.argv[1]))
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Started as torchrun does it: the same steps, each process on its half of every batch."""
    plan = compressed("condense", tmp_path)
    (tmp_path / "edits.json").write_text(json.dumps([edit.to_json() for edit in plan.edits]))
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    started = start_two(PROCESS, str(two))
    train_one(one)
    assert [process.wait(timeout=500) for process in started] == [0, 0]
    losses, others = ([row["loss"] for row in steps_of(folder)] for folder in (one, two))
    assert others == pytest.approx(losses, rel=1e-4)
    assert len(rows_of(one)) == len(rows_of(two)) == 14
    weight, other = (torch.load(folder / "weight.pt") for folder in (one, two))
    # Adam amplifies the rounding of gradients near 0 to a step's size; few are.
    difference = (weight - other).abs()
    assert difference.mean() < 1e-5 < (weight.std() / 100)


def test_a_phase_may_count_in_steps(tmp_path: Path) -> None:
    """More than an epoch has: then every epoch has its own order, as with epochs."""
    assert [Phase(None, epochs=3, batch_size=4).steps(n) for n in (4, 5)] == [3, 6]
    assert Phase(None, epochs=3, batch_size=4, num_steps=7).steps(1000) == 7
    found = []
    for options in ({"epochs": 2}, {"num_steps": 2 * 3}):
        plan = compressed("prune", tmp_path)
        model = load(tmp_path / "compressed", dtype="float32")
        (folder := tmp_path / str(len(found))).mkdir()
        trained = training(model, plan, folder, batch_size=8, **options)
        trained.run()
        found.append((trained.done, model.state_dict()))
    (steps, weights), (other_steps, others) = found
    assert steps == other_steps
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
