"""What jobs import, once for all that are forked from here."""

import importlib
import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("MKL_CBWR", "AVX2")
for name in (
    "hydra", "lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface", "datasets", "scipy.cluster",
    "matplotlib.pyplot", "moe_lab.runs.job", "moe_lab.runs.sweep", "moe_lab.tables.outputs",
    "moe_lab.evaluate.run_tasks", "moe_lab.finetune.experts", "moe_lab.finetune.router_kd",
    "transformers.models.qwen2_moe.modeling_qwen2_moe",
):  # fmt: skip
    importlib.import_module(name)
pipeline = importlib.import_module("moe_lab.stages.pipeline")
for name in pipeline.STAGES:
    pipeline.stage_named(name)
