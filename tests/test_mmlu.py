"""MMLU's log-likelihoods are lm-evaluation-harness's, however ranks, forwards and interruptions cut the work."""

import csv
import json
import random
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorasp.data.mmlu import read_mmlu
from lorasp.evaluation.mmlu import MmluEvaluation
from lorasp.evaluation.mmlu_prompts import assumed_forward, encode_texts, prompt, prompted_questions
from lorasp.evaluation.scoring import kept_parts, standing_alone
from lorasp.models.demo import convert_demo_model
from lorasp.models.weights import load_config
from lorasp.recipe import Mmlu, Model, RecipeError
from tests.harness import harness_scores
from tests.real_data import real_data
from tests.test_evaluation import Unsharded
from tests.test_models import build
from tests.tiny_models import byte_tokenizer, save_model

WORDS = "ash birch cedar elm fir hazel larch oak pine rowan".split()
COUNTS = {"anatomy": 11, "high_school_us_history": 3, "virology": 1}


class Ranks:
    """Ranks that are threads of this process, each with a model of its own."""

    def __init__(self, world_size: int = 1) -> None:
        self.values, self.barrier = [None] * world_size, threading.Barrier(world_size)
        self.of = [Rank(self, rank, world_size) for rank in range(world_size)]

    def run(self, work) -> list:
        """`work(rank)` of each, at the same time; an error of one is raised."""
        found: list = [None] * len(self.of)

        def call(rank) -> None:
            try:
                found[rank.rank] = work(rank)
            except BaseException as error:
                found[rank.rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=call, args=(rank,)) for rank in self.of]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for value in found:
            if isinstance(value, BaseException) and not isinstance(value, threading.BrokenBarrierError):
                raise value
        return found


class Rank:
    device = torch.device("cpu")

    def __init__(self, ranks: Ranks, rank: int, world_size: int) -> None:
        self._ranks, self.rank, self.world_size, self.is_main = ranks, rank, world_size, rank == 0

    def gather(self, value) -> list:
        self._ranks.values[self.rank] = value
        self._ranks.barrier.wait(60)
        values = list(self._ranks.values)
        self._ranks.barrier.wait(60)
        return values


def write_tree(root: Path, counts: dict[str, int]) -> Path:
    """Subjects with so many questions of words, long ones in history; some choices end in a space."""
    numbers = random.Random(0)
    for subject, count in counts.items():
        length = 30 if "history" in subject else 5
        for split, rows in (("dev", 5), ("test", count)):
            (root / split).mkdir(parents=True, exist_ok=True)
            with open(root / split / f"{subject}_{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows(
                    [
                        " " + " ".join(numbers.choices(WORDS, k=numbers.randint(1, length))) + "?\n",
                        *(numbers.choice(WORDS) + numbers.choice(["", " "]) for _ in range(4)),
                        numbers.choice("ABCD"),
                    ]
                    for _ in range(rows)
                )
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("mmlu"), COUNTS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model") / "llama")


def evaluation(directory: Path, tree: Path, **settings) -> MmluEvaluation:
    asked = {"subjects": list(COUNTS), "max_length": 4000, "tokens": 1500} | settings
    config = load_config(directory, Model(path=str(directory)))
    return MmluEvaluation(Mmlu(data=str(tree), **asked), AutoTokenizer.from_pretrained(directory), config)


def run(asked: MmluEvaluation, directory: Path, path: Path, world_size: int = 1, leaves_after: int | None = None):
    """(the score, the predictions' lines by place)."""
    told: list[tuple[int, int, float]] = []
    engines = [Unsharded(build(directory)) for _ in range(world_size)]  # transformers builds one at a time

    def work(rank: Rank):
        forwards = 0

        def leaves() -> bool:
            nonlocal forwards
            forwards += 1
            return leaves_after is not None and forwards >= leaves_after

        def progress(*values) -> None:
            if rank.is_main:
                told.append(values)

        engine = engines[rank.rank]
        return asked.run(engine, rank, path, {"base": "b"}, again=False, leaves=leaves, progress=progress)

    scores = Ranks(world_size).run(work)
    assert all((score is None) == (scores[0] is None) for score in scores)
    for before, after in zip(told, told[1:], strict=False):
        assert before[0] <= after[0]
    lines = [json.loads(line) for line in read_lines(path)]
    return scores[0], {line["place"]: line for line in lines}


def read_lines(path: Path) -> list[str]:
    part = path.with_name(f"{path.name}.part")
    return (path if path.exists() else part).read_text().splitlines()[1:]


def values(lines: dict[int, dict]) -> list[float]:
    return [value for place in sorted(lines) for value in lines[place]["log_likelihoods"]]


@pytest.mark.parametrize("max_length", [4000, 500], ids=["whole", "truncated"])
@pytest.mark.parametrize("shots", [5, 0])
def test_log_likelihoods_are_the_harness_s(shots, max_length, directory, tree, tmp_path):
    """With a tokenizer of two tokens for " A" and BOS before a text; 500 tokens hold no prompt of 5 shots."""
    pytest.importorskip("lm_eval")
    _, lines = run(evaluation(directory, tree, shots=shots, max_length=max_length), directory, tmp_path / "ours.jsonl")
    theirs = harness_scores(
        directory, tree, list(COUNTS), tmp_path, limit=20, shots=shots, batch_size=4, max_length=max_length
    )
    assert len(lines) == len(theirs) == sum(COUNTS.values())
    for line in lines.values():
        expected = theirs[line["subject"], line["index"]]
        assert line["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
        assert (line["lost_tokens"] > 0) == (line["tokens"] - 1 > max_length)


def test_the_prompt_is_the_harness_s_word_for_word(tree):
    subject = read_mmlu(Mmlu(data=str(tree), subjects=["high_school_us_history"])).subjects[0]
    text = prompt(subject, 5, subject.questions[0])
    assert text.startswith(
        "The following are multiple choice questions (with answers) about high school us history.\n\n"
    )
    assert text.count("\nAnswer: ") == 5 and text.endswith("\nAnswer:") and text.count("\n\n") == 6


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("reuse", [True, False])
def test_ranks_and_reuse_change_nothing(world_size, reuse, directory, tree, tmp_path):
    score, lines = run(evaluation(directory, tree), directory, tmp_path / "one.jsonl")
    other = evaluation(directory, tree, reuse_prefix=reuse)
    again, others = run(other, directory, tmp_path / "other.jsonl", world_size)
    assert values(others) == pytest.approx(values(lines), abs=1e-4)
    assert again.micro == score.micro and again.macro == score.macro and again.subjects == score.subjects
    assert score.micro.questions == 15 and set(score.categories) == {"stem", "humanities", "other"}
    right = sum(line["correct"] for line in lines.values())
    assert score.micro.correct == right == sum(part.correct for part in score.categories.values())
    for line in lines.values():
        best = max(line["log_likelihoods"])
        assert line["choice"] == "ABCD"[line["log_likelihoods"].index(best)]
        assert line["correct"] == (line["choice"] == line["answer"])


def test_one_question_on_more_ranks_than_questions(directory, tree, tmp_path):
    one = evaluation(directory, tree, subjects=["virology"])
    _, alone = run(one, directory, tmp_path / "1.jsonl")
    score, lines = run(one, directory, tmp_path / "4.jsonl", world_size=4)
    assert score.micro.questions == 1 and values(lines) == pytest.approx(values(alone), abs=1e-4)


def test_reuse_computes_the_shots_of_a_subject_once(directory, tree, tmp_path):
    with_reuse, _ = run(evaluation(directory, tree), directory, tmp_path / "with.jsonl")
    without, _ = run(evaluation(directory, tree, reuse_prefix=False), directory, tmp_path / "without.jsonl")
    # 11 and 3 questions of two subjects share their shots; the only one of the third shares with none.
    assert with_reuse.computed_tokens < 0.5 * without.computed_tokens


@pytest.mark.parametrize("then", [1, 3])
def test_an_evaluation_that_left_goes_on_where_it_was_on_any_number_of_ranks(then, directory, tree, tmp_path):
    asked, path = evaluation(directory, tree, tokens=300), tmp_path / "left.jsonl"
    score, lines = run(asked, directory, path, world_size=2, leaves_after=2)
    assert score is None and 0 < len(lines) < 15
    score, whole = run(asked, directory, path, world_size=then)
    assert {place: whole[place] for place in lines} == lines
    _, calm = run(asked, directory, tmp_path / "calm.jsonl")
    assert score.micro.questions == 15 and values(whole) == pytest.approx(values(calm), abs=1e-4)
    # Nothing is left to do, and nothing is done.
    score, _ = run(asked, directory, path)
    assert score.computed_tokens == 0 and score.questions_per_second is None


def test_an_over_long_prompt_loses_whole_shots_where_that_is_wanted(directory, tree, tmp_path):
    """Each row is then the prompt of fewer shots, as long as it can be."""
    asked = evaluation(directory, tree, truncate="shots", max_length=700)
    score, lines = run(asked, directory, tmp_path / "shots.jsonl", world_size=2)
    assert score.truncated == 0 and score.dropped_shots == sum(line["shots"] < 5 for line in lines.values()) > 0
    tokenizer = byte_tokenizer()
    for question in asked.questions:
        subject = next(its for its in asked.data.subjects if its.name == question.subject)
        texts = [prompt(subject, shots, subject.questions[question.index]) for shots in range(6)]
        lengths = [len(ids) + 1 for ids in encode_texts(tokenizer, texts)]  # " A" but for its last token
        assert question.shots == max(shots for shots, length in enumerate(lengths) if length <= 700)
        assert len(question.rows[0].tokens) == lengths[question.shots]
    pytest.importorskip("lm_eval")
    few = {line["shots"] for line in lines.values() if line["subject"] == "anatomy"}
    for shots in few:
        theirs = harness_scores(
            directory, tree, ["anatomy"], tmp_path / str(shots), limit=20, shots=shots, batch_size=4, max_length=4000
        )
        for line in lines.values():
            if (line["subject"], line["shots"]) == ("anatomy", shots):
                assert line["log_likelihoods"] == pytest.approx(theirs["anatomy", line["index"]], abs=1e-4)


class Joining(PreTrainedTokenizerFast):
    """Gives a text that ends in a letter the tokens of the text without it: no answer has a token of its own."""

    def __call__(self, texts, **how):
        return super().__call__([text.removesuffix(" A").removesuffix(" B") for text in texts], **how)


def test_a_tokenizer_that_joins_an_answer_with_its_prompt_is_refused(tree):
    tokenizer = byte_tokenizer()
    joining = Joining(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    data = read_mmlu(Mmlu(data=str(tree), subjects=["virology"]))
    with pytest.raises(RecipeError, match="joins 'A' with the text before it"):
        prompted_questions(data, joining, shots=5, max_length=4000, truncate="tokens")


def test_the_first_questions_are_a_part_of_all(directory, tree, tmp_path):
    asked = evaluation(directory, tree)
    some, whole = (
        run(asked.first(2), directory, tmp_path / "some.jsonl"),
        run(asked, directory, tmp_path / "all.jsonl"),
    )
    assert some[0].micro.questions == 5
    of_all = {(line["subject"], line["index"]): line["log_likelihoods"] for line in whole[1].values()}
    for line in some[1].values():
        assert line["log_likelihoods"] == pytest.approx(of_all[line["subject"], line["index"]], abs=1e-4)


@pytest.mark.slow
def test_a_plan_without_the_questions_assumes_about_the_heaviest_of_them(tmp_path):
    """The four of the 57 subjects that are longest, or meet one that is."""
    subjects = [
        f"high_school_{name}" for name in ("computer_science", "european_history", "us_history", "world_history")
    ]
    directory, settings = convert_demo_model(), {"subjects": subjects, "max_length": 8192, "tokens": 4096}
    asked = evaluation(directory, real_data("mmlu"), **settings)
    real, _ = asked.heaviest(2)
    assumed, _ = assumed_forward(asked.settings, load_config(directory, Model(path=str(directory))))
    assert 1 <= assumed.token_count / real.token_count < 1.1
    most = max(
        sum(part.link.room for part in standing_alone(forward, kept_parts(its)).parts)
        for its in asked.plan(2).forwards
        for forward in its
    )
    assert 1 <= sum(part.link.room for part in assumed.parts) / most < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [2048, 300], ids=["whole", "truncated"])
def test_a_real_model_on_the_real_data_scores_as_the_harness_does(max_length, tmp_path):
    """SmolLM2-135M in fp32; launch/benchmark_mmlu.py compares more of it."""
    pytest.importorskip("lm_eval")
    data = real_data("mmlu")
    directory, subjects = convert_demo_model(), ["global_facts", "sociology"]
    asked = evaluation(directory, data, subjects=subjects, limit=4, max_length=max_length)
    _, lines = run(asked, directory, tmp_path / "ours.jsonl")
    theirs = harness_scores(directory, data, subjects, tmp_path, limit=4, batch_size=4, max_length=max_length)
    assert len(lines) == 8
    for line in lines.values():
        expected = theirs[line["subject"], line["index"]]
        assert line["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        first, second = sorted(expected, reverse=True)[:2]
        if first - second > 1e-3:
            assert line["choice"] == "ABCD"[expected.index(first)]
