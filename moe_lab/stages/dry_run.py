"""A dry run: what a run would cost, from its config and the headers of the model's files alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.forecast.cards import CPU, card_named, card_of
from moe_lab.forecast.costs import measured_costs
from moe_lab.forecast.fitting import (
    Machine,
    disk_bytes,
    disk_shortage,
    left_to_do,
    memory_shortage,
)
from moe_lab.forecast.need import GIBIBYTE, Need
from moe_lab.forecast.stages import needs
from moe_lab.models.checkpoint import VOCABULARIES, Checkpoint
from moe_lab.models.file_sums import remember_in, unread_bytes
from moe_lab.models.headers import described_checkpoint
from moe_lab.models.opening import num_positions, text_config
from moe_lab.models.weight_files import weight_files
from moe_lab.stages.checks import in_quick_dtype
from moe_lab.stages.context import Context
from moe_lab.stages.forecasting import (
    Lengths,
    Prospect,
    is_downloaded,
    lengths_of,
    longest_lengths,
    prospect_of,
)
from moe_lab.stages.parts import Parts
from moe_lab.stages.pipeline import cached_results, check_parts
from moe_lab.stages.run import Run
from moe_lab.stages.texts import all_sources, tokenize
from moe_lab.store import Store
from moe_lab.types import UserError

HASHED = 2**26  # bytes of weights that are read for their fingerprint: as much as headers may be


@dataclass(frozen=True)
class DryRun:
    """What a run would need. figures: flat, for dry_run.json; refused: why it cannot run, or None.

    assumed: what the figures take for granted, in words.
    """

    figures: dict[str, Any]
    needs: tuple[Need, ...]
    machine: Machine
    assumed: tuple[str, ...] = ()
    refused: str | None = None


def dry_run(config: Mapping[str, Any], parts: Parts) -> DryRun:
    """Foresee a run. Reads the model's config and headers, and text that is here; makes nothing.

    UserError for whatever the run itself would refuse before any work, but for what does not fit,
    which the result tells.
    """
    compute, asked, root = parts.compute.start(), config["model"], Path(config["store"])
    if root.exists() and not root.is_dir():
        raise UserError(f"store={root} is a file: choose a folder, store=<folder>")
    with tempfile.TemporaryDirectory() as home:
        ignored = asked.get("ignore_tensors") or ()
        place = (str(asked["path"]), asked["revision"], asked["dtype"], ignored)
        dense = described_checkpoint(*place, Path(home))
        layers = dense.layers()
        dense = in_quick_dtype(dense, layers, compute)
        further = check_parts(config, parts, compute, dense, layers)
        texts = _texts(parts, dense)
        lengths, assumed = _lengths(parts, dense, texts)
        store = Store(root)
        remember_in(root)
        machine = _machine(compute, store)
        there = replace(compute, device="cuda" if machine.card else compute.device)
        run = prospect_of(dense, layers, parts, there, machine.memory, lengths, assumed, root)
        cached = _cached(config, parts, compute, dense, texts, further, store)
    found = tuple(
        replace(need, cached=cached.get(need.stage)) for need in needs(run.work, measured_costs())
    )
    return _told(config, run, found, machine)


def _lengths(
    parts: Parts, dense: Checkpoint, texts: Mapping[str, Tokens]
) -> tuple[Lengths, tuple[str, ...]]:
    """Tokens of all samples, and what is assumed of them."""
    if texts:
        return lengths_of(texts), ()
    assumed = "text is not read: every sample is taken for as long as it may be"
    return longest_lengths(parts, num_positions(dense.config)), (assumed,)


def _texts(parts: Parts, dense: Checkpoint) -> dict[str, Tokens]:
    """All text of the run, where it and the tokenizer are here; else empty."""
    here = any(file for pattern in VOCABULARIES for file in dense.path.glob(pattern))
    if not here or any(map(is_downloaded, all_sources(parts).values())):
        return {}
    size = text_config(dense.config).vocab_size
    return tokenize(parts, dense.tokenizer(), num_positions(dense.config), size)


def _cached(
    config: Mapping[str, Any],
    parts: Parts,
    compute: Compute,
    dense: Checkpoint,
    texts: Mapping[str, Tokens],
    further: list[int],
    store: Store,
) -> dict[str, bool]:
    """Which results are there; empty where keys cannot be known without reading weights or text."""
    if not texts or unread_bytes(weight_files(dense.path)) > HASHED:
        return {}
    context = Context(store, compute)
    run = Run(config, parts, context, Path(), {"method": "", "finetune": ""}, texts, further)
    return cached_results(run, dense)


def _machine(compute: Compute, store: Store) -> Machine:
    import torch

    there = next(one for one in (store.root, *store.root.resolve().parents) if one.exists())
    free = float(shutil.disk_usage(there).free)
    threads, name = torch.get_num_threads(), compute.card
    if name is None and compute.device.startswith("cuda"):
        found = card_of(compute.machine())
        title = found.title if found else compute.machine()
        return Machine(found, title, compute.memory(), threads, free)
    card = card_named(name or CPU)
    if card:
        return Machine(card, card.title, card.memory, threads, free)
    here = replace(compute, device="cpu")
    return Machine(None, "this machine", here.memory(), threads, free)


def _told(
    config: Mapping[str, Any], run: Prospect, found: tuple[Need, ...], machine: Machine
) -> DryRun:
    costs, left = measured_costs(), left_to_do(found)
    shortages = (memory_shortage(left, run.work, machine, costs), disk_shortage(left, machine.free))
    store = f"; store=<folder> on another disk, or free some of {config['store']}"
    words = [told + (store if place else "") for place, told in enumerate(shortages) if told]
    refused = "; and ".join(words) or None
    work = _work_keys(config, found)
    figures: dict[str, Any] = {"model": config["model"]["name"], "refused": refused}
    for need in found:
        figures |= {
            f"{need.stage}/memory_gib": need.memory / GIBIBYTE,
            f"{need.stage}/disk_gib": need.kept / GIBIBYTE,
            f"{need.stage}/scratch_gib": need.scratch / GIBIBYTE,
            f"{need.stage}/read_gib": need.read / GIBIBYTE,
            f"{need.stage}/flops": need.flops,
            f"{need.stage}/hours": machine.seconds(need, costs) / 3600,
            f"{need.stage}/cached": need.cached,
            f"{need.stage}/work": work[need.stage],
        }
    figures |= _totals(left, machine) | _result(run)
    figures["assumed"] = list(run.assumed)
    return DryRun(figures, found, machine, run.assumed, refused)


def _totals(left: Sequence[Need], machine: Machine) -> dict[str, Any]:
    costs = measured_costs()
    own = costs.process_bytes
    return {
        "memory_gib": (max((need.memory for need in left), default=0.0) + own) / GIBIBYTE,
        "process_gib": own / GIBIBYTE,
        "disk_gib": disk_bytes(left) / GIBIBYTE,
        "read_gib": sum(need.read for need in left) / GIBIBYTE,
        "flops": sum(need.flops for need in left),
        "hours": sum(machine.seconds(need, costs) for need in left) / 3600,
        "card": machine.card.name if machine.card else CPU,
    }


def _result(run: Prospect) -> dict[str, Any]:
    """What the result will be."""
    behind, dense = run.foreseen, run.work.dense
    told: dict[str, Any] = {
        "dense/gib": run.layers[0].model_bytes / GIBIBYTE,
        "dense/parameters": dense.shape.parameters,
        "result/exact": behind.exact,
    }
    if behind.weights:
        told |= {
            "result/gib": behind.weights.file_bytes / GIBIBYTE,
            "result/parameters": behind.weights.shape.parameters,
        }
    if behind.form and behind.exact:  # else it hangs on what the plan will find
        told |= {"result/stock": behind.form.stock, "result/form": behind.form.reason}
    return told


def _work_keys(config: Mapping[str, Any], found: Sequence[Need]) -> dict[str, str]:
    """What tells the work of each stage from that of other jobs: equal where they share it."""
    said = {
        name: {key: value for key, value in config[name].items() if key != "name"}
        if isinstance(config[name], Mapping)
        else config[name]
        for name in (
            "model",
            "calibration",
            "method",
            "finetune",
            "quantize",
            "eval",
            "measure",
            "diagnose",
            "trace",
        )
    }
    seed = config["seed"]
    model = {key: said["model"].get(key) for key in ("path", "revision", "dtype")}
    profile = [model, said["calibration"]]
    plan = [profile, said["method"]]
    tuned = [plan, said["finetune"], seed]
    packed = [tuned, said["quantize"]]
    variants = {"dense": model, "compressed": plan, "finetuned": tuned, "quantized": packed}
    known: dict[str, Any] = {
        "convert": model,
        "profile": profile,
        "diagnose": [profile, said["diagnose"]],
        "plan": plan,
        "compress": plan,
        "teacher": [model, said["finetune"]],
        "finetune": tuned,
        "quantize": packed,
        "measure": [list(variants.values()), said["measure"]],
    }
    known |= {f"evaluate_{name}": [one, said["eval"]] for name, one in variants.items()}
    known |= {f"trace_{name}": [one, said["trace"]] for name, one in variants.items()}
    return {need.stage: _digest([need.stage, known[need.stage]]) for need in found}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
