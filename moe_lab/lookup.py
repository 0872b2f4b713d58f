"""What a name in an option stands for: a file of a package of ours, or something of one's own.

Plug-ins that are made by a `_target_` need no lookup. The others (condensing choices, groupings by
name, families) are known by the names of their files, and what lies outside by its dotted path.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Collection
from pydoc import locate
from types import ModuleType
from typing import Any

from moe_lab.types import UserError


def names_in(package: str, bases: Collection[str] = ("base",)) -> list[str]:
    """The names of a package's plug-ins: of all its files but those that plug-ins build on."""
    places = importlib.import_module(package).__path__
    return sorted({module.name for module in pkgutil.iter_modules(places)} - set(bases))


def module_in(package: str, name: str) -> ModuleType:
    """The file of that name in a package."""
    return importlib.import_module(f"{package}.{name}")


def named(
    asked: str,
    given: str,
    package: str,
    member: str | type,
    bases: Collection[str] = ("base",),
    also: str = "",
) -> Any:
    """What `given` stands for, the value of the option `asked`.

    A name is that of a file in `package`, of which the `member` is taken: what has this name there,
    or the one class there that is derived from it. With dots it is the path of a module or an
    object anywhere. UserError for what does not exist, with the names that do, and what `also` is
    possible.
    """
    names = names_in(package, bases)
    found: object = None
    if "." in given:
        found = locate(given)
    elif given in names:
        found = module_in(package, given)
    if inspect.ismodule(found):
        found = _member(found, member)
    if found is None:
        path = ", or the path of one of your own (found from PYTHONPATH) such as research.mine"
        raise UserError(
            f"{asked}={given!r} does not exist; there are {', '.join(names)}{also}{path}"
        )
    return found


def require_kind(asked: str, given: object, base: type[Any]) -> Any:
    """`given`, where it is made by a class derived from `base`; else a UserError that says so."""
    if isinstance(given, base):
        return given
    what = "null" if given is None else type(given).__name__
    raise UserError(
        f"{asked} is {what}, and must be made by a class derived from "
        f"{base.__module__}.{base.__qualname__}"
    )


def _member(module: ModuleType, member: str | type) -> Any:
    """What has this name in a module, or the one class there derived from it; else None."""
    if isinstance(member, str):
        return vars(module).get(member)
    own = [one for one in vars(module).values() if inspect.isclass(one)]
    found = [one for one in own if issubclass(one, member) and one.__module__ == module.__name__]
    return found[0] if len(found) == 1 else None
