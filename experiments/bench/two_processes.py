"""What a second process gains a profile, where each has a core: at least 1.6 times the rate.

    python experiments/bench/two_processes.py

A random Qwen2-MoE of 0.25 GB is profiled on 96 samples by one process with one thread, and then by
two (gloo) that share them, in turn. The times are the profile stage's, as the reports tell them.
Nothing else should run: the machine needs two cores that are free.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_lab.files import PACKAGE

ROOT = Path(__file__).resolve().parents[2]
TURNS = 3
WANTED = 1.6


def write_model(folder: Path) -> None:
    """The random checkpoint, with the shipped models' tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2_moe", hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=2048, num_experts=32, num_experts_per_tok=4,
        moe_intermediate_size=160, shared_expert_intermediate_size=320, intermediate_size=1024,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in (PACKAGE / "checkpoints" / "tiny_deepseek").glob("*token*.json"):
        (folder / file.name).write_bytes(file.read_bytes())


def seconds(model: Path, home: Path, processes: int) -> float:
    """Of the profile stage, by so many processes with a thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        sys.executable, *(launcher if processes > 1 else []), str(ROOT / "run.py"),
        "model=checkpoint", f"model.path={model}", "method=prune", "metric=reap", "finetune=none",
        "eval=none", "measure=none", "track=off", "calibration.num_samples=96",
        "calibration.max_length=256", "compute.batch_size=8", "compute.threads=1",
        f"store={home}/store", f"run_dir={home}/run",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    report = json.loads((home / "run" / "report.json").read_text())
    return float(report["seconds/profile"])


def main() -> int:
    """Measure and print; 1 where the target is missed."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model)
        for turn in range(TURNS):
            one, two = (
                seconds(model, Path(folder) / f"{turn}.{number}", number) for number in (1, 2)
            )
            ratios.append(one / two)
            print(f"one process {one:.1f} s, two {two:.1f} s: {ratios[-1]:.2f} times")
    median = sorted(ratios)[TURNS // 2]
    print(f"{'PASS' if median >= WANTED else 'MISS'}: {median:.2f} times, {WANTED} wanted")
    return int(median < WANTED)


if __name__ == "__main__":
    sys.exit(main())
