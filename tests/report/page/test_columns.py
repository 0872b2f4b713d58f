"""The columns of a page: values once with their texts, and which of them each run has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabled import write

from moe_lab.report.figures import figure_text
from moe_lab.report.frame import read_reports
from moe_lab.report.page.columns import axes, columns_of


def columns(folder: Path) -> dict[str, dict[str, Any]]:
    made = columns_of(read_reports(folder))
    assert json.loads(json.dumps(made)) == made, "it goes into a page"
    return {column["key"]: column for column in made}


def test_each_value_lies_there_once_and_runs_name_it(tmp_path: Path) -> None:
    for number, (ratio, kl) in enumerate([(0.5, 0.1), (0.25, None), (0.5, 0.2)]):
        write(tmp_path, number, ratio=ratio, compressed__kl=kl)
    found = columns(tmp_path)
    assert (found["ratio"]["values"], found["ratio"]["codes"]) == ([0.5, 0.25], [0, 1, 0])
    assert found["compressed/kl"]["codes"] == [0, -1, 1], "one has none"
    assert found["compressed/kl"]["texts"] == ["0.1000", "0.2000"]
    assert found["model"]["codes"] == 0, "all have the first"
    assert found["ratio"]["setting"] and not found["compressed/kl"]["setting"]
    assert [key for key, column in found.items() if column["varies"]] == ["ratio"]
    assert [found[key]["shown"] for key in ("ratio", "compressed/kl", "model")] == [0, 1, None]
    assert [found[key]["better"] for key in ("ratio", "compressed/kl", "model")] == [1, -1, 0]


def test_numbers_and_truths_are_different_texts(tmp_path: Path) -> None:
    for number, value in enumerate([1, True, 1.0, "1"]):
        write(tmp_path, number, option=value)
    found = columns(tmp_path)["option"]
    assert (found["texts"], found["codes"]) == (["1", "True", "1.0", "1"], [0, 1, 2, 3])


def test_what_the_page_knows_of_axes() -> None:
    found = axes()
    assert found["titles"] == {
        "eval/average": "average accuracy",
        "kl": "KL to dense, nats per token",
        "parameters": "parameters",
        "active_parameters": "active parameters",
        "parameter_ratio": "parameters left, share of dense",
        "flops_per_token": "FLOPs per token",
        "bytes": "size on disk",
        "memory_ratio": "peak memory of a forward, share of dense",
        "prefill_speedup": "prefill speed, times dense",
        "decode_speedup": "decode speed, times dense",
        "vllm/prefill_speedup": "prefill speed in vLLM, times dense",
        "vllm/decode_speedup": "decode speed in vLLM, times dense",
        "ratio": "ratio: share removed",
    }
    first = "parameter_ratio memory_ratio bytes flops_per_token active_parameters parameters"
    speeds = "prefill_speedup decode_speedup vllm/prefill_speedup vllm/decode_speedup"
    assert found["costs"] == [*first.split(), *speeds.split(), "ratio"]
    assert found["quality"] == "eval/average"
    ratios = "parameter_ratio bytes_ratio memory_ratio"
    assert found["of_dense"] == [*ratios.split(), *speeds.split()]


def test_the_format_writes_what_python_does(tmp_path: Path) -> None:
    keys = "eval/average kl parameters bytes prefill_speedup stock eval/routing/top_k".split()
    write(tmp_path, 0, **{f"compressed__{key}": 0.5 for key in keys})
    found = {key: columns(tmp_path)[f"compressed/{key}"]["format"] for key in keys}
    assert found == {
        "eval/average": ["share", 1, ""], "kl": ["fixed", 4, ""], "parameters": ["count", 1, ""],
        "bytes": ["bytes", 1, ""], "prefill_speedup": ["fixed", 2, "×"], "stock": ["truth", 0, ""],
        "eval/routing/top_k": ["general", 6, ""],
    }  # fmt: skip
    for key, (kind, digits, unit) in found.items():
        if kind == "fixed":
            assert figure_text(key, 2.34567) == f"{2.34567:.{digits}f}{unit}"
