"""One experiment: profile -> plan -> compress -> finetune -> evaluate -> measure -> report.

Reads top to bottom as the pipeline. Every stage is remembered under outputs/store by what it
depends on; `python run.py --help` teaches the options.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

USER_MISTAKE, FAILURE = 2, 1
exit_codes: list[int] = []


def pipeline(config: DictConfig, report: dict[str, Any], folder: Path) -> None:
    """Run all stages, filling in `report` as results come; UserError for a user's mistake."""
    # Imported here, so that --help and a misspelt option answer at once.
    from moe_lab import checkpoint, stages
    from moe_lab.stages.compress import compress
    from moe_lab.stages.evaluate import evaluate, results_of
    from moe_lab.stages.finetune import finetune
    from moe_lab.stages.measure import figures_of, measure_stage
    from moe_lab.stages.plan import plan
    from moe_lab.stages.profile import profile
    from moe_lab.store import Store, check_writable

    options = OmegaConf.to_container(config, resolve=True)
    parts = {
        name: instantiate(config[name], _convert_="object") or None
        for name in ("calibration", "method", "finetune", "eval", "measure")
    }
    method, recipe, suite = parts["method"], parts["finetune"], parts["eval"]

    # Whatever can be refused is refused before anything expensive.
    compute = instantiate(config.compute).start()
    dense = checkpoint.resolve(config.model.path, config.model.revision, config.model.dtype)
    check_writable(Path(config.store), 4 * checkpoint.size_in_bytes(dense.path))
    method.check(dense.layers())
    texts = stages.tokenize(parts, dense.tokenizer())
    report |= {
        "fingerprint/model": dense.fingerprint,
        "fingerprint/data": texts["calibration"].fingerprint,
    }

    store, record = Store(Path(config.store)), stages.Recorder(report)
    profiled = record("profile", profile(store, dense, texts["calibration"], compute))
    planned = record(
        "plan",
        plan(store, dense, profiled, texts["calibration"], method, options["method"], compute),
    )
    variants = {"dense": dense}
    if stages.publish_plan(planned, folder):
        compressed = record("compress", compress(store, dense, planned, compute))
        variants["compressed"] = stages.checkpoint_of(compressed, dense)
        if recipe:
            tuned = finetune(
                store, variants["compressed"], planned, recipe, options["finetune"], texts,
                config.seed, compute,
            )  # fmt: skip
            variants["finetuned"] = stages.checkpoint_of(record("finetune", tuned), dense)
    record.checkpoints(variants)
    for name, variant in variants.items() if suite else ():
        evaluated = evaluate(
            store, variant, dense, suite, options["eval"], texts.get("held_out"), compute
        )
        record(f"evaluate_{name}", evaluated)
        record.evaluation(name, results_of(evaluated))
    if parts["measure"]:
        measured = measure_stage(store, variants, parts["measure"], compute)
        record("measure", measured)
        report |= figures_of(measured)


@hydra.main(version_base="1.3", config_path="conf", config_name="run")
def main(config: DictConfig) -> None:
    """One job: the pipeline, then its report, whatever happened."""
    from moe_lab import job

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    description = job.Description(
        folder=folder,
        sweep=folder.parent.name,
        name=hydra_config.job.override_dirname or config.model.name,
        choices=dict(hydra_config.runtime.choices),
        config=OmegaConf.to_container(config, resolve=True),
    )
    tracker = instantiate(config.track)
    work = lambda report: pipeline(config, report, folder)  # noqa: E731
    exit_codes.append(job.run(description, tracker, work))


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stop:  # Hydra's own refusals: an unknown option, group or value
        sys.exit(USER_MISTAKE if stop.code == FAILURE else stop.code)
    sys.exit(max(exit_codes, default=0))
