"""Model cards of checkpoints that moe_lab wrote: where they run, the recipe, the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in its __all__

from moe_lab.report.serving import where_it_runs

QUANTIZED = "quantized"
TEMPLATE = Path(__file__).parent / "card.md.jinja"


def model_card(
    variant: str, report: Mapping[str, Any], config: Mapping[str, Any], table: str
) -> str:
    """The card of one variant: what it is, how to load it, where it runs, figures, the config."""
    groups = ("model", "calibration", "method", "finetune", "seed")
    recipe = {key: config[key] for key in groups}
    if variant == QUANTIZED:
        recipe["quantize"] = config["quantize"]
    about = ModelCardData(
        library_name="transformers",
        tags=["moe", "moe_lab", report["method"]],
        base_model=hub_id(config["model"]["path"]),
    )
    card = ModelCard.from_template(
        about,
        template_path=str(TEMPLATE),
        variant=variant,
        model=report["model"],
        method=report["method"],
        commit=report["commit"],
        fingerprint=report["fingerprint/model"],
        data=report["fingerprint/data"],
        stock=bool(report[f"{variant}/stock"]),
        family=report[f"{variant}/family"],
        form=report[f"{variant}/form"],
        runs=where_it_runs(report[f"{variant}/family"], report[f"{variant}/form"]),
        seen=_seen(report) if variant in ("finetuned", QUANTIZED) else {},
        packed=_packed(report) if variant == QUANTIZED else "",
        table=table,
        recipe=json.dumps(recipe, indent=1),
    )
    return str(card)


def _packed(report: Mapping[str, Any]) -> str:
    """How many matrices are in few bits, and what reads them."""
    matrices, bits = (
        report[f"{QUANTIZED}/{key}"] for key in ("packed_matrices", "bits_per_weight")
    )
    return (
        f"{matrices} matrices are in few bits (quantize={report['quantize']}): {bits:.3g} bits a "
        "weight with scales. Whole numbers are packed as compressed-tensors 0.19 and later do, "
        "densely: up to 0.17 it read 3, 5, 6 and 7 bits otherwise"
    )


def hub_id(path: str) -> str | None:
    """The path of a model where it is a hub id (owner/name); None for local and shipped ones."""
    if "/" not in path or Path(path).expanduser().exists():
        return None
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    return path


def _seen(report: Mapping[str, Any]) -> dict[str, str]:
    """What fine-tuning has seen: a score on a task whose training split is here is no zero-shot."""
    keys = [key for key in report if key.startswith("finetune/") and key.endswith("/data")]
    return {key.split("/")[1]: report[key] for key in keys}
