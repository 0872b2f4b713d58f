"""Losses of a recipe at work: of targets alone, and shared with the intact model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from distilling import TEXTS, curve, slow_rows, training
from families import tiny_model
from running import run_killed
from safetensors.torch import load_file
from trainings import samples

from moe_lab.data.tokens import IGNORED
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.tuning import next_token_loss
from moe_lab.models.checkpoint import load


def test_padding_and_prompts_enter_no_loss() -> None:
    model = tiny_model("qwen2_moe")
    rows = samples(3, 5, prompts=True)
    with torch.no_grad():
        padded = next_token_loss(model, rows.labelled())
        other = dataclasses.replace(rows, pad_id=7).labelled()
        assert torch.equal(padded, next_token_loss(model, other))
        total, targets = 0.0, 0
        for ids, prompt in zip(rows.samples, rows.prompts, strict=True):
            row = torch.tensor([ids])
            surprise = -model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
            total += surprise[max(0, prompt - 1) :].sum().item()
            targets += len(ids) - prompt
    assert rows.num_targets == targets == int((rows.labelled()["labels"][:, 1:] != IGNORED).sum())
    assert padded.item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("share", "temperature"), [(0.3, 1.0), (1.0, 1.0), (0.5, 2.0)])
def test_the_gradient_is_that_of_the_shared_loss(
    share: float, temperature: float, home: Path, tmp_path: Path
) -> None:
    """Against a plain forward over each sample, without a teacher on disk."""
    known = "warm" if temperature == 2 else "whole"
    options = {"distillation": share, "temperature": temperature}
    done = training(home, tmp_path, known, teacher_top_k=8, **options)
    rows = TEXTS["sft/data"].take(range(6))
    found = done._backward(rows, 3)
    gradients = {name: p.grad.clone() for name, p in done.trainable.items()}
    for parameter in done.trainable.values():
        parameter.grad = None
    p, loss, apart, at = slow_rows(load(home / "dense"), rows, temperature), 0.0, 0.0, 0
    for ids, prompt in zip(rows.samples, rows.prompts, strict=True):
        logits = done.model(torch.tensor([ids])).logits[0]
        for position in range(prompt, len(ids)):
            row, p_row, at = logits[position - 1].double(), p[at].exp(), at + 1
            loss = loss - row.log_softmax(-1)[ids[position]]
            q_row = (row / temperature).softmax(-1)
            if known == "warm":
                kept = p_row.topk(8).indices
                rest = [one.sum() - one[kept].sum() for one in (p_row, q_row)]
                p_row = torch.cat([p_row[kept], rest[0][None]])
                q_row = torch.cat([q_row[kept], rest[1][None]])
            apart = apart + temperature**2 * (p_row * (p_row / q_row).log()).sum()
    (((1 - share) * loss + share * apart) / at).backward()
    assert found["loss"].item() == pytest.approx(loss.item() / at, rel=1e-5)
    assert found["distillation"].item() == pytest.approx(apart.item() / at, rel=1e-4)
    for name, parameter in done.trainable.items():
        error = (gradients[name] - parameter.grad).abs().max()
        assert error <= 1e-4 * parameter.grad.abs().max(), name


def test_accumulated_gradients_are_the_large_batch(home: Path, tmp_path: Path) -> None:
    found = []
    for size in (16, 4, 3):
        done = training(home, tmp_path, "few", distillation=0.5)
        losses = done._backward(TEXTS["lm/data"].take(range(16)), size)
        found.append((losses, {name: p.grad for name, p in done.trainable.items()}))
    (losses, gradients), *others = found
    for other_losses, other in others:
        for name in ("loss", "distillation"):
            assert other_losses[name].item() == pytest.approx(losses[name].item(), rel=1e-6)
        for name, gradient in gradients.items():
            error = (other[name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max(), name


def test_without_distillation_nothing_is_different(home: Path, tmp_path: Path) -> None:
    done = training(home, tmp_path, None, distillation=0.0)
    done.run()
    assert done.tuning.weights == {}
    assert not [key for row in curve(tmp_path) for key in row if "distillation" in key]


def test_resumed_equals_uninterrupted(home: Path, tmp_path: Path, monkeypatch) -> None:
    """To the bit, with a step after the last saved state, and through both phases."""
    results = []
    for name, stop in (("whole", None), ("stopped", 5)):
        (folder := tmp_path / name).mkdir()
        if stop:
            first = training(home, folder, "few", distillation=0.5)
            run_killed(first, stop, save_every=4, monkeypatch=monkeypatch)
            assert int(load_file(folder / finetune_training.STATE)["done"]) == 4
        done = training(home, folder, "few", distillation=0.5)
        done.run()
        results.append((done.model.state_dict(), (folder / "curve.jsonl").read_text()))
    (whole, text), (resumed, resumed_text) = results
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert text == resumed_text
    assert len(text.splitlines()) == 1 + 6 + 1 + 3
