"""Sentence pairs to translate: two files of a line each, or a data set of the hub laid out as `wmt16` is.

Local data is the old Hugging Face layout: `train.source` and `train.target`, `val.*`, `test.*` in a directory, UTF-8,
a sentence a line, aligned by line.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lorasp.data.examples import EncodedExamples, Example
from lorasp.data.rows import Rows
from lorasp.data.sources import hub_commit, is_on_hub, read_source, read_text
from lorasp.recipe import RecipeError, Source

PREFIX = "translate English to Romanian: "  # T5 was pretrained with it
_LANGUAGES = ("en", "ro")  # from, into: keys of the hub's rows
_FILES = {"validation": "val"}  # where a split's files are called otherwise
_ENCODED_AT_ONCE = 1000  # sentences


def read_pairs(source: Source, *, empty_output: str) -> Rows:
    """The pairs of `source`, rows {"source", "target"}; its `limit` is counted before empty ones are dropped.

    empty_output ("drop", "error" or "keep"): of a pair of which either side is empty. Raises RecipeError naming
    file and line.
    """
    directory = Path(source.path)
    if directory.is_dir():
        placed, places, commit = _read_directory(directory, source), "line", None
    elif directory.is_file():
        raise RecipeError(
            f"{source.path}: is a file; pairs stand in two, {source.split}.source and {source.split}.target: give "
            f"their directory"
        )
    else:
        is_on_hub(source)  # or it says what is wrong with the path
        placed, places, commit = _read_hub(source), "row", hub_commit(source)
    empty = [number for number, pair in placed if not all(side.strip() for side in pair)]
    name = f"{source.path}, {source.split}" if directory.is_dir() else source.path
    if empty and empty_output == "error":
        numbers = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        raise RecipeError(
            f"{name}: {len(empty):,} pair{'s have' if len(empty) > 1 else ' has'} an empty side ({places} {numbers}); "
            f"fill them in, or set data.empty_output=drop to leave them out"
        )
    if len(empty) == len(placed):
        raise RecipeError(f"{name}: has no pair with text on both sides")
    kept = placed
    if empty_output != "keep":
        kept = [(number, pair) for number, pair in placed if all(side.strip() for side in pair)]
    return Rows(
        layout="pairs",
        rows=[{"source": pair[0], "target": pair[1]} for _, pair in kept],
        places=[f"{places} {number}" for number, _ in kept],
        source=name,
        dropped_empty=len(placed) - len(kept),
        commit=commit,
    )


_Numbered = list[tuple[int, tuple[str, str]]]  # (line or row, from 1; source and target)


def _read_directory(directory: Path, source: Source) -> _Numbered:
    stem = _FILES.get(source.split, source.split)
    files = [directory / f"{stem}.{side}" for side in ("source", "target")]
    for file in files:
        if not file.is_file():
            there = ", ".join(sorted(path.name for path in directory.glob("*.source"))) or "no .source file"
            raise RecipeError(f"{file}: no such file; {directory} holds {there}")
    sides = [_lines(file) for file in files]
    if len(sides[0]) != len(sides[1]):
        raise RecipeError(
            f"{files[0]} has {len(sides[0]):,} lines and {files[1].name} {len(sides[1]):,}; a pair is the same line "
            f"of both, so give as many"
        )
    end = None if source.limit is None else source.skip + source.limit
    numbered = list(enumerate(zip(*sides, strict=True), start=1))[source.skip : end]
    if not numbered:
        raise RecipeError(
            f"{files[0]}: " + (f"has no lines behind the first {source.skip:,}" if sides[0] else "is empty")
        )
    return numbered


def _lines(file: Path) -> list[str]:
    text = read_text(file)
    # Not splitlines(): that also cuts at U+2028 and its like, within a sentence.
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _read_hub(source: Source) -> _Numbered:
    pairs: _Numbered = []
    for number, (place, row) in enumerate(read_source(source), start=source.skip + 1):
        texts = row.get("translation") if isinstance(row, dict) else None
        if not isinstance(texts, dict) or not all(isinstance(texts.get(its), str) for its in _LANGUAGES):
            raise RecipeError(
                f"{source.path}: {place} holds no translation of {_LANGUAGES[0]} into {_LANGUAGES[1]} ({row!r:.80}); "
                f"choose the data set's pair of languages (subset: ro-en)"
            )
        pairs.append((number, tuple(texts[its] for its in _LANGUAGES)))
    return pairs


def encode_pairs(tokenizer: PreTrainedTokenizerBase, data: Rows, max_length: int, too_long: str) -> EncodedExamples:
    """An example a pair: the source with its prefix and EOS is the prompt, the target with EOS are the labels.

    At most `max_length` tokens on either side. `too_long`: "truncate" cuts the source before its EOS and the target
    with its EOS (the model must not learn to stop there), "drop" leaves the pair out, "error" refuses. Special tokens
    spelled out in a text are plain text. Raises RecipeError for a tokenizer without EOS, too.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise RecipeError("the tokenizer has no EOS token, so no translation could end; set eos_token in its config")
    examples: list[Example] = []
    rows: list[int] = []
    over: list[tuple[int, int]] = []  # (row, tokens of its longer side)
    sides = zip(
        _encode(tokenizer, [PREFIX + row["source"] for row in data.rows]),
        _encode(tokenizer, [row["target"] for row in data.rows]),
        strict=True,
    )
    for row, (source, target) in enumerate(sides):
        source, target = (*source, eos), (*target, eos)
        cut = len(target) > max_length
        if max(len(source), len(target)) > max_length:
            over.append((row, max(len(source), len(target))))
            if too_long != "truncate":
                continue
            if len(source) > max_length:
                source = (*source[: max_length - 1], eos)
            target = target[:max_length]
        examples.append(Example(source + target, prompt_length=len(source), cut=cut))
        rows.append(row)
    if over and too_long == "error":
        first, tokens = over[0]
        raise RecipeError(
            f"{data.source}: {len(over):,} pair{'s have' if len(over) > 1 else ' has'} a side of more tokens than "
            f"data.max_length={max_length} (first: {data.places[first]}, {tokens:,} tokens); raise data.max_length or "
            f"set data.too_long=truncate or drop"
        )
    if not examples:
        raise RecipeError(f"{data.source}: no pair fits data.max_length={max_length}; raise it")
    truncated = len(over) if too_long == "truncate" else 0
    return EncodedExamples(examples, rows, truncated, len(data.rows) - len(examples), straddling=0)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        part = texts[start : start + _ENCODED_AT_ONCE]
        how = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        found += tokenizer(part, **how, verbose=False)["input_ids"]
    return found


@dataclass(frozen=True)
class PairBatch:
    """Pairs one after another: a row of S source tokens and one of T target tokens, all of them labels; no padding.

    A batch of no pairs is one source token and one unlabelled target token, as `Batch` has it.
    """

    input_ids: torch.Tensor  # int64 [1, S]
    decoder_input_ids: torch.Tensor  # int64 [1, T]: the targets one to the right, -1 where the decoder starts
    label_positions: torch.Tensor  # int64 [T]: all of them
    labels: torch.Tensor  # int64 [T]
    source_lengths: tuple[int, ...]
    label_counts: tuple[int, ...]  # the targets' lengths
    rows: tuple[int, ...]  # which examples of the data set
    keys: tuple[int, ...] = ()  # of each example in this step, for its dropout masks; none outside training

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each pair, both sides together."""
        return tuple(map(sum, zip(self.source_lengths, self.label_counts, strict=True)))

    def model_inputs(self, device: torch.device | str) -> dict[str, object]:
        """What `Seq2SeqLM.forward` takes, with the tensors on `device`."""
        tensors = {
            "input_ids": self.input_ids,
            "decoder_input_ids": self.decoder_input_ids,
            "positions": self.label_positions,
            "labels": self.labels,
        }
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return {
            **moved,
            "source_lengths": self.source_lengths or (1,),
            "target_lengths": self.label_counts or (1,),
            "example_keys": self.keys,
        }


def collate_pairs(examples: list[Example], rows: list[int]) -> PairBatch:
    """The batch of the pairs `examples[row]` for each of `rows`, in that order."""
    chosen = [examples[row] for row in rows]
    sources = [example.input_ids[: example.prompt_length] for example in chosen]
    targets = [example.input_ids[example.prompt_length :] for example in chosen]
    labels = list(chain(*targets))
    return PairBatch(
        input_ids=torch.tensor([list(chain(*sources)) or [0]]),
        decoder_input_ids=torch.tensor([list(chain(*((-1, *target[:-1]) for target in targets))) or [-1]]),
        label_positions=torch.arange(len(labels)),
        labels=torch.tensor(labels, dtype=torch.int64),  # an empty list would be float32
        source_lengths=tuple(map(len, sources)),
        label_counts=tuple(map(len, targets)),
        rows=tuple(rows),
    )
