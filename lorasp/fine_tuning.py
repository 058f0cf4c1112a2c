"""A run from its sharded model on: rehearsed, begun or resumed, trained, scored and saved; or left, or stopped."""

import json
from typing import NoReturn

from torch import distributed as dist

from lorasp.data.batches import training_batches
from lorasp.data.order import SampleOrder
from lorasp.evaluations import Evaluations
from lorasp.health import Preempted
from lorasp.profiling import profiled
from lorasp.rehearsal import rehearse_answers, rehearse_save, rehearse_step
from lorasp.reporting.out_of_memory import ANSWERING
from lorasp.resume import LEFT, Checkpoints, Found, RunState, agreed_checkpoint, newest_checkpoint
from lorasp.run import adapter_info, clear_run_directory, compute_dtype, data_digests, save_result
from lorasp.session import Session
from lorasp.tasks import task_of
from lorasp.tasks.base import ItemBatch
from lorasp.trainer import Diverged, every, train
from lorasp.whole_files import write_text_whole


class FineTuning:
    """Each method is a stage, in this order; all are collective. resumed: the checkpoint that it goes on from."""

    def __init__(self, session: Session, order: SampleOrder, resumed: Found | None) -> None:
        self._session, self._order, self._resumed = session, order, resumed
        self._task = task_of(session.recipe)
        self._start_step = resumed.state.step if resumed else 0
        self._evaluations = Evaluations(session, leave=self._leave, again=resumed is None)
        self._checkpoints = Checkpoints(
            session.run_dir, session.recipe.checkpoint, is_main=session.ranks.is_main, warn=session.log.console.warn
        )

    @property
    def samples(self) -> list[dict[str, str]]:
        """What was asked before and after training, and the answers so far."""
        return self._evaluations.samples

    def rehearse(self, largest: ItemBatch) -> None:
        """The worst step, with `largest` as its batch, and the worst of all that comes after; see rehearsal.py."""
        its, recipe = self._session, self._session.recipe
        engine, ranks, log, watching = its.engine, its.ranks, its.log, its.watchdog.watching
        with log.phase("rehearse_train"), watching():
            accumulation, dtype = recipe.accumulation(ranks.world_size), compute_dtype(recipe)
            rehearse_step(engine, largest, accumulation, dtype=dtype, device=ranks.device, world_size=ranks.world_size)
        with log.phase("rehearse_evaluate"), watching():
            self._task.rehearse_scoring(engine, its.data, ranks)
        with log.phase("rehearse_evaluate", ANSWERING), watching():
            rehearse_answers(engine, self._evaluations.prompts(), recipe.evaluation.max_new_tokens, ranks.device)
        if its.mmlu is not None:
            with log.phase("rehearse_evaluate_mmlu"), watching():
                its.mmlu.rehearse(engine, ranks)
        with log.phase("rehearse_save"):
            rehearse_save(
                its.run_dir,
                lambda path: save_result(path, recipe, its.loaded, engine, its.tokenizer, 0, writes=ranks.is_main),
                more_bytes=self._checkpoints.more_bytes(its.loaded.counts.trained),
                is_main=ranks.is_main,
            )
        log.rehearsed()

    def begin(self) -> None:
        """Now that nothing can be refused any more: a directory for itself, or the state that it goes on from."""
        its, resumed = self._session, self._resumed
        if resumed is None or not resumed.is_of(its.run_dir):
            clear_run_directory(its.run_dir, its.ranks, its.recipe.adapter.init_from)
            if its.loaded.own_base is not None:
                its.loaded.own_base.place()
        if resumed is not None:
            resumed.restore(its.engine)
            (its.run_dir / LEFT).unlink(missing_ok=True)
            self._evaluations.samples = resumed.state.log["samples"]
            its.log.resume(resumed.state.log, self._start_step, resumed.state.world_size)
        self._checkpoints.begin(self._start_step)

    def score_start(self) -> None:
        """The model before its first step; or what the run that it goes on with left in the middle of."""
        its, step = self._session, self._start_step
        recipe = its.recipe
        if its.agreement.to_leave():  # while it loaded
            self._leave(step)
        if self._resumed is None:
            if recipe.evaluation.before:
                self._score(0)
                self._evaluations.answer("before", 0)
            if its.mmlu is not None and recipe.mmlu.before:
                self._evaluations.mmlu(0)
        elif 0 < step < self._order.total_steps:
            if every(recipe.training.evaluate_every)(step) and self._resumed.state.held_out_loss is None:
                self._score(step)
            if self._mmlu_is_due(step) and not its.log.has_mmlu(step):
                self._ask_some_mmlu(step)

    def train(self, product_limit: float) -> None:
        """The steps left. product_limit: of this rank's matrix products, FLOP/s. Raises Diverged, Preempted."""
        its, recipe, total = self._session, self._session.recipe, self._order.total_steps
        batches = training_batches(
            its.data.train.examples,
            self._order,
            micro_batch_size=recipe.training.micro_batch_size,
            rank=its.ranks.rank,
            world_size=its.ranks.world_size,
            start_step=self._start_step,
            collate=self._task.collate,
        )
        batches = profiled(
            batches,
            recipe.profile,
            its.run_dir,
            rank=its.ranks.rank,
            device=its.ranks.device,
            warn=its.log.console.warn,
            writing=its.watchdog.patient,
        )
        with its.log.training(total, its.loaded.flops, product_limit), its.watchdog.watching():
            train(
                its.engine,
                batches,
                total,
                recipe.training,
                device=its.ranks.device,
                world_size=its.ranks.world_size,
                max_loss=recipe.health.max_loss or self._task.highest_sound_loss(its.loaded.model.model.config),
                on_step=its.log.stepped,
                on_log=its.log.trained,
                when=[
                    (every(recipe.training.evaluate_every), self._score),
                    (self._mmlu_is_due, self._ask_some_mmlu),
                    (self._saves_or_leaves, self._save_or_leave),
                ],
            )

    def finish(self) -> None:
        """Keeps what was trained, and scores it."""
        its, last = self._session, self._order.total_steps
        self._keep(last)  # before the checkpoint: where room is short, the result has it
        self._checkpoint(last)
        self._checkpoints.wait()
        dist.barrier()  # rank 0 alone writes: the others would be taken to stand still in the score
        self._score(last)
        self._evaluations.answer("after", last)
        if its.mmlu is not None:
            self._evaluations.mmlu(last)
        if its.recipe.lm_eval.tasks:
            self._evaluations.harness()

    def stop(self, diverged: Diverged) -> str:
        """Keeps the last good weights, and tells so; the run's status.

        Weights that gave no sound loss are not worth keeping, and must not replace those that did.
        """
        its, warn = self._session, self._session.log.console.warn
        self._checkpoints.wait()
        kept_step = diverged.step - 1 if diverged.weights_are_good else None
        if kept_step is None and (last := agreed_checkpoint(its.ranks, lambda: newest_checkpoint(its.run_dir, warn))):
            last.restore(its.engine)
            kept_step = last.state.step
        kept = "nothing was saved (checkpoint.every_steps)"
        if kept_step is not None:
            self._keep(kept_step)
            kept = f"kept is what step {kept_step} gave"
        warn(f"{diverged}; {kept}")
        return f"stopped: {diverged}; {kept}"

    def left(self, preempted: Preempted) -> None:
        """Tells where, to whoever waits for the run, once its checkpoint is whole."""
        its = self._session
        self._checkpoints.wait()
        if its.ranks.is_main:
            write_text_whole(its.run_dir / LEFT, json.dumps(self._checkpoints.left_at(preempted.step)))
        goes_on = "with resume=auto it" if its.recipe.resume == "never" else "the same command"
        its.log.console.info(f"{preempted}; {goes_on} goes on")

    def _score(self, step: int) -> None:
        self._evaluations.score(step, final=step == self._order.total_steps)

    def _mmlu_is_due(self, step: int) -> bool:
        its = self._session
        return its.mmlu is not None and every(its.recipe.mmlu.every_steps)(step) and step < self._order.total_steps

    def _ask_some_mmlu(self, step: int) -> None:
        self._evaluations.mmlu(step, self._session.recipe.mmlu.every_steps_limit)

    def _saves_or_leaves(self, step: int) -> bool:
        its = self._session
        return its.agreement.saves(its.ranks.is_main and self._checkpoints.is_due(step))

    def _save_or_leave(self, step: int) -> None:
        if self._session.agreement.leaves:
            self._leave(step)
        self._checkpoint(step)

    def _leave(self, step: int) -> NoReturn:
        if self._checkpoints.newest != step:
            self._checkpoint(step)
        raise Preempted(step)

    def _checkpoint(self, step: int) -> None:
        its = self._session
        state = RunState.of(
            step,
            its.recipe,
            base_digest=its.loaded.base_digest,
            data=data_digests(its.data),
            world_size=its.ranks.world_size,
            log=its.log.state(self.samples),
        )
        with its.log.phase("save"), its.watchdog.patient():
            info = adapter_info(its.recipe, its.loaded, step)
            self._checkpoints.save(state, its.engine, info, its.loaded.model)

    def _keep(self, step: int) -> None:
        its = self._session
        self._checkpoints.wait()  # one that the disk refuses fills it until it is given up
        with its.log.phase("save"):
            writes = its.ranks.is_main
            path = save_result(its.run_dir, its.recipe, its.loaded, its.engine, its.tokenizer, step, writes=writes)
        its.log.console.info(f"saved {path} at step {step}")
