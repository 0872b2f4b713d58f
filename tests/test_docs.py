"""The papers: links lead somewhere, what is named is there, and what is printed works as printed.

Blocks of docs/adding.md are written to the files that stand before them, and its commands are run;
other commands are composed. docs/reference.md is held against reports and plans of small runs.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from families import tiny_model
from hydra.core.override_parser.overrides_parser import OverridesParser
from odd_families import odd_model
from omegaconf import OmegaConf
from running import OFFLINE, ROOT, Outcome, load_module, rooms
from safetensors.torch import load_file, save_file

import moe_lab
from moe_lab import files
from moe_lab.export.__main__ import _arguments as arguments_of_export
from moe_lab.methods.condense.base import UnitCandidates, choice_named, chooses_units
from moe_lab.methods.least_squares import NormalEquations, TokenRows
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import Plan, known_kinds, read_edit
from moe_lab.report.figures import FIGURES, better
from moe_lab.report.report import read_report
from moe_lab.runs import moved, options
from moe_lab.runs.__main__ import _arguments as arguments_of_runs
from moe_lab.tables.__main__ import _arguments as arguments_of_tables

DOCS = sorted((ROOT / "docs").glob("**/*.md"))
OURS = [*sorted(ROOT.glob("*.md")), *DOCS]
PAGES = [*OURS, *sorted((ROOT / "experiments").glob("**/*.md"))]
READ_FIRST = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]  # all commands composed
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
ADDING = ROOT / "docs" / "adding.md"
REFERENCE = ROOT / "docs" / "reference.md"
figures = load_module("figures_of_the_docs", ROOT / "docs" / "figures.py")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Job = Callable[..., Outcome]


# Texts of the tests, and few: reading the embedded ones takes seconds.
HELD_OUT = [
    "calibration@eval.held_out=files",
    "eval.held_out.files=${calibration.files}",
    "eval.held_out.num_samples=4",
]
SPEED = ["measure.repeats=1", "measure.prompt_length=8", "measure.decode_tokens=1"]
LM = [
    "calibration@finetune.phases.lm.data=files",
    "finetune.phases.lm.data.files=${calibration.files}",
    "finetune.phases.lm.data.num_samples=8",
    "calibration@finetune.phases.lm.validation=files",
    "finetune.phases.lm.validation.files=${calibration.files}",
    "finetune.phases.lm.validation.num_samples=4",
    "+finetune.phases.lm.num_steps=2",
]


# --------------------------------------------------------------------------- blocks and sections


@dataclass(frozen=True)
class Block:
    """A code block; path: the file that stands before it."""

    language: str
    text: str
    path: str | None


def section_of(page: Path, title: str) -> str:
    """The text under a heading, up to the next of its level."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {title!r}"
    return found[1]


def blocks_of(text: str) -> list[Block]:
    """The code blocks of a text, each with the last line before it that is a file's name alone."""
    found, path, end = [], None, 0
    for fence in FENCE.finditer(text):
        names = re.findall(r"^`([^`\n]+)`:$", text[end : fence.start()], re.MULTILINE)
        path, end = names[-1] if names else path, fence.end()
        found.append(Block(fence[1], fence[2], None if fence[1] == "bash" else path))
    return found


def commands_of(text: str) -> list[str]:
    """The lines of the shell blocks of a text, continued ones whole, without their comments."""
    lines = []
    for block in FENCE.finditer(text):
        if block[1] == "bash":
            lines += re.sub(r"\\\n\s*", "", block[2]).splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


SECTIONS = re.findall(r"^## (.+)$", ADDING.read_text(encoding="utf-8"), re.MULTILINE)
MADE = {block.path for title in SECTIONS for block in blocks_of(section_of(ADDING, title))} - {None}


def changed(text: str, change: str) -> str:
    """The text after a change of - and + lines, whose other lines stand around them there."""
    lines = change.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    after = "".join(line[1:] for line in lines if not line.startswith("-"))
    assert text.count(before) == 1, f"not there, or not once:\n{before}"
    return text.replace(before, after)


def follow(title: str, home: Path) -> list[str]:
    """Write the blocks of a section below `home`; its commands."""
    text = section_of(ADDING, title)
    for block in blocks_of(text):
        if block.path is None:
            continue
        path = home / block.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if block.language == "diff":
            path.write_text(changed(path.read_text(encoding="utf-8"), block.text), "utf-8")
        else:
            there = path.read_text(encoding="utf-8") if path.exists() else block.text
            assert there == block.text, f"{block.path} is there already, and another one"
            path.write_text(block.text, encoding="utf-8")
    return commands_of(text)


# --------------------------------------------------------------------------- how to add


@pytest.fixture(autouse=True)
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs draw no pictures, which take longer than all else of a small one."""
    monkeypatch.setattr("moe_lab.runs.job._drawn", lambda *_: [])
    monkeypatch.setattr("moe_lab.diagnose.pictures.draw_experts", lambda *tables: None)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of one's own, in which commands are given; what it is imported as is forgotten."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MOE_LAB_ROOT", str(ROOT))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or str(folder)
        if Path(file).is_relative_to(folder):
            parent, _, child = name.rpartition(".")
            vars(sys.modules.get(parent, home)).pop(child, None)
            del sys.modules[name]


def given_to_run(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The overrides of a printed command, what stands around them being done in this process."""
    words = shlex.split(command)
    if words[0] == "PYTHONPATH=.":
        monkeypatch.syspath_prepend(home)
        words = words[1:]
    assert words[:2] == ["python", "run.py"], command
    words = words[2:]
    if words[0] == "--config-dir":
        places = [home / words[1], ROOT / "experiments"]
        words = [
            f"hydra.searchpath=[{','.join(f'file://{place}' for place in places)}]",
            *words[2:],
        ]
    assert not [word for word in words if word.startswith("-")], command
    return words


def as_in_the_package(home: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files below `home` are found as if they lay in this package of ours."""
    module = importlib.import_module(package)
    place = home / package.replace(".", "/")
    monkeypatch.setattr(module, "__path__", [*module.__path__, str(place)])


def run_one(command: str, job: Job, home: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    """The job of a printed command, made small by further options; it goes well."""
    outcome = job(*given_to_run(command, home, monkeypatch), *more)
    assert outcome.code == 0, outcome.text
    assert outcome.report["status"] == "ok"
    return outcome


def plan_of(home: Path) -> Plan:
    return Plan.load(home.parent / "job" / "plan.json")


def test_the_page_has_a_section_for_each_kind() -> None:
    kinds = "metric units ratio grouping rule condensing recipe quantizer decoding source".split()
    kinds += "edit model family family figure stage experiment".split()
    assert [title.split()[-1] for title in SECTIONS if title != "A condensing choice"] == [
        kind for kind in kinds if kind != "condensing"
    ]
    for title in SECTIONS:
        text = section_of(ADDING, title)
        assert len(commands_of(text)) == 1, title
        blocks = blocks_of(text)
        assert all(block.path or block.language == "bash" for block in blocks), title


def test_blocks_are_in_the_style_of_the_code(tmp_path: Path) -> None:
    written = []
    for number, title in enumerate(SECTIONS):
        for place, block in enumerate(blocks_of(section_of(ADDING, title))):
            if block.language == "python":
                written.append(tmp_path / f"block_{number}_{place}.py")
                written[-1].write_text(block.text, encoding="utf-8")
    settings = ["--config", str(ROOT / "pyproject.toml")]
    for order in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *order, *settings, *map(str, written)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_metric(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A metric", home)
    outcome = run_one(command, job, home, monkeypatch)
    assert outcome.report["metric"] == "confident"
    assert outcome.report["metric/power"] == 1
    assert all(len(edit.kept) == 6 for edit in plan_of(home).edited())


def test_a_metric_of_hidden_units(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A metric of hidden units", home)
    outcome = run_one(command, job, home, monkeypatch)
    assert (outcome.report["metric"], outcome.report["metric/power"]) == ("peak", 2)
    plan = plan_of(home)
    assert plan.notes["widths"] == "by_expert"
    for edit in plan.edited():
        assert edit.widths and sum(edit.widths) == 8 * 16 * 3 // 4


def test_a_ratio(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A ratio", home)
    outcome = run_one(command, job, home, monkeypatch)
    assert outcome.report["ratio_method"] == "second_half"
    assert [len(edit.kept) for edit in plan_of(home).edits] == [8, 4, 4]
    refused = job(*given_to_run(command, home, monkeypatch), "ratio.kept=2")
    assert refused.code == 2 and "2 of 8 experts would stay" in refused.text
    refused = job(*given_to_run(command, home, monkeypatch), "ratio.kept=0")
    assert refused.code == 2 and "ratio.kept=0: it must be at least 1" in refused.text


def test_a_grouping(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A grouping", home)
    outcome = run_one(command, job, home, monkeypatch)
    assert outcome.report["merge/grouping"] == plan_of(home).notes["grouping"] == "most_used"
    assert outcome.report["merge/place"] == 2
    for edit in plan_of(home).edited():
        assert sorted(map(len, edit.groups)) == [1, 1, 1, 5]
        (first,) = (group[0] for group in edit.groups if len(group) == 5)
        assert edit.scores[first] == sorted(edit.scores)[-2]
    given = given_to_run(command, home, monkeypatch)
    again = job(*given, "method.grouping=research.most_used.MostUsed")
    assert again.code == 0, again.text
    assert again.report["merge/place"] == 1, "by its path it has its defaults"
    for edit in plan_of(home).edited():
        (first,) = (group[0] for group in edit.groups if len(group) == 5)
        assert edit.scores[first] == max(edit.scores)
    refused = job(*given, "grouping.place=0")
    assert refused.code == 2 and "grouping.place=0: it must be at least 1" in refused.text


def test_a_condensing_choice(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A condensing choice", home)
    as_in_the_package(home, "moe_lab.methods.condense.gates", monkeypatch)
    outcome = run_one(command, job, home, monkeypatch)
    assert outcome.report["condense/experts"] == "research.reap"
    plan = plan_of(home)
    assert plan.layer_order == (2,)  # of the layers 1, 2, 3
    (edit,) = plan.edited()
    assert edit.gates == pytest.approx([1 / 3, 1 / 3])
    chosen = choice_named("experts", "research.loudest")(candidates_of_units())
    assert chooses_units("research.loudest") and chosen.tolist() == [2, 0]


def candidates_of_units() -> UnitCandidates:
    """Three hidden units, that add 4, 1 and 9 over two tokens, of which two may stay."""
    equations = NormalEquations(3, 1)
    z_TN = torch.tensor([[2.0, 0.0, 3.0], [0.0, 1.0, 0.0]])
    equations.add(TokenRows(z_TN, torch.ones(2, 1), torch.ones(2)))
    units_N2 = torch.tensor([[-1, 0], [0, 0], [1, 0]])
    return UnitCandidates(units_N2, equations, torch.ones(3, 1), width=2, num_routed=1)


def test_a_recipe(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A recipe", home)
    outcome = run_one(command, job, home, monkeypatch, *LM[:3], "finetune.phases.lm.num_steps=2")
    assert outcome.report["finetune"] == "norms"
    assert outcome.report["finetune/first_layer"] == 2
    made = Path(outcome.report["finetuned/checkpoint"]).parent / files.TRAINABLE
    trained = json.loads(made.read_text(encoding="utf-8"))["tensors"]
    assert trained and all("norm" in name for name in trained)
    layers = {name.split(".")[2] for name in trained if name.startswith("model.layers.")}
    assert layers == {"2", "3"}
    given = given_to_run(command, home, monkeypatch)
    for value, words in (("-1", "it must be at least 0"), ("x", "it must be a whole number")):
        refused = job(*given, *LM[:3], f"finetune.first_layer={value}")
        assert refused.code == 2 and f"finetune.first_layer={value}: {words}" in refused.text


def test_a_skipping_rule(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A skipping rule", home)
    outcome = run_one(command, job, home, monkeypatch, "eval=none")
    assert outcome.report["skip/rule"] == "research.thinned"
    numbers = {edit.index: edit.to_json().get("top_k") for edit in plan_of(home).edits}
    assert set(list(numbers.values())[1::2]) == {1}


def test_a_quantizer(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A quantizer", home)
    outcome = run_one(command, job, home, monkeypatch, *HELD_OUT, "eval=perplexity")
    assert outcome.report["quantize"] == "ternary" and outcome.report["quantized/kl"] > 0
    assert outcome.report["quantized/bits_per_weight"] < 4


def test_a_decoding(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A decoding", home)
    given = given_to_run(command, home, monkeypatch)
    refused = job(*given, "decoding.top_k=0", "eval.held_out=null")
    assert refused.code == 2 and "decoding.top_k=0: it must be at least 1" in refused.text
    outcome = job(*given, "eval.held_out=null", "dry_run=true")
    assert outcome.code == 0, outcome.text


def test_a_calibration_source(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A calibration source", home)
    (home / "mail").mkdir()
    for number, text in enumerate(["Dear Ann, it rains.", "Hi", "Dear Bob, it is dry."]):
        (home / "mail" / f"{number}.txt").write_text(text, encoding="utf-8")
    outcome = run_one(command, job, home, monkeypatch, "calibration.num_samples=2")
    assert outcome.report["calibration"] == "letters"
    assert (outcome.report["calibration/folder"], outcome.report["calibration/shortest"]) == (
        "mail", 8,
    )  # fmt: skip
    given = given_to_run(command, home, monkeypatch)
    for option, words in (
        ("calibration.num_samples=3", "the letters of mail holds only 2 documents"),
        ("calibration.shortest=0", "calibration.shortest=0: it must be at least 1"),
        ("calibration.folder=nowhere", "nowhere has no *.txt"),
    ):
        refused = job(*given, option)
        assert refused.code == 2 and words in refused.text, refused.text
        assert "Traceback" not in refused.text


def test_an_edit(home: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("An edit", home)
    report = run_one(command, job, home, monkeypatch).report
    plan = json.loads((home.parent / "job" / "plan.json").read_text(encoding="utf-8"))
    assert [edit["edit"] for edit in plan["layers"]] == ["round"] * 3
    assert plan["layers"][0]["bits"] == report["round_experts/bits"] == 3
    assert report["compressed/stock"] is True
    weights = load_file(Path(report["compressed/checkpoint"]) / "model.safetensors")
    row = weights["model.layers.2.mlp.experts.5.up_proj.weight"][0]
    assert len(row.abs().unique()) <= 4  # 0, 1, 2, 3 times the step
    # Its file is part of the result's key.
    file = home / "research" / "round_experts.py"
    file.write_text(file.read_text(encoding="utf-8").replace("1e-12", "1e-9"), encoding="utf-8")
    for name in [name for name in sys.modules if name.startswith("research")]:
        del sys.modules[name]
    again = run_one(command, job, home, monkeypatch)
    assert again.report["cached/profile"] and not again.report["cached/compress"]


def test_what_a_kind_of_edit_may_say_is_there() -> None:
    table = section_of(ADDING, "An edit").partition("| it | says |")[2]
    named = set(re.findall(r"`(\w+)`", table.partition("\n\n")[0])) - {"EditOfExperts"}
    assert len(named) > 10
    for name in named - {"kept"}:
        assert hasattr(Edit, name), name


def test_a_stage(workshop: Path, small: list[str], tmp_path: Path) -> None:
    few = [*small, f"store={tmp_path / 'store'}", "measure=none"]
    report, _ = run_in(workshop, "A stage", tmp_path / "run", *few)
    assert report["compressed/tally"] == 3 * 4, "of three layers half is left"
    assert report["cached/tally"] is False and report["artifact/tally"].startswith("tally/")
    again, _ = run_in(workshop, "A stage", tmp_path / "again", *few)
    assert again["cached/tally"] is True and again["compressed/tally"] == 12


def test_a_model(home: Path, job: Job, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A model", home)
    model = tiny_model("glm4_moe", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(home / "original")
    tokenizer.save_pretrained(home / "original")
    outcome = run_one(command, job, home, monkeypatch)
    assert outcome.report["model"] == "house_model"
    assert plan_of(home).edits[0].kind == "prune"


def test_an_odd_family(
    home: Path, job: Job, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = follow("An odd family", home)
    (path,) = [one for one in MADE if one.startswith("moe_lab/models/adapters/")]
    ours = (ROOT / path).read_text(encoding="utf-8")
    assert (home / path).read_text(encoding="utf-8") == ours
    for adapter in (ROOT / path).parent.glob("*.py"):
        lines = adapter.read_text(encoding="utf-8").splitlines()
        assert adapter.stem == "base" or len(lines) <= 90, adapter.name
    model = odd_model("dbrx", vocab_size=len(tokenizer), max_seq_len=512)
    model.save_pretrained(home / "original")
    tokenizer.save_pretrained(home / "original")
    outcome = run_one(command, job, home, monkeypatch)
    assert all(edit.kind == "prune" for edit in plan_of(home).edits)
    assert (
        "transformer.blocks.0.ffn.experts.mlp.w1"
        in moe_lab.load(outcome.report["compressed/checkpoint"]).state_dict()
    )


def test_a_family(home: Path, job: Job, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = follow("A family", home)
    as_in_the_package(home, "moe_lab.models.families", monkeypatch)
    model = tiny_model("mixtral", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(home / "original")
    tokenizer.save_pretrained(home / "original")
    weights = home / "original" / "model.safetensors"
    renamed = {name.replace(".gate.", ".switch."): one for name, one in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    config = json.loads((home / "original" / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "toy_moe"
    (home / "original" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    outcome = run_one(command, job, home, monkeypatch)
    assert outcome.stages() == ["compress", "convert", "plan", "profile"]
    read = moe_lab.load(outcome.report["dense/checkpoint"]).state_dict()
    assert read.keys() == model.state_dict().keys()
    assert all(bool((read[name] == one).all()) for name, one in model.state_dict().items())


def test_an_experiment(
    home: Path, composed: Callable[..., Any], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = follow("An experiment", home)
    given = given_to_run(command, home, monkeypatch)
    params = composed(*given).hydra.sweeper.params
    assert dict(params) == {"metric": "random,reap", "ratio.ratio": "0.25,0.5"}
    first = [f"{key}={value.partition(',')[0]}" for key, value in params.items()]
    outcome = job(*given, *first)
    assert outcome.code == 0, outcome.text
    with (home / "research_conf/my_paper/first_table/expected.csv").open(newline="") as file:
        settings = {key for row in csv.DictReader(file) for key in row}
    assert settings - {"figure", "value", "tolerance"} <= outcome.report.keys()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code in which every section of the page was followed."""
    copy = tmp_path_factory.mktemp("workshop")
    unused = shutil.ignore_patterns("checkpoints", "__pycache__")
    for name in ("moe_lab", "conf", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=unused)
    shutil.copyfile(ROOT / "run.py", copy / "run.py")
    for title in SECTIONS:
        follow(title, copy)
    return copy


def test_what_was_added_keeps_to_the_rooms(workshop: Path) -> None:
    rooms = load_module("rooms_of_the_workshop", workshop / "docs" / "rooms.py")
    for module, path in rooms.FILES.items():
        names = [name for _, name in rooms.imports(path.read_text(encoding="utf-8"))]
        assert not [reason for name in names if (reason := rooms.why_not(module, name))], module
    added = [path for path in MADE if path.startswith("moe_lab/") and not (ROOT / path).exists()]
    assert len(added) == 2, "all else may lie outside the package"
    for path in added:
        assert rooms.is_plugin(rooms.module_of(rooms.ROOT / path)), path


def run_in(workshop: Path, title: str, folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    """The command of a section in the copy, in a process of its own: its report, what it said."""
    (command,) = commands_of(section_of(ADDING, title))
    given = shlex.split(command.removeprefix("PYTHONPATH=. "))[1:]
    words = [sys.executable, *given, *more, "eval=none", f"run_dir={folder}"]
    done = subprocess.run(
        words, cwd=workshop, capture_output=True, text=True, timeout=600,
        env=os.environ | OFFLINE | {"PYTHONPATH": str(workshop)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return read_report(folder), done.stdout


def test_a_report_figure(workshop: Path, tmp_path: Path, small: list[str]) -> None:
    quick = ["measure.repeats=1", "measure.prompt_length=8", "measure.decode_tokens=1"]
    more = [*small, *quick, f"store={tmp_path / 'store'}"]
    report, said = run_in(workshop, "A report figure", tmp_path / "run", *more)
    assert (report["dense/experts"], report["compressed/experts"]) == (24, 12)
    (line,) = (line for line in said.splitlines() if "routed experts" in line)
    assert re.findall(r"\d+", line) == ["24", "12"]
    card = (Path(report["compressed/checkpoint"]) / "README.md").read_text(encoding="utf-8")
    assert "| routed experts | 24 | 12 |" in card
    script = [sys.executable, "docs/figures.py"]
    subprocess.run(script, cwd=workshop, check=True, env=os.environ | {"PYTHONPATH": str(workshop)})
    reference = (workshop / "docs" / "reference.md").read_text(encoding="utf-8")
    assert "\n| `<variant>/experts` |" in reference


# --------------------------------------------------------------------------- what is named


def anchors_of(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in plain}


@EACH_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        made = target.name == "rooms.svg"  # drawn by docs/rooms.py
        assert made or target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name}: {link}"


PATH = re.compile(r"(?<![\w/.<-])(?:moe_lab|conf|experiments|tests|docs)/[\w./-]*[\w/]")


@EACH_PAGE
def test_paths_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {path.rstrip("/") for path in PATH.findall(text)} - MADE
    wanting = sorted(path for path in named if not (ROOT / path).exists())
    assert [path for path in wanting if path != "docs/rooms.svg"] == []


@EACH_PAGE
def test_modules_and_tables_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (moe_lab[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for name in re.findall(r"`(moe_lab(?:\.\w+)+)`", text) if page.name != "CHANGELOG.md" else ():
        assert is_there(name), name
    for paper, table in re.findall(r"(?<![\w'])\+(\w+)=(\w+)", text):
        made = f"research_conf/{paper}/{table}.yaml" in MADE
        assert made or (ROOT / "experiments" / paper / f"{table}.yaml").is_file(), (paper, table)


def is_there(name: str) -> bool:
    """Whether a dotted path is a module of ours, or something in one."""
    module, _, attribute = name.rpartition(".")
    try:
        return bool(importlib.util.find_spec(name)) or hasattr(module_of(module), attribute)
    except ModuleNotFoundError:
        return hasattr(module_of(module), attribute)


def module_of(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("page", READ_FIRST, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    there = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)) <= set(there)


@EACH_PAGE
def test_nothing_of_this_machine_or_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?:^|[\s\"'`(=\[])/(?:home|work|tmp|root|usr|opt|mnt)/", text)
    for outside in ("pypi.", "index-url", "../shared", "PIP_INDEX"):
        assert outside not in text, outside
    if page in OURS:
        assert "http" not in re.sub(r"https?_", "", text)


# --------------------------------------------------------------------------- commands

PLACES = {"<folder or hub id>": "some/folder", "<folder>": "some/folder", "<sweep>": "mine"}


def every_command(page: Path) -> list[str]:
    """What a page says to type, also between backticks; no more than a beginning left out."""
    text = page.read_text(encoding="utf-8")
    for place, example in PLACES.items():
        text = text.replace(place, example)
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    inline = [shlex.join(shlex.split(code)) for code in inline if code.startswith("python ")]
    found = [*commands_of(text), *inline]
    return [command for command in dict.fromkeys(found) if "..." not in command]


def first_of_each(words: list[str]) -> list[str]:
    """Overrides of a sweep, each with its first value."""
    found = []
    for one in OverridesParser.create().parse_overrides(words):
        every = one.sweep_string_iterator() if one.is_sweep_override() else None
        value = next(every) if every else one.get_value_element_as_str()
        found.append(f"{one.get_key_element()}={value}")
    return found


@pytest.mark.parametrize("page", READ_FIRST, ids=lambda page: page.name)
def test_commands_can_be_given(page: Path, composed: Callable[..., Any]) -> None:
    for command in every_command(page) if page != ADDING else ():
        words = shlex.split(command)
        own = any(word in ("--config-dir", "--help") for word in words)
        if words[:2] == ["python", "run.py"] and not own:
            place = words.index("--cfg") if "--cfg" in words else len(words)
            given = [word for word in words[2:place] if word != "-m"]
            check_composes(composed, given)
        elif words[:3] == ["python", "-m", "moe_lab.tables"]:
            assert arguments_of_tables(words[3:])
        elif words[:3] == ["python", "-m", "moe_lab.export"]:
            assert arguments_of_export(words[3:])
        elif words[:3] == ["python", "-m", "moe_lab.runs"]:
            assert arguments_of_runs(words[3:])
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), command


def check_composes(composed: Callable[..., Any], given: list[str]) -> None:
    """A job of a command, put together and checked as run.py does."""
    config = composed(*first_of_each(given))
    params = config.hydra.sweeper.params or {}
    more = first_of_each([f"{key}={value}" for key, value in params.items()])
    if more:
        config = composed(*more, *first_of_each(given))
    choices = dict(config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    plain = OmegaConf.to_container(config, resolve=True)
    options.check_request(plain, OmegaConf.to_container(config), choices)


# --------------------------------------------------------------------------- reference


def table_keys(title: str) -> list[str]:
    """What stands in the first column of the tables under a heading, between backticks."""
    text = section_of(REFERENCE, title)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return [key for row in rows for key in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


PARTS = {"<variant>": r"(dense|compressed|finetuned)(_top_\d+)?", "<rank>": r"\d+"}


def pattern_of(key: str) -> re.Pattern[str]:
    """A documented key as an expression; `<...>` is a name, which may have no slash."""
    parts = [PARTS.get(part, r"[^/]+") if part.startswith("<") else re.escape(part)
             for part in re.split(r"(<\w+>)", key)]  # fmt: skip
    return re.compile("".join(parts))


def undocumented(report: dict[str, Any]) -> list[str]:
    patterns = [pattern_of(key) for key in table_keys("report.json")]
    return [key for key in report if not any(one.fullmatch(key) for one in patterns)]


RUNS = {
    "one expert per token in the end": [
        *"method=prune metric=soft_count ratio=global finetune=seer eval=perplexity".split(),
        *("measure=speed", "diagnose=full", *HELD_OUT, *SPEED, *LM),
    ],
    "stand-ins, a teacher": [
        *"method=prune metric=reap ratio.ratio=0.5 method.replacement=zero".split(),
        *("eval=perplexity", "finetune=experts", "finetune.distillation=0.5", *HELD_OUT, *LM),
    ],
    "condensed": ["method=condense"],
    "merged": ["method=merge", "method.grouping=hc_smoe", "ratio.ratio=0.25"],
    "refused": ["method=prune", "ratio.ratio=0.9"],
}
SEEN: dict[str, set[str]] = {}


@pytest.mark.parametrize("name", RUNS)
def test_every_key_is_in_the_reference(name: str, job: Job, tmp_path: Path) -> None:
    outcome = job(*RUNS[name])
    assert outcome.code == (2 if name == "refused" else 0), outcome.text
    SEEN[name] = set(outcome.report)
    assert undocumented(outcome.report) == []
    plan = tmp_path / "job" / files.PLAN
    head = json.loads(plan.read_text(encoding="utf-8")) if outcome.code == 0 else {}
    assert head.keys() <= set(table_keys("plan.json"))


def test_every_key_of_the_reference_is_one() -> None:
    """Seen in a run of the test before, or said by the code (those that need a network, say)."""
    if SEEN.keys() != RUNS.keys():
        pytest.skip("needs the reports of the test before it")
    seen = set().union(*SEEN.values())
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "moe_lab").rglob("*.py"))
    for key in table_keys("report.json"):
        if not any(pattern_of(key).fullmatch(one) for one in seen):
            last = [part for part in key.split("/") if "<" not in part][-1]
            assert re.search(rf"[\"'/]{last}[\"'/]", code), f"{key} is no key of a report"


def test_the_tables_of_figures_are_up_to_date() -> None:
    """After a change of moe_lab/report/figures.py: python docs/figures.py."""
    page = REFERENCE.read_text(encoding="utf-8")
    assert page == figures.with_tables(page)
    hidden = page.replace("| less |", "| more |")
    assert figures.with_tables(hidden) == page != hidden


def test_every_figure_is_in_the_reference() -> None:
    """Those with a line of their own, and those that the line of a pattern has."""
    told = [pattern_of(key) for key in table_keys("report.json")]
    for figure in FIGURES:
        example = re.sub(r"<rank>", "1", figure.key.replace("<variant>", "dense"))
        assert any(one.fullmatch(example) for one in told), figure.key


def test_which_way_is_better() -> None:
    """The column of that name says what tables and pictures take for better."""
    words = {"more": 1, "less": -1, "–": 0}
    rows = [line.split(" | ") for line in section_of(REFERENCE, "report.json").splitlines()]
    told = {row[0][3:-1]: row[3] for row in rows if len(row) == 5 and row[0].startswith("| `")}
    assert len(told) > 20
    for key, word in told.items():
        if word != "by metric":
            assert better(key) == words[word], key


def test_fields_of_a_plan() -> None:
    """The table of fields by kind of edit, and example lines that runs made."""
    text = section_of(REFERENCE, "plan.json").partition("### A layer's edit")[2]
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (`.*) \|$", text, re.MULTILINE)
    fields = {kind: re.findall(r"`(\w+)`", cell.rpartition(" | ")[2]) for kind, cell in rows}
    ours = {
        kind: one for kind, one in known_kinds().items() if one.__module__.startswith("moe_lab")
    }
    assert fields.keys() == ours.keys()
    examples = [json.loads(line) for line in re.findall(r'^\{"index".*\}$', text, re.MULTILINE)]
    assert {example["edit"] for example in examples} == fields.keys()
    for example in examples:
        assert read_edit(example).to_json() == example
    for kind, one in ours.items():
        given = {field.name for field in dataclasses.fields(one)} - {"index", "name"}
        assert given == set(fields[kind])


def test_files_and_kinds_of_results() -> None:
    names = [value for key, value in vars(files).items() if key.isupper() and type(value) is str]
    for name in names:
        assert f"`{name}" in REFERENCE.read_text(encoding="utf-8"), name
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "moe_lab").rglob("*.py"))
    kinds = re.findall(r"store\.(?:get|find)\(\s*\"(\w+)\"", code)
    assert set(kinds) == {key.partition("/")[0] for key in table_keys("The store")}


# --------------------------------------------------------------------------- the other papers


def test_the_architecture_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in (*rooms.ROOMS, *rooms.GROUND):
        assert re.search(rf"^ +{room}(\.py|/)? |^{room} ", text, re.MULTILINE), room
    marks = ["![rooms](rooms.svg)", "<!-- rooms: made by docs/rooms.py -->", "<!-- /rooms -->"]
    places = [text.index(mark) for mark in marks]
    assert all(one < other for one, other in pairwise(places))
    assert all(text.count(mark) == 1 for mark in marks)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in DOCS:
        assert page.name == "README.md" or f"({page.relative_to(ROOT / 'docs')})" in index, page


def test_the_options_have_their_place_in_the_docs() -> None:
    written = [page for page in READ_FIRST if page.name != "options.md"]  # made of conf/ itself
    text = "\n".join(page.read_text(encoding="utf-8") for page in written)
    groups = ["metric", "ratio", "grouping", "method", "finetune", "eval", "calibration", "track"]
    for path in (path for group in groups for path in (ROOT / "conf" / group).glob("*.yaml")):
        told = rf"(?<![\w.]){path.stem}(?!\w)"
        if not re.search(r"_(validation|test|questions)(_|$)|^none$|^cd_moe_", path.stem):
            assert re.search(told, text), f"{path.parent.name}={path.stem} is nowhere in the docs"


def test_citation() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= found.keys()
    assert found["version"] == moe_lab.__version__
    assert found["license"] == "Apache-2.0"
    assert all("name" in author for author in found["authors"])


def test_hooks_before_a_commit_call_what_is_installed() -> None:
    found = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in found["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in found["repos"]} == {"local"}
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "mypy"]
    for hook in hooks:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## \[?([\w.]+)\]?", text, re.MULTILINE)
    assert heads[0] == "Unreleased" and moe_lab.__version__ in heads
    moves = re.findall(r"^  \| (`.*`) → `(.*)` \|$", text, re.MULTILINE)
    assert len(moves) > 10
    for names, now in moves:
        assert is_there(now), now
        assert {moved.new_path(name) for name in re.findall(r"`([^`]+)`", names)} == {now}
