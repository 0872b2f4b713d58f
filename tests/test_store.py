"""The store: made once, found again, resumed after a kill, refused early."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from moe_lab import integrity, store
from moe_lab.store import Store, canonical, check_writable, key_of
from moe_lab.types import UserError

IDENTITY = {"model": "tiny", "options": {"ratio": 0.5, "seed": 0}}

# A separate process that makes one result: a line per start of `make`, a partial file, then the
# result; it waits for the file "go" in the middle, so that a test can act there.
WORKER = """
    import sys, time
    from pathlib import Path
    from moe_lab.store import Store

    root, name = Path(sys.argv[1]), sys.argv[2]

    def make(folder):
        with (root / "calls").open("a") as calls:
            calls.write(name + "\\n")
        (folder / "half").write_text(name)
        while not (root / "go").exists():
            time.sleep(0.01)
        (folder / "whole").write_text(name)

    artifact = Store(root).get("profile", {"model": "tiny"}, make)
    print(artifact.cached, artifact.key)
"""


def start_worker(root: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(root), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.01)


def write_hello(folder: Path) -> None:
    (folder / "hello").write_text("hello")


def never(folder: Path) -> None:
    raise AssertionError("a finished result was made again")


def test_made_once_then_found(tmp_path: Path) -> None:
    first = Store(tmp_path).get("plan", IDENTITY, write_hello)
    second = Store(tmp_path).get("plan", IDENTITY, never)
    assert (first.cached, second.cached) == (False, True)
    assert first.folder == second.folder == tmp_path / "plan" / key_of(IDENTITY)
    assert (second.folder / "hello").read_text() == "hello"
    assert second.seconds == pytest.approx(first.seconds, abs=1e-3)


def test_record_says_what_made_it(tmp_path: Path) -> None:
    artifact = Store(tmp_path).get("plan", IDENTITY, write_hello)
    record = json.loads((artifact.folder / "artifact.json").read_text())
    assert record["kind"] == "plan"
    assert record["key"] == artifact.key
    assert record["identity"] == IDENTITY
    assert set(record["versions"]) == {"python", "torch", "transformers", "lm_eval", "moe_lab"}
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", record["commit"])
    assert not list(artifact.folder.glob("*.partial")) + list(artifact.folder.glob(".*"))


def test_kinds_are_apart(tmp_path: Path) -> None:
    Store(tmp_path).get("plan", IDENTITY, write_hello)
    assert not Store(tmp_path).get("profile", IDENTITY, write_hello).cached


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    workers = [start_worker(tmp_path, name) for name in ("a", "b")]
    wait_for(tmp_path / "calls")
    time.sleep(1.0)  # lets the other one reach the lock
    (tmp_path / "go").touch()
    answers = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert (tmp_path / "calls").read_text().count("\n") == 1
    assert sorted(cached for cached, _ in answers) == ["False", "True"]
    assert len({key for _, key in answers}) == 1


def test_killed_in_the_middle_keeps_partial_files(tmp_path: Path) -> None:
    worker = start_worker(tmp_path, "killed")
    folder = tmp_path / "profile" / key_of({"model": "tiny"})
    wait_for(folder / "half")
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    assert not (folder / "artifact.json").exists()

    (tmp_path / "go").touch()
    found = []

    def resume(folder: Path) -> None:
        found.append((folder / "half").exists())
        (folder / "whole").write_text("resumed")

    artifact = Store(tmp_path).get("profile", {"model": "tiny"}, resume)
    assert found == [True]
    assert not artifact.cached
    assert Store(tmp_path).get("profile", {"model": "tiny"}, never).cached


def test_waiting_is_said_once(tmp_path: Path) -> None:
    worker = start_worker(tmp_path, "first")
    wait_for(tmp_path / "calls")
    program = textwrap.dedent(WORKER).replace(
        "root, name", "import logging; logging.basicConfig(level=20); root, name", 1
    )
    command = [sys.executable, "-c", program, str(tmp_path), "second"]
    waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr is not None
    assert "waiting for another job" in waiting.stderr.readline()
    (tmp_path / "go").touch()
    assert waiting.communicate(timeout=60)[1] == ""
    worker.communicate(timeout=60)


def test_failure_leaves_it_undone_and_unlocked(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        Store(tmp_path).get("plan", IDENTITY, fail)
    artifact = Store(tmp_path).get("plan", IDENTITY, write_hello)
    assert not artifact.cached
    assert (artifact.folder / "half").exists()


@pytest.mark.parametrize("broken", ["", "{", "[]", "{}", '{"seconds": null}'])
def test_corrupt_record_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    artifact = Store(tmp_path).get("plan", IDENTITY, write_hello)
    (artifact.folder / "artifact.json").write_text(broken)
    with caplog.at_level(logging.WARNING):
        assert not Store(tmp_path).get("plan", IDENTITY, write_hello).cached
    assert "cannot be read" in caplog.text
    assert Store(tmp_path).get("plan", IDENTITY, never).cached


def test_full_disk_is_explained(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise RuntimeError("write failed: No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"GiB free.*store=<folder>"):
        Store(tmp_path).get("plan", IDENTITY, fill)


def test_key_depends_on_values_alone() -> None:
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_of({"a": [1, 2]}) != key_of({"a": [2, 1]})
    assert key_of({"a": 0.5}) != key_of({"a": 0.25})
    assert re.fullmatch("[0-9a-f]{12}", key_of({}))


def test_numbers_count_by_value() -> None:
    assert canonical({"a": 1.0, "b": -0.0}) == canonical({"a": 1, "b": 0}) == '{"a":1,"b":0}'
    assert canonical({"a": 0.1 + 0.2}) != canonical({"a": 0.3})
    assert len({canonical({"a": value}) for value in (1, True, "1", None)}) == 4


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Path("x"), r"identity\.options\[1\]\.bad is .*PosixPath"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ({1: 2}, "text keys"),
        ({1, 2}, "set"),
        (b"x", "bytes"),
    ],
)
def test_identity_must_be_json(tmp_path: Path, value: object, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        Store(tmp_path).get("plan", {"options": [0, {"bad": value}]}, never)
    assert not list(tmp_path.iterdir())


def test_tensor_in_identity_is_refused() -> None:
    import torch

    with pytest.raises(TypeError, match=r"identity\.scores is .*Tensor"):
        key_of({"scores": torch.zeros(2)})


DAMAGE = {
    "bit": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "cut": lambda file: os.truncate(file, file.stat().st_size - 2),
    "emptied": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "gone": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def write_tree(folder: Path) -> None:
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "weights").write_text("weights")
    (folder / "hello").write_text("hello")


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (how, name)
        for how in DAMAGE
        for name in ("hello", "checkpoint/weights", "artifact.json")
        # Without its record a result was never finished, as after a kill.
        if not (name == "artifact.json" and how == "gone")
    ],
)
def test_damaged_is_set_aside_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, name: str
) -> None:
    first = Store(tmp_path).get("plan", IDENTITY, write_tree)
    DAMAGE[how](first.folder / name)
    os.utime(first.folder / "artifact.json", ns=(1, 1))  # as another process would meet it
    assert Store(tmp_path).find("plan", IDENTITY) is None
    with caplog.at_level(logging.WARNING):
        again = Store(tmp_path).get("plan", IDENTITY, write_tree)
    assert not again.cached and (again.folder / "checkpoint" / "weights").read_text() == "weights"
    aside = tmp_path / "plan" / f"{again.key}.damaged-1"
    assert name in caplog.text and str(aside) in caplog.text
    assert sorted(path.name for path in aside.iterdir())[:2] == ["checkpoint", "damaged.json"]
    assert Store(tmp_path).get("plan", IDENTITY, never).cached


def test_what_a_killed_attempt_half_wrote_goes(tmp_path: Path) -> None:
    def torn(folder: Path) -> None:
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / ".config.json.123.partial").write_text("{")
        (folder / "training_state.safetensors.partial").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).get("plan", IDENTITY, torn)
    made = Store(tmp_path).get("plan", IDENTITY, write_hello)
    names = {path.name for path in made.folder.rglob("*")}
    assert names == {"checkpoint", "hello", "artifact.json"}


def test_second_damage_lies_beside_the_first(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        made = Store(tmp_path).get("plan", IDENTITY, write_hello)
        (made.folder / "hello").write_text(f"other {number}")
        assert store.damage_of(made.folder)
        os.utime(made.folder / "artifact.json", ns=(number, number))
    names = sorted(path.name for path in (tmp_path / "plan").iterdir() if path.is_dir())
    assert names == [made.key, f"{made.key}.damaged-1", f"{made.key}.damaged-2"]


def test_what_a_run_adds_is_no_damage(tmp_path: Path) -> None:
    made = Store(tmp_path).get("compress", IDENTITY, write_tree)
    (made.folder / "checkpoint" / "README.md").write_text("the model card, when the run has ended")
    assert store.damage_of(made.folder, quick=False) is None


def test_folder_of_another_result_is_damaged(tmp_path: Path) -> None:
    made = Store(tmp_path).get("plan", IDENTITY, write_hello)
    other = Store(tmp_path).get("plan", {"other": 1}, write_hello)
    (made.folder / "artifact.json").write_bytes((other.folder / "artifact.json").read_bytes())
    assert str(store.damage_of(made.folder)).endswith(f"it is that of {other.key}")


def test_every_bit_of_a_record_counts(tmp_path: Path) -> None:
    made = Store(tmp_path).get("plan", IDENTITY, write_hello)
    record = made.folder / "artifact.json"
    whole = record.read_bytes()
    unseen = []
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        record.write_bytes(flipped)
        if store.damage_of(made.folder) is None and json.loads(flipped) != json.loads(whole):
            unseen.append(bytes(flipped[place - 20 : place + 20]))
    assert not unseen


def test_results_from_before_sums_are_taken(tmp_path: Path) -> None:
    made = Store(tmp_path).get("plan", IDENTITY, write_hello)
    path = made.folder / "artifact.json"
    record = json.loads(path.read_text())
    del record["files"], record["sha256"]
    path.write_text(json.dumps(record))
    assert Store(tmp_path).get("plan", IDENTITY, never).cached


def test_large_files_are_summed_when_asked(tmp_path: Path, monkeypatch) -> None:
    made = Store(tmp_path).get("compress", IDENTITY, write_tree)
    monkeypatch.setattr(integrity, "QUICK_BYTES", 5)
    (made.folder / "checkpoint" / "weights").write_text("WEIGHTS")
    assert store.damage_of(made.folder) is None
    assert "checkpoint/weights" in str(store.damage_of(made.folder, quick=False))
    (made.folder / "hello").write_text("HELLO")
    assert "hello" in str(store.damage_of(made.folder))


def test_sums_are_taken_once_in_a_process(tmp_path: Path, monkeypatch) -> None:
    Store(tmp_path).get("plan", IDENTITY, write_hello)
    summed = []
    real = integrity.sha256_of
    monkeypatch.setattr(integrity, "sha256_of", lambda file: summed.append(file) or real(file))
    for _ in range(3):
        assert Store(tmp_path).find("plan", IDENTITY)
    assert len(summed) == 1


def test_checkpoint_of_a_store_is_refused_when_damaged(tmp_path: Path) -> None:
    made = Store(tmp_path).get("compress", IDENTITY, write_tree)
    store.check_undamaged(made.folder / "checkpoint")
    store.check_undamaged(tmp_path)  # in no result
    (made.folder / "checkpoint" / "weights").write_text("WEIGHTS")
    with pytest.raises(UserError, match=r"checkpoint is damaged: checkpoint/weights has changed"):
        store.check_undamaged(made.folder / "checkpoint")


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write results to .*store=<folder>"):
        check_writable(tmp_path / "file" / "outputs", 0)


def test_too_little_space_is_refused_with_both_numbers(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "outputs", 1)
    assert not list((tmp_path / "new" / "outputs").iterdir())
    with pytest.raises(UserError, match=r"1048576\.00 GiB .* has [0-9.]+ GiB free"):
        check_writable(tmp_path, 2**50)


def test_import_is_light() -> None:
    program = "import sys, moe_lab.store; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
