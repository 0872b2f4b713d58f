"""moe_lab: compress Mixture-of-Experts language models, and know what it cost.

`moe_lab.load(path)` loads any checkpoint that moe_lab wrote. After `import moe_lab`, plain
`AutoModelForCausalLM.from_pretrained(path)` does too, also where layers differ in a way that the
model's own family cannot say.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]

_MODELING = "transformers.modeling_utils"


def __getattr__(name: str) -> Any:
    if name == "load":
        from moe_lab.models.checkpoint import load

        return load
    raise AttributeError(f"module 'moe_lab' has no attribute {name!r}")


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Teaches transformers our layer structures the moment it is imported, and not before.

    Importing transformers and torch takes seconds, which `import moe_lab` must not cost.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _MODELING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self.loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.loader.exec_module(module)
        _teach(module)


def _teach(modeling: Any) -> None:
    original = modeling.PreTrainedModel.post_init

    def post_init(self: Any) -> None:
        structure = getattr(self.config, "moe_lab", None)
        if structure:
            from moe_lab.models.own_form import apply_structure

            apply_structure(self, structure)
        original(self)

    modeling.PreTrainedModel.post_init = post_init


if _MODELING in sys.modules:
    _teach(sys.modules[_MODELING])
else:
    sys.meta_path.insert(0, _WhenImported())
