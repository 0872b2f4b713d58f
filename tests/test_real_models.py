"""The models of conf/model/ that are on the hub: as large as published, and each through a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_models import (
    NUM_EXPERTS,
    REAL,
    counted,
    shrunk,
    some_of_each,
    without_weights,
    write_tiny,
)
from running import Outcome
from transformers import AutoConfig

from moe_lab.measure.speed import active_parameters
from moe_lab.models.layers import moe_layers

EACH = pytest.mark.parametrize("name", REAL)
# Billions of parameters, all and those of a token, as papers and model cards have them: rounded or
# cut to their last digit, without layers for multi-token prediction and vision towers. Counts of
# active ones leave out none, one or both of the embeddings.
PUBLISHED = {
    "deepseek_moe_16b": ("16.4", "2.8"),
    "deepseek_v2_lite": ("15.7", "2.4"),
    "deepseek_v3": ("671.0", "37"),
    "ernie_4_5_21b_a3b": ("21.8", "3"),
    "glm_4_5_air": ("106.85", "12"),
    "glm_4_7_flash": ("30", "3"),
    "gpt_oss_120b": ("116.83", "5.13"),
    "gpt_oss_20b": ("20.91", "3.61"),
    "granite_4_h_tiny": ("7", "1"),
    "kimi_k2": ("1026", "32"),
    "lfm2_8b_a1b": ("8.34", "1.5"),
    "llama4_scout": ("107.8", "17"),
    "minimax_m2": ("228.7", "10"),
    "mixtral_8x7b": ("46.70", "12.9"),
    "nemotron_3_nano": ("31.58", "3.6"),
    "olmoe_1b_7b": ("6.92", "1.3"),
    "phi_3_5_moe": ("41.87", "6.6"),
    "qwen1_5_moe_a2_7b": ("14.3", "2.7"),
    "qwen3_235b_a22b": ("235.09", "22"),
    "qwen3_30b_a3b": ("30.53", "3.3"),
    "qwen3_5_35b_a3b": ("35", "3"),
    "qwen3_next_80b_a3b": ("80", "3"),
}
SMALL = [
    "method=prune",
    "ratio.ratio=0.25",
    "model.dtype=float32",
    "finetune=experts",
    "calibration@finetune.phases.lm.data=files",
    "calibration@finetune.phases.lm.validation=files",
    *(f"finetune.phases.lm.{part}.files=${{calibration.files}}" for part in ("data", "validation")),
    "finetune.phases.lm.data.num_samples=4",
    "finetune.phases.lm.data.max_length=16",
    "finetune.phases.lm.validation.num_samples=2",
    "finetune.phases.lm.validation.max_length=16",
    "finetune.phases.lm.batch_size=4",
    "eval=perplexity",
    "calibration@eval.held_out=files",
    "eval.held_out.files=${calibration.files}",
    "eval.held_out.num_samples=2",
    "eval.held_out.max_length=16",
]


def of_the_published_size(count: int, published: str) -> bool:
    """Whether a count is this one, by less than one unit of its last digit."""
    unit = 10 ** -len(published.partition(".")[2])
    return abs(count / 1e9 - float(published)) < unit


@EACH
def test_as_many_parameters_as_published(name: str) -> None:
    total, active, embeddings = counted(REAL[name]["architecture"])
    published, of_a_token = PUBLISHED[name]
    assert of_the_published_size(total, published)
    ends = (0, embeddings // 2, embeddings)
    assert any(of_the_published_size(active - without, of_a_token) for without in ends)


def test_a_wrong_number_is_not_of_the_published_size() -> None:
    wrong = REAL["mixtral_8x7b"]["architecture"] | {"intermediate_size": 14080}
    assert not of_the_published_size(counted(wrong)[0], "46.70")


@EACH
def test_every_field_is_one_of_the_configs(name: str) -> None:
    """A misspelt field would be kept by transformers, and mean nothing."""
    written = [(AutoConfig.for_model(**(whole := REAL[name]["architecture"])), whole)]
    while written:
        config, fields = written.pop()
        plain = {key: value for key, value in fields.items() if not isinstance(value, dict)}
        written += [(getattr(config, key), fields[key]) for key in fields.keys() - plain.keys()]
        known = type(config)()
        assert {key: getattr(config, key) for key in plain} == plain
        undeclared = {"head_dim"}  # read by the code of families whose class does not declare it
        assert [key for key in plain if not hasattr(known, key) and key not in undeclared] == []


@EACH
def test_moe_lab_counts_the_same(name: str) -> None:
    architecture = REAL[name]["architecture"]
    model = without_weights(architecture)
    assert moe_layers(model), "its experts are not found"
    assert active_parameters(model) == counted(architecture)[1]


def test_tiny_ones_keep_the_kinds_of_layers() -> None:
    assert some_of_each("MEMEM*EMEME") == ["M", "E", "*", "E"]
    assert some_of_each("aaaabaaa") == ["a", "b", "a", "a"]


@EACH
def test_a_tiny_one_goes_through_a_run(
    name: str, tmp_path: Path, tokenizer: Any, job: Callable[..., Outcome]
) -> None:
    """Pruned, fine-tuned and evaluated; that it is not of the published size is said."""
    write_tiny(shrunk(REAL[name]["architecture"], len(tokenizer)), tmp_path / "tiny", tokenizer)
    done = job(f"model={name}", f"model.path={tmp_path / 'tiny'}", *SMALL)
    assert done.code == 0, done.text
    report = done.report
    assert (report["status"], report["model"]) == ("ok", name)
    assert f"is not model={name} as published" in done.text
    assert "hidden_size 32 (not " in done.text
    for variant in ("compressed", "finetuned"):
        assert report[f"{variant}/stock"] is True
        assert report[f"{variant}/kl"] > 0
    config = AutoConfig.from_pretrained(report["finetuned/checkpoint"])
    assert config.model_type == REAL[name]["architecture"]["model_type"]
    assert numbers_of_experts(config) == {NUM_EXPERTS * 3 // 4}


def numbers_of_experts(config: Any) -> set[int]:
    """What a config says, under whichever name."""
    text = getattr(config, "text_config", config)
    fields = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {getattr(text, field) for field in fields if hasattr(text, field)}
