"""What is saved is whole: one step's tensors or another's, never some of each; and only rank 0 holds them."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasp import checkpoint
from lorasp.checkpoint import replacing_whole, save_model


def model(step: int):
    """Four tensors of 400 bytes, all `step`."""
    return ((f"model.layer{index}", torch.full((100,), float(step))) for index in range(4))


def save(run_dir: Path, values) -> None:
    with replacing_whole(run_dir / "model", writes=True) as directory:
        save_model(directory, values, None, prefix="model.", writes=True)


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(checkpoint, "_MODEL_SHARD_BYTES", 400)  # a file a tensor


def steps_in(directory: Path) -> list[float]:
    files = sorted(directory.glob("*.safetensors"))
    return [value.mean().item() for file in files for value in load_file(file).values()]


def test_a_model_whose_writing_ends_midway_leaves_the_one_before(tmp_path):
    save(tmp_path, model(1))
    assert steps_in(tmp_path / "model") == [1, 1, 1, 1]

    def interrupted():
        for index, pair in enumerate(model(2)):
            if index == 2:
                raise KeyboardInterrupt
            yield pair

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, interrupted())
    assert steps_in(tmp_path / "model") == [1, 1, 1, 1] and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_run_left_half_written_is_no_part_of_the_next_model(tmp_path):
    save(tmp_path, model(1))
    half = tmp_path / ".model.writing"
    save_model(half, model(2), None, prefix="model.", writes=True)
    (half / "model-00004.safetensors").rename(half / "model-00005.safetensors")
    save(tmp_path, model(3))
    assert steps_in(tmp_path / "model") == [3, 3, 3, 3] and len(list(tmp_path.iterdir())) == 1


def test_a_rank_that_does_not_write_holds_one_tensor_at_a_time(tmp_path):
    given: list[weakref.ref] = []

    def values():
        for _, value in model(1):
            assert sum(reference() is not None for reference in given) <= 1
            given.append(weakref.ref(value))
            yield "model.layer", value

    save_model(tmp_path / "model", values(), None, prefix="model.", writes=False)
    assert len(given) == 4 and list(tmp_path.iterdir()) == []
