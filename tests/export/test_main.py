"""The command, as it is typed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from running import QUICK, ROOT, Job, run_python

from moe_lab.export.__main__ import main


def test_a_run_becomes_a_profile_in_the_folder_one_is_in(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job(*QUICK, "metric=frequency", "ratio.ratio=0.25")
    done = run_python(tmp_path, "-m", "moe_lab.export", "job", "--to", "riy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "written: job.riy.json"
    assert json.loads((tmp_path / "job.riy.json").read_text())["version"] == 1
    again = run_python(tmp_path, "-m", "moe_lab.export", "job", "--to", "riy")
    assert again.returncode == 2 and again.stderr.startswith("job.riy.json exists: ")


def test_a_folder_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--to", "compressed-tensors", "--bits", "4", "--group-size", "32"]
    assert main(["shipped:tiny_mixtral", *arguments]) == 0
    told, written = capsys.readouterr().out.splitlines()
    assert written == "written: tiny_mixtral-compressed-tensors"
    folder = tmp_path / "tiny_mixtral-compressed-tensors"
    assert {"config.json", "tokenizer.json", "README.md"} <= set(os.listdir(folder))
    card = (folder / "README.md").read_text()
    assert "rounded to nearest without calibration" in told and told in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "ggml"], "--to ggml does not exist; there are "),
        (["--to", "riy", "--outtype", "f16"], "--outtype is no option of --to riy"),
        (["--to", "riy"], "no plan of shipped:tiny_mixtral is found. It is looked for in"),
        (["--to", "gguf", "--outtype", "q4_k"], "--outtype q4_k does not exist; there are f32,"),
        (["--to", "gguf", "--plan", "x"], "--plan x: there is no such file"),
    ],
)
def test_what_cannot_be_exported_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["shipped:tiny_mixtral", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message) and not said.out and not os.listdir(tmp_path)


def test_unknown_targets_are_told_with_what_each_takes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["shipped:tiny_mixtral", "--to", "x"])
    said = capsys.readouterr().err
    assert "riy (plans of plain prunes" in said and "gguf (checkpoints in their family" in said
