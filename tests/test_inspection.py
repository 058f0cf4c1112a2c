import io
import json
import runpy

import pytest
from rich.console import Console

from lorasp.data.examples import Example
from lorasp.data.inspection import as_trained, counts, histogram
from lorasp.data.load import load_data
from lorasp.recipe import Recipe, RecipeError
from tests.distributed.launching import ROOT
from tests.test_examples import byte_level
from tests.tiny_models import BOS, EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()


def example(text: str, prompt: int, unlabelled=()) -> Example:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return Example((BOS, *ids, EOS), prompt, unlabelled)


def test_without_a_terminal_each_run_of_labels_stands_between_marks():
    shown = as_trained(example("a b\ncd", 2, ((4, 6),)), TOKENIZER, coloured=False)
    assert shown.plain == "<s>·a·⟦ ·b⟧·⏎\nc·⟦d·</s>⟧"


def test_on_a_terminal_labels_are_coloured_and_nothing_is_marked():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", width=80)
    console.print(as_trained(example("ab", 2), TOKENIZER, coloured=True))
    shown = stream.getvalue()
    assert "⟦" not in shown
    assert "\x1b[1;32mb\x1b[0m" in shown and "\x1b[2ma\x1b[0m" in shown


def test_brackets_of_the_data_are_no_markup():
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    console.print(as_trained(example("[red]", 1), TOKENIZER, coloured=False))
    assert stream.getvalue().strip() == "<s>·⟦[·r·e·d·]·</s>⟧"


def test_every_example_is_counted_in_the_range_of_its_length():
    examples = [Example(tuple(range(length)), 1) for length in (1, 2, 2, 24, 23, 13)]
    lines = histogram(examples, max_length=24)[2:]
    assert [line.split()[:4] for line in lines if not line.split()[3] == "0"] == [
        ["1", "to", "2", "3"],
        ["13", "to", "14", "1"],
        ["23", "to", "24", "2"],
    ]
    assert len(lines) == 12 and sum(int(line.split()[3]) for line in lines) == 6


def test_random_tokens_are_not_shown(monkeypatch):
    arguments = ["inspect_data.py", str(ROOT / "recipes" / "rehearsal_7b.yaml"), "data.train=random"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(RecipeError, match="data.train: random tokens are no rows to look at"):
        runpy.run_path(str(ROOT / "launch" / "inspect_data.py"))["main"]()


def test_responses_that_lose_characters_to_a_token_of_the_prompt_are_counted(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "a", "input": "", "output": text} for text in ('"It is"', "It is")]))
    settings = Recipe(model={"path": "unused"}, data={"train": str(path), "template": "alpaca"})
    found = load_data(settings, byte_level())
    (line,) = found.describe()
    assert line.endswith("; 1 with a token across the edge of a response, which is not trained")
    assert found.report()["train"]["straddling"] == 1
    stream = io.StringIO()
    Console(file=stream, width=80).print(counts(found))
    assert ["across", "an", "edge", "1"] in [line.split() for line in stream.getvalue().splitlines()]
