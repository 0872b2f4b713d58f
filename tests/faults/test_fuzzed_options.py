"""Any value of any option is taken or refused in words, within seconds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from fuzzed import Effort, Tally, Told, fuzz, told
from hypothesis import strategies as st
from running import ROOT

GROUPS = {
    group: sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))
    for group in ("method", "metric", "ratio", "grouping", "finetune", "diagnose", "compute")
} | {  # without those that need the network or another program
    "eval": ["none", "perplexity", "tiny"],
    "measure": ["none", "speed"],
    "calibration": ["files", "mixture", "stdlib", "stdlib_questions"],
}
NUMBERS = """0 -0 1 -1 2 7 8 9 1000 1000000007 10000000000 1e30 -1e30 1e-30 0.5 0.999 1.5 nan inf
-inf 1e400 0x10 1_000"""
WORDS = r"""null true false ~ '' ' ' none nothing all '???' a '[x]' '[/b]' '\n' '%s' '{0}' '{}'
'../..' ÿ 😀 '${seed}' '${nope}' '${oc.env:NOPE}' '${' moe_lab moe_lab.types builtins.dict"""
LISTS = """[] [0] [1] [-1] [0,0] [1,2,3] [null] [[]] [[1]] [a] [1.5] [nan] [true] ['',''] {} {a:1}
[1000000007] {a:{b:1}}"""
VALUES = [*NUMBERS.split(), *WORDS.split(), *LISTS.split(), "x" * 5000]
# What the tests decide, and a folder that a hostile value may not name.
KEPT = ("track", "hydra", "model.path", "store", "run_dir")
WITHOUT = ("finetune=none", "eval=none", "measure=none")

PLACES = st.lists(st.tuples(st.integers(0, 10**4), st.sampled_from(VALUES)), min_size=1, max_size=3)
CHOICES = st.fixed_dictionaries(
    {}, optional={group: st.sampled_from(chosen) for group, chosen in GROUPS.items()}
)
FOUND = [
    ["calibration._target_=0"],
    ["compute._target_=[0]"],
    ["metric._target_=''"],
    ["compute._target_='${seed}'"],
    ["grouping._target_=moe_lab.types"],
    ["eval=[1]"],
    ["measure=[nan]"],
    ["eval=[[1]]"],
    ["seed=[1.5]"],
    ["seed={a:1}"],
]


@pytest.fixture(scope="module")
def base(small: list[str], fuzz_folder: Path) -> list[str]:
    return [*small, f"store={fuzz_folder}/store"]


@functools.cache
def names(*overrides: str) -> list[str]:
    """The names of all options that a user may set, beside these choices."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plain = OmegaConf.to_container(compose("run", list(overrides)))
    return [name for name in _leaves(plain, "") if not name.startswith(KEPT)]


def _leaves(node: Any, name: str) -> list[str]:
    if not isinstance(node, dict) or not node:
        return [name]
    inner = [_leaves(value, f"{name}.{key}" if name else key) for key, value in node.items()]
    return [leaf for leaves in inner for leaf in leaves]


def test_any_value_of_any_option(
    base: list[str], fuzz_folder: Path, elsewhere: None, effort: Effort, long: bool, tally: Tally
) -> None:
    def check(request: tuple[dict[str, str], list[tuple[int, str]]]) -> Told:
        groups, values = request
        kept = [
            one for one in (*base, *WITHOUT) if one.partition("=")[0].split(".")[0] not in groups
        ]
        overrides = [*kept, *(f"{group}={name}" for group, name in groups.items())]
        known = names(*overrides)
        hostile = [f"{known[place % len(known)]}={value}" for place, value in values]
        return told([*overrides, *hostile], fuzz_folder / "run", whole=long)

    fuzz(st.tuples(CHOICES, PLACES), check, effort, tally)
    tally.check()


@pytest.mark.parametrize("found", FOUND, ids=" ".join)
def test_what_was_found(
    found: list[str], base: list[str], fuzz_folder: Path, elsewhere: None
) -> None:
    assert not told([*base, *WITHOUT, *found], fuzz_folder / "run").done
