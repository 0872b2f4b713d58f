"""What is exported, and where the rest of it is found."""

from __future__ import annotations

import json
from pathlib import Path

import deepseek_original
import pytest
from distilling import FEW
from running import QUICK, Job

from moe_lab.export.given import find_given, written_whole
from moe_lab.types import UserError

PRUNE = (*QUICK, "metric=frequency", "ratio.ratio=0.25")


def test_a_run_names_its_checkpoint_plan_and_model(
    job: Job, checkpoint: Path, tmp_path: Path
) -> None:
    job(*PRUNE)
    run = tmp_path / "job"
    (made,) = (tmp_path / "store" / "compress").glob("*/checkpoint")
    (planned,) = (tmp_path / "store" / "plan").glob("*/plan.json")
    of_run, of_plan = find_given(str(run)), find_given(str(run / "plan.json"))
    assert of_run.checkpoint().path == made and of_plan.checkpoint_folder is None
    for one in (of_run, of_plan):
        assert one.plan().to_text() == planned.read_text() and one.dense().path == checkpoint
        assert one.name == "job" and one.made_by is None
    with pytest.raises(UserError, match=r"is a plan, and this target is made from a checkpoint"):
        of_plan.checkpoint()

    of_store = find_given(str(made))
    assert (of_store.plan_file, of_store.made_by) == (planned, "compress")
    assert of_store.name == made.parent.name and of_store.checkpoint().path == made
    with pytest.raises(UserError, match=r"report\.json beside the plan would name it.*--model"):
        of_store.dense()
    assert find_given(str(made), model=str(checkpoint)).dense().path == checkpoint


def test_a_tuned_run_is_of_its_tuned_checkpoint(job: Job, tmp_path: Path) -> None:
    job("method=prune", "metric=frequency", "finetune=experts", *FEW, "eval=none",
        "measure=none")  # fmt: skip
    tuned = find_given(str(tmp_path / "job"))
    assert tuned.made_by == "finetune" and tuned.checkpoint().path.parents[1].name == "finetune"


def test_a_checkpoint_without_its_plan_is_told_where_one_is_looked_for(
    checkpoint: Path, tmp_path: Path
) -> None:
    alone = find_given(str(checkpoint))
    with pytest.raises(UserError, match=r"plan\.json beside report\.json.*<store>/plan/<key>/plan"):
        alone.plan()
    with pytest.raises(UserError, match=r"--plan .*none\.json: there is no such file"):
        find_given(str(checkpoint), plan=str(tmp_path / "none.json"))
    (tmp_path / "plan.json").write_text('{"layers": 3}')
    with pytest.raises(UserError, match=r"plan\.json is no plan that can be read"):
        find_given(str(checkpoint), plan=str(tmp_path / "plan.json")).plan()
    with pytest.raises(UserError, match="neither a folder here nor a hub id"):
        find_given(str(tmp_path / "nothing"))
    assert find_given("shipped:tiny_mixtral").name == "tiny_mixtral"


@pytest.mark.parametrize("folder", [False, True])
def test_it_is_written_whole_or_not_at_all(tmp_path: Path, folder: bool) -> None:
    out = tmp_path / "made" / "one"

    def write(text: str, overwrite: bool = False, fails: bool = False) -> None:
        with written_whole(out, overwrite) as partial:
            if folder:
                partial.mkdir()
            (partial / "file" if folder else partial).write_text(text)
            assert not fails, "stop"

    with pytest.raises(AssertionError, match="stop"):
        write("half", fails=True)
    assert not list(out.parent.iterdir())
    write("first")
    with pytest.raises(UserError, match=r"one exists: name another place with --out, or say --ov"):
        write("second")
    with pytest.raises(AssertionError, match="stop"):
        write("half", overwrite=True, fails=True)
    read = out / "file" if folder else out
    assert read.read_text() == "first"
    write("second", overwrite=True)
    assert read.read_text() == "second" and list(out.parent.iterdir()) == [out]


def test_a_checkpoint_that_must_be_converted_first_is_told(tmp_path: Path) -> None:
    folder = deepseek_original.make(tmp_path / "original")
    with pytest.raises(UserError, match="in its original layout, which transformers does not read"):
        find_given(str(folder)).checkpoint()


def test_a_report_that_says_nothing_of_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"model": "x"}))
    empty = find_given(str(tmp_path))
    assert (empty.checkpoint_folder, empty.plan_file, empty.model) == (None, None, None)
