"""Where a model's weights come from: a local directory or the hub, always as safetensors, read a few at a time."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lorasp.models.demo import convert_demo_model, demo_encoder
from lorasp.recipe import DEMO_MODELS, Model, RecipeError

DEMO_MODEL, DEMO_ENCODER = DEMO_MODELS
_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
# The same weights again, under names that nothing here reads: Mistral's own layout, and diffusers' half precision.
_NOT_READ = ["consolidated*", "*.fp16*"]


def locate_model(model: Model, *, download: bool = True, weights: bool = True) -> Path:
    """The local directory of a model: itself, that of a demo model, or a hub snapshot.

    With `model.weights: random` only its configuration is needed: a named shape's, or any config file.

    With `download` false, only what is cached is looked for: one process a node downloads, the others then look.
    With `weights` false, only the configuration and the tokenizer are sure to be there.
    Raises RecipeError if it cannot be had.
    """
    if model.path == DEMO_MODEL:
        return convert_demo_model()
    if model.path == DEMO_ENCODER:
        return demo_encoder()
    if model.shape_directory is not None:
        return model.shape_directory
    if Path(model.path).exists():
        return Path(model.path)
    weights = weights and model.weights == "stored"
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {model.revision!r}" if model.revision else ""
    files = _FILES if weights else [pattern for pattern in _FILES if pattern != "*.safetensors"]
    try:
        found = snapshot_download(
            model.path,
            revision=model.revision,
            allow_patterns=files,
            ignore_patterns=_NOT_READ,
            local_files_only=not download,
        )
    except HFValidationError:
        raise RecipeError(f"model.path: {model.path!r} is neither a directory nor a hub name") from None
    except RevisionNotFoundError:
        raise RecipeError(f"model.path: {model.path!r} has no revision {model.revision!r} on the hub") from None
    except (GatedRepoError, RepositoryNotFoundError):
        raise RecipeError(
            f"model.path: {model.path!r} is no local directory, and no model of the hub that may be read; if it is "
            f"private or gated, ask for access and set HF_TOKEN, or run `hf auth login`"
        ) from None
    except Exception as error:  # no network, and nothing cached: the hub's client raises a dozen kinds
        if constants.HF_HUB_OFFLINE:
            raise RecipeError(
                f"model.path: {model.path!r} is no local directory and could not be had from the hub: no model of "
                f"that name{at} is in its cache ({constants.HF_HUB_CACHE}), while HF_HUB_OFFLINE=1 forbids to "
                f"download it"
            ) from None
        raise RecipeError(
            f"model.path: {model.path!r}{at} is no local directory and could not be had from the hub "
            f"({_reason(error)}); download it where there is a network, then give its directory, or set HF_HOME to "
            f"its cache"
        ) from None
    return Path(found)


def hub_commit(directory: Path, model: Model) -> str | None:
    """The commit that `locate_model` found on the hub; None for a model of another kind."""
    on_hub = model.path not in DEMO_MODELS and model.shape_directory is None and not Path(model.path).exists()
    return directory.name if on_hub else None  # a snapshot's directory is named by it


def load_config(directory: Path, model: Model) -> PreTrainedConfig:
    """The model's configuration. Raises RecipeError if there is none, or it needs code that the recipe forbids."""
    file = directory if directory.is_file() else directory / "config.json"
    if not file.is_file():
        raise RecipeError(f"model.path: {directory} holds no config.json, so it is no Hugging Face model")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # of a dozen kinds: not JSON, unknown, values of a wrong type, code that is forbidden
        raise RecipeError(f"model.path: {file} cannot be used: {_reason(error)}") from None


def load_tokenizer(directory: Path, model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises RecipeError if there is none."""
    config = load_config(directory, model)  # from_pretrained would read it too, and blame the tokenizer for its faults
    try:
        return AutoTokenizer.from_pretrained(directory, config=config, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain ones
        raise RecipeError(f"model.path: no tokenizer can be loaded from {directory}: {_reason(error)}") from None


class Checkpoint:
    """The tensors of a safetensors checkpoint, single-file or sharded, by name.

    digests: SHA-256 of each tensor read so far; those that other ranks read can be added.

    Raises RecipeError for a missing, truncated or foreign file, before any tensor is read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = _files_by_tensor(directory)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stored_as: dict[str, str] = {}  # by what name a file holds a tensor, where that is not ours
        self.digests: dict[str, str] = {}
        self._packed_base: tuple[Path, Mapping[str, Any], str] | None = None
        for file in sorted(set(self._files.values())):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  (not a dict)
                        self._shapes[name] = tuple(tensors.get_slice(name).get_shape())
            except FileNotFoundError:
                raise RecipeError(f"model.path: {file} is missing; the checkpoint's index names it") from None
            except Exception as error:  # safetensors raises its own for a broken header or length
                raise RecipeError(f"model.path: {file} is damaged ({error}); download it again") from None
        for name, file in self._files.items():
            if name not in self._shapes:
                raise RecipeError(f"model.path: {file} lacks the tensor {name} that the index promises")

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, as stored; remembers the digest of each.

        Their memory is the file's mapping, which counts as resident while it lives: copy what is to stay.
        """
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self._files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, its_names in wanted.items():
            with safe_open(file, framework="pt") as tensors:
                for name in its_names:
                    tensor = tensors.get_tensor(self._stored_as.get(name, name))
                    self.digests[name] = digest_of(tensor)
                    found[name] = tensor
        return found

    @property
    def is_packed(self) -> bool:
        """Whether linears are stored in bitsandbytes' 4-bit layout."""
        return any(name.endswith(".absmax") for name in self._files)

    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Path, size and time of change of every file: equal ones are taken for the same weights."""
        files = sorted({os.path.realpath(file) for file in self._files.values()})
        return [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]

    def replace(self, directory: Path, manifest: Mapping[str, Any], if_damaged: str) -> None:
        """Has the tensors of a packed base (packed_base.py) read from `directory` instead, or besides.

        The files need not be there for a rank that reads none of them. if_damaged: what to do about it.
        """
        for name, (file, shape, _) in manifest["tensors"].items():
            self._files[name], self._shapes[name] = str(directory / file), tuple(shape)
            self._stored_as.pop(name, None)
        self._packed_base = (directory, manifest, if_damaged)

    def stored_digests(self) -> dict[str, str]:
        """The digests of the checkpoint's own tensors, also of those for which a packed base was read.

        Raises RecipeError unless what was read of that is what was written.
        """
        if self._packed_base is None:
            return self.digests
        directory, manifest, if_damaged = self._packed_base
        tensors = manifest["tensors"]
        wrong = [name for name, (_, _, digest) in tensors.items() if self.digests.get(name) != digest]
        if wrong:
            raise RecipeError(f"{directory} is damaged ({wrong[0]} has changed); {if_damaged}")
        return {name: digest for name, digest in self.digests.items() if name not in tensors} | manifest["stored"]

    def digest(self) -> str:
        """SHA-256 over the names and digests of all tensors read: equal weights, equal digest."""
        lines = (f"{name} {digest}" for name, digest in sorted(self.stored_digests().items()))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _files_by_tensor(directory: Path) -> dict[str, str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text())["weight_map"]
            return {name: str(directory / file) for name, file in names.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"model.path: {index} is no safetensors index ({type(error).__name__}: {error}); download it again"
            ) from None
    single = directory / "model.safetensors"
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as tensors:
                return dict.fromkeys(tensors.keys(), str(single))
        except Exception as error:
            raise RecipeError(f"model.path: {single} is damaged ({error}); download it again") from None
    raise RecipeError(
        f"model.path: {directory} holds no model.safetensors; pickled checkpoints (.bin) are not read: "
        f"convert it with transformers' save_pretrained"
    )


def _reason(error: Exception) -> str:
    """What an error of a library begins with: its text runs over many lines, or there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor on the CPU."""
    return hashlib.sha256(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())).hexdigest()
