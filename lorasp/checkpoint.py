"""The adapter on disk: whole or absent, and loaded again for evaluation or further training.

`adapter.safetensors` holds, for each adapted linear NAME, `NAME.A` and `NAME.B` (fp32, the selected entries),
`NAME.A_bits` and `NAME.B_bits` (uint8, S packed; see selection.py; empty where all entries are selected), and
`NAME.A_rest` (fp32, A's frozen entries) with `frozen_entries: init`. Of a classifier's head it holds `NAME.W` and
`NAME.bias`, `NAME.W_bits` and `NAME.W_rest` likewise. Its metadata holds `AdapterInfo` as JSON.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasp.adapter import AdaptedLinear, adapted_linears, model_selection_digest, trained_linears
from lorasp.head import SelectedLinear
from lorasp.recipe import Quantization, Recipe, RecipeError
from lorasp.whole_files import replace_file, write_text_whole

ADAPTER_FILE = "adapter.safetensors"
CHECKPOINTS = "checkpoints"  # in a run's directory
_FORMAT = "lorasp-adapter-2"
_MODEL_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter is: enough to rebuild its S from the seed, and to refuse another base."""

    format: str
    method: str
    base_model: str
    base_digest: str
    rank: int
    alpha: float
    rslora: bool
    frozen_entries: str
    target_modules: str | list[str]
    strategy: str
    fraction: float
    seed: int
    selection_digest: str
    dtype: str  # of computation: codes are quantized from the base in this precision
    quantization: dict[str, str | bool | int]  # of the base that it was trained on: of the recipe, what matters
    step: int

    @classmethod
    def of(
        cls, recipe: Recipe, model: nn.Module, *, base_digest: str, selection_seed: int, step: int
    ) -> "AdapterInfo":
        """selection_seed: the one that S was drawn with; not the recipe's where S came with `adapter.init_from`."""
        adapter, selection = recipe.adapter, recipe.selection
        return cls(
            format=_FORMAT,
            method=recipe.method,
            base_model=recipe.model.path,
            base_digest=base_digest,
            rank=adapter.rank,
            alpha=adapter.alpha,
            rslora=adapter.rslora,
            frozen_entries=adapter.frozen_entries,
            target_modules=adapter.target_modules,
            strategy=selection.strategy,
            fraction=recipe.effective_fraction,
            seed=selection_seed,
            selection_digest=model_selection_digest(model),
            dtype=str(next(adapted_linears(model)).dtype).removeprefix("torch."),
            quantization=recipe.quantization.kind(),
            step=step,
        )


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read back: its info and tensors by name."""

    path: Path
    info: AdapterInfo
    tensors: dict[str, Tensor]

    @property
    def own_base_of(self) -> Path | None:
        """The directory of the run that keeps this adapter's base; None where the model's is quantized anew."""
        if self.info.quantization.get("init") != "residual":
            return None
        holder = self.path.parent.parent  # a run, or one of its checkpoints (resume.py)
        return holder.parent.parent if holder.parent.name == CHECKPOINTS else holder

    def apply(self, model: nn.Module) -> None:
        """Puts values and S into the model's adapters, before it is sharded.

        Raises RecipeError if an adapted linear is missing on either side or has another size, or S is not the one that
        was saved.
        """
        linears = {linear.name: linear for linear in trained_linears(model)}
        saved = {name.rpartition(".")[0] for name in self.tensors}
        if saved != set(linears):
            odd = sorted(saved ^ set(linears))
            raise RecipeError(
                f"adapter.init_from: {self.path} adapts other linear layers than this model and recipe: {len(odd)} "
                f"differ, such as {odd[0]}"
            )
        for name, linear in linears.items():
            for part in linear.saved:
                ours, value = getattr(linear, part), self.tensors.get(f"{name}.{part}")
                if (ours is None) != (value is None) or (value is not None and value.shape != ours.shape):
                    raise RecipeError(f"adapter.init_from: {self.path}: {name}.{part} has another size here")
                if part.endswith("_bits"):
                    setattr(linear, part, value)
                elif value is not None:  # in place of one on the meta device, too
                    linear._parameters[part] = nn.Parameter(value.to(ours.dtype), requires_grad=ours.requires_grad)
        # S decides where each value belongs: wrong bits would load without a word.
        if model_selection_digest(model) != self.info.selection_digest:
            raise RecipeError(f"adapter.init_from: {self.path} is damaged: its S is not the one that was saved")

    def trained_values(self, model: nn.Module) -> dict[str, Tensor]:
        """What was trained, fp32, by the names of the model's parameters: `apply` rounds it to their dtype."""
        return {
            f"{name}.{part}": self.tensors[f"{module.name}.{part}"]
            for name, module in model.named_modules()
            if isinstance(module, AdaptedLinear | SelectedLinear)
            for part in module.trained_parts
            if f"{module.name}.{part}" in self.tensors  # a bias need not be there
        }

    def check_base(self, base_digest: str) -> None:
        """Raises RecipeError if the adapter was trained on other base weights."""
        if self.info.base_digest != base_digest:
            raise RecipeError(
                f"adapter.init_from: {self.path} was trained on another base ({self.info.base_model}, digest "
                f"{self.info.base_digest[:12]}); this model's weights have digest {base_digest[:12]}"
            )


def load_adapter(directory: str | Path, recipe: Recipe) -> SavedAdapter:
    """Reads a saved adapter on the CPU.

    Raises RecipeError if there is none, it is damaged, or the recipe asks for another shape or selection.
    """
    path = Path(directory)
    path = path if path.is_file() else path / ADAPTER_FILE
    if not path.is_file():
        path = Path(directory) / "adapter" / ADAPTER_FILE
    if not path.is_file():
        raise RecipeError(f"adapter.init_from: {directory} holds no {ADAPTER_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})["lorasp"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors', JSON's and the metadata's own errors alike
        raise RecipeError(f"adapter.init_from: {path} is damaged or not ours ({error})") from None
    if found.get("format") != _FORMAT:
        raise RecipeError(
            f"adapter.init_from: {path} is of format {found.get('format')}; this version reads {_FORMAT}"
        )
    info = AdapterInfo(**found)
    asked = {
        "adapter.rank": (recipe.adapter.rank, info.rank),
        "adapter.alpha": (recipe.adapter.alpha, info.alpha),
        "adapter.rslora": (recipe.adapter.rslora, info.rslora),
        "adapter.frozen_entries": (recipe.adapter.frozen_entries, info.frozen_entries),
        "selection.strategy": (recipe.selection.strategy, info.strategy),
        "selection.fraction": (recipe.effective_fraction, info.fraction),
    }
    # An adapter corrects the rounding of the base that it was trained on along with the rest.
    ours, its = recipe.quantization.kind(), Quantization(**info.quantization).kind()
    if not ours["format"] == its["format"] == "none":  # where the other settings say nothing
        asked |= {f"quantization.{key}": (ours[key], its[key]) for key in ours}
    differing = [f"{key} is {ours}, the adapter's {its}" for key, (ours, its) in asked.items() if ours != its]
    if differing:
        raise RecipeError(f"adapter.init_from: {path} does not fit the recipe: {'; '.join(differing)}")
    return SavedAdapter(path, info, tensors)


def save_adapter(
    directory: Path, info: AdapterInfo, model: nn.Module, values: Iterable[tuple[str, Tensor]], *, writes: bool
) -> None:
    """Writes the adapter whole, or leaves what was there. `values` (collective) as `Engine.trained_values` gives them.

    writes: rank 0 only; the others take part in the gathers. Raises RecipeError when the disk refuses.
    """
    tensors = collect_adapter(model, values, keeps=writes)
    if writes:
        write_adapter(directory, info, tensors)


def collect_adapter(model: nn.Module, values: Iterable[tuple[str, Tensor]], *, keeps: bool) -> dict[str, Tensor]:
    """The tensors of an adapter's file, on the CPU; nothing without `keeps`. Collective, as `values` is."""
    linears = list(trained_linears(model))
    module_names = {id(module): name for name, module in model.named_modules()}
    own_names = {module_names[id(linear)]: linear.name for linear in linears}
    tensors: dict[str, Tensor] = {}
    for name, value in values:
        module_name, _, part = name.rpartition(".")
        if keeps:
            tensors[f"{own_names[module_name]}.{part}"] = value.contiguous()
    for linear in linears:
        for part in linear.saved:
            if part in linear.trained_parts or getattr(linear, part) is None:
                continue
            value = getattr(linear, part)
            value = value.cpu() if part.endswith("_bits") else _gathered(value)
            if keeps:
                tensors[f"{linear.name}.{part}"] = value
    return tensors


def write_adapter(directory: Path, info: AdapterInfo, tensors: dict[str, Tensor]) -> None:
    """Writes what `collect_adapter` gave, whole. Raises RecipeError when the disk refuses."""
    write_tensors_whole(directory / ADAPTER_FILE, tensors, {"lorasp": json.dumps(asdict(info))})


def save_model(
    directory: Path, values: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, *, prefix: str, writes: bool
) -> None:
    """Writes a whole model as sharded safetensors, in the layout that transformers reads.

    Holds one file's tensors at a time. dtype: None leaves each tensor as it is. prefix: what our names have in front
    of the model's own.
    """
    if not writes:
        for _ in values:  # takes part in the gathers, and keeps nothing
            pass
        return
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(_in_files(values, dtype, prefix)):
        file = f"model-{index + 1:05d}.safetensors"
        write_tensors_whole(directory / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    size = sum((directory / file).stat().st_size for file in set(weight_map.values()))
    write_text_whole(
        directory / "model.safetensors.index.json",
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1),
    )


@contextmanager
def replacing_whole(directory: Path, *, writes: bool) -> Iterator[Path]:
    """A directory to be filled that becomes `directory` in the end; until then, or without an end, the old one stays.

    Shards of two steps beside each other would load without a word. writes: rank 0 only.
    """
    beside, old = (directory.with_name(f".{directory.name}.{what}") for what in ("writing", "replaced"))
    if writes:
        shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed
    try:
        yield beside
        if writes:
            if directory.exists():
                shutil.rmtree(old, ignore_errors=True)
                directory.rename(old)
            beside.rename(directory)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if writes:
            shutil.rmtree(beside, ignore_errors=True)


def _in_files(
    values: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, prefix: str
) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for name, value in values:
        tensors[name.removeprefix(prefix)] = (value if dtype is None else value.to(dtype)).contiguous()
        if sum(t.numel() * t.element_size() for t in tensors.values()) >= _MODEL_SHARD_BYTES:
            yield tensors
            tensors = {}
    if tensors:
        yield tensors


def _gathered(parameter: nn.Parameter) -> Tensor:
    from lorasp.zero.sharding import whole

    return whole(parameter).float().cpu()


def write_tensors_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, as `write_text_whole` writes a text."""
    replace_file(path, lambda beside: save_file(tensors, beside, metadata=metadata))
