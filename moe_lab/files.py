"""The names of the files that moe_lab writes, said once: every room may import them.

A run's folder is outputs/runs/<sweep>/<job>/, a stage's result outputs/store/<kind>/<key>/.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent  # where run.py, conf/ and experiments/ lie; not beside an installed copy

# In a run's folder.
REPORT = "report.json"
DRY_RUN = "dry_run.json"  # what a run would cost, in the place of a report
LOG = "run.log"
USAGE = "usage.csv"  # the experts' usage on the calibration set: layer, expert, tokens, usage
PLOTS = "plots"  # pictures, each a PNG and a PDF
DIAGNOSIS = "diagnosis"  # tables and pictures of what the experts do
HYDRA = ".hydra"  # what was asked for: config.yaml, overrides.yaml, hydra.yaml
REPRODUCED = "reproduced"  # the run made again from its own record
LOCK = "job.lock"  # held while a job runs

# In a sweep's folder.
SWEEP = "sweep.json"  # how it was started, and the overrides of each job
PAGE = "index.html"

# In a stage's result; some are copied into the run's folder.
PLAN = "plan.json"
PLANS = "plans"  # of groups: <number>.json, one for each group of the calibration set
CURVE = "curve.jsonl"  # a fine-tuning, a row for each step
TRAINABLE = "trainable.json"  # what trained, and the text that it saw
FORM = "form.json"  # how a checkpoint was saved: `models.forms.Form`
MODEL_CARD = "README.md"  # in a checkpoint's folder; written when its run has ended
CHECKPOINT = "checkpoint"  # the folder of a checkpoint within a result
FIGURES_FILE = "figures.json"  # figures of a measurement or a diagnosis, flat
TRACE = "trace.parquet"  # which experts each token was sent to, pass by pass
LAYERS = "layers.json"  # of a profile: what each MoE layer is
