"""Weights & Biases, the only file that imports it: a run per job, which never fails the job.

Each call to W&B goes through one guard: where W&B is missing, unreachable or broken, a warning
says why and the run goes on without it.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from moe_lab.option import Option, check_options
from moe_lab.track.switches import mode_of
from moe_lab.track.tracker import (
    Guard,
    Points,
    TrackedArtifact,
    Tracker,
    figures,
    flat,
    short,
    stable_hash,
)

CONNECT_SECONDS = 20.0  # how long a run waits for the server before it goes on offline
START_SECONDS = 120.0  # how long W&B's own process may take to start on a busy machine
UPLOAD_SECONDS = 120.0  # how long a finished run waits for its uploads
STALL_SECONDS = 10.0  # a call that fails after so long was waiting for the server
NAME_LENGTH, TAG_LENGTH = 128, 64  # W&B's limits in characters
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt")


class WandbTracker(Tracker):
    """One W&B run at a time, as `Tracker` says.

    Online it falls back to offline without an API key or a server; offline it writes files under
    the run's folder and needs no network, for `wandb sync` later.

    A run with an identity has a stable id and W&B's resume="allow". Online, a restarted job goes
    on with the run that the server has. Offline, each start writes another folder
    wandb/offline-run-<time>-<id> of the same run: its file says that it resumes, its steps go on
    behind those logged before, and `wandb sync` uploads the folders of one run one after the
    other, by start time. What was logged is remembered in wandb/points-<id>.jsonl.
    """

    def __init__(
        self,
        mode: Annotated[
            str, Option("how a run is tracked", among=("online", "offline", "off"))
        ] = "offline",
        project: Annotated[str, Option("W&B's project")] = "moe_lab",
        entity: Annotated[str | None, Option("W&B's user or team, null for your own")] = None,
        upload_checkpoints: Annotated[
            bool, Option("upload checkpoints' weights, and not only say where they lie")
        ] = False,
    ) -> None:
        self.mode = mode
        self.project = project
        self.entity = entity
        self.upload_checkpoints = upload_checkpoints
        check_options(self, "track")
        self._guard = Guard("Weights & Biases", "")
        self._points = Points(None)
        self._run: Any = None
        self._url: str | None = None
        self._stalled = False
        self._environment: list[str] = []

    @property
    def url(self) -> str | None:
        return self._url

    def start(
        self,
        folder: Path,
        config: Mapping[str, Any],
        group: str,
        name: str,
        tags: Sequence[str],
        identity: str | None = None,
        job_type: str = "job",
    ) -> None:
        mode = mode_of(self.mode, os.environ)
        if mode == "off":
            return
        self._keep_files_under(folder / "wandb", mode)
        run_id = stable_hash(identity) if identity else None
        what = dict(
            dir=folder,
            config=flat(config),
            group=short(group, NAME_LENGTH),
            name=short(name, NAME_LENGTH),
            tags=list(dict.fromkeys(short(tag, TAG_LENGTH) for tag in tags if tag)),
            job_type=job_type,
            id=run_id,
            resume="allow" if run_id else None,
        )
        points = folder / "wandb" / f"points-{run_id}.jsonl" if run_id else None
        if mode == "online" and not self._connect(lambda: self._open("online", what, points)):
            mode = "offline"
        if mode == "offline" and not self._guard(
            "opening a run", lambda: self._open("offline", what, points)
        ):
            self._restore_environment()

    def log_curve(self, row: Mapping[str, Any]) -> None:
        named = {f"finetune/{row['phase']}/{key}": value for key, value in figures(row).items()}
        if not named or self._points.has(row):
            return
        where = {f"finetune/{key}": row[key] for key in ("step", "tokens") if key in row}
        self._in_run("logging a curve", lambda: self._log(where | named, row))

    def summary(self, report: Mapping[str, Any]) -> None:
        self._in_run("writing the summary", lambda: self._run.summary.update(dict(report)))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        def attach() -> None:
            import wandb

            data: list[Iterable[object]] = [
                [None if _is_nan(value) else value for value in row] for row in rows
            ]
            mixed = any(_is_mixed(column) for column in zip(*data, strict=True))
            made = wandb.Table(columns=list(columns), data=data, allow_mixed_types=mixed)
            self._log({name: made})

        self._in_run(f"attaching the table {name}", attach)

    def images(self, paths: Iterable[Path]) -> None:
        def attach(path: Path) -> None:
            import wandb

            self._log({f"plots/{path.stem}": wandb.Image(str(path))})

        for path in paths:
            self._in_run(f"attaching {path}", functools.partial(attach, path))

    def html(self, name: str, path: Path) -> None:
        def attach() -> None:
            import wandb

            self._log({name: wandb.Html(str(path), inject=False)})

        self._in_run(f"attaching {path}", attach)

    def artifact(self, path: Path, name: str, type: str) -> None:
        self.artifacts([TrackedArtifact(name, type, (path,))])

    def artifacts(self, items: Iterable[TrackedArtifact]) -> None:
        """Attach what the run used and made, in the order it was made.

        W&B draws a run between what it used and what it made. A run that made all of them shows
        model → run → profile, plan, checkpoint; the next job, which found the profile, shows
        model, profile → run → plan, checkpoint. The direct links are in each one's metadata, as
        made_from.
        """
        for item in items:
            self._in_run(f"attaching {item.name}", functools.partial(self._attach, item))

    def finish(self, exit_code: int) -> None:
        self._stalled = False
        self._in_run("closing the run", lambda: self._run.finish(exit_code=exit_code))
        self._run, self._url, self._points = None, None, Points(None)
        self._restore_environment()

    def _connect(self, open_run: Callable[[], None]) -> bool:
        return self._guard("looking for an API key", _find_api_key, "offline") and self._guard(
            "connecting", open_run, "offline"
        )

    def _open(
        self, mode: Literal["online", "offline"], what: dict[str, Any], points: Path | None
    ) -> None:
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))
        opened = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,
            reinit="create_new",
            settings=_settings(CONNECT_SECONDS if mode == "online" else START_SECONDS),
            **what,
        )
        self._url = opened.url if mode == "online" else None
        self._points = Points(points)
        if mode == "online" and not opened.resumed:
            self._points.forget()  # the server has none of them
        for axis in ("step", "tokens"):
            opened.define_metric(f"finetune/{axis}", hidden=True)
        opened.define_metric("finetune/*", step_metric="finetune/step")
        self._run = opened

    def _log(self, values: dict[str, Any], row: Mapping[str, Any] | None = None) -> None:
        step = max(self._run.step, self._points.next_step)
        self._run.log(values, step=step, commit=True)
        self._points.add(row or {}, step)

    def _attach(self, item: TrackedArtifact) -> None:
        import wandb

        made = wandb.Artifact(_artifact_name(item.name), type=item.type, metadata=item.about())
        for path in item.files:
            _add(made, path)
        if item.place and item.type == "checkpoint" and self.upload_checkpoints:
            _add(made, Path(item.place))
        elif address := item.address():
            made.add_reference(address, name="place", checksum=False)
        if item.found:
            # What W&B's use_artifact does online, which offline refuses to work: `wandb sync`
            # and the server take it from here. It also spares the wait for the upload.
            self._run._log_artifact(made, is_user_created=True, use_after_commit=True)
        else:
            self._run.log_artifact(made)

    def _in_run(self, doing: str, act: Callable[[], None]) -> None:
        if self._run is None or self._stalled:
            return
        started = time.monotonic()
        if not self._guard(doing, act) and time.monotonic() - started > STALL_SECONDS:
            self._stalled = True  # the server went away: do not wait for it at each call

    def _keep_files_under(self, folder: Path, mode: str) -> None:
        """Point what W&B would put into the home folder here, where the user did not say where."""
        wanted = {"WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_DATA_DIR": str(folder / "data")}
        if mode == "offline":
            wanted["WANDB_ERROR_REPORTING"] = "false"  # W&B's own crash reports use the network
        for name, value in wanted.items():
            if name not in os.environ:
                self._environment.append(name)
                os.environ[name] = value

    def _restore_environment(self) -> None:
        for name in self._environment:
            os.environ.pop(name, None)
        self._environment.clear()


def _artifact_name(name: str) -> str:
    """A name of W&B's characters and length."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", short(name, NAME_LENGTH))


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _is_mixed(column: Iterable[object]) -> bool:
    """Whether W&B, which takes one kind of value per column, must be told to expect several."""
    kinds = {type(value) for value in column if value is not None}
    return len(kinds) > 1 and not kinds <= {int, float}


def _add(artifact: Any, path: Path) -> None:
    """Add a file, or all files of a folder by their names there.

    Each is copied, because others may rewrite it before `wandb sync`; weights are too large.
    """
    files = {path.name: path}
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file())
        files = {file.relative_to(path).as_posix(): file for file in below}
    for name, file in files.items():
        policy = "immutable" if file.suffix in WEIGHT_ENDINGS else "mutable"
        artifact.add_file(str(file), name=name, policy=policy)


def _settings(patience: float) -> Any:
    """W&B without its console chatter, prompts, or capture of our output."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        init_timeout=patience,
        finish_timeout=UPLOAD_SECONDS,
    )


def _find_api_key() -> None:
    """Raise where W&B has no API key; without this it would ask for one at the terminal."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        raise RuntimeError("no API key: run `wandb login`, set WANDB_API_KEY, or say track=offline")
