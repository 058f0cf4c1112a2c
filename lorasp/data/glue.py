"""GLUE's rows, checked: the archives' TSV files, or the hub's copy; in tokens, and as batches without padding.

The files are read without quoting, as they were written: a quotation mark is a character of the sentence. A byte-order
mark (MRPC's) is none.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorasp.data.order import SampleOrder
from lorasp.data.sources import hub_commit, hub_snapshot, read_source, read_text
from lorasp.glue import GLUE, GlueTask
from lorasp.hashing import stream_key
from lorasp.recipe import Data, Recipe, RecipeError, Source

_HIGHEST_SCORE = 5.0  # of STS-B's, from 0


@dataclass(frozen=True)
class GlueRow:
    """label: the place of its name in `GlueTask.labels`, or a score."""

    place: str
    sentences: tuple[str, ...]
    label: int | float

    @property
    def content(self) -> bytes:
        return json.dumps([*self.sentences, self.label]).encode()


@dataclass(frozen=True)
class GlueExample:
    """A row in tokens, special ones included; label as of `GlueRow`."""

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...]  # 0, and 1 from the second sentence on where the model tells them apart
    label: int | float
    label_count: int = 1  # a row weighs 1 in the mean of a global batch


@dataclass(frozen=True)
class GlueSet:
    """The rows of one split. incomplete: rows of the file that end early, left out; truncated: examples that lost
    tokens to max_length.
    """

    source: str
    rows: list[GlueRow]
    examples: list[GlueExample]
    truncated: int
    incomplete: int
    commit: str | None

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the rows."""
        return hashlib.sha256(b"\n".join(row.content for row in self.rows)).hexdigest()

    @property
    def labels(self) -> list[int | float]:
        return [row.label for row in self.rows]


@dataclass(frozen=True)
class GlueBatch:
    """Examples one after another in a single row, T tokens, no padding; see `data.batches.Batch`. Of no examples it is
    one token that nothing classifies.
    """

    input_ids: torch.Tensor  # int64 [1, T], as are the next two
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor
    firsts: torch.Tensor  # int64 [examples], where each begins
    labels: torch.Tensor  # [examples], int64, or fp32 of scores
    lengths: tuple[int, ...]
    label_counts: tuple[int, ...]
    rows: tuple[int, ...]
    keys: tuple[int, ...] = ()

    def model_inputs(self, device: torch.device | str) -> dict[str, Any]:
        """What `SequenceClassifier.forward` takes, with the tensors on `device`."""
        names = ("input_ids", "position_ids", "token_type_ids", "firsts", "labels")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return {**moved, "example_lengths": self.lengths, "example_keys": self.keys}


def collate(examples: Sequence[GlueExample], rows: Sequence[int], *, is_regression: bool) -> GlueBatch:
    """The batch of `examples[row]` for each of `rows`, in that order."""
    chosen = [examples[row] for row in rows]
    lengths = tuple(len(example.input_ids) for example in chosen)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return GlueBatch(
        input_ids=torch.tensor([[token for example in chosen for token in example.input_ids] or [0]]),
        position_ids=torch.tensor([[place for length in lengths for place in range(length)] or [0]]),
        token_type_ids=torch.tensor([[kind for example in chosen for kind in example.token_type_ids] or [0]]),
        firsts=torch.tensor(starts, dtype=torch.int64),
        labels=torch.tensor(
            [example.label for example in chosen], dtype=torch.float32 if is_regression else torch.int64
        ),
        lengths=lengths,
        label_counts=(1,) * len(chosen),
        rows=tuple(rows),
    )


@dataclass(frozen=True)
class GlueData:
    """The rows that are trained, and those that are scored: `reported`, of MNLI also `reported_mismatched`, and with
    `data.selection` also `selection`, rows of train on which settings may be chosen.
    """

    task: str
    train: GlueSet
    scored: dict[str, GlueSet]
    tokenizer: PreTrainedTokenizerBase

    def order(self, recipe: Recipe) -> SampleOrder:
        """The order in which the run visits the training examples."""
        return SampleOrder(
            [len(example.input_ids) for example in self.train.examples],
            seed=recipe.seed,
            epochs=recipe.training.epochs,
            global_batch_size=recipe.training.global_batch_size,
            max_steps=recipe.training.max_steps,
            group_by_length=recipe.data.group_by_length,
        )

    def describe(self) -> list[str]:
        lines = []
        for name, its in self._sets():
            line = f"{name.replace('_', ', ')}: {len(its.rows):,} rows of {its.source} ({self.task})"
            if its.incomplete:
                line += f"; {its.incomplete:,} that end early left out"
            if its.truncated:
                line += f"; {its.truncated:,} cut (data.max_length)"
            lines.append(line)
        return lines

    def report(self) -> dict[str, Any]:
        """The data section of report.json: an entry a set."""
        return {
            name: {
                "source": its.source,
                **({} if its.commit is None else {"commit": its.commit}),
                "digest": its.digest,
                "layout": self.task,
                "rows": len(its.rows),
                "tokens": sum(len(example.input_ids) for example in its.examples),
                "incomplete": its.incomplete,
                "truncated": its.truncated,
            }
            for name, its in self._sets()
        }

    def samples(self, count: int) -> list[dict[str, str]]:
        """None: a classifier answers nothing."""
        return []

    def _sets(self) -> Iterator[tuple[str, GlueSet]]:
        yield "train", self.train
        yield from self.scored.items()


def download_glue(data: Data) -> None:
    """Puts the hub's copy into its cache, where `data.train` names that. Raises RecipeError."""
    if not Path(data.train).is_dir():
        hub_snapshot(Source(path=data.train, revision=data.revision), download=True)


def load_glue(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, tells_sentences_apart: bool) -> GlueData:
    """The data of the recipe's task. tells_sentences_apart: whether the model has token types for that.

    Raises RecipeError naming the file and the line at fault.
    """
    task, data = GLUE[recipe.task], recipe.data
    read = _of_hub if not Path(data.train).is_dir() else _of_directory

    def encoded(source: str, rows: list[GlueRow], incomplete: int, commit: str | None) -> GlueSet:
        examples, truncated = _encode(tokenizer, rows, data.max_length, tells_sentences_apart)
        return GlueSet(source, rows, examples, truncated, incomplete, commit)

    source, rows, *rest = read(task, recipe, "train", "train")
    scored = {}
    if data.selection is not None:
        rows, apart = split_off(rows, data.selection, source)
        scored["selection"] = encoded(source, apart, 0, rest[-1])
    train = encoded(source, rows, *rest)
    for name, file, split in task.dev:
        scored[name] = encoded(*read(task, recipe, file, split))
    for name, its in scored.items():
        if task.is_regression and len(its.rows) < 2:
            where = "data.selection" if name == "selection" else its.source
            raise RecipeError(f"{where}: gives one row to score, and a correlation is of two or more; give more")
    return GlueData(recipe.task, train, scored, tokenizer)


def split_off(rows: list[GlueRow], share: float, source: str) -> tuple[list[GlueRow], list[GlueRow]]:
    """(the rows to train on, those to choose settings on: about `share` of all). Rows of equal texts stay together.

    The seed has no part in it: runs of all seeds, methods and learning rates are chosen on the same rows.
    Raises RecipeError if either would be empty.
    """
    keys = [stream_key("selection", json.dumps(row.sentences)) for row in rows]
    wanted = round(len(rows) * share)
    last = sorted(keys)[max(0, wanted - 1)]
    train = [row for row, key in zip(rows, keys, strict=True) if key > last]
    if not (wanted and train):
        raise RecipeError(f"data.selection: {share:g} of the {len(rows)} rows of {source} leaves one side empty")
    return train, [row for row, key in zip(rows, keys, strict=True) if key <= last]


def _of_hub(task: GlueTask, recipe: Recipe, file: str, split: str) -> tuple[str, list[GlueRow], int, str | None]:
    source = Source(path=recipe.data.train, revision=recipe.data.revision, subset=recipe.task, split=split)
    where = f"{source.path}, {recipe.task}, {split}"
    rows = []
    for place, value in read_source(source):
        columns = (*task.hub_sentences, "label")
        if not isinstance(value, dict) or any(column not in value for column in columns):
            raise RecipeError(f"{where}: {place} lacks one of the columns {', '.join(columns)}; is it GLUE's copy?")
        label = value["label"]
        if not task.is_regression and label in range(len(task.labels)):
            label = task.labels[label]
        rows.append(_row(task, f"{where}: {place}", [value[column] for column in task.hub_sentences], label))
    return where, rows, 0, hub_commit(source)


def _of_directory(task: GlueTask, recipe: Recipe, file: str, split: str) -> tuple[str, list[GlueRow], int, None]:
    root = Path(recipe.data.train)
    path = next((p for p in (root / task.directory / f"{file}.tsv", root / f"{file}.tsv") if p.is_file()), None)
    if path is None:
        raise RecipeError(
            f"data.train: {root} holds neither {task.directory}/{file}.tsv nor {file}.tsv, which task {recipe.task} "
            f"needs; give the directory of GLUE's archives, or their copy on the hub (nyu-mll/glue)"
        )
    lines = _lines(path)
    if task.has_header:
        if not lines:
            raise RecipeError(f"{path}: is empty; its first line should name the columns")
        names = lines.pop(0)[1]
        missing = [column for column in (*task.sentences, task.label) if column not in names]
        if missing:
            raise RecipeError(
                f"{path}: line 1 names no column {missing[0]!r}; task {recipe.task} reads "
                f"{' and '.join(task.sentences)}, with {task.label}, and there are {', '.join(names[:12])}"
            )
        places, count = [names.index(column) for column in (*task.sentences, task.label)], len(names)
    else:
        places, count = [*task.sentences, task.label], max(*task.sentences, task.label) + 1
    rows, incomplete = [], 0
    for number, cells in lines:
        if task.may_end_early and len(cells) < count:
            incomplete += 1
            continue
        if len(cells) != count:
            raise RecipeError(f"{path}: line {number} has {len(cells)} columns, not {count}, between its tabs")
        *sentences, label = (cells[place] for place in places)
        rows.append(_row(task, f"{path}: line {number}", sentences, label))
    if not rows:
        raise RecipeError(f"{path}: has no rows")
    return str(path), rows, incomplete, None


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """(number from 1, cells) of each line that is not empty."""
    lines = enumerate(read_text(path).split("\n"), start=1)  # not splitlines(): sentences may hold other line ends
    return [(number, line.removesuffix("\r").split("\t")) for number, line in lines if line.strip()]


def _row(task: GlueTask, place: str, sentences: list[Any], label: Any) -> GlueRow:
    for number, sentence in enumerate(sentences, start=1):
        if not isinstance(sentence, str) or not sentence.strip():
            which = f"sentence {number} of a pair" if len(sentences) > 1 else "the sentence"
            raise RecipeError(f"{place}: {which} is empty")
    if task.is_regression:
        try:
            score = float(label)
        except (TypeError, ValueError):
            score = -1.0
        if not 0 <= score <= _HIGHEST_SCORE:
            raise RecipeError(f"{place}: its score is {label!r:.40}, not a number from 0 to {_HIGHEST_SCORE:g}")
        return GlueRow(place, tuple(sentences), score)
    if label not in task.labels:
        raise RecipeError(f"{place}: its label is {label!r:.40}, not one of {', '.join(task.labels)}")
    return GlueRow(place, tuple(sentences), task.labels.index(label))


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: list[GlueRow], max_length: int, tells_sentences_apart: bool
) -> tuple[list[GlueExample], int]:
    """(examples, how many of them were cut). Of a pair that is too long, the longer sentence loses tokens first."""
    columns = [list(column) for column in zip(*(row.sentences for row in rows), strict=True)]
    how = {"return_token_type_ids": True, "return_attention_mask": False, "verbose": False}
    how["split_special_tokens"] = True  # "[SEP]" in a sentence is text
    around = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    if max_length <= around:
        raise RecipeError(
            f"data.max_length={max_length} leaves no room for a word beside the {around} tokens that the tokenizer "
            f"puts around it; raise it"
        )
    encoded = tokenizer(*columns, **how)
    examples, truncated = [], 0
    for index, row in enumerate(rows):
        ids, kinds = encoded["input_ids"][index], encoded["token_type_ids"][index]
        if len(ids) > max_length:
            cut = tokenizer(*row.sentences, **how, truncation="longest_first", max_length=max_length)
            ids, kinds, truncated = cut["input_ids"], cut["token_type_ids"], truncated + 1
        kinds = kinds if tells_sentences_apart else [0] * len(ids)
        examples.append(GlueExample(tuple(ids), tuple(kinds), row.label))
    return examples, truncated
