"""What a model is asked, while it trains or alone: held-out rows, sample answers, MMLU, the harness's tasks."""

import time
from collections.abc import Callable
from typing import NoReturn

from lorasp.adapter import model_selection_digest
from lorasp.data.examples import prompt_ids
from lorasp.evaluation.answers import greedy_answers
from lorasp.evaluation.harness import run_harness
from lorasp.evaluation.mmlu import PREDICTIONS, MmluEvaluation, MmluScore, trained_digest
from lorasp.reporting.out_of_memory import ANSWERING
from lorasp.run import compute_dtype
from lorasp.session import Session
from lorasp.tasks import task_of

_TOLD_EVERY = 5.0  # seconds: lines of MMLU's progress in a log file


class Evaluations:
    """Of one run. Each is a phase of its own, watched, in the log and the report; collective.

    leave: called with the step on all ranks where the run is asked to leave within an evaluation; it raises. again:
    whether MMLU begins anew where predictions of the same model are there. samples: what `answer` fills.
    """

    def __init__(self, session: Session, *, leave: Callable[[int], NoReturn], again: bool) -> None:
        self._session, self._leave, self._again = session, leave, again
        self._task = task_of(session.recipe)
        self.samples = session.data.samples(session.recipe.evaluation.samples) if session.data else []

    def score(self, step: int, *, final: bool = True) -> None:
        """What is held out. final: also what takes too long to be scored before the end."""
        its = self._session
        with its.log.phase("evaluate"), its.watchdog.watching():
            score = self._task.score(its.engine, its.data, its.ranks, lambda: self._leave_if_asked(step), final=final)
        if score is not None:
            its.log.scored(step, score)

    def answer(self, when: str, step: int) -> None:
        """Adds to each sample, as `when`, what the model answers now."""
        its = self._session
        if not self.samples:
            return
        with its.log.phase("evaluate", ANSWERING), its.watchdog.watching():
            answers = greedy_answers(
                its.engine,
                self.prompts(),
                eos=its.tokenizer.eos_token_id,
                max_new_tokens=its.recipe.evaluation.max_new_tokens,
                device=its.ranks.device,
                before_batch=lambda: self._leave_if_asked(step),
            )
        for sample, answer in zip(self.samples, answers, strict=True):
            sample[when] = its.tokenizer.decode(answer)

    def prompts(self) -> list[list[int]]:
        """Of the samples, in tokens."""
        tokenizer = self._session.tokenizer
        return [prompt_ids(tokenizer, sample["prompt"], sample.get("layout")) for sample in self.samples]

    def mmlu(self, step: int, limit: int | None = None) -> None:
        """Of all its questions, or so many of each subject; the predictions go to `mmlu/`."""
        its = self._session
        asked = its.mmlu if limit is None else its.mmlu.first(limit)
        with its.log.phase("evaluate_mmlu"), its.watchdog.watching():
            found = self._ask_mmlu(asked, step)
        if found is None:
            self._leave(step)
        its.log.mmlu_scored(step, asked, found, its.loaded.model.model.config, whole=limit is None)

    def _ask_mmlu(self, questions: MmluEvaluation, step: int) -> MmluScore | None:
        """See `MmluEvaluation.run`."""
        its = self._session
        model = {
            "base": its.loaded.base_digest,
            "quantization": its.recipe.quantization.kind(),
            "method": its.recipe.method,
            "adapter": its.recipe.adapter.model_dump(exclude={"init_from", "dropout"}),
            "selection": model_selection_digest(its.loaded.model.model),
            "trained": trained_digest(its.engine),
            "dtype": str(compute_dtype(its.recipe)),
        }
        last = float("-inf")  # when a line was told: the first forward's is
        with its.log.console.progress(len(questions.questions), "MMLU question") as line:
            before = 0

            def progress(done: int, total: int, right: float) -> None:
                nonlocal before, last
                log = done == total or time.monotonic() - last >= _TOLD_EVERY
                last = time.monotonic() if log else last
                line.advance(done - before, log=log, accuracy=right)
                before = done

            return questions.run(
                its.engine,
                its.ranks,
                its.run_dir / PREDICTIONS / f"step-{step:08d}.jsonl",
                model,
                again=self._again,
                leaves=its.agreement.to_leave,
                progress=progress,
            )

    def harness(self) -> None:
        """lm-evaluation-harness's tasks."""
        its = self._session
        with its.log.phase("evaluate_lm_eval"):
            found = run_harness(its.engine, its.recipe.lm_eval, its.tokenizer, its.ranks)
        its.log.harness_scored(found)

    def _leave_if_asked(self, step: int) -> None:
        if self._session.agreement.to_leave():
            self._leave(step)
