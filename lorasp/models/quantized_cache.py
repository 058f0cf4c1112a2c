"""The quantized linears of a checkpoint, kept on disk, so that a second start reads what the first one computed.

A packed base (packed_base.py) below ~/.cache/lorasp/quantized (or $LORASP_CACHE). An entry belongs to the checkpoint's
files as they are, the quantization, the compute precision and the kind of device; where one of them changes, another
entry is made. Rank 0 alone reads and writes.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorasp.models.demo import cache_directory
from lorasp.models.packed_base import PackedBaseWriter, read_manifest
from lorasp.models.weights import Checkpoint
from lorasp.recipe import Quantization

_ABANDONED = 86_400  # seconds since a unit was written: its process is dead, on whichever host it was
_VERSION = 1  # of what an entry holds
WORTH_KEEPING = 50_000_000  # weights: some seconds of quantization
DAMAGED = "delete it and start again"  # what to do about an entry whose tensors have changed


class QuantizedCache(PackedBaseWriter):
    """The entry of one checkpoint, found or to be written. warn: is told why an entry was not written."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: Quantization,
        dtype: torch.dtype,
        device: torch.device,
        warn: Callable[[str], None],
    ) -> None:
        made_of = [_VERSION, quantization.kind(), str(dtype), device.type, checkpoint.fingerprint()]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
        path = cache_directory() / "quantized" / key
        super().__init__(path, path.with_name(f"{key}.{os.getpid()}.partial"))
        self._warn = warn
        self._failed = False

    def found(self) -> dict[str, Any] | None:
        """The manifest of a whole entry."""
        return read_manifest(self.path)

    def keep(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        if not self._failed:
            try:
                super().keep(unit, tensors)
            except Exception as error:  # safetensors has errors of its own for a full disk
                self._give_up(error)

    def finish(self, read: Mapping[str, str]) -> None:
        if not self._failed:
            try:
                super().finish(read)
                for partial in self.path.parent.glob("*.partial"):
                    if time.time() - partial.stat().st_mtime > _ABANDONED:
                        shutil.rmtree(partial, ignore_errors=True)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        shutil.rmtree(self.partial, ignore_errors=True)
        self._warn(f"the quantized base is not kept for the next start ({self.partial.parent}: {error})")
