"""Which code a result depends on, found from imports, and a version of it.

A result is computed again where code that decides it has changed, and nowhere else. What decides it
is what its stage and its plug-ins import: the modules of moe_lab, and those of one's own, with all
that these import in turn. Not followed are installed packages, imports that only type checkers see,
and the few modules of `WITHOUT_RESULTS`; not seen are names made while running
(`importlib.import_module`) and other files that are read.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from moe_lab.integrity import with_sum, without_sum, write_whole
from moe_lab.lookup import names_in

logger = logging.getLogger(__name__)
OURS = __name__.partition(".")[0]
# Modules of ours that stages and plug-ins import and that decide no result, and why.
WITHOUT_RESULTS = {
    "moe_lab.progress": "progress bars, and times in words: for people",
    "moe_lab.stopping": "when a run stops, not what it computes",
    "moe_lab.processes": "which of several processes works, not what it computes",
    "moe_lab.files": "the names of files, not what is in them",
    "moe_lab.integrity": "whether files are what was written, not what that is",
    "moe_lab.provenance": "where a result came from",
    "moe_lab.finite": "it refuses numbers that are none, and changes none",
    "moe_lab.store": "how results are kept, not what they are",
    "moe_lab.dependencies": "what their keys are made from",
    "moe_lab.compute": "where they are computed; what is the machine's has it in its key",
    "moe_lab.models.reading_back": "it refuses a checkpoint, and changes none",
    "moe_lab.option": "what options are called, and which values of them are refused",
    "moe_lab.data.kept_text": "how generated text is kept, not what it is",
    "moe_lab.data.source": "where text comes from: text enters keys by its tokens",
}
# Modules of ours that look for others by name, and the folder of these.
FINDS_BY_NAME = {"moe_lab.models.adapters.base": "moe_lab.models.adapters"}
PLACES = ("stdlib", "platstdlib", "purelib", "platlib")  # not the prefix: a project may lie in it
INSTALLED = {Path(sysconfig.get_path(place)).resolve() for place in PLACES}
TYPES_ALONE = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
DIGITS = 12


def code_version(*objects: object) -> str:
    """12 hexadecimal digits over all code that `objects` depend on.

    Takes modules, functions, classes, functools.partial and instances, of which their class counts
    and, where it is a dataclass, what its fields hold. The modules' syntax trees are compared
    without docstrings and comments, so explaining code invalidates no result.
    """
    digest = _digest("\n".join(version_of(name) for name in sorted(modules_of(*objects))))
    if _memory.found:
        _memory.note()
    return digest


def remember_modules_in(store: Path) -> None:
    """Have a store's folder, which need not be there, hold what is read of modules from now on."""
    reader = repr((sys.version, Path(__file__).read_bytes()))
    _memory.file = store / "code" / f"{_digest(reader)}.json"
    _memory.known = _read_record(_memory.file)


def modules_of(*objects: object) -> set[str]:
    """The names of all modules that `objects` depend on, their own among them."""
    reached: set[str] = set()
    waiting = [name for one in objects for name in _defining(one)]
    while waiting:
        name = waiting.pop()
        if name not in reached and name not in WITHOUT_RESULTS:
            reached.add(name)
            waiting += imported_by(name)
    return reached


def imported_by(name: str) -> tuple[str, ...]:
    """The modules of ours, or of a user's own, that a module imports, also inside functions."""
    code = _read_code(source_of(name), _package_of(name))
    return _modules_in((*code.imports, *_found_by_name(name)), name)


@functools.cache
def _modules_in(names: tuple[str, ...], by: str) -> tuple[str, ...]:
    modules = (_module_in(full) for full in names)
    return tuple(module for module in modules if module and module != by)


def _found_by_name(name: str) -> list[str]:
    folder = FINDS_BY_NAME.get(name)
    return [f"{folder}.{one}" for one in names_in(folder)] if folder else []


def version_of(name: str) -> str:
    """A module's name, and 12 hexadecimal digits over its code."""
    return f"{name} {_read_code(source_of(name), _package_of(name)).version}"


def source_of(name: str) -> str:
    """A module's text as it was when that was first asked: what runs is not edited meanwhile."""
    return _read(_own_file(name), sys.modules.get(name))


def _defining(item: object) -> Iterator[str]:
    """The modules that define an object, what it binds or holds, and the objects in its fields."""
    if isinstance(item, functools.partial):
        yield from _defining([item.func, item.args, item.keywords])
    elif isinstance(item, Mapping):
        yield from _defining(list(item.values()))
    elif isinstance(item, (list, tuple, set, frozenset)):
        for one in item:
            yield from _defining(one)
    elif inspect.ismodule(item):
        yield item.__name__
    elif inspect.isclass(item) or inspect.isroutine(item):
        module = item.__module__ or "builtins"
        if module.partition(".")[0] not in sys.stdlib_module_names:
            yield module
    elif _is_own(type(item).__module__):
        yield type(item).__module__
        for field in dataclasses.fields(item) if dataclasses.is_dataclass(item) else ():
            yield from _defining(getattr(item, field.name))


@functools.cache
def _read(path: Path, module: ModuleType | None) -> str:
    return path.read_text(encoding="utf-8")


def _package_of(name: str) -> str:
    return name if _own_file(name).name == "__init__.py" else name.rpartition(".")[0]


class Code(NamedTuple):
    """Of a module's text: every name that it imports, in full, and digits over its code.

    Not what only type checkers import.
    """

    imports: tuple[str, ...]
    version: str


@dataclasses.dataclass
class _Memory:
    """What was read of modules, by the sha256 of their package and text; found: in this process.

    file: where it is kept for other processes, which put the whole file in place.
    """

    file: Path | None = None
    known: dict[str, Code] = dataclasses.field(default_factory=dict)
    found: dict[str, Code] = dataclasses.field(default_factory=dict)

    def note(self) -> None:
        """Keep what this process found, where a file can be written, beside what is there."""
        if self.file is None:
            return
        self.known = _read_record(self.file) | self.known | self.found
        self.found = {}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, json.dumps(with_sum(self.known)))
        except OSError as error:
            logger.info("%s: what was read of our modules is not kept: %s", self.file, error)


_memory = _Memory()


def _read_record(file: Path) -> dict[str, Code]:
    """What other processes read; nothing of a file that is not there or has changed since."""
    try:
        record = without_sum(json.loads(file.read_text(encoding="utf-8")))
        return {key: Code(tuple(imports), told) for key, (imports, told) in record.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


@functools.cache  # keys are asked for layer by layer, and parsing takes long
def _read_code(source: str, package: str) -> Code:
    key = hashlib.sha256(f"{package}\n{source}".encode()).hexdigest()
    known = _memory.known.get(key)
    if known is None:
        tree = ast.parse(source)
        imports = tuple(dict.fromkeys(_imported(tree, package)))
        known = _memory.found[key] = Code(imports, _digest(_without_words(tree)))
    return known


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in TYPES_ALONE:
            yield from _imported(ast.Module(node.orelse, []), package)
        else:
            yield from _imported(node, package)


def _without_words(tree: ast.Module) -> str:
    """A module's code without docstrings, comments, and what an `Option` says of an option."""
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Option":
            node.args, node.keywords = [], []
    return ast.unparse(tree)


def _module_in(full: str) -> str | None:
    """The module of a full name (a module, or something in one); None where it is installed."""
    parts = full.split(".")
    ends = range(len(parts), 0, -1) if _is_own(full) else ()
    names = (".".join(parts[:end]) for end in ends)
    return next((name for name in names if _file_of(name) is not None), None)


def _is_own(full: str) -> bool:
    """Whether a name is of ours or of a user's own: not of Python's, and not of what is installed.

    Told by its first part alone, of which no module has to be imported.
    """
    top = full.partition(".")[0]
    return top == OURS or (top not in sys.stdlib_module_names and not _is_installed(top))


@functools.cache
def _is_installed(top: str) -> bool:
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # made by hand, as __main__ is
        return True
    places = list(spec.submodule_search_locations or ()) if spec else []
    places += [spec.origin] if spec and spec.origin and spec.has_location else []
    homes = [Path(place).resolve() for place in places]
    return not homes or any(home.is_relative_to(place) for home in homes for place in INSTALLED)


def _own_file(name: str) -> Path:
    path = _file_of(name)
    if path is None:
        raise RuntimeError(f"results depend on {name}, whose source is not there")
    return path


def _file_of(name: str) -> Path | None:
    """The Python file of a module, which is not imported for it; None where there is none."""
    if name in sys.modules:
        return _python_file(getattr(sys.modules[name], "__file__", None))
    return _found(name)


@functools.cache
def _found(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # what stands before its last dot is no package
        return None
    return _python_file(spec.origin if spec else None)


@functools.cache
def _python_file(file: str | None) -> Path | None:
    return Path(file).resolve() if file and file.endswith(".py") else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
