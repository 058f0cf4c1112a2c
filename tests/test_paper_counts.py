"""Trained parameters of the paper's 18 rows: what our models have, against the architectures' own arithmetic."""

import re

import pytest

from lorasp.comparison.counts import count_row, format_counts
from lorasp.comparison.notes import NOTES
from lorasp.reporting.paper import MODELS, TABLES


def roberta(d: int, layers: int) -> tuple[int, int, int]:
    """(all parameters, r = 8 on queries and values, entries of the head's weights): two labels."""
    embeddings = (50265 + 514 + 1) * d + 2 * d  # words, positions, one type, norm
    attention, mlp, norms = 4 * (d * d + d), 2 * 4 * d * d + 5 * d, 4 * d
    head = d * d + d + 2 * d + 2
    return embeddings + layers * (attention + mlp + norms) + head, layers * 2 * 8 * 2 * d, d * d + 2 * d


def t5(d: int, layers: int, heads: int) -> tuple[int, int, int]:
    """One embedding; an attention in an encoder's layer, two in a decoder's; no biases but those of distances."""
    attention, mlp = 4 * d * d, 2 * d * 4 * d
    encoder, decoder = attention + mlp + 2 * d, 2 * attention + mlp + 3 * d
    return 32128 * d + layers * (encoder + decoder) + 2 * d + 2 * 32 * heads, 3 * layers * 2 * 8 * 2 * d, 0


def llama(d: int, layers: int, mlp: int) -> tuple[int, int, int]:
    """r = 64 on all seven linears."""
    base = 2 * 32000 * d + layers * (4 * d * d + 3 * d * mlp + 2 * d) + d
    return base, layers * 64 * (4 * 2 * d + 3 * (d + mlp)), 0


SUMS = {
    "RoBERTa-base": roberta(768, 12),
    "RoBERTa-large": roberta(1024, 24),
    "T5-base": t5(768, 12, 12),
    "T5-large": t5(1024, 24, 16),
    "LLaMA-7B": llama(4096, 32, 11008),
    "LLaMA-13B": llama(5120, 40, 13824),
}


@pytest.fixture(scope="module")
def counts():
    return {(row.model, row.method): count_row(row) for table in TABLES.values() for row in table.rows}


@pytest.mark.parametrize("model", SUMS)
def test_every_row_is_counted_as_its_architecture_has_it(counts, model):
    base, adapter, head = SUMS[model]
    biases = {"RoBERTa-base": 768 + 2, "RoBERTa-large": 1024 + 2}.get(model, 0)
    assert counts[model, "full"].trained == MODELS[model].parameters == base
    assert counts[model, "lora"].trained == adapter + head + biases
    # A head's biases are trained whole.
    assert counts[model, "lorasp"].trained == (adapter + head) // 2 + biases
    assert counts[model, "lora"].total == base + adapter


def test_none_is_further_from_the_printed_number_than_the_notes_explain(counts):
    """3 %: enough for the rounding of 0.9 M to 0.887 M, and for what the paper's own numbers leave open."""
    assert len(counts) == 18
    for count in counts.values():
        assert abs(count.more) < 0.0305, count
    more = {key: f"{100 * count.more:.1f} %" for key, count in counts.items()}
    for number, models in ((1, ("RoBERTa-base", "RoBERTa-large")), (2, ("T5-base", "T5-large"))):
        assert all(more[model, "full"] in NOTES[number][1] for model in models)
    assert more["T5-large", "lora"] in NOTES[2][0]
    for model in ("LLaMA-7B", "LLaMA-13B"):
        assert more[model, "lora"] in NOTES[3][0] and more[model, "full"] in NOTES[3][1]


def test_the_notes_counts_are_those_that_were_counted(counts):
    for number, table in TABLES.items():
        told = {int(text.replace(",", "")) for text in re.findall(r"\d[\d,]{6,}", " ".join(NOTES[number]))}
        ours = {counts[row.model, row.method].trained for row in table.rows}
        assert told & ours, number
        parts = {SUMS["RoBERTa-large"][1], 768 * 768 + 768 + 2 * 768 + 2, 294_912, 739_586, 1_051_650}
        assert told <= ours | (parts if number == 1 else set()), told - ours
    text = format_counts(list(counts.values()))
    assert "| Table 3, row 2 | LLaMA-7B, LoRA" in text and "159,907,840" in text and "+1.7%" in text
