"""Teaches transformers our own form of checkpoints the moment it is imported, and not before.

Importing transformers and torch takes seconds, which `import moe_lab` must not cost: nothing but
the standard library is imported here.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODELING = "transformers.modeling_utils"


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module as others do, and changes it behind its own code."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != _MODELING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self.loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _teach(module)


def teach_when_imported() -> None:
    """Let models be built as the "moe_lab" of their config says, now or once there are any."""
    if _MODELING in sys.modules:
        _teach(sys.modules[_MODELING])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _teach(modeling: ModuleType) -> None:
    original = modeling.PreTrainedModel.post_init

    def post_init(self: Any) -> None:
        structure = getattr(self.config, "moe_lab", None)
        if structure:
            from moe_lab.models.own_form import apply_structure

            apply_structure(self, structure)
        original(self)

    modeling.PreTrainedModel.post_init = post_init
