"""What a run used and made, as a chain: read off a real job's report and store."""

from __future__ import annotations

from pathlib import Path

from running import Job

from moe_lab.track.artifacts import tracked_artifacts


def test_each_link_is_made_from_those_before(job: Job) -> None:
    done = job("metric=frequency", "compute.profile=routers")
    assert done.code == 0, done.text
    report = done.report
    model, profile, plan, checkpoint = tracked_artifacts(report, done.store)
    kinds = [one.type for one in (model, profile, plan, checkpoint)]
    assert kinds == ["model", "profile", "plan", "checkpoint"]
    assert model.name == f"model-{report['fingerprint/model']}"
    assert model.place == Path(report["dense/checkpoint"])
    assert profile.made_from == (model.name,)
    assert plan.made_from == (model.name, profile.name)
    assert checkpoint.made_from == (model.name, plan.name)
    for one, stage in ((profile, "profile"), (plan, "plan"), (checkpoint, "compress")):
        assert one.place == done.store / report[f"artifact/{stage}"] and one.place.is_dir()
        assert one.metadata == {"stage": stage, "seconds": report[f"seconds/{stage}"]}
        assert not one.found, "it was made here"
    assert [path.name for path in plan.files] == ["artifact.json", "plan.json"]
    assert [path.relative_to(checkpoint.place).as_posix() for path in checkpoint.files] == [
        "artifact.json", "form.json", "checkpoint/config.json", "checkpoint/README.md",
    ]  # fmt: skip
    again = tracked_artifacts(job("metric=frequency", "compute.profile=routers").report, done.store)
    assert [one.name for one in again] == [model.name, profile.name, plan.name, checkpoint.name]
    assert all(one.found for one in again)


def test_a_job_that_failed_has_the_chain_so_far(tmp_path: Path) -> None:
    report = {"status": "failed", "model": "tiny"}
    assert tracked_artifacts(report, tmp_path) == []
    report |= {"fingerprint/model": "0123", "artifact/profile": "profile/abc"}
    report |= {"seconds/profile": 1.5, "cached/profile": True}
    model, profile = tracked_artifacts(report, tmp_path)
    assert (model.name, model.place) == ("model-0123", None)
    assert (profile.name, profile.files, profile.found) == ("profile-abc", (), True)
