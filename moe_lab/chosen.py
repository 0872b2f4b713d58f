"""Plug-ins that are chosen by a config group of their own, or by their name alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from moe_lab.lookup import named, require_kind
from moe_lab.option import Plugin, declared_by, plain_options
from moe_lab.types import UserError

One = TypeVar("One", bound=Plugin)


@dataclass(frozen=True)
class ChosenBy(Generic[One]):
    """How such plug-ins are asked for: <of>.<group>=<name>, or <group>=<name> with its options.

    package: whose files they are, but for the ones named `others`; base: what all are; of: the
    group whose option they are.
    """

    group: str
    package: str
    base: Any  # a type, which may be abstract
    others: tuple[str, ...]
    of: str = "method"

    def made(self, given: object) -> One:
        """A plug-in, also by name (a file of the package, or a dotted path), with its defaults."""
        found = given
        if isinstance(given, str):
            found = named(f"{self.of}.{self.group}", given, self.package, self.base, self.others)
        if inspect.isclass(found):
            found = self._with_defaults(found, given)
        one: One = require_kind(self.group, found, self.base)
        return one

    def _with_defaults(self, kind: Callable[[], object], given: object) -> object:
        declared = declared_by(kind).items()
        required = [name for name, one in declared if one.default is inspect.Parameter.empty]
        if required:
            raise UserError(
                f"{self.of}.{self.group}={given} has no default for {', '.join(required)}: write a "
                f"yaml for it in a folder of options, {self.group}/<name>.yaml, and choose "
                f"{self.group}=<name>"
            )
        return kind()

    def described(self, given: object) -> dict[str, Any]:
        """What a report says of one: its name and its own options.

        given: its composed node, or its name, which leaves the defaults.
        """
        if isinstance(given, Mapping):
            file = str(given.get("_target_")).rpartition(".")[0]
            return {self.group: file.rpartition(".")[2]} | plain_options(given)
        try:
            one = self.made(str(given))
        except UserError:  # told when it is checked
            return {self.group: given}
        name = getattr(one, "name", type(one).__module__.rpartition(".")[2])
        return {self.group: name} | plain_options(all_options(one, given))


def all_options(one: Plugin, given: object) -> dict[str, Any]:
    """All its own options; given: its composed node, or its name, which leaves the defaults."""
    chosen = given if isinstance(given, Mapping) else {}
    declared = declared_by(type(one)).items()
    return {name: chosen.get(name, option.default) for name, option in declared}
