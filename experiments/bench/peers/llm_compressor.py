"""The job of `job.py` by llm-compressor's REAPPruningModifier, in an environment of its own.

    python experiments/bench/peers/llm_compressor.py [folder] [--rounds 3]

makes the environment (.venv-llm-compressor beside this file, of llm_compressor.txt), and lets the
two take turns over one checkpoint and one text. llm-compressor goes by its sequential pipeline, a
sample at a time as it does by default. It computes only the experts that a token is sent to, as it
advises for REAP (moe_calibrate_all_experts). By default it computes each layer again behind its
pruning, so that deeper layers are scored on what pruned ones give (propagate_error): the limits are
of that. Each layer once, as we score, is told beside. Prints PASS or FAIL beside each limit; where
each layer is computed once, which experts stay as with ours; and why others do: by plain hooks the
same formula keeps llm-compressor's where attention has no causal mask, so that its own has none.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import job
import reap_by_hooks

HERE = Path(__file__).resolve().parent
ENVIRONMENT, PINS = HERE / ".venv-llm-compressor", HERE / "llm_compressor.txt"
PEER = "llm-compressor 0.14.0"
CPU_LIMIT, MEMORY_LIMIT = 0.40, 1.0


def interpreter() -> Path:
    """The Python of the peer's environment, which is made where it is not there yet."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").is_file():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(PINS)]
        subprocess.run(install, check=True)
        (ENVIRONMENT / "complete").touch()
    return python


def prune(dense: Path, text: Path, out: Path, again: bool = False) -> None:
    """Of a process in that environment: the job, and experts.json with those kept.

    again: each layer is computed once more behind its pruning.
    """
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
    from llmcompressor.utils import load_context
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    # Loading looks into every module of transformers that is known, and behind these names it would
    # import all image processors, which want a torchvision that torch's build for CPUs has not.
    for name in [one for one in sys.modules if one.startswith("transformers.models.")]:
        if name.endswith("_fast"):
            del sys.modules[name]
    samples = [torch.tensor(ids) for ids in job.tokens_of(text, dense)]
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in samples]
    with load_context():
        model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    reap = REAPPruningModifier(sparsity=job.SHARE, report_path=f"{out}/experts.json")
    oneshot(
        model=model, recipe=reap,
        dataset=DataLoader(rows, batch_size=1), num_calibration_samples=len(rows),
        pipeline="sequential", moe_calibrate_all_experts=False, propagate_error=again,
    )  # fmt: skip
    model.save_pretrained(out / "checkpoint")
    AutoTokenizer.from_pretrained(dense).save_pretrained(out / "checkpoint")


def main() -> int:
    """Take turns, and compare; 1 where a limit is passed."""
    folder, rounds = job.asked(__doc__)
    dense = job.checkpoint_in(folder)
    text, out = job.text_in(folder), folder / "llm_compressor"
    once = [str(interpreter()), __file__, "--of", *map(str, (dense, text, out))]
    commands = {f"{PEER} by default": [*once, "again"], f"{PEER}, each layer once": once}
    ours, theirs, kept = job.take_turns(dense, folder / "ours", commands, out, rounds)
    report = json.loads((out / "experts.json").read_text())
    other = {int(name.split(".")[2]): experts for name, experts in report.items()}
    job.show_kept(f"ours and {PEER}", kept, other)
    hooked = folder / "unmasked"
    hooked.mkdir(exist_ok=True)
    job.watched([*reap_by_hooks.command_for(dense, text, hooked), "unmasked"])
    job.show_kept(f"hooks without a causal mask and {PEER}", reap_by_hooks.kept_in(hooked), other)
    return job.compared(ours, theirs, CPU_LIMIT, MEMORY_LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--of"]:
        prune(*map(Path, sys.argv[2:5]), again=sys.argv[5:] == ["again"])
        sys.exit(0)
    sys.exit(main())
