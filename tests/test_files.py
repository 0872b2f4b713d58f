"""The names of the files that moe_lab writes are said once, in moe_lab/files.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from running import ROOT

from moe_lab import files

# Words such as "plots" mean other things, too; what has an ending is a file.
NAMES = {
    name
    for constant, name in vars(files).items()
    if constant.isupper() and isinstance(name, str) and "." in name
}
HOME = ROOT / "moe_lab" / "files.py"


def repeated(source: str) -> Iterator[tuple[int, str]]:
    """Each string constant that is one of the names, or a path with one: its line and itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for name in NAMES & set(node.value.split("/")):
                yield node.lineno, name


def test_each_name_is_said_once() -> None:
    assert {"report.json", "plan.json", "curve.jsonl", "form.json", ".hydra"} <= NAMES
    found = [
        f"{path.relative_to(ROOT)}:{line} says {name!r} itself"
        for path in sorted((ROOT / "moe_lab").rglob("*.py"))
        if path != HOME
        for line, name in repeated(path.read_text(encoding="utf-8"))
    ]
    assert not found, "import it from moe_lab.files: " + "; ".join(found)


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ('(folder / "plan.json").write_text(text)', True),
        ('folder.glob("*/report.json")', True),
        ('place = f"{name}/curve.jsonl"', True),
        ('"""Writes plan.json and report.json."""', False),
        ('raise UserError(f"{path} holds no plan.json")', False),
        ("path = folder / PLAN", False),
    ],
)
def test_a_repeated_name_is_noticed(source: str, is_one: bool) -> None:
    assert bool(list(repeated(source))) == is_one


def test_no_two_names_are_alike() -> None:
    names = [name for constant, name in vars(files).items() if constant.isupper()]
    assert len(set(names)) == len(names)
