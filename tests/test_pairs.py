"""Sentence pairs: what is read of files and of the hub's layout, what is refused, and the tokens that come out."""

import json
from pathlib import Path

import pytest

from lorasp.data import sources
from lorasp.data.pairs import PREFIX, collate_pairs, encode_pairs, read_pairs
from lorasp.recipe import RecipeError, Source
from tests.real_data import real_data
from tests.tiny_models import EOS, byte_tokenizer


def write(directory: Path, split: str, source: str, target: str) -> Source:
    (directory / f"{split}.source").write_bytes(source.encode())
    (directory / f"{split}.target").write_bytes(target.encode())
    return Source(path=str(directory), split=split)


def test_a_line_is_a_sentence_whatever_its_line_end(tmp_path):
    """U+2028, which is no line end here, a byte-order mark, CRLF, and a last line without an end."""
    rows = read_pairs(write(tmp_path, "train", "\ufeffa\u2028b\r\nc\r\n", "x\ny"), empty_output="drop")
    assert rows.rows == [{"source": "a\u2028b", "target": "x"}, {"source": "c", "target": "y"}]
    assert rows.places == ["line 1", "line 2"] and rows.layout == "pairs" and rows.source.endswith(", train")


def test_validation_is_called_val_in_files_and_limit_takes_the_first(tmp_path):
    write(tmp_path, "val", "a\nb\nc\n", "x\ny\nz\n")
    rows = read_pairs(Source(path=str(tmp_path), split="validation", limit=2), empty_output="drop")
    assert [row["target"] for row in rows.rows] == ["x", "y"]


def test_lines_that_are_skipped_keep_the_others_numbers(tmp_path):
    write(tmp_path, "train", "a\nb\nc\n", "x\ny\nz\n")
    rows = read_pairs(Source(path=str(tmp_path), skip=1, limit=1), empty_output="drop")
    assert [row["target"] for row in rows.rows] == ["y"] and rows.places == ["line 2"]
    with pytest.raises(RecipeError, match="train.source: has no lines behind the first 3"):
        read_pairs(Source(path=str(tmp_path), skip=3), empty_output="drop")


def test_empty_lines_are_counted_or_named(tmp_path):
    source = write(tmp_path, "train", "a\n\nc\n \n", "x\ny\n\nz\n")
    rows = read_pairs(source, empty_output="drop")
    assert rows.places == ["line 1"] and rows.dropped_empty == 3
    kept = read_pairs(source, empty_output="keep")
    assert kept.places == ["line 1", "line 2", "line 3", "line 4"] and kept.dropped_empty == 0
    with pytest.raises(RecipeError, match=r"3 pairs have an empty side \(line 2, 3, 4\)"):
        read_pairs(source, empty_output="error")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a\nb\n", "x\n", r"train.source has 2 lines and train.target 1; a pair is the same line of both"),
        ("", "", r"train.source: is empty"),
        ("\n", "\n", r"has no pair with text on both sides"),
    ],
)
def test_files_that_make_no_pairs_are_refused(tmp_path, source, target, message):
    with pytest.raises(RecipeError, match=message):
        read_pairs(write(tmp_path, "train", source, target), empty_output="drop")


def test_what_is_not_there_is_told(tmp_path):
    write(tmp_path, "val", "a\n", "x\n")
    with pytest.raises(RecipeError, match=r"train.source: no such file; .* holds val.source"):
        read_pairs(Source(path=str(tmp_path)), empty_output="drop")
    with pytest.raises(RecipeError, match=r"is a file; pairs stand in two, train.source and train.target"):
        read_pairs(Source(path=str(tmp_path / "val.source")), empty_output="drop")
    with pytest.raises(RecipeError, match="no such data file"):
        read_pairs(Source(path=str(tmp_path / "nothing" / "here")), empty_output="drop")
    (tmp_path / "val.target").write_bytes(b"ok\n\xff\n")
    (tmp_path / "val.source").write_text("a\nb\n")
    with pytest.raises(RecipeError, match=r"val.target: line 2 is not UTF-8 text"):
        read_pairs(Source(path=str(tmp_path), split="val"), empty_output="drop")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A snapshot of a data set laid out as the hub's wmt16, and what writes rows into it."""
    monkeypatch.setattr(sources, "hub_snapshot", lambda source, *, download: tmp_path)

    def write_rows(rows):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path="wmt16")

    return write_rows


def test_the_hubs_rows_are_the_same_pairs(hub, tmp_path):
    source = hub([{"translation": {"ro": "x", "en": "a"}}, {"translation": {"en": "b", "ro": "y"}}])
    rows = read_pairs(source, empty_output="drop")
    assert rows.rows == [{"source": "a", "target": "x"}, {"source": "b", "target": "y"}]
    assert rows.places == ["row 1", "row 2"] and rows.commit == tmp_path.name
    files = tmp_path / "files"
    files.mkdir()
    assert read_pairs(write(files, "train", "a\nb\n", "x\ny\n"), empty_output="drop").digest == rows.digest


def test_another_pair_of_languages_is_refused(hub):
    with pytest.raises(RecipeError, match=r"row 1 holds no translation of en into ro .*subset: ro-en"):
        read_pairs(hub([{"translation": {"de": "x", "en": "a"}}]), empty_output="drop")


def encoded(tmp_path, source, target, max_length=60, too_long="truncate"):
    rows = read_pairs(write(tmp_path, "train", source, target), empty_output="drop")
    return encode_pairs(byte_tokenizer(), rows, max_length, too_long)


def tokens(text: str) -> tuple[int, ...]:
    return tuple(byte_tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_a_source_has_its_prefix_and_both_sides_end(tmp_path):
    """A spelled-out "</s>" is text and ends nothing."""
    [example] = encoded(tmp_path, "a</s>\n", "x\n").examples
    assert PREFIX == "translate English to Romanian: "
    source = (*tokens(PREFIX + "a<"), *tokens("/s>"), EOS)
    assert example.input_ids == (*source, *tokens("x"), EOS)
    assert example.prompt_length == len(source) and example.label_count == 2 and EOS not in source[:-1]


def test_what_is_too_long_is_cut_dropped_or_refused(tmp_path):
    """The prefix has 31 bytes; a cut source keeps its EOS, a cut target must not learn to stop."""
    texts = ("abcdefghij\nk\n", "x\nuvwxyz" + "w" * 40 + "\n")
    cut = encoded(tmp_path, *texts, max_length=40)
    assert cut.truncated == 2 and cut.dropped == 0
    first, second = cut.examples
    assert first.input_ids[:40] == (*tokens(PREFIX + "abcdefgh"), EOS) and first.label_count == 2
    assert second.label_count == 40 and EOS not in second.input_ids[second.prompt_length :]
    assert (first.cut, second.cut) == (False, True)  # of what is to be written
    assert encoded(tmp_path, "a\n" + texts[0], "x\n" + texts[1], max_length=40, too_long="drop").dropped == 2
    with pytest.raises(
        RecipeError, match=r"2 pairs have a side of more tokens than data.max_length=40 \(first: line 1"
    ):
        encoded(tmp_path, *texts, max_length=40, too_long="error")


def test_a_batch_holds_pairs_one_behind_the_other(tmp_path):
    found = encoded(tmp_path, "a\nbb\n", "x\nyyy\n").examples
    batch = collate_pairs(found, [1, 0])
    prefix = tokens(PREFIX)
    assert batch.input_ids.tolist() == [[*prefix, *tokens("bb"), EOS, *prefix, *tokens("a"), EOS]]
    y, x = tokens("yx")
    assert batch.labels.tolist() == [y, y, y, EOS, x, EOS]
    assert batch.decoder_input_ids.tolist() == [[-1, y, y, y, -1, x]]
    assert batch.source_lengths == (34, 33) and batch.label_counts == (4, 2) and batch.lengths == (38, 35)
    nothing = collate_pairs(found, [])
    assert nothing.input_ids.shape == nothing.decoder_input_ids.shape == (1, 1) and nothing.labels.numel() == 0


def test_the_real_sets_have_the_published_sizes():
    directory = real_data("wmt16_en_ro")
    for split, source, target in (("validation", 259_395, 290_402), ("test", 248_676, 278_538)):
        rows = read_pairs(Source(path=str(directory), split=split), empty_output="error")
        assert len(rows.rows) == 1999
        # Bytes of both files, a line end each: nothing was lost on the way.
        for side, size in (("source", source), ("target", target)):
            assert sum(len(row[side].encode()) + 1 for row in rows.rows) == size
