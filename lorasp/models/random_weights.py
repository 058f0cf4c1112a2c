"""A checkpoint that is not there: seeded random weights of any shape, made as they are asked for."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lorasp.hashing import stream_key

_DRAWN_AT_ONCE = 2**20  # values, each of such a part from a stream of its own


class RandomWeights:
    """Stands for a `Checkpoint` of a configuration's true shapes, without a file.

    Matrices are normal with the configuration's deviation, norms one, biases zero, in bfloat16 as such checkpoints
    are. A tensor is a function of (seed, name): the same on whichever rank it is made. auto_class: transformers' own,
    of the model that the weights are for.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        seed: int,
        directory: Path,
        *,
        trust_remote_code: bool,
        auto_class: type = AutoModelForCausalLM,
    ) -> None:
        self.directory, self._seed = directory, seed
        self._deviation = getattr(config, "initializer_range", None) or 0.02
        with init_empty_weights():
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()  # registering on meta made a copy of each tied parameter
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.digests: dict[str, str] = {}

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, bfloat16 on the CPU."""
        made = {name: self._make(name) for name in names}
        for name, tensor in made.items():
            parts = " in parts" if tensor.numel() > _DRAWN_AT_ONCE else ""
            self.digests[name] = f"random {self._seed} {self._deviation} {self._shapes[name]}{parts}"
        return made

    def stored_digests(self) -> dict[str, str]:
        """As `Checkpoint` has them: what each tensor read so far follows from."""
        return self.digests

    def digest(self) -> str:
        """SHA-256 over what the weights follow from."""
        return hashlib.sha256(json.dumps(sorted(self.digests.items())).encode()).hexdigest()

    def _make(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        values = torch.empty(shape, dtype=torch.bfloat16)

        def fill(index: int, part: Tensor) -> None:
            stream = (name, index) if index else (name,)
            generator = torch.Generator().manual_seed(stream_key(self._seed, "random weights", *stream))
            part.normal_(0.0, self._deviation, generator=generator)

        # A generator draws on one thread: a 7B would take a minute and more, and as long on a GPU's host.
        parts = values.view(-1).split(_DRAWN_AT_ONCE)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(fill, range(len(parts)), parts))
        return values
