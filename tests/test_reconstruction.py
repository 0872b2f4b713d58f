"""Sets of experts: errors, leave_one_out and naee against copies of the model that are pruned."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from families import tiny_batch, tiny_model
from torch import Tensor, nn

from moe_lab.methods.metrics.leave_one_out import LeaveOneOut
from moe_lab.methods.metrics.naee import Naee, eliminated, num_eliminations, num_subsets, subsets
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models import routers
from moe_lab.models.editing import prune_layer
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile import all_experts
from moe_lab.profile.all_experts import AllExperts, ExpertSample, can_keep
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError

FAMILIES = ["qwen2_moe", "mixtral", "deepseek_v3"]
LAYER = 2


class Case:
    """A model in float64, its batches (with padding), statistics, and inputs of one MoE block."""

    def __init__(self, family: str, **changes: object):
        self.model = tiny_model(family, **changes).double()
        self.model.set_experts_implementation("eager")  # the default one knows no float64
        self.batches = [tiny_batch(seed=seed) for seed in (0, 1)]
        self.statistics = collect_statistics(self.model, self.batches)
        self.infos = {layer.info.index: layer.info for layer in self.statistics}

    def profile(self) -> Profile:
        return Profile(self.statistics, lambda number=None: LayerStream(self.model, self.batches))

    @property
    def exact(self) -> float:
        """The relative error of sums in float64, but for routers that compute in float32."""
        return 1e-7 if self.model.config.model_type == "deepseek_v3" else 1e-10

    @functools.cache  # noqa: B019
    def inputs(self, index: int) -> Tensor:
        """What the block of a layer gets, valid tokens only."""
        found = []
        block = {layer.info.index: layer for layer in moe_layers(self.model)}[index].block
        handle = block.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        with torch.no_grad():
            for batch in self.batches:
                self.model(**batch)
        handle.remove()
        valid = [batch["attention_mask"].bool() for batch in self.batches]
        return torch.cat([x[mask] for x, mask in zip(found, valid, strict=True)])


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> Case:
    return Case(request.param)


@torch.no_grad()
def routed_output(model: nn.Module, index: int, x_TD: Tensor) -> Tensor:
    """What a block adds beside its shared expert."""
    layer = {layer.info.index: layer for layer in moe_layers(model)}[index]
    out = hidden_of(layer.block(x_TD[None]))[0]
    if layer.shared is not None:
        gate = 1.0 if layer.shared_gate is None else layer.shared_gate(x_TD).sigmoid()
        out = out - gate * layer.shared(x_TD)
    return out


def pruned(model: nn.Module, index: int, kept: Sequence[int]) -> nn.Module:
    changed = copy.deepcopy(model)
    prune_layer({layer.info.index: layer for layer in moe_layers(changed)}[index], list(kept))
    return changed


def slow_error(case: Case, index: int, kept: Sequence[int]) -> tuple[float, float]:
    """Of a copy of the model that is really pruned, on the same inputs."""
    x_TD = case.inputs(index)
    intact = routed_output(case.model, index, x_TD)
    changed = routed_output(pruned(case.model, index, kept), index, x_TD)
    return distances(changed, intact)


def distances(changed: Tensor, intact: Tensor) -> tuple[float, float]:
    squared = [float(((a - b) ** 2).sum()) for a, b in zip(changed, intact, strict=True)]
    cosine = [
        1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(changed, intact, strict=True)
    ]
    return sum(squared) / len(squared), sum(cosine) / len(cosine)


def some_sets(case: Case, index: int) -> list[tuple[int, ...]]:
    """Sets of several sizes that the layer's router can work with."""
    info = case.infos[index]
    sizes = (4, 6, 8) if info.groups > 1 else (info.top_k, 5, 7, 8)
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        every = list(subsets(info, size))
        found += [every[i] for i in torch.randperm(len(every), generator=generator)[:3].tolist()]
    return found


def test_error_is_that_of_a_pruned_copy(case: Case) -> None:
    sample = ExpertSample(LayerStream(case.model, case.batches))
    for index in (1, LAYER):
        sets = some_sets(case, index)
        with sample.open(index) as experts:
            assert experts.num_tokens == len(case.inputs(index))
            for kept, found in zip(sets, experts.errors(sets), strict=True):
                assert (found.mse, found.cosine) == pytest.approx(
                    slow_error(case, index, kept), rel=case.exact, abs=case.exact
                ), kept
                again = experts.error(kept)
                assert (again.mse, again.cosine) == pytest.approx((found.mse, found.cosine))
            assert experts.error(range(8)).mse == 0


def routed_with_logits_masked(layer, x_TD: Tensor, kept: Sequence[int]) -> Tensor:
    """The routed sum, token by token, of each family's router written out with -inf logits."""
    gone = [expert for expert in range(8) if expert not in kept]
    family, router = layer.info.family, layer.router
    logits = x_TD @ router.weight.T
    logits[:, gone] = -torch.inf
    if family == "deepseek_v3":
        score = logits.sigmoid()
        choice = score + router.e_score_correction_bias
        choice[:, gone] = -torch.inf
        groups = choice.view(-1, 2, 4)
        best = groups.topk(2, dim=-1)[0].sum(dim=-1).argmax(dim=-1)
        choice[torch.arange(8) // 4 != best[:, None]] = -torch.inf
    else:
        score = choice = logits.softmax(dim=-1)
    index = choice.topk(layer.info.top_k, dim=-1)[1]
    weight = score.gather(1, index)
    if family in ("mixtral", "deepseek_v3"):
        weight = weight / weight.sum(dim=-1, keepdim=True)
    if family == "deepseek_v3":
        weight = weight * 2.5
    experts, rows = layer.experts, []
    for x, indices, weights in zip(x_TD, index.tolist(), weight, strict=True):
        row = torch.zeros_like(x)
        for expert, share in zip(indices, weights, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            row += share * (experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
def slow_masked_error(case: Case, index: int, kept: Sequence[int]) -> tuple[float, float]:
    layer = {layer.info.index: layer for layer in moe_layers(case.model)}[index]
    x_TD = case.inputs(index)
    every = routed_with_logits_masked(layer, x_TD, range(8))
    return distances(routed_with_logits_masked(layer, x_TD, kept), every)


def test_error_is_that_of_masked_logits(case: Case) -> None:
    # Families make their router's probabilities in float32 whatever the model computes in.
    with ExpertSample(LayerStream(case.model, case.batches)).open(LAYER) as experts:
        for kept in some_sets(case, LAYER):
            found = experts.error(kept)
            assert (found.mse, found.cosine) == pytest.approx(
                slow_masked_error(case, LAYER, kept), rel=1e-4, abs=1e-6
            )


def test_masking_a_router_is_restricting_it(case: Case) -> None:
    layer = {layer.info.index: layer for layer in moe_layers(case.model)}[LAYER]
    x_TD = case.inputs(LAYER)
    before = [part.clone() for part in layer.router(x_TD)]
    for kept in some_sets(case, LAYER):
        with routers.restricted_layer(layer, kept):
            _, weight, index = layer.router(x_TD)
        with routers.masked_layer(layer, kept):
            _, masked_weight, masked_index = layer.router(x_TD)
        order, masked_order = index.argsort(dim=1), masked_index.argsort(dim=1)
        assert torch.equal(index.gather(1, order), masked_index.gather(1, masked_order))
        torch.testing.assert_close(
            weight.gather(1, order), masked_weight.gather(1, masked_order), rtol=1e-6, atol=1e-9
        )
    assert all(torch.equal(a, b) for a, b in zip(before, layer.router(x_TD), strict=True))


def test_a_router_that_cannot_be_masked_is_refused() -> None:
    layer = moe_layers(tiny_model("mixtral"))[0]
    weight = layer.router.weight
    own = lambda x: (x @ weight.T, torch.ones(len(x), 2), torch.zeros(len(x), 2).long())  # noqa: E731
    layer.router.forward = own
    with pytest.raises(UserError, match="cannot be masked"), routers.masked_layer(layer, [0, 1]):
        layer.router(torch.zeros(3, 32))


# --------------------------------------------------------------------------- leave_one_out


@pytest.mark.parametrize("measure", ["mse", "cosine"])
def test_leave_one_out_is_brute_force(case: Case, measure: str) -> None:
    scores = LeaveOneOut(measure).scores(case.profile())
    assert len(scores) == len(case.statistics)
    for layer, score in zip(case.statistics, scores, strict=True):
        index = layer.info.index
        for gone in range(8):
            kept = [expert for expert in range(8) if expert != gone]
            slow = slow_error if can_keep(layer.info, kept) else slow_masked_error
            expected = slow(case, index, kept)[measure == "cosine"]
            exact = case.exact if slow is slow_error else 1e-4
            assert float(score[gone]) == pytest.approx(expected, rel=exact, abs=exact)
        assert (score[layer["count"] > 0] > 0).all()


def test_two_experts_in_a_group() -> None:
    case = Case("deepseek_v3", n_group=4, topk_group=2)
    score = LeaveOneOut().scores(case.profile())[0]
    assert torch.isfinite(score).all() and (score > 0).any()
    layer = moe_layers(case.model)[0]
    with routers.masked_layer(layer, [0, 2, 3, 4, 5, 6, 7]):
        index = layer.router(case.inputs(layer.info.index))[2]
    assert not ((index == 0) | (index == 1)).any()


# --------------------------------------------------------------------------- naee


def slow_greedy(case: Case, index: int) -> list[int]:
    """Backward elimination by pruning copies, one expert of each group in turn."""
    info = case.infos[index]
    slow = slow_error if info.groups == 1 else slow_masked_error
    kept, removed, size = list(range(8)), [], 8 // info.groups
    while len(kept) > (2 * info.groups if info.groups > 1 else info.top_k):
        done: list[int] = []
        while len(done) < info.groups:
            values = {}
            for gone in sorted(kept, reverse=True):
                if gone // size not in [expert // size for expert in done]:
                    values[gone] = slow(case, index, [e for e in kept if e != gone])[0]
            best = min(values, key=values.__getitem__)
            kept.remove(best)
            done.append(best)
        removed += done
    return removed


def test_naee_is_the_best_of_all_pruned_copies(case: Case) -> None:
    number = 6 if case.infos[LAYER].groups > 1 else 5
    numbers = dict.fromkeys(case.infos, number)
    metric = Naee()
    chosen = metric.choose(case.profile(), numbers)
    assert list(chosen) == list(case.infos)
    every = list(subsets(case.infos[LAYER], number))
    assert len(every) == num_subsets(case.infos[LAYER], number) == len(set(every))
    values = {kept: slow_error(case, LAYER, kept)[0] for kept in every}
    assert values[chosen[LAYER]] == min(values.values())
    legal = [c for c in itertools.combinations(range(8), number) if can_keep(case.infos[LAYER], c)]
    assert every == legal
    assert metric.notes(list(case.infos.values()), numbers)["naee"][str(LAYER)] == (
        f"exhaustive, {len(every)} subsets"
    )


def test_elimination_tries_as_many_subsets_as_it_says(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []
    errors = AllExperts.errors
    monkeypatch.setattr(
        AllExperts, "errors", lambda self, sets: tried.extend(sets) or errors(self, sets)
    )
    with ExpertSample(LayerStream(case.model, case.batches)).open(LAYER) as experts:
        with caplog.at_level(logging.INFO):
            eliminated(experts)
        assert len(tried) == num_eliminations(experts.info) > 8
    assert f"layer {LAYER}: one expert after another goes, by trying {len(tried)} " in caplog.text


def test_greedy_naee_is_the_slow_one(case: Case) -> None:
    metric = Naee(max_subsets=0)
    order = slow_greedy(case, LAYER)
    place = list(case.infos).index(LAYER)
    score = metric.scores(case.profile())[place]
    assert sorted(range(8), key=lambda e: (float(score[e]), e))[: len(order)] == order
    assert {float(score[e]) for e in range(8) if e not in order} == {float(len(order))}
    steps = case.infos[LAYER].groups
    for removed in range(0, len(order) + 1, steps):
        chosen = metric.choose(case.profile(), {LAYER: 8 - removed})
        assert chosen == {LAYER: tuple(e for e in range(8) if e not in order[:removed])}
    assert metric.notes([case.infos[LAYER]], {LAYER: 4})["naee"][str(LAYER)].startswith("greedy")


# --------------------------------------------------------------------------- invariances


def errors_of(model: nn.Module, batches: list[dict]) -> list[tuple[float, float]]:
    sets = [(0, 1, 4, 5), (2, 3, 6, 7), (0, 1, 2, 4, 5, 6)]
    with ExpertSample(LayerStream(model, batches)).open(LAYER) as experts:
        return [(error.mse, error.cosine) for error in experts.errors(sets)]


def test_batch_size_padding_and_chunks_do_not_matter(case: Case, monkeypatch) -> None:
    together = errors_of(case.model, case.batches)
    alone = []
    for batch in case.batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = {"input_ids": ids[None, : mask.sum()], "attention_mask": mask[None, : mask.sum()]}
            alone.append(row)
    monkeypatch.setattr("moe_lab.profile.all_experts.TOKENS_AT_ONCE", 7)
    for found, expected in zip(errors_of(case.model, alone), together, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_permuting_the_experts_permutes_the_scores(case: Case) -> None:
    changed = copy.deepcopy(case.model)
    order = [2, 0, 3, 1, 7, 5, 4, 6]  # within each group
    for layer in moe_layers(changed):
        prune_layer(layer, order)
    profile = case.profile()
    theirs = replace(profile, open_stream=lambda number: LayerStream(changed, case.batches))
    for metric in (LeaveOneOut(), Naee(max_subsets=0)):
        for score, other in zip(metric.scores(profile), metric.scores(theirs), strict=True):
            torch.testing.assert_close(other, score[order], rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------- what is asked


def test_answers_are_remembered(caplog: pytest.LogCaptureFixture) -> None:
    case = Case("mixtral")
    streams, answers = [], {}

    def open_stream(number: int | None) -> LayerStream:
        streams.append(number)
        return LayerStream(case.model, case.batches)

    def remember(identity, work, code):
        key = json.dumps(identity, sort_keys=True)
        if key not in answers:
            answers[key] = json.dumps(work())
        return json.loads(answers[key])

    profile = Profile(case.statistics, open_stream, remember=remember)
    with caplog.at_level(logging.INFO):
        first = LeaveOneOut(num_samples=5).scores(profile)
    assert streams == [5] and "8 experts x 48 tokens" in caplog.text
    again = LeaveOneOut(num_samples=5).scores(profile)
    LeaveOneOut("cosine", num_samples=5).scores(profile)
    assert streams == [5]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for ratio in (0.25, 0.5):
        Prune(Naee(), Uniform(ratio)).plan(profile)
    assert streams == [5, 128, 128, 128]  # the order once, and the subsets of each number


def test_the_sample_lies_in_the_cache_and_leaves_it() -> None:
    case = Case("mixtral")
    stream = LayerStream(case.model, case.batches)
    sample = ExpertSample(stream)
    with sample.open(LAYER) as experts:
        chunk = next(experts.chunks())
        tokens = len(chunk.x_TD)
        assert chunk.outputs_ETD.shape == (8, tokens, 32) and chunk.index_TK.shape == (tokens, 2)
        assert stream.cache.held > chunk.outputs_ETD.numel() * 8
        expected = routed_output(case.model, LAYER, chunk.x_TD)
        torch.testing.assert_close(chunk.routed_TD, expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="3 comes next"), sample.open(LAYER):
        pass
    states = sum(valid.numel() for valid in stream.valid) * 32 * 8 * 2  # input and moving ones
    assert stream.cache.held == states


def test_outputs_are_copied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tokens' outputs go to float64 at a time."""
    case, sets = Case("mixtral"), [[0, 1, 2, 4, 6, 7], [3, 5]]
    found = []
    for numbers in (2**24, 3 * 8 * 32, 1):
        monkeypatch.setattr(all_experts, "NUMBERS_AT_ONCE", numbers)
        with ExpertSample(LayerStream(case.model, case.batches)).open(LAYER) as experts:
            found.append(experts.errors(sets))
    assert found[0][0].mse > 0
    for errors in found[1:]:
        for one, other in zip(errors, found[0], strict=True):
            assert one.mse == pytest.approx(other.mse, rel=1e-12)
            assert one.cosine == pytest.approx(other.cosine, rel=1e-9)


def test_refusals() -> None:
    info = Case("mixtral").infos[1]
    with pytest.raises(UserError, match="mse, cosine"):
        LeaveOneOut("kl").check([info])
    with pytest.raises(UserError, match="num_samples=0"):
        LeaveOneOut(num_samples=0).check([info])
    with pytest.raises(UserError, match="none can be left out"):
        LeaveOneOut().check([replace(info, num_experts=2)])
    with pytest.raises(UserError, match="max_subsets=-1"):
        Naee(max_subsets=-1).check([info])
    with pytest.raises(UserError, match="num_samples=0"):
        Naee(num_samples=0).check([info])
