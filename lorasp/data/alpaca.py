"""The prompts of instruction data in Alpaca's layout: `instruction`, `input` (may be empty), `output`."""

# The model sees the row's text after one of these; the response follows the last character without a separator.
# "alpaca" is Stanford Alpaca's wording to the letter (train.py, PROMPT_DICT), and so ends in ":" without a newline.
# "short" is the least that still says where the response begins: 4 tokens where "alpaca" spends about 40.
_PROMPTS = {
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:",
    ),
    "short": (
        "{instruction}\n{input}\n### Response:\n",
        "{instruction}\n### Response:\n",
    ),
}


def format_prompt(row: dict[str, str], template: str) -> str:
    """The text before the response; `template` is "alpaca" or "short", each with a form for rows without input."""
    with_input, without_input = _PROMPTS[template]
    return (with_input if row["input"] else without_input).format_map(row)
