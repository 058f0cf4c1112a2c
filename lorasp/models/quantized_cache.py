"""The quantized linears of a checkpoint, kept on disk, so that a second start reads what the first one computed.

In bitsandbytes' 4-bit layout, a file a unit, below ~/.cache/lorasp/quantized (or $LORASP_CACHE). An entry belongs to
the checkpoint's files as they are, the quantization, the compute precision and the kind of device; where one of them
changes, another entry is made. Rank 0 alone reads and writes. An entry is whole or absent.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorasp.models.demo import cache_directory, flush_to_disk
from lorasp.models.weights import Checkpoint, digest_of
from lorasp.recipe import Quantization, RecipeError

_MANIFEST = "manifest.json"
_VERSION = 1  # of what an entry holds
WORTH_KEEPING = 50_000_000  # weights: some seconds of quantization


class QuantizedCache:
    """The entry of one checkpoint, found or to be written.

    A manifest holds `tensors` (name -> [file, shape, SHA-256]) and `stored`, the digests of the checkpoint's own
    tensors that they stand for, by which an adapter knows its base. warn: is told why an entry was not written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: Quantization,
        dtype: torch.dtype,
        device: torch.device,
        warn: Callable[[str], None],
    ) -> None:
        kind = quantization.model_dump(exclude={"cache"})
        made_of = [_VERSION, kind, str(dtype), device.type, checkpoint.fingerprint()]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
        self.path = cache_directory() / "quantized" / key
        self._partial = self.path.with_name(f"{key}.{os.getpid()}.partial")
        self._warn = warn
        self._tensors: dict[str, tuple[str, list[int], str]] = {}
        self._failed = False

    def found(self) -> dict[str, Any] | None:
        """The manifest of a whole entry."""
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text())
            whole = all((self.path / file).is_file() for file, _, _ in manifest["tensors"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return manifest if whole else None

    def keep(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes the quantized tensors of a unit."""
        if self._failed or not tensors:
            return
        file = f"{unit.strip('.')}.safetensors"
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            save_file(on_cpu, self._partial / file, metadata={"format": "pt"})
        except Exception as error:  # safetensors has errors of its own for a full disk
            self._give_up(error)
            return
        self._tensors |= {name: (file, list(t.shape), digest_of(t)) for name, t in on_cpu.items()}

    def finish(self, read: Mapping[str, str]) -> None:
        """Makes the entry whole. read: the digests of the checkpoint's tensors, for some of which it stands."""
        if self._failed or not self._tensors:
            return
        stored = {name: digest for name, digest in read.items() if name in self._tensors}  # X.weight is in both
        try:
            (self._partial / _MANIFEST).write_text(json.dumps({"tensors": self._tensors, "stored": stored}))
            flush_to_disk(self._partial)
            if self.found() is None:  # else another run was faster
                shutil.rmtree(self.path, ignore_errors=True)
                self._partial.rename(self.path)
        except OSError as error:
            self._give_up(error)
        shutil.rmtree(self._partial, ignore_errors=True)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        shutil.rmtree(self._partial, ignore_errors=True)
        self._warn(f"the quantized base is not kept for the next start ({self._partial.parent}: {error})")


def digests_behind(manifest: Mapping[str, Any], read: Mapping[str, str], path: Path) -> dict[str, str]:
    """Digests of the checkpoint's own tensors, from those that were `read`, an entry's among them.

    Raises RecipeError unless the entry's are those that were written.
    """
    wrong = [name for name, (_, _, digest) in manifest["tensors"].items() if read.get(name) != digest]
    if wrong:
        raise RecipeError(f"{path} is damaged ({wrong[0]} has changed); delete it and start again")
    return {name: digest for name, digest in read.items() if name not in manifest["tensors"]} | manifest["stored"]
