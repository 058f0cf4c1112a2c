"""The trackers that a recipe names in `tracking.with`: each gets the same numbers, from rank 0."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorasp.recipe import Recipe, RecipeError
from lorasp.reporting.report_text import loss_unit
from lorasp.reporting.tensorboard import TensorBoard

_PROJECT = "lorasp"
# What a tracker's own start function calls the run; Accelerate's classes pass such arguments on.
_RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "aim": "experiment",
}
# Settings that make a run's result, or its speed; the others only say where things lie.
_HYPERPARAMETERS = (
    *("task", "method", "seed", "model", "adapter", "selection", "quantization", "data", "training"),
    "deepspeed",
)


def check_trackers(names: list[str]) -> None:
    """Raises RecipeError if a tracker's package is not installed. To be called on every rank: all refuse alike."""
    from accelerate.tracking import get_available_trackers

    missing = [name for name in names if name not in {str(tracker) for tracker in get_available_trackers()}]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise RecipeError(
            f"tracking.with: {', '.join(missing)}: not installed here, or in a version that Accelerate does not take; "
            f"pip install {packages}, or leave it out"
        )


class Trackers:
    """All trackers of a run, on rank 0; on the others, none. One that fails on the way is left out with a warning."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, world_size: int, *, is_main: bool, warn: Callable[[str], None]
    ) -> None:
        """Raises RecipeError if a tracker cannot be started (no login, no network)."""
        self._warn = warn
        self._open: dict[str, TensorBoard | _Accelerate] = {}
        settings = hyperparameters(recipe.to_dict()) | {"world_size": world_size}
        for name in recipe.tracking.with_ if is_main else ():
            if name == "tensorboard":
                unit = loss_unit(recipe.to_dict())
                self._open[name] = TensorBoard(run_dir / "tensorboard", world_size, settings, unit)
            else:
                self._open[name] = _Accelerate(name, recipe.name, run_dir, settings)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point at optimizer step `step` for each curve."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def resume(self, step: int) -> None:
        """The run goes on after `step`: what TensorBoard has of later ones is replaced; others begin a run anew."""
        if (tensorboard := self._open.get("tensorboard")) is not None:
            tensorboard.resumed_at = step

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, tell: Callable[[Any], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tell(tracker)
            except Exception as error:  # a service that went away is no reason to lose a day's training
                self._warn(f"{name} gets nothing more: {type(error).__name__}: {error}")
                del self._open[name]


class _Accelerate:
    """One of Accelerate's trackers, without its Accelerator: that one opens all of them alike, and on every rank."""

    def __init__(self, name: str, run_name: str, run_dir: Path, settings: Mapping[str, str | float]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        arguments: dict[str, Any] = {_RUN_NAME[name]: run_name} if name in _RUN_NAME else {}
        if name == "dvclive":
            arguments["dir"] = str(run_dir / name)
        if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
            arguments["logging_dir"] = str(run_dir)
        try:
            self._tracker = LOGGER_TYPE_TO_CLASS[name](_PROJECT, **arguments)
            self._tracker.start()
            self._tracker.store_init_configuration(dict(settings))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RecipeError(
                f"tracking.with: {name} could not be started ({reason}); log in to it, set it to work offline, or "
                f"leave it out"
            ) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        self._tracker.finish()


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, str | float]:
    """A recipe's settings that trackers compare runs by, by dotted name; those without a value are left out."""
    flat = {}
    for section in _HYPERPARAMETERS:
        value = settings.get(section)
        named = (
            {f"{section}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {section: value}
        )
        for name, part in named.items():
            if part is not None:
                is_number = isinstance(part, (int, float)) and not isinstance(part, bool)
                flat[name] = part if is_number else str(part)
    return flat
