"""Text that takes long to generate, kept from run to run in a folder of the store.

A text is generated again where what it is made from has changed, which its file's name says, and
where its file is damaged. Without a folder to keep it in, or in one that cannot be written, each
process generates its own. By hand: libraries that do so (joblib, diskcache) keep pickles, which a
damaged or foreign file turns into code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from moe_lab.integrity import write_whole

logger = logging.getLogger(__name__)
Texts = tuple[str, ...]

_memory: Path | None = None


def keep_in(store: Path) -> None:
    """Have a store's folder, which need not be there, hold what is generated from now on."""
    global _memory
    _memory = store / "text"


def kept_by_source(
    what: str, source: Callable[[str, str], str]
) -> Callable[[Callable[[str, str], Texts]], Callable[[str, str], Texts]]:
    """Decorates what gives the texts of a domain and a split: at most once for each process.

    what: how the files are called; source(domain, split): hexadecimal digits that change whenever
    these texts may.
    """

    def decorate(make: Callable[[str, str], Texts]) -> Callable[[str, str], Texts]:
        @functools.cache
        def texts(domain: str, split: str) -> Texts:
            if _memory is None:
                return make(domain, split)
            file = _memory / f"{what}-{domain}-{split}-{source(domain, split)}.json"
            return _read(file) or _written(file, make(domain, split))

        functools.update_wrapper(texts, make)
        return texts

    return decorate


def _read(file: Path) -> Texts | None:
    """What a file holds; None where it is not there, or not what was written."""
    try:
        told, _, text = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(text).hexdigest().encode() != told:
        logger.warning("%s is damaged: its text is generated again", file)
        return None
    return tuple(json.loads(text))


def _written(file: Path, texts: Texts) -> Texts:
    """The texts, kept in a file behind their sha256 where one can be written.

    Several processes may write the same at once: each puts the whole file in place.
    """
    text = json.dumps(texts)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    except OSError as error:
        logger.info("%s: its text is not kept: %s", file, error)
    return texts
