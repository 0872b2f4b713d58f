"""Sources of rows with fields, and how a row becomes a document."""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from moe_lab.data.chat import chat_of
from moe_lab.data.reading import PlacedRow, check_text, excerpt
from moe_lab.data.source import Document, Pair, Source
from moe_lab.option import Option
from moe_lab.types import UserError


@dataclass(frozen=True)
class Rows(Source):
    """A source of rows with fields: subclasses say where `rows` come from.

    A row becomes a document by one of: `prompt` and `answer`, templates of the two parts, where
    what `answer` gives may be looked up in `answers`; `template`; or what its `field` holds, text
    or messages. A row that is null, or whose field is null or blank, is left out and counted.
    """

    field: Annotated[
        str, Option("the field with a row's text, or its messages (role and content)")
    ] = "text"
    template: Annotated[
        str | None, Option("a row's text of several fields, such as '{title}: {body}'")
    ] = None
    prompt: Annotated[
        str | None, Option("what is given, of a row's fields such as '{question}'; with answer")
    ] = None
    answer: Annotated[
        str | None, Option("what is learned, of a row's fields such as ' {reply}'; with prompt")
    ] = None
    answers: Annotated[
        dict[str, str] | None,
        Option("where rows only number their answer, the template for each number"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) != (self.answer is None):
            raise UserError(
                f"prompt={self.prompt!r} and answer={self.answer!r} belong together: give both, as "
                "templates of a row's fields such as '{question}'"
            )

    def rows(self) -> Iterable[PlacedRow]:
        """Where each row lies, for messages, and the row."""
        raise NotImplementedError

    def documents(self) -> Iterable[Document]:
        return (self._document(place, row) for place, row in self.rows())

    def grouped(self, field: str) -> Iterable[tuple[str, Document]]:
        for place, row in self.rows():
            if row is None:
                yield "", ""
                continue
            if not isinstance(row, dict) or row.get(field) is None:
                raise UserError(
                    f"group_by={field}: {place}, is a row without it; there is {_fields(row)}"
                )
            yield str(row[field]), self._document(place, row)

    def _document(self, place: str, row: Any) -> Document:
        if row is None:
            return ""
        if self.prompt is not None:
            return self._pair(place, row)
        if self.template is not None:
            return _fill(self.template, place, row)
        if not isinstance(row, dict) or self.field not in row:
            what = f"; it is {excerpt(row)}" if not isinstance(row, dict) else ""
            raise UserError(
                f"{place}, has no field {self.field!r} (there is {_fields(row)}{what}); name "
                "another with calibration.field=<name>"
            )
        value = row[self.field]
        if value is None:
            return ""
        if isinstance(value, str):
            return check_text(value, place)
        if isinstance(value, list):
            return chat_of(place, self.field, value)
        raise UserError(
            f"{place}: the field {self.field!r} holds {excerpt(value)} ({type(value).__name__}), "
            f"and is to hold text or messages (there is {_fields(row)}); name another with "
            "calibration.field=<name>"
        )

    def _pair(self, place: str, row: Any) -> Pair:
        answer = _fill(self.answer or "", place, row)
        if self.answers is not None:
            templates = {str(key): template for key, template in self.answers.items()}
            if answer not in templates:
                raise UserError(
                    f"{place} has a row whose answer is {answer!r}; answers= knows "
                    f"{', '.join(templates)}"
                )
            answer = _fill(templates[answer], place, row)
        if not answer.strip():
            raise UserError(
                f"{place} has a row without an answer: its fields are {_fields(row)}, and the "
                f"template answer={self.answer!r} gives nothing"
            )
        return Pair(_fill(self.prompt or "", place, row), answer)


class _Formatter(string.Formatter):
    def format_field(self, value: object, format_spec: str) -> str:
        if value is None:
            raise TypeError("a field is null")
        text: str = super().format_field(value, format_spec)
        return text


def _fill(template: str, place: str, row: Any) -> str:
    try:
        return check_text(_Formatter().vformat(template, (), row), place)
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{place} has fields {_fields(row)}, which do not fill the template {template!r}: "
            f"{error!r}"
        ) from error


def _fields(row: object) -> list[str] | str:
    return sorted(row) if isinstance(row, dict) else type(row).__name__
