import io

from rich.console import Console

from lorasp.data.examples import Example
from lorasp.data.inspection import as_trained, histogram
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
