"""Plan: what happens to each layer, decided and written down before any weight is touched."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from moe_lab import condense, moe, statistics, stream
from moe_lab.checkpoint import Checkpoint, check_plan
from moe_lab.compute import Compute
from moe_lab.data import Tokens
from moe_lab.methods import Evidence
from moe_lab.store import Artifact, Store, code_version, write_whole


def plan(
    store: Store,
    checkpoint: Checkpoint,
    profile: Artifact,
    tokens: Tokens,
    method: Any,
    options: dict[str, Any],
    compute: Compute,
) -> Artifact:
    """A folder with plan.json. options: the method's composed config, its identity."""

    def make(folder: Path) -> None:
        evidence = Evidence(
            statistics=statistics.load(profile.folder),
            model=functools.partial(checkpoint.load, compute.device),
            batches=lambda: tokens.batches(compute.batch_size, compute.device),
        )
        made = method.plan(evidence)
        check_plan([layer.info for layer in evidence.statistics], made.edited())
        write_whole(folder / "plan.json", made.to_text())

    identity = {
        "profile": profile.key,
        "method": options,
        "code": code_version(*_code(method)),
    }
    return store.get("plan", identity, make)


def _code(method: Any) -> list[Any]:
    """The modules that decide this plan: the method's own and those of its plug-ins."""
    parts = [value for value in vars(method).values() if callable(value) or hasattr(value, "keep")]
    named = [
        condense.option(kind, value)
        for kind, value in vars(method).items()
        if kind in ("experts", "layers") and isinstance(value, str)
    ]
    return [method, condense, moe, stream, *parts, *named]
