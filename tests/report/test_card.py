"""Model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from moe_lab.report.card import hub_id, model_card


def test_the_card_names_the_splits_that_were_seen() -> None:
    """Supervised sets hold the training splits of the tasks that they are later measured on."""
    seen = {"finetune/lm/data": "C4 (train)", "finetune/sft/data": "ARC (train), BoolQ (train)"}
    report = {"finetuned/stock": True, "method": "condense", "model": "m", "commit": "c"} | seen
    report |= {"fingerprint/model": "1", "fingerprint/data": "2", "finetune/lm/validation": "C4"}
    config: dict[str, Any] = dict.fromkeys(("calibration", "method", "finetune", "seed"))
    config["model"] = {"path": "shipped:tiny_deepseek"}
    made = model_card("finetuned", report, config, "")
    assert "- lm: C4 (train)\n- sft: ARC (train), BoolQ (train)\n\n```python" in made
    report["compressed/stock"] = True
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
    report = {"compressed/stock": False, "method": "prune", "model": "a name", "commit": "c"}
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
