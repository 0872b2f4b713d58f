"""What the composed options of a run name, made: the objects that its stages work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from moe_lab.compute import Compute
from moe_lab.data.source import Source
from moe_lab.diagnose.diagnosis import Diagnosis
from moe_lab.evaluate.suite import Suite
from moe_lab.finetune.recipe import Recipe
from moe_lab.lookup import require_kind
from moe_lab.measure.speed import Measurement
from moe_lab.methods.base import Method
from moe_lab.trace.tracing import Tracing


@dataclass(frozen=True)
class Parts:
    """One object for each config group that names code; None for what is left out (eval=none).

    Metrics, ratios and the like are inside their method, and data of a phase inside its recipe.
    """

    compute: Compute
    calibration: Source
    method: Method
    finetune: Recipe | None = None
    eval: Suite | None = None
    measure: Measurement | None = None
    diagnose: Diagnosis | None = None
    trace: Tracing | None = None

    @classmethod
    def made(cls, config: Mapping[str, Any], make: Callable[[Any], Any]) -> Parts:
        """From a composed config; make(node): the object that a node's `_target_` names.

        UserError for an object of another kind than its group's.
        """
        made: dict[str, Any] = {}
        for name, kind in get_type_hints(cls).items():
            base = next(one for one in (*get_args(kind), kind) if one is not type(None))
            given = make(config[name]) or None
            optional = given is None and type(None) in get_args(kind)
            made[name] = None if optional else require_kind(name, given, base)
        return cls(**made)
