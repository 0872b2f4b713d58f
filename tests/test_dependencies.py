"""Code that a result depends on: found from imports, and told apart from words."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import moe_lab.store
from moe_lab import dependencies
from moe_lab.dependencies import WITHOUT_RESULTS, code_version, imported_by, modules_of
from moe_lab.store import Store


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Makes modules in a folder that is on the path, and forgets them."""
    monkeypatch.syspath_prepend(tmp_path)
    made: list[str] = []

    def make(name: str, source: str) -> types.ModuleType:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        made.append(name)
        __import__(name)
        return sys.modules[name]

    yield make
    for name in made:
        sys.modules.pop(name, None)
        sys.modules.pop(name.partition(".")[0], None)


def test_code_counts_and_words_do_not(module) -> None:
    plain = module("plain_a", "def f(x):\n    return x + 1\n")
    worded = module(
        "worded_a",
        '''
        """A module."""

        # a comment
        def f(x):
            """A function."""
            return (x +
                    1)  # explained
        ''',
    )
    other = module("other_a", "def f(x):\n    return x + 2\n")

    def version(one: types.ModuleType) -> str:
        return dependencies.version_of(one.__name__).partition(" ")[2]

    assert version(plain) == version(worded) != version(other)
    assert code_version(plain) == code_version(plain.f) != code_version(worded)
    assert code_version(plain, other) == code_version(other, plain, functools.partial(plain.f, 1))
    assert code_version(plain, other) != code_version(plain)


def test_what_is_said_of_an_option_does_not_count(module) -> None:
    head = "from typing import Annotated\nfrom moe_lab.option import Option\n"
    code = "def f(x: Annotated[int, {}] = {}):\n    return x\n"
    told = module("told_a", head + code.format("Option('a number')", 1))
    better = module("better_a", head + code.format("Option('how many', least=1)", 1))
    other = module("other_b", head + code.format("Option('a number')", 2))
    versions = [dependencies.version_of(one.__name__).partition(" ")[2]
                for one in (told, better, other)]  # fmt: skip
    assert versions[0] == versions[1] != versions[2], "a default counts"


def test_what_is_imported_counts_however_it_is_imported(module) -> None:
    module("kit_b.leaf", "VALUE = 1\n")
    module("kit_b.near", "from .leaf import VALUE\n")
    module("kit_b.unused", "VALUE = 3\n")
    top = module(
        "top_b",
        """
        from __future__ import annotations

        import json
        from typing import TYPE_CHECKING

        import torch

        if TYPE_CHECKING:
            from kit_b.unused import VALUE
        else:
            import kit_b.near


        def f():
            from moe_lab.methods.metrics import reap

            return reap
        """,
    )
    reached = modules_of(top)
    assert {"top_b", "kit_b.near", "kit_b.leaf", "moe_lab.methods.metrics.reap"} <= reached
    assert {"moe_lab.profile.layer", "moe_lab.types"} <= reached, "what our own module imports"
    assert not any(name.startswith(("torch", "json", "kit_b.unused")) for name in reached)


@dataclass
class Holder:
    part: object
    number: int = 1


def test_an_object_is_its_class_and_what_its_fields_hold(module) -> None:
    part = module("part_c", "class Part:\n    pass\n\n\ndef score(x, power):\n    return x\n")
    assert code_version(Store(Path("x"))) == code_version(Store) == code_version(moe_lab.store)
    alone = modules_of(Holder(None))
    assert modules_of(Holder(part.Part())) == alone | {"part_c"}
    assert modules_of(Holder(functools.partial(part.score, power=2))) == alone | {"part_c"}
    assert modules_of(Holder(Path("a"))) == alone
    for held in ([part.Part()], {"a": part.score}, functools.partial(print, inner=part.score)):
        assert modules_of(Holder(held)) == alone | {"part_c"}


def test_a_project_below_the_prefix_is_not_installed() -> None:
    places = {dependencies.Path(sys.prefix).resolve(), dependencies.Path(sys.base_prefix).resolve()}
    assert not places & dependencies.INSTALLED


def test_every_exclusion_is_a_module_that_a_stage_reaches_and_has_a_reason() -> None:
    import moe_lab.stages.pipeline

    named = set(imported_by("moe_lab.dependencies"))
    waiting = [f"moe_lab.stages.{name}" for name in (*moe_lab.stages.pipeline.STAGES, "pipeline")]
    while waiting:
        new = [one for one in imported_by(waiting.pop()) if one not in named]
        named.update(new)
        waiting += new
    named.add("moe_lab.dependencies")
    for name, reason in WITHOUT_RESULTS.items():
        assert name in named and len(reason.split()) > 3, name


def test_a_file_that_is_edited_meanwhile_is_not_what_runs(module, tmp_path: Path) -> None:
    one = module("edited_d", "VALUE = 1\n")
    before = code_version(one)
    (tmp_path / "edited_d.py").write_text("VALUE = 2\n")
    assert code_version(one) == before


def test_code_without_its_source_is_no_base_for_a_key() -> None:
    with pytest.raises(RuntimeError, match="results depend on made_up"):
        made = types.ModuleType("made_up")
        sys.modules["made_up"] = made
        try:
            code_version(made)
        finally:
            del sys.modules["made_up"]


def test_nothing_is_imported_to_find_it() -> None:
    program = (
        "import sys; from moe_lab.dependencies import modules_of; import moe_lab.types;"
        "import moe_lab.stages; print(len(modules_of(sys.modules['moe_lab.types'])),"
        "'torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.split() == ["1", "False"], answer.stderr


def test_our_imports_are_all_seen() -> None:
    """Against Python's own tree: every module of ours that a file names is found."""
    for name in ("moe_lab.stages.texts", "moe_lab.finetune.training", "moe_lab.methods.prune"):
        __import__(name)
        tree = ast.parse(Path(sys.modules[name].__file__).read_text())
        named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {one for one in named if one and one.startswith("moe_lab.") and one.count(".") > 1}
        assert ours - {"moe_lab.models", "moe_lab.profile"} <= set(imported_by(name)) | {
            one for one in ours if Path(one.replace(".", "/"), "__init__.py").is_file()
        }


def test_what_is_read_of_modules_is_kept_for_other_processes(
    module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same versions, without parsing; parsed where the file is damaged or cannot be written."""
    text = "import json\nfrom moe_lab.types import UserError\n\ndef f(x):\n    return x + 1\n"
    one = module("kept_d", text)
    parse, parsed = ast.parse, []
    monkeypatch.setattr(
        dependencies.ast, "parse", lambda text, *rest: parsed.append(1) or parse(text, *rest)
    )

    def asked(store: Path) -> tuple[str, set[str]]:
        """As a new process asks."""
        monkeypatch.setattr(dependencies, "_memory", dependencies._Memory())
        dependencies._read_code.cache_clear()
        dependencies.remember_modules_in(store)
        del parsed[:]
        return code_version(one), modules_of(one)

    first = asked(tmp_path / "store")
    assert parsed and "moe_lab.types" in first[1]
    assert asked(tmp_path / "store") == first and not parsed
    (file,) = (tmp_path / "store" / "code").iterdir()
    record = file.read_text()
    for wrong in (record[:-9], record.replace("moe_lab.types", "moe_lab.finite"), "[]", ""):
        file.write_text(wrong)
        assert asked(tmp_path / "store") == first and parsed
        assert file.read_text() == record
    (tmp_path / "file").write_text("")
    assert asked(tmp_path / "file") == first == asked(tmp_path / "file") and parsed
