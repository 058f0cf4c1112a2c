from lorasp.data.alpaca import format_prompt

ROWS = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello"},
]


def test_the_alpaca_template_is_stanfords():
    assert format_prompt(ROWS[0], "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert format_prompt(ROWS[1], "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nGreet.\n\n### Response:"
    )


def test_the_short_template_and_braces_in_a_row():
    assert format_prompt(ROWS[0], "short") == "Add.\n1 2\n### Response:\n"
    assert format_prompt({"instruction": "{input}{x}", "input": ""}, "short") == "{input}{x}\n### Response:\n"
