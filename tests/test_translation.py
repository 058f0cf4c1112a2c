"""Beam search on a T5 against transformers' generate, BLEU and ROUGE against the libraries called directly."""

import pytest
import torch
from torch import distributed as dist
from transformers import T5ForConditionalGeneration

from lorasp.evaluation.beam_search import BeamSearch, Decoding
from lorasp.evaluation.translation import _dealt, one_line, score_translations, translate, write_batch
from lorasp.recipe import Recipe
from lorasp.tasks.translation import Translation
from tests.test_evaluation import Unsharded
from tests.test_t5 import build, padded, pairs
from tests.tiny_models import EOS, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = save_model("t5", tmp_path_factory.mktemp("model") / "t5")
    return Unsharded(build(directory)), T5ForConditionalGeneration.from_pretrained(directory).eval()


SOURCES = pairs([(7, 1), (30, 1), (1, 1), (12, 1), (12, 1), (3, 1), (22, 1)], seed=5)


def generated(theirs, beams: int, limit: int, penalty: float = 1.0, eos: int = EOS) -> list[list[int]]:
    inputs = padded(SOURCES)
    out = theirs.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        num_beams=beams,
        early_stopping=beams > 1,
        length_penalty=penalty,
        max_new_tokens=limit,
        use_cache=False,  # which transformers sizes by the encoder's layers
        do_sample=False,
        eos_token_id=eos,
    )
    special = {eos, theirs.config.pad_token_id}
    texts = []
    for row in out[:, 1:].tolist():
        end = next((place for place, token in enumerate(row) if token in special), len(row))
        texts.append(row[:end])
    return texts


def sources() -> list[tuple[int, ...]]:
    return [example.input_ids[: example.prompt_length] for example in SOURCES]


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (4, 1.0), (3, 0.6)])
def test_translations_are_those_of_transformers_generate(beams, penalty, models, one_process):
    ours, theirs = models
    # The token that random weights write most takes the part of EOS.
    written = [token for text in generated(theirs, 1, 9) for token in text[1:]]
    eos = max(set(written), key=written.count)
    how = Decoding(beams=beams, max_new_tokens=9, length_penalty=penalty, eos=eos)
    found = translate(ours, sources(), how, 3, rank=0, world_size=1, device=CPU)
    assert found == generated(theirs, beams, 9, penalty, eos)
    lengths = [len(text) for text in found]
    assert min(lengths) < 9 and len(set(lengths)) > 1  # some end by themselves


def test_the_encoder_runs_once_a_batch(models, one_process):
    ours, _ = models
    runs = []
    hook = ours.model.model.encoder.register_forward_hook(lambda *_: runs.append(1))
    steps = []
    engine = Unsharded(lambda **inputs: steps.append(1) or ours.model(**inputs))
    write_batch(engine, sources()[:2], Decoding(2, 5, 1.0, EOS), CPU)
    hook.remove()
    assert len(runs) == 1 and 1 < len(steps) <= 5


def test_a_rank_without_sentences_writes_none(models, one_process):
    assert write_batch(models[0], [], Decoding(2, 3, 1.0, EOS), CPU) == []


def test_every_rank_has_as_many_batches_and_each_sentence_is_in_one():
    lengths = [5, 1, 9, 9, 2, 3, 7]
    dealt = [_dealt(lengths, 2, rank, 3) for rank in range(3)]
    assert {len(batches) for batches in dealt} == {2}
    assert sorted(row for batches in dealt for batch in batches for row in batch) == list(range(7))
    assert max(len(batch) for batches in dealt for batch in batches) == 2
    first = {row for batches in dealt for row in batches[0]}
    assert min(lengths[row] for row in first) >= max(lengths[row] for row in range(7) if row not in first)


def test_beams_follow_the_likeliest_texts():
    """Two tokens and EOS (2). [0] begins with 0.5, [1] with 0.4; [1] then ends for sure, [0] goes on evenly."""
    search = BeamSearch(1, Decoding(beams=2, max_new_tokens=3, length_penalty=0.0, eos=2))
    probabilities = torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]])
    assert search.advance(probabilities.log()) == ([0, 1], [0, 0])
    # 0.5 · 0.5 twice, 0.4 · 0.98 ended: finished; the next two are [0, 0] and [0, 1].
    tokens, parents = search.advance(torch.tensor([[0.5, 0.5, 1e-9], [0.01, 0.01, 0.98]]).log())
    assert sorted(tokens) == [0, 1] and parents == [0, 0] and not search.is_done
    search.advance(torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]).log())
    assert search.is_done and search.best() == [[1]]  # 0.4 · 0.98, above 0.25 · 0.6


HYPOTHESES = ["Aceasta este o casă mare .", "Pisica stă pe covor", "", "Președintele a spus că va veni mâine"]
REFERENCES = [
    "Aceasta este o casă mare.",
    "O pisică stă pe covorul roșu",
    "Da.",
    "Președintele a declarat că vine mâine",
]


def test_scores_are_those_of_the_libraries_called_directly():
    import sacrebleu
    from rouge_score import rouge_scorer

    found = score_translations(HYPOTHESES, REFERENCES)
    direct = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES])
    assert found.bleu == direct.score and found.bleu > 5
    assert found.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for kind in ("rouge1", "rouge2", "rougeL"):
        each = [scorer.score(r, h)[kind].fmeasure for r, h in zip(REFERENCES, HYPOTHESES, strict=True)]
        assert found.rouge[kind] == pytest.approx(100 * sum(each) / 4, abs=1e-9)
    assert score_translations(REFERENCES, REFERENCES).bleu == pytest.approx(100)


def test_a_translation_is_one_line():
    assert one_line(" a\r\nb\n") == "a b" and one_line("a  b") == "a  b"


def test_the_test_set_keeps_each_of_its_lines(tmp_path):
    """Empty ones too, which training drops: translations.txt has the same lines, and sacrebleu scores them."""
    directory = save_model("t5", tmp_path / "t5")
    for split in ("train", "test"):
        (tmp_path / f"{split}.source").write_text("one\n\nthree\nfour\n")
        (tmp_path / f"{split}.target").write_text("unu\ndoi\n\npatru\n")
    settings = {"task": "wmt16_en_ro", "model": {"path": str(directory)}, "data": {"train": str(tmp_path)}}
    recipe = Recipe(**settings, translation={"test": {"path": str(tmp_path), "split": "test"}})
    data = Translation(recipe).read_data(directory)
    assert len(data.train.examples) == 2 and data.report()["train"]["dropped_empty"] == 2
    assert data.references() == ["unu", "doi", "", "patru"] and len(data.sources()) == 4
    assert data.report()["test"]["dropped_empty"] == 0
    written = ["unu", "doi doi", "trei", "patru"]
    assert score_translations(written, data.references()).sentences == 4
