"""What jobs import, once for all that are forked from here."""

import importlib
import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("MKL_CBWR", "AVX2")
for name in (
    "hydra", "lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface", "datasets", "scipy.cluster",
    "matplotlib.pyplot", "moe_lab.runs.job", "moe_lab.runs.sweep", "moe_lab.tables.outputs",
    "moe_lab.stages.pipeline", "moe_lab.evaluate.run_tasks",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("qwen2_moe", "mixtral")),
):  # fmt: skip
    importlib.import_module(name)
for name in importlib.import_module("moe_lab.stages.pipeline").STAGES:
    importlib.import_module("moe_lab.stages.pipeline").stage_named(name)
