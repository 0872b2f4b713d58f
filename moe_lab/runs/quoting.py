"""How text is written so that Hydra's grammar of overrides, and a shell, take it as it is.

Unquoted, that grammar takes letters of ASCII, digits and a few signs: no = [ ] { } ( ) , ' " and
nothing beyond ASCII. What is shown to a user has been through Hydra's own parser.
"""

from __future__ import annotations

import re
import shlex

UNQUOTED = re.compile(r"[\w/.:+%@-]+", re.ASCII)  # what Hydra takes without quotes
KEYWORDS = re.compile(
    r"(true|false|null|nan|[+-]?inf|\?{3})|[+-]?[\d_.]+(e[+-]?\d+)?", re.IGNORECASE
)
SHELL_SAFE = re.compile(r"[\w/.:+%@,=~-]+", re.ASCII)


def override(key: str, text: str) -> str:
    """key=<text> as Hydra reads it, also where the text has spaces, commas or quotes."""
    return f"{key}={quoted(text)}"


def quoted(text: str) -> str:
    """Text as Hydra takes it for this text, and OmegaConf for no ${reference}."""
    if UNQUOTED.fullmatch(text) and not KEYWORDS.fullmatch(text):
        return text
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    text = re.sub(r"(\\+)(?='|$)", r"\1\1", text)  # before a quote a backslash is no letter
    return "'" + text.replace("'", r"\'") + "'"


def for_shell(word: str) -> str:
    """A word of a command, in double quotes where that is enough: it has single ones itself."""
    if SHELL_SAFE.fullmatch(word):
        return word
    return shlex.quote(word) if re.search(r"[\"$`\\!]", word) else f'"{word}"'


def as_written(word: str) -> str | None:
    """An override that Hydra cannot read, or takes for several, as it reads it; None for no way."""
    key, equals, value = word.partition("=")
    if not equals:
        return None
    ways = [f"{key}={quoted(value)}"]
    if value.startswith("["):
        items = [one.strip() for one in value.removeprefix("[").removesuffix("]").split(",")]
        ways.insert(0, f"{key}=[{','.join(map(_item, items))}]")
    return next((way for way in ways if _reads(way)), None)


def _item(text: str) -> str:
    return text if UNQUOTED.fullmatch(text) else quoted(text.strip("'"))


def _reads(word: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return not OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return False
