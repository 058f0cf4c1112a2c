"""The rehearsal: nothing that can come is larger, and an allocation that fails is told with what to change."""

import errno

import pytest
import torch
from torch import distributed as dist

from lorasp.data.batches import collate, training_batches
from lorasp.data.examples import Example
from lorasp.data.order import SampleOrder
from lorasp.memory import PhasePeak
from lorasp.recipe import Recipe
from lorasp.rehearsal import worst_batch
from lorasp.reporting.out_of_memory import ANSWERING, describe_out_of_memory, is_out_of_memory


def examples():
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(50):
        length = int(torch.randint(4, 60, (), generator=generator))
        made.append(Example(tuple(range(length)), int(torch.randint(1, length + 1, (), generator=generator))))
    return made


@pytest.mark.parametrize("settings", [{}, {"pack_to": 90}, {"sources": [(20, 0.5), (30, 2.0)]}])
def test_no_batch_of_the_run_is_larger_than_the_rehearsed_one(settings):
    data = examples()
    order = SampleOrder(
        [len(example.input_ids) for example in data], seed=0, epochs=20, global_batch_size=8, **settings
    )
    worst = worst_batch(order.largest_units(data, 4), 4)
    for rank in range(2):
        for step in training_batches(data, order, micro_batch_size=4, rank=rank, world_size=2):
            for batch in step.micro_batches:
                assert sum(batch.lengths) <= sum(worst.lengths) and len(batch.labels) <= len(worst.labels)


def test_the_rehearsed_batch_is_made_of_the_longest_rows_and_the_largest_label_counts():
    data = [Example(tuple(range(10)), 9), Example(tuple(range(8)), 1), Example(tuple(range(4)), 2)]
    worst = worst_batch(data, 2)
    assert worst.lengths == (10, 8) and worst.label_counts == (7, 2)
    assert worst_batch(data, 8).lengths == (10, 8, 4)
    assert collate(data, [0, 1]).lengths == (10, 8)


def test_out_of_memory_is_recognised_on_a_cpu_and_on_a_gpu():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    assert is_out_of_memory(failed.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))  # of mapping a weights file
    assert not is_out_of_memory(OSError(errno.ENOENT, "No such file or directory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.26.2\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\n"
)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
            "CUDA error: out of memory",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (dist.DistBackendError(NCCL + "Cuda failure 2 'out of memory'"), "Cuda failure 2 'out of memory'"),
        (
            dist.DistBackendError(NCCL + "Failed to CUDA calloc async 608 bytes"),
            "Failed to CUDA calloc async 608 bytes",
        ),
    ],
    ids=["context", "cuBLAS", "NCCL", "NCCL's buffers"],
)
def test_allocations_of_libraries_beside_torchs_allocator_are_recognised_and_their_own_words_told(error, told):
    assert is_out_of_memory(error)
    recipe = Recipe(model={"path": "x"}, data={"train": "y"})
    assert describe_out_of_memory(error, "train", recipe, 0, {}, {}).splitlines()[0] == (
        f"out of memory on rank 0 in phase train: {told}"
    )
    other = "Cuda failure 700 'an illegal memory access was encountered'"
    assert not is_out_of_memory(dist.DistBackendError(NCCL + other))


def test_the_advice_names_the_phase_the_peaks_and_the_settings():
    recipe = Recipe(model={"path": "x"}, data={"train": "y"}, training={"activation_checkpointing": "none"})
    peak = PhasePeak("rehearse_train", 1.0, 3 * 2**30, 4 * 2**30, 2**30, "VmHWM")
    text = describe_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "rehearse_train",
        recipe,
        1,
        {"rehearse_train": peak},
        {"base_shard": 80 * 2**20},
    )
    assert text.startswith(
        "out of memory on rank 1 in phase rehearse_train: CUDA out of memory. Tried to allocate 2.00"
    )
    assert "3.000" in text and "base shard 80.0 MiB" in text
    assert "activation_checkpointing=selective keeps less of each layer for backward (now none)" in text
    assert "training.micro_batch_size=2 (now 4)" in text
    assert "evaluation.micro_batch_size" not in text
    evaluating = describe_out_of_memory(MemoryError("no"), "rehearse_evaluate", recipe, 0, {}, {})
    assert "evaluation.micro_batch_size=4 (now 8)" in evaluating
    assert "evaluation.samples" not in evaluating
    answering = describe_out_of_memory(MemoryError("no"), "rehearse_evaluate", recipe, 0, {}, {}, ANSWERING)
    assert answering.startswith("out of memory on rank 0 in phase rehearse_evaluate (answering the samples): no")
    assert "evaluation.samples=1 (now 3)" in answering and "evaluation.max_new_tokens=32 (now 64)" in answering
    assert "micro_batch_size" not in answering
    saving = describe_out_of_memory(MemoryError(""), "save", recipe, 0, {}, {})
    assert saving.startswith("out of memory on rank 0 in phase save: MemoryError")
    assert "max_length" not in saving and "a smaller adapter.rank (now 16)" in saving


def advice(phase="train", world_size=1, policy=None, **sections):
    recipe = Recipe(**{"model": {"path": "x"}, "data": {"train": "y"}} | sections)
    told = describe_out_of_memory(MemoryError("no"), phase, recipe, 0, {}, {}, world_size=world_size, policy=policy)
    return [line.removeprefix("  - ") for line in told.partition("in this order:\n")[2].splitlines()]


def test_a_smaller_micro_batch_still_divides_the_global_batch():
    training = {"micro_batch_size": 5, "global_batch_size": 10, "activation_checkpointing": "layer"}
    assert advice(world_size=2, training=training)[0] == (
        "training.micro_batch_size=1 (now 5); accumulation keeps the global batch and its loss"
    )
    training |= {"micro_batch_size": 6, "global_batch_size": 12}
    assert advice(world_size=2, training=training)[0].startswith("training.micro_batch_size=3 (now 6)")


def test_a_leaner_policy_is_that_after_the_one_in_force_and_goes_with_the_rest():
    leaner = "training.activation_checkpointing=lean keeps less of each layer for backward (now selective)"
    assert advice(training={"activation_checkpointing": "selective"})[0] == leaner
    fallen_back = advice(policy="layer", training={"activation_checkpointing": "selective"})
    offloading = advice(training={"activation_checkpointing": "lean", "offload_activations": True})
    assert not any("activation_checkpointing" in line for line in fallen_back + offloading)


def test_beams_are_fewer_where_translations_are_written():
    how = {"task": "wmt16_en_ro", "evaluation": {"micro_batch_size": 1}}
    told = advice("evaluate", translation={"test": "wmt", "beams": 4}, **how)
    assert told[0] == "translation.beams=2 (now 4): of each sentence so many translations are kept"
    assert not any("beams" in line for line in advice("train", translation={"test": "wmt", "beams": 4}, **how))
