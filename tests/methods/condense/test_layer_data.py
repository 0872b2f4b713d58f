"""What a condensed layer is fitted to, token by token."""

from __future__ import annotations

import pytest
import torch
from fitted_layers import Subject, plan_of, seen_at, subject_of

from moe_lab.methods.condense import layer_data
from moe_lab.methods.condense.layer_data import LayerData, Walk
from moe_lab.models.layers import moe_layers
from moe_lab.profile.documents import held_out


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of("qwen2_moe")


@torch.no_grad()
def data_at(subject: Subject, index: int, token_weight: str = "output") -> LayerData:
    return Walk(subject.profile.open_stream(), "none", token_weight).data(index)


def test_every_token_is_there_once_and_whole_documents_are_held_out(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_data, "TOKENS_OF_A_CHUNK", 7)
    data, seen = data_at(subject, 2), seen_at(subject.model, subject.batches, 2)
    x_TD = torch.cat([chunk.x_TD for chunk in data.chunks()])
    torch.testing.assert_close(x_TD, seen.x_TD)
    target_TD = torch.cat([chunk.target_TD for chunk in data.chunks()])
    torch.testing.assert_close(target_TD, seen.y_TD, rtol=1e-6, atol=1e-9)
    assert max(len(chunk.x_TD) for chunk in data.chunks()) == 7
    lengths = [int(batch["attention_mask"].sum()) for batch in subject.batches]
    held = held_out(range(len(lengths)))
    expected_T = torch.cat([torch.full((n,), i in held) for i, n in enumerate(lengths)])
    assert torch.equal(torch.cat([chunk.held_T for chunk in data.chunks()]), expected_T)
    for part in (True, False):
        found_TD = torch.cat([chunk.x_TD for chunk in data.chunks(part)])
        torch.testing.assert_close(found_TD, seen.x_TD[expected_T == part])


def test_tokens_weigh_by_the_state_behind_the_layer_or_alike(subject: Subject) -> None:
    seen = seen_at(subject.model, subject.batches, 3)
    expected_T = 1 / seen.leaving_TD.square().mean(dim=1)
    weight_T = torch.cat([chunk.weight_T for chunk in data_at(subject, 3).chunks()])
    torch.testing.assert_close(weight_T, expected_T)
    alike_T = torch.cat([chunk.weight_T for chunk in data_at(subject, 3, "none").chunks()])
    assert alike_T.tolist() == [1.0] * len(expected_T)


@torch.no_grad()
def test_nothing_is_missing_behind_layers_that_are_not_condensed(subject: Subject) -> None:
    """The residual is what the intact layer adds, as long as nothing before it has changed."""
    walk = Walk(subject.profile.open_stream(), "residual", "output")
    walk.condense(1, None)
    seen = seen_at(subject.model, subject.batches, 2)
    target_TD = torch.cat([chunk.target_TD for chunk in walk.data(2).chunks()])
    torch.testing.assert_close(target_TD, seen.y_TD, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_memory_is_given_back(subject: Subject) -> None:
    walk = Walk(subject.profile.open_stream(), "none", "output")
    walk.behind.move_to(1)
    before = walk.stream.cache.held
    data = walk.data(1)
    assert walk.stream.cache.held > before
    data.close()
    assert walk.stream.cache.held == before


def test_the_model_is_left_as_it_was(subject: Subject) -> None:
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    plan_of(subject, refit="down_proj", layers=[1, 2])
    after = subject.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(moe_layers(subject.model)) == 3
