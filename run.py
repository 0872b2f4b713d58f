"""Hydra's entry: one job, or each job of a sweep. What a job does is in moe_lab/stages/pipeline.py.

`python run.py --help` teaches the options.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

from moe_lab import launching, processes, stopping

if __name__ == "__main__":
    launching.start_missing()
    stopping.install()  # before what takes long to import
    if not processes.speaks():
        processes.hush()

try:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from omegaconf import DictConfig, OmegaConf

    from moe_lab.runs import composing, option_help, options, refusals, sweep, worker
except stopping.Stopped as stop:
    sys.exit(stopping.exit_code(stop))

ONLY_TOLD = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"}  # no job runs
exit_codes: list[int] = []
composing.share_schemas()
OmegaConf.register_new_resolver("chosen_options", option_help.chosen_options, replace=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="run")
def main(config: DictConfig) -> worker.Objectives | None:
    """One job: the pipeline, then its report, whatever happened; what a sweeper optimises of it."""
    with worker.stopped_alone() as offered:
        offered.objectives = _job(config)
    return offered.objectives


def _job(config: DictConfig) -> worker.Objectives | None:
    # Imported here, so that --help and a misspelt option answer at once; held, because what a
    # signal leaves half imported fails in many ways.
    with stopping.hold():
        from moe_lab.runs import job, rehearsal

        options.check_whole(list(map(str, config)), HydraConfig.get().runtime.choices)
        description = sweep.description_of(config)
        raw: Any = OmegaConf.to_container(config)
        # Made before the job, which checks the others.
        options.check_group("track", description.config, raw)
        tracker = instantiate(config.track)
    stopping.check()

    def work(report: dict[str, Any]) -> None:
        with stopping.hold():
            options.check_request(description.config, raw, description.choices)
            from moe_lab.stages import pipeline
            from moe_lab.stages.parts import Parts
        stopping.check()

        parts = Parts.made(config, functools.partial(instantiate, _convert_="object"))
        with job.workplace(description.folder) as folder:
            pipeline.pipeline(description.config, parts, report, folder, tracker.log_curve)

    def foresee() -> dict[str, Any]:
        with stopping.hold():
            options.check_request(description.config, raw, description.choices)
            from moe_lab.stages import dry_run
            from moe_lab.stages.parts import Parts
        stopping.check()
        parts = Parts.made(config, functools.partial(instantiate, _convert_="object"))
        return dry_run.dry_run(description.config, parts).figures

    if config.dry_run:
        if processes.is_main():
            with processes.alone():
                exit_codes.append(rehearsal.rehearse(description, foresee))
        return None
    code = job.run(description, tracker, work)
    exit_codes.append(code)
    return worker.objectives(description.config, description.folder, code)


def run_all() -> int:
    """The job, or all of a sweep, and how it ended: the exit code."""
    try:
        refusals.check_words(sys.argv)
        try:
            main()
        except Exception as error:
            if not (sweep.Sweep.started and sweep.Sweep.started.tell_of_lost(error)):
                raise
            exit_codes.append(1)
        stopping.check()
        if sweep.Sweep.started:
            exit_codes.append(sweep.Sweep.started.end())
        sys.stdout.flush()
    except BrokenPipeError:
        if not ONLY_TOLD & set(sys.argv):
            raise
        sys.stdout = None  # who reads has seen enough, as of `--help | head`
    except KeyboardInterrupt as stop:
        print(f"stopped by {stopping.name_of(stop)}; finished stages are kept", file=sys.stderr)
        print(sweep.how_to_go_on(), file=sys.stderr)
        return stopping.exit_code(stop)
    except Exception as error:
        message = refusals.refusal(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return refusals.USER_MISTAKE
    return max(exit_codes, default=0)


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's refusals reach us, to be told without traceback
    os.environ["MOE_LAB_ROOT"] = str(Path(__file__).resolve().parent)  # of experiments/
    if not processes.speaks():
        sys.argv.append("hydra.output_subdir=null")
    try:
        code = run_all()
    finally:
        processes.leave()
    sys.exit(code)
