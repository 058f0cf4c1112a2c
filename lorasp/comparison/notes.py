"""In words, why our numbers of trained parameters are not those that the paper prints."""

# Of a table's adapters, and of its full fine-tuning; tests/test_paper_counts.py has the sums.
NOTES = {
    1: (
        "r = 8 on queries and values (base: 12 · 2 · 8 · (768 + 768) = 294,912) and a classifier of two labels "
        "(768² + 768 + 2 · 768 + 2 = 592,130) are 887,042; the paper prints 0.9 M, rounded, and half of that, 0.45 M, "
        "for LoRA-SP. So its half is of the head as well, and its rank is 8, where its section 4.3 says r = 16 for "
        "LoRA-SP: r = 16 with half of the adapter selected and the head whole would be the LoRA row's count again. "
        "Half of both, but for the head's biases, is 443,906; with adapter.head: whole it is 739,586. A task of "
        "three labels has 769 parameters more, STS-B 769 fewer. Large likewise: 786,432 and 1,051,650 are 1,838,082, "
        "printed 1.8 M, half of it 0.9 M.",
        "Full fine-tuning trains every parameter: 124.6 M and 355.4 M with this head, where 121.3 M and 348 M are "
        "printed: 2.8 % and 2.1 % more. No part of the model has the size of the difference, and the paper does not "
        "say what it leaves out; its text says around 125 M and 355 M itself.",
    ),
    2: (
        "r = 8 on queries and values of every attention: 36 blocks in base (12 in the encoder, 24 in the decoder), "
        "72 in large. Base: 36 · 2 · 8 · (768 + 768) = 884,736, printed 0.9 M. Large: 72 · 2 · 8 · (1024 + 1024) = "
        "2,359,296, printed 2.29 M: 3.0 % more (in units of 2²⁰ it is 2.25). The LoRA-SP rows are half of the "
        "LoRA rows as printed, 0.45 M and 1.15 M, so their rank is 8 too, where section 4.3 says r = 16.",
        "Full fine-tuning: 222.9 M and 737.7 M, where 218.8 M and 725.4 M are printed: 1.9 % and 1.7 % more. T5 "
        "v1.0 shares one embedding between encoder, decoder and head, counted once here. The paper does not say what "
        "it leaves out.",
    ),
    3: (
        "r = 64 on all seven linears of a layer. 7B: 32 · 64 · (4 · 8192 + 3 · 15104) = 159,907,840, printed 157.3 M: "
        "1.7 % more; 13B: 250,347,520, printed 248.6 M: 0.7 % more. r = 16, of section 4.3, would be a "
        "quarter of that. LoRA-SP's rows are half of the LoRA rows as printed.",
        "Full fine-tuning: 6,738.4 M and 13,015.9 M, where 6,624.4 M and 12,986.8 M are printed: 1.7 % and 0.2 % "
        "more. In 7B's rows ours is more by about one factor, 1.017, in 13B's it is not; no part of the models has "
        "the size of the difference. The paper's totals are not the sums of its own columns either (6624.4 + 78.7 "
        "is 6703.1, printed 6702.1).",
    ),
}


def notes_of(number: int) -> list[str]:
    """Of one of the paper's tables."""
    return [f"Table {number}: {note}" for note in NOTES[number]]
