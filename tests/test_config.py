"""conf/: every file composes, what it names exists, and it mirrors moe_lab/."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from running import ROOT, rooms

from moe_lab.models import checkpoint
from moe_lab.runs import options, refusals

CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
OPTIONS = [
    (str(path.parent), path.stem) for path in FILES if path.parent.name and path.parts[0] != "hydra"
]
LAUNCHERS = [path.stem for path in FILES if path.parent == Path("hydra/launcher")]
NONE_MADE = ("finetune", "quantize", "eval", "measure", "diagnose", "trace")  # what none leaves out
GROUPS = sorted({group for group, _ in OPTIONS})
# Folders of conf/ of which each file names a file of code; "none" needs no code there.
MIRRORED = {
    "metric": "methods.metrics",
    "ratio": "methods.ratios",
    "grouping": "methods.grouping",
    "decoding": "evaluate.decoding",
    "form": "methods.factorizing",
    "method": "methods",
    "finetune": "finetune",
}
KEYWORDS = {"all_layers": "global"}  # no module can be named by Python's own words
EACH_OPTION = pytest.mark.parametrize(
    ("group", "option"), OPTIONS, ids=["=".join(one) for one in OPTIONS]
)
Compose = Callable[..., DictConfig]


def overrides(group: str, option: str) -> list[str]:
    given = ["model.path=some/folder"] if (group, option) == ("model", "checkpoint") else []
    return [f"{group}={option}", *given]


def targets(node: Any) -> list[DictConfig]:
    """All nodes with a `_target_` that stand in no other such node."""
    if isinstance(node, DictConfig) and "_target_" in node:
        return [node]
    if isinstance(node, DictConfig):
        return [found for key in node for found in targets(node[key])]
    if isinstance(node, ListConfig):
        return [found for value in node for found in targets(value)]
    return []


def test_the_groups_of_the_contract() -> None:
    contract = "model calibration metric ratio condense method finetune eval measure compute track"
    assert set(contract.split()) <= set(GROUPS)
    assert [str(path) for path in FILES if not path.parent.name] == ["run.yaml"]
    assert len(OPTIONS) >= 30
    stray = [path for path in CONF.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert not stray, "a file that Hydra cannot see"


@EACH_OPTION
def test_composes_and_instantiates(group: str, option: str, composed: Compose) -> None:
    config = composed(*overrides(group, option))
    choices = dict(config.hydra.runtime.choices)
    assert choices[group] == option
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    written = OmegaConf.to_container(config)
    options.check_request(OmegaConf.to_container(config, resolve=True), written, choices)
    parts = {name: targets(config[name]) for name in GROUPS if name in config}
    for part in (part for found in parts.values() for part in found):
        assert instantiate(part, _convert_="object") is not None
    code = {"none": 0} if group in NONE_MADE else {}
    expected = 0 if group in ("model", "condense") else code.get(option, 1)
    assert len(parts[group]) == expected


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_are_the_plugins_own_with_other_numbers(name: str, composed: Compose) -> None:
    plugin = name.removeprefix("lab_")
    ours, theirs = (composed(f"hydra/launcher={one}").hydra.launcher for one in (name, plugin))
    assert plugin != name, "a plugin's own name would be both, and is warned of"
    assert ours._target_ == theirs._target_ and ours != theirs
    assert set(ours) == set(theirs)


@pytest.mark.parametrize("name", [option for group, option in OPTIONS if group == "model"])
def test_models(name: str, composed: Compose) -> None:
    model = composed(*overrides("model", name)).model
    on_hub = name != "checkpoint" and not model.path.startswith("shipped:")
    described = {"licence", "architecture"} if on_hub else set()
    assert set(model) == {"name", "path", "revision", "dtype", "ignore_tensors"} | described
    assert model.dtype in checkpoint.DTYPES
    if name == "checkpoint":
        assert model.name == model.path
    else:
        assert model.name == name
        hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", model.path)
        assert model.path == f"shipped:{name}" or hub_id
    if model.path.startswith("shipped:"):
        found = checkpoint.resolve(model.path, model.revision, model.dtype)
        assert found.layers()


@pytest.mark.parametrize("group", MIRRORED)
def test_conf_mirrors_code(group: str, composed: Compose) -> None:
    room = MIRRORED[group]
    plugins = [module for module in rooms.FILES if rooms.is_plugin(module)]
    code = {module.rpartition(".")[2] for module in plugins if module.rpartition(".")[0] == room}
    files = {path.stem for path in (CONF / group).glob("*.yaml")}
    names = {name: KEYWORDS.get(name, name) for name in sorted(code)}
    assert set(names.values()) - {"none"} <= files - {"none"}
    for name, option in names.items():
        target = composed(f"{group}={option}")[group]._target_
        assert target.rpartition(".")[0] == f"moe_lab.{room}.{name}"
    for name in sorted(files - code - {"none"}):  # other options of the same code
        module = composed(f"{group}={name}")[group]._target_.rpartition(".")[0]
        assert module.removeprefix("moe_lab.") in plugins


@pytest.mark.parametrize("group", GROUPS)
def test_a_misspelt_option_lists_what_exists(group: str, composed: Compose) -> None:
    with pytest.raises(HydraException) as caught:
        composed(f"{group}=mispelt")
    message = refusals.refusal(caught.value)
    assert f"{group}/mispelt" in message
    assert all(option in message for name, option in OPTIONS if name == group)
    assert str(ROOT) not in message


@pytest.mark.parametrize("node", ["", *GROUPS])
def test_a_misspelt_key_lists_what_exists(node: str, composed: Compose) -> None:
    config = composed()
    there = config[node] if node else config
    with pytest.raises(HydraException) as caught:
        composed(f"{node}.mispelt=1" if node else "mispelt=1")
    message = refusals.refusal(caught.value)
    assert "mispelt is no option; there are" in message
    keys = {str(key) for key in there} - {"hydra", "_target_"}
    assert all(key in message for key in keys)
    assert keys or f"none yet: choose another {node}=<option>" in message


def test_every_yaml_of_hydra_itself_is_untouched(composed: Compose) -> None:
    HydraConfig.instance().set_config(composed())
    assert HydraConfig.get().job.chdir is False
    assert "${" not in HydraConfig.get().run.dir
    HydraConfig.instance().cfg = None


def test_no_machine_path_in_any_file() -> None:
    texts = {path: (CONF / path).read_text() for path in FILES}
    wrong = [
        path for path, text in texts.items() if re.search(r"(^|[\s:\[])/(home|work|tmp)", text)
    ]
    assert not wrong
