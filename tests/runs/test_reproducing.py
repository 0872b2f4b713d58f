"""`--reproduce`: a run made again from its own record, and compared figure by figure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made_up_runs import start, tell
from running import QUICK, ROOT, run_python

from moe_lab.integrity import sum_of_record
from moe_lab.runs.__main__ import main
from moe_lab.runs.reproducing import compared, reproduce
from moe_lab.runs.rerun import Command
from moe_lab.runs.status import find_jobs
from moe_lab.types import UserError

BEFORE = {
    "status": "ok", "seed": 0, "commit": "a", "versions/torch": "2", "fingerprint/data": "d",
    "compressed/kl": 0.5, "compressed/prefill_speedup": 1.2, "seconds/plan": 3.0,
    "cached/plan": True, "artifact/plan": "plan/1", "dense/checkpoint": "there", "run_id": "x",
    "compressed/vllm/decode_tokens_per_second": 7.0, "dense/decode_seconds_per_token": 0.1,
}  # fmt: skip


def test_clocks_and_places_are_not_compared() -> None:
    now = BEFORE | {
        "compressed/prefill_speedup": 1.3, "seconds/plan": 4.0, "cached/plan": False,
        "dense/checkpoint": "here", "run_id": "y", "compressed/vllm/decode_tokens_per_second": 8.0,
        "dense/decode_seconds_per_token": 0.2,
    }  # fmt: skip
    assert compared(BEFORE, now) == (6, [])


@pytest.mark.parametrize("key", ["seed", "compressed/kl", "fingerprint/data", "commit"])
def test_every_other_key_is(key: str) -> None:
    assert compared(BEFORE, BEFORE | {key: "other"})[1] == [(key, BEFORE[key], "other")]
    missing = {name: value for name, value in BEFORE.items() if name != key}
    assert compared(BEFORE, missing)[1] == [(key, BEFORE[key], None)]
    assert compared(missing, BEFORE)[1] == [(key, None, BEFORE[key])]


def test_nothing_finished_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "runs" / "one", ["model=tiny"], tmp_path)
    tell(tmp_path / "runs" / "one", "failed")
    with pytest.raises(UserError, match="ended well"):
        list(reproduce(find_jobs(tmp_path / "runs"), []))


def test_a_record_that_names_code_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "one", ["metric._target_=os.system"], tmp_path)
    tell(tmp_path / "one", "ok")
    with pytest.raises(UserError, match="name code"):
        list(reproduce(find_jobs(tmp_path), []))


def test_a_run_made_again_is_the_same_and_a_changed_record_is_not(
    tmp_path: Path,
    small: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In processes of their own; relative paths, and a folder that Hydra must have quoted."""
    folder = tmp_path / "runs, mine" / "one"
    words = [*small, *QUICK, f"run_dir='{folder}'", "store=outputs/store", "resume=false"]
    ended = run_python(tmp_path, str(ROOT / "run.py"), *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["versions/torch"] and "cores" in report["hardware"] and report["commit"]

    again, kept = folder / "reproduced", tmp_path / "kept"
    run = Command.run

    def run_and_keep(command: Command) -> int:
        code = run(command)
        shutil.copytree(again, kept)
        return code

    monkeypatch.setattr(Command, "run", run_and_keep)
    assert main([str(folder), "--reproduce"]) == 0, capsys.readouterr()
    told = capsys.readouterr().out
    assert "reproduced: " in told and "NOT" not in told
    number = int(told.split(" files byte-equal")[0].rpartition(" of ")[2])
    assert number >= 10  # of profile, plan and checkpoint
    assert (again / "report.json").is_file() and not (again / "store").exists()
    assert [one.folder.name for one in find_jobs(folder)] == ["one"]

    report["fingerprint/data"] = "of other text"
    (folder / "report.json").write_text(json.dumps(report))
    weights = next(tmp_path.glob("outputs/store/compress/*/artifact.json"))
    record = json.loads(weights.read_text())
    del record["sha256"]
    record["files"]["checkpoint/config.json"]["sha256"] = "0" * 64
    weights.write_text(json.dumps(record | {"sha256": sum_of_record(record)}))
    monkeypatch.setattr(Command, "run", lambda _: shutil.copytree(kept, again))  # a third time
    assert main([str(folder), "--reproduce"]) == 1
    told = capsys.readouterr().out
    assert "NOT reproduced" in told and "fingerprint/data: of other text then" in told
    assert "compress: checkpoint/config.json: other bytes" in told
    assert (again / "store").is_dir()
