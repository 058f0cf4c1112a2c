"""Checkpoints: the state of a run after a step, from which any number of ranks goes on as if nothing had been.

`runs/NAME/checkpoints/step-00000200/` is whole or absent, about 12 bytes a trained entry, and holds

    adapter/adapter.safetensors  fp32 masters of A and B, and S: an adapter like a finished run's
    state-*.safetensors          AdamW's `exp_avg/NAME` and `exp_avg_sq/NAME`, fp32, flat; with `method: full`, which
                                 has no adapter, also the masters, as `master/NAME`
    state.json                   `RunState`
    manifest.json                size and SHA-256 of each of these files

The order of the data, the learning rate and the dropout masks are functions of the step, so nothing of them is kept.
"""

import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch import distributed as dist

from lorasp.checkpoint import (
    CHECKPOINTS,
    AdapterInfo,
    collect_adapter,
    replacing_whole,
    write_adapter,
    write_tensors_whole,
)
from lorasp.models.demo import flush_to_disk
from lorasp.recipe import Checkpointing, Recipe, RecipeError
from lorasp.recipe_settings import differing_settings, flat_settings
from lorasp.zero.engine import Engine
from lorasp.zero.launch import Ranks

LEFT = "left.json"  # in the directory of a run that was asked to leave, until it goes on
_FORMAT = "lorasp-checkpoint-1"
_MANIFEST, _STATE = "manifest.json", "state.json"
_FILE_BYTES = 4 * 2**30
_BYTES_AN_ENTRY = 12  # fp32 master and two moments
_READ_AT_ONCE = 2**24

# Settings that may change between two parts of a run: where things lie, how memory and time are spent, what is told.
# Model and data are known by their digests.
_FREE = set(
    """
    name output_dir overwrite rehearse resume deterministic checkpoint deepspeed tracking profile memory evaluation
    health translation mmlu lm_eval
    model.path model.revision model.trust_remote_code data.train data.held_out data.revision data.limit
    adapter.init_from quantization.cache training.micro_batch_size training.activation_checkpointing
    training.offload_activations training.log_every training.evaluate_every
    """.split()
)


@dataclass(frozen=True)
class RunState:
    """What a run is after `step`, besides tensors. data: digests of the data sets; log: what the report has so far."""

    format: str
    step: int
    recipe: dict[str, Any]
    base_digest: str
    data: dict[str, str]
    world_size: int
    held_out_loss: float | None
    log: dict[str, Any]

    @classmethod
    def of(
        cls, step: int, recipe: Recipe, *, base_digest: str, data: dict[str, str], world_size: int, log: dict[str, Any]
    ) -> "RunState":
        scores = [score["held_out_loss"] for score in log["scores"] if score["step"] == step]
        loss = scores[-1] if scores else None
        return cls(_FORMAT, step, recipe.to_dict(), base_digest, data, world_size, loss, log)

    def check_recipe(self, recipe: Recipe, where: Path) -> None:
        """Raises RecipeError where the recipe would make another run of it, naming the settings."""
        ours, its = (flat_settings(tree, without=_FREE) for tree in (recipe.to_dict(), self.recipe))
        differing = differing_settings(ours, its)
        if differing:
            raise RecipeError(
                f"resume: {where} is of another run: {'; '.join(differing)}. Set that back, or start anew: with "
                f"another name, or overwrite=true"
            )

    def check_data(self, data: dict[str, str], where: Path) -> None:
        """Raises RecipeError for other data than the run began with."""
        other = [kind for kind in data | self.data if data.get(kind) != self.data.get(kind)]
        if other:
            raise RecipeError(
                f"resume: {where} was trained on other data: {', '.join(other)} differs; give the same rows, or start "
                f"anew with another name"
            )


@dataclass(frozen=True)
class Found:
    """A whole checkpoint."""

    path: Path
    state: RunState

    @property
    def adapter(self) -> Path | None:
        """Its adapter's directory; None with `method: full`."""
        return self.path / "adapter" if (self.path / "adapter").is_dir() else None

    def is_of(self, run_dir: Path) -> bool:
        return self.path.resolve().parent.parent == run_dir.resolve()

    def restore(self, engine: Engine) -> None:
        """Puts the engine into this state. Each rank reads its own part. Collective."""
        with ExitStack() as stack:
            places: dict[str, Any] = {}  # key -> the open file that holds it
            for path in sorted(self.path.rglob("*.safetensors")):
                file = stack.enter_context(safe_open(path, framework="pt"))
                places |= dict.fromkeys(file.keys(), file)

            def read(kind: str, name: str, start: int, stop: int) -> Tensor:
                key = _key(kind, name) if kind != "master" or self.adapter is None else name.removeprefix("model.")
                return places[key].get_slice(key)[start:stop]

            engine.restore(read, self.state.step)


def agreed_checkpoint(ranks: Ranks, find: Callable[[], Found | None]) -> Found | None:
    """What `find` gives on rank 0, which alone reads. Collective; raises its RecipeError on all ranks.

    Also where a rank's host does not have it: from there each rank reads its own part.
    """
    found: Found | str | None = None
    if ranks.is_main:
        try:
            found = find()
        except RecipeError as error:
            found = str(error)
    found = ranks.gather(found)[0]
    if isinstance(found, str):
        raise RecipeError(found)
    if found is not None and not found.path.is_dir():
        raise RecipeError(
            f"output_dir: {found.path} is not there on {socket.gethostname()}; a run on several nodes goes on only "
            f"where all of them see one output_dir"
        )
    return found


def find_checkpoint(recipe: Recipe, warn: Callable[[str], None]) -> Found | None:
    """The checkpoint that the recipe's `resume` asks for; None where the run starts at its beginning.

    warn: is told what was passed over, and why. Raises RecipeError for a named one that is not whole, or one of a run
    with other settings.
    """
    if recipe.resume != "auto" and (found := _of_the_same_command(recipe, warn)) is not None:
        return found
    if recipe.resume == "never":
        return None
    if recipe.resume != "auto":
        path = Path(recipe.resume)
        found = _open_whole(path)
        if isinstance(found, str):
            raise RecipeError(f"resume: {path} {found}")
        found.state.check_recipe(recipe, path)
        return found
    if _has_ended(recipe.run_dir):
        return None
    found = newest_checkpoint(recipe.run_dir, warn)
    if found is not None:
        try:
            found.state.check_recipe(recipe, found.path)
        except RecipeError:
            if not recipe.overwrite:
                raise
            return None
    return found


def _of_the_same_command(recipe: Recipe, warn: Callable[[str], None]) -> Found | None:
    """The newest checkpoint of a run that did as the recipe's `resume` says already, and was cut short.

    A named one is gone on from once. Nor does `never` begin anew each time that Slurm starts the job again.
    """
    begun_anew = recipe.resume == "never" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    if begun_anew or _has_ended(recipe.run_dir):
        return None
    found = newest_checkpoint(recipe.run_dir, warn)
    if found is None or found.state.recipe.get("resume") != recipe.resume:
        return None
    found.state.check_recipe(recipe, found.path)
    return found


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Found | None:
    """The newest whole checkpoint of the run in `run_dir`. warn: is told what was passed over, and why."""
    for path in sorted((run_dir / CHECKPOINTS).glob("step-*"), reverse=True):
        found = _open_whole(path)
        if isinstance(found, Found):
            return found
        warn(f"{path} is passed over: it {found}")
    return None


def _has_ended(run_dir: Path) -> bool:
    try:
        status = json.loads((run_dir / "report.json").read_text())["status"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return status == "finished" or status.startswith("stopped")


class Checkpoints:
    """Those of one run. On each rank; rank 0 writes, in a thread of its own once the state is gathered.

    newest: the step of which one was last asked for, or from which the run began or went on.
    """

    def __init__(self, run_dir: Path, settings: Checkpointing, *, is_main: bool, warn: Callable[[str], None]) -> None:
        self._root, self._settings, self._is_main, self._warn = run_dir / CHECKPOINTS, settings, is_main, warn
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._since = time.monotonic()
        self.newest = 0

    def begin(self, step: int) -> None:
        """The run begins, or goes on, after `step`: what was saved after that is damaged, or another course's.

        Left there it would count among the last ones, and be gone on from. What a killed process was writing goes too.
        """
        self.newest = step
        if not self._is_main:
            return
        for path in [path for path in sorted(self._root.glob("step-*")) if path > self.path(step)]:
            self._warn(f"{path} is removed: the run goes on after step {step}")
            shutil.rmtree(path, ignore_errors=True)
        for left in self._root.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def path(self, step: int) -> Path:
        """Where the one of `step` is, or will be."""
        return self._root / f"step-{step:08d}"

    def left_at(self, step: int) -> dict[str, Any]:
        """What to tell of a run that left after `step`: its checkpoint; None where the disk refused it."""
        return {"step": step, "checkpoint": str(self.path(step)) if self.path(step).is_dir() else None}

    def more_bytes(self, trained_entries: int) -> int:
        """The most that will be written besides what is there: a new one is whole before an old one goes."""
        repeated = self._settings.every_steps or self._settings.every_minutes
        most = self._settings.keep_last + self._settings.keep_best if repeated else 1
        return max(0, most + 1 - len(list(self._root.glob("step-*")))) * _BYTES_AN_ENTRY * trained_entries

    def is_due(self, step: int) -> bool:
        """On rank 0, whose clock counts."""
        every, minutes = self._settings.every_steps, self._settings.every_minutes
        in_time = minutes is not None and time.monotonic() - self._since >= 60 * minutes
        return in_time or (every is not None and step % every == 0)

    def save(self, state: RunState, engine: Engine, info: AdapterInfo | None, model: torch.nn.Module) -> None:
        """Gathers the state, and writes it. Collective. info: None with `method: full`.

        An adapter's is written while training goes on; a whole model's, which no rank could hold, as it is gathered:
        then all ranks wait until it is on the disk.
        A disk that refuses costs the checkpoint and not the run: it is told, and the one before stays.
        """
        self.wait()
        self._since, self.newest = time.monotonic(), state.step
        if info is None:
            tensors = _flat_state(engine, with_masters=True)
            if self._is_main:
                self._write(state, None, {}, tensors)
            else:
                for _ in tensors:
                    pass
            dist.barrier()
            return
        adapter = collect_adapter(model, engine.trained_values(), keeps=self._is_main)
        moments = [pair for pair in _flat_state(engine, with_masters=False) if self._is_main]
        if self._is_main:
            self._thread = threading.Thread(target=self._write, args=(state, info, adapter, moments))
            self._thread.start()

    def wait(self) -> None:
        """Until what is being written is on the disk; tells where it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            self._warn(self._failure)
            self._failure = None

    def _write(
        self,
        state: RunState,
        info: AdapterInfo | None,
        adapter: dict[str, Tensor],
        tensors: Iterable[tuple[str, Tensor]],
    ) -> None:
        path = self.path(state.step)
        try:
            with replacing_whole(path, writes=True) as beside:
                if info is not None:
                    write_adapter(beside / "adapter", info, adapter)
                for name, part in _in_files(tensors):
                    write_tensors_whole(beside / name, part, {"format": "pt"})
                (beside / _STATE).write_text(json.dumps(asdict(state)))
                files = sorted(file for file in beside.rglob("*") if file.is_file())
                manifest = {str(file.relative_to(beside)): [file.stat().st_size, _digest(file)] for file in files}
                (beside / _MANIFEST).write_text(json.dumps(manifest, indent=1))
                flush_to_disk(beside)
            self._remove_old()
        except (OSError, RecipeError) as error:
            for _ in tensors:  # the other ranks gather on
                pass
            reason = str(error).partition(";")[0]  # what follows is advice
            before = newest_checkpoint(self._root.parent, lambda told: None)
            kept = f"that of step {before.state.step} stays" if before else "there is none yet"
            self._failure = (
                f"the checkpoint of step {state.step} could not be written ({reason}); {kept}. Free space: the next "
                f"one is tried when it is due"
            )

    def _remove_old(self) -> None:
        """Keeps the last ones, and the best."""
        paths = sorted(self._root.glob("step-*"))
        kept = set(paths[-self._settings.keep_last :])
        if self._settings.keep_best:
            losses = {path: _held_out_loss(path) for path in paths}
            scored = [path for path in paths if losses[path] is not None]
            kept |= set(sorted(scored, key=losses.__getitem__)[:1])
        for path in set(paths) - kept:
            shutil.rmtree(path, ignore_errors=True)


def _held_out_loss(path: Path) -> float | None:
    try:
        return json.loads((path / _STATE).read_text())["held_out_loss"]
    except (OSError, ValueError, LookupError):
        return None


def _flat_state(engine: Engine, *, with_masters: bool) -> Iterator[tuple[str, Tensor]]:
    if with_masters:
        for name, values in engine.trained_values():
            yield _key("master", name), values.flatten()
    for kind, name, values in engine.moments():
        yield _key(kind, name), values.flatten()


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def _in_files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors) of each file; one is in memory at a time."""
    part: dict[str, Tensor] = {}
    number = size = 0
    for key, tensor in tensors:
        part[key] = tensor.contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= _FILE_BYTES:
            yield f"state-{number:05d}.safetensors", part
            part, number, size = {}, number + 1, 0
    if part:
        yield f"state-{number:05d}.safetensors", part


def _open_whole(path: Path) -> Found | str:
    """The checkpoint at `path`, each byte of it read; or why it is none."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        for name, (size, digest) in manifest.items():
            if not (path / name).is_file():
                return f"is not whole: {name} is missing"
            if (path / name).stat().st_size != size:
                return f"is damaged: {name} has {(path / name).stat().st_size:,} bytes, {size:,} were written"
            if _digest(path / name) != digest:
                return f"is damaged: {name} is not what was written"
        state = json.loads((path / _STATE).read_text())
    except FileNotFoundError as error:
        return f"is no whole checkpoint: {Path(error.filename).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"cannot be read ({error})"
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        return f"is of another version than {_FORMAT}"
    return Found(path, RunState(**state))


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        for block in iter(partial(opened.read, _READ_AT_ONCE), b""):
            digest.update(block)
    return digest.hexdigest()
