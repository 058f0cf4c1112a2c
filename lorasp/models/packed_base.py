"""A quantized base on disk: bitsandbytes' 4-bit layout, a file a unit, and a manifest with a digest of each tensor.

There are two: what can be made again of the checkpoint, kept for the next start (quantized_cache.py), and what Eq. 3
made for one run's adapter (`quantization.init: residual`). The latter travels with the run as `runs/NAME/base`: on
other threads or devices other codes would come out.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lorasp.models.demo import flush_to_disk
from lorasp.models.random_weights import RandomWeights
from lorasp.models.weights import Checkpoint, digest_of
from lorasp.recipe import RecipeError

MANIFEST = "manifest.json"
_OF_A_RUN = "base"
_OF_A_RUN_THAT_STARTS = ".base.starting"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a whole base: `tensors` (name -> [file, shape, SHA-256]), and in `stored` the digests of the
    checkpoint's own tensors that they stand for, by which an adapter knows its base. None where it is not whole.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        whole = all((directory / file).is_file() for file, _, _ in manifest["tensors"].values())
        return manifest if whole and isinstance(manifest["stored"], dict) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


class PackedBaseWriter:
    """Writes the base `path`, whole or not at all. partial: where it grows."""

    def __init__(self, path: Path, partial: Path) -> None:
        self.path, self.partial = path, partial
        self._tensors: dict[str, tuple[str, list[int], str]] = {}

    def keep(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes the quantized tensors of a unit."""
        if not tensors:
            return
        file = f"{unit.strip('.')}.safetensors"
        self.partial.mkdir(parents=True, exist_ok=True)
        on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(on_cpu, self.partial / file, metadata={"format": "pt"})
        self._tensors |= {name: (file, list(t.shape), digest_of(t)) for name, t in on_cpu.items()}

    def finish(self, read: Mapping[str, str]) -> None:
        """Makes the base whole. read: the digests of the checkpoint's tensors, for some of which it stands."""
        if not self._tensors:
            return
        stored = {name: digest for name, digest in read.items() if name in self._tensors}  # X.weight is in both
        (self.partial / MANIFEST).write_text(json.dumps({"tensors": self._tensors, "stored": stored}))
        flush_to_disk(self.partial)
        if read_manifest(self.path) is None:  # else another run was faster
            shutil.rmtree(self.path, ignore_errors=True)
            self.partial.rename(self.path)
        shutil.rmtree(self.partial, ignore_errors=True)


class RunBaseWriter(PackedBaseWriter):
    """The base that belongs to a run's adapter. Raises RecipeError when the disk refuses.

    It gets its name when the run takes the place of an earlier one (`place`): until then that one's base stays.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / _OF_A_RUN_THAT_STARTS
        super().__init__(path, path.with_name(f"{path.name}.partial"))
        for left in (self.path, self.partial):  # by a run that was refused, or killed
            shutil.rmtree(left, ignore_errors=True)

    def keep(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        try:
            super().keep(unit, tensors)
        except Exception as error:  # safetensors has errors of its own for a full disk
            self._refuse(error)

    def finish(self, read: Mapping[str, str]) -> None:
        try:
            super().finish(read)
        except OSError as error:
            self._refuse(error)

    def place(self) -> None:
        """Gives the base its name, `base`."""
        final = self.path.with_name(_OF_A_RUN)
        shutil.rmtree(final, ignore_errors=True)
        self.path.rename(final)

    def _refuse(self, error: Exception) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        raise RecipeError(
            f"{self.path.parent}: the base that quantization.init: residual made could not be written ({error}); free "
            f"space or name another output_dir"
        ) from error


def use_run_base(checkpoint: Checkpoint | RandomWeights, run_dir: Path) -> None:
    """Has quantized tensors read from the base of the run in `run_dir`. Raises RecipeError where it is not whole."""
    base = run_dir / _OF_A_RUN
    if not isinstance(checkpoint, Checkpoint):
        raise RecipeError(
            f"{base} is not read beside random weights; use quantization.init: plain to resume with them"
        )
    manifest = read_manifest(base)
    if manifest is None:
        raise RecipeError(
            f"{base} is not there, or not whole: the adapter was trained on a base of its own (quantization.init: "
            f"residual), which its run kept there; bring the run's whole directory"
        )
    checkpoint.replace(base, manifest, "nothing but a copy can bring it back")
