"""Counting: what the routers chose, against a router of our own, however the data is cut."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import start_two
from families import FAMILIES, tiny_batch, tiny_model
from torch import Tensor

from moe_lab.compute import PROFILES, Compute
from moe_lab.data.tokens import Tokens
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.none import Nothing
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.profile.collect import (
    added,
    collect_statistics,
    load_groups,
    load_statistics,
    reduce,
    save_statistics,
)
from moe_lab.profile.layer import CONSTANTS, LayerStatistics
from moe_lab.stages.plan import plan
from moe_lab.stages.profile import check_profile, profile
from moe_lab.stages.profile import collect_profile as collect_profile
from moe_lab.store import Artifact, Store
from moe_lab.types import UserError

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
# One of each kind of router, and what of the family's config makes it so.
KINDS: dict[str, tuple[str, dict]] = {
    "softmax": ("qwen2_moe", {}),
    "softmax of another family": ("olmoe", {}),
    "renormalised": ("qwen3_moe", {}),
    "renormalised without saying so": ("mixtral", {}),
    "sigmoid with bias": ("glm4_moe", {}),
    "one of two groups": ("deepseek_v3", {}),
    "two of four groups": ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
}
OF_ROUTERS = (
    "tokens count gate_sum gate_square_sum probability_sum pair_count logit_product_sum "
    "entropy_sum rank_count rank_share_sum router_norm weight_abs_sum weight_square_sum "
    "weight_count"
).split()


def samples() -> list[list[int]]:
    """Ten of different lengths."""
    generator = random.Random(0)
    return [[generator.randrange(3, 96) for _ in range(2 + 2 * n)] for n in range(10)]


def batches(size: int, left: bool = False) -> list[dict[str, Tensor]]:
    """The samples in batches of `size`, padded on the right or on the left."""
    found = []
    for start in range(0, 10, size):
        rows = samples()[start : start + size]
        length = max(len(row) for row in rows)
        ids = [[0] * (length - len(row)) + row if left else row + [0] * (length - len(row))
               for row in rows]  # fmt: skip
        mask = (torch.tensor(ids) != 0).long()
        found.append({"input_ids": torch.tensor(ids), "attention_mask": mask})
    return found


def block_inputs(model, data: Iterable[dict[str, Tensor]]) -> dict[int, Tensor]:
    """What enters each MoE block [T, D] in float64, of data tokens, by the model's own layers."""
    caught: dict[int, list[Tensor]] = {}
    found: dict[int, list[Tensor]] = {}
    hooks = []
    for number, decoder in enumerate(model.model.layers):

        def keep(module, args: tuple, number: int = number) -> None:
            caught[number] = args[0].double()

        hooks.append(decoder.mlp.register_forward_pre_hook(keep))
    for batch in data:
        with torch.no_grad():
            model(**batch)
        for number, x_BLD in caught.items():
            found.setdefault(number, []).append(x_BLD[batch["attention_mask"].bool()])
    for hook in hooks:
        hook.remove()
    return {number: torch.cat(parts) for number, parts in found.items()}


def route(config, gate, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, E], full probability [T, E] and weights [T, E], 0 where not chosen; float64."""
    logits_TE = x_TD @ gate.weight.detach().double().T
    if config.model_type in ("glm4_moe", "deepseek_v3"):
        probability_TE = 1 / (1 + torch.exp(-logits_TE))
        choice_TE = probability_TE + gate.e_score_correction_bias.double()
        for row in choice_TE if config.n_group > 1 else ():
            groups = row.view(config.n_group, -1)  # a view: what is written goes into choice_TE
            value = groups.sort(dim=1, descending=True).values[:, :2].sum(dim=1)
            groups[value.sort(descending=True).indices[config.topk_group :]] = -torch.inf
        renormalised, factor = config.norm_topk_prob, config.routed_scaling_factor
    else:
        exponential = torch.exp(logits_TE - logits_TE.amax(dim=1, keepdim=True))
        choice_TE = probability_TE = exponential / exponential.sum(dim=1, keepdim=True)
        renormalised, factor = getattr(config, "norm_topk_prob", True), 1.0
    chosen_TK = choice_TE.sort(dim=1, descending=True).indices[:, : config.num_experts_per_tok]
    is_chosen_TE = torch.zeros_like(choice_TE).scatter(1, chosen_TK, 1.0)
    weight_TE = probability_TE * is_chosen_TE
    if renormalised:
        weight_TE = weight_TE / weight_TE.sum(dim=1, keepdim=True)
    return logits_TE, probability_TE, factor * weight_TE


def expected(config, block, x_TD: Tensor) -> dict[str, Tensor]:
    """All that the router's statistics hold of these tokens, and of the layer's weights."""
    gate, experts = block.gate, block.experts
    weights_E = [
        torch.cat([experts.gate_up_proj[number].flatten(), experts.down_proj[number].flatten()])
        for number in range(8)
    ]
    weights_EW = torch.stack(weights_E).detach().double()
    logits_TE, probability_TE, weight_TE = route(config, gate, x_TD)
    heaviest_TE, order_TE = weight_TE.sort(dim=1, descending=True)
    num_chosen = config.num_experts_per_tok
    share_TE = probability_TE / probability_TE.sum(dim=1, keepdim=True)
    places = [
        [(order_TE[:, place] == expert).sum().item() for expert in range(8)]
        for place in range(num_chosen)
    ]
    return {
        "tokens": torch.tensor([float(len(x_TD))]).double(),
        "count": (weight_TE > 0).sum(dim=0).double(),
        "gate_sum": weight_TE.sum(dim=0),
        "gate_square_sum": weight_TE.square().sum(dim=0),
        "probability_sum": probability_TE.sum(dim=0),
        "pair_count": torch.tensor(
            [
                [((weight_TE[:, one] > 0) & (weight_TE[:, other] > 0)).sum() for other in range(8)]
                for one in range(8)
            ]
        ).double(),
        "logit_product_sum": logits_TE.T @ logits_TE,
        "entropy_sum": -(share_TE * share_TE.log()).sum()[None],
        "rank_count": torch.tensor(places).double(),
        "rank_share_sum": (
            heaviest_TE[:, :num_chosen] / heaviest_TE[:, :num_chosen].sum(dim=1, keepdim=True)
        ).sum(dim=0),
        "router_norm": gate.weight.detach().double().square().sum(dim=1).sqrt(),
        "weight_abs_sum": weights_EW.abs().sum(dim=1),
        "weight_square_sum": weights_EW.square().sum(dim=1),
        "weight_count": torch.tensor([float(weights_EW.shape[1])]).double(),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("only_routers", [False, True])
def test_counts_equal_an_independent_router(kind: str, only_routers: bool) -> None:
    family, changes = KINDS[kind]
    model = tiny_model(family, **changes)
    x = block_inputs(model, batches(3))
    found = collect_statistics(model, batches(3), only_routers)
    assert len(found) >= 3
    for layer in found:
        block = model.model.layers[layer.info.index].mlp
        sums = expected(model.config, block, x[layer.info.index])
        assert set(OF_ROUTERS) == set(sums)
        for name in ("tokens", "count", "rank_count", "pair_count", "weight_count"):
            assert torch.equal(layer[name], sums[name]), name
        for name, value in sums.items():
            torch.testing.assert_close(layer[name], value, rtol=1e-5, atol=1e-5, msg=name)
        assert frequency(layer).tolist() == sums["count"].tolist()
        torch.testing.assert_close(soft_count(layer), sums["probability_sum"], rtol=1e-5, atol=0)


@EACH_FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_routers_pass_gives_what_the_full_pass_gives(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    if family == "gpt_oss":  # the default product over transposed weights rounds otherwise
        model.set_experts_implementation("eager")
    full, alone = (
        collect_statistics(model, batches(3)),
        collect_statistics(model, batches(3), only_routers=True),
    )
    assert [one.info for one in full] == [one.info for one in alone]
    for one, other in zip(full, alone, strict=True):
        assert set(other.sums) == set(OF_ROUTERS) < set(one.sums)
        assert all(torch.equal(one[name], other[name]) for name in OF_ROUTERS)


@EACH_FAMILY
def test_the_routers_pass_ends_at_the_last_router(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    with torch.no_grad():
        before = model(**batch).logits
    computed = []
    layers = moe_layers(model)
    for number, layer in enumerate(layers):
        layer.experts.register_forward_pre_hook(lambda *_, number=number: computed.append(number))
    for module in (model.model.norm, model.lm_head):
        module.register_forward_pre_hook(lambda *_: computed.append("after"))
    collect_statistics(model, [batch], only_routers=True)
    assert computed == list(range(len(layers) - 1))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert computed[-1] == "after", "and no hook of ours is left"


def assert_alike(found: list[LayerStatistics], others: list[LayerStatistics], rtol: float) -> None:
    """Counts to the bit; soft counts and the other sums of the router to rounding."""
    assert len(found) == len(others) > 0
    for one, other in zip(found, others, strict=True):
        for name in ("tokens", "count", "rank_count", "pair_count", *CONSTANTS):
            assert torch.equal(one[name], other[name]), name
        for name in OF_ROUTERS:
            torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=10 * rtol, msg=name)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize("only_routers", [False, True])
def test_counts_do_not_depend_on_batches_and_padding(family: str, only_routers: bool) -> None:
    model = tiny_model(family)
    once = collect_statistics(model, batches(1), only_routers)
    for size in (1, 3, 8):
        for left in (False, True):
            assert_alike(
                collect_statistics(model, batches(size, left), only_routers), once, rtol=1e-5
            )


PROCESS = """
import sys
from pathlib import Path
import torch
import test_counting
torch.set_num_threads(1)
test_counting.count_half(Path(sys.argv[1]))
"""


def count_half(folder: Path) -> None:
    """In one of two processes: every second batch, then the sums of both."""
    from accelerate import PartialState

    state = PartialState(cpu=True)
    assert state.num_processes == 2
    model = tiny_model("deepseek_v3")
    mine = batches(3)[state.process_index :: 2]
    found = reduce(collect_statistics(model, mine, only_routers=True))
    target = folder / str(state.process_index)
    target.mkdir()
    save_statistics(found, target)


def test_two_processes_count_as_one(tmp_path: Path) -> None:
    started = start_two(PROCESS, str(tmp_path))
    one = collect_statistics(tiny_model("deepseek_v3"), batches(3), only_routers=True)
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    for rank in ("0", "1"):
        assert_alike(load_statistics(tmp_path / rank), one, rtol=1e-12)


def test_parts_add_up_to_the_whole() -> None:
    model = tiny_model("qwen2_moe")
    whole = collect_statistics(model, batches(3))
    parts = [collect_statistics(model, [batch]) for batch in batches(3)]
    assert_alike(added([*parts, []]), whole, rtol=1e-12)
    assert reduce(whole)[0].sums.keys() == whole[0].sums.keys(), "alone: as it is"


# --------------------------------------------------------------------------- the profile stage


def tokens(groups: bool = False) -> Tokens:
    names = tuple(f"group {number % 3}" for number in range(10)) if groups else ()
    return Tokens(tuple(map(tuple, samples())), pad_id=0, groups=names)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("kind", PROFILES)
def test_layer_by_layer_is_the_whole_model(family: str, kind: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    data = [(number % 2, batch) for number, batch in enumerate(batches(3))]
    whole, layerwise = (
        collect_profile(
            checkpoint,
            data,
            kind == "routers",
            Compute("cpu", cache_gib=0, layerwise=way),
            tmp_path,
        )
        for way in (False, True)
    )
    for group in (0, 1):
        pairs = zip(whole.of_group(group), layerwise.of_group(group), strict=True)
        for one, other in pairs:
            assert one.sums.keys() == other.sums.keys()
            assert all(torch.equal(one[name], other[name]) for name in one.sums)
    assert not list(tmp_path.glob("activations_*/*")), "no state outlives its use"


@pytest.mark.parametrize("kind", PROFILES)
def test_layers_behind_the_last_moe_layer_are_not_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("qwen2_moe", mlp_only_layers=[0, 3]).save_pretrained(tmp_path / "model")
    opened: list[int] = []
    fill = LayerwiseModel._fill
    monkeypatch.setattr(LayerwiseModel, "_fill", lambda *a: (opened.append(a[1]), fill(*a))[1])
    data = [(0, batch) for batch in batches(3)]
    compute = Compute("cpu", layerwise=True)
    found = collect_profile(
        Checkpoint(tmp_path / "model"), data, kind == "routers", compute, tmp_path
    )
    assert opened == [None, 0, 1, 2], "each once, for all batches"
    assert [layer.info.index for layer in found.of_group()] == [1, 2]


def test_what_is_collected_and_how_changes_no_plan(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")

    def run(store: Store, **options) -> tuple[Artifact, str]:
        compute = Compute("cpu", **options)
        profiled = profile(store, checkpoint, tokens(), compute)
        method = Prune(soft_count, Uniform(0.25))
        asked = {"ratio": {"ratio": 0.25}}
        planned = plan(store, checkpoint, profiled, tokens(), method, asked, compute)
        return profiled, (planned.folder / "plan.json").read_text()

    store = Store(tmp_path / "first")
    routers, text = run(store, profile="routers")
    assert not load_statistics(routers.folder)[0].sums.keys() & {"norm_sum", "block_cosine_sum"}
    full, same = run(store)
    assert (full.key, full.cached, same) == (routers.key, False, text)
    again, _ = run(store, profile="routers", layerwise=True)
    assert again.cached and again.folder == full.folder, "the full one serves"
    other = Store(tmp_path / "second")
    layerwise, same = run(other, profile="routers", layerwise=True)
    assert (layerwise.key, layerwise.cached, same) == (routers.key, False, text)
    assert len(list((store.root / "plan").glob("*/plan.json"))) == 1


def test_auto_goes_layerwise_where_the_model_is_large() -> None:
    compute = Compute("cpu")
    assert not compute.goes_layerwise(compute.memory() // 2 - 1)
    assert compute.goes_layerwise(compute.memory() // 2 + 1)
    assert not Compute("cpu", layerwise=False).goes_layerwise(2**60)
    assert Compute("cpu", layerwise=True).goes_layerwise(1)


def test_metrics_that_need_more_than_the_routers_are_refused() -> None:
    routers = Compute("cpu", profile="routers")
    for method in (Prune(functools.partial(frequency), Uniform(0.25)), Nothing()):
        check_profile(routers, method)
    for method in (Prune(functools.partial(reap), Uniform(0.25)), Merge(1, 4)):
        check_profile(Compute("cpu"), method)
        with pytest.raises(UserError, match=r"aimer, frequency, .*soft_count.*compute.profile=all"):
            check_profile(routers, method)
    for wrong in ({"profile": "some"}, {"layerwise": "sometimes"}):
        with pytest.raises(UserError, match="there are"):
            Compute("cpu", **wrong).start()


def test_groups_are_the_whole_in_parts(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "model")
    checkpoint, store = Checkpoint(tmp_path / "model"), Store(tmp_path / "store")
    compute = Compute("cpu", batch_size=3)
    whole = profile(store, checkpoint, tokens(), compute)
    grouped = profile(store, checkpoint, tokens(groups=True), compute)
    assert whole.key != grouped.key
    assert load_groups(whole.folder) == {} and not (whole.folder / "groups").exists()
    assert_alike(load_statistics(grouped.folder), load_statistics(whole.folder), rtol=1e-5)
    groups = load_groups(grouped.folder)
    assert list(groups) == ["group 0", "group 1", "group 2"]
    for name, part in tokens(groups=True).by_group().items():
        assert_alike(
            groups[name], collect_statistics(checkpoint.load(), part.batches(2)), rtol=1e-5
        )
