"""Policies by their names, with options of their own: `hobbit:t1=0.5,low_share=0.3`."""

from __future__ import annotations

from typing import Any

import yaml

from moe_lab.lookup import named
from moe_lab.offload.policies.base import Policy
from moe_lab.option import declared_by
from moe_lab.types import UserError

POLICIES = "moe_lab.offload.policies"


def policy_of(asked: str) -> Policy:
    """The policy that a name and its options stand for; UserError for what does not exist."""
    name, _, given = asked.partition(":")
    kind = named("--policy", name, POLICIES, Policy)
    declared = declared_by(kind)
    options: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        key, sign, value = part.partition("=")
        if not sign or key not in declared:
            there = ", ".join(declared) or "none"
            raise UserError(f"--policy {asked}: {part!r} is no option of {name}=value; there are "
                            f"{there}")  # fmt: skip
        options[key] = _value(asked, key, value, declared[key].default)
    policy: Policy = kind(**options)
    return policy


def _value(asked: str, key: str, text: str, default: object) -> Any:
    """The value, of the kind that the default has."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"--policy {asked}: {key}={text} must be of the kind of {default!r}")
    return value
