"""A run's curves and settings for TensorBoard. Made on rank 0 only; the other ranks' numbers are gathered first."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lorasp.trainer import PARTS

GIB = 2**30
# Columns of the HPARAMS tab beside the settings: the last value of each in a run.
_COMPARED = (
    "evaluate/exact_match",
    "evaluate/held_out_loss",
    "train/loss",
    "memory/highest_peak_gib",
    "throughput/real_tokens_per_second",
)
_TOKENS = ("real", "computed")


class TensorBoard:
    """Writes one event file under `log_dir`, from the first number on.

    Tags in use: `train/loss`, `train/learning_rate`, `train/gradient_norm`, `throughput/real_tokens_per_second`,
    `throughput/computed_tokens_per_second`, `throughput/step_seconds`, `throughput/mfu`, those of `memory_scalars` and
    `part_scalars`, and `evaluate/NAME` of each number that the task scores: `held_out_loss`; `exact_match` of texts;
    `bleu`, `rouge1`, `rouge2` and `rougeL` of translations; of a GLUE task its metrics (`accuracy`, `f1`, `matthews`,
    `pearson`, `spearman`), with `selection_` or `mismatched_` before those of other rows; `mmlu_accuracy` and
    `mmlu_accuracy_macro`. The CUSTOM SCALARS tab shows all ranks'
    memory in one chart, and their seconds in each part of a step; HPARAMS compares runs by their settings.
    """

    def __init__(
        self,
        log_dir: str | Path,
        world_size: int,
        settings: Mapping[str, str | float] | None = None,
        loss_unit: str = "nats a token",
    ):
        """settings: by dotted name; shown in the HPARAMS tab. loss_unit: in the title of the losses' chart."""
        # Imported here, and not with the first curve: it costs a second and much memory, which a run without
        # TensorBoard, or another rank, need not pay, and which is to be over before anything is measured.
        from torch.utils.tensorboard import SummaryWriter, summary

        self._make_writer = partial(SummaryWriter, str(log_dir), flush_secs=15)
        self._writer: SummaryWriter | None = None
        self.resumed_at: int | None = None  # a step: points of later ones, in files from before, are hidden
        self._layout = _layout(world_size, loss_unit)
        # SummaryWriter.add_hparams would put them into a second run, without curves, beside this one.
        *self._session_start, self._session_end = summary.hparams(dict(settings or {}), dict.fromkeys(_COMPARED, 0.0))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point at optimizer step `step` for each tag. Give Python numbers: a GPU tensor would be waited for."""
        if self._writer is None:
            # Only now: a run that is refused before its first number leaves no file, and may come again by that name.
            after = None if self.resumed_at is None else self.resumed_at + 1
            self._writer = self._make_writer(purge_step=after)
            self._writer.add_custom_scalars(self._layout)
            for part in self._session_start:
                self._writer.file_writer.add_summary(part)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.file_writer.add_summary(self._session_end)
            self._writer.close()


def memory_scalars(peak_bytes: Sequence[int], now_bytes: Sequence[int]) -> dict[str, float]:
    """Both measures of each rank, in rank order and bytes, as scalars in GiB; and the highest of the peaks."""
    scalars = {"memory/highest_peak_gib": max(peak_bytes) / GIB}
    for rank, (peak, now) in enumerate(zip(peak_bytes, now_bytes, strict=True)):
        scalars[_memory_tag(rank, "peak")] = peak / GIB
        scalars[_memory_tag(rank, "now")] = now / GIB
    return scalars


def part_scalars(part_seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of a step by part, of each rank in rank order, as scalars."""
    return {_part_tag(rank, part): value for rank, parts in enumerate(part_seconds) for part, value in parts.items()}


def _part_tag(rank: int, part: str) -> str:
    return f"step/rank_{rank}_{part}_seconds"


def _memory_tag(rank: int, what: str) -> str:
    return f"memory/rank_{rank}_{what}_gib"


def _layout(world_size: int, loss_unit: str) -> dict[str, dict[str, list]]:
    """Charts with several curves, by category, as TensorBoard wants them."""
    charts = {
        "memory": {
            "peak of every rank (GiB)": [_memory_tag(rank, "peak") for rank in range(world_size)],
            "held now by every rank (GiB)": [_memory_tag(rank, "now") for rank in range(world_size)],
        },
        "throughput": {"tokens a second, all ranks": [f"throughput/{kind}_tokens_per_second" for kind in _TOKENS]},
        "step": {
            f"seconds in {part}, every rank": [_part_tag(rank, part) for rank in range(world_size)] for part in PARTS
        },
        "loss": {f"training and held-out ({loss_unit})": ["train/loss", "evaluate/held_out_loss"]},
    }
    # Tags are regular expressions there: without an end, rank_1 would be rank_10 too.
    return {
        category: {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in titled.items()}
        for category, titled in charts.items()
    }
