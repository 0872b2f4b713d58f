"""Plug-ins and their options, which are declared once, where they are taken.

What a `_target_` names says its options in its signature: a parameter's type, its default, and an
`Option` beside the type for what the type cannot say:

    ratio: Annotated[float, Option("share of the experts that goes", least=0, below=1)] = 0.25

Composed values are held against that before a job begins, `--help` and docs/options.md are made
from it, and a class whose objects are also made by hand refuses bad values with `check_options`.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lab.lookup import names_in
from moe_lab.types import UserError


class Plugin:
    """The base of what an option of a config group makes: methods, metrics, recipes and the like.

    Its options are its parameters. A function may be a plug-in, too, with these answers.
    """

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a report says of its composed options, by their names: all that are given."""
        return plain_options(options)

    @classmethod
    def groups(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Which other config groups decide its result, and are told with it: none."""
        return ()

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What of its composed options its result depends on: all of them."""
        return dict(options)


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given and no plug-ins themselves."""
    return {
        name: value
        for name, value in options.items()
        if not name.startswith("_") and value is not None and not isinstance(value, Mapping)
    }


@dataclass(frozen=True)
class Option:
    """What an option is, and which values it takes: for `typing.Annotated`.

    help: in a few words, without a full stop. least, most: bounds that are values, above, below:
    bounds that are none; of a list they are those of its items. among: the only values there are.
    files_of: the package whose files are values by name, and those of its files that are none
    (`lookup.named`, which refuses all others).
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    among: tuple[Any, ...] = ()
    files_of: tuple[str, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether the value, or each item of a list, is in the range; None always is."""
        if isinstance(value, (list, tuple)):
            return all(map(self.allows, value))
        if value is None:
            return True
        if self.among:
            return any(value == one and type(value) is type(one) for one in self.among)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def range(self) -> str:
        """The range in words: "at least 1"; "above 0, below 1"; "none, zero, copy"; else ""."""
        if self.files_of:
            package, *others = self.files_of
            return ", ".join(names_in(package, others))
        if self.among:
            return ", ".join(map(word_of, self.among))
        if self.least is not None and self.most is not None:
            return f"from {_number(self.least)} to {_number(self.most)}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most,
                  "below": self.below}  # fmt: skip
        told = {word: bound for word, bound in bounds.items() if bound is not None}
        return ", ".join(f"{word} {_number(bound)}" for word, bound in told.items())


@dataclass(frozen=True)
class Declared:
    """One option as a signature declares it; default: `inspect.Parameter.empty` without one."""

    name: str
    kind: Any
    option: Option | None
    default: Any

    @property
    def nullable(self) -> bool:
        """Whether null is a value."""
        return type(None) in typing.get_args(self.kind)

    def check(self, name: str, value: Any) -> None:
        """Refuse a value out of range with a UserError that calls it `name`."""
        if self.option is None or self.option.allows(value):
            return
        null = ", or null" if self.nullable else ""
        words = "there are" if self.option.among else "it must be"
        raise UserError(f"{name}={word_of(value)}: {words} {self.option.range()}{null}")


def declared_by(target: Callable[..., Any]) -> dict[str, Declared]:
    """The options of what a `_target_` names (a class or a function), in order."""
    # A dataclass's fields may come from bases in other modules, whose names they are written in.
    plain_class = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    hints = typing.get_type_hints(target.__init__ if plain_class else target, include_extras=True)
    made = {}
    for name, parameter in inspect.signature(target).parameters.items():
        kind, option = _parts(hints.get(name, Any))
        made[name] = Declared(name, kind, option, parameter.default)
    return made


def check_options(one: Any, group: str, others: Mapping[str, str] | None = None) -> None:
    """Refuse values out of range: those of an object's attributes that are called as its options.

    group: as users name it; others: by the names of options, those of another group.
    """
    held = vars(one)
    for name, declared in declared_by(type(one)).items():
        if name in held:
            declared.check(f"{(others or {}).get(name, group)}.{name}", held[name])


def word_of(value: Any) -> str:
    """A value as a user writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(word_of, value))}]"
    return str(value)


def _number(bound: float) -> str:
    """A bound as it is written, a large whole one with all its digits."""
    return f"{bound:g}" if abs(bound) < 1e6 else str(bound)


def _parts(hint: Any) -> tuple[Any, Option | None]:
    """A hint without its Annotated, also inside a union (X | None), and the Option in it."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *extras = typing.get_args(hint)
        return kind, next((one for one in extras if isinstance(one, Option)), None)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_parts(one) for one in typing.get_args(hint)]
        option = next((option for _, option in parts if option), None)
        return (typing.Union[tuple(kind for kind, _ in parts)] if option else hint), option  # noqa: UP007
    return hint, None
