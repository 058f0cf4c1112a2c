"""An encoder's checkpoint as a classifier's: under its names, and with a head where the checkpoint has none."""

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from lorasp.models.random_weights import RandomWeights
from lorasp.models.weights import Checkpoint

# Heads of pretraining, the pooler of a RoBERTa, which its classifier does without, and buffers of older versions.
_NOT_OURS = re.compile(r"^(lm_head|cls)\.|(^|\.)pooler\.|\.position_ids$")


class EncoderCheckpoint(Checkpoint):
    """Names are those of transformers' sequence classifier, whether the checkpoint's are (`bert.encoder.…`), or an
    encoder's own (`encoder.…`), or of TensorFlow's time (`LayerNorm.gamma`).

    Tensors of the head that the checkpoint lacks, or has of another shape, are seeded: normal with the
    configuration's deviation, biases zero. They are no part of the base, and so of no digest: an adapter's file holds
    the head. `head`: names of its linears.
    """

    def __init__(self, directory: Path, config: PreTrainedConfig, seed: int, *, prefix: str, head: list[str]) -> None:
        super().__init__(directory)
        self._seeded = RandomWeights(
            config, seed, directory, trust_remote_code=False, auto_class=AutoModelForSequenceClassification
        )
        ours = self._seeded.names()
        self._stored_as = {}
        for stored in self._files:
            name = re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_NORMS[m[1]]}", stored)
            name = name if name in ours or f"{prefix}.{name}" not in ours else f"{prefix}.{name}"
            if name in ours or not _NOT_OURS.search(name):
                self._stored_as[name] = stored
        self._files = {name: self._files[stored] for name, stored in self._stored_as.items()}
        self._shapes = {name: self._shapes[stored] for name, stored in self._stored_as.items()}
        of_head = {name for name in ours if name.rpartition(".")[0] in head}
        self._fresh = {name for name in of_head if self._shapes.get(name) != self._seeded.shape(name)}

    def names(self) -> set[str]:
        return super().names() | self._fresh

    def shape(self, name: str) -> tuple[int, ...]:
        return self._seeded.shape(name) if name in self._fresh else super().shape(name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        found = super().read(name for name in names if name not in self._fresh)
        return found | self._seeded.read(name for name in names if name in self._fresh)


_NORMS = {"gamma": "weight", "beta": "bias"}
