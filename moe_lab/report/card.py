"""Model cards of checkpoints that moe_lab wrote: the recipe and the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LOADED_BY_STOCK = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```

Stock transformers loads it, with no custom code."""
LOADED_BY_US = """```python
import moe_lab

model = moe_lab.load("<this folder>")
```

Its layers differ in a way that the model's own family cannot say, so stock transformers cannot
load it; after `import moe_lab`, plain `AutoModelForCausalLM.from_pretrained` can."""
ENGINES = """Serving engines: not run with this checkpoint. vLLM reads `mlp_only_layers` of
Qwen2-MoE (read in its source). SGLang's Qwen2-MoE ignored `mlp_only_layers` without an error when
its source was read: do not serve a condensed Qwen2-MoE with it before checking."""


def model_card(
    variant: str, report: Mapping[str, Any], config: Mapping[str, Any], table: str
) -> str:
    """The card of one variant: what it is, how to load it, figures, and the composed config."""
    stock = bool(report[f"{variant}/stock"])
    recipe = {key: config[key] for key in ("model", "calibration", "method", "finetune", "seed")}
    return f"""---
library_name: transformers
tags: [moe, moe_lab, {report["method"]}]
base_model: {report["model"]}
---
# {report["model"]}, {report["method"]}, {variant}

Made by moe_lab (commit {report["commit"]}) from `{report["model"]}` (fingerprint
{report["fingerprint/model"]}) with calibration data of fingerprint {report["fingerprint/data"]}.

{_seen(report) if variant == "finetuned" else ""}{LOADED_BY_STOCK if stock else LOADED_BY_US}

{ENGINES}

## Figures

{table}
## Recipe

```json
{json.dumps(recipe, indent=1)}
```
"""


def _seen(report: Mapping[str, Any]) -> str:
    """What fine-tuning has seen: a score on a task whose training split is here is no zero-shot."""
    keys = [key for key in report if key.startswith("finetune/") and key.endswith("/data")]
    lines = [f"- {key.split('/')[1]}: {report[key]}" for key in keys]
    return "\n".join(["Fine-tuned, phase after phase, on:", "", *lines, "", ""])
