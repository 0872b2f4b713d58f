"""Options composed with less work: the same as Hydra's own, and anew where a file has changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from running import ROOT

from moe_lab.runs import composing

JOBS = (["metric=reap", "ratio.ratio=0.5", "method=prune"], ["method=merge", "seed=3"])


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Hydra's loader, by which files are read as it reads them."""
    Plugins.instance()  # which registers its own reading of files
    monkeypatch.setitem(SourcesRegistry.instance().types, "file", FileConfigSource)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def told(config: Any) -> tuple[str, bool | None, Any]:
    return OmegaConf.to_yaml(config), OmegaConf.is_struct(config), OmegaConf.get_cache(config)


def test_jobs_are_composed_as_by_hydra_and_once(loader: Any) -> None:
    master = compose("run", ["track=off"], return_hydra_config=True)
    theirs = [told(loader.load_sweep_config(master, job)) for job in JOBS]
    calls, own = [], loader.load_sweep_config

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return own(*arguments)

    loader.load_sweep_config = counted
    composing.compose_once(loader)
    checked = [loader.load_sweep_config(master, job) for job in JOBS]
    checked[0].seed = 9  # what is made of one is nobody else's
    started = [loader.load_sweep_config(master, job) for job in JOBS]
    assert [told(one) for one in started] == theirs and len(calls) == len(JOBS)
    started[0].ratio.ratio = 0.75
    assert loader.load_sweep_config(master, JOBS[0]).ratio.ratio == 0.5 and len(calls) == 3
    _ = master.run_dir  # a time, which its jobs have from now on
    assert loader.load_sweep_config(master, JOBS[0]).run_dir == master.run_dir


def test_a_file_is_read_again_where_it_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "one.yaml"
    file.write_text("# @package _global_\nnumber: 1\n")
    source = composing.FilesOnce("main", str(tmp_path))
    first = source.load_config("one")
    first.config.number = 7
    assert source.load_config("one").config.number == 1
    assert source.load_config("one").header == first.header
    file.write_text("# @package _global_\nnumber: 22\n")
    assert source.load_config("one").config.number == 22
    with pytest.raises(Exception, match="Config not found"):
        source.load_config("another")


def test_the_store_of_schemas_is_shared_and_gives_copies() -> None:
    composing.share_schemas()
    store = ConfigStore.instance()
    assert copy.deepcopy([store])[0] is store
    loaded = store.load("hydra/config.yaml")
    loaded.node.mode = "RUN"
    assert store.load("hydra/config.yaml").node.mode != loaded.node.mode
