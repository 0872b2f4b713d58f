"""experiments/: every table of a paper composes for its models, its numbers hold, a sweep runs."""

from __future__ import annotations

import csv
import functools
import json
import math
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_command
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from moe_lab import options

FOLDER, SEER = ROOT / "experiments" / "cd_moe", ROOT / "experiments" / "seer_moe"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SEER_EXPERIMENTS = sorted(path.stem for path in SEER.glob("*.yaml"))
FIELD_EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments" / "tiny").glob("*.yaml"))
SEER_EACH = pytest.mark.parametrize("experiment", SEER_EXPERIMENTS)
TINY, PAPER = ("tiny_deepseek", "tiny_qwen2_moe"), ("deepseek_moe_16b", "qwen1_5_moe_a2_7b")
MODELS = (*TINY, *PAPER)
MARKS = {"CODE", "PAGE", "SHEET", "ABS", "PAPER", "2ND", "INFER"}
SIX = "arc_challenge boolq hellaswag openbookqa piqa winogrande".split()
EIGHT = [*SIX, "mmlu", "rte"]
EACH = pytest.mark.parametrize("experiment", EXPERIMENTS)
Compose = Callable[..., DictConfig]


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
    options.check(plain, OmegaConf.to_container(config), choice)
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


def published(experiment: str) -> list[dict[str, str]]:
    return numbers(FOLDER / experiment / "expected.csv")


def numbers(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@EACH
def test_expected_is_well_formed(experiment: str) -> None:
    rows = published(experiment)
    assert (
        list(rows[0])
        == (
            "model table variant num_layers num_routed finetune column value std provenance note"
        ).split()
    )
    known = [*EIGHT, "average", "memory", "speed", "perplexity", "active_parameters"]
    known += ["share_of_dense_average", "trainable_share"]
    for row in rows:
        assert None not in row and None not in row.values()
        assert row["provenance"] in MARKS, row
        assert row["column"] in known, row
        assert row["finetune"] in ("none", "lm", "sft", "lm+sft"), row
        float(row["value"])
        if row["column"] in [*EIGHT, "average"]:
            assert 20 < float(row["value"]) < 90, row
        if row["column"] in ("memory", "share_of_dense_average"):
            assert 0.4 < float(row["value"]) <= 1, row
        assert not row["std"] or 0 < float(row["std"]) < 2
        assert not row["num_layers"] or 0 <= int(row["num_layers"]) <= 27
    keys = ("model", "table", "variant", "num_layers", "num_routed", "finetune", "column")
    numbers = [(tuple(row[key] for key in keys), row["provenance"]) for row in rows]
    assert len(set(numbers)) == len(numbers), "one value for each"


@EACH
def test_printed_averages_recompute(experiment: str) -> None:
    lines: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in published(experiment):
        keys = ("model", "table", "variant", "num_layers", "num_routed", "finetune")
        lines[tuple(row[key] for key in keys)][row["column"]] = float(row["value"])
    whole = 0
    for key, line in lines.items():
        tasks = EIGHT if "rte" in line else SIX
        if "average" in line and set(tasks) <= set(line):
            whole += 1
            mean = sum(line[task] for task in tasks) / len(tasks)
            assert mean == pytest.approx(line["average"], abs=0.1), key
    assert whole >= 3 or experiment == "num_routed"


def test_the_claims_of_the_abstract_follow_from_the_table() -> None:
    rows = {
        (row["variant"], row["finetune"], row["column"], row["provenance"]): float(row["value"])
        for row in published("main_table")
        if row["model"] == "deepseek_moe_16b"
    }
    dense = rows["dense", "none", "average", "PAGE"]
    for finetune in ("none", "lm+sft"):
        share = rows["cd_moe_sr", finetune, "average", "PAGE"] / dense
        claim = rows["cd_moe_sr", finetune, "share_of_dense_average", "ABS"]
        assert share == pytest.approx(claim, abs=0.005)
    trained = 9 * (2 + 6) * 8_650_752 / 16_375_728_128
    assert trained == pytest.approx(
        rows["cd_moe_sr", "lm+sft", "trainable_share", "INFER"], abs=5e-5
    )


def test_memory_of_the_sweep_is_the_parameters_left() -> None:
    """58 of 64 routed experts leave a condensed layer of SR, all of them one of S."""
    expert, total = 8_650_752, 16_375_728_128
    seen = 0
    for row in published("layers_sweep"):
        own = row["model"] == "deepseek_moe_16b" and row["column"] == "memory"
        if own and row["variant"] in ("cd_moe_s", "cd_moe_sr"):
            gone = int(row["num_layers"]) * (64 - int(row["num_routed"])) * expert
            # The authors counted gigabytes on the card, activations and buffers among them.
            assert float(row["value"]) == pytest.approx(1 - gone / total, abs=0.01)
            seen += 1
    assert seen == 13


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
    rows = numbers(SEER / experiment / "expected.csv")
    head = "model table variant ratio top_k column value provenance sure note"
    assert list(rows[0]) == head.split()
    assert {row["variant"] for row in rows} - set(swept(experiment, parameter, composed)) == (
        without_a_row
    )
    accuracies = {"mmlu", "sst5_generate"}
    shares = {"memory", "parameters", "flops_saved", "expert_flops_share"}
    for row in rows:
        assert None not in row and None not in row.values()
        assert row["model"] == "mixtral_8x7b"
        assert row["column"] in {*accuracies, *shares, "mmlu_drop", "speed"}, row
        assert row["provenance"] in MARKS, row
        assert row["sure"] in ("two texts", "one text", "arithmetic", "doubtful"), row
        assert (row["sure"] == "arithmetic") == (row["provenance"] == "INFER"), row
        assert float(row["ratio"]) in (0, 0.25, 0.5) and row["top_k"] in ("1", "2")
        if row["column"] in accuracies:
            assert 40 < float(row["value"]) < 61, row
        if row["column"] in shares:
            assert 0 < float(row["value"]) < 1, row
    keys = ("table", "variant", "ratio", "top_k", "column")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)


def test_published_drops_are_those_from_the_dense_model() -> None:
    rows = numbers(SEER / "pruning" / "expected.csv")
    table = {(row["table"], row["variant"], row["ratio"], row["column"]): row for row in rows}
    drops = [key for key in table if key[-1] == "mmlu_drop"]
    for key in drops:
        accuracy = float(table[*key[:-1], "mmlu"]["value"])
        assert accuracy + float(table[key]["value"]) == pytest.approx(60.55, abs=1e-6)
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
        ("memory", "0.25"): 1 - 0.25 * layers * experts * expert / total,
        ("memory", "0.5"): 1 - 0.5 * layers * experts * expert / total,
        ("parameters", "0.25"): 1 - 0.25 * layers * experts * expert / total,
        ("flops_saved", "0"): layers * expert / multiplied,
        ("expert_flops_share", "0"): 2 * layers * expert / multiplied,
    }
    seen = 0
    for experiment in ("pruning", "finetuning"):
        for row in numbers(SEER / experiment / "expected.csv"):
            if (row["column"], row["ratio"]) in true:
                value = true[row["column"], row["ratio"]]
                agrees = float(row["value"]) == pytest.approx(value, abs=0.005)
                assert agrees == (row["sure"] != "doubtful"), row
                seen += 1
    assert seen == len(true)
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
    there = {path.stem for path in (ROOT / "conf" / "metric").glob("*.yaml")}
    assert there - compared == {"man", "unified", "router_norm_change"}
    assert [len(values) for values in params.values()] == [len(compared), 2, 3]


# --------------------------------------------------------------------------- run.py


def test_help_lists_the_tables() -> None:
    done = run_command(ROOT, "--help")
    assert done.returncode == 0
    tables = {"cd_moe": EXPERIMENTS, "seer_moe": SEER_EXPERIMENTS, "tiny": FIELD_EXPERIMENTS}
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
    assert done.stdout.rstrip().endswith(f"sweep: {folder} (table.md, table.csv)")


def test_an_unknown_table_lists_what_exists(
    run_py: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_py("+cd_moe=mispelt")
    assert done.returncode == 2
    assert all(experiment in done.stderr for experiment in EXPERIMENTS)
    assert "Traceback" not in done.stderr
