"""What a run measures, from its first phase to its report: told on the console, drawn in TensorBoard, kept."""

import copy
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from lorasp.accounting import TrainingFlops
from lorasp.evaluation.mmlu import MmluEvaluation, MmluScore
from lorasp.memory import MemoryMeter, gib
from lorasp.models.recompute import kept_bytes_per_token
from lorasp.planning import Plan
from lorasp.recipe import Recipe, RecipeError
from lorasp.reporting.console import Console
from lorasp.reporting.drift import drift
from lorasp.reporting.mmlu_text import mmlu_line, paper_figure
from lorasp.reporting.out_of_memory import describe_out_of_memory, is_out_of_memory
from lorasp.reporting.report_text import format_peaks
from lorasp.reporting.run_report import build_report, rank_phases, write_report
from lorasp.reporting.tensorboard import memory_scalars, part_scalars
from lorasp.reporting.trackers import Trackers, check_trackers
from lorasp.tasks import task_of
from lorasp.tasks.base import Score
from lorasp.trainer import Diverged, LogPoint
from lorasp.whole_files import write_text_whole
from lorasp.zero.launch import Ranks

FIRST_STEP = "train_first_step"


class RunLog:
    """One a rank. Rank 0 talks and writes; methods marked collective gather from all ranks and must run on each."""

    def __init__(self, recipe: Recipe, ranks: Ranks, run_dir: Path, *, trains: bool = True) -> None:
        """trains: False of an evaluation, whose scores are of no time before or after training."""
        self._recipe, self._ranks, self._run_dir, self._trains = recipe, ranks, run_dir, trains
        self.console = Console(ranks.is_main)
        check_trackers(recipe.tracking.with_)
        # Of all ranks at once, before rank 0 alone loads trackers: their curves share one axis.
        ranks.accelerator.wait_for_everyone()
        self._started = time.perf_counter()
        # Before the meter: what TensorBoard and the scorers take to be imported is no part of the run's memory.
        task_of(recipe).load_scorers()
        self._trackers = Trackers(recipe, run_dir, ranks.world_size, is_main=ranks.is_main, warn=self.console.warn)
        self._meter = MemoryMeter(ranks.device)
        self._phases = [""]  # that are open, the innermost last
        self._timeline: dict[str, list] = {"seconds": [], "phase": [], "now_bytes": [], "peak_bytes": []}
        self._count_held: Callable[[], dict[str, int]] = dict
        self._held: dict[str, dict[str, int]] = {}
        self._planned: dict[str, dict[str, int]] = {}
        self._metrics: dict[str, float] = {}
        self._history: list[dict[str, float]] = []
        self._parts: list[tuple[dict[str, float], ...]] = []  # of each rank, at each log point
        self._held_now: list[tuple[int, ...]] = []  # by each rank, at each log point
        self._scores: list[dict[str, float]] = []
        self._splits: dict[str, dict[str, Any]] = {}
        self._mmlu: list[dict[str, Any]] = []
        self._mmlu_asked: dict[str, Any] = {}
        self._lm_eval: dict[str, Any] | None = None
        # Of the run before it was resumed: its log points, and its steps. Those of this process come after.
        self._before = self._resumed_at = 0
        self._progress = None
        self._policy: str | None = None  # of activations, in force

    def planned(self, plan: Plan) -> None:
        """Tells the plan, and keeps it for the report, beside what will be measured."""
        rehearsed = {f"rehearse_{phase}": parts for phase, parts in plan.phases.items()}
        self._planned = {**plan.phases, **rehearsed, FIRST_STEP: plan.phases["train"]}
        peaks = ", ".join(f"{phase} {gib(plan.peak(phase))}" for phase in plan.phases)
        self.console.info(f"planned peak of a rank's tensors (GiB): {peaks}")

    @contextmanager
    def phase(self, name: str, task: str | None = None) -> Iterator[None]:
        """Measures the peak of what runs within; phases nest, and one that is entered again keeps its highest peak.

        task: what of the phase runs, for the advice. Trackers are closed where an error ends the run. Raises
        RecipeError with this table and advice where the phase runs out of memory.
        """
        try:
            with self._meter.phase(name), self._marked(name):
                yield
            self._mark()  # the phase around this one goes on
        except BaseException as error:
            if not isinstance(error, Diverged):  # after which the run saves and reports
                self._trackers.close()  # the process ends with no clean-up of the interpreter's
            if not is_out_of_memory(error):
                raise
            raise RecipeError(
                describe_out_of_memory(
                    error,
                    name,
                    self._recipe,
                    self._ranks.rank,
                    self._meter.peaks,
                    self._count_held(),
                    task,
                    world_size=self._ranks.world_size,
                    policy=self._policy,
                )
            ) from error
        self._held[name] = self._count_held()

    @contextmanager
    def _marked(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self._mark()
        try:
            yield
            self._mark()
        finally:
            self._phases.pop()

    def _mark(self) -> None:
        """Adds a measurement to this rank's timeline."""
        self._timeline["seconds"].append(round(time.perf_counter() - self._started, 3))
        self._timeline["phase"].append(self._phases[-1])
        self._timeline["now_bytes"].append(self._meter.now_bytes())
        self._timeline["peak_bytes"].append(self._meter.peak_so_far_bytes())

    def model_loaded(self, parameters: dict[str, int], count_held: Callable[[], dict[str, int]]) -> None:
        """From now on each phase ends with a count of what this rank holds, in bytes by part."""
        self._count_held = count_held
        self.console.info(
            f"model: {parameters['total']:,} parameters, {parameters['trained']:,} trained; base "
            f"{self._recipe.quantization.format}, {count_held()['base_shard'] / 2**20:.1f} MiB of it on rank 0"
        )

    def started(self, errors: Mapping[str, tuple[float, float]]) -> None:
        """Tells, and keeps for the report, what quantization loses of the adapted linears, and what is left of that
        with the start of their adapters (Eq. 3). errors: of each (before, after), as shares of the weight's norm.
        """
        if not any(plain for plain, _ in errors.values()):
            return
        plain, left = (statistics.mean(its[i] for its in errors.values()) for i in (0, 1))
        worst = max(left / plain for plain, left in errors.values() if plain)
        self._metrics |= {"quantization_error_plain": plain, "quantization_error_residual": left}
        self.console.info(
            f"base: quantization takes {plain:.4f} of a linear's norm, {left:.4f} with the start of its adapter (mean "
            f"of {len(errors)} linears; {1 - left / plain:.1%} of that is made good, {1 - worst:.1%} at the least)"
        )

    def recomputes(self, config: PreTrainedConfig, dtype: torch.dtype, policy: str, fallback: str | None) -> None:
        """Tells the activation policy in force, what it keeps, and why it is not the one asked for (`fallback`)."""
        self._policy = policy
        if fallback:
            asked = self._recipe.training.activation_checkpointing
            self.console.warn(f"activation_checkpointing={asked} is {policy} here: {fallback}")
        kept = kept_bytes_per_token(policy, config, dtype.itemsize)
        if kept is None:
            self.console.info(f"activations: {policy}, all that autograd keeps")
        else:
            self.console.info(
                f"activations: {policy} keeps {kept:,} bytes a token in each of {config.num_hidden_layers} layers"
            )

    def state(self, samples: list[dict[str, str]]) -> dict[str, Any]:
        """What a run that goes on needs for its report, plain data."""
        log = {"history": self._history, "scores": self._scores, "metrics": self._metrics, "samples": samples}
        log |= {"mmlu": self._mmlu, "mmlu_asked": self._mmlu_asked}
        return copy.deepcopy(log)  # it is written while training goes on

    def resume(self, log: Mapping[str, Any], step: int, world_size: int) -> None:
        """Goes on after `step` with what `state` gave there. world_size: of that part of the run."""
        self._history, self._scores = list(log["history"]), list(log["scores"])
        # Checkpoints of older versions have only some of it.
        self._mmlu, self._mmlu_asked = list(log.get("mmlu", [])), dict(log.get("mmlu_asked", {}))
        self._metrics = {**log["metrics"], **self._metrics}
        self._before, self._resumed_at = len(self._history), step
        self._trackers.resume(step)
        self.console.info(f"resumed after step {step} of {world_size} rank(s)")

    def rehearsed(self) -> None:
        """Tells the rehearsal's peaks of every rank. Collective."""
        rehearsed = {name: peak.peak_bytes for name, peak in self._meter.peaks.items() if "rehearse" in name}
        peaks = self._ranks.gather(rehearsed)
        for name in peaks[0]:
            told = ", ".join(f"rank {rank} {gib(its[name])} GiB" for rank, its in enumerate(peaks))
            self.console.info(f"{name.replace('_', ' ')}: peak above baseline {told}")

    @contextmanager
    def training(self, steps: int, flops: TrainingFlops, product_limit: float) -> Iterator[None]:
        """The train phase, with a progress bar; its first step is a phase of its own. Collective.

        flops: what the model needs; product_limit: this rank's FLOP/s in matrix products.
        """
        self._flops, self._product_limit = flops, sum(self._ranks.gather(product_limit))
        done = self._history[-1]["step"] if self._history else 0
        with self.phase("train"), self.console.progress(steps, "step", done) as self._progress:
            with ExitStack() as self._first_step:
                self._first_step.enter_context(self.phase(FIRST_STEP))
                yield

    def stepped(self, step: int) -> None:
        """To be called after each training step, before it is logged."""
        self._meter.settle_after_step()
        self._first_step.close()  # once

    def advanced(self) -> None:
        """To be called before each unit of the model is gathered, and within it where little is in use."""
        self._meter.settle_if_grown()

    def trained(self, point: LogPoint) -> None:
        """A log point of the training loop. Collective."""
        self._meter.settle()
        self._mark()
        row = asdict(point)
        of_ranks = self._ranks.gather(
            (self._timeline["peak_bytes"][-1], self._timeline["now_bytes"][-1], row.pop("part_seconds"))
        )
        peaks, now, parts = zip(*of_ranks, strict=True)
        self._held_now.append(now)
        row["mfu"] = self._flops.mfu(point.real_tokens_per_second, point.labels_per_second, self._product_limit)
        self._trackers.scalars(
            point.step,
            {
                "train/loss": point.loss,
                "train/gradient_norm": point.gradient_norm,
                "train/learning_rate": point.learning_rate,
                "throughput/real_tokens_per_second": point.real_tokens_per_second,
                "throughput/computed_tokens_per_second": point.computed_tokens_per_second,
                "throughput/step_seconds": point.step_seconds,
                "throughput/mfu": row["mfu"],
                **memory_scalars(peaks, now),
                **part_scalars(parts),
            },
        )
        self._progress.advance(
            point.step - (self._history[-1]["step"] if self._history else 0),
            log=True,
            loss=point.loss,
            lr=point.learning_rate,
            grad_norm=point.gradient_norm,
            tokens_per_s=round(point.real_tokens_per_second),
        )
        self._history.append(row)
        self._parts.append(parts)
        self._metrics["final_train_loss"] = point.loss

    def scored(self, step: int, score: Score) -> None:
        """A score of what is held out; that of step 0 is the untrained model's, where it trains."""
        self._keep(step, score.numbers)
        self._scores.append({"step": step, **score.numbers})
        if step or not self._trains:
            self._splits = {name: dict(split) for name, split in score.splits.items()}
        self._trackers.scalars(step, {f"evaluate/{name}": value for name, value in score.numbers.items()})
        for name, text in score.files.items():
            if self._ranks.is_main:
                write_text_whole(self._run_dir / name, text)
        self.console.info(f"held out, step {step}: {score.told}")

    def _keep(self, step: int, numbers: Mapping[str, float]) -> None:
        when = ("_after" if step else "_before") if self._trains else ""
        self._metrics |= {f"{name}{when}": value for name, value in numbers.items()}

    def mmlu_scored(
        self, step: int, evaluation: MmluEvaluation, score: MmluScore, config: PreTrainedConfig, *, whole: bool
    ) -> None:
        """An MMLU score; that of step 0 is the untrained model's. whole: of all questions that the recipe asks."""
        values = {"step": step, **score.to_dict()}
        self._mmlu = [its for its in self._mmlu if its["step"] != step] + [values]  # a resumed run scores it again
        if whole:
            self._keep(step, {"mmlu_accuracy": score.micro.accuracy})
        if whole or not self._mmlu_asked:  # a run that is stopped may have asked some of them only
            self._mmlu_asked = {"asked": evaluation.report()}
            if self._trains or self._recipe.adapter.init_from is not None:  # else no method was at work
                self._mmlu_asked["paper"] = paper_figure(config, self._recipe.method)
        self._trackers.scalars(
            step,
            {"evaluate/mmlu_accuracy": score.micro.accuracy, "evaluate/mmlu_accuracy_macro": score.macro.accuracy},
        )
        self.console.info(mmlu_line(step, values, evaluation.settings.shots))

    def has_mmlu(self, step: int) -> bool:
        return any(its["step"] == step for its in self._mmlu)

    def harness_scored(self, results: dict[str, Any]) -> None:
        """What lm-evaluation-harness found."""
        self._lm_eval = results
        for task, its in results["tasks"].items():
            told = ", ".join(f"{metric} {value:.4g}" for metric, value in its["metrics"].items())
            self.console.info(f"lm-eval, {task}: {told}")

    def finish(
        self,
        status: str,
        *,
        parameters: dict[str, int],
        optimizer_state_bytes: int,
        data: dict[str, Any],
        samples: list[dict[str, str]],
        model_commit: str | None = None,
    ) -> None:
        """Writes report.json and report.md, and prints the answers and every rank's peaks. Collective."""
        phases = self._ranks.gather(rank_phases(self._ranks.rank, self._meter.peaks, self._held))
        optimizer = self._ranks.gather(optimizer_state_bytes)
        timeline = self._ranks.gather({"rank": self._ranks.rank, **self._timeline})
        hosts = self._ranks.gather(socket.gethostname())
        self._trackers.close()
        if not self._ranks.is_main:
            return
        steps = [row["step"] for row in self._history[self._before :]]
        drifts = drift(
            steps, self._held_now, resumed_at=self._resumed_at, profiled_from=self._recipe.profile.first_step
        )
        for its in drifts:
            if its.is_growing:
                self.console.warn(
                    f"rank {its.rank} held {its.share:.1%} more after step {its.most_at_step} than after step "
                    f"{its.from_step} ({gib(its.held_bytes)} -> {gib(its.most_bytes)} GiB above the baseline); a "
                    f"longer run may hold more yet"
                )
        report = build_report(
            recipe=self._recipe.to_dict(),
            world_size=self._ranks.world_size,
            device=str(self._ranks.device),
            parameters={**parameters, "optimizer_state_bytes": sum(optimizer)},
            ranks=phases,
            throughput=self._throughput(),
            metrics=self._metrics,
            data=data,
            samples=samples,
            history=self._history,
            status=status,
            timeline=timeline,
            scores=self._scores,
            splits=self._splits,
            model_commit=model_commit,
            planned=self._planned,
            drift=[{**asdict(its), "share": its.share} for its in drifts],
            hosts=hosts,
            mmlu={**self._mmlu_asked, "scores": self._mmlu} if self._mmlu_asked else None,
            lm_eval=self._lm_eval,
        )
        path = write_report(self._run_dir, report)
        for sample in samples:
            self.console.info("\n".join(f"{key:>8}: {text.strip()}" for key, text in sample.items()))
        self.console.info(f"peak memory of every rank:\n{format_peaks(report)}")
        self.console.info(f"report: {path}")

    def _throughput(self) -> dict[str, Any]:
        """Medians over log points, without the first where there are others: it holds the first step's allocations."""
        steady = self._history[self._before + 1 :] or self._history[self._before :]
        names = {
            "real_tokens_per_second": "real_tokens_per_second",
            "computed_tokens_per_second": "computed_tokens_per_second",
            "step_seconds_median": "step_seconds",
            "mfu": "mfu",
        }
        if not steady:
            return {}
        ranks = [
            {"rank": rank} | {part: statistics.median(point[part] for point in points) for part in points[0]}
            for rank, points in enumerate(zip(*(self._parts[1:] or self._parts), strict=True))
        ]
        return {name: statistics.median(p[key] for p in steady) for name, key in names.items()} | {"ranks": ranks}
