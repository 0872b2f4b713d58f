"""Names of plug-ins: files of a package, or dotted paths of one's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_lab.lookup import module_in, named, names_in, require_kind
from moe_lab.option import Plugin
from moe_lab.types import UserError

SHELF = "shelf_of_plugins"
FILES = {
    "__init__.py": "",
    "base.py": "from moe_lab.option import Plugin\nclass Kind(Plugin): ...\n",
    "one.py": f"from {SHELF}.base import Kind\nclass One(Kind): ...\ndef choose(): return 1\n",
    "two.py": f"from {SHELF}.base import Kind\nclass A(Kind): ...\nclass B(Kind): ...\n",
}


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / SHELF).mkdir()
    for name, text in FILES.items():
        (tmp_path / SHELF / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == SHELF]:
        del sys.modules[name]


def test_the_names_are_those_of_the_files() -> None:
    assert names_in(SHELF) == ["one", "two"]
    assert names_in(SHELF, ()) == ["base", "one", "two"]
    assert module_in(SHELF, "one").choose() == 1


def test_a_name_stands_for_what_its_file_has() -> None:
    kind = module_in(SHELF, "base").Kind
    assert named("group.kind", "one", SHELF, "choose")() == 1
    assert named("group.kind", "one", SHELF, kind).__name__ == "One", "not the base it imports"


def test_a_dotted_path_stands_for_what_lies_there() -> None:
    kind = module_in(SHELF, "base").Kind
    for path in (f"{SHELF}.one", f"{SHELF}.one.choose"):
        assert named("group.kind", path, "moe_lab.methods", "choose")() == 1
    for path in (f"{SHELF}.one", f"{SHELF}.one.One"):
        assert named("group.kind", path, "moe_lab.methods", kind).__name__ == "One"


def test_what_does_not_exist_is_told_with_what_does() -> None:
    kind = module_in(SHELF, "base").Kind
    for given in ("three", "base", f"{SHELF}.three", "nothing.here", "one.choose", "os"):
        with pytest.raises(UserError) as refused:
            named("group.kind", given, SHELF, "choose", also=", or a list")
        told = f"group.kind={given!r} does not exist; there are one, two, or a list, or the path"
        assert str(refused.value).startswith(told)
    with pytest.raises(UserError, match="does not exist"):
        named("group.kind", "two", SHELF, kind)  # which of its two classes?
    with pytest.raises(UserError, match="does not exist"):
        named("group.kind", "two", SHELF, "choose")


def test_what_is_of_another_kind_is_refused() -> None:
    made = Plugin()
    assert require_kind("ratio", made, Plugin) is made
    with pytest.raises(UserError, match=r"^ratio is int, .* derived from moe_lab.option.Plugin$"):
        require_kind("ratio", 1, Plugin)
    with pytest.raises(UserError, match=r"^ratio is null, "):
        require_kind("ratio", None, Plugin)
