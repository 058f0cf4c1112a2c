"""One export from beginning to end: refused early, written beside its name, verified, then given that name."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch

from lorasp.adapter import adapted_linears
from lorasp.export.adapter import write_peft
from lorasp.export.base import merged_bytes, packed_bytes, write_merged, write_packed
from lorasp.export.card import model_card
from lorasp.export.verify import Difference, compare
from lorasp.finished_run import FinishedRun
from lorasp.models.build import stored_names, units
from lorasp.models.causal_lm import CausalLM
from lorasp.models.weights import Checkpoint, load_config, load_tokenizer
from lorasp.recipe import RecipeError
from lorasp.reporting.console import Console
from lorasp.whole_files import write_text_whole

ADAPTER_BESIDE = "adapter"  # where bnb4bit puts the adapter; in one directory transformers would load both by itself
_WRITING = ".export.writing"
# What a model's directory holds beside weights and configuration; the base's licence binds what is derived from it.
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "*.py",
)


@dataclass(frozen=True)
class Export:
    """What is asked for. kind: peft, merged or bnb4bit. base: of merged, original or dequantized. dtype: of merged;
    None takes the base's own.
    """

    kind: str
    out: Path
    base: str = "original"
    dtype: torch.dtype | None = None
    verify: bool = False


def write_export(run: FinishedRun, export: Export, console: Console) -> Difference | None:
    """Writes the export whole or not at all; gives the largest difference of its logits where it was verified.

    Raises RecipeError if it cannot be had of this run, has no place, or the base is not the adapter's;
    VerificationError if what was written gives other logits than the run's model.
    """
    _check_request(run, export)
    device = run.device
    tokenizer = load_tokenizer(run.base, run.recipe.model)
    dense = export.kind == "merged" and export.base == "original"
    # Dense weights merge in fp32; codes only come out the same in the precision that the run quantized from.
    model = run.build_on_meta(dense=dense, dtype=torch.float32 if dense else None)
    dtype = export.dtype or load_config(run.base, run.recipe.model).dtype or run.dtype
    with _appearing_whole(export.out, _bytes(run, export, model, dtype)) as beside:
        with console.progress(sum(1 for _ in units(model.model)), "unit") as progress:
            if export.kind == "merged":
                write_merged(beside, run, model, dtype, export.base, device, progress.advance)
            elif export.kind == "bnb4bit":
                write_packed(beside, run, model, device, progress.advance)
                (beside / ADAPTER_BESIDE).mkdir()
                # Not this machine's path: the two directories travel together.
                write_peft(beside / ADAPTER_BESIDE, run, model, "..")
            else:
                _read_whole_base(run, model)
                write_peft(beside, run, model, run.base_name)
        _copy_companions(run, beside)
        write_text_whole(beside / "README.md", model_card(run, export.kind, export.base, dtype))
        if not export.verify:
            return None
        console.info("verifying: both models' logits are computed")
        return compare(
            run,
            beside,
            export.kind,
            dense=dense,
            stored=dtype if export.kind == "merged" else run.dtype,
            adapter=beside / ADAPTER_BESIDE if export.kind == "bnb4bit" else beside,
            tokenizer=tokenizer,
            device=device,
        )


def _check_request(run: FinishedRun, export: Export) -> None:
    if run.saved is None and export.kind == "peft":
        raise RecipeError(f"{run.directory}: method full trains no adapter; export it --to merged")
    if export.kind == "bnb4bit" and not run.quantized:
        raise RecipeError(
            f"{run.directory}: this run quantized nothing, so it has no 4-bit codes to export; use --to merged or "
            f"--to peft"
        )
    if export.kind == "merged" and export.base == "dequantized" and not run.quantized:
        raise RecipeError(f"{run.directory}: this run quantized nothing; leave out --base dequantized")
    if export.kind == "merged" and export.base == "original" and run.base_is_packed:
        raise RecipeError(
            f"{run.base} is in 4 bit itself: there are no original weights to merge into; use --base dequantized"
        )
    if run.has_own_base and (export.kind == "peft" or (export.kind == "merged" and export.base == "original")):
        raise RecipeError(
            f"{run.directory}: its adapter starts from what quantization took from the base (quantization.init: "
            f"residual), which the original base still has; export --to bnb4bit, which holds both, or --to merged "
            f"--base dequantized"
        )
    if export.verify and export.kind != "merged" and util.find_spec("peft") is None:
        raise RecipeError("--verify loads the adapter with peft, which is not installed: pip install peft")
    try:
        if export.out.exists() and not export.out.is_dir():
            raise RecipeError(f"--out: {export.out} is a file, not a directory")
        if export.out.is_dir() and any(path.name != _WRITING for path in export.out.iterdir()):
            raise RecipeError(f"--out: {export.out} exists and is not empty; remove it or name another --out")
    except OSError as error:
        raise RecipeError(_unwritable(export.out, error)) from None


def _bytes(run: FinishedRun, export: Export, model: CausalLM, dtype: torch.dtype) -> int:
    if export.kind == "merged":
        return merged_bytes(model, dtype)
    entries = sum(linear.A_selection.entries + linear.B_selection.entries for linear in adapted_linears(model))
    return 4 * entries + (packed_bytes(model, run.dtype) if export.kind == "bnb4bit" else 0)


@contextmanager
def _appearing_whole(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` at the end, and is removed if there is no such end.

    An empty directory that is there already stays the one that it is, as it may be somebody's working directory or a
    mount point: the export is written within and moved up at the end. Raises RecipeError if it cannot be made or the
    disk is too full for it.
    """
    try:
        place = out.resolve()  # a link becomes what it points to
        within = place.is_dir()
        beside = place / _WRITING if within else place.with_name(f".{place.name}.writing")
        beside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)  # of an export that was killed
        beside.mkdir()
    except (OSError, RuntimeError) as error:  # the latter for a link to itself
        raise RecipeError(_unwritable(out, error)) from None
    try:
        free = shutil.disk_usage(beside).free
        if needed_bytes > free:
            raise RecipeError(
                f"--out: {out} would take {needed_bytes / 2**30:.2f} GiB where {free / 2**30:.2f} GiB are free; free "
                f"space, name an --out on another disk, or export --to peft, which is small"
            )
        yield beside
        if within:
            for path in beside.iterdir():
                path.replace(place / path.name)
        else:
            beside.replace(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _unwritable(out: Path, error: Exception) -> str:
    return f"--out: {out} cannot be written ({getattr(error, 'strerror', None) or error}); name another --out"


def _read_whole_base(run: FinishedRun, model: CausalLM) -> None:
    """The adapter alone needs nothing of the base, but is worth nothing on another one."""
    checkpoint = Checkpoint(run.base)
    for unit in units(model.model):
        checkpoint.read(stored_names(unit, checkpoint))
    run.check_base(checkpoint)


def _copy_companions(run: FinishedRun, directory: Path) -> None:
    for pattern in _COPIED:
        if pattern == "*.py" and not run.recipe.model.trust_remote_code:
            continue
        for path in run.base.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
