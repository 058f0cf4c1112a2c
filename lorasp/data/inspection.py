"""What a person wants to see of data before training on it: counts, lengths, packing, and a few rows as trained."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lorasp.data.examples import Example
from lorasp.data.load import RunData
from lorasp.data.order import SampleOrder
from lorasp.data.packing import pack
from lorasp.recipe import Recipe

_BINS = 12
_BAR = 40  # characters of the fullest bin's bar
_LABEL_STYLE = "bold green"
_PROMPT_STYLE = "dim"


def show(recipe: Recipe, data: RunData, console: Console, rows: int) -> None:
    """Prints everything, with the first `rows` examples of the run's first step."""
    order = data.order(recipe)
    for line in data.describe():
        console.print(line, markup=False, highlight=False)
    console.print(counts(data))
    for line in (*histogram(data.train.examples, recipe.data.max_length), "", *batching(recipe, data, order)):
        console.print(line, markup=False, highlight=False)
    legend = "in colour" if console.is_terminal else "between ⟦ and ⟧"
    shown = [row for unit in order.global_batch(0) for row in unit][:rows]
    for number, row in enumerate(shown, start=1):
        example = data.train.examples[row]
        console.print(
            f"\nexample {number}: {len(example.input_ids)} tokens, of which {example.label_count} labels {legend}",
            markup=False,
            highlight=False,
        )
        console.print(as_trained(example, data.tokenizer, coloured=console.is_terminal), soft_wrap=True)


def counts(data: RunData) -> Table:
    """A column a data set."""
    sets = {"train": data.train} | ({"held out": data.held_out} if data.held_out else {})
    table = Table("", *sets, box=None)
    rows = {
        "examples": lambda found: f"{len(found.examples):,}",
        "tokens": lambda found: f"{found.token_count:,}",
        "labels": lambda found: f"{sum(example.label_count for example in found.examples):,}",
        "share of labels": lambda found: (
            f"{sum(example.label_count for example in found.examples) / found.token_count:.1%}"
        ),
        "tokens an example": lambda found: f"{found.token_count / len(found.examples):.1f}",
        "longest": lambda found: f"{max(len(example.input_ids) for example in found.examples):,}",
        "cut": lambda found: f"{sum(part.encoded.truncated for part in found.parts):,}",
        "across an edge": lambda found: f"{sum(part.encoded.straddling for part in found.parts):,}",
        "dropped": lambda found: (
            f"{sum(p.rows.dropped_empty + p.encoded.spelled + p.encoded.dropped for p in found.parts):,}"
        ),
    }
    for name, value in rows.items():
        table.add_row(name, *map(value, sets.values()))
    return table


def histogram(examples: Sequence[Example], max_length: int) -> list[str]:
    """Lengths of the examples, a line a range of tokens, up to the longest."""
    lengths = [len(example.input_ids) for example in examples]
    width = -(-min(max_length, max(lengths)) // _BINS)
    found = [0] * -(-max(lengths) // width)
    for length in lengths:
        found[(length - 1) // width] += 1
    lines = ["", "lengths of the training examples, in tokens:"]
    for index, count in enumerate(found):
        bar = "█" * round(_BAR * count / max(found)) or ("▏" if count else "")
        lines.append(f"{index * width + 1:>6,} to {(index + 1) * width:<6,} {count:>9,} {bar}".rstrip())
    return lines


def batching(recipe: Recipe, data: RunData, order: SampleOrder) -> Iterator[str]:
    """How the examples fill packs and batches, of the run's first epoch."""
    lengths = [len(data.train.examples[row].input_ids) for row in order.examples_of(0)]
    size, capacity = recipe.training.micro_batch_size, recipe.data.max_length
    padded = sum(size * max(lengths[at : at + size]) for at in range(0, len(lengths) - size + 1, size)) or sum(lengths)
    whole = len(lengths) // size * size or len(lengths)
    packs = len(pack(lengths, capacity))
    units = "packs" if recipe.data.packing else "examples"
    yield (
        f"{order.total_steps:,} steps of {order.global_batch_size} {units}; an epoch visits {len(lengths):,} examples"
    )
    yield (
        f"packing to {capacity} tokens {'makes' if recipe.data.packing else 'would make'} {packs:,} packs an epoch, "
        f"{sum(lengths) / (packs * capacity):.1%} full"
    )
    yield (
        f"no padding is computed; padded to their longest, micro batches of {size} would be "
        f"{sum(lengths[:whole]) / padded:.1%} real tokens"
    )


def as_trained(example: Example, tokenizer: PreTrainedTokenizerBase, *, coloured: bool) -> Text:
    """The example's tokens, parted by "·", line breaks shown; labels in colour, or between ⟦ and ⟧."""
    labels = set(example.label_indices())
    text = Text()
    tokens = tokenizer.convert_ids_to_tokens(list(example.input_ids))
    for index, token in enumerate(tokens):
        piece = _readable(token, tokenizer)
        is_label = index in labels
        if not coloured:
            if is_label and index - 1 not in labels:
                piece = "⟦" + piece
            if is_label and index + 1 not in labels:
                piece += "⟧"
        text.append(piece, style=_LABEL_STYLE if is_label else _PROMPT_STYLE)
        if index + 1 < len(tokens):
            text.append("\n" if piece.rstrip("⟧").endswith("⏎") else "·", style=_PROMPT_STYLE)
    return text


def _readable(token: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token's text with its leading space, which decoding a single one may lose; bytes of no character as �."""
    text = tokenizer.convert_tokens_to_string([token])
    if token.startswith("▁") and not text.startswith(" "):
        text = " " + text
    return text.replace("\n", "⏎").replace("\t", "⇥")
