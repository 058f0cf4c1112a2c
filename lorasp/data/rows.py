"""Rows of one layout, checked: the layout is recognised by the columns, and a row of another one is refused.

- alpaca: instruction, input (may be missing), output
- prompt_completion: prompt, completion; the text is the one and then the other, as they stand
- chat: messages, [{role, content}, …], OpenAI's layout
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from lorasp.data.sources import Placed, hub_commit, read_source
from lorasp.recipe import RecipeError, Source

# The last two: pairs.py, random_tokens.py
Layout = Literal["alpaca", "prompt_completion", "chat", "pairs", "tokens"]

# Layout -> (columns that a row must have, those that it may have). The first one tells the layout; the layouts stand
# in the order in which they are looked for: chats of the hub often carry their first message as `prompt` too.
_COLUMNS: dict[Layout, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": (("messages",), ()),
    "alpaca": (("instruction", "output"), ("input",)),
    "prompt_completion": (("prompt", "completion"), ()),
}


@dataclass(frozen=True)
class Rows:
    """Checked rows of one source, each with exactly its layout's columns.

    alpaca: instruction, input ("" where there is none), output; prompt_completion: prompt, completion; all str.
    chat: messages, a list of {"role": str, "content": str}.
    """

    layout: Layout
    rows: list[dict[str, Any]]
    places: list[str]  # where rows[i] stands in its source, "row 17" or "line 17", for messages
    source: str
    dropped_empty: int = 0  # rows left out because their output is empty
    commit: str | None = None  # of a hub data set: what its revision, such as `main`, was

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex): the same for a JSON list, JSONL and the hub's copy of the same texts."""
        sha256 = hashlib.sha256()
        for row in self.rows:
            sha256.update(content(row) + b"\n")
        return sha256.hexdigest()

    def only(self, indices: Sequence[int]) -> Self:
        """Some of the rows, in the order of `indices`."""
        chosen = [self.rows[index] for index in indices]
        return replace(self, rows=chosen, places=[self.places[index] for index in indices])


def content(row: dict[str, Any]) -> bytes:
    """What tells a row from another: equal for rows of equal texts."""
    if "messages" in row:
        return json.dumps([[message["role"], message["content"]] for message in row["messages"]]).encode()
    return json.dumps(list(row.values())).encode()


def read_rows(source: Source, *, layout: Layout | Literal["auto"], empty_output: str) -> Rows:
    """The rows of `source`; its `limit` is counted before empty ones are dropped.

    `empty_output` ("drop" or "error"): of a response, a completion, or any turn of the assistant.
    Raises RecipeError naming the file and the row, line or column at fault.
    """
    placed = read_source(source)
    first = placed[0]
    known = layout if layout != "auto" else _layout_of(first[1])
    if known is None and isinstance(first[1], dict):
        raise RecipeError(
            f"{source.path}: {first[0]} has the columns {_columns(first[1])}, which make no known layout; "
            f"give instruction and output, prompt and completion, or messages"
        )
    known = known or "alpaca"
    _check(source.path, placed, known, first[0] if layout == "auto" else None)

    rows, places, empty = [], [], []
    for place, value in placed:
        row = _plain(value, known)
        if all(text.strip() for text in _outputs(row)):
            rows.append(row)
            places.append(place)
        else:
            empty.append(place)
    if empty and empty_output == "error":
        raise RecipeError(
            f"{source.path}: {_count(empty)} an empty output (first: {empty[0]}); "
            "fill them in, or set data.empty_output=drop to leave them out"
        )
    if not rows:
        raise RecipeError(f"{source.path}: has no rows left, the output of all {len(empty)} is empty")
    return Rows(known, rows, places, source.path, len(empty), hub_commit(source))


def _layout_of(value: object) -> Layout | None:
    if not isinstance(value, dict):
        return None
    for is_there in (lambda column: value.get(column) is not None, value.__contains__):
        for layout, (required, _) in _COLUMNS.items():
            if is_there(required[0]):
                return layout
    return None


def _plain(value: dict[str, Any], layout: Layout) -> dict[str, Any]:
    if layout == "chat":
        return {"messages": [{key: message[key] for key in ("role", "content")} for message in value["messages"]]}
    keys = ("instruction", "input", "output") if layout == "alpaca" else ("prompt", "completion")
    return {key: value.get(key) or "" for key in keys}


def _outputs(row: dict[str, Any]) -> list[str]:
    if "messages" in row:
        return [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return [row["output"] if "output" in row else row["completion"]]


def _check(source: str, placed: Placed, layout: Layout, recognised_at: str | None) -> None:
    """Raises one RecipeError with a sentence for each kind of fault: how many rows have it, the first, what it is."""
    faults: dict[str, list[tuple[str, str]]] = {}
    for place, value in placed:
        for kind, detail in _faults(value, layout, recognised_at):
            faults.setdefault(kind, []).append((place, detail))
    if faults:
        raise RecipeError(
            "\n".join(
                f"{source}: {_count(found)} {kind} (first: {found[0][0]}, {found[0][1]})"
                for kind, found in faults.items()
            )
        )


def _faults(value: object, layout: Layout, recognised_at: str | None) -> Iterable[tuple[str, str]]:
    if not isinstance(value, dict):
        yield "no columns at all", f"a JSON {type(value).__name__} instead of an object"
        return
    other = _layout_of(value)
    if recognised_at and other not in (layout, None):
        yield (
            f"another layout than {recognised_at}, {layout}; keep a file for each",
            f"{other}, which has {_columns(value)}",
        )
        return
    required, optional = _COLUMNS[layout]
    for key in (*required, *optional):
        text = value.get(key)
        if key in optional and text is None:
            continue
        if key not in value:
            yield f"no column {key!r}", f"which has {_columns(value)}"
        elif key == "messages":
            yield from _chat_faults(text)
        elif not isinstance(text, str):
            yield f"no text in column {key!r}", f"{text!r:.40}"
        elif not _is_unicode(text):
            yield f"half of a surrogate pair in column {key!r}", f"{ascii(text)[:40]}"


def _chat_faults(messages: object) -> Iterable[tuple[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        yield "messages that are no list of {role, content}", f"{messages!r:.60}"
        return
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            text = message.get(key)
            if not isinstance(text, str):
                yield f"a message without text as its {key}", f"message {number}: {text!r:.40}"
            elif not _is_unicode(text):
                yield f"half of a surrogate pair in the {key} of a message", f"message {number}: {ascii(text)[:40]}"
    roles = [message.get("role") for message in messages]
    if "assistant" not in roles:
        yield "a chat without a turn of the assistant, so nothing to train", f"roles: {_listed(roles)}"
    elif roles[0] == "assistant":
        yield "a chat that the assistant begins, so nothing that it answers", f"roles: {_listed(roles)}"


def _is_unicode(text: str) -> bool:
    """False for the lone surrogates that JSON's escapes can spell and that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _columns(value: dict[str, Any]) -> str:
    return _listed([key for key in value if value[key] is not None] or list(value))


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(repr, names[:12])) + (", …" if len(names) > 12 else "") or "none"


def _count(found: list) -> str:
    return "1 row has" if len(found) == 1 else f"{len(found):,} rows have"
