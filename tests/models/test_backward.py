"""A backward pass layer by layer is that of the whole model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from families import ROUTER_KINDS, tiny_batch, tiny_model
from odd_families import ADAPTED, odd_model
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_lab.models.activations import Activations
from moe_lab.models.backward import Backward, LossLabels
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.observing import observe
from moe_lab.models.stream import LayerStream
from moe_lab.types import UserError

BATCHES = [tiny_batch(seed=0), tiny_batch(seed=1, batch=2, length=7)]
FAMILIES = (*ROUTER_KINDS, "gpt_oss", "olmoe")


def targets_of(batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"].bool()
    return mask[:, :-1] & mask[:, 1:]


def whole_model(
    model: PreTrainedModel, labels: list[Tensor]
) -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
    """By (layer, batch): expert, token (of valid ones) and gradient of each pair, by autograd."""
    found, number = {}, sum(len(one) for one in labels)
    for place, batch in enumerate(BATCHES):
        seen = []

        def keep(info, routing, seen=seen) -> None:
            routing.y_SD.retain_grad()
            seen.append((info.index, routing))

        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        with observe(model, keep):  # padding is watched, too: what is kept is the graph's own
            mask = batch["attention_mask"]
            logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits
        picked = logits[:, :-1][targets_of(batch)]
        (F.cross_entropy(picked, labels[place], reduction="sum") / number).backward()
        valid = mask.bool().flatten()
        row = valid.cumsum(0) - 1
        for index, routing in seen:
            pairs = valid[routing.token_S]
            assert (routing.y_SD.grad[~pairs] == 0).all(), "padding has no part in the loss"
            found[index, place] = (
                routing.expert_S[pairs], row[routing.token_S[pairs]], routing.y_SD.grad[pairs]
            )  # fmt: skip
    return found


def text_of(batch: dict[str, Tensor]) -> Tensor:
    return batch["input_ids"][:, 1:][targets_of(batch)]


def compare(backward: Backward, expected: dict, draw: int = 0) -> None:
    seen = {}
    for given in backward.outputs():
        seen[given.index, given.batch] = given
        expert, token, gradient = expected[given.index, given.batch]
        assert torch.equal(given.routing.expert_S, expert)
        assert torch.equal(given.routing.token_S, token)
        scale = gradient.abs().max()
        assert scale > 0
        assert (given.of_draw[draw] - gradient).abs().max() <= 1e-5 * scale
    assert seen.keys() == expected.keys()
    order = [index for index, _ in seen]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_autograd_on_the_whole_model(family: str) -> None:
    model = tiny_model(family)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    expected = whole_model(model, [text_of(batch) for batch in BATCHES])
    compare(Backward(LayerStream(model, BATCHES)), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ADAPTED)
def test_families_with_another_contract(family: str) -> None:
    """Weights inside experts, zero experts, projections around them."""
    model = odd_model(family)
    expected = whole_model(model, [text_of(batch) for batch in BATCHES])
    compare(Backward(LayerStream(model, BATCHES)), expected)


@pytest.mark.parametrize("family", ROUTER_KINDS)
def test_weights_and_states_from_disk(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    expected = whole_model(load(tmp_path), [text_of(batch) for batch in BATCHES])
    source = LayerwiseModel(Checkpoint(tmp_path))
    stream = LayerStream(source, BATCHES, Activations(limit=0, folder=tmp_path))
    compare(Backward(stream), expected)


def drawn(model: PreTrainedModel, labels: LossLabels, positions: list[int] | None = None) -> list:
    backward = Backward(LayerStream(model, BATCHES, positions=positions), labels)
    with torch.no_grad():
        logits = [model(**batch).logits for batch in BATCHES]
    picked = [one[:, :-1][targets_of(b)] for one, b in zip(logits, BATCHES, strict=True)]
    return [list(backward._drawn(place, one)) for place, one in enumerate(picked)]


def test_sampled_labels_are_losses_of_their_own() -> None:
    model, labels = tiny_model("mixtral"), LossLabels("sampled", samples=3, seed=5)
    samples = drawn(model, labels)
    assert not torch.equal(samples[0][0], samples[0][1])
    for draw in range(3):
        expected = whole_model(model, [of_batch[draw] for of_batch in samples])
        compare(Backward(LayerStream(model, BATCHES), labels), expected, draw)


def test_what_is_drawn_follows_seed_and_document() -> None:
    model = tiny_model("mixtral")
    labels = LossLabels("sampled", samples=2, seed=5)
    first, again = drawn(model, labels), drawn(model, labels)
    other = drawn(model, LossLabels("sampled", samples=2, seed=6))
    moved = drawn(model, labels, positions=[4, 1, 2, 3, 0])
    counts = [int(row.sum()) for batch in BATCHES for row in targets_of(batch)]
    for draw in range(2):
        assert torch.equal(first[0][draw], again[0][draw])
        assert not torch.equal(first[0][draw], other[0][draw])
        assert not torch.equal(first[0][draw][: counts[0]], moved[0][draw][: counts[0]])
        assert torch.equal(first[0][draw][counts[0] :], moved[0][draw][counts[0] :])


def test_labels_are_drawn_from_the_models_own_distribution() -> None:
    model = tiny_model("mixtral")
    samples = torch.stack(drawn(model, LossLabels("sampled", samples=4000))[0])
    with torch.no_grad():
        logits = model(**BATCHES[0]).logits
    probability = logits[:, :-1][targets_of(BATCHES[0])].softmax(dim=-1)
    for place in range(3):
        share = samples[:, place].bincount(minlength=96) / 4000
        assert (share - probability[place]).abs().max() < 0.03


def test_the_cost_is_told_before(caplog: pytest.LogCaptureFixture) -> None:
    stream = LayerStream(tiny_model("qwen2_moe"), BATCHES)
    with caplog.at_level(logging.INFO):
        Backward(stream, LossLabels("sampled", samples=3))
    assert "2 forwards and 3 backwards over 5 samples" in caplog.text
    assert "activations: states before every layer" in caplog.text


def test_no_state_is_left_behind() -> None:
    """The cache is as before but for the gradients at the first MoE layer's input."""
    stream = LayerStream(tiny_model("qwen2_moe"), BATCHES)
    held = stream.cache.held
    list(Backward(stream).outputs())
    assert stream.cache.held == 2 * held


def test_impossible_requests() -> None:
    alone = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    with pytest.raises(UserError, match="no next token to predict"):
        Backward(LayerStream(tiny_model("mixtral"), [alone]))
