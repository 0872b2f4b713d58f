"""Look at runs, run them again, and look after their store: `python -m moe_lab.runs FOLDER`.

A line for each job below the folder; then, by kind, what the store holds and how much of it these
jobs use. Nothing is changed without --rerun or --yes; --reproduce adds a folder to each run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_lab import stopping
from moe_lab.report.report import OK
from moe_lab.runs import cleaning, listing, reproducing, rerun, verifying
from moe_lab.runs.cleaning import CHECKPOINTS, SEARCH, UNUSED, Contents, Result
from moe_lab.runs.listing import many, size, took
from moe_lab.runs.status import FAILED, KILLED, NOT_STARTED, RUNNING, STATUSES, Job, find_jobs
from moe_lab.types import UserError

CTRL_C = 130  # run.py's exit code after it, which a terminal gives to both processes
RUNS = Path("outputs", "runs")  # where run.py puts them
AFTER = {
    UNUSED: "runs outside this folder may share the store: what only they use counts as unused",
    CHECKPOINTS: "evaluations, profiles and plans stay; <variant>/checkpoint of the reports leads "
    "nowhere until a run makes the weights again, and runs outside this folder may use them too",
    SEARCH: "plans stay; new ones that ask the same, here or outside this folder, search again",
}


def main(given: Sequence[str] | None = None) -> int:
    """The command; 2 where what was asked for is not there or not possible."""
    asked = _arguments(given)
    try:
        jobs = find_jobs(asked.folder)
        if asked.rerun:
            return _rerun(asked.folder, jobs)
        roots = [asked.store] if asked.store else cleaning.stores(jobs)
        if asked.reproduce:
            return _reproduce(asked.folder, jobs, roots)
        stores = [cleaning.contents(root) for root in roots]
        if asked.verify:
            return _verify(asked, stores)
        if asked.clean:
            _clean(asked, stores, jobs)
        else:
            _list(asked, stores, jobs)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _list(asked: argparse.Namespace, stores: list[Contents], jobs: list[Job]) -> None:
    lines = listing.describe(jobs, asked.folder)
    lines = [line for line in lines if not asked.status or line["status"] in asked.status]
    about: list[dict[str, Any]] = [
        {
            "root": held.root,
            "kinds": cleaning.by_kind(held, jobs),
            "others": held.others,
            "free": cleaning.would_free(held, jobs),
        }
        for held in stores
    ]
    if asked.json:
        summary = listing.totals(jobs)
        _print_json({"jobs": lines, "summary": summary, "stores": about})
        return
    listing.show_jobs(lines)
    print(f"\n{listing.summed_up(jobs)}")
    for remark in _remarks(asked.folder, jobs):
        print(remark)
    for one in about:
        listing.show_store(**one)
    if not about:
        print("\nno store of these runs is there: name its folder with --store")


def _remarks(folder: Path, jobs: list[Job]) -> Iterator[str]:
    """What cannot be known, and how to run the rest."""
    blind = {job.sweep.folder for job in jobs if job.sweep and job.sweep.overrides is None}
    alone = {job.folder.parent for job in jobs if not job.sweep}
    blind |= {home for home in alone if (home / rerun.OLD_SWEEP).is_file()}
    for home in sorted(blind):
        yield f"{_short(home, folder)}: which of its jobs never started is not known"
    homes = [job.sweep.folder if job.sweep else job.folder for job in jobs]
    busy = {home for home, job in zip(homes, jobs, strict=True) if job.status == RUNNING}
    ended = (job for home, job in zip(homes, jobs, strict=True) if home not in busy)
    if left := sum(job.status in (FAILED, KILLED, NOT_STARTED) for job in ended):
        yield f"to run {many(left, 'job')} again: {_command(folder, '--rerun')}"


def _clean(asked: argparse.Namespace, stores: list[Contents], jobs: list[Job]) -> None:
    if not stores:
        raise UserError("no store of these runs is there: name its folder with --store")
    for held in stores:  # all are refused before any is touched
        cleaning.check_cleaning(held, jobs, asked.clean)
    said = []
    for held in stores:
        chosen = cleaning.chosen_results(held, jobs, asked.clean)
        if not asked.json:
            _show_chosen(asked, held, chosen, jobs)
        removed = {one for one in chosen if asked.yes and cleaning.remove(one)}
        if asked.yes and asked.clean == UNUSED:
            cleaning.remove_orphans(held.orphans)
        said.append({"root": held.root, "what": asked.clean, "results": [
            {"result": f"{one.kind}/{one.key}", "why": why, "bytes": one.bytes,
             "seconds": one.seconds, "removed": one in removed} for one, why in chosen.items()
        ]})  # fmt: skip
        if asked.yes and not asked.json:
            left = len(chosen) - len(removed)
            kept = f"; {left} left: in use now, or changed meanwhile" if left else ""
            freed = size(sum(one.bytes for one in removed))
            print(f"removed {many(len(removed), 'result')}: {freed} freed{kept}")
    if asked.json:
        _print_json(said)


def _show_chosen(
    asked: argparse.Namespace, held: Contents, chosen: dict[Result, str], jobs: list[Job]
) -> None:
    total, again = sum(one.bytes for one in chosen), sum(one.seconds or 0 for one in chosen)
    verb = "removing" if asked.yes else "would remove"
    print(f"{verb} {many(len(chosen), 'result')} of the {len(held.results)} in {held.root}: "
          f"{size(total)}, making them again takes about {took(again)}")  # fmt: skip
    rows = [
        [f"{one.kind}/{one.key}", why, size(one.bytes), took(one.seconds)]
        for one, why in chosen.items()
    ]
    for line in listing.aligned(rows):
        print(f"  {line}")
    for remark in _warnings(asked.clean, held, chosen, jobs):
        print(remark)
    if chosen and not asked.yes:
        store = ["--store", str(asked.store)] if asked.store else []
        command = _command(asked.folder, "--clean", asked.clean, "--yes", *store)
        print(f"nothing was removed; to remove these: {command}")


def _warnings(
    what: str, held: Contents, chosen: dict[Result, str], jobs: list[Job]
) -> Iterator[str]:
    """What to know before removing."""
    if what == UNUSED and (young := cleaning.recent(held, jobs)):
        yield (
            f"{many(young, 'unused result')} of the last {cleaning.RECENT / 60:.0f} minutes left "
            "out: a job outside this folder may be about to use what it just made"
        )
    if not chosen:
        return
    tuned = [one.seconds for one in chosen if one.kind == "finetune" and one.seconds is not None]
    if what == CHECKPOINTS and tuned:
        training = took(sum(tuned))
        are = "is" if len(tuned) == 1 else "are"
        yield f"{len(tuned)} of these {are} fine-tuned weights: {training} of training"
    left = sum(job.status != OK for job in jobs)
    if left and (what != UNUSED or any(one.seconds is None for one in chosen)):
        yield (
            f"{many(left, 'job')} here did not finish and could go on from some of these: run them "
            "again first (--rerun)"
        )
    yield AFTER[what]


def _rerun(folder: Path, jobs: list[Job]) -> int:
    made = rerun.commands(folder, jobs)
    if not made:
        print(f"nothing to run again: {listing.summed_up(jobs)}")
    codes = [0]
    for one in made:
        names = ", ".join(f"{job.folder.name} ({job.status})" for job in one.jobs)
        print(f"{_short(one.folder, folder)}: running again {names}")
        if told := one.jobs[0].sweep and rerun.other_program(one.jobs[0].sweep):
            print(told)
        print(shlex.join(one.words), flush=True)
        codes.append(one.run())
        if codes[-1] == CTRL_C or stopping.asked():
            break
    return max(codes)


def _reproduce(folder: Path, jobs: list[Job], roots: list[Path]) -> int:
    """1 where a job was not the same again."""
    same = True
    for one in reproducing.reproduce(jobs, roots):
        print("\n".join(one.told(folder)), flush=True)
        same = same and one.same
    return int(not same)


def _verify(asked: argparse.Namespace, stores: list[Contents]) -> int:
    """1 where something is damaged."""
    if not stores:
        raise UserError("no store of these runs is there: name its folder with --store")
    total = 0
    for held in stores:
        found = verifying.damaged(held)
        total += len(found)
        print("\n".join(verifying.lines_of(held, found)))
        for place in verifying.set_all_aside(found) if asked.yes else ():
            print(f"set aside: {place}")
    if total and not asked.yes:
        command = _command(asked.folder, "--verify", "--yes")
        print(f"to set these aside, so that runs make them again: {command}")
    return int(total > 0)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _short(place: Path, folder: Path) -> str:
    root = folder.resolve()
    inside = place != root and place.is_relative_to(root)
    return place.relative_to(root).as_posix() if inside else str(folder)


def _command(folder: Path, *words: str) -> str:
    return shlex.join(["python", "-m", "moe_lab.runs", str(folder), *words])


def _statuses(text: str) -> list[str]:
    given = [status for status in text.split(",") if status]
    if wrong := [status for status in given if status not in STATUSES]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(STATUSES)}")
    return given


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.runs",
        description="Which jobs are below a folder and how far each came; what their store holds.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=RUNS,
                        help=f"a sweep, a run, or a folder of them; default: {RUNS}")  # fmt: skip
    parser.add_argument("--status", type=_statuses, default=[], metavar="STATUS,STATUS",
                        help=f"list only these: {', '.join(STATUSES)}")  # fmt: skip
    deed = parser.add_mutually_exclusive_group()
    deed.add_argument("--rerun", action="store_true",
                      help="run failed, killed and missing jobs again")  # fmt: skip
    deed.add_argument("--clean", nargs="?", const=UNUSED, choices=cleaning.CHOICES,
                      help="show what would be removed from the store: what no run below the "
                      "folder uses (unused, the default), the weights that these runs made "
                      "(checkpoints), or the steps of their searches (search)")  # fmt: skip
    deed.add_argument("--verify", action="store_true",
                      help="compare every byte of the store with what was written")  # fmt: skip
    deed.add_argument("--reproduce", action="store_true",
                      help="make each finished run again from its own record, and compare its "
                      "figures and files")  # fmt: skip
    parser.add_argument("--yes", action="store_true",
                        help="with --clean: remove it; with --verify: set aside what is damaged, "
                        "so that it is made again")  # fmt: skip
    parser.add_argument("--store", type=Path, help="the store; default: the one the runs used")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    asked = parser.parse_args(given)
    if asked.yes and not (asked.clean or asked.verify):
        parser.error("--yes goes with --clean or --verify, which alone say what would be done")
    deeds = {"rerun": asked.rerun, "clean": asked.clean, "verify": asked.verify,
             "reproduce": asked.reproduce}  # fmt: skip
    chosen = next((name for name, given in deeds.items() if given), None)
    if asked.status and chosen:
        parser.error(f"--status chooses what is listed, and does not go with --{chosen}")
    if asked.json and chosen not in (None, "clean"):
        parser.error(f"--{chosen} prints lines, and does not go with --json")
    return asked


if __name__ == "__main__":
    sys.exit(main())
