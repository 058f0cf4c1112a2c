"""The quantized base kept for the next start: the same model to the bit, for the checkpoint it was made of alone."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasp.models import packed_base
from lorasp.models.build import build_on_meta, fill_and_shard
from lorasp.models.quantized_cache import DAMAGED, QuantizedCache
from lorasp.models.weights import Checkpoint, load_config
from lorasp.recipe import Quantization, RecipeError
from tests.test_models import recipe
from tests.tiny_models import save_model

CPU = torch.device("cpu")
NF4 = Quantization()


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASP_CACHE", str(tmp_path / "cache"))
    return save_model("qwen2", tmp_path / "model")  # with biases, which stay in the checkpoint


def entry(directory, quantization=NF4, dtype=torch.float32, warn=lambda line: None):
    return QuantizedCache(Checkpoint(directory), quantization, dtype, CPU, warn)


def fill(directory, checkpoint, keep=None):
    settings = recipe(directory, quantization={"format": "nf4"})
    model = build_on_meta(load_config(directory, settings.model), settings, torch.float32)
    nothing = lambda *_: None  # noqa: E731
    how = {"shard": nothing, "bring_to_first": nothing, "broadcast": nothing}
    fill_and_shard(model, checkpoint, device=CPU, rank=0, world_size=1, keep=keep, **how)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def kept(directory):
    checkpoint, cache = Checkpoint(directory), entry(directory)
    state = fill(directory, checkpoint, cache.keep)
    cache.finish(checkpoint.digests)
    return state, checkpoint, cache


def test_a_second_start_reads_the_same_model_and_knows_the_same_base(directory):
    first, checkpoint, cache = kept(directory)
    manifest = entry(directory).found()
    again = Checkpoint(directory)
    again.replace(cache.path, manifest, DAMAGED)
    second = fill(directory, again)
    assert second.keys() == first.keys() and all(torch.equal(second[name], first[name]) for name in first)
    assert again.stored_digests() == checkpoint.digests and again.digest() == checkpoint.digest()
    assert not list(cache.path.parent.glob("*.partial"))


def test_an_entry_belongs_to_its_files_quantization_precision(directory):
    _, _, cache = kept(directory)
    assert entry(directory).found() is not None
    assert entry(directory, dtype=torch.bfloat16).found() is None
    assert entry(directory, Quantization(format="fp4")).found() is None
    assert entry(directory, Quantization(cache=False)).path == cache.path  # whether to keep is no part of what is kept
    weights = directory / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert entry(directory).found() is None


def test_an_entry_that_is_not_whole_is_none(directory):
    _, _, cache = kept(directory)
    file = next(cache.path.glob("*layers.1.safetensors"))
    file.rename(file.with_suffix(".gone"))
    assert entry(directory).found() is None
    kept(directory)  # and is made again
    assert entry(directory).found() is not None
    (cache.path / "manifest.json").write_text("{")
    assert entry(directory).found() is None


def test_a_changed_byte_is_found_out(directory):
    _, _, cache = kept(directory)
    file = next(cache.path.glob("*layers.1.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name][0] ^= 1
    save_file(tensors, file)
    manifest, again = entry(directory).found(), Checkpoint(directory)
    again.replace(cache.path, manifest, DAMAGED)
    fill(directory, again)
    with pytest.raises(RecipeError, match=rf"is damaged \({name} has changed\); delete it"):
        again.digest()


def test_a_full_disk_costs_the_run_nothing(directory, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_base, "save_file", full)
    told = []
    cache, checkpoint = entry(directory, warn=told.append), Checkpoint(directory)
    fill(directory, checkpoint, cache.keep)
    cache.finish(checkpoint.digests)
    assert len(told) == 1 and "No space left on device" in told[0] and cache.found() is None
    assert not cache.path.parent.exists() or not list(cache.path.parent.iterdir())


def test_what_a_killed_process_left_is_removed_after_a_day(directory):
    cache = entry(directory)
    fresh, old = (cache.path.with_name(f"{name}.partial") for name in ("fresh.1", "old.2"))
    for path in (fresh, old):
        path.mkdir(parents=True)
    os.utime(old, (0, 0))
    checkpoint = Checkpoint(directory)
    fill(directory, checkpoint, cache.keep)
    cache.finish(checkpoint.digests)
    assert cache.found() and sorted(path.name for path in cache.path.parent.iterdir()) == [cache.path.name, fresh.name]


def test_the_manifest_is_plain_and_small(directory):
    _, _, cache = kept(directory)
    manifest = json.loads((cache.path / "manifest.json").read_text())
    file, shape, digest = manifest["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert (file, shape, len(digest)) == ("model.layers.0.safetensors", [64 * 160 // 2, 1], 64)
    assert set(manifest["stored"]) == {name for name in manifest["tensors"] if name.endswith("proj.weight")}
