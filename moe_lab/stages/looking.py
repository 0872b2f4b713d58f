"""A store that is looked into, and in which nothing is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_lab.store import Artifact, Store


class NotThere(Exception):
    """A result that is asked for is not in the store, or not finished."""


class Looking(Store):
    """Gives what is there and makes nothing."""

    def get(self, kind: str, identity: Mapping[str, Any], *_: object, **__: object) -> Artifact:
        """The result for `identity`; NotThere where there is none."""
        if found := self.find(kind, identity):
            return found
        raise NotThere(kind)
