"""The instruction set that the quickstart ships."""

import runpy
from pathlib import Path

from lorasp.data.rows import read_rows
from lorasp.recipe import Source

FOLDER = Path(__file__).parents[1] / "recipes" / "data"


def rows(name: str) -> list[dict[str, str]]:
    return read_rows(Source(path=str(FOLDER / name)), layout="alpaca", empty_output="error").rows


def test_the_files_are_what_their_generator_writes():
    generator = runpy.run_path(str(FOLDER / "make_quickstart.py"))
    train, held_out = generator["quickstart_rows"]()
    assert (FOLDER / "quickstart_train.json").read_bytes() == generator["render"](train).encode()
    assert (FOLDER / "quickstart_held_out.json").read_bytes() == generator["render"](held_out).encode()


def test_no_held_out_answer_or_prompt_is_trained():
    train, held_out = rows("quickstart_train.json"), rows("quickstart_held_out.json")
    assert (len(train), len(held_out)) == (640, 128)
    answers = [row["output"] for row in train + held_out]
    assert len(set(answers)) == len(answers)
    prompts = {(row["instruction"], row["input"]) for row in train}
    assert not prompts & {(row["instruction"], row["input"]) for row in held_out}


def test_every_word_of_a_held_out_answer_is_trained():
    words = {word for row in rows("quickstart_train.json") for word in row["output"].split()}
    assert {word for row in rows("quickstart_held_out.json") for word in row["output"].split()} <= words
