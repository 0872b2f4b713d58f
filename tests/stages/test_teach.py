"""The stage of the teacher: one for all jobs, and room for it."""

from __future__ import annotations

import shutil

from distilling import FEW


def test_one_teacher_for_all_jobs(job) -> None:
    first = job(*FEW)
    assert first.code == 0, first.text
    assert first.report["cached/teacher"] is False and first.report["seconds/teacher"] > 0
    assert first.report["finetune/temperature"] == 1.0
    second = job(*FEW, "ratio.ratio=0.25", "finetune.phases.lm.learning_rate=1e-3")
    third = job(*FEW, "finetune=experts", "finetune.distillation=0.5")
    for other in (second, third):
        assert other.code == 0, other.text
        assert other.report["cached/teacher"] is True and other.report["cached/finetune"] is False
    assert third.report["finetune/distillation"] == 0.5
    plain = job(*FEW, "finetune=experts")
    assert plain.code == 0 and "cached/teacher" not in plain.report
    warm = job(*FEW, "finetune.temperature=2")
    assert warm.report["cached/teacher"] is False
    assert len(list((first.store / "teacher").glob("*/artifact.json"))) == 2


def test_a_disk_without_room_is_found_out_before_any_work(job, monkeypatch) -> None:
    room = shutil.disk_usage("/")._replace(free=4 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    outcome = job(*FEW, "finetune.teacher_top_k=null", "finetune.phases.lm.data.num_samples=512")
    assert outcome.code == 2 and not outcome.stages()
    for words in ("finetune.teacher_top_k=None keeps 259", "has 0.00 GiB free", "fewer prob"):
        assert words in outcome.text
