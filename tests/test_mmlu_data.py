"""MMLU as it lies on disk: read whole, and what is wrong with it told with file and line."""

import csv
import json
from pathlib import Path

import pytest

from lorasp.data.mmlu import CATEGORIES, SUBJECTS, read_mmlu
from lorasp.recipe import Mmlu, RecipeError
from tests.real_data import real_data

ROWS = [[f"What is {n}?", f"{n}", "two\nlines", 'a "quote"', "x, y", "ABCD"[n % 4]] for n in range(6)]


def write_tree(root: Path, subjects=("anatomy", "virology"), rows=ROWS) -> Path:
    """dev/ and test/ of each subject, with the same rows in both."""
    for subject in subjects:
        for split in ("dev", "test"):
            (root / split).mkdir(parents=True, exist_ok=True)
            with open(root / split / f"{subject}_{split}.csv", "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
    return root


def read(root: Path, subjects=("anatomy", "virology"), **settings):
    return read_mmlu(Mmlu(data=str(root), subjects=list(subjects), **settings))


def fault(root: Path, **settings) -> str:
    with pytest.raises(RecipeError) as raised:
        read(root, **settings)
    return str(raised.value)


def test_there_are_57_subjects_in_the_harness_s_four_categories():
    assert [len(its) for its in CATEGORIES.values()] == [19, 13, 12, 13] and len(set(SUBJECTS)) == 57
    pytest.importorskip("lm_eval")
    import lm_eval.tasks

    for path in (Path(lm_eval.tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml"):
        text = path.read_text()
        [category] = [name for name in CATEGORIES if f'"mmlu_{name}_tasks"' in text]
        assert path.stem.removeprefix("mmlu_") in CATEGORIES[category]


def test_shots_are_the_first_dev_rows_and_questions_those_of_the_split(tmp_path):
    data = read(write_tree(tmp_path), limit=4)
    assert [subject.name for subject in data.subjects] == ["anatomy", "virology"] and data.question_count == 8
    subject = data.subjects[0]
    assert len(subject.shots) == 5 and subject.shots == tuple(read(tmp_path).subjects[0].questions[:5])
    assert (
        subject.questions[3].choices == ("3", "two\nlines", 'a "quote"', "x, y") and subject.questions[3].answer == 3
    )


def test_the_digest_is_of_what_is_asked(tmp_path):
    whole = read(write_tree(tmp_path))
    assert whole.first(3).digest == read(tmp_path, limit=3).digest != whole.digest
    assert whole.digest != read(tmp_path, shots=4).digest


def test_a_category_names_its_subjects(tmp_path):
    write_tree(tmp_path, subjects=[*CATEGORIES["social_sciences"], "anatomy"])
    assert len(read(tmp_path, subjects=["social_sciences", "anatomy", "sociology"]).subjects) == 13
    assert "did you mean anatomy?" in fault(tmp_path, subjects=["anatomi"])


def test_a_missing_dev_file_is_named(tmp_path):
    (write_tree(tmp_path) / "dev" / "virology_dev.csv").unlink()
    assert fault(tmp_path) == f"mmlu.data: {tmp_path}/dev/virology_dev.csv is missing"


def test_too_few_shots_are_told(tmp_path):
    write_tree(tmp_path, rows=ROWS[:3])
    assert "anatomy_dev.csv has 3 rows for mmlu.shots=5" in fault(tmp_path)
    assert read(tmp_path, shots=3).question_count == 6


@pytest.mark.parametrize(
    "row, told",
    [
        (["q", "a", "b", "c", "A"], "5 fields instead of six"),
        (["q", "a", "b", "c", "d", "e", "A"], "7 fields instead of six"),
        (["q", "a", "b", "c", "d", "E"], 'the answer is "E"; it must be A, B, C or D'),
        (["q", "a", "b", "c", "d", "AB"], 'the answer is "AB"'),
        (["q", "a", "b", "c", "d", "a"], 'the answer is "a"'),
        ([" ", "a", "b", "c", "d", "A"], "the question is empty"),
    ],
)
def test_a_bad_row_is_told_with_the_line_in_which_it_begins(tmp_path, row, told):
    """Each row before it takes two lines, as one of its fields holds a line break: the third begins in line 5."""
    write_tree(tmp_path, rows=[*ROWS[:2], row, *ROWS[2:]])
    message = fault(tmp_path, shots=0)
    assert message.startswith(f"mmlu.data: {tmp_path}/test/anatomy_test.csv:5: ") and told in message


def test_a_quote_that_is_never_closed_is_told_where_it_begins(tmp_path):
    path = write_tree(tmp_path) / "test" / "anatomy_test.csv"
    path.write_text('q,a,b,c,d,A\n"q,a,b,c,d,B\nq,a,b,c,d,C\n')
    assert f"{path}:2: 1 field instead of six" in fault(tmp_path)


def test_other_bytes_than_utf_8_are_told(tmp_path):
    path = write_tree(tmp_path) / "test" / "anatomy_test.csv"
    path.write_bytes(b"caf\xe9,a,b,c,d,A\n")
    assert f"{path} is not UTF-8" in fault(tmp_path)


def test_a_directory_of_something_else_says_what_is_wanted(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert "holds neither dev/SUBJECT_dev.csv" in fault(tmp_path)
    assert "no such directory" in fault(tmp_path / "nowhere" / "at" / "all")


HUB_CARD = """\
---
configs:
- config_name: all
  data_files:
  - {split: test, path: all/test.jsonl}
  - {split: dev, path: all/dev.jsonl}
---
"""


def test_the_hub_s_layout_gives_the_same_questions(tmp_path):
    tree, hub = write_tree(tmp_path / "tree"), tmp_path / "hub"
    (hub / "all").mkdir(parents=True)
    (hub / "README.md").write_text(HUB_CARD)
    for split in ("dev", "test"):
        rows = [
            {"question": row[0], "subject": subject, "choices": row[1:5], "answer": "ABCD".index(row[5])}
            for subject in ("virology", "anatomy")
            for row in ROWS
        ]
        (hub / "all" / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert read(hub).subjects == read(tree).subjects and read(hub).digest == read(tree).digest
    bad = rows[:3] + [rows[3] | {"answer": 4}] + rows[4:]
    (hub / "all" / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in bad))
    assert "split test of virology, row 3: the answer is 4" in fault(hub)


def test_the_published_data_has_its_published_counts():
    directory = real_data("mmlu")
    data = read_mmlu(Mmlu(data=str(directory)))
    counts = {row["subject"]: int(row["test"]) for row in csv.DictReader(open(directory / "ROWS.tsv"), delimiter="\t")}
    assert {subject.name: len(subject.questions) for subject in data.subjects} | {"TOTAL": 14042} == counts
    assert data.question_count == 14042 and all(len(subject.shots) == 5 for subject in data.subjects)
