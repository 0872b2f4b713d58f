"""moe_lab: compress Mixture-of-Experts language models, and know what it cost.

`moe_lab.load(path)` loads any checkpoint that moe_lab wrote. After `import moe_lab`, plain
`AutoModelForCausalLM.from_pretrained(path)` does too, also where layers differ in a way that the
model's own family cannot say.
"""

from __future__ import annotations

from typing import Any

from moe_lab.models.hook import teach_when_imported

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from moe_lab.models.checkpoint import load

        return load
    raise AttributeError(f"module 'moe_lab' has no attribute {name!r}")


teach_when_imported()
