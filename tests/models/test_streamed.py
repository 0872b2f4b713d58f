"""A plan carried out layer by layer: the files of the whole model, also when it was killed."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import assert_written_as_in_memory, condense, moe_indices, prune
from families import EACH_FAMILY, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import moe_lab.models.streamed as streamed
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.edited_model import Saving
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan, apply_plan, read_edit
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.reading_back import NotReadBack
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.shard_writer import ShardWriter
from moe_lab.models.shards import plan_shards
from moe_lab.models.streamed import write_edited
from moe_lab.models.weight_files import checked_weights, weight_files
from moe_lab.models.write_journal import JOURNAL

KEPT = (0, 1, 4, 5)


def source_of(
    family: str, folder: Path, shard: str = "1GB", dtype: torch.dtype = torch.bfloat16
) -> Checkpoint:
    tiny_model(family).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return Checkpoint(folder)


def named(checkpoint: Checkpoint, edits: list[dict[str, Any]]) -> Plan:
    """A plan of edits that know their layers' names."""
    names = {one.index: one.name for one in checkpoint.layers()}
    return Plan(tuple(read_edit({**edit, "name": names[edit["index"]]}) for edit in edits))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in weight_files(folder) for name, t in load_file(file).items()}


def as_whole_model(checkpoint: Checkpoint, plan: Plan, folder: Path, **how: Any) -> None:
    """The same with the whole model in memory, written by transformers."""
    model: PreTrainedModel = checkpoint.load()
    apply_plan(model, plan)
    save_checkpoint(model, folder, checkpoint.path, **how)


def assert_same(one: Path, other: Path) -> None:
    first, second = tensors_in(one), tensors_in(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    assert (one / "config.json").read_text() == (other / "config.json").read_text()


def merge(index: int) -> dict[str, Any]:
    groups = [[0, 2], [1, 3], [4, 6], [5, 7]]
    return {
        "index": index, "edit": "merge", "kept": list(KEPT), "groups": groups,
        "weights": [[0.25, 0.75]] * 4,
    }  # fmt: skip


@EACH_FAMILY
def test_it_writes_what_the_whole_model_would(family: str, tmp_path: Path) -> None:
    source = source_of(family, tmp_path / "source")
    first, *others = moe_indices(family)
    dropped, plain = [{"index": first, "edit": "drop_block"}], family == "gpt_oss"
    plans = {
        "pruned": [prune(i, list(KEPT)) for i in (first, *others)],
        "uneven": [prune(first, list(KEPT)) | {"replacement": "zero"}, merge(others[0])],
        "dense": [condense(others[-1], [5, 2]) | ({"shared_gate": 1.0} if plain else {})],
        "shorter": [*dropped, *(prune(i, list(KEPT)) for i in others)],
    }
    for name, edits in plans.items():
        plan = named(source, edits)
        as_whole_model(source, plan, tmp_path / f"{name}_whole", padding=0.5)
        write_edited(source, plan, tmp_path / name / "checkpoint", Saving(padding=0.5))
        assert_same(tmp_path / f"{name}_whole", tmp_path / name / "checkpoint")
        assert [one.name for one in (tmp_path / name).iterdir()] == ["checkpoint"]


def test_as_another_family_and_with_a_head_of_its_own(tmp_path: Path) -> None:
    source = source_of("mixtral", tmp_path / "source", dtype=torch.float32)
    plan = named(source, [condense(2, [5, 2])])
    as_whole_model(source, plan, tmp_path / "whole", convert="superset")
    form = write_edited(source, plan, tmp_path / "new", Saving(convert="superset"))
    assert form.stock
    assert form.config.model_type == "qwen2_moe"
    assert_same(tmp_path / "whole", tmp_path / "new")


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_files_that_nothing_happens_to_are_shared_with_the_source(
    family: str, tmp_path: Path
) -> None:
    source = source_of(family, tmp_path / "source", shard="20KB")
    plan = named(source, [prune(2, list(KEPT))])
    as_whole_model(source, plan, tmp_path / "whole")
    write_edited(source, plan, tmp_path / "new", Saving())
    assert_same(tmp_path / "whole", tmp_path / "new")
    before = {file.read_bytes(): file for file in weight_files(source.path)}
    after = weight_files(tmp_path / "new")
    same = [file for file in after if file.read_bytes() in before]
    assert len(same) >= 5
    assert len(after) == len(same) + 1
    assert all(os.path.samefile(file, before[file.read_bytes()]) for file in same) or (
        sys.platform != "linux"
    )


def test_layers_that_move_up_are_not_taken_for_those_in_their_place(tmp_path: Path) -> None:
    source = source_of("qwen3_moe", tmp_path / "source", shard="20KB")
    plan = named(source, [{"index": 1, "edit": "drop_block"}])
    as_whole_model(source, plan, tmp_path / "whole")
    write_edited(source, plan, tmp_path / "new", Saving())
    assert_same(tmp_path / "whole", tmp_path / "new")


def test_tensors_that_do_not_change_keep_every_bit_whatever_is_computed_in(tmp_path: Path) -> None:
    source = source_of("deepseek_v3", tmp_path / "source", dtype=torch.float32)
    plan = named(source, [prune(2, list(KEPT))])
    write_edited(Checkpoint(source.path, "bfloat16"), plan, tmp_path / "new", Saving())
    before, after = tensors_in(source.path), tensors_in(tmp_path / "new")
    for new, old in enumerate(KEPT):
        for key in ("gate_proj", "up_proj", "down_proj"):
            name = "model.layers.2.mlp.experts.{}." + f"{key}.weight"
            assert torch.equal(after[name.format(new)], before[name.format(old)])
    block = "model.layers.2.mlp."
    assert all(torch.equal(after[n], t) for n, t in before.items() if not n.startswith(block))


def test_experts_that_stay_are_copied_without_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the few tokens do not go, the experts of a pruned layer are no tensors at any time."""
    monkeypatch.setattr(streamed, "CHECKED_BYTES", 0)
    source = source_of("qwen3_moe", tmp_path / "source")
    plan = named(source, [prune(i, list(KEPT)) for i in (0, 1, 2, 3)])
    opened: dict[int, int] = {}
    original = streamed.LayerwiseModel._fill

    def fill(model: Any, part: int | None, without: Any = ()) -> None:
        original(model, part, without)
        if part is not None:
            inside = model.layers[part].mlp.experts.parameters()
            opened[part] = sum(not one.is_meta for one in inside)

    monkeypatch.setattr(streamed.LayerwiseModel, "_fill", fill)
    read_back: list[object] = []
    compare = streamed.compare_by_layer
    monkeypatch.setattr(
        streamed, "compare_by_layer", lambda *given: (read_back.append(given[3]), opened.clear())
    )
    copied: dict[int, int] = {}
    monkeypatch.setattr(streamed.WriteJournal, "note", lambda *_: copied.update(opened))
    write_edited(source, plan, tmp_path / "new", Saving())
    assert copied == {0: 2, 1: 0, 2: 0, 3: 0}, (
        "the first of its kind is compared by what it computes"
    )
    assert read_back == [[0]]
    as_whole_model(source, plan, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "new")
    assert compare is not streamed.compare_by_layer


@pytest.mark.parametrize("damage", ["rows", "experts"])
def test_a_result_that_computes_something_else_is_refused(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("qwen3_moe", tmp_path / "source")
    plan = named(source, [prune(1, list(KEPT))])
    original = ShardWriter.write if damage == "rows" else ShardWriter.copy

    def swapped(writer: ShardWriter, given: dict[str, Any]) -> None:
        part = ".1.mlp.gate.weight" if damage == "rows" else ".1.mlp.experts."
        if names := [name for name in given if part in name]:
            turned = {n: given[n].flip(0) for n in names} if damage == "rows" else dict(
                zip(names, [given[n] for n in reversed(names)], strict=True)
            )  # fmt: skip
            given = given | turned
        original(writer, given)

    monkeypatch.setattr(ShardWriter, original.__name__, swapped)
    with pytest.raises(NotReadBack, match="computes something else"):
        write_edited(source, plan, tmp_path / "new", Saving())


KILLED = """
import os, signal, sys
from pathlib import Path
import moe_lab.models.shard_writer as shard_writer
import moe_lab.models.streamed as streamed
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import Plan

source, plan, folder, after = sys.argv[1:]
original, put = streamed.plan_shards, shard_writer.ShardWriter._put
streamed.plan_shards = lambda *given: original(*given, limit=12000)
left = [int(after)]

def counted(*given):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    put(*given)

shard_writer.ShardWriter._put = counted
streamed.write_edited(
    Checkpoint(Path(source)), Plan.load(Path(plan)), Path(folder), streamed.Saving()
)
print("PUT", int(after) - left[0])
"""


def test_killed_again_and_again_it_goes_on_behind_the_last_file(tmp_path: Path) -> None:
    source = source_of("qwen3_moe", tmp_path / "source", shard="20KB")
    plan = named(source, [*(prune(i, list(KEPT)) for i in (0, 1)), merge(3)])
    (tmp_path / "plan.json").write_text(plan.to_text())

    def attempt(name: str, puts: int) -> subprocess.CompletedProcess[str]:
        given = [source.path, tmp_path / "plan.json", tmp_path / name / "checkpoint", puts]
        command = [sys.executable, "-c", KILLED, *map(str, given)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = attempt("whole", 10**6)
    assert whole.returncode == 0, whole.stderr
    needed = int(whole.stdout.split("PUT")[1])
    killed = attempt("killed", needed * 2 // 3)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / JOURNAL).is_file()
    ended = attempt("killed", 10**6)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split("PUT")[1]) < needed, "finished files were written again"
    one, other = (tmp_path / name / "checkpoint" for name in ("whole", "killed"))
    assert sorted(f.name for f in one.iterdir()) == sorted(f.name for f in other.iterdir())
    assert all((other / f.name).read_bytes() == f.read_bytes() for f in one.iterdir())
    assert not (tmp_path / "killed" / JOURNAL).exists()


def test_a_journal_of_another_plan_is_none(tmp_path: Path) -> None:
    source = source_of("mixtral", tmp_path / "source")
    first, second = (named(source, [prune(1, kept)]) for kept in ([0, 1, 2], [4, 5, 6]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "compare_by_layer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_edited(source, first, tmp_path / "new" / "checkpoint", Saving())
    assert (tmp_path / "new" / JOURNAL).is_file()
    write_edited(source, second, tmp_path / "new" / "checkpoint", Saving())
    as_whole_model(source, second, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "new" / "checkpoint")


def test_layers_that_hand_on_more_are_all_compared(tmp_path: Path) -> None:
    from moe_lab.families.tiny import tiny_model as model_of

    model = model_of("deepseek_v32")
    model.save_pretrained(tmp_path / "source")
    source = Checkpoint(tmp_path / "source")
    layer = moe_layers(model)[-1].info
    kept = tuple(range(layer.num_experts - layer.groups))
    plan = Plan((PruneExperts(layer.index, layer.name, kept=kept),))
    as_whole_model(source, plan, tmp_path / "whole")
    write_edited(source, plan, tmp_path / "new", Saving())
    assert_same(tmp_path / "whole", tmp_path / "new")
    assert load(tmp_path / "new").config.moe_lab


def test_tensors_that_are_only_written_together(tmp_path: Path) -> None:
    """Inkling's dense layers, whose two projections stand interleaved in the files."""
    from moe_lab.families.tiny import tiny_model as model_of

    model = model_of("inkling_mm_model")
    model.save_pretrained(tmp_path / "source")
    layer = moe_layers(model)[-1].info
    plan = Plan((read_edit({"index": layer.index, "name": layer.name, "edit": "drop_layer"}),))
    source = Checkpoint(tmp_path / "source")
    write_edited(source, plan, tmp_path / "new", Saving())
    edited = source.load()
    apply_plan(edited, plan)
    ours, theirs = load(tmp_path / "new").state_dict(), edited.state_dict()
    untouched = [name for name in theirs if not name.startswith(f"{layer.name}.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in untouched)


def test_a_kind_says_of_itself_that_experts_keep_their_weights() -> None:
    class Doubled(PruneExperts):
        pass

    assert PruneExperts.keeps_experts_as_they_are
    assert not Doubled.keeps_experts_as_they_are
    assert not MergeExperts.keeps_experts_as_they_are


def test_a_limit_splits_large_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of("qwen3_moe", tmp_path / "source")
    monkeypatch.setattr(streamed, "plan_shards", lambda *g: plan_shards(*g, limit=9000))
    plan = named(source, [prune(1, list(KEPT))])
    write_edited(source, plan, tmp_path / "new", Saving())
    assert len(weight_files(tmp_path / "new")) > 5
    as_whole_model(source, plan, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "new")


@EACH_FAMILY
@pytest.mark.parametrize("replacement", ["nothing", "zero", "copy"])
def test_layers_that_are_not_compared_are_written_alike(
    family: str, replacement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nearly all layers of a large model: what stays of their experts is never read."""
    monkeypatch.setattr(streamed, "CHECKED_BYTES", 0)
    source = source_of(family, tmp_path / "source", shard="20KB")
    first, *others = moe_indices(family)
    edits = [prune(i, list(KEPT)) | {"replacement": replacement} for i in (first, *others)]
    plan = named(source, edits)
    write_edited(source, plan, tmp_path / "new", Saving())
    assert_written_as_in_memory(source, plan, tmp_path / "new")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_what_was_trained_outside_of_layers_is_not_taken_from_the_source(
    name: str, tmp_path: Path
) -> None:
    source = source_of("mixtral", tmp_path / "source", shard="5KB")
    model = source.load()
    with torch.no_grad():
        model.get_parameter(name).mul_(1.01)
    save_checkpoint(model, tmp_path / "new", source.path)
    expected = model.get_parameter(name)
    assert torch.equal(load(tmp_path / "new").get_parameter(name), expected)
    assert not torch.equal(source.load().get_parameter(name), expected)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_what_trained_in_float32_is_compared_as_it_will_be_read(name: str, tmp_path: Path) -> None:
    source = source_of("mixtral", tmp_path / "source")
    model = source.load()
    parameter = model.get_parameter(name)
    parameter.data = parameter.data.float() * 1.001
    save_checkpoint(model, tmp_path / "new", source.path)
    assert torch.equal(load(tmp_path / "new").get_parameter(name), parameter.bfloat16())


def test_a_file_with_tensors_that_no_index_names_is_not_shared(tmp_path: Path) -> None:
    source = source_of("qwen3_moe", tmp_path / "source", shard="20KB")
    index = source.path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    file = source.path / places["model.layers.3.self_attn.k_proj.weight"]
    beside = {"model.layers.3.self_attn.k_proj.k_scale": torch.ones(1)}
    save_file(load_file(file) | beside, file, {"format": "pt"})
    values = json.loads(index.read_text())
    values["weight_map"] |= dict.fromkeys(beside, file.name)
    index.write_text(json.dumps(values))
    write_edited(source, named(source, [prune(1, list(KEPT))]), tmp_path / "new", Saving())
    checked_weights(tmp_path / "new")


@pytest.mark.parametrize("kind", ["prune", "merge", "condense", "drop_block", "drop_layer"])
def test_no_layer_outlives_its_turn(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("qwen2_moe", tmp_path / "source")
    of = {
        "prune": lambda index: prune(index, list(KEPT)),
        "merge": merge,
        "condense": lambda index: condense(index, [5, 2]),
    }
    edit = of.get(kind, lambda index: {"index": index, "edit": kind})
    indices = moe_indices("qwen2_moe")[: -1 if kind == "drop_layer" else None]
    behind: list[int] = []
    through = streamed._Writing._through

    def and_count(writing: Any, *given: Any) -> None:
        through(writing, *given)
        behind.append(bytes_in_memory())

    monkeypatch.setattr(streamed._Writing, "_through", and_count)
    before = bytes_in_memory()
    write_edited(source, named(source, [edit(i) for i in indices]), tmp_path / "new", Saving())
    experts = max(p.nbytes for p in source.load().state_dict().values() if p.ndim == 3)
    assert len(indices) >= 2 and min(behind) > before
    assert max(behind) - min(behind) < experts / 2


def bytes_in_memory() -> int:
    """Of all numbers that anything refers to; what a writer keeps for copying are plain bytes."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    alive = [one for one in tensors if one.is_floating_point() and not one.is_meta]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values()
    )
