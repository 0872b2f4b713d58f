"""Jobs run again: by which command, and when not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_runs import REAP, Command, Process, start, tell, write_sweep
from running import ROOT

from moe_lab.runs import rerun
from moe_lab.runs.quoting import override
from moe_lab.types import UserError


def fail(folder: Path, number: int, cwd: Path) -> None:
    start(folder / str(number), [f"a={number}"], cwd)
    tell(folder / str(number), "failed")


def test_a_sweep_runs_again(place: Path, command: Command, process: type[Process]) -> None:
    given = ["-m", REAP, "+hydra.sweep.dir=x", "resume=false", "hydra.sweep.dir.not=1"]
    write_sweep(place / "s", [["a=0"], ["a=1"], ["a=2"]], argv=given, cwd=str(place))
    fail(place / "s", 0, place)
    start(place / "s" / "1", ["a=1"], place)
    tell(place / "s" / "1", "ok")
    process.codes = [3]
    code, text, _ = command(place / "s", "--rerun")
    words = (sys.executable, str(ROOT / "run.py"), "-m", REAP, "hydra.sweep.dir.not=1",
             f"hydra.sweep.dir={place / 's'}", "resume=true")  # fmt: skip
    assert process.asked == [(words, place)]
    assert code == 3
    assert text.startswith(f"{place / 's'}: running again 0 (failed), 2 (missing)\n")
    told = f"{place / 's' / 'sweep.json'} names script {sys.executable}: not used, but this one's"
    assert told in text


def test_a_single_run_runs_again(place: Path, command: Command, process: type[Process]) -> None:
    start(place / "one", ["method=merge", "run_dir=old", "a='x y'"], place)
    tell(place / "one", "running")
    process.codes = [0]
    assert command("one", "--rerun")[0] == 0
    script = ROOT / "run.py"
    words = (sys.executable, str(script), "method=merge", "a='x y'", f"run_dir={place / 'one'}")
    assert process.asked == [(words, place)]
    assert script.is_file()


def test_several_run_one_after_another(
    place: Path, command: Command, process: type[Process]
) -> None:
    for name in ("a", "b", "c"):
        write_sweep(place / name, [["a=0"]])
    process.codes = [1, -15, 0]
    assert command(place, "--rerun")[0] == 143
    assert len(process.asked) == 3
    process.codes = [0, 130]
    assert command(place, "--rerun")[0] == 130
    assert len(process.asked) == 5  # not the third, after Ctrl-C


def test_nothing_to_run_again(place: Path, command: Command, process: type[Process]) -> None:
    start(place / "one", [], place)
    tell(place / "one", "ok")
    code, text, _ = command(place, "--rerun")
    assert (code, process.asked) == (0, [])
    assert text.startswith("nothing to run again: 1 job: 1 ok")


def test_what_cannot_run_again(
    place: Path, sweep: Path, command: Command, process: type[Process]
) -> None:
    fail(place / "old", 0, place)
    (place / "old" / "multirun.yaml").touch()
    (place / "bare").mkdir()
    tell(place / "bare", "failed")
    write_sweep(place / "moved", [["a=0"]], cwd="/gone")
    fail(place / "away", 0, place / "gone")
    for folder, words in {
        sweep: f"{sweep} is still running (job 3)",
        sweep / "1": f"one job of a sweep, which only runs as a whole, its finished jobs left out: "
        f"python -m moe_lab.runs {sweep} --rerun",
        place / "old": f"hydra.sweep.dir={place / 'old'} resume=true",
        place / "bare": "has no .hydra/overrides.yaml",
        place / "moved": "was written in /gone, which is not there now",
        place / "away": f"was run from {place / 'gone'}, which is not there now",
    }.items():
        code, _, complaints = command(folder, "--rerun")
        assert (code, words in complaints) == (2, True), complaints
    assert command(place, "--rerun")[0] == 2
    assert process.asked == []


@pytest.mark.parametrize("name", ["2026-01-01_10-00-00", "a b, c=[1]", "it's", "50%+@x:y~z", "é"])
def test_folders_are_told_as_hydra_reads_them(place: Path, name: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (place / name).mkdir()
    word = override("run_dir", str(place / name))
    parsed = OverridesParser.create().parse_override(word)
    assert not parsed.is_sweep_override()
    assert str(parsed.value()) == str(place / name)


@pytest.mark.parametrize(
    "word",
    [
        "--config-dir=/else/where", "-cd", "--experimental-rerun=config.pickle", "-c", "evil.py",
        "method._target_=os.system", "+x={_target_:os.system}", "hydra.launcher._target_=a.b",
        "hydra.searchpath=[file:///else]", "+hydra.callbacks.a._target_=os.system",
        "hydra.job.env_set.LD_PRELOAD=/x.so", "++hydra.job_logging.handlers.a=b",
        "hydra.launcher.setup=[evil.sh]", "+hydra.launcher.additional_parameters.prolog=/evil",
        "hydra.launcher.ray.init.address=else:1", "hydra.launcher.submitit_folder=/else",
        "hydra.launcher={partition:a}",
    ],
)  # fmt: skip
def test_words_that_could_name_code_are_not_passed_on(
    word: str, place: Path, command: Command, process: type[Process]
) -> None:
    write_sweep(place / "s", [["a=0"]], argv=["-m", word, REAP], cwd=str(place))
    start(place / "one", [word, REAP], place)
    tell(place / "one", "failed")
    for folder in ("s", "one"):
        code, _, complaints = command(place / folder, "--rerun")
        assert code == 2 and repr(word) in complaints and "give it yourself" in complaints
    assert process.asked == []


def test_a_launcher_and_what_its_jobs_are_given_are_passed_on(place: Path) -> None:
    words = ["hydra/launcher=lab_submitit_slurm", "hydra.launcher.n_jobs=4"]
    words += ["hydra.launcher.partition=gpu", "hydra.launcher.ray.remote.num_gpus=1"]
    rerun.check_recorded(words, place / "sweep.json", place)
    with pytest.raises(UserError, match="can name code"):  # a line of its own in sbatch's script
        rerun.check_recorded([f"{words[2]}\nevil.sh"], place / "sweep.json", place)


@pytest.mark.parametrize("words", [["--config-dir", "mine"], ["--config-dir=mine"]])
def test_ones_own_options_are_passed_on_where_they_were_given(
    words: list[str], place: Path, command: Command, process: type[Process], monkeypatch
) -> None:
    process.codes = [0]
    (place / "mine").mkdir()
    write_sweep(place / "s", [["a=0"]], argv=["-m", *words, REAP], cwd=str(place))
    assert command("s", "--rerun")[0] == 0
    (asked,) = process.asked
    assert words[0] in asked[0] and "mine" in " ".join(map(str, asked[0]))
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    code, _, complaints = command(place / "s", "--rerun")
    assert code == 2 and "given elsewhere" in complaints and len(process.asked) == 1


def test_a_real_process_runs_again_and_never_what_the_file_names(place: Path) -> None:
    evil = place / "evil"
    evil.write_text(f"#!/bin/sh\ntouch {place / 'evil_ran'}\n")
    evil.chmod(0o755)
    names = dict(script=str(evil), python=str(evil), argv=["-m", "metric=nope"])
    write_sweep(place / "s", [["metric=nope"]], cwd=str(place), **names)
    command = [sys.executable, "-m", "moe_lab.runs", "s", "--rerun"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=place, env=environment
    )
    assert done.returncode == 2 and "Could not find 'metric/nope'" in done.stderr
    assert f"names python {evil} and script {evil}: not used" in done.stdout
    assert not (place / "evil_ran").exists()
