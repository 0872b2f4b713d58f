"""Commit, versions, machine: read, and said to be unknown where they are."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from moe_lab import provenance


def test_commit_is_unknown_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "moe_lab" / "provenance.py"))
    assert provenance.commit.__wrapped__() == "unknown"


def test_versions_are_those_that_run() -> None:
    versions = provenance.versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__


def test_package_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "VERSIONED", ("no-such-package",))
    assert provenance.versions()["no-such-package"] == "not installed"


def test_processor_has_a_name_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.processor()

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert provenance.processor() in (platform.processor(), platform.machine())
