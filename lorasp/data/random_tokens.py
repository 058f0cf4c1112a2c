"""Rows of seeded random tokens, all of one length: what a step costs, without any text or tokenizer."""

from lorasp.data.examples import EncodedExamples, Example
from lorasp.data.load import DataSet, Part, RunData
from lorasp.data.rows import Rows
from lorasp.hashing import random_int64, stream_key
from lorasp.recipe import Recipe

_ROWS = 1000


def random_tokens(recipe: Recipe, vocabulary: int) -> RunData:
    """`data.limit` (1,000) rows of `data.max_length` tokens, each but the first labelled."""
    count, length = recipe.data.limit or _ROWS, recipe.data.max_length
    examples = []
    for row in range(count):
        key = stream_key(recipe.seed, "random tokens", row)
        examples.append(Example(tuple((random_int64(key, length) % vocabulary).tolist()), prompt_length=1))
    rows = Rows(
        layout="tokens",
        rows=[{"tokens": list(example.input_ids)} for example in examples],
        places=[f"row {row}" for row in range(1, count + 1)],
        source="random",
    )
    encoded = EncodedExamples(examples, list(range(count)), truncated=0, dropped=0, straddling=0)
    return RunData(train=DataSet((Part(rows, encoded),)), held_out=None, tokenizer=None, template="")
