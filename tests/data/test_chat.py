"""Conversations: what the tokenizer's own template makes of them, and what it must not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from documents import decoded, files

from moe_lab.types import UserError

PLAIN = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% endfor %}"
)
PARTS = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
TOOLS = PLAIN.replace("{% endfor %}", "{{ message.tool_calls }}{% endfor %}")
AS_JSON = PLAIN.replace("{% endfor %}", "{{ message.tool_calls | tojson }}{% endfor %}")
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
IN_PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
CALL = {"name": "f", "arguments": {"a": 1}}
CALLS = [{"role": "assistant", "content": "x", "tool_calls": [CALL]}]


@pytest.fixture
def with_template(tokenizer: Any) -> Any:
    made = copy.deepcopy(tokenizer)
    made.chat_template = PLAIN
    return made


def written(path: Path, *rows: Any, name: str = "chats.jsonl") -> Path:
    (path / name).write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path / name


def chats(path: Path, number: int = 1) -> Any:
    return files(path, field="messages", num_samples=number)


def test_jsonl_and_parquet_give_what_the_template_writes(
    with_template: Any, tmp_path: Path
) -> None:
    rows = [HELLO, [{"role": "system", "content": "Be brief"}, *HELLO]]
    table = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), table)
    lines = chats(written(tmp_path, *rows), 2).tokens(with_template)
    assert decoded(lines, with_template) == [
        "<bos><user>Hello<assistant>Hi", "<bos><system>Be brief<user>Hello<assistant>Hi",
    ]  # fmt: skip
    assert chats(table, 2).tokens(with_template).fingerprint == lines.fingerprint


def test_special_tokens_come_once(with_template: Any, tmp_path: Path) -> None:
    """A tokenizer that begins each text with a token does not do so before a template's own."""
    from tokenizers import processors

    bos = with_template.bos_token_id
    with_template.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert with_template("Hello")["input_ids"][0] == bos
    path = written(tmp_path, HELLO)
    path.write_text(path.read_text() + '{"messages": "plain"}\n')
    first, second = chats(path, 2).tokens(with_template).samples
    assert first.count(bos) == 1 and second[0] == bos and second.count(bos) == 1


def test_a_template_that_takes_parts_may_have_them(with_template: Any, tmp_path: Path) -> None:
    with_template.chat_template = PARTS
    found = chats(written(tmp_path, IN_PARTS)).tokens(with_template)
    assert decoded(found, with_template) == ["Hello"]
    with_template.chat_template = PLAIN
    null = [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    found = chats(written(tmp_path, null)).tokens(with_template)
    assert decoded(found, with_template) == ["<bos><user>Hello<assistant>"], "and not None"
    with_template.chat_template = AS_JSON
    text = decoded(chats(written(tmp_path, CALLS)).tokens(with_template), with_template)[0]
    assert '"arguments": {"a": 1}' in text


def test_fields_of_other_messages_are_no_fields_of_this_one(
    with_template: Any, tmp_path: Path
) -> None:
    """Parquet gives each message the fields of all: null where it has none."""
    with_template.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.name is defined %}({{ m.name }})"
        "{% endif %}{% endfor %}"
    )
    rows = [[{"role": "user", "content": "a", "name": "Ada"}, {"role": "user", "content": "b"}]]
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), table)
    assert decoded(chats(table).tokens(with_template), with_template) == ["a(Ada)b"]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, HELLO, "no chat template.*chat_template.jinja"),
        (PLAIN, IN_PARTS, r"prints the list \[\{'type': 'text'.*give content as plain text"),
        (PLAIN + "{{ messages }}", HELLO, "prints the list"),
        (PLAIN + "{{ messages[0] }}", HELLO, "prints the dict"),
        (TOOLS, CALLS, "prints the list"),
        ("{{ 'a' + messages[0].content }}", IN_PARTS, "does not take these messages"),
        (STRICT, HELLO[::-1], "begin with the user.*'assistant'"),
        ("{% for %}", HELLO, "does not take these messages"),
        (PLAIN, [{"role": "user", "content": "\ud800"}], "lone surrogate"),
        (PLAIN, ["Hello"], "item 1 is no message with role and content: 'Hello'"),
        (PLAIN, [*HELLO, {"from": "human", "value": "a"}], "item 3 is no message.*'human'"),
        (PLAIN, [{"role": "user"}], "is no message"),
        (PLAIN, [{"role": 1, "content": "a"}], "is no message"),
        (PLAIN, [{"role": "user", "content": 7}], r"content of message 1 is 7 \(int\)"),
        (PLAIN, [{"role": "user", "content": {"text": "a"}}], r"\(dict\)"),
    ],
)
def test_what_cannot_be_written_is_refused(
    template: str | None, row: Any, message: str, with_template: Any, tmp_path: Path
) -> None:
    with_template.chat_template = template
    with pytest.raises(UserError, match=message) as refused:
        chats(written(tmp_path, row)).tokens(with_template)
    assert "chats.jsonl, line 1" in str(refused.value)


def test_conversations_that_say_nothing_are_left_out(
    with_template: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = [[], [{"role": "user", "content": ""}], [{"role": "user", "content": None}], None]
    path = written(tmp_path, *nothing, HELLO)
    with caplog.at_level("INFO"):
        assert len(chats(path).tokens(with_template).samples) == 1
    assert "left out were 4 rows without text" in caplog.text
