"""What a run left behind, read back on one process: its report, its recipe and the model that it trained."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasp.checkpoint import ADAPTER_FILE, CHECKPOINTS, SavedAdapter, load_adapter
from lorasp.models.attention import ATTENTION
from lorasp.models.build import build_on_meta, filled_units
from lorasp.models.packed_base import use_run_base
from lorasp.models.task_model import TaskModel
from lorasp.models.weights import Checkpoint, load_config, locate_model
from lorasp.recipe import DEMO_MODELS, Quantization, Recipe, RecipeError


@dataclass(frozen=True)
class FinishedRun:
    """base: directory of the base's weights; of the trained model itself with `method: full`, where `saved` is None.
    dtype: the precision that the run computed, and quantized its base, in.
    """

    directory: Path
    report: dict[str, Any]
    recipe: Recipe
    base: Path
    saved: SavedAdapter | None
    dtype: torch.dtype

    @property
    def quantized(self) -> bool:
        return self.recipe.quantization.format != "none"

    def refuse_unless_causal_lm(self, what: str) -> None:
        """Raises RecipeError for a run of another task. what: that cannot be done with it."""
        if self.recipe.kind != "causal_lm":
            raise RecipeError(
                f"{self.directory}: it learned task {self.recipe.task}, and {what} is of causal language models; "
                f"launch/evaluate.py scores it, and method: full leaves model/, which transformers loads"
            )

    @property
    def prompt_format(self) -> str:
        """What a prompt was put into: "alpaca" or "short" of Alpaca's rows, "chat" for the tokenizer's own template,
        "none" for prompts and completions as they stand. Of a mixture, the first source's.
        """
        layout = self.recipe.data.format
        if layout == "auto":
            layout = next((its["layout"] for its in self.report["data"].values() if "layout" in its), "alpaca")
        return {"chat": "chat", "prompt_completion": "none"}.get(layout, self.recipe.data.template)

    @property
    def base_name(self) -> str:
        """By which others load the base: its hub name, or the directory on this machine."""
        path = self.recipe.model.path
        return str(self.base.resolve()) if Path(path).is_dir() or path in DEMO_MODELS else path

    @property
    def has_own_base(self) -> bool:
        """Whether the adapter belongs on a base that Eq. 3 made for it, which the run keeps."""
        return self.saved is not None and self.saved.own_base_of is not None

    @property
    def base_is_packed(self) -> bool:
        """Whether the base's own checkpoint is in 4 bits."""
        return getattr(load_config(self.base, self.recipe.model), "quantization_config", None) is not None

    def warnings(self) -> list[str]:
        """A sentence for whatever makes the model another than the one that the recipe promises."""
        found = []
        if self.report.get("status") != "finished":
            found.append(f"{self.directory}: the run did not finish ({self.report.get('status')})")
        here = self.device.type
        if self.quantized and not (self.base_is_packed or self.has_own_base) and self._trained_on != here:
            found.append(
                f"the base was quantized on {self._trained_on}; done again on {here}, single codes may differ"
            )
        return found

    @property
    def device(self) -> torch.device:
        """What the run is read back on: the kind of device that it was trained on, where there is one.

        Another quantizes the base a little differently: the mean that double quantization takes is summed in another
        order, and a weight halfway between two values of the table goes to either.
        """
        return torch.device("cuda" if self._trained_on == "cuda" and torch.cuda.is_available() else "cpu")

    @property
    def _trained_on(self) -> str:
        return self.report.get("device", "cpu").partition(":")[0]

    def build_on_meta(
        self, *, dense: bool = False, dtype: torch.dtype | None = None, attention: str = ATTENTION
    ) -> TaskModel:
        """The run's model with its adapter's values; the base is on the meta device, unquantized with `dense`."""
        recipe = self.recipe
        if dense:
            recipe = recipe.model_copy(update={"quantization": Quantization(format="none")})
        model = build_on_meta(load_config(self.base, recipe.model), recipe, dtype or self.dtype, attention)
        if self.saved is not None:
            self.saved.apply(model)
        return model

    def load(
        self,
        device: torch.device,
        *,
        dense: bool = False,
        dtype: torch.dtype | None = None,
        attention: str = ATTENTION,
    ) -> TaskModel:
        """The run's model, whole on `device`, for evaluation. Raises RecipeError, also for a base that was changed."""
        model = self.build_on_meta(dense=dense, dtype=dtype, attention=attention)
        checkpoint = self.open_base()
        for _ in filled_units(model.model, checkpoint, device=device):
            pass
        self.check_base(checkpoint)
        return model.to(device).eval()

    def open_base(self) -> Checkpoint:
        """What the base is read from: its checkpoint, and where Eq. 3 made codes for this run, those."""
        checkpoint = Checkpoint(self.base)
        if self.has_own_base:
            use_run_base(checkpoint, self.saved.own_base_of)
        return checkpoint

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Raises RecipeError unless the weights, all of which were read, are those that the adapter was trained on."""
        if self.saved is not None and checkpoint.digest() != self.saved.info.base_digest:
            raise RecipeError(
                f"{self.directory}: the adapter was trained on another base ({self.saved.info.base_model}, digest "
                f"{self.saved.info.base_digest[:12]}) than {self.base} holds now (digest {checkpoint.digest()[:12]})"
            )


def read_run(directory: str | Path) -> FinishedRun:
    """Reads what `launch/train.py` left in `directory`; downloads the base if need be.

    Raises RecipeError if that is no run, it has not come to its end, or what it left is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RecipeError(f"{directory} is no directory; give that of a run, such as runs/quickstart")
    report, recipe = _read_report(directory)
    if recipe.model.weights == "random":
        raise RecipeError(f"{directory}: it trained random weights (model.weights), which are no use elsewhere")
    if recipe.method == "full":
        base, saved = directory / "model", None
        if not base.is_dir():
            raise RecipeError(f"{directory} holds a report but no model/; it trained nothing, or was moved apart")
        return FinishedRun(directory, report, recipe, base, saved, load_config(base, recipe.model).dtype)
    if not (directory / "adapter" / ADAPTER_FILE).is_file():
        raise RecipeError(
            f"{directory} holds a report but no adapter/{ADAPTER_FILE}; it trained nothing, as an evaluation does, or "
            f"was moved apart"
        )
    try:
        saved = load_adapter(directory, recipe)
    except RecipeError as error:
        raise RecipeError(str(error).removeprefix("adapter.init_from: ")) from None
    base = locate_model(recipe.model)
    return FinishedRun(directory, report, recipe, base, saved, getattr(torch, saved.info.dtype))


def _read_report(directory: Path) -> tuple[dict[str, Any], Recipe]:
    path = directory / "report.json"
    if not path.is_file():
        begun = any((directory / name).exists() for name in ("adapter", "model", "tensorboard", CHECKPOINTS))
        raise RecipeError(
            f"{directory}: the run has not come to its end, there is no report.json yet"
            if begun
            else f"{directory} is no run: it holds no report.json"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report, Recipe(**report["recipe"])
    except (OSError, ValueError, LookupError, TypeError) as error:  # ValueError: JSON's and pydantic's
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} is no report that this version can read ({reason:.200})") from None
