"""A user's place: a tiny checkpoint, an Alpaca file and a recipe for them."""

import json
import random
from pathlib import Path

import pytest

from tests.tiny_models import save_model

_WORDS = "ash birch cedar elm fir hazel larch oak pine rowan".split()
_RECIPE = """\
output_dir: {place}/runs
model:
  path: model
adapter:
  rank: 4
data:
  train: train.json
  held_out: held_out.json
  template: short
  max_length: 96
training:
  max_steps: 4
  global_batch_size: 8
  micro_batch_size: 4
  learning_rate: 1.0e-2
  eps: 1.0e-5
  log_every: 1
evaluation:
  samples: 2
  max_new_tokens: 3
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Holds `model/`, `train.json` (2 of its 40 rows with an empty output), `held_out.json` and `tiny.yaml`."""
    place = tmp_path_factory.mktemp("place")
    save_model("llama", place / "model")
    numbers = random.Random(0)
    rows = [
        {
            "instruction": " ".join(numbers.choices(_WORDS, k=numbers.randint(1, 4))),
            "input": numbers.choice(["", numbers.choice(_WORDS)]),
            "output": " ".join(numbers.choices(_WORDS, k=numbers.randint(1, 3))),
        }
        for _ in range(49)
    ]
    for row in (5, 17):
        rows[row]["output"] = ""
    (place / "train.json").write_text(json.dumps(rows[:40]))
    (place / "held_out.json").write_text(json.dumps(rows[40:]))
    (place / "tiny.yaml").write_text(_RECIPE.format(place=place))
    return place


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A user who has configured nothing."""
    return tmp_path_factory.mktemp("home")
