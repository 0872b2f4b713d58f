"""What `import moe_lab` teaches transformers: to read our own form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from families import FAMILIES
from stand_ins import saved

# Loads every folder with stock transformers alone, then again after `import moe_lab`.
FRESH = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

def load_all():
    found = {}
    for folder in sys.argv[1:]:
        want = load_file(folder + "/expected.safetensors")
        read = AutoModelForCausalLM.from_pretrained
        try:
            model, info = read(folder + "/model", output_loading_info=True)
        except (RuntimeError, ValueError):
            found[folder] = "refused"
            continue
        with torch.no_grad():
            got = model(input_ids=want["input_ids"], attention_mask=want["attention_mask"]).logits
        clean = not info["missing_keys"] and not info["unexpected_keys"]
        found[folder] = float((got - want["logits"]).abs().max()) if clean else str(info)
    return found

stock = load_all()
assert "moe_lab" not in sys.modules
import moe_lab
print("RESULT" + json.dumps([stock, load_all()]))
"""


def test_every_family_is_read_again_by_us_and_refused_by_stock(tmp_path: Path) -> None:
    folders = [tmp_path / family for family in FAMILIES]
    for folder in folders:
        reason = saved(folder.name, folder)[2]
        assert "method.replacement=nothing" in reason
        assert "method.router=dominant" in reason
    arguments = [sys.executable, "-c", FRESH, *map(str, folders)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    stock, ours = json.loads(done.stdout.split("RESULT")[1])
    assert ours == {str(folder): 0.0 for folder in folders}
    assert stock == {str(folder): "refused" for folder in folders}


def test_the_import_itself_costs_neither_torch_nor_transformers() -> None:
    program = "import sys, moe_lab; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
