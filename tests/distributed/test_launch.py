"""The whole run, from a recipe to a report, by every command that starts it."""

import gzip
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasp.data.load import load_data
from lorasp.models.weights import load_tokenizer
from lorasp.recipe_loading import load_recipe
from lorasp.trainer import PARTS
from tests.distributed.commands import Done, accelerate, accelerate_on_two, free_port, python, run, torchrun_on_two
from tests.tiny_models import BOS, EOS

pytestmark = pytest.mark.slow

STEPS = 4
RANK = 4

# What `accelerate config` writes for another of the user's projects.
HOSTILE = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_multinode_launcher: standard
  zero_stage: 2
  gradient_accumulation_steps: 4
  gradient_clipping: 0.01
  offload_optimizer_device: cpu
  offload_param_device: none
  zero3_init_flag: true
mixed_precision: bf16
machine_rank: 0
main_training_function: main
main_process_port: {port}
num_machines: 1
num_processes: 2
same_network: true
use_cpu: false
"""


@dataclass(frozen=True)
class Run:
    """A launch that ended well, and what it left."""

    done: Done
    directory: Path

    @property
    def report(self) -> dict:
        return json.loads((self.directory / "report.json").read_text())

    @property
    def losses(self) -> list[float]:
        return [point["loss"] for point in self.report["history"]]


@pytest.fixture(scope="session")
def launch_run(place, home):
    """Launches the tiny recipe under a name and gives the `Run`."""

    def launch_one(command, name: str, *overrides: str, home: Path = home) -> Run:
        done = run(command(str(place / "tiny.yaml"), f"name={name}", *overrides), home)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return Run(done, place / "runs" / name)

    return launch_one


@pytest.fixture(scope="session")
def plain(launch_run):
    """One process without a launcher, evaluating and saving midway as well."""
    return launch_run(python, "plain", "training.evaluate_every=2", "checkpoint.every_steps=2")


@pytest.fixture(scope="session")
def two(launch_run):
    return launch_run(accelerate_on_two, "two", "profile.first_step=3", "profile.steps=3")


@pytest.fixture(scope="session")
def hostile(launch_run, tmp_path_factory):
    home = tmp_path_factory.mktemp("hostile")
    config = home / ".cache" / "huggingface" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(HOSTILE.format(port=free_port()))
    return launch_run(accelerate, "hostile", home=home)


@pytest.fixture(scope="session")
def runs(launch_run, plain, two, hostile):
    """The same recipe by every way of starting it: name -> (the run, its ranks)."""
    return {
        "python": (plain, 1),
        "accelerate without flags": (launch_run(accelerate, "flagless"), 1),
        "accelerate on 2": (two, 2),
        # Of a global batch of 8: a rank takes its 4.
        "torchrun on 2": (launch_run(torchrun_on_two, "torchrun", "training.micro_batch_size=8"), 2),
        "accelerate with a hostile config": (hostile, 2),
    }


def test_every_way_of_launching_gives_the_same_run(runs, plain):
    """The losses of all steps and the held-out losses, to 1e-5, on one rank and on two."""
    assert len(plain.losses) == STEPS and plain.losses[-1] < plain.losses[0]
    for name, (found, ranks) in runs.items():
        report = found.report
        assert (report["status"], report["world_size"]) == ("finished", ranks), name
        assert found.losses == pytest.approx(plain.losses, rel=1e-5), name
        for metric in ("held_out_loss_before", "held_out_loss_after"):
            assert report["metrics"][metric] == pytest.approx(plain.report["metrics"][metric], rel=1e-5), name
        assert report["metrics"]["held_out_loss_after"] < report["metrics"]["held_out_loss_before"]


def test_a_micro_batch_larger_than_a_ranks_share_is_that_share_and_told(runs):
    found, _ = runs["torchrun on 2"]
    assert found.report["recipe"]["training"]["micro_batch_size"] == 4
    assert "micro batches of 4, a rank's share, instead of 8" in found.done.stdout


def test_what_a_hostile_accelerate_config_wants_is_overruled_and_told(hostile, runs):
    told = [line for line in hostile.done.stdout.splitlines() if "overrules" in line]
    for setting in (
        "ACCELERATE_MIXED_PRECISION=bf16",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE=2",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
        "ACCELERATE_GRADIENT_CLIPPING=0.01",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=cpu",
    ):
        assert sum(setting in line for line in told) == 1, setting
    # Sharded all the same: with the config's stage 2, each rank would hold the whole base.
    whole = breakdowns(runs["python"][0], "train")[0]["base_shard"]
    for held in breakdowns(hostile, "train"):
        assert held["base_shard"] < 0.51 * whole
    assert "overrules" not in runs["python"][0].done.stdout


def breakdowns(found: Run, phase: str) -> list[dict[str, int]]:
    return [rank["breakdown"] for rank in found.report["phases"][phase]["ranks"]]


def test_the_report_has_the_peaks_of_every_rank_by_phase_and_part(runs):
    for name, (found, ranks) in runs.items():
        phases = found.report["phases"]
        for phase in ("load", "train", "evaluate"):
            assert phases[phase]["seconds"] > 0
            assert [rank["rank"] for rank in phases[phase]["ranks"]] == list(range(ranks)), name
            for rank in phases[phase]["ranks"]:
                assert rank["source"]
                assert rank["baseline_bytes"] > 0 and rank["peak_bytes"] > 0
                parts = dict(rank["breakdown"])
                assert {"base_shard", "adapters", "gradients", "optimizer", "workspace"} <= set(parts)
                assert parts["base_shard"] > 0 and parts["adapters"] > 0
                assert sum(parts.values()) == rank["peak_bytes"]
        for held in breakdowns(found, "train"):
            assert held["optimizer"] > 0 and held["gradients"] > 0
        assert ranks_in_table(found.done.stdout) == {
            phase: [str(rank["rank"]) for rank in held["ranks"]] for phase, held in phases.items()
        }


def ranks_in_table(stdout: str) -> dict[str, list[str]]:
    """The rank column of the printed table of peaks, by phase."""
    table = stdout.partition("peak memory of every rank:\n")[2].splitlines()
    header = next(number for number, line in enumerate(table) if line.split()[:2] == ["phase", "rank"])
    found: dict[str, list[str]] = {}
    for phase, rank, *_ in (line.split() for line in table[header + 1 :]):
        if not rank.isdecimal():  # the table's end
            break
        found.setdefault(phase, []).append(rank)
    return found


def test_two_ranks_share_the_base_and_the_optimizer_state(runs, plain, place):
    """Of n elements each of two ranks holds ⌈n/2⌉: at most one of padding a tensor, of which there are under 100."""
    whole = breakdowns(plain, "train")[0]
    for name in ("accelerate on 2", "torchrun on 2"):
        for held in breakdowns(runs[name][0], "train"):
            for part in ("base_shard", "adapters"):
                assert whole[part] / 2 <= held[part] <= whole[part] / 2 + 4 * 100
    base = load_file(place / "model" / "model.safetensors")
    linears = {name: weight for name, weight in base.items() if "_proj" in name}
    adapter = sum(RANK * sum(weight.shape) for weight in linears.values())
    for found, ranks in runs.values():
        counts = found.report["parameters"]
        assert counts["total"] == sum(weight.numel() for weight in base.values()) + adapter
        assert (counts["adapter"], 2 * counts["trained"]) == (adapter, adapter)
        # Master and two moments in fp32, AdamW's own step counter a rank; padding as above.
        optimizer = counts["optimizer_state_bytes"] - 4 * ranks
        assert 12 * counts["trained"] <= optimizer <= 12 * (counts["trained"] + (ranks - 1) * 2 * len(linears))


def test_a_steps_seconds_are_told_by_part_for_every_rank(two):
    """On both ranks the parts add up to the step; medians of each, so not to the last digit."""
    throughput = two.report["throughput"]
    assert [rank["rank"] for rank in throughput["ranks"]] == [0, 1]
    for rank in throughput["ranks"]:
        seconds = [rank[part] for part in PARTS]
        assert all(value > 0 for value in seconds)
        assert sum(seconds) == pytest.approx(throughput["step_seconds_median"], rel=0.5)
    header = r"\| +rank \| +data \| +gather \| +reduce \| +optimizer \| +compute \|"
    assert re.search(header, (two.directory / "report.md").read_text())


def test_rates_are_what_a_step_had_over_its_seconds(plain, place):
    recipe = load_recipe(place / "tiny.yaml")
    data = load_data(recipe, load_tokenizer(place / "model", recipe.model))
    order = data.order(recipe)
    for step, point in enumerate(plain.report["history"]):
        examples = [data.train.examples[row] for unit in order.global_batch(step) for row in unit]
        tokens, labels = sum(len(its.input_ids) for its in examples), sum(its.label_count for its in examples)
        assert 0 < labels < tokens
        assert point["step_seconds"] * point["real_tokens_per_second"] == pytest.approx(tokens)
        assert point["step_seconds"] * point["labels_per_second"] == pytest.approx(labels)


def test_a_profile_is_a_trace_of_the_steps_asked_for_on_every_rank(two):
    """Of steps 3 to 5, which end with the run at step 4."""
    for rank in range(2):
        trace = json.loads(gzip.decompress((two.directory / "profile" / f"rank_{rank}_trace.json.gz").read_bytes()))
        names = [event.get("name") for event in trace["traceEvents"]]
        # The three layers' backward in two steps, and the allocations: no other step is in it.
        assert names.count("_NormMlpAndResidualBackward") == 2 * 3
        assert names.count("[memory]") > 100


def test_the_report_is_resolved_and_counts_what_was_left_out(plain, place):
    report = plain.report
    assert report["recipe"]["adapter"]["rank"] == RANK and report["recipe"]["training"]["warmup_ratio"] == 0.03
    assert report["recipe"]["checkpoint"]["every_steps"] == 2  # from the command line
    assert report["recipe"]["model"]["path"] == str(place / "model")
    assert {"torch", "transformers", "accelerate", "deepspeed"} <= set(report["versions"])
    assert report["throughput"]["real_tokens_per_second"] > 0 and report["throughput"]["step_seconds_median"] > 0
    assert report["throughput"]["mfu"] > 0
    assert (report["data"]["train"]["rows"], report["data"]["train"]["dropped_empty"]) == (38, 2)
    assert f"train: 38 rows of {place / 'train.json'} (alpaca); 2 with an empty output dropped" in plain.done.stdout
    for sample in report["samples"]:
        assert set(sample) == {"prompt", "expected", "before", "after"}
    assert (plain.directory / "report.md").read_text().startswith("# plain: ")


@pytest.mark.parametrize("name", ["python", "torchrun on 2"])
def test_tensorboard_has_every_documented_curve_and_each_ranks_memory(name, runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, ranks = runs[name]
    events = EventAccumulator(str(found.directory / "tensorboard")).Reload()
    training = {
        "train/loss",
        "train/learning_rate",
        "train/gradient_norm",
        "throughput/real_tokens_per_second",
        "throughput/computed_tokens_per_second",
        "throughput/step_seconds",
        "throughput/mfu",
        *(f"step/rank_{rank}_{part}_seconds" for rank in range(ranks) for part in PARTS),
        "memory/highest_peak_gib",
        *(f"memory/rank_{rank}_{what}_gib" for rank in range(ranks) for what in ("peak", "now")),
    }
    evaluation = {"evaluate/held_out_loss", "evaluate/exact_match"}
    assert set(events.Tags()["scalars"]) == training | evaluation
    for tag in training:
        assert [event.step for event in events.Scalars(tag)] == list(range(1, STEPS + 1)), tag
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(found.losses, rel=1e-6)
    assert all(event.value > 0 for rank in range(ranks) for event in events.Scalars(f"memory/rank_{rank}_peak_gib"))
    scored = [0, 2, STEPS] if name == "python" else [0, STEPS]  # the plain run evaluates midway as well
    for tag in evaluation:
        assert [event.step for event in events.Scalars(tag)] == scored


def test_an_adapter_reads_back_where_its_run_ended_also_into_the_place_of_that_run(launch_run, two):
    """An adapter of two ranks, read by one, with a seed that would draw another S."""
    adapter = two.directory / "adapter"
    again = launch_run(
        python, "again", f"adapter.init_from={adapter}", "training.max_steps=1", "evaluation.samples=0", "seed=7"
    )
    assert again.report["metrics"]["held_out_loss_before"] == pytest.approx(
        two.report["metrics"]["held_out_loss_after"], rel=1e-6
    )
    infos = []
    for directory in (two.directory, again.directory):
        with safe_open(directory / "adapter" / "adapter.safetensors", framework="pt") as file:
            infos.append(json.loads(file.metadata()["lorasp"]))
    assert (infos[0]["step"], infos[1]["step"]) == (STEPS, STEPS + 1)
    # S travelled with the adapter: what the new one says of it is still true.
    assert all(infos[0][key] == infos[1][key] for key in ("seed", "selection_digest", "base_digest"))

    # Once more under the same name, from the adapter of the run that it replaces.
    events = set((again.directory / "tensorboard").iterdir())
    ended = again.report["metrics"]["held_out_loss_after"]
    (again.directory / "notes.txt").write_text("the user's own")
    last = ["overwrite=true", "training.max_steps=1", "evaluation.samples=0"]
    replaced = launch_run(python, "again", f"adapter.init_from={again.directory / 'adapter'}", *last)
    assert replaced.report["metrics"]["held_out_loss_before"] == pytest.approx(ended, rel=1e-6)
    assert events.isdisjoint((replaced.directory / "tensorboard").iterdir())
    assert (replaced.directory / "notes.txt").read_text() == "the user's own"


def test_an_adapter_goes_on_in_bf16_from_the_fp32_values_that_were_saved(launch_run):
    """Two ranks of a bf16 engine; a learning rate of 1e-30 moves nothing, so what is saved is what was begun with."""
    first = launch_run(
        accelerate_on_two, "bf16", "model.dtype=bfloat16", "training.max_steps=2", "evaluation.samples=0"
    )
    second = launch_run(
        accelerate_on_two,
        "bf16_again",
        "model.dtype=bfloat16",
        f"adapter.init_from={first.directory / 'adapter'}",
        "training.learning_rate=1e-30",
        "training.max_steps=1",
        "evaluation.samples=0",
    )
    saved, again = (load_file(run.directory / "adapter" / "adapter.safetensors") for run in (first, second))
    rounded = 0
    for name, values in saved.items():
        if name.endswith((".A", ".B")):
            torch.testing.assert_close(again[name], values, rtol=0, atol=1e-20)
            rounded += int((values.bfloat16().float() != values).sum())
    assert rounded > 1000  # values that bf16 would have changed


def test_full_fine_tuning_saves_a_model_that_plain_transformers_scores_alike(launch_run, place):
    full = launch_run(
        accelerate_on_two, "full", "method=full", "adapter=null", "training.max_steps=3", "evaluation.samples=0"
    )
    assert not (full.directory / "adapter").exists()
    counts = full.report["parameters"]
    base = load_file(place / "model" / "model.safetensors")
    assert counts["trained"] == counts["total"] == sum(weight.numel() for weight in base.values())

    model = AutoModelForCausalLM.from_pretrained(full.directory / "model", dtype=torch.float32).eval()
    state = model.state_dict()
    unchanged = [name for name, weight in base.items() if torch.equal(state[name], weight)]
    assert unchanged == []
    rows = json.loads((place / "held_out.json").read_text())
    assert full.report["metrics"]["held_out_loss_after"] == pytest.approx(mean_response_loss(model, rows), rel=1e-4)
    untrained = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    before = full.report["metrics"]["held_out_loss_before"]
    assert before == pytest.approx(mean_response_loss(untrained, rows), rel=1e-4)
    assert before - full.report["metrics"]["held_out_loss_after"] > 0.01


@torch.no_grad()
def mean_response_loss(model, rows: list[dict[str, str]]) -> float:
    """Cross entropy of a response token, nats: a byte is a token, the "short" template, an example at a time."""
    total, count = 0.0, 0
    for row in rows:
        middle = f"\n{row['input']}" if row["input"] else ""
        prompt = f"{row['instruction']}{middle}\n### Response:\n".encode()
        ids = torch.tensor([[BOS, *byte_tokens(prompt), *byte_tokens(row["output"].encode()), EOS]])
        labels = ids.clone()
        labels[:, : 1 + len(prompt)] = -100
        answered = ids.shape[1] - 1 - len(prompt)
        total += model(input_ids=ids, labels=labels).loss.item() * answered
        count += answered
    assert math.isfinite(total)
    return total / count


def byte_tokens(text: bytes) -> list[int]:
    """The tiny tokenizer's alphabet is the sorted one of byte-level BPE: printable bytes stand for themselves."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = {byte: chr(byte) for byte in range(ord("!"), ord("~") + 1)} | {ord(" "): "Ġ", ord("\n"): "Ċ"}
    return [alphabet.index(symbols[byte]) for byte in text]
