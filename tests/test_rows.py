import json
from pathlib import Path

import pytest

from lorasp.data.rows import read_rows
from lorasp.recipe import RecipeError, Source
from tests.real_data import real_data

ROWS = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello\u2028Ærø"},  # U+2028: a line end to str.splitlines
]


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def read(path: str, *, layout: str = "auto", empty_output: str = "drop", **source):
    return read_rows(Source(path=path, **source), layout=layout, empty_output=empty_output)


def refusal(path: str, **options) -> str:
    with pytest.raises(RecipeError) as caught:
        read(path, **options)
    return str(caught.value).removeprefix(path)


def test_the_real_alpaca_has_28_rows_with_an_empty_output():
    path = real_data("alpaca/alpaca_data.json")
    data = read(str(path))
    assert (len(data.rows), data.dropped_empty) == (52_002 - 28, 28)
    assert sum(row["input"] != "" for row in data.rows) == 20_679 - 16  # 16 of the 28 have an input
    assert "28 rows have an empty output (first: row " in refusal(str(path), empty_output="error")


def test_list_and_lines_give_the_same_rows_and_digest(tmp_path):
    as_list = read(write(tmp_path / "a.json", json.dumps(ROWS, indent=4)))
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    as_lines = read(write(tmp_path / "b.jsonl", "\ufeff" + lines + "\r\n\r\n"))
    assert as_list.rows == as_lines.rows == ROWS
    assert as_list.digest == as_lines.digest
    assert as_list.places == ["row 1", "row 2"] and as_lines.places == ["line 1", "line 2"]


def test_the_digest_sees_a_moved_boundary_between_columns(tmp_path):
    moved = [{"instruction": "Add.1", "input": " 2", "output": "3"}, ROWS[1]]
    digests = {read(write(tmp_path / "a.json", json.dumps(rows))).digest for rows in (ROWS, moved, ROWS[::-1])}
    assert len(digests) == 3


def test_absent_and_null_input_are_an_empty_one_and_other_columns_are_left_out(tmp_path):
    rows = [{"instruction": "a", "output": "b", "text": "c"}, {"instruction": "a", "input": None, "output": "b"}]
    data = read(write(tmp_path / "a.json", json.dumps(rows)))
    assert data.rows == [{"instruction": "a", "input": "", "output": "b"}] * 2


def test_blank_outputs_are_dropped_and_counted_and_places_stay_those_of_the_file(tmp_path):
    rows = [{"instruction": "a", "output": text} for text in ("x", "", " \n", "y", "z")]
    data = read(write(tmp_path / "a.json", json.dumps(rows)), limit=4)
    assert (data.dropped_empty, data.places) == (2, ["row 1", "row 4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": has no rows"),
        ("[]", ": has no rows"),
        ('[{"instruction": "a",\n "output": }]', ": is not JSON (line 2, column 12: Expecting value)"),
        ('{"instruction": "a", "output": "b"}\n{"instr', ": line 2 is not JSON (column 2: Unterminated string"),
        (
            '[{"instruction": "a", "output": "b"}, {"instruction": "a", "text": "b"}]',
            ": 1 row has no column 'output' ",
        ),
        ('[{"instruction": "a", "text": "b"}]', "(first: row 1, which has 'instruction', 'text')"),
        ('[{"instruction": "a", "output": 3}]', ": 1 row has no text in column 'output' (first: row 1, 3)"),
        (
            '[{"instruction": null, "output": "b"}]',
            ": 1 row has no text in column 'instruction' (first: row 1, None)",
        ),
        (
            '[{"instruction": "a", "output": "\\ud83d"}]',
            ": 1 row has half of a surrogate pair in column 'output' (first: row 1, ",
        ),
        ('["a", "b"]', ": 2 rows have no columns at all (first: row 1, a JSON str instead of an object)"),
        ('[{"instruction": "a", "output": ""}]', ": has no rows left, the output of all 1 is empty"),
    ],
)
def test_bad_data_is_named(tmp_path, text, message):
    assert message in refusal(write(tmp_path / "a.json", text))


def test_all_kinds_of_fault_are_told_at_once(tmp_path):
    rows = [{"instruction": 1, "output": "b"}, {"instruction": "a"}, {"instruction": "a"}]
    message = refusal(write(tmp_path / "a.json", json.dumps(rows)))
    assert "1 row has no text in column 'instruction'" in message and "2 rows have no column 'output'" in message


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('[{"instruction": "Ærø", "output": "b"}]'.encode("latin-1"))
    assert refusal(str(path)) == ": line 1 is not UTF-8 text (byte 18); save it as UTF-8"


@pytest.mark.parametrize("name", ["missing.json", "./missing", "/no/such/place", "a/b/c"])
def test_a_path_to_no_file_is_not_looked_up_on_the_hub(name):
    assert refusal(name) == ": no such data file"


def test_a_directory_is_refused(tmp_path):
    assert refusal(str(tmp_path)).startswith(": is a directory")


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
]


@pytest.mark.parametrize(
    ("row", "layout", "kept"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca", {"instruction": "a", "input": "", "output": "b"}),
        ({"prompt": "a ", "completion": "b", "id": 3}, "prompt_completion", {"prompt": "a ", "completion": "b"}),
        ({"prompt": "Hi", "messages": CHAT, "source": "x"}, "chat", {"messages": CHAT}),
        (
            {"prompt": "a", "completion": "b", "messages": None},
            "prompt_completion",
            {"prompt": "a", "completion": "b"},
        ),
        # As Arrow gives it where some messages of a data set have more keys.
        ({"messages": [{**turn, "tool_calls": None} for turn in CHAT]}, "chat", {"messages": CHAT}),
    ],
)
def test_the_columns_tell_the_layout(tmp_path, row, layout, kept):
    data = read(write(tmp_path / "a.jsonl", json.dumps(row)))
    assert (data.layout, data.rows) == (layout, [kept])


def test_a_given_layout_wins_over_the_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "p", "completion": "c", "messages": CHAT}))
    assert read(path, layout="prompt_completion").rows == [{"prompt": "p", "completion": "c"}]
    assert "1 row has no column 'instruction'" in refusal(path, layout="alpaca")


def test_mixed_layouts_are_refused_naming_the_line(tmp_path):
    rows = [{"instruction": "a", "output": "b"}] * 2 + [{"messages": CHAT}, {"prompt": "a", "completion": "b"}]
    message = refusal(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert message == (
        ": 2 rows have another layout than line 1, alpaca; keep a file for each "
        "(first: line 3, chat, which has 'messages')"
    )


def test_unknown_columns_are_told_with_what_is_known(tmp_path):
    message = refusal(write(tmp_path / "a.jsonl", '{"question": "a", "answer": "b"}'))
    assert "line 1 has the columns 'question', 'answer'" in message and "prompt and completion" in message


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("Hi", "messages that are no list of {role, content} (first: line 1, 'Hi')"),
        ([], "a chat without a turn of the assistant, so nothing to train (first: line 1, roles: none)"),
        (CHAT[:1], "a chat without a turn of the assistant, so nothing to train (first: line 1, roles: 'user')"),
        (CHAT[1:], "a chat that the assistant begins, so nothing that it answers"),
        ([{"role": "user", "content": [{"type": "text"}]}, CHAT[1]], "a message without text as its content"),
        ([{"from": "human", "value": "Hi"}], "a message without text as its role (first: line 1, message 1: None)"),
        ([{"role": "user", "content": "\ud83d"}, CHAT[1]], "half of a surrogate pair in the content of a message"),
    ],
)
def test_bad_chats_are_named(tmp_path, messages, told):
    assert told in refusal(write(tmp_path / "a.jsonl", json.dumps({"messages": messages})))


def test_a_chat_with_an_empty_answer_is_an_empty_row(tmp_path):
    rows = [{"messages": CHAT}, {"messages": [*CHAT, CHAT[0], {"role": "assistant", "content": " "}]}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    data = read(path)
    assert (len(data.rows), data.dropped_empty) == (1, 1)
    assert "1 row has an empty output (first: line 2)" in refusal(path, empty_output="error")


def test_the_digest_sees_who_says_what_in_a_chat(tmp_path):
    swapped = [CHAT[0], {"role": "assistant", "content": "Hi"}]
    chats = [CHAT, swapped, [*CHAT, *CHAT], [{"role": "system", "content": "Hi"}, CHAT[1]]]
    digests = {read(write(tmp_path / "a.jsonl", json.dumps({"messages": chat}))).digest for chat in chats}
    assert len(digests) == 4


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt": "a", "completion": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_no_crash(tmp_path, text):
    assert "is not JSON" in refusal(write(tmp_path / "a.jsonl", text))
    assert "is not JSON" in refusal(write(tmp_path / "a.json", f"[{text}]"))


def test_the_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' * 2 + b'{"prompt": "\xe6", "completion": "b"}\n')
    assert refusal(str(path)) == ": line 3 is not UTF-8 text (byte 82); save it as UTF-8"
