"""From rows to tokens, and which of them are labels: the response's, or in a chat those that the assistant writes.

A row's text is tokenized as a whole, since tokenizing its parts apart gives other tokens (SentencePiece puts a space
before the second half, byte-level BPE misses the merges across the seam), and the boundaries are read off the
character offsets. A token that straddles one, such as `:"` after "### Response:", counts as prompt: no label then
holds a character of the prompt, and every label follows a context that ends where the tokenizer itself cuts. The
price is that the response's first characters within that token are not trained, and that the prompt tokenized alone,
as generation does it, ends differently there. `EncodedExamples.straddling` counts such rows: with Stanford's template,
which ends in ":", 1,394 of Alpaca's 52,002 under SmolLM2's tokenizer; with "short", which ends in a newline, none.
Spaces before a response belong to it, as tokenizers join a space to the word behind it: a prompt "Answer: " would
otherwise swallow the first word of every response, and all of the one-word ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile

from transformers import PreTrainedTokenizerBase

from lorasp.data.alpaca import format_prompt
from lorasp.data.chat import ChatTemplate, Span
from lorasp.data.rows import Rows
from lorasp.recipe import RecipeError

_ROWS_A_CALL = 1000  # enough to keep the tokenizer's threads busy; all offsets at once are hundreds of MB
_LONGEST_TEXT = 1_000_000  # characters; tokenizing 10 MB takes every rank half a minute and GBs, to cut nearly all off


@dataclass(frozen=True)
class Example:
    """One tokenized row. Labels are predicted from the position before them.

    They are `input_ids[prompt_length:]` but for `unlabelled`: later turns that are not the assistant's, as half-open
    ranges in order, none of them at the end. cut: whether labels behind them were cut off, the end of sequence too.
    """

    input_ids: tuple[int, ...]
    prompt_length: int  # at least 1: the first token has no position before it, so it cannot be a label
    unlabelled: tuple[tuple[int, int], ...] = ()
    cut: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= len(self.input_ids):
            raise ValueError(f"a prompt of {self.prompt_length} tokens in an example of {len(self.input_ids)}")
        cuts = [self.prompt_length, *(cut for part in self.unlabelled for cut in part), len(self.input_ids)]
        if self.unlabelled and not all(before < after for before, after in pairwise(cuts)):
            raise ValueError(f"unlabelled ranges {self.unlabelled} do not part the labels of {cuts[0]} to {cuts[-1]}")

    @property
    def label_count(self) -> int:
        return len(self.input_ids) - self.prompt_length - sum(stop - start for start, stop in self.unlabelled)

    def label_indices(self) -> list[int]:
        """Where in `input_ids` the labels stand."""
        indices: list[int] = []
        start = self.prompt_length
        for stop, after in (*self.unlabelled, (len(self.input_ids), 0)):
            indices.extend(range(start, stop))
            start = after
        return indices


@dataclass(frozen=True)
class EncodedExamples:
    """The examples of a data set, and what became of the rows that are none or not whole."""

    examples: list[Example]
    rows: list[int]  # examples[i] was made of Rows.rows[rows[i]]
    truncated: int  # examples whose labels were cut to fit max_length
    dropped: int  # rows left out because they were too long
    straddling: int  # examples with a token that lies across the boundary of a response
    spelled: int = 0  # chats left out because a message spells a special token


def encode(
    tokenizer: PreTrainedTokenizerBase, data: Rows, template: str, max_length: int, too_long: str
) -> EncodedExamples:
    """The examples of `data`, at most `max_length` tokens each, with no padding.

    Prompt and response become what the tokenizer puts before a text (BOS, if anything), the prompt, the response, and
    EOS once, trained. Special tokens spelled out in them ("</s>") are plain text: they cannot end a response or begin
    a text. A chat becomes what the chat template writes, without what follows the last label; as its special tokens
    are the template's own, a chat whose messages spell one is left out and counted.
    `too_long`: "truncate" cuts the end of the labels (EOS with it: the model must not learn to stop there), "drop"
    leaves the row out, "error" refuses. A prompt that leaves no room for one label cannot be cut: it is dropped by
    "drop" and refused by the others, and so is a text of more than a million characters, which is not tokenized.
    Raises RecipeError for such rows, for a tokenizer without EOS, character offsets or, with chats, a chat template,
    and for a chat that the template refuses or is ambiguous about.
    """
    if tokenizer.eos_token_id is None:
        raise RecipeError("the tokenizer has no EOS token, so no response could end; set eos_token in its config")
    if not tokenizer.is_fast:
        raise RecipeError(
            f"{type(tokenizer).__name__} gives no character offsets, which the prompt/response boundary is read "
            "from; use the model's fast tokenizer (tokenizer.json)"
        )
    texts = _Texts(tokenizer, data, template)
    before = after = ()
    if data.layout != "chat":
        before, after = _tokens_before_a_text(tokenizer), (tokenizer.eos_token_id,)
    examples: list[Example] = []
    rows: list[int] = []
    no_room: list[tuple[int, int]] = []  # (row, tokens of the prompt)
    over: list[tuple[int, int]] = []  # (row, tokens in all)
    straddling = 0
    for row, ids, labels, straddles in texts.tokenize():
        input_ids = (*before, *ids, *after)
        labels = [[start + len(before), stop + len(before)] for start, stop in labels]
        if after:
            labels[-1][1] += len(after)
        labels[0][0] = max(labels[0][0], 1)  # an empty prompt: the first token is what the others follow
        if labels[0][0] >= max_length:
            no_room.append((row, labels[0][0]))
            continue
        needed = labels[-1][1]  # what follows the last label would be computed for nothing
        if needed > max_length:
            over.append((row, needed))
            if too_long != "truncate":
                continue
        examples.append(_example(input_ids, labels, max_length))
        rows.append(row)
        straddling += straddles

    faults = [
        (texts.oversized, f"more than {_LONGEST_TEXT:,} characters, too many for", "drop", "characters"),
        (no_room, "a prompt that leaves no room for a response in", "drop", "tokens"),
        (over if too_long == "error" else [], "more tokens than", "truncate or drop", "tokens"),
    ]
    if too_long != "drop" and any(found for found, *_ in faults):
        raise RecipeError(_refusal(data, max_length, faults))
    dropped = len(data.rows) - len(examples) - texts.spelled
    if not examples:
        if dropped:
            raise RecipeError(f"{data.source}: no row fits data.max_length={max_length}; raise it")
        raise RecipeError(f"{data.source}: every chat spells a special token of the tokenizer in its messages")
    truncated = len(over) if too_long == "truncate" else 0
    return EncodedExamples(examples, rows, truncated, dropped, straddling, texts.spelled)


def _example(input_ids: tuple[int, ...], labels: list[list[int]], max_length: int) -> Example:
    """labels: half-open ranges in order, of which the first begins before `max_length`."""
    kept = [(start, min(stop, max_length)) for start, stop in labels if start < max_length]
    gaps = tuple((stop, start) for (_, stop), (start, _) in pairwise(kept) if stop < start)
    return Example(input_ids[: max(kept[-1][1], kept[0][0])], kept[0][0], gaps, cut=labels[-1][1] > max_length)


def _tokens_before_a_text(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """BOS or nothing, as a rule. What some tokenizers add after a text is not taken: `encode` puts EOS there."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    added = takewhile(lambda pair: pair[1], zip(probe["input_ids"], probe["special_tokens_mask"], strict=True))
    return tuple(token for token, _ in added)


def first_response(tokenizer: PreTrainedTokenizerBase, data: Rows, template: str, row: int) -> tuple[str, str]:
    """The text before a row's first response, and that response, without an end-of-turn token."""
    text, spans = _Texts(tokenizer, data, template).render(row)
    if data.layout != "chat":
        return text[: spans[0][0]], text[spans[0][0] :]
    answer = next(turn["content"] for turn in data.rows[row]["messages"] if turn["role"] == "assistant")
    return text[: spans[0][0]], answer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, layout: str | None) -> list[int]:
    """The tokens of a prompt that stands alone, as `encode` makes them of one before a response.

    layout: of the rows, of which "chat" tells that the prompt is a chat template's, with special tokens in it.
    """
    is_chat = layout == "chat"
    its = tokenizer(prompt, add_special_tokens=False, split_special_tokens=not is_chat, verbose=False)["input_ids"]
    return its if is_chat else [*_tokens_before_a_text(tokenizer), *its]


class _Texts:
    """The texts of `data`, with the spans of their responses in characters, and what of them is not tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Rows, template: str) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._template = template
        self._chat = ChatTemplate(tokenizer) if data.layout == "chat" else None
        self.oversized: list[tuple[int, int]] = []  # (row, characters)
        self.spelled = 0  # chats that spell a special token

    def render(self, row: int) -> tuple[str, list[Span]]:
        """A row's text and the spans of its responses, each from the spaces before it on."""
        columns = self._data.rows[row]
        if self._chat is not None:
            try:
                text, spans = self._chat.render(columns["messages"])
            except RecipeError as error:
                raise RecipeError(f"{self._data.source}: {self._data.places[row]}: {error}") from None
        else:
            if self._data.layout == "alpaca":
                prompt, response = format_prompt(columns, self._template), columns["output"]
            else:
                prompt, response = columns["prompt"], columns["completion"]
            text, spans = prompt + response, [(len(prompt), len(prompt) + len(response))]
        return text, [(len(text[:start].rstrip(" ")), stop) for start, stop in spans]

    def tokenize(self) -> Iterator[tuple[int, list[int], list[Span], bool]]:
        """For each row that can be: its index, tokens, label ranges in tokens, whether a token straddles a boundary.

        Byte-level BPE may leave spaces out of a token's offsets. That moves no boundary: no space stands before one.
        """
        for first in range(0, len(self._data.rows), _ROWS_A_CALL):
            rows, texts, spans = [], [], []
            for row in range(first, min(first + _ROWS_A_CALL, len(self._data.rows))):
                if self._chat is not None and self._chat.spells_special_token(self._data.rows[row]["messages"]):
                    self.spelled += 1
                    continue
                text, its_spans = self.render(row)
                if len(text) > _LONGEST_TEXT:
                    self.oversized.append((row, len(text)))
                    continue
                rows.append(row)
                texts.append(text)
                spans.append(its_spans)
            if not texts:
                continue
            encoded = self._tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=self._chat is None,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,  # no warning about the tokenizer's model_max_length: `encode` has its own
            )
            for row, ids, offsets, its_spans in zip(
                rows, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
            ):
                yield row, ids, *_label_ranges(offsets, its_spans)


def _label_ranges(offsets: list[Span], spans: list[Span]) -> tuple[list[Span], bool]:
    """The ranges of tokens that lie within `spans`, at least one, and whether a token lies across the edge of one."""
    ranges = []
    straddles = False
    token = 0
    for start, stop in spans:
        while token < len(offsets) and offsets[token][0] < start:
            token += 1
        straddles |= token > 0 and offsets[token - 1][1] > start
        first = token
        while token < len(offsets) and offsets[token][1] <= stop:
            token += 1
        straddles |= token < len(offsets) and offsets[token][0] < stop
        if first < token:
            ranges.append((first, token))
    return ranges or [(token, token)], straddles


def _refusal(data: Rows, max_length: int, faults: list[tuple[list[tuple[int, int]], str, str, str]]) -> str:
    return "\n".join(
        f"{data.source}: {len(found):,} row{'s have' if len(found) > 1 else ' has'} {fault} "
        f"data.max_length={max_length} (first: {data.places[found[0][0]]}, {found[0][1]:,} {unit}); "
        f"{'split it' if unit == 'characters' else 'raise data.max_length'} or set data.too_long={remedy}"
        for found, fault, remedy, unit in faults
        if found
    )
