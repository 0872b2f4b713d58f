"""Where a result came from: the code's commit, versions of packages, and the machine."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

VERSIONED = ("torch", "transformers", "lm_eval", "moe_lab")


@functools.cache
def commit() -> str:
    """The git commit of the checkout this code runs from.

    "+dirty" is appended where tracked or new files differ; "unknown" outside a checkout.
    """
    checkout = Path(__file__).resolve().parents[1]
    top = _git(checkout, "rev-parse", "--show-toplevel")
    head = _git(checkout, "rev-parse", "HEAD")
    if not top or not head or Path(top).resolve() != checkout:
        return "unknown"
    return f"{head}+dirty" if _git(checkout, "status", "--porcelain") else head


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, read from their metadata."""
    return {"python": platform.python_version()} | {name: version(name) for name in VERSIONED}


@functools.cache
def version(package: str) -> str:
    """The version of an installed package, as it was when that was first asked."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """What the machine calls its CPU."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not of Linux
        told = []
    names = (line.partition(":")[2].strip() for line in told if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git(folder: Path, *arguments: str) -> str:
    """Git's answer, or an empty string where there is no git or no repository."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()
