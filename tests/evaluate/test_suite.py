"""What a suite refuses: tasks, data and groups that are not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mirrors import suite
from running import Job
from small_suites import GROUPS, SUITE

from moe_lab.data.files import Files
from moe_lab.evaluate.suite import Suite
from moe_lab.types import UserError


def test_what_is_refused() -> None:
    SUITE.check_groups(GROUPS)
    Suite(group_task="tiny_{group}").check_groups(["code"])
    with pytest.raises(UserError, match=r'eval.group_task="mmlu_\{group\}"'):
        Suite().check_groups(GROUPS)
    with pytest.raises(UserError, match="one task for all groups"):
        Suite(group_task="tiny_prose").check_groups(GROUPS)


@pytest.mark.slow  # reads the names of all of lm-eval's tasks
def test_groups_without_tasks_are_refused() -> None:
    with pytest.raises(UserError, match=r"\['tiny_poems', 'tiny_perplexity_poems'\].*tiny_prose"):
        SUITE.check_groups(["prose", "poems"])


def test_refusals_come_before_any_work(job: Job, sst5: Path, tmp_path: Path) -> None:
    seer = ["eval=seer", "eval.tasks=[sst5]"]
    nothing = job(*seer, f"eval.mirror={tmp_path / 'none'}")
    assert nothing.code == 2 and "is no folder" in nothing.text and "eval.mirror" in nothing.text
    empty = tmp_path / "empty"
    empty.mkdir()
    missing = job(*seer, f"eval.mirror={empty}")
    assert missing.code == 2 and "has no SetFit/sst5" in missing.text
    hub = job(*seer)
    assert hub.code == 2
    assert "SetFit/sst5" in hub.text and "eval.mirror=<folder>" in hub.text
    (sst5 / "SetFit" / "sst5" / "test.jsonl").unlink()
    (sst5 / "SetFit" / "sst5" / "train.jsonl").unlink()
    (sst5 / "SetFit" / "sst5" / "dev.jsonl").unlink()
    no_files = job(*seer, f"eval.mirror={sst5}")
    assert no_files.code == 2 and "could not be loaded" in no_files.text
    for outcome in (nothing, missing, hub, no_files):
        assert "Traceback" not in outcome.text and not outcome.stages()


def test_names(sst5: Path) -> None:
    suite(sst5, tasks=["sst5", "sst5_generate"]).check()
    with pytest.raises(UserError, match=r"\['sst6'\].*sst5, sst5_generate"):
        replace(suite(sst5), tasks=["sst5", "sst6"]).check()


def test_what_decodes_needs_something_to_decode() -> None:
    text = suite_text()
    with pytest.raises(UserError, match=r"eval.decoding=scmoe decodes the text of tasks.*none:"):
        Suite(held_out=text, decoding="scmoe").check()
    Suite(held_out=text).check()
    Suite(tasks=["tiny_recall_generate"], decoding="scmoe").check()
    with pytest.raises(UserError, match=r"eval.decoding='beams' does not exist; there are"):
        Suite(tasks=["tiny_recall_generate"], decoding="beams").check()


def suite_text() -> Files:
    return Files(num_samples=1, max_length=8, files=["a.txt"])
