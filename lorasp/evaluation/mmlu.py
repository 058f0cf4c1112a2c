"""MMLU of the model that is still sharded: log-likelihoods of the four answers, accuracies, predictions on disk."""

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lorasp.data.mmlu import CATEGORIES, CATEGORY_OF, LETTERS, read_mmlu
from lorasp.evaluation.accuracy import Accuracy, accuracy, mean_accuracy
from lorasp.evaluation.mmlu_prompts import PROMPT_VERSION, PromptedQuestion, model_max_length, prompted_questions
from lorasp.evaluation.predictions import Predictions
from lorasp.evaluation.scoring import Forward, ScoredRow, heaviest, plan_forwards, score_forward
from lorasp.models.kept_states import KeptStates
from lorasp.recipe import Mmlu
from lorasp.zero.engine import Engine
from lorasp.zero.launch import Ranks

PREDICTIONS = "mmlu"  # in the run's directory: a file of Predictions for each step that was scored


@dataclass(frozen=True)
class MmluScore:
    """subjects, categories: by name. micro: of all questions; macro: the mean of the subjects.

    questions_per_second: of those that this process and its peers scored, None where all were there already;
    computed_tokens: that took. truncated, dropped_shots: questions that lost tokens, or shots. prepare_seconds: of
    reading and tokenizing, before any was scored.
    """

    subjects: Mapping[str, Accuracy]
    categories: Mapping[str, Accuracy]
    micro: Accuracy
    macro: Accuracy
    truncated: int
    dropped_shots: int
    prepare_seconds: float
    seconds: float
    questions_per_second: float | None
    computed_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class MmluEvaluation:
    """The questions of a run, in the tokens of its model. Each rank holds all of them, and computes its part."""

    def __init__(self, settings: Mmlu, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """Reads the data, see `read_mmlu`. Raises RecipeError, also for a tokenizer with which it cannot be scored."""
        started = time.perf_counter()
        self.data, self.settings = read_mmlu(settings), settings
        self.max_length = settings.max_length or model_max_length(config, tokenizer)
        self.questions = prompted_questions(
            self.data, tokenizer, shots=settings.shots, max_length=self.max_length, truncate=settings.truncate
        )
        self.prepare_seconds = time.perf_counter() - started

    def first(self, limit: int) -> "MmluEvaluation":
        """The same of at most `limit` questions a subject."""
        part = copy.copy(self)
        part.data = self.data.first(limit)
        part.questions = [question for question in self.questions if question.index < limit]
        return part

    def report(self) -> dict[str, Any]:
        """What was asked, for the report."""
        return {
            "source": self.data.source,
            "split": self.data.split,
            "digest": self.data.digest,
            "prompt": PROMPT_VERSION,
            "shots": self.settings.shots,
            "subjects": len(self.data.subjects),
            "questions": len(self.questions),
            "truncate": self.settings.truncate,
            "max_length": self.max_length,
        }

    def plan(self, world_size: int, done: frozenset[int] = frozenset()) -> "_Work":
        """The forwards of every rank; `done`: places of questions that are left out."""
        return _Work(self.questions, done, world_size, self.settings)

    def heaviest(self, world_size: int) -> tuple[Forward, list[ScoredRow]]:
        """The largest of all ranks' forwards, with what it goes on from, and the rows that it scores some of."""
        work = self.plan(world_size)
        return heaviest(work.forwards), work.rows

    def rehearse(self, engine: Engine, ranks: Ranks) -> None:
        """`heaviest`, on every rank. Collective."""
        forward, rows = self.heaviest(ranks.world_size)
        engine.train_mode(False)
        for _ in score_forward(engine, forward, rows, KeptStates(), ranks.device):
            pass

    def run(
        self,
        engine: Engine,
        ranks: Ranks,
        path: Path,
        model: Mapping[str, Any],
        *,
        again: bool,
        leaves: Callable[[], bool],
        progress: Callable[[int, int, float], None],
    ) -> MmluScore | None:
        """Scores what is not in the predictions at `path` yet. Collective; the same on each rank.

        model: tells it from others. again: a finished file is no answer. leaves: asked after each forward, on all
        ranks alike; where it says so the evaluation ends, with None, and goes on when it is run again. progress: is
        given how many questions are done, of how many, and the share of right ones.
        """
        engine.train_mode(False)
        predictions = Predictions(path, {**self.report(), **model})
        found = predictions.begin(again=again) if ranks.is_main else []
        lines: dict[int, dict[str, Any]] = {line["place"]: line for line in ranks.gather(found)[0]}
        before = len(lines)
        work = self.plan(ranks.world_size, frozenset(lines))
        states = KeptStates()
        scores: list[dict[int, float]] = [{} for _ in self.questions]
        started = time.perf_counter()
        right = sum(line["correct"] for line in lines.values())
        for forwards in zip(*work.forwards, strict=True):
            mine = [
                (row, [value for value, _ in found])
                for row, found in score_forward(engine, forwards[ranks.rank], work.rows, states, ranks.device)
            ]
            new = []
            for row, values in (pair for its in ranks.gather(mine) for pair in its):
                place, letters = work.origins[row]
                scores[place].update(zip(letters, values, strict=True))
                if len(scores[place]) == len(LETTERS):
                    new.append(_line(place, self.questions[place], scores[place]))
            lines |= {line["place"]: line for line in new}
            right += sum(line["correct"] for line in new)
            if ranks.is_main:
                predictions.add(new)
            progress(len(lines), len(self.questions), right / max(1, len(lines)))
            if leaves() and len(lines) < len(self.questions):
                if ranks.is_main:
                    predictions.leave()
                return None
        seconds = time.perf_counter() - started
        if ranks.is_main:
            predictions.finish()
        return self._score(lines, len(lines) - before, seconds, work.token_count)

    def _score(self, lines: Mapping[int, dict[str, Any]], scored: int, seconds: float, tokens: int) -> MmluScore:
        right: dict[str, list[bool]] = {}
        for place in sorted(lines):
            right.setdefault(lines[place]["subject"], []).append(lines[place]["correct"])
        subjects = {name: accuracy(sum(its), len(its)) for name, its in right.items()}
        categories = {}
        for category in CATEGORIES:
            its = [part for name, part in subjects.items() if CATEGORY_OF[name] == category]
            if its:
                categories[category] = accuracy(sum(a.correct for a in its), sum(a.questions for a in its))
        return MmluScore(
            subjects=subjects,
            categories=categories,
            micro=accuracy(sum(a.correct for a in subjects.values()), sum(a.questions for a in subjects.values())),
            macro=mean_accuracy(list(subjects.values())),
            truncated=sum(question.lost > 0 for question in self.questions),
            dropped_shots=sum(question.shots < self.settings.shots for question in self.questions),
            prepare_seconds=self.prepare_seconds,
            seconds=seconds,
            questions_per_second=scored / seconds if scored else None,
            computed_tokens=tokens,
        )


class _Work:
    """The rows that are left to compute, and the forwards in which the ranks do."""

    def __init__(
        self, questions: Sequence[PromptedQuestion], done: frozenset[int], world_size: int, settings: Mmlu
    ) -> None:
        places = [place for place in range(len(questions)) if place not in done]
        self.rows = [row for place in places for row in questions[place].rows]
        # Of each row: which question, and which of its answers.
        self.origins = [(place, letters) for place in places for letters in questions[place].letters]
        self.forwards = plan_forwards(
            self.rows, world_size=world_size, tokens=settings.tokens, reuse=settings.reuse_prefix
        )

    @property
    def token_count(self) -> int:
        return sum(forward.token_count for forwards in self.forwards for forward in forwards)


def _line(place: int, question: PromptedQuestion, scores: Mapping[int, float]) -> dict[str, Any]:
    values = [scores[letter] for letter in range(len(LETTERS))]
    choice = max(range(len(LETTERS)), key=values.__getitem__)  # the first of equals, as the harness's argmax
    return {
        "place": place,
        "subject": question.subject,
        "index": question.index,
        "log_likelihoods": values,
        "choice": LETTERS[choice],
        "answer": LETTERS[question.answer],
        "correct": choice == question.answer,
        "shots": question.shots,
        "tokens": question.tokens,
        "lost_tokens": question.lost,
    }


def trained_digest(engine: Engine) -> str:
    """SHA-256 of all that is trained, by which a model is told from others on the same base. Collective."""
    digest = hashlib.sha256()
    for name, values in engine.trained_values():
        digest.update(name.encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
