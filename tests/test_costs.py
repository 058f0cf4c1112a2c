"""The cost model: amounts against counters of torch, prices found again, and the arithmetic of a cluster."""

import functools
import importlib.util
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lorasp.costs import Cluster, Prices, Work, count_work, gathered_bytes
from lorasp.data.batches import collate
from lorasp.data.examples import Example
from lorasp.models.build import build_on_meta
from tests.distributed.launching import ROOT
from tests.test_models import build
from tests.tiny_models import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(save_model("llama_tied", tmp_path_factory.mktemp("models") / "tied"), quantization={"format": "nf4"})


def test_amounts_are_those_of_a_real_forward(model):
    rows, length = 3, 20
    batch = collate([Example(tuple(range(length)), 1)] * rows, range(rows))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch.model_inputs("cpu"))
    counted = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counted.items() if "bmm" in str(op))
    work = count_work(model, rows=rows, length=length, world_size=2)
    # torch counts the whole square, forward; the causal half of it, and 2.5 times that in backward, are computed.
    assert work.attention == 3.5 * attention / 2
    assert work.weights == 2 * 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)  # layers: q, o; k, v; gate, up, down
    assert work.units == 2 * (3 + 1) + 2  # layers and norm, and once the embedding and the head
    assert work.received == gathered_bytes(model) / 2
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert gathered_bytes(model) == 2 * stored  # the tied weight once for the embedding, and once for the head
    assert count_work(model, rows=rows, length=length, world_size=1).received == 0


def test_prices_are_found_again_and_none_is_negative():
    generator = torch.Generator().manual_seed(0)
    works = [Work(*torch.rand(6, generator=generator).tolist()) for _ in range(9)]
    true = Prices((3.0, 0.0, 0.5, 0.0, 2.0, 0.1))
    found = Prices.fit(works, [true.of(work) for work in works])
    assert found.seconds == pytest.approx(true.seconds, abs=1e-9) and min(found.seconds) >= 0
    assert sum(found.parts(works[0]).values()) == pytest.approx(true.of(works[0]))
    # Measured with an error: of seconds 2 and 100 where p and 100 p are expected, (p/2 - 1)² + (p - 1)² is least.
    works = [Work(amount, 0.0, 0.0, 0.0, 0.0, 0.0) for amount in (1.0, 100.0)]
    assert Prices.fit(works, [2.0, 100.0]).seconds == pytest.approx((1.2, 0.0, 0.0, 0.0, 0.0, 0.0))


def test_a_cluster_gathers_at_its_narrowest_place():
    cluster = Cluster("two nodes of four", per_node=4, flops=10.0, weights=5.0, link=100.0, network=20.0)
    work = Work(products=60.0, attention=40.0, weights=10.0, passed=0.0, received=0.0, units=0.0)
    assert cluster.seconds(work, 800.0, 4, hierarchical=False) == (12.0, 800 * 3 / 4 / 100)
    assert cluster.seconds(work, 800.0, 8, hierarchical=False) == (12.0, 800 * 1 / 2 / 20)  # through the network
    assert cluster.seconds(work, 800.0, 8, hierarchical=True) == (12.0, 800 * 3 / 4 / 100)


def test_the_study_varies_one_thing_at_a_time_and_says_what_is_calculated(monkeypatch):
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "launch" / "scaling.py")
    scaling = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = scaling  # where its dataclasses look for their types
    spec.loader.exec_module(scaling)
    settings = scaling._settings([1, 2, 4])
    assert len(set(settings)) == len(settings) == 11
    middle = settings[0]
    for setting in settings[1:]:
        changed = {name for name, value in vars(setting).items() if value != vars(middle)[name]}
        assert len(changed) == 1 or changed == {"rows", "length"}
    # What S selects is no matter of amounts, and to draw it for 13B takes seconds.
    monkeypatch.setattr("lorasp.models.build.build_on_meta", functools.partial(build_on_meta, draws=False))
    told = scaling.on_gpus()
    assert told.startswith("Calculated, not measured: LLaMA-13B")
    rows = [line.split(" | ") for line in told.splitlines() if line.startswith("| 8 ×")]
    # Through one port a node, 64 GPUs wait for their gathers; with a whole set of shards in each node they do not.
    [everywhere, in_nodes] = [row for row in rows if "one 100" in row[0] and row[1] == "64"]
    assert float(everywhere[4]) > float(everywhere[3]) and float(in_nodes[4]) < float(in_nodes[3])
