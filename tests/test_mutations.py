"""The list of changes that must be noticed: each can be made, and has a test to notice it."""

from __future__ import annotations

import ast

import pytest
from running import ROOT, load_module

check = load_module("mutation_check", ROOT / "tests" / "mutations" / "check.py")
MUTATIONS = check.mutations()


@pytest.mark.parametrize("one", MUTATIONS, ids=lambda one: f"{one.file}:{one.function}")
def test_a_change_can_be_made_and_is_one_of_code(one: check.Mutation) -> None:
    text = (ROOT / one.file).read_text(encoding="utf-8")
    start, end = one.place(text)
    changed = text[:start] + text[start:end].replace(one.before, one.after) + text[end:]
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    assert all((ROOT / path).exists() for path in one.test.split())


def test_the_list_is_of_many_functions() -> None:
    assert len({(one.file, one.function) for one in MUTATIONS}) >= 30
    rooms = {one.file.split("/")[1] for one in MUTATIONS}
    assert rooms >= {"data", "profile", "methods", "models", "finetune", "evaluate", "measure"}


def test_what_is_not_there_once_is_refused() -> None:
    one = MUTATIONS[0]
    text = (ROOT / one.file).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="0 times"):
        check.Mutation(one.file, one.function, "no such code", "", "", "").place(text)
