"""What figures are counted in: how a value is written, and what titles have to say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unit:
    """A unit of figures.

    name: as the docs say it; write: a value as text; bare: that text lacks the unit, so titles say
    it. page, picture: what is said behind the title on an axis of a sweep's page and of its
    pictures. scale: brings a value into a picture's unit. of_dense: values are shares or multiples
    of the dense model's, which is 1; relative: pictures divide them by the dense model's.
    """

    name: str
    write: Callable[[Any], str]
    bare: bool = False
    page: str = ""
    picture: str = ""
    scale: float = 1.0
    of_dense: bool = False
    relative: bool = False

    def above(self, title: str) -> str:
        """A title above or beside values: "router entropy (nats)", "size on disk"."""
        return f"{title} ({self.name})" if self.bare else title

    def on_page(self, title: str) -> str:
        """A title on an axis of the page: "prefill speed, times dense"."""
        said = self.page or (self.name if self.bare else "")
        return f"{title}, {said}" if said else title

    def in_picture(self, title: str) -> str:
        """A title on an axis of a picture: "prefill speed (× dense)"."""
        return f"{title} ({self.picture})" if self.picture else self.above(title)


def percent(value: float) -> str:
    """A share of 1 as 12.3 %."""
    return f"{100 * value:.1f} %"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three or so digits and a thousands' prefix: 12.3 M."""
    power = 0
    while abs(value) >= 999.95 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:.{1 if power else 0}f} {units[power]}".strip()


def _count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "B", "T"))


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def _yes_or_no(value: float) -> str:
    """Yes, no, or of several reports how many say yes."""
    words: dict[float, str] = {0: "no", 1: "yes"}
    return words.get(value) or f"{100 * value:.0f} % yes"


NUMBER = Unit("–", "{:.3f}".format)
SMALL_NUMBER = Unit("–", "{:g}".format)  # a number of few things
COUNT = Unit("–", _count, picture="% of dense", scale=100, relative=True)
OPERATIONS = Unit("operations", _count, picture="% of dense", scale=100, relative=True)
BYTES = Unit("bytes", _bytes, picture="% of dense", scale=100, relative=True)
SHARE = Unit("share", percent, picture="%", scale=100)
PART = Unit("share", "{:.3f}".format)  # of a whole that has many
SHARE_OF_DENSE = Unit(
    "share", percent, page="share of dense", picture="% of dense", scale=100, of_dense=True
)
TIMES_DENSE = Unit(
    "times", "{:.2f}×".format, page="times dense", picture="× dense", of_dense=True
)  # fmt: skip
SECONDS = Unit("s", "{:.3f} s".format)
SECONDS_OF_STAGE = Unit("s", "{:.3f}".format)
NATS = Unit("nats", "{:.3f}".format, bare=True)
NATS_PER_TOKEN = Unit("nats per token", "{:.4f}".format, bare=True)
TRUTH = Unit("yes or no", _yes_or_no)
PATH = Unit("path", str)
IN_WORDS = Unit("text", str)
AS_MEASURED = Unit("as lm-eval's", "{:.3f}".format)
