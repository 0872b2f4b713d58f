"""The stage of profiling: whole or layer by layer, all statistics or the routers, groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from counting import assert_alike, batches, samples
from families import tiny_batch, tiny_model
from running import Outcome

from moe_lab.compute import PROFILES, Compute
from moe_lab.data.tokens import Tokens
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.handed_on import HandedOn, NotLayerwise
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.profile.collect import (
    collect_statistics,
    load_groups,
    load_statistics,
    save_statistics,
)
from moe_lab.stages.context import Context
from moe_lab.stages.plan import Planning, plan
from moe_lab.stages.profile import Profiling, collect_profile, profile, write_usage
from moe_lab.store import Artifact, Store


def test_a_job_that_needs_more_than_the_routers_is_refused(job: Callable[..., Outcome]) -> None:
    done = job("metric=reap", "compute.profile=routers")
    words = ("compute.profile=routers", "frequency", "soft_count", "compute.profile=all")
    assert done.code == 2 and all(word in done.text for word in words), done.text
    assert done.stages() == []


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


def test_where_a_family_cannot_go_layer_by_layer_a_profile_is_of_the_whole_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    checkpoint, data = Checkpoint(tmp_path), [(0, batch) for batch in batches(5)]
    expected = collect_profile(checkpoint, data, False, Compute("cpu"), tmp_path).of_group()

    def refuse(*_: object) -> None:
        raise NotLayerwise("its layers need each other")

    monkeypatch.setattr(HandedOn, "found", refuse)
    monkeypatch.setattr(Compute, "profiles_layerwise", lambda *_: True)
    found = collect_profile(checkpoint, data, False, Compute("cpu"), tmp_path).of_group()
    assert all(torch.equal(one["count"], other["count"])
               for one, other in zip(found, expected, strict=True))  # fmt: skip
    with pytest.raises(NotLayerwise):
        collect_profile(checkpoint, data, False, Compute("cpu", layerwise=True), tmp_path)


def test_what_is_collected_and_how_changes_no_plan(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")

    def run(store: Store, **options) -> tuple[Artifact, str]:
        context = Context(store, Compute("cpu", **options))
        profiled = profile(context, Profiling(checkpoint, tokens()))
        method = Prune(soft_count, Uniform(0.25))
        asked = {"metric": {}, "ratio": {"ratio": 0.25}}
        planned = plan(context, Planning(checkpoint, profiled, tokens(), method, asked))
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


def test_hidden_units_are_profiled_once_and_serve_all(tmp_path: Path) -> None:
    """Several criteria of neurons share a profile, and those of experts take it, too."""
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "model")
    checkpoint, store = Checkpoint(tmp_path / "model"), Store(tmp_path / "store")
    context = Context(store, Compute("cpu"))
    plain = profile(context, Profiling(checkpoint, tokens()))
    both = profile(context, Profiling(checkpoint, tokens(), neurons=True))
    assert (both.key, both.cached) == (plain.key, False), "plans of both are known by one key"
    assert both.folder != plain.folder
    again = profile(context, Profiling(checkpoint, tokens(), neurons=True))
    assert again.cached and again.folder == both.folder
    for one, other in zip(*map(load_statistics, (plain.folder, both.folder)), strict=True):
        assert not one.has_neurons and other.has_neurons
        assert all(torch.equal(one[name], other[name]) for name in one.sums)
    only = Context(Store(tmp_path / "other"), Compute("cpu"))
    wide = profile(only, Profiling(checkpoint, tokens(), neurons=True))
    narrow = profile(only, Profiling(checkpoint, tokens()))
    assert narrow.cached and narrow.folder == wide.folder, "no second pass for less"


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_hidden_units_layer_by_layer_are_those_of_the_whole_model(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    checkpoint, data = Checkpoint(tmp_path / "model"), [(0, batch) for batch in batches(3)]
    whole, layerwise = (
        collect_profile(checkpoint, data, False, Compute("cpu", layerwise=way), tmp_path, True)
        for way in (False, True)
    )
    for one, other in zip(whole.of_group(), layerwise.of_group(), strict=True):
        assert one.has_neurons and one.sums.keys() == other.sums.keys()
        assert all(torch.equal(one[name], other[name]) for name in one.sums)


def test_groups_are_the_whole_in_parts(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    context = Context(Store(tmp_path / "store"), Compute("cpu", batch_size=3))
    whole = profile(context, Profiling(checkpoint, tokens()))
    grouped = profile(context, Profiling(checkpoint, tokens(groups=True)))
    assert whole.key != grouped.key
    assert load_groups(whole.folder) == {} and not (whole.folder / "groups").exists()
    assert_alike(load_statistics(grouped.folder), load_statistics(whole.folder), rtol=1e-5)
    groups = load_groups(grouped.folder)
    assert list(groups) == ["group 0", "group 1", "group 2"]
    for name, part in tokens(groups=True).by_group().items():
        assert_alike(
            groups[name], collect_statistics(checkpoint.load(), part.batches(2)), rtol=1e-5
        )


def test_usage_is_1_where_all_are_used_alike(tmp_path: Path) -> None:
    statistics = collect_statistics(tiny_model("qwen2_moe"), [tiny_batch()])
    store = Store(tmp_path / "store")
    profiled = store.get("profile", {"a": 1}, lambda folder: save_statistics(statistics, folder))
    write_usage(profiled, tmp_path)
    found = pd.read_csv(tmp_path / "usage.csv").set_index("layer")
    assert list(found.columns) == ["expert", "tokens", "usage"]
    for layer in statistics:
        rows = found.loc[layer.info.index]
        assert rows["tokens"].tolist() == layer["count"].tolist()
        assert rows["tokens"].sum() == 3 * layer["tokens"], "top-3"
        expected = rows["tokens"] / rows["tokens"].mean()
        assert rows["usage"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
