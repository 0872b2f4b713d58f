"""Tasks of lm-eval, and ours in its form: which exist, which datasets they read, from where.

A mirror is a folder with copies of datasets of the hub as <owner>/<name>, each in the hub's own
layout: README.md with its `configs`, and the data files that it names.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_lab.integrity import sha256_of
from moe_lab.types import UserError

SST5 = Path(__file__).parent / "sst5"
HARNESS_NAMES = tuple(sorted(path.stem for path in SST5.glob("*.yaml")))
# Not datasets but ways to read files; a task that names one says which files.
READERS = ("arrow", "csv", "json", "parquet", "text")
HINT = (
    "without a network, give a folder that holds a copy in the hub's layout as "
    "<folder>/<owner>/<name>: eval.mirror=<folder>"
)


def unknown(names: Sequence[str]) -> list[str]:
    """Those of `names` that are no task, group or tag of lm-eval's, nor one of ours."""
    index = _manager(names).task_index
    return [name for name in names if name not in index]


def check_data(names: Sequence[str], mirror: str | None) -> None:
    """Refuse tasks whose datasets cannot be had; of each dataset one configuration is looked at."""
    if mirror is not None and not Path(mirror).expanduser().is_dir():
        raise UserError(
            f"eval.mirror={mirror} is no folder; it must hold copies of datasets of the hub as "
            "<owner>/<name>"
        )
    if not names:
        return
    configs = _datasets(names)
    if mirror is not None:
        root = Path(mirror).expanduser()
        if missing := [name for name in configs if not (root / name).is_dir()]:
            raise UserError(
                f"eval.mirror={mirror} has no {', '.join(missing)}, which the tasks "
                f"{', '.join(names)} read: copy each dataset's files of the hub to "
                f"<mirror>/<owner>/<name>, e.g. {root / missing[0]}"
            )
    import datasets

    with data_from(names, mirror):
        for path, config in configs.items():
            kwargs = dict(config.get("dataset_kwargs") or {})
            kwargs.pop("trust_remote_code", None)
            with _refusing(path):
                datasets.load_dataset_builder(path, config.get("dataset_name"), **kwargs)


def load_tasks(names: Sequence[str]) -> list[Any]:
    """The tasks and groups with their data, as lm-eval evaluates them; UserError without data."""
    manager = _manager(names)
    made: list[Any] = []
    for name in names:
        with _refusing(f"of the task {name}"):
            loaded = manager.load(name)
        made += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return made


def manager_of(names: Sequence[str]) -> Any:
    """The task manager that knows these names."""
    return _manager(names)


def fingerprint(names: Sequence[str], mirror: str) -> str:
    """12 hex over the names and contents of all files of the datasets that the tasks read."""
    root, digest = Path(mirror).expanduser(), hashlib.sha256()
    for dataset in sorted(_datasets(names)):
        for path in sorted((root / dataset).rglob("*")):
            inside = path.relative_to(root)
            if path.is_file() and not any(part.startswith(".") for part in inside.parts):
                digest.update(f"{inside.as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def data_from(names: Sequence[str], mirror: str | None) -> Iterator[None]:
    """While open, the datasets of these tasks are read from the mirror, and nothing from the hub.

    `datasets` takes a folder of the very name that it was asked for, below the working folder,
    before the hub. Its cache knows such a folder by its name alone and would give old rows for new
    files, so each content of a mirror has a cache of its own. Without a mirror nothing changes.
    """
    if mirror is None:
        yield
        return
    import datasets

    caches = Path(datasets.config.HF_DATASETS_CACHE).absolute()
    cache = caches / f"mirror_{fingerprint(names, mirror)}"
    with offline(), contextlib.chdir(Path(mirror).expanduser()):
        before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, cache
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """While open, neither `datasets` nor the hub's client tries the network."""
    import datasets
    import huggingface_hub

    # What they read at each call.
    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # datasets raises many kinds; each means: not to be had
        raise UserError(f"the data {what} could not be loaded: {error}; {HINT}") from error


def _manager(names: Sequence[str]) -> Any:
    return _managers(not set(names) <= set(HARNESS_NAMES))


@functools.cache
def _managers(defaults: bool) -> Any:
    """Reading the names of all of lm-eval's tasks takes seconds, so it is done once and at need."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(SST5), include_defaults=defaults)


def _datasets(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The datasets of the hub that tasks read, each with the first configuration that reads it."""
    index = _manager(names).task_index
    configs: dict[str, dict[str, Any]] = {}
    for config in (config for name in names for config in _configs(name, index)):
        path = config.get("dataset_path")
        if path and path not in READERS and not config.get("custom_dataset"):
            configs.setdefault(path, config)
    return configs


def _configs(given: str | dict[str, Any], index: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configurations of all single tasks behind a task, a group or a tag."""
    if isinstance(given, str) and index[given].cfg is None:  # a tag
        for name in sorted(index[given].tags):
            yield from _configs(name, index)
        return
    config = index[given].cfg if isinstance(given, str) else given
    if isinstance(config.get("task"), list):  # a group
        for member in config["task"]:
            yield from _configs(member, index)
    elif isinstance(given, dict) and (base := given.get("group") or given.get("task")) in index:
        for single in _configs(base, index):
            yield {**single, **given}
    else:
        yield config
