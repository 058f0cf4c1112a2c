"""The only room that imports deepspeed: start the ranks, shard a unit, make the engine, read the sharded state."""

import os

import torch

if not torch.accelerator.is_available():
    # What DeepSpeed finds out by itself, with a warning on every rank.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
