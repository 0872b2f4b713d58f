"""Options composed by Hydra, without doing again what it has done. What comes of it is the same.

Hydra copies its store of schemas with all that it holds whenever it looks into a config group, a
hundred times for --help. It composes each job of a sweep twice, to check it and to start it, and
reads every file of conf/ each time. Here the store is no one's own, a job of a sweep is composed
once, and a file is read once.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf


def share_schemas() -> None:
    """Have copies of what reads configs share the store of schemas, which gives copies itself."""
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


class FilesOnce(FileConfigSource):
    """Hydra's reading of files, each once while it is the same file."""

    def load_config(self, config_path: str) -> ConfigResult:
        """What a file says; the caller's own, who changes it."""
        path = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
        try:
            told = os.stat(path)
        except OSError:  # which Hydra explains
            return super().load_config(config_path)
        seen = (self.provider, self.path, path, told.st_size, told.st_mtime_ns, told.st_ctime_ns)
        if seen not in _files:
            _files[seen] = pickle.dumps(super().load_config(config_path))
        result: ConfigResult = pickle.loads(_files[seen])
        return result


_files: dict[tuple[object, ...], bytes] = {}


def compose_once(loader: ConfigLoader) -> None:
    """Have what a sweep's jobs are checked by be there when each starts; files are read once."""
    SourcesRegistry.instance().types[FilesOnce.scheme()] = FilesOnce
    compose, composed = loader.load_sweep_config, dict[tuple[str, ...], bytes]()

    def load(master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        known = composed.pop(tuple(sweep_overrides), None)
        if known is None:
            config: DictConfig = compose(master_config, list(sweep_overrides))
            composed[tuple(sweep_overrides)] = pickle.dumps(config)
            return config
        again: DictConfig = pickle.loads(known)
        OmegaConf.copy_cache(from_config=master_config, to_config=again)
        return again

    loader.load_sweep_config = load  # type: ignore[method-assign]
