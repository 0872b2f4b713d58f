"""The teacher on disk is the intact model, and the divergence from it is the formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from distilling import COMPUTE, TEXTS, reading, slow_rows, taught, teach
from torch.nn import functional as F

from moe_lab.data.tokens import Tokens
from moe_lab.finetune import teacher
from moe_lab.finetune.teacher import IDS, LOG_PROBABILITIES, Teacher
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.types import NotFinite


@pytest.mark.parametrize("text", TEXTS)
def test_the_teacher_is_the_intact_model(text: str, home: Path) -> None:
    """In any order, and without what is no target: each row against one sample's own forward."""
    tokens = TEXTS[text].shuffled(5)
    exact = slow_rows(load(home / "dense"), tokens)
    assert len(exact) == tokens.num_targets
    whole = reading(home, "whole").of(tokens)
    assert whole.keys() == {LOG_PROBABILITIES}
    torch.testing.assert_close(whole[LOG_PROBABILITIES].double(), exact, rtol=0, atol=1e-5)
    for name, temperature in (("few", 1.0), ("warm", 2.0)):
        exact = slow_rows(load(home / "dense"), tokens, temperature)
        found = reading(home, name).of(tokens)
        assert found[IDS].dtype == torch.int32
        for row, (ids, kept) in enumerate(zip(found[IDS], found[LOG_PROBABILITIES], strict=True)):
            order = sorted(range(96), key=lambda token: -exact[row, token].item())
            assert set(ids.tolist()) == set(order[:8])
            expected = [exact[row, token].item() for token in ids.tolist()]
            others = math.log(sum(exact[row, token].exp().item() for token in order[8:]))
            assert kept.tolist() == pytest.approx([*expected, others], abs=1e-5)


def test_shards_batches_and_layers_change_nothing(home: Path, monkeypatch) -> None:
    """Many small files, one row at a time, other batches, and one layer in memory at a time."""
    monkeypatch.setattr(teacher, "SHARD_BYTES", 1500)
    monkeypatch.setattr(teacher, "CHUNK_VALUES", 3 * 96)
    for name, compute in (("single", {"batch_size": 1}), ("layerwise", {"layerwise": True})):
        teach(home, name, 8, 1.0, **compute)
        files = list((home / name).glob("*.safetensors"))
        assert len(files) > 5 and max(file.stat().st_size for file in files) < 2500
        turned = Teacher(home / name, list(TEXTS.values())[::-1])
        for tokens in TEXTS.values():
            expected, found = reading(home, "few").of(tokens), turned.of(tokens)
            order = [rows[IDS].sort(dim=1) for rows in (expected, found)]
            assert torch.equal(order[0].values, order[1].values)
            a, b = (
                rows[LOG_PROBABILITIES].gather(1, sort.indices)
                for rows, sort in zip((expected, found), order, strict=True)
            )
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_sample_without_targets_has_no_rows(home: Path, tmp_path: Path) -> None:
    tokens = Tokens(((5,), (5, 6, 7), (8, 9)), pad_id=0, prompts=(1, 2, 2))
    dense = Checkpoint(home / "dense", "float32")
    teacher.write_teacher(dense, [tokens], 4, 1.0, COMPUTE, tmp_path)
    found = Teacher(tmp_path, [tokens])
    assert [len(found.of(tokens.take([i]))[IDS]) for i in range(3)] == [0, 1, 0]
    assert len(found.of(tokens)[LOG_PROBABILITIES]) == 1
    size = (tmp_path / "0.safetensors").stat().st_size
    assert 0 <= size - teacher.teacher_bytes([tokens], 96, 4) < 300


def rows_of_two(number: int = 7, vocabulary: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, number, vocabulary, generator=generator) * 3
    return both[0], both[1].requires_grad_()


def slow_divergence(p_logits: list, q_logits: list, top_k: int | None, temperature: float) -> float:
    """T^2 KL of one row, class by class in Python."""

    def shares(logits: list) -> list[float]:
        exponentials = [math.exp(value / temperature) for value in logits]
        return [value / sum(exponentials) for value in exponentials]

    p, q = shares(p_logits), shares(q_logits)
    if top_k is not None:
        order = sorted(range(len(p)), key=lambda token: -p[token])
        kept, rest = order[:top_k], order[top_k:]
        p, q = ([one[i] for i in kept] + [sum(one[i] for i in rest)] for one in (p, q))
    total = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 11])
def test_the_divergence_is_the_formula(top_k: int | None, temperature: float) -> None:
    p_logits, q_logits = rows_of_two()
    known = taught(p_logits, top_k, temperature)
    found = teacher.divergence(known, q_logits, temperature)
    for row, value in enumerate(found.tolist()):
        p, q = p_logits[row].tolist(), q_logits[row].tolist()
        assert value == pytest.approx(slow_divergence(p, q, top_k, temperature), abs=1e-5)
    assert torch.equal(teacher.divergence(known, p_logits, temperature), torch.zeros(len(p_logits)))
    exact = F.kl_div(
        (q_logits / temperature).log_softmax(-1), (p_logits / temperature).log_softmax(-1),
        reduction="none", log_target=True,
    ).sum(-1) * temperature**2  # fmt: skip
    assert (found >= 0).all() and (found <= exact + 1e-5).all()
    if top_k in (None, 11):  # one token left over is a class of its own
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), q_logits, retain_graph=True)
        (expected,) = torch.autograd.grad(exact.sum(), q_logits)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    else:
        assert (found < exact - 1e-4).all()


def test_the_divergence_has_the_gradient_of_its_value() -> None:
    p_logits, q_logits = (rows.detach().double() for rows in rows_of_two())
    for top_k in (None, 1, 4):
        known = taught(p_logits, top_k, 2.0)
        q_logits.requires_grad_(True)
        assert torch.autograd.gradcheck(
            lambda q, known=known: teacher.divergence(known, q, 2.0), q_logits
        )


def test_the_others_are_told_apart_from_nothing() -> None:
    """A student that puts all its probability on tokens that the teacher does not name is far."""
    p_logits = torch.tensor([[4.0, 3.0, 0.0, 0.0]])
    far = torch.tensor([[0.0, 0.0, 60.0, 0.0]])
    assert teacher.divergence(taught(p_logits, 2, 1.0), far, 1.0).item() > 40
    certain = torch.tensor([[200.0, 0.0, 0.0, 0.0]])  # the others have probability 0 in float32
    assert torch.isfinite(teacher.divergence(taught(certain, 1, 1.0), far, 1.0)).all()


@pytest.mark.parametrize("top_k", [8, None])
def test_a_teacher_that_gives_nan_names_the_document(
    top_k: int | None, home: Path, tmp_path: Path
) -> None:
    """A token's embedding is NaN: the first text of those that have it, whatever their order."""
    model = load(home / "dense")
    token = TEXTS["sft/data"].samples[4][-2]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(NotFinite, match=r"document \d+ of the tuning text") as raised:
        teach(tmp_path, "taught", top_k, 1.0)
    number = int(str(raised.value).split("document ")[1].split()[0])
    assert any(
        number < len(text.samples) and token in text.samples[number][:-1] for text in TEXTS.values()
    )
    assert not (tmp_path / "taught" / teacher.ROWS).exists(), "a teacher by halves is none"
