"""Where the stages of a run work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_lab.compute import Compute
from moe_lab.store import Store


@dataclass(frozen=True)
class Context:
    """Where a stage works, which is no part of what its result is.

    log: takes each row of a fine-tuning's curve while it trains.
    """

    store: Store
    compute: Compute
    log: Callable[[dict[str, Any]], None] | None = None
