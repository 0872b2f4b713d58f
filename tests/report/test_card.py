"""Model cards."""

from __future__ import annotations

from moe_lab.report.card import model_card


def test_the_card_names_the_splits_that_were_seen() -> None:
    """Supervised sets hold the training splits of the tasks that they are later measured on."""
    seen = {"finetune/lm/data": "C4 (train)", "finetune/sft/data": "ARC (train), BoolQ (train)"}
    report = {"finetuned/stock": True, "method": "condense", "model": "m", "commit": "c"} | seen
    report |= {"fingerprint/model": "1", "fingerprint/data": "2", "finetune/lm/validation": "C4"}
    config = dict.fromkeys(("model", "calibration", "method", "finetune", "seed"))
    made = model_card("finetuned", report, config, "")
    assert "- lm: C4 (train)\n- sft: ARC (train), BoolQ (train)\n\n```python" in made
    report["compressed/stock"] = True
    assert "C4" not in model_card("compressed", report, config, "")
