"""Errors of Hydra, OmegaConf, yaml and the disk as messages, and what stays an error of ours."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import MissingConfigException

from moe_lab.runs.refusals import check_words, refusal
from moe_lab.types import UserError


def test_a_disk_names_the_file_or_says_that_it_is_full() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert refusal(full) == (
        "a file of the run cannot be written: No space left on device; choose another "
        "run_dir=<folder> (of a sweep: hydra.sweep.dir=<folder>)"
    )
    named = PermissionError(errno.EACCES, "Permission denied", "/a/[x]")
    assert str(refusal(named)).startswith("/a/[x]: Permission denied; choose another run_dir")


def test_errors_of_ours_are_no_refusals() -> None:
    for error in (ValueError("ours"), TypeError("ours"), KeyError("a"), OSError("ours"), None):
        assert refusal(error) is None


def test_a_refusal_behind_other_errors_is_told() -> None:
    outer = RuntimeError("in the way")
    outer.__cause__ = UserError("ratio.ratio=2: it must be below 1")
    assert refusal(outer) == "ratio.ratio=2: it must be below 1"


def test_broken_yaml_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [1\nb: }")
    with pytest.raises(yaml.YAMLError) as caught, (tmp_path / "a.yaml").open() as file:
        yaml.safe_load(file)
    message = str(refusal(caught.value))
    assert message.startswith("a yaml file is broken") and "a.yaml" in message
    assert "line 2" in message and "\n" not in message


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.path=/a/lr=3e-4", "\"model.path='/a/lr=3e-4'\""),
        ("model.path=/a,b", "several values"),
        ("foo", "'foo' is no option"),
        ("eval=[1]", "a group is chosen by a name"),
        ("metric=null", "a group was given null"),
        ("a.b=1", "a is no option; there are model"),
        ("method=prunes", "Could not find 'method/prunes'"),
        ("hydra/launcher=jobs", "Could not find 'hydra/launcher/jobs'"),
        ("hydra.job.chdir=perhaps", "not a valid bool"),
    ],
)
def test_what_hydra_refuses(word: str, told: str, composed: Callable[..., Any]) -> None:
    with pytest.raises(Exception) as caught:
        composed(word)
    assert told in str(refusal(caught.value))


@pytest.mark.parametrize(
    ("message", "extra"),
    [
        ("In 'hydra/launcher/lab_joblib': Could not load 'hydra/launcher/joblib'.", "joblib"),
        ("In 'hydra/config': Could not find 'hydra/launcher/submitit_slurm'\n\nbasic", "slurm"),
        ("In 'hydra/launcher/lab_ray': Could not load 'hydra/launcher/ray'.", "ray"),
    ],
)
def test_a_launcher_that_is_not_installed(message: str, extra: str) -> None:
    told = refusal(MissingConfigException(message, None))
    assert told and f"pip install 'moe_lab[{extra}]'" in told


def test_a_reference_that_leads_nowhere_names_its_option(composed: Callable[..., Any]) -> None:
    config = composed("model.path=/a${b}")
    with pytest.raises(Exception) as caught:
        print(config.model.path)
    message = str(refusal(caught.value))
    assert message.startswith("model.path=/a${b}: Interpolation key 'b' not found")
    assert r"\${b}" in message, "and how it is written as text"


def test_words_that_are_no_text() -> None:
    check_words(["model.path=/é/日本", "a=b"])
    with pytest.raises(UserError, match=r"^model\.path=/\?b has bytes that are no UTF-8"):
        check_words(["model.path=/\udcffb"])
