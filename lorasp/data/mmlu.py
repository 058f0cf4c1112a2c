"""MMLU's questions (Hendrycks et al., 2021): the original CSV tree, or a data set laid out as the hub's cais/mmlu."""

import csv
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasp.data.sources import hub_snapshot, is_on_hub
from lorasp.recipe import Mmlu, RecipeError, Source
from lorasp.recipe_errors import shown

LETTERS = "ABCD"
# As lm-evaluation-harness groups them; the order is the report's.
CATEGORIES = {
    "stem": """
        abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning
    """.split(),
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history international_law
        jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law
        world_religions
    """.split(),
    "social_sciences": """
        econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
        high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations
        security_studies sociology us_foreign_policy
    """.split(),
    "other": """
        business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology
    """.split(),
}
CATEGORY_OF = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects}
SUBJECTS = sorted(CATEGORY_OF)
_HUB_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Question:
    """answer: 0 to 3."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int


@dataclass(frozen=True)
class Subject:
    """shots: of the dev split, in its order. questions: the first `limit` of the split that is scored."""

    name: str
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class MmluData:
    source: str
    split: str
    subjects: tuple[Subject, ...]
    digest: str  # SHA-256 of shots and questions

    @property
    def question_count(self) -> int:
        return sum(len(subject.questions) for subject in self.subjects)

    def first(self, limit: int | None) -> "MmluData":
        """With at most the first `limit` questions of each subject."""
        subjects = tuple(Subject(s.name, s.shots, s.questions[:limit]) for s in self.subjects)
        return MmluData(self.source, self.split, subjects, _digest(subjects))


def download_mmlu(settings: Mmlu) -> None:
    """Puts the hub data set that `settings` names, if one, into the hub's cache. Raises RecipeError."""
    source = _hub_source(settings)
    if source is not None:
        hub_snapshot(source, download=True)


def read_mmlu(settings: Mmlu) -> MmluData:
    """The chosen subjects; a data set of the hub from its cache (`download_mmlu`).

    Raises RecipeError naming the file, and the line at fault: for a file that is missing or has too few shots, a row
    without six fields, an answer that is none of A to D, or a subject that there is not.
    """
    names = _chosen(settings.subjects)
    source = _hub_source(settings)
    if source is not None:
        rows = _HubRows(hub_snapshot(source, download=False), settings.data)
    elif any((Path(settings.data) / split).is_dir() for split in _HUB_SPLITS):
        rows = _CsvTree(Path(settings.data))
    else:
        rows = _HubRows(Path(settings.data), settings.data)
    subjects = []
    for name in names:
        shots = rows.read(name, "dev")[: settings.shots] if settings.shots else []
        if len(shots) < settings.shots:
            raise RecipeError(
                f"mmlu.data: {rows.place(name, 'dev')} has {len(shots)} rows for mmlu.shots={settings.shots}; "
                f"complete it, or ask for fewer shots"
            )
        questions = rows.read(name, settings.split)
        if not questions:
            raise RecipeError(f"mmlu.data: {rows.place(name, settings.split)} has no rows")
        subjects.append(Subject(name, tuple(shots), tuple(questions[: settings.limit])))
    return MmluData(settings.data, settings.split, tuple(subjects), _digest(subjects))


def _chosen(given: str | list[str]) -> list[str]:
    """Names of subjects, sorted, from `all`, names of subjects and names of categories."""
    if given == "all":
        return SUBJECTS
    chosen: set[str] = set()
    for name in given:
        if name in CATEGORIES:
            chosen |= set(CATEGORIES[name])
        elif name in CATEGORY_OF:
            chosen.add(name)
        else:
            near = difflib.get_close_matches(name, [*SUBJECTS, *CATEGORIES], 1)
            hint = f"did you mean {near[0]}?" if near else f"there are 57 of them, and {', '.join(CATEGORIES)}"
            raise RecipeError(f"mmlu.subjects: {shown(name)} is no subject of MMLU; {hint}")
    return sorted(chosen)


def _hub_source(settings: Mmlu) -> Source | None:
    """None where the data is a directory. Raises RecipeError for a path to nothing."""
    if Path(settings.data).is_dir():
        return None
    source = Source(path=settings.data, revision=settings.revision)
    try:
        if is_on_hub(source):
            return source
    except RecipeError:
        raise RecipeError(f"mmlu.data: {settings.data}: no such directory") from None
    raise RecipeError(f"mmlu.data: {settings.data} is a file; give the directory that holds dev/ and test/")


class _CsvTree:
    """`dev/SUBJECT_dev.csv` and so on: no header, rows of question, four choices and a letter."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def place(self, subject: str, split: str) -> str:
        return str(self._root / split / f"{subject}_{split}.csv")

    def read(self, subject: str, split: str) -> list[Question]:
        path = Path(self.place(subject, split))
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                return [_question(fields, f"{path}:{line}") for line, fields in _placed_rows(file, path)]
        except FileNotFoundError:
            raise RecipeError(f"mmlu.data: {path} is missing") from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"mmlu.data: {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
        except OSError as error:
            raise RecipeError(f"mmlu.data: {path} cannot be read ({error.strerror})") from None


def _placed_rows(file: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line in which it begins, its fields) of each row; a quoted field may hold line breaks."""
    reader = csv.reader(file)
    begins = 1
    try:
        for fields in reader:
            if fields:  # not a blank line
                yield begins, fields
            begins = reader.line_num + 1
    except csv.Error as error:
        raise RecipeError(f"mmlu.data: {path}:{begins}: is no row of CSV ({error})") from None


def _question(fields: list[str], where: str) -> Question:
    if len(fields) != 6:
        raise RecipeError(
            f"mmlu.data: {where}: {len(fields)} field{'' if len(fields) == 1 else 's'} instead of six (question, four "
            f"choices, answer); a field that holds a comma, a quote or a line break stands in quotes"
        )
    question, *choices, answer = fields
    if answer not in tuple(LETTERS):
        raise RecipeError(f"mmlu.data: {where}: the answer is {shown(answer)[:40]}; it must be A, B, C or D")
    return _checked(question, choices, LETTERS.index(answer), where)


def _checked(question: str, choices: list[str], answer: int, where: str) -> Question:
    if not question.strip():
        raise RecipeError(f"mmlu.data: {where}: the question is empty")
    return Question(question, tuple(choices), answer)


class _HubRows:
    """Columns question, choices (a list of four) and answer (0 to 3), in a subset a subject, or in `all` with a
    column that names the subject.
    """

    def __init__(self, snapshot: Path, name: str) -> None:
        self._snapshot, self._name = snapshot, name
        self._all: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = {}  # split -> subject -> (row, values)
        import datasets  # seconds to import: only where it is read with

        self._datasets = datasets
        try:
            self._subsets = datasets.get_dataset_config_names(str(snapshot))
        except Exception as error:  # its own, the hub's, Arrow's
            raise RecipeError(self._other_layout(_reason(error))) from None

    def place(self, subject: str, split: str) -> str:
        return f"{self._name}: split {_HUB_SPLITS[split]} of {subject}"

    def read(self, subject: str, split: str) -> list[Question]:
        if "all" in self._subsets:
            if split not in self._all:
                by_subject = self._all.setdefault(split, {})
                for number, row in enumerate(self._load("all", split)):
                    by_subject.setdefault(row.get("subject"), []).append((number, row))
            rows = self._all[split].get(subject, [])
        elif subject in self._subsets:
            rows = list(enumerate(self._load(subject, split)))
        else:
            raise RecipeError(self._other_layout(f"it has no subset {subject}"))
        return [_hub_question(row, f"{self.place(subject, split)}, row {number}") for number, row in rows]

    def _other_layout(self, reason: str) -> str:
        return (
            f"mmlu.data: {self._name} holds neither dev/SUBJECT_dev.csv and test/SUBJECT_test.csv nor a data set laid "
            f"out as the hub's cais/mmlu ({reason})"
        )

    def _load(self, subset: str, split: str) -> list[dict[str, Any]]:
        try:
            # Streamed: no second copy in Arrow's cache, which ranks would have to take turns to write.
            return list(
                self._datasets.load_dataset(str(self._snapshot), subset, split=_HUB_SPLITS[split], streaming=True)
            )
        except Exception as error:
            raise RecipeError(
                f"mmlu.data: split {_HUB_SPLITS[split]} of {self._name} ({subset}) cannot be read ({_reason(error)})"
            ) from None


def _hub_question(row: dict[str, Any], where: str) -> Question:
    question, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(question, str) or not isinstance(choices, list) or len(choices) != 4:
        raise RecipeError(f"mmlu.data: {where}: has no text in column question and no list of four in column choices")
    if not all(isinstance(choice, str) for choice in choices):
        raise RecipeError(f"mmlu.data: {where}: a choice is no text")
    if isinstance(answer, str) and answer in tuple(LETTERS):
        answer = LETTERS.index(answer)
    if answer not in range(4):
        raise RecipeError(f"mmlu.data: {where}: the answer is {shown(answer)[:40]}; it must be 0 to 3, or A to D")
    return _checked(question, choices, answer, where)


def _digest(subjects: Any) -> str:
    digest = hashlib.sha256()
    for subject in subjects:
        digest.update(repr((subject.name, subject.shots, subject.questions)).encode())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line:.200}"
