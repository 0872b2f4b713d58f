"""Conversations as text: messages through the chat template of the model's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe_lab.data.reading import check_text, excerpt
from moe_lab.data.tokens import Tokenizer
from moe_lab.types import UserError


class Chat(NamedTuple):
    """A document of messages, each with a role and content; place: where it stands."""

    messages: tuple[Mapping[str, Any], ...]
    place: str


class ChatText(str):
    """A conversation as its template writes it, the special tokens among it."""

    __slots__ = ()


def chat_of(place: str, field: str, value: Sequence[Any]) -> Chat | str:
    """The messages in a row's field; "" where none says anything. UserError for other lists."""
    for number, message in enumerate(value, start=1):
        keys = sorted(map(str, message)) if isinstance(message, Mapping) else None
        if keys is None or not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(
                f"{place}: {field!r} is a list, and its item {number} is no message with role and "
                f"content: {excerpt(message)}; what it needs is text, or messages such as "
                '[{"role": "user", "content": "Hello"}]'
            )
        content = message["content"]
        if not (content is None or isinstance(content, (str, list))):
            raise UserError(
                f"{place}: {field!r}: the content of message {number} is {excerpt(content)} "
                f"({type(content).__name__}), and is to be text"
            )
    if not any(_says(message) for message in value):
        return ""
    return Chat(tuple(_without_nulls(message) for message in value), place)


def as_text(chat: Chat, tokenizer: Tokenizer) -> ChatText:
    """What the tokenizer's template makes of a conversation.

    UserError where there is none, where it refuses these messages, and where it would print a list
    or an object as Python writes it, which no model has seen. (A null content is "" to it.)
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{chat.place} has messages, and the model's tokenizer has no chat template to write "
            "them with: add chat_template.jinja to the model's folder, or name a field with text "
            "(calibration.field=<name>)"
        )
    text = ChatText(check_text(_applied(chat, tokenizer), chat.place))
    for part in _nested(chat.messages):
        if repr(part) in text and repr(part) != json.dumps(part, ensure_ascii=False):
            raise UserError(
                f"{chat.place}: the chat template of the model's tokenizer prints the "
                f"{type(part).__name__} {excerpt(part)} as Python writes it, and not what it says: "
                "give content as plain text, or a tokenizer whose template takes parts"
            )
    return text


def _applied(chat: Chat, tokenizer: Tokenizer) -> str:
    try:
        return str(
            tokenizer.apply_chat_template([dict(one) for one in chat.messages], tokenize=False)
        )
    except Exception as error:  # a template is a program of the model's, and raises what it likes
        raise UserError(
            f"{chat.place}: the chat template of the model's tokenizer does not take these "
            f"messages ({type(error).__name__}: {error}); the first is {excerpt(chat.messages[0])}"
        ) from error


def _says(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    said = content.strip() if isinstance(content, str) else content
    return bool(said or message.get("tool_calls"))


def _without_nulls(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the fields that Parquet gives every message because one of them has it."""
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _nested(value: Any) -> Iterator[Any]:
    """Each list and object inside, itself included, that is not empty."""
    if isinstance(value, (list, tuple, Mapping)) and value:
        yield list(value) if isinstance(value, tuple) else value
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _nested(inner)
