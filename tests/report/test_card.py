"""Model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from moe_lab.report.card import hub_id, model_card
from moe_lab.report.serving import ENGINES, where_it_runs

NATIVE = {"family": "mixtral", "form": "native, fewer experts"}
OWN = {"family": "mixtral", "form": "own form, zero stand-ins"}


def told(variant: str, of: dict[str, str] = NATIVE) -> dict[str, Any]:
    """What a report says of a variant's form."""
    stock = of["form"].startswith("native")
    return {f"{variant}/stock": stock} | {f"{variant}/{key}": one for key, one in of.items()}


def card_of(of: dict[str, str]) -> str:
    """The text of a card of a checkpoint of this form."""
    report = {"method": "prune", "model": "m", "commit": "c"} | told("compressed", of)
    report |= {"fingerprint/model": "1", "fingerprint/data": "2"}
    config: dict[str, Any] = dict.fromkeys(("calibration", "method", "finetune", "seed"))
    config["model"] = {"path": "shipped:tiny_mixtral"}
    return model_card("compressed", report, config, "| a |\n| --- |\n")


def test_the_card_says_where_it_runs_by_the_matrix() -> None:
    runs = where_it_runs(**NATIVE)
    text = card_of(NATIVE)
    assert "(`mixtral`: native, fewer experts)" in text
    for line in runs.lines().values():
        assert f"\n- {line}\n" in text
    for command in runs.commands():
        assert f"\n```bash\n{command}\n```\n" in text
    assert "vllm serve <this folder>" in text
    own = card_of(OWN)
    assert "import moe_lab" in own and "moe_lab.load" in own
    assert f"- {where_it_runs(**OWN).lines()['vllm']}" in own and ": refused" in own


def test_what_the_matrix_lacks_is_said_not_to_be_run() -> None:
    text = card_of({"family": "nobody", "form": "native"})
    assert text.count(": not run\n") == len(ENGINES) and "```bash" not in text


def test_what_must_not_be_used_is_said() -> None:
    text = card_of({"family": "qwen2_moe", "form": "native, dense layers"})
    assert "SGLang: not run. As read in its source" in text
    assert "SGLang" not in card_of(NATIVE)


def test_the_card_names_the_splits_that_were_seen() -> None:
    """Supervised sets hold the training splits of the tasks that they are later measured on."""
    seen = {"finetune/lm/data": "C4 (train)", "finetune/sft/data": "ARC (train), BoolQ (train)"}
    report = {"method": "condense", "model": "m", "commit": "c"} | seen | told("finetuned")
    report |= {"fingerprint/model": "1", "fingerprint/data": "2", "finetune/lm/validation": "C4"}
    config: dict[str, Any] = dict.fromkeys(("calibration", "method", "finetune", "seed"))
    config["model"] = {"path": "shipped:tiny_deepseek"}
    made = model_card("finetuned", report, config, "")
    assert "- lm: C4 (train)\n- sft: ARC (train), BoolQ (train)\n\n```python" in made
    report |= told("compressed")
    assert "C4" not in model_card("compressed", report, config, "")


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("owner/model-8x7B", "owner/model-8x7B"),
        ("shipped:tiny_deepseek", None),
        ("{folder}", None),
        ("outputs/runs/a/checkpoint", None),
    ],
)
def test_the_base_model_is_a_hub_id_or_left_out(
    path: str, base: str | None, tmp_path: Path
) -> None:
    report = {"method": "prune", "model": "a name", "commit": "c"} | told("compressed", OWN)
    report |= {"fingerprint/model": "1", "fingerprint/data": "2"}
    config: dict[str, Any] = dict.fromkeys(("calibration", "method", "finetune", "seed"))
    config["model"] = {"path": path.format(folder=tmp_path)}
    card = ModelCard(model_card("compressed", report, config, "| a |\n| --- |\n"))
    assert card.data.base_model == base
    assert card.data.tags == ["moe", "moe_lab", "prune"]
    assert "moe_lab.load" in card.text and "| a |" in card.text


def test_a_folder_of_the_form_of_a_hub_id_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/model") is None and hub_id("owner/other") == "owner/other"
