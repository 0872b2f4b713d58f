"""Weights & Biases, the only file that imports it: a run per job, which never fails the job.

Each call to W&B goes through one guard: where W&B is missing, unreachable or broken, a warning
says why and the run goes on without it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_lab.types import UserError

logger = logging.getLogger(__name__)

MODES = ("online", "offline", "off")
CONNECT_SECONDS = 20.0  # how long a run waits for the server before it goes on offline
UPLOAD_SECONDS = 120.0  # how long a finished run waits for its uploads


class Tracker:
    """One W&B run at a time: start, log, summary, artifacts and tables, finish.

    mode: "online" (falls back to offline without an API key or a server), "offline" (files under
    the run's folder and no network, for `wandb sync` later) or "off". A tracker may be started
    again after `finish`, as in a sweep of several jobs in one process.
    """

    def __init__(
        self, mode: str = "offline", project: str = "moe_lab", entity: str | None = None
    ) -> None:
        if mode not in MODES:
            raise UserError(f"track mode {mode!r} is unknown; track={'|'.join(MODES)}")
        self.mode = mode
        self.project = project
        self.entity = entity
        self._run: Any = None
        self._url: str | None = None
        self._environment: list[str] = []

    @property
    def url(self) -> str | None:
        """Where the run can be seen; None unless it is online."""
        return self._url

    def start(
        self, folder: Path, config: Mapping[str, Any], group: str, name: str, tags: list[str]
    ) -> None:
        """Open a run whose files lie under `folder`/wandb; config is plain (nested) data."""
        if self.mode == "off":
            return
        self._keep_files_under(folder / "wandb")

        def open_run(mode: str) -> None:
            import wandb

            wandb.setup(settings=wandb.Settings(silent=True))
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                dir=folder,
                config=dict(config),
                group=group,
                name=name,
                tags=tags,
                mode=mode,
                reinit="create_new",
                settings=_settings(),
            )
            self._url = self._run.url if mode == "online" else None

        mode = self.mode
        if mode == "online" and not self._guarded("looking for an API key", _find_api_key):
            mode = "offline"
        if mode == "online" and not self._guarded("connecting", lambda: open_run("online")):
            mode = "offline"
        if mode == "offline" and not self._guarded("opening a run", lambda: open_run("offline")):
            self._restore_environment()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to curves; steps of one run must not decrease."""
        self._in_run("logging values", lambda: self._run.log(dict(values), step=step))

    def summary(self, report: Mapping[str, Any]) -> None:
        """Make the report, key by key, the run's summary."""
        self._in_run("writing the summary", lambda: self._run.summary.update(dict(report)))

    def artifact(self, path: Path, name: str, type: str) -> None:
        """Attach a file or a folder; characters that W&B forbids in names become dashes."""

        def attach() -> None:
            import wandb

            item = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type=type)
            if path.is_dir():
                item.add_dir(str(path), policy="immutable")
            else:
                item.add_file(str(path), policy="immutable")
            self._run.log_artifact(item)

        self._in_run(f"attaching {path}", attach)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Attach a table."""

        def attach() -> None:
            import wandb

            data = [list(row) for row in rows]
            self._run.log({name: wandb.Table(columns=list(columns), data=data)})

        self._in_run(f"attaching the table {name}", attach)

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 marks it finished, anything else failed."""
        self._in_run("closing the run", lambda: self._run.finish(exit_code=exit_code))
        self._run = self._url = None
        self._restore_environment()

    def _in_run(self, doing: str, act: Callable[[], None]) -> None:
        if self._run is not None and not self._guarded(doing, act):
            self._run = None

    def _guarded(self, doing: str, act: Callable[[], None]) -> bool:
        """Whether `act` went well; if not, the log says why and what follows."""
        try:
            act()
        except ImportError as error:
            logger.warning("no tracking: Weights & Biases cannot be imported (%s)", error)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises must not fail the run
            online = self._run is None and self.mode == "online"
            logger.warning(
                "Weights & Biases failed at %s: %s: %s. The run goes on %s.",
                doing,
                type(error).__name__,
                error,
                "offline" if online else "without it",
            )
        else:
            return True
        return False

    def _keep_files_under(self, folder: Path) -> None:
        """Point what W&B would put into the home folder here, where the user did not say where."""
        wanted = {"WANDB_CACHE_DIR": folder / "cache", "WANDB_DATA_DIR": folder / "data"}
        if self.mode == "offline":
            wanted["WANDB_ERROR_REPORTING"] = "false"  # W&B's own crash reports use the network
        for name, value in wanted.items():
            if name not in os.environ:
                self._environment.append(name)
                os.environ[name] = str(value)

    def _restore_environment(self) -> None:
        for name in self._environment:
            os.environ.pop(name, None)
        self._environment.clear()


def _settings() -> Any:
    """W&B without its console chatter, prompts, or capture of our output."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        init_timeout=CONNECT_SECONDS,
        finish_timeout=UPLOAD_SECONDS,
    )


def _find_api_key() -> None:
    """Raise where W&B has no API key; without this it would ask for one at the terminal."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        raise RuntimeError("no API key: run `wandb login`, set WANDB_API_KEY, or say track=offline")
