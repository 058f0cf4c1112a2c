"""GLUE's files in their own layouts, and one sentence for what is wrong with them."""

from pathlib import Path

import pytest

from lorasp.data.glue import collate, load_glue, split_off
from lorasp.glue import GLUE
from lorasp.recipe import GLUE_TASKS, Recipe, RecipeError
from tests.real_data import real_data
from tests.test_sources import COMMIT, cache, lines
from tests.tiny_encoders import recipe_tree, word_tokenizer, write_rte

MNLI_PARSES = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
# Header and two rows as each archive writes them; of MNLI's dev, with five annotators' labels.
FILES = {
    "cola": (None, ["gj04\t1\t\tan oak is a tree", "gj04\t0\t*\toak a is"], [1, 0]),
    "sst2": ("sentence\tlabel", ["a tree \t1", '" not a tree \t0'], [1, 0]),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t10\t11\toak is a tree\t" a tree', "0\t12\t13\telm\tfir"],
        [1, 0],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["0\t1\t2\tis oak a tree\toak is a tree\t1", "1\t3\t4\telm\tfir\t0"],
        [1, 0],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\ty\t1\tnone\tnone\toak\telm\t3.800", "1\tg\tf\ty\t2\tnone\tnone\toak\toak\t5"],
        [3.8, 5.0],
    ),
    "mnli": (
        f"index\tpromptID\tpairID\tgenre\t{MNLI_PARSES}\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\t1\t1n\tg\tp\tp\tp\tp\toak\telm\tneutral\tneutral", "1\t1\t1c\tg\tp\tp\tp\tp\toak\tfir\tx\tcontradiction"],
        [1, 2],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ["0\tis oak a tree\toak is\tentailment", "1\tis elm\tfir\tnot_entailment"],
        [0, 1],
    ),
    "rte": ("index\tsentence1\tsentence2\tlabel", ["0\toak\telm\tnot_entailment", "1\toak\toak\tentailment"], [1, 0]),
    "wnli": ("index\tsentence1\tsentence2\tlabel", ["0\toak\telm\t1", "1\toak\tfir\t0"], [1, 0]),
}


def write(root: Path, task: str, rows=None, header=..., start: bytes = b"") -> Path:
    head, its_rows, _ = FILES[task]
    head = head if header is ... else header
    text = "\n".join([*([head] if head else []), *(its_rows if rows is None else rows)]) + "\n"
    directory = root / GLUE[task].directory
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("train", *(file for _, file, _ in GLUE[task].dev)):
        (directory / f"{name}.tsv").write_bytes(start + text.encode())
    return root


def load(root, task, **data):
    recipe = Recipe(**recipe_tree("unused", root, task=task, data=data))
    return load_glue(recipe, word_tokenizer("bert"), tells_sentences_apart=True)


def refusal(root, task, **data) -> str:
    with pytest.raises(RecipeError) as error:
        load(root, task, **data)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_each_task_is_read_in_its_archives_layout(tmp_path, task):
    data = load(write(tmp_path, task, start=b"\xef\xbb\xbf" if task == "mrpc" else b""), task)
    assert data.train.labels == FILES[task][2]
    assert {len(row.sentences) for row in data.train.rows} == {len(GLUE[task].sentences)}
    assert list(data.scored) == (["reported", "reported_mismatched"] if task == "mnli" else ["reported"])


def test_one_row_has_no_correlation_and_is_refused_before_it_is_trained_for(tmp_path):
    root = write(tmp_path, "stsb")
    path = root / GLUE["stsb"].directory / "dev.tsv"
    more = "".join(f"{n}\tg\tf\ty\t1\tn\tn\toak\telm {n}\t{n}\n" for n in range(4))
    path.with_name("train.tsv").write_text(f"{FILES['stsb'][0]}\n{more}")
    assert refusal(root, "stsb", selection=0.2) == (
        "data.selection: gives one row to score, and a correlation is of two or more; give more"
    )
    write(tmp_path, "stsb", FILES["stsb"][1][:1])
    assert refusal(root, "stsb") == f"{path}: gives one row to score, and a correlation is of two or more; give more"
    assert len(load(write(tmp_path, "rte", FILES["rte"][1][:1]), "rte").scored["reported"].rows) == 1  # an accuracy


def test_a_quotation_mark_is_a_character_of_its_sentence(tmp_path):
    data = load(write(tmp_path, "sst2"), "sst2")
    assert data.train.rows[1].sentences == ('" not a tree ',)


def test_the_tasks_own_directory_will_do(tmp_path):
    assert load(write(tmp_path, "rte") / "RTE", "rte").train.labels == [1, 0]


def test_a_pair_becomes_what_the_tokenizer_makes_of_it(tmp_path):
    [first, _] = load(write(tmp_path, "rte"), "rte").train.examples
    expected = word_tokenizer("bert")("oak", "elm", return_token_type_ids=True)
    assert list(first.input_ids) == expected["input_ids"]
    assert list(first.token_type_ids) == expected["token_type_ids"] == [0, 0, 0, 1, 1]


def test_a_special_token_that_a_sentence_spells_is_text(tmp_path):
    [example] = load(write(tmp_path, "sst2", rows=["oak [SEP] elm\t1"]), "sst2").train.examples
    assert example.input_ids.count(3) == 1 and example.input_ids[-1] == 3


def test_of_a_pair_that_is_too_long_the_longer_sentence_is_cut(tmp_path):
    root = write(tmp_path, "rte", rows=[f"0\t{'oak ' * 9}\telm fir\tentailment"])
    data = load(root, "rte", max_length=8)
    tokenizer = word_tokenizer("bert")
    assert tokenizer.decode(data.train.examples[0].input_ids).split() == [
        *("[CLS]", "oak", "oak", "oak", "[SEP]"),
        *("elm", "fir", "[SEP]"),
    ]
    assert (data.train.truncated, len(data.train.rows)) == (1, 1)


def test_what_is_wrong_with_a_file_is_one_sentence_with_its_line(tmp_path):
    def bad(task, name="a", **how):
        return refusal(write(tmp_path / f"{task}{name}", task, **how), task)

    assert "RTE/train.tsv: line 3 has 3 columns, not 4" in bad("rte", rows=[FILES["rte"][1][0], "1\toak\telm"])
    told = bad("rte", "b", rows=["0\toak\telm\tmaybe"])
    assert "RTE/train.tsv: line 2: its label is 'maybe', not one of entailment, not_entailment" in told
    assert "STS-B/train.tsv: line 2: its score is '5.5'" in bad(
        "stsb", rows=[FILES["stsb"][1][0].replace("3.800", "5.5")]
    )
    assert "line 2: its score is 'nan'" in bad("stsb", "n", rows=[FILES["stsb"][1][0].replace("3.800", "nan")])
    assert "MRPC/train.tsv: has no rows" in bad("mrpc", rows=[])
    assert "CoLA/train.tsv: has no rows" in bad("cola", rows=[])
    assert "line 2: sentence 2 of a pair is empty" in bad("qnli", rows=["0\toak\t\tentailment"])
    told = bad("rte", "c", header="sentence\tlabel", rows=["oak\t1"])
    assert "line 1 names no column 'sentence1'; task rte reads sentence1 and sentence2, with label" in told
    (tmp_path / "odd" / "RTE").mkdir(parents=True)
    assert "holds neither RTE/train.tsv nor train.tsv" in refusal(tmp_path / "odd", "rte")
    (tmp_path / "odd" / "RTE" / "train.tsv").write_bytes(b"index\n\xff\n")
    assert "line 2 is not UTF-8 text" in refusal(tmp_path / "odd", "rte")


def test_rows_that_end_early_are_left_out_of_qqp_alone(tmp_path):
    root = write(tmp_path, "qqp", rows=[*FILES["qqp"][1], "2\t5\t6\tis"])
    data = load(root, "qqp")
    assert (len(data.train.rows), data.train.incomplete) == (2, 1)
    assert "1 that end early left out" in data.describe()[0]


def test_rows_to_choose_on_are_no_part_of_training_and_the_same_for_every_seed(tmp_path):
    root = write_rte(tmp_path, train=60)
    whole = load(root, "rte")
    parts = [
        load_glue(
            Recipe(**recipe_tree("m", root, seed=s, data={"selection": 0.2})),
            word_tokenizer("bert"),
            tells_sentences_apart=True,
        )
        for s in (0, 1)
    ]
    chosen, trained = ({row.place for row in its.rows} for its in (parts[0].scored["selection"], parts[0].train))
    assert not chosen & trained and chosen | trained == {row.place for row in whole.train.rows}
    assert 10 <= len(chosen) <= 14
    assert parts[1].scored["selection"].digest == parts[0].scored["selection"].digest
    assert parts[0].scored["reported"].digest == whole.scored["reported"].digest
    with pytest.raises(RecipeError, match="leaves one side empty"):
        split_off(whole.train.rows, 0.001, "train.tsv")


def test_a_batch_has_no_padding_and_one_of_nothing_is_one_token(tmp_path):
    data = load(write_rte(tmp_path), "rte")
    batch = collate(data.train.examples, [3, 5], is_regression=False)
    first, second = (data.train.examples[row] for row in (3, 5))
    assert batch.input_ids.tolist() == [[*first.input_ids, *second.input_ids]]
    assert batch.firsts.tolist() == [0, len(first.input_ids)]
    assert batch.position_ids.tolist() == [[*range(len(first.input_ids)), *range(len(second.input_ids))]]
    assert batch.labels.tolist() == [first.label, second.label]
    empty = collate(data.train.examples, [], is_regression=True)
    assert (empty.input_ids.shape, empty.firsts.numel(), empty.labels.numel()) == ((1, 1), 0, 0)


def test_the_hubs_copy_gives_the_same_rows(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = [{"sentence1": "oak", "sentence2": "elm", "label": 1, "idx": 0}]
    rows += [{"sentence1": "oak", "sentence2": "oak", "label": 0, "idx": 1}]
    card = "---\nconfigs:\n- config_name: rte\n  data_files:\n  - split: train\n    path: rte/train.jsonl\n"
    card += "  - split: validation\n    path: rte/validation.jsonl\n---\n"
    files = {f"rte/{split}.jsonl": lines(*rows) for split in ("train", "validation")}
    cache(tmp_path / "hub", "dataset", "nyu-mll/glue", COMMIT, {"README.md": card.encode(), **files})
    found, local = load("nyu-mll/glue", "rte"), load(write(tmp_path, "rte"), "rte")
    assert found.train.digest == local.train.digest
    assert found.report()["train"]["commit"] == COMMIT


@pytest.mark.parametrize(
    ("task", "train", "dev"),
    # Rows of the papers of GLUE and of the archives: CoLA 8,551, SST-2 67,349, MRPC 3,668, STS-B 5,749, RTE 2,490.
    [("cola", 8551, 1043), ("sst2", 67349, 872), ("mrpc", 3668, 408), ("stsb", 5749, 1500), ("rte", 2490, 277)],
)
def test_the_real_files_are_whole(task, train, dev):
    root = real_data("glue")
    from lorasp.data.glue import _of_directory

    recipe = Recipe(**recipe_tree("unused", root, task=task))
    for file, count in (("train", train), ("dev", dev)):
        _, rows, incomplete, _ = _of_directory(GLUE[task], recipe, file, "")
        assert (len(rows), incomplete) == (count, 0)


def test_a_length_that_leaves_no_room_for_a_word_is_refused(tmp_path):
    root = write_rte(tmp_path)
    with pytest.raises(RecipeError, match="data.max_length=3 leaves no room for a word beside the 3 tokens"):
        load(root, "rte", max_length=3)
