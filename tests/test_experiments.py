"""experiments/: every table of a paper composes for its models, its numbers hold, a sweep runs."""

from __future__ import annotations

import copy
import csv
import functools
import itertools
import json
import math
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from running import ROOT, load_module, run_command

from moe_lab.methods.metrics.base import names_of_unit
from moe_lab.report.frame import ORIGIN_KEYS, RESULT_KEYS, SEED_KEYS, label_of
from moe_lab.runs import options
from moe_lab.runs.settings import Description, report_head

FOLDER, SEER = ROOT / "experiments" / "cd_moe", ROOT / "experiments" / "seer_moe"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SEER_EXPERIMENTS = sorted(path.stem for path in SEER.glob("*.yaml"))
FIELD_EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments" / "tiny").glob("*.yaml"))
INSIDE_EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments/inside").glob("*.yaml"))
SCMOE_EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments/scmoe").glob("*.yaml"))
INSIDE_TABLES = [name for name in INSIDE_EXPERIMENTS if name != "published"]
FACTOR_EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments/factorize").glob("*.yaml"))
CLOSED_EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments/closed_form").glob("*.yaml"))
SKIP_EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments/skip").glob("*.yaml"))
SEER_EACH = pytest.mark.parametrize("experiment", SEER_EXPERIMENTS)
TINY, PAPER = ("tiny_deepseek", "tiny_qwen2_moe"), ("deepseek_moe_16b", "qwen1_5_moe_a2_7b")
MODELS = (*TINY, *PAPER)
MARKS = {"CODE", "PAGE", "SHEET", "ABS", "PAPER", "2ND", "INFER"}
RUN = "RUN"  # our own, on a shipped model
SIX = "arc_challenge boolq hellaswag openbookqa piqa winogrande".split()
EIGHT = [*SIX, "mmlu", "rte"]
EACH = pytest.mark.parametrize("experiment", EXPERIMENTS)
Compose = Callable[..., DictConfig]
COMPOSED: dict[tuple[str, ...], DictConfig] = {}


@pytest.fixture
def composed(composed: Compose) -> Compose:
    """As conftest's, but what was composed once in this file is copied."""

    def remembered(*overrides: str) -> DictConfig:
        if overrides not in COMPOSED:
            COMPOSED[overrides] = composed(*overrides)
        return copy.deepcopy(COMPOSED[overrides])

    return remembered


def choices(config: DictConfig) -> dict[str, list[str]]:
    """Of each parameter of a composed sweep, the overrides it goes through."""
    lines = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
    found = {}
    for one in OverridesParser.create().parse_overrides(lines):
        key = one.get_key_element()
        values = one.sweep_string_iterator() if one.is_sweep_override() else None
        found[key] = [f"{key}={value}" for value in values or [one.get_value_element_as_str()]]
    return found


def jobs(params: dict[str, list[str]]) -> list[list[str]]:
    """The first job of a sweep, and for each further value of a parameter one that has it."""
    first = [values[0] for values in params.values()]
    others = [
        [*first[:position], value, *first[position + 1 :]]
        for position, values in enumerate(params.values())
        for value in values[1:]
    ]
    return [first, *others]


def checked(config: DictConfig) -> dict[str, Any]:
    """A composed job as plain data, after the check that run.py makes of it."""
    choice = dict(config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    plain = OmegaConf.to_container(config, resolve=True)
    options.check_request(plain, OmegaConf.to_container(config), choice)
    return plain | {"choices": choice}


def test_the_issue_s_tables() -> None:
    tables = "expert_selection finetune layer_selection layers_sweep main_table num_routed"
    assert tables.split() == EXPERIMENTS
    for experiment in EXPERIMENTS:
        assert f"+cd_moe={experiment}" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("model", MODELS)
@EACH
def test_every_job_composes(experiment: str, model: str, composed: Compose) -> None:
    sweep = composed(f"model={model}", f"+cd_moe={experiment}")
    assert str(sweep.hydra.mode) == "RunMode.MULTIRUN"
    params = choices(sweep)
    every = jobs(params)
    for job in every if model in (TINY[0], PAPER[0]) else every[:1]:
        # The order in which Hydra's sweeper puts them: its own parameters, then the command line.
        found = checked(composed(*job, f"model={model}", f"+cd_moe={experiment}"))
        chosen = found["choices"]
        assert found["model"]["name"] == model
        tiny = model in TINY
        assert (chosen["calibration"], chosen["eval"]) == (
            ("stdlib", "tiny") if tiny else ("c4", "cd_moe")
        )
        num_moe_layers = {"deepseek_moe_16b": 27, "qwen1_5_moe_a2_7b": 24}.get(model, 8)
        assert 0 < found["condense"]["num_layers"] < num_moe_layers


def sizes(experiment: str, model: str, composed: Compose) -> dict[str, int]:
    params = choices(composed(f"model={model}", f"+cd_moe={experiment}"))
    return {key: len(values) for key, values in params.items()}


def test_the_number_of_jobs(composed: Compose) -> None:
    """What the README says that they cost."""
    found = {
        experiment: tuple(
            functools.reduce(lambda a, b: a * b, sizes(experiment, model, composed).values())
            for model in ("tiny_deepseek", "deepseek_moe_16b")
        )
        for experiment in EXPERIMENTS
    }
    assert found["main_table"] == (18, 18)
    assert found["layers_sweep"] == (20, 32)
    assert found["expert_selection"] == (18, 45)
    assert found["layer_selection"] == (22, 55)
    assert found["num_routed"] == (8, 20)


def test_rows_of_the_main_table(composed: Compose) -> None:
    def row(name: str, model: str) -> tuple[Any, ...]:
        job = ["+cd_moe/scale=tiny", f"+cd_moe/row={name}", f"model={model}"]
        found = checked(composed(*job, "+cd_moe=main_table"))
        condense, chosen = found["condense"], found["choices"]
        return chosen["method"], condense["num_layers"], condense["num_routed"], chosen["finetune"]

    big = functools.partial(row, model="deepseek_moe_16b")
    assert big("cd_moe_s")[:3] == ("condense", 8, 0)
    assert big("cd_moe_sr")[:3] == ("condense", 9, 6)
    assert big("layer_drop")[:2] == ("drop_layers", 8)
    assert big("block_drop")[:2] == ("drop_blocks", 8)
    assert big("merge")[:2] == ("merge", 9)
    assert row("dense", "tiny_deepseek")[0] == "none"
    assert row("cd_moe_sr", "tiny_deepseek") == ("condense", 3, 4, "experts_sft")
    assert {row(name, "tiny_deepseek")[3] for name in ("dense", "merge", "layer_drop")} == {"none"}


def test_random_choices_have_seeds_and_others_one(composed: Compose) -> None:
    for experiment, kind in (("expert_selection", "experts"), ("layer_selection", "layers")):
        sweep = composed(f"+cd_moe={experiment}")
        parsed = OverridesParser.create().parse_overrides(choices(sweep)["cd_moe.choice"])
        found = defaultdict(list)
        for choice in (one.value() for one in parsed):
            found[choice.pop(kind)].append(choice)
        assert found.pop("random") == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
        assert all(others == [{}] for others in found.values())
        assert "greedy_js" in found and len(found) >= 6
        assert sweep.cd_moe.choice.seed == 0
        drawn = composed(f"+cd_moe={experiment}", f"cd_moe.choice={{{kind}:random,seed:2}}")
        assert (drawn.condense[kind], drawn.condense.seed) == ("random", 2)


def test_a_checkpoint_of_one_s_own_takes_the_sizes_of_another(composed: Compose) -> None:
    own = ["model=checkpoint", "model.path=some/folder", "+cd_moe=num_routed"]
    params = choices(composed(*own, "cd_moe.like=deepseek_moe_16b"))
    assert params["condense.num_routed"][-1] == "condense.num_routed=6"


# --------------------------------------------------------------------------- published numbers

EXPECTED = sorted(
    path.parent.relative_to(ROOT / "experiments").as_posix()
    for path in (ROOT / "experiments").glob("*/*/expected.csv")
)
EXPECTED_EACH = pytest.mark.parametrize("name", EXPECTED)
LABELS = ("table", "variant", "figure", "value", "std", "tolerance", "provenance", "sure", "note")
FIGURE = re.compile(
    r"(?P<variant>dense|compressed|finetuned)(_top_(?P<top_k>\d+))?/"
    r"(kl|eval/average|eval/(?P<task>\w+)/(?P<metric>acc|acc_norm|exact_match)"
    r"|(?P<measured>parameter_ratio|prefill_speedup|decoding_slowdown|active_parameters)|trainable_share)"
)
PLAIN = {
    *EIGHT,
    "average",
    "average_of_six",
    "memory",
    "speed",
    "perplexity",
    "share_of_dense_average",
}
PLAIN |= {"wikitext_perplexity", "ptb_perplexity", "c4_perplexity", "arc_easy"}
PLAIN |= {"gsm8k", "strategyqa", "mbpp", "humaneval", "seconds_for_512_tokens"}
PLAIN |= {"distinct_experts_16"}
PLAIN |= {"mmlu_drop", "sst5_generate_top_1", "flops_saved", "expert_flops_share"}
ITEMS = dict(arc_challenge=1172, boolq=3270, hellaswag=10042, mmlu=14042, openbookqa=500)
ITEMS |= dict(arc_easy=2376, mathqa=2985)
ITEMS |= dict(piqa=1838, rte=277, winogrande=1267, sst5_generate=2210)
DOUBTS = ("unreliable", "read off", "swapped", "typing error", "gives the dense model 0.940")
DOUBTS += ("what was timed are not known",)


def published(experiment: str) -> list[dict[str, str]]:
    return of_papers(numbers(FOLDER / experiment / "expected.csv"))


def of_papers(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["provenance"] != RUN]


def expected(name: str) -> list[dict[str, str]]:
    return numbers(ROOT / "experiments" / name / "expected.csv")


def numbers(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def asked(row: dict[str, str]) -> dict[str, str]:
    """The settings that pick a row's reports."""
    return {key: value for key, value in row.items() if key not in LABELS and value}


def column(row: dict[str, str]) -> str:
    """The published column: a task, average, parameter_ratio, ... or plain words."""
    found = FIGURE.fullmatch(row["figure"])
    return (found["task"] if found else None) or row["figure"].rpartition("/")[2]


def accuracy(row: dict[str, str]) -> bool:
    return column(row) in {*ITEMS, "average", "average_of_six", "sst5_generate_top_1"}


@EXPECTED_EACH
def test_expected_is_well_formed(name: str) -> None:
    rows = expected(name)
    head = list(rows[0])
    keys = [key for key in head if key not in LABELS]
    assert head[:3] == ["model", "table", "variant"] and set(LABELS) - set(head) <= {"sure"}
    assert head == [*head[:3], *keys[1:], *(key for key in LABELS[2:] if key in head)]
    for row in rows:
        assert None not in row and None not in row.values()
        assert row["provenance"] in {*MARKS, RUN}, row
        assert FIGURE.fullmatch(row["figure"]) or row["figure"] in PLAIN, row
        float(row["value"])
        assert not row["tolerance"] or float(row["tolerance"]) > 0
        assert not row["tolerance"] or row["figure"] not in PLAIN, row
        assert ("eval" in asked(row)) == ("/eval/" in row["figure"] or "/kl" in row["figure"])
        if accuracy(row):
            assert 0.2 < float(row["value"]) < 0.9, row
        if column(row) in ("parameter_ratio", "memory", "share_of_dense_average"):
            assert 0.4 < float(row["value"]) <= 1, row
    given = [(*asked(row).items(), *(row[key] for key in told)) for row in rows
             for told in [("table", "variant", "figure", "provenance")]]  # fmt: skip
    assert len(set(given)) == len(given), "one value for each"


@EACH
def test_published_numbers_of_cd_moe(experiment: str) -> None:
    recipes = {"": "none", "cd_moe_lm": "lm", "sft": "sft", "cd_moe": "lm+sft"}
    for row in published(experiment):
        dense, tuned = row["variant"] == "dense", recipes[row.get("finetune", "")] != "none"
        if FIGURE.fullmatch(row["figure"]):
            variant = "dense" if dense else "finetuned" if tuned else "compressed"
            assert row["figure"].startswith(f"{variant}/"), row
        assert not row["std"] or 0 < float(row["std"]) < 0.02
        if dense:
            assert set(asked(row)) <= {"model", "eval"}
        else:
            assert 0 < int(row["condense/num_layers"]) <= 27
            assert bool(row["condense/num_routed"]) == (row["method"] == "condense")


@EACH
def test_printed_averages_recompute(experiment: str) -> None:
    lines: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in published(experiment):
        keys = ("model", "table", "variant", "condense/num_layers", "condense/num_routed")
        line = lines[(*(row[key] for key in keys), row.get("finetune", ""))]
        line[column(row)] = float(row["value"])
    whole = 0
    for key, line in lines.items():
        average = "average_of_six" if "average_of_six" in line else "average"
        tasks = SIX if average == "average_of_six" else EIGHT
        there = [task for task in tasks if task in line]
        if average in line and there:
            assert there == tasks, key
            whole += 1
            mean = sum(line[task] for task in tasks) / len(tasks)
            assert mean == pytest.approx(line[average], abs=0.001), key
    assert whole >= 3 or experiment == "num_routed"


def test_the_claims_of_the_abstract_follow_from_the_table() -> None:
    rows = {
        (row["variant"], row["finetune"], row["figure"], row["provenance"]): float(row["value"])
        for row in published("main_table")
        if row["model"] == "deepseek_moe_16b"
    }
    dense = rows["dense", "", "dense/eval/average", "PAGE"]
    for variant, finetune in (("compressed", ""), ("finetuned", "cd_moe")):
        share = rows["cd_moe_sr", finetune, f"{variant}/eval/average", "PAGE"] / dense
        claim = rows["cd_moe_sr", finetune, "share_of_dense_average", "ABS"]
        assert share == pytest.approx(claim, abs=0.005)
    trained = 9 * (2 + 6) * 8_650_752 / 16_375_728_128
    assert trained == pytest.approx(
        rows["cd_moe_sr", "cd_moe", "finetuned/trainable_share", "INFER"], abs=5e-5
    )


def test_memory_of_the_sweep_is_the_parameters_left() -> None:
    """58 of 64 routed experts leave a condensed layer of SR, all of them one of S."""
    expert, total = 8_650_752, 16_375_728_128
    seen = 0
    for row in published("layers_sweep"):
        own = row["model"] == "deepseek_moe_16b"
        memory = row["figure"] == "compressed/parameter_ratio"
        if own and memory and row["variant"] in ("cd_moe_s", "cd_moe_sr"):
            gone = int(row["condense/num_layers"]) * (64 - int(row["condense/num_routed"])) * expert
            # The authors counted gigabytes on the card, activations and buffers among them.
            assert float(row["value"]) == pytest.approx(1 - gone / total, abs=0.01)
            seen += 1
    assert seen == 13


def up(number: float) -> float:
    return math.ceil(round(1000 * number, 6)) / 1000


def chance(row: dict[str, str]) -> float:
    """Two standard errors of an accuracy, by the items of its task, or of all eight."""
    tasks = EIGHT if column(row) == "average" else [column(row)]
    spread = float(row["value"]) * (1 - float(row["value"]))
    return 2 * math.sqrt(sum(spread / ITEMS[task] for task in tasks)) / len(tasks)


def tolerance(row: dict[str, str]) -> float | None:
    """What the READMEs say that counts as reproduced."""
    value, std = float(row["value"]), float(row["std"] or 0)
    if row["provenance"] == RUN:
        most = max(0.005, 0.02 * value) if row["figure"].endswith("/kl") else 0.01
        return up(most + (2 * std if row["figure"].startswith("finetuned") else 0))
    doubtful = row.get("sure") == "doubtful" or any(doubt in row["note"] for doubt in DOUBTS)
    if doubtful or row["figure"] in PLAIN:
        return None
    if accuracy(row):
        return up(max(chance(row), 2 * std))
    stated = {"parameter_ratio": 0.01, "trainable_share": 0.001}
    return stated.get(column(row), up(0.1 * value) if column(row) == "prefill_speedup" else None)


@EXPECTED_EACH
def test_tolerances_are_those_of_the_readmes(name: str) -> None:
    for row in expected(name):
        stated = float(row["tolerance"]) if row["tolerance"] else None
        assert stated == tolerance(row), row


# What was published and no job of ours repeats: of the sweep's own variants, other sizes.
WITHOUT_A_JOB = {
    "cd_moe/layers_sweep": {
        *((variant, layers) for variant in ("layer_drop", "block_drop") for layers in ("5", "13")),
    },
    "cd_moe/expert_selection": {("greedy_js", "10")},
    "cd_moe/layer_selection": {("greedy_js", "10")},
    "seer_moe/pruning": {("naee", "")},
}
# Models that only stand beside the paper's own in its main table.
OTHERS = {"gpt_neo_2_7b", "opt_2_7b", "bloom_3b", "openllama_3b"}
# Composed for one model: its sweeps have the same rows as another's.
LIKE = {
    "cd_moe": {"tiny_qwen2_moe": "tiny_deepseek", "qwen1_5_moe_a2_7b": "deepseek_moe_16b"},
    "seer_moe": {"tiny_deepseek": "tiny_mixtral"},
    "tiny": {"tiny_deepseek": "tiny_mixtral", "tiny_qwen2_moe": "tiny_mixtral"},
    "inside": {"tiny_deepseek": "tiny_mixtral", "tiny_qwen2_moe": "tiny_mixtral"},
    "closed_form": {"tiny_qwen2_moe": "tiny_deepseek"},
    "scmoe": {"tiny_deepseek": "tiny_mixtral", "tiny_qwen2_moe": "tiny_mixtral"},
    "skip": {},
    "factorize": {"tiny_deepseek": "tiny_mixtral", "tiny_qwen2_moe": "tiny_mixtral"},
}
OF_A_REPORT = "model condense method metric ratio grouping form calibration finetune".split()
OF_A_REPORT += ["quantize", "eval", "seed", "cd_moe", "seer_moe", "closed_form", "decoding"]
Head = dict[str, Any]
HEADS: dict[tuple[str, str], list[tuple[Head, dict[str, Any]]]] = {}


def heads(name: str, model: str, composed: Compose) -> list[tuple[Head, dict[str, Any]]]:
    """What the report of each job of a sweep says that was asked for, and the job's eval node."""
    if (name, model) not in HEADS:
        HEADS[name, model] = _heads(name, model, composed)
    return HEADS[name, model]


def _heads(name: str, model: str, composed: Compose) -> list[tuple[Head, dict[str, Any]]]:
    paper, experiment = name.split("/")
    sweep = composed(f"model={model}", f"+{paper}={experiment}")
    params = choices(sweep)
    groups = {key for key in params if key[0] == "+" or (ROOT / "conf" / key).is_dir()}
    like = LIKE[paper].get(model, model)
    found = []
    for chosen in itertools.product(*(params[key] if key in groups else params[key][:1]
                                      for key in params)):  # fmt: skip
        job = composed(*chosen, f"model={like}", f"+{paper}={experiment}")
        named = dict(job.hydra.runtime.choices)
        job = OmegaConf.masked_copy(job, [key for key in OF_A_REPORT if key in job])
        OmegaConf.set_struct(job, False)
        job.model = sweep.model
        job.finetune.pop("phases", None)  # no settings of a report
        for values in itertools.product(*(params[key] for key in params if key not in groups)):
            found.append(_head(with_values(job, values), named))
    return found


def with_values(job: DictConfig, values: tuple[str, ...]) -> DictConfig:
    """A composed job with other values of its options, as Hydra puts them there."""
    made = copy.deepcopy(job)
    for one in OverridesParser.create().parse_overrides(list(values)):
        OmegaConf.update(made, one.key_or_group, one.value(), merge=True)
    return made


def _head(job: DictConfig, named: dict[str, str]) -> tuple[Head, dict[str, Any]]:
    plain = OmegaConf.to_container(job, resolve=True)
    description = Description(Path(), "", "", named, plain)
    return report_head(description), plain["eval"]


def matches(row: dict[str, str], head: Head) -> bool:
    return all(same(head.get(key), wanted) for key, wanted in asked(row).items())


def same(found: Any, wanted: str) -> bool:
    if label_of(found) == wanted:
        return True
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return False


def apart(head: Head, row: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """A job's settings that a figure depends on, seeds aside: no tuning where nothing is tuned."""
    no_setting = (SEED_KEYS.search, RESULT_KEYS.match, ORIGIN_KEYS.match)
    names = [key for key in head if not any(found(key) for found in no_setting)]
    if row["figure"].startswith("compressed"):
        names = [key for key in names if not key.startswith("finetune")]
    return tuple((key, label_of(head[key])) for key in names)


def has(head: Head, suite: dict[str, Any], row: dict[str, str]) -> bool:
    """Whether a job's report has the row's figure (where it measures)."""
    found = FIGURE.fullmatch(row["figure"])
    edited, tuned = head["method"] != "none", head["finetune"] != "none"
    there = {"dense": True, "compressed": edited, "finetuned": tuned}[found["variant"]]
    if found["top_k"]:
        there = there and int(found["top_k"]) in suite["top_k"]
    if found["task"]:
        there = there and found["task"] in suite["tasks"]
        there = there and (suite["metrics"] or {}).get(found["task"], "acc") == found["metric"]
    return there


@EXPECTED_EACH
def test_expected_rows_have_their_jobs(name: str, composed: Compose) -> None:
    """Each row with a report's figure is that of one job, but for seeds; ours those we ran."""
    rows = expected(name)
    known: set[str] = set()
    without: set[tuple[str, str]] = set()
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        if model in OTHERS:
            assert all(row["figure"].startswith("dense/") for row in of_model)
            continue
        every = heads(name, model, composed)
        known |= {key for head, _ in every for key in head}
        for row in of_model:
            if row["figure"] in PLAIN:
                continue
            found = [(head, suite) for head, suite in every if matches(row, head)]
            if not found and row["provenance"] != RUN:
                without.add((row["variant"], row.get("condense/num_layers", "")))
                continue
            assert found, row
            found = [head for head, suite in found if has(head, suite, row)]
            assert found, row
            if not row["figure"].startswith("dense"):
                assert len({apart(head, row) for head in found}) == 1, row
                if row["provenance"] == RUN:
                    seeds = {tuple(head.get(key) for key in SEEDS) for head in found}
                    assert ("mean of 3 seeds" in row["note"]) == bool(row["std"])
                    assert len(seeds) == 3 or not row["std"], row
    assert without == WITHOUT_A_JOB.get(name, set())
    assert {key for key in rows[0] if key not in LABELS} <= known


SEEDS = ("seed", "condense/seed", "metric/seed", "calibration/seed")


@EXPECTED_EACH
def test_our_own_numbers_are_those_of_the_tables(name: str) -> None:
    """Each RUN row is a cell of the committed table, and names that table's commit."""
    ours = [row for row in expected(name) if row["provenance"] == RUN]
    for model in dict.fromkeys(row["model"] for row in ours):
        table = ROOT / "experiments" / name / f"{model}.csv"
        assert model in {*TINY, "tiny_mixtral"}
        (commit,) = set(
            re.findall(r"commit=(\w{12})\w*(\+dirty)?", table.with_suffix(".md").read_text())
        )
        cells = defaultdict(set)
        for line in numbers(table):
            for key, value in line.items():
                cells[key.partition(" ")[0]].add(value)
        rows = [row for row in ours if row["model"] == model]
        for row in rows:
            assert row["value"] in cells[row["figure"]], row
            assert row["note"].partition(";")[0] == f"commit {''.join(commit)}", row
        given = {key for key in cells if re.search(r"^(compressed|finetuned).*(average|kl)$", key)}
        assert {row["figure"] for row in rows} >= given


def test_published_choices_are_possible() -> None:
    choices_ = json.loads((FOLDER / "published" / "expert_choices.json").read_text())
    for model, layers, experts, chosen in (
        ("deepseek_moe_16b", 27, 64, 6),
        ("qwen1_5_moe_a2_7b", 24, 60, 4),
    ):
        assert [int(layer) for layer in choices_[model]] == list(range(layers))
        for one in choices_[model].values():
            assert len(set(one)) == len(one) == chosen
            assert set(one) <= set(range(experts))
    orders = json.loads((FOLDER / "published" / "layer_orders.json").read_text())["orders"]
    for order in orders:
        layers = 27 if order["model"] == "deepseek_moe_16b" else 24
        assert len(set(order["order"])) == len(order["order"]) >= 15
        assert set(order["order"]) <= set(range(layers))
    assert {order["provenance"] for order in orders} <= MARKS
    paths = json.loads((FOLDER / "published" / "divergences.json").read_text())["divergences"]
    for path in paths:
        values = path["js"]
        assert len(values) == 15 or path["what"] == "single layer"
        assert path["what"] != "greedy path" or values == sorted(values)


# --------------------------------------------------------------------------- SEER-MoE


def seer_jobs(experiment: str, model: str, composed: Compose) -> list[list[str]]:
    return jobs(choices(composed(f"model={model}", f"+seer_moe={experiment}")))


def seer_job(job: list[str], experiment: str, model: str, composed: Compose) -> dict[str, Any]:
    return checked(composed(*job, f"model={model}", f"+seer_moe={experiment}"))


@pytest.mark.parametrize("model", ["mixtral_8x7b", "tiny_mixtral", "tiny_deepseek"])
@SEER_EACH
def test_every_job_of_seer_moe_composes(experiment: str, model: str, composed: Compose) -> None:
    every = seer_jobs(experiment, model, composed)
    tiny = model != "mixtral_8x7b"
    for job in every[:1] if tiny else every:  # the rows of the shipped ones are composed below
        found = seer_job(job, experiment, model, composed)
        chosen, group = found["choices"], found["calibration"].get("group_by")
        text = {"pruning": "mmlu_subjects"}.get(experiment, "sst5")
        assert chosen["calibration"] == ("stdlib" if tiny else text)
        assert chosen["eval"] == ("tiny" if tiny else "seer")
        assert group == (("domain" if tiny else "subject") if "subject" in str(job) else None)
        if experiment == "pruning":
            assert (chosen["method"], chosen["finetune"]) == ("prune", "none")
        else:
            recipes = {"seer" if tiny else "seer_sst5", "none"}
            assert chosen["finetune"] in recipes
            assert found["eval"]["top_k"] == [1]


def test_the_number_of_jobs_of_seer_moe(composed: Compose) -> None:
    """The README's table of files, for the shipped models and for Mixtral."""
    readme = (SEER / "README.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \| (\d+) \|$", readme, re.MULTILINE)
    found = [
        (experiment, *(str(number_of_jobs(experiment, model, composed)) for model in models))
        for experiment in SEER_EXPERIMENTS
        for models in [("tiny_mixtral", "mixtral_8x7b")]
    ]
    assert sorted(told) == found
    assert "annealing finetuning pruning".split() == SEER_EXPERIMENTS
    assert all(f"+seer_moe={experiment}" in readme for experiment in SEER_EXPERIMENTS)


def number_of_jobs(experiment: str, model: str, composed: Compose) -> int:
    params = choices(composed(f"model={model}", f"+seer_moe={experiment}"))
    return math.prod(len(values) for values in params.values())


def swept(experiment: str, key: str, composed: Compose) -> list[str]:
    params = choices(composed("model=mixtral_8x7b", f"+seer_moe={experiment}"))
    return [value.partition("=")[2] for value in params[key]]


def test_rows_of_the_pruning_table(composed: Compose) -> None:
    """A row is named by what it does, and every file is a row."""
    rows = swept("pruning", "+seer_moe/prune", composed)
    assert sorted(rows) == sorted(path.stem for path in (SEER / "prune").glob("*.yaml"))
    made = set()
    for row in rows:
        job = ["+seer_moe/scale=tiny", f"+seer_moe/prune={row}"]
        found = seer_job(job, "pruning", "tiny_mixtral", composed)
        metric, ratio = found["choices"]["metric"], found["choices"]["ratio"]
        scope = "subject" if found["calibration"].get("group_by") else "common"
        assert row.startswith(metric)
        if metric in ("random", "reap"):
            assert (ratio, scope) == ("uniform", "common")
        else:
            layers = {"uniform": "layer", "global": "global"}[ratio]
            assert row == f"{metric}_{layers}_{scope}"
        made.add((metric, ratio, scope, found["seed"]))
    assert len(made) == len(rows), "each row is something else"


def test_rows_of_the_finetuning_table(composed: Compose) -> None:
    rows = swept("finetuning", "+seer_moe/row", composed)
    assert sorted(rows) == sorted(path.stem for path in (SEER / "row").glob("*.yaml"))
    found = {}
    for row in rows:
        job = ["+seer_moe/scale=tiny", f"+seer_moe/row={row}", "seer_moe.top_k=2"]
        made = seer_job(job, "finetuning", "tiny_deepseek", composed)
        chosen, recipe = made["choices"], made["finetune"]
        assert made["eval"]["top_k"] == [2]
        pruned = (chosen["metric"], chosen["ratio"], made["ratio"]["ratio"])
        found[row] = (
            pruned if chosen["method"] == "prune" else chosen["method"],
            *((recipe["top_k"], recipe["entropy"], recipe["trains"]) if recipe else ()),
        )
        assert row == "zero_shot" or recipe["annealing"] == "linear"
    quarter = ("frequency", "global", 0.25)
    assert found == {
        "zero_shot": ("none",),
        "plain": ("none", None, 0, "both"),
        "entropy": ("none", None, 0.1, "both"),
        "annealing": ("none", 2, 0, "both"),
        "annealing_entropy": ("none", 2, 0.1, "both"),
        "pruned_plain": (quarter, None, 0, "both"),
        "pruned_annealing_entropy": (quarter, 2, 0.1, "both"),
    }


def test_an_annealing_job_is_a_row_of_the_finetuning_table(composed: Compose) -> None:
    """So that it is computed once: the same recipe, whatever table asks for it."""
    scale = "+seer_moe/scale=tiny"
    options_ = ["finetune.annealing=linear", "finetune.trains=both"]
    one = seer_job([scale, *options_], "annealing", "tiny_mixtral", composed)
    row = [scale, "+seer_moe/row=annealing_entropy"]
    other = seer_job(row, "finetuning", "tiny_mixtral", composed)
    for part in ("calibration", "method", "finetune", "eval", "seed"):
        assert one[part] == other[part]


@pytest.mark.parametrize(
    ("experiment", "parameter", "without_a_row"),
    [
        ("pruning", "+seer_moe/prune", {"dense", "naee"}),
        ("finetuning", "+seer_moe/row", {"annealing_longer", "pruned_soft_count"}),
    ],
)
def test_published_rows_of_seer_moe(
    experiment: str, parameter: str, without_a_row: set[str], composed: Compose
) -> None:
    rows = of_papers(numbers(SEER / experiment / "expected.csv"))
    assert {row["variant"] for row in rows} - set(swept(experiment, parameter, composed)) == (
        without_a_row
    )
    shares = {"parameter_ratio", "flops_saved", "expert_flops_share"}
    for row in rows:
        assert row["model"] == "mixtral_8x7b"
        assert accuracy(row) or column(row) in {*shares, "mmlu_drop", "prefill_speedup"}, row
        assert row["sure"] in ("two texts", "one text", "arithmetic", "doubtful"), row
        assert (row["sure"] == "arithmetic") == (row["provenance"] == "INFER"), row
        assert row["ratio"] in ("", "0.25", "0.5")
        if accuracy(row):
            assert 0.4 < float(row["value"]) < 0.61, row
        if column(row) in shares:
            assert 0 < float(row["value"]) < 1, row
    keys = ("table", "variant", "ratio", "figure")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)


def test_published_drops_are_those_from_the_dense_model() -> None:
    rows = of_papers(numbers(SEER / "pruning" / "expected.csv"))
    table = {(row["table"], row["variant"], row["ratio"], column(row)): row for row in rows}
    drops = [key for key in table if key[-1] == "mmlu_drop"]
    for key in drops:
        left = float(table[*key[:-1], "mmlu"]["value"])
        assert left + float(table[key]["value"]) == pytest.approx(0.6055, abs=1e-8)
    assert len(drops) == 12


def test_published_shares_of_mixtral_and_its_parameters() -> None:
    """Those that agree, and those that are marked because they do not."""
    hidden, width, layers, experts, words = 4096, 14336, 32, 8, 32000
    expert = 3 * hidden * width
    attention = 2 * hidden * hidden + 2 * hidden * 1024  # a quarter as many key and value heads
    block = attention + experts * hidden + 2 * hidden
    total = layers * (experts * expert + block) + 2 * words * hidden + hidden
    multiplied = total - words * hidden - layers * (experts - 2) * expert  # for each token, top-2
    true = {
        ("parameter_ratio", "0.25"): 1 - 0.25 * layers * experts * expert / total,
        ("parameter_ratio", "0.5"): 1 - 0.5 * layers * experts * expert / total,
        ("flops_saved", ""): layers * expert / multiplied,
        ("expert_flops_share", ""): 2 * layers * expert / multiplied,
    }
    seen = []
    for experiment in ("pruning", "finetuning"):
        for row in of_papers(numbers(SEER / experiment / "expected.csv")):
            if (column(row), row["ratio"]) in true:
                value = true[column(row), row["ratio"]]
                agrees = float(row["value"]) == pytest.approx(value, abs=0.005)
                assert agrees == (row["sure"] != "doubtful"), row
                seen.append((column(row), row["ratio"]))
    assert set(seen) == set(true)
    assert seen.count(("parameter_ratio", "0.25")) == 2 and len(seen) == 5, "memory, parameters"
    readme = (SEER / "README.md").read_text()
    assert f"{total / 1e9:.2f} B parameters: {layers * experts * expert / 1e9:.2f} B" in readme
    assert f"{2 * total / 1e9:.1f} GB ({2 * total / 2**30:.1f} GiB)" in readme
    assert f"one expert less saves {100 * layers * expert / multiplied:.0f} %" in readme


def test_reruns_are_possible() -> None:
    rows = numbers(SEER / "published" / "reruns.csv")
    assert list(rows[0]) == "source model benchmark kept num_experts method value sure note".split()
    dense = {}
    for row in rows:
        assert re.fullmatch(r"\d{4}\.\d{5}", row["source"]), row
        assert 0 <= float(row["value"]) < 90
        assert not row["kept"] or 0 < int(row["kept"]) <= int(row["num_experts"])
        if row["method"] == "dense":
            dense[row["model"], row["benchmark"]] = float(row["value"])
    assert all((row["model"], row["benchmark"]) in dense for row in rows)


# --------------------------------------------------------------------------- the field's methods


@pytest.mark.parametrize("experiment", FIELD_EXPERIMENTS)
def test_every_job_of_the_field_composes(experiment: str, composed: Compose) -> None:
    table = f"+tiny={experiment}"
    every = jobs(choices(composed("model=tiny_mixtral", table)))
    assert len(every) > 3
    for job in every:
        found = checked(composed(*job, "model=tiny_mixtral", table))
        assert found["choices"]["eval"] == "tiny" and found["choices"]["measure"] == "none"
        assert found["calibration"]["seed"] in (found["seed"], 0)


def test_every_criterion_is_compared(composed: Compose) -> None:
    """All metrics, but those that need another checkpoint or are another's under another name."""
    params = choices(composed("model=tiny_mixtral", "+tiny=criteria"))
    compared = {job.partition("=")[2] for job in params["metric"]}
    there = set(names_of_unit("experts"))
    assert there - compared == {"man", "unified", "router_norm_change"}
    assert [len(values) for values in params.values()] == [len(compared), 2, 3]


# --------------------------------------------------------------------------- inside the expert


@pytest.mark.parametrize("experiment", INSIDE_TABLES)
def test_every_job_of_inside_composes(experiment: str, composed: Compose) -> None:
    table = f"+inside={experiment}"
    every = jobs(choices(composed("model=tiny_mixtral", table)))
    assert len(every) > 3
    for job in every:
        found = checked(composed(*job, "model=tiny_mixtral", table))
        assert found["choices"]["eval"] == "tiny" and found["choices"]["measure"] == "none"
        assert found["calibration"]["seed"] == found["seed"]
        tuned = found["choices"]["finetune"] == "experts"
        assert tuned == (experiment == "recovery")
        if tuned:
            phase = found["finetune"]["phases"]["lm"]
            assert phase["data"]["num_samples"] == 200 * phase["batch_size"]


def test_the_number_of_jobs_of_inside(composed: Compose) -> None:
    readme = (ROOT / "experiments" / "inside" / "README.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \|$", readme, re.MULTILINE)
    found = {}
    for name in INSIDE_EXPERIMENTS:
        params = choices(composed("model=tiny_mixtral", f"+inside={name}"))
        found[name] = math.prod(len(values) for values in params.values())
    assert {name: int(number) for name, number in told} == found
    shipped = 3 * sum(found[name] for name in INSIDE_TABLES)
    assert f"{shipped} jobs" in readme


def test_every_criterion_of_hidden_units_is_compared(composed: Compose) -> None:
    params = choices(composed("model=tiny_mixtral", "+inside=criteria"))
    compared = {job.partition("=")[2] for job in params["metric"]}
    assert compared == set(names_of_unit("neurons"))
    assert [len(values) for values in params.values()] == [len(compared), 2, 3]


def test_a_row_of_inside_is_named_by_what_it_does(composed: Compose) -> None:
    names = sorted(path.stem for path in (ROOT / "experiments" / "inside" / "row").glob("*.yaml"))
    swept = {
        value.partition("=")[2]
        for table in ("units", "deep", "recovery")
        for value in choices(composed("model=tiny_mixtral", f"+inside={table}"))["+inside/row"]
    }
    assert swept == set(names)
    for name in names:
        found = checked(composed(f"+inside/row={name}", "model=tiny_mixtral", "+inside=units"))
        chosen, method = found["choices"], found["method"]
        words = [method["unit"], chosen["metric"]]
        words += [chosen["ratio"]] * (chosen["ratio"] != "uniform")
        words += [method["widths"]] * (method["widths"] == "by_expert")
        assert name == "_".join(words)


@pytest.mark.parametrize("model", [*PAPER, "qwen3_30b_a3b"])
def test_what_papers_of_hidden_units_print_has_its_jobs(model: str, composed: Compose) -> None:
    table = "+inside=published"
    for job in jobs(choices(composed(f"model={model}", table))):
        found = checked(composed(*job, f"model={model}", table))
        assert found["method"]["unit"] == "neurons"
        assert found["method"]["widths"] == "by_expert"
        assert set(found["eval"]["metrics"]) <= set(found["eval"]["tasks"])


@pytest.mark.parametrize("experiment", CLOSED_EXPERIMENTS)
def test_every_job_of_closed_form_composes(experiment: str, composed: Compose) -> None:
    table, tuned = f"+closed_form={experiment}", experiment in ("accuracy", "tuning")
    for job in jobs(choices(composed("model=tiny_deepseek", table))):
        found = checked(composed(*job, "model=tiny_deepseek", table))
        assert found["calibration"]["seed"] == found["seed"]
        assert found["choices"]["finetune"] == ("experts" if tuned else "none")


def test_rows_of_closed_form_are_swept_and_differ(composed: Compose) -> None:
    folder = ROOT / "experiments" / "closed_form" / "row"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    swept = {
        value.partition("=")[2]
        for table in CLOSED_EXPERIMENTS
        for value in choices(composed("model=tiny_deepseek", f"+closed_form={table}")).get(
            "+closed_form/row", ()
        )
    }
    assert swept == set(names)
    ours: dict[str, str] = {}
    for name in names:
        table = "accuracy" if name.startswith(("prune", "merge")) else "ablations"
        row, model = f"+closed_form/row={name}", "model=tiny_deepseek"
        found = checked(composed(row, model, f"+closed_form={table}"))
        asked = json.dumps([found["method"], found["calibration"]])
        assert asked not in ours, f"{name} and {ours.get(asked)} ask for the same"
        ours[asked] = name


@pytest.mark.parametrize("experiment", SCMOE_EXPERIMENTS)
def test_every_job_of_scmoe_composes(experiment: str, composed: Compose) -> None:
    model = "mixtral_8x7b" if experiment == "published" else "tiny_mixtral"
    table, decoded = f"+scmoe={experiment}", set()
    for job in jobs(choices(composed(f"model={model}", table))):
        found = checked(composed(*job, f"model={model}", table))
        assert found["eval"]["decoding"] == found["decoding"]
        decoded.add(json.dumps(found["decoding"]))
    assert len(decoded) > 3


# --------------------------------------------------------------------------- fewer per token


@pytest.mark.parametrize("experiment", SKIP_EXPERIMENTS)
def test_every_job_of_skip_composes(experiment: str, composed: Compose) -> None:
    table = f"+skip={experiment}"
    rules = set()
    for job in jobs(choices(composed("model=tiny_mixtral", table))):
        found = checked(composed(*job, "model=tiny_mixtral", table))
        assert found["choices"]["method"] == "skip" and found["choices"]["finetune"] == "none"
        rules.add(found["method"]["rule"])
    told = (ROOT / "experiments" / "skip" / "README.md").read_text()
    assert rules and re.search(rf"\+skip=(\$table|{experiment}) ", told)


def test_rows_of_factorize_compose_and_differ(composed: Compose) -> None:
    folder, asked = ROOT / "experiments" / "factorize", dict[str, str]()
    names = sorted(path.stem for path in (folder / "row").glob("*.yaml"))
    params = choices(composed("model=tiny_mixtral", "+factorize=forms"))
    assert sorted(value.partition("=")[2] for value in params["+factorize/row"]) == names
    for name in names:
        asking = (f"+factorize/row={name}", "model=tiny_mixtral", "+factorize=forms")
        found = checked(composed(*asking))
        assert found["calibration"]["seed"] == found["seed"]
        chosen = found["choices"]
        assert chosen["method"] == ("prune" if name[:4] in ("expe", "neur") else "factorize")
        if chosen["method"] == "factorize":
            assert name.startswith(chosen["form"]) and chosen["metric"]
        what = json.dumps(found["method"])
        assert what not in asked, f"{name} and {asked[what]} ask for the same"
        asked[what] = name
    number = math.prod(len(values) for values in params.values())
    assert f"{number} jobs" in (folder / "README.md").read_text()


# --------------------------------------------------------------------------- tables

SWEEPS = [
    *(("cd_moe", experiment, TINY[0]) for experiment in EXPERIMENTS),
    *(("seer_moe", experiment, "tiny_mixtral") for experiment in SEER_EXPERIMENTS),
    *(("tiny", experiment, "tiny_mixtral") for experiment in FIELD_EXPERIMENTS),
    *(("inside", experiment, "tiny_mixtral") for experiment in INSIDE_TABLES),
    ("inside", "published", "deepseek_moe_16b"),
    *(("closed_form", experiment, TINY[0]) for experiment in CLOSED_EXPERIMENTS),
    *(("scmoe", experiment, "tiny_mixtral") for experiment in SCMOE_EXPERIMENTS[:-1]),
    ("scmoe", "published", "mixtral_8x7b"),
    *(("skip", experiment, "tiny_mixtral") for experiment in SKIP_EXPERIMENTS),
    ("factorize", "forms", "tiny_mixtral"),
    ("factorize", "published", "deepseek_moe_16b"),
]
VALUE = re.compile(
    rf"{FIGURE.pattern}|finetuned/eval/routing/entropy|seconds/(plan|finetune)|plan/ratio"
    r"|compressed/eval/routing/(top_k|active_parameters|distinct_experts_16)"
)


@pytest.mark.parametrize(("paper", "experiment", "model"), SWEEPS)
def test_the_table_at_a_sweep_s_end(
    paper: str, experiment: str, model: str, composed: Compose
) -> None:
    """Its rows and columns are settings that its reports have, its values their figures."""
    config = composed(f"model={model}", f"+{paper}={experiment}")
    asked_for = OmegaConf.to_container(config.table, resolve=True)
    name = f"{paper}/{experiment}"
    assert asked_for["expected"] == (f"{name}/expected.csv" if name in EXPECTED else None)
    known = {key for head, _ in heads(name, model, composed) for key in head}
    keys = [*(asked_for["rows"] or ()), *(asked_for["columns"] or ())]
    assert set(keys) <= known and len(set(keys)) == len(keys)
    assert "model" in keys or not asked_for["rows"], "two models are no cell"
    assert all(VALUE.fullmatch(value) for value in asked_for["values"] or ())


# --------------------------------------------------------------------------- studies


def test_every_choice_of_the_study_composes(composed: Compose) -> None:
    config = composed("+pareto=study")
    directions = list(config.hydra.sweeper.direction)
    assert len(config.objectives) == len(directions) == 2
    params = config.hydra.sweeper.params
    values = {
        key: re.fullmatch(r"choice\((.*)\)", value)[1].split(",") for key, value in params.items()
    }
    every = {key: [f"{key}={value}" for value in some] for key, some in values.items()}
    for job in jobs(every):
        checked(composed("+pareto=study", *job))
    number = math.prod(map(len, every.values()))
    assert number == 2 * 4 * 2 * 6, "experiments/pareto/README.md counts them"


def test_the_study_s_front_is_that_of_its_table() -> None:
    folder = ROOT / "experiments" / "pareto"
    table = (folder / "study" / "tiny_deepseek.md").read_text().split("\n\n")[0]
    tried = {}
    for line in table.splitlines()[2:]:
        method, metric, ratio, _, kl, size = (one.strip(" *") for one in line[1:-1].split("|"))
        told = ", ".join(one for one in (method, metric, ratio) if one != "none")
        tried[told, kl] = float(size.split()[0])
    best = {
        size: min((float(kl), told) for (told, kl), other in tried.items() if other == size)
        for size in tried.values()
    }
    readme = (folder / "README.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) MB \| (.*) \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert {float(size): (float(kl), told) for size, told, kl in rows} == best


# --------------------------------------------------------------------------- mixed bits

MIXED_BITS = sorted(path.stem for path in (ROOT / "experiments/mixed_bits").glob("*.yaml"))


@pytest.mark.parametrize("experiment", MIXED_BITS)
def test_every_job_of_mixed_bits_composes(experiment: str, composed: Compose) -> None:
    table = f"+mixed_bits={experiment}"
    for job in jobs(choices(composed("model=tiny_mixtral", table))):
        found = checked(composed(*job, "model=tiny_mixtral", table))
        assert found["choices"]["quantize"] != "none" and found["choices"]["measure"] == "none"
        pruned = experiment == "equal_bytes"
        assert found["choices"]["method"] == ("prune" if pruned else "none")


# --------------------------------------------------------------------------- run.py


def test_help_lists_the_tables() -> None:
    done = run_command(ROOT, "--help")
    assert done.returncode == 0
    tables = {"cd_moe": EXPERIMENTS, "seer_moe": SEER_EXPERIMENTS, "tiny": FIELD_EXPERIMENTS}
    tables["inside"] = INSIDE_EXPERIMENTS
    tables["closed_form"] = CLOSED_EXPERIMENTS
    tables["skip"] = SKIP_EXPERIMENTS
    tables["factorize"] = FACTOR_EXPERIMENTS
    tables["pareto"] = ["study"]
    tables["mixed_bits"] = MIXED_BITS
    tables["scmoe"] = SCMOE_EXPERIMENTS
    tables["offload"] = ["variants"]
    for paper, experiments in tables.items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"+{paper}="))
        assert sorted(line.removeprefix(f"+{paper}=").split(" | ")) == experiments


def test_a_table_runs_from_any_folder_and_ends_with_one_table(
    run_py: Callable[..., subprocess.CompletedProcess[str]], small: list[str], tmp_path: Path
) -> None:
    """Two jobs of num_routed, one of which asks for more layers than there are."""
    stages = ["eval=none", "measure=none", "cd_moe.like=tiny_deepseek", "calibration=files"]
    own = [option for option in small if not option.startswith("condense.")]
    sweep = ["+cd_moe=num_routed", "condense.num_routed=2", "condense.num_layers=1,9"]
    done = run_py(*own, *stages, *sweep)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    folder = next((tmp_path / "outputs" / "runs").iterdir())
    reports = [json.loads((folder / job / "report.json").read_text()) for job in "01"]
    assert [report["status"] for report in reports] == ["ok", "failed"]
    assert [report["condense/num_layers"] for report in reports] == [1, 9]
    text = (folder / "table.md").read_text()
    assert "| 1 | ok |\n| 9 | failed |\n" in text
    assert f"- failed: condense/num_layers=9: {reports[1]['error']}\n" in text
    assert (folder / "table.csv").is_file()
    assert done.stdout.count("condense/num_layers=9") == 1
    # The published numbers are of other models than a checkpoint of one's own.
    assert "of deepseek_moe_16b, which was not run" in (folder / "expected.md").read_text()
    *_, again, made = done.stdout.rstrip().splitlines()
    told = folder.relative_to(tmp_path)
    assert made.startswith(f"sweep: {told} (") and "table.csv, table.md, table.tex" in made
    assert again.endswith(f"python -m moe_lab.runs {told} --rerun")


def test_an_unknown_table_lists_what_exists(
    run_py: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_py("+cd_moe=mispelt")
    assert done.returncode == 2
    assert all(experiment in done.stderr for experiment in EXPERIMENTS)
    assert "Traceback" not in done.stderr


def test_the_picture_of_a_table_is_drawn_from_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """experiments/tiny/plot.py; published figures beside a table are none of its rows."""
    shutil.copytree(ROOT / "experiments" / "tiny" / "merging", tmp_path / "merging")
    plot = load_module("plot", ROOT / "experiments" / "tiny" / "plot.py")
    monkeypatch.setattr(plot, "HERE", tmp_path)
    (tmp_path / "merging" / "merging.png").unlink()
    assert plot.draw("merging").read_bytes().startswith(b"\x89PNG")
