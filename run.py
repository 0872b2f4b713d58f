"""One experiment: profile -> plan -> compress -> finetune -> evaluate -> measure -> report.

Reads top to bottom as the pipeline. Every stage is remembered under outputs/store by what it
depends on; `python run.py --help` teaches the options.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from moe_lab import options, sweep

USER_MISTAKE, STOPPED = 2, 130
exit_codes: list[int] = []


def pipeline(
    config: DictConfig,
    report: dict[str, Any],
    folder: Path,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Run all stages, filling in `report` as results come; UserError for a user's mistake.

    log: takes the rows of a fine-tuning's curve while it trains.
    """
    # Imported here, so that --help and a misspelt option answer at once.
    from moe_lab import checkpoint, stages
    from moe_lab.stages.compress import compress
    from moe_lab.stages.convert import convert
    from moe_lab.stages.evaluate import evaluate, evaluate_groups, results_of
    from moe_lab.stages.finetune import finetune
    from moe_lab.stages.measure import figures_of, measure_stage
    from moe_lab.stages.plan import foresee, plan
    from moe_lab.stages.profile import check_profile, profile
    from moe_lab.stages.teach import check_teacher, teach
    from moe_lab.store import Store, check_writable

    chosen = OmegaConf.to_container(config, resolve=True)
    parts = {
        name: instantiate(config[name], _convert_="object") or None
        for name in ("calibration", "method", "finetune", "eval", "measure", "diagnose")
    }
    method, recipe, suite = parts["method"], parts["finetune"], parts["eval"]

    # Whatever can be refused is refused before anything expensive.
    compute = instantiate(config.compute).start()
    dense = checkpoint.resolve(config.model.path, config.model.revision, config.model.dtype)
    check_writable(Path(config.store), 4 * checkpoint.size_in_bytes(dense.path))
    layers = dense.layers()
    method.check(layers)
    check_profile(compute, method)
    if parts["diagnose"]:
        parts["diagnose"].check(compute, layers)
    foresee(dense, method, recipe, layers)
    further_top_k = stages.other_top_k(suite, recipe, dense.config, layers)
    texts = stages.tokenize(parts, dense.tokenizer())
    report |= {
        "fingerprint/model": dense.fingerprint,
        "fingerprint/data": texts["calibration"].fingerprint,
    }

    store, record = Store(Path(config.store)), stages.Recorder(report, folder)
    if recipe and recipe.distils:
        check_teacher(store, dense, recipe, texts)
    if isinstance(dense, checkpoint.Original):
        dense = stages.checkpoint_of(record("convert", convert(store, dense)), dense)
    profiled = record("profile", profile(store, dense, texts["calibration"], compute))
    stages.publish_usage(profiled, folder)
    if parts["diagnose"]:
        from moe_lab.stages.diagnose import diagnose, publish  # tables: other runs do not pay

        diagnosed = diagnose(
            store, dense, profiled, texts["calibration"], parts["diagnose"], compute
        )
        report |= publish(record("diagnose", diagnosed), folder)
    planned = record(
        "plan",
        plan(store, dense, profiled, texts["calibration"], method, chosen["method"], compute),
    )
    variants = {"dense": dense}
    edited = stages.publish_plan(planned, folder, report)
    if edited:
        compressed = record("compress", compress(store, dense, planned, compute))
        variants["compressed"] = stages.checkpoint_of(compressed, dense)
    if recipe and (edited or not recipe.needs_edits):
        taught = None
        if recipe.distils:
            taught = record("teacher", teach(store, dense, recipe, texts, compute))
        tuned = finetune(
            store, variants.get("compressed", dense), planned, recipe, chosen["finetune"], texts,
            config.seed, compute, taught, log,
        )  # fmt: skip
        variants["finetuned"] = stages.checkpoint_of(record("finetune", tuned), dense)
    record.checkpoints(variants)
    variants = stages.with_top_k(variants, further_top_k, suite)
    for name, variant in variants.items() if suite else ():
        evaluated = evaluate(
            store, variant, dense, suite, chosen["eval"], texts.get("held_out"), compute
        )
        record(f"evaluate_{name}", evaluated)
        record.evaluation(name, results_of(evaluated))
    if suite and texts["calibration"].groups:
        evaluated = evaluate_groups(store, dense, planned, suite, chosen["eval"], compute)
        record.groups(planned, dense)
        record.evaluation("compressed", results_of(record("evaluate_groups", evaluated)))
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
    # A single job that is put into a sweep's folder is none of its own.
    place = sweep.place(folder) if hydra_config.mode == RunMode.MULTIRUN else None
    named = place.told if place else hydra_config.job.override_dirname
    description = job.Description(
        folder=folder,
        sweep=folder.parent.name,
        name=named or config.model.name,
        choices=dict(hydra_config.runtime.choices),
        config=OmegaConf.to_container(config, resolve=True),
        place=place,
    )
    tracker = instantiate(config.track)

    def work(report: dict[str, Any]) -> None:
        raw = OmegaConf.to_container(config)
        options.check(description.config, raw, description.choices)
        pipeline(config, report, folder, tracker.log_curve)

    exit_codes.append(job.run(description, tracker, work))


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's refusals reach us, to be told without traceback
    os.environ["MOE_LAB_ROOT"] = str(Path(__file__).resolve().parent)  # of experiments/
    try:
        main()
        if sweep.Sweep.started:
            exit_codes.append(sweep.Sweep.started.end())
    except KeyboardInterrupt:
        print("stopped; finished stages are kept, the same command goes on", file=sys.stderr)
        if sweep.Sweep.started:
            print(sweep.Sweep.started.how_to_go_on(), file=sys.stderr)
        sys.exit(STOPPED)
    except Exception as error:
        message = options.refusal(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        sys.exit(USER_MISTAKE)
    sys.exit(max(exit_codes, default=0))
