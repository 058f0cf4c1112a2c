"""What the sharded trainer computes, against plain PyTorch on one process, and what each rank holds of it.

Each fixture is one real `accelerate launch` that runs a set of jobs; the tests read what its ranks wrote.
"""

import json
import random

import pytest
import torch

from lorasp.data.batches import collate
from lorasp.data.examples import Example
from lorasp.models.build import build_on_meta
from lorasp.models.gathers import gathered_bytes
from lorasp.models.weights import load_config
from lorasp.planning import plan
from lorasp.recipe import Recipe
from tests.distributed.launching import ROOT, run_jobs
from tests.reference import reference_run
from tests.tiny_models import BOS, EOS, save_model

pytestmark = pytest.mark.slow

STEPS = 6
GLOBAL_BATCH = 8


def ragged_examples():
    """75 examples of 4 to 40 tokens with 0 to 20 labels."""
    numbers = random.Random(0)
    examples = []
    for index in range(75):
        prompt = numbers.randint(3, 20)
        labels = 0 if index % 9 == 0 else 1 if index % 4 == 0 else numbers.randint(1, 20)
        ids = [BOS, *(numbers.randrange(256) for _ in range(prompt + labels - 1))]
        examples.append(([*ids[:-1], EOS] if labels else ids, prompt))
    return examples


LONG = ragged_examples()
EXAMPLES = LONG[:43]  # once: six steps of 8 rows, the last of 3


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(kind, root / kind) for kind in ("llama", "llama_deep", "llama_tied", "qwen2", "mistral")}


@pytest.fixture(scope="session")
def no_prefetch(tmp_path_factory):
    """The shipped DeepSpeed config without gathers ahead of use, which a tiny model would fit into whole."""
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
    path = tmp_path_factory.mktemp("ds") / "no_prefetch.json"
    path.write_text(json.dumps(config))
    return str(path)


def recipe(directory, *, micro, steps=STEPS, ds_config=None, **changes):
    tree = {
        "model": {"path": str(directory)},
        "data": {"train": "unused"},
        "training": {
            "epochs": 1.0,
            "max_steps": steps,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": micro,
            "learning_rate": 1e-2,
            # Adam divides by the gradient's own size: where that is rounding noise, a small eps would train noise.
            "eps": 1e-5,
            "max_grad_norm": 0.5,
        },
    }
    if changes.get("method") != "full":
        tree["adapter"] = {"rank": 8}
    if ds_config:
        tree["deepspeed"] = {"config": ds_config}
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return tree


# What the worker measures besides, and other rows to train on.
FLAGS = (
    "examples",
    "gradients_of",
    "live",
    "count_operations",
    "gathers",
    "codes",
    "large",
    "save_at",
    "save_to",
    "resume",
)


def job(directory, **options):
    flags = {name: options.pop(name) for name in FLAGS if name in options}
    return {"examples": EXAMPLES, **flags, "recipe": recipe(directory, **options)}


def sparse_examples():
    """12 examples, of which only every third has labels: in steps of 2 rows, one a rank, ranks often have none."""
    return [
        (ids if index % 3 == 0 else ids[:-1], prompt if index % 3 == 0 else len(ids) - 1)
        for index, (ids, prompt) in enumerate(EXAMPLES[1:13])
    ]


SPARSE, A_RANK_WITHOUT = sparse_examples(), 5  # the step of which gradients are compared
SPARSELY_LABELLED = {
    "sparse": {"training": {"global_batch_size": 2}},
    "sparse_full": {"training": {"global_batch_size": 2, "learning_rate": 1e-3}, "method": "full"},  # with its head
}


FAMILIES = {
    "nf4": ("llama", {}),
    "tied": ("llama_tied", {}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "fp4_single": ("llama", {"quantization": {"format": "fp4", "double_quant": False}}),
    "unquantized": ("llama", {"quantization": {"format": "none"}}),
    "uniform": ("llama", {"selection": {"strategy": "uniform"}, "training": {"activation_checkpointing": "layer"}}),
    "structured": ("mistral", {"selection": {"strategy": "structured"}}),
    "init": ("llama", {"adapter": {"rank": 3, "alpha": 4.0, "frozen_entries": "init", "rslora": True}}),
    "no_recomputation": ("qwen2", {"training": {"activation_checkpointing": "none"}}),
    "lean": ("mistral", {"training": {"activation_checkpointing": "lean"}}),
    "offload": ("llama", {"ds_config": str(ROOT / "ds_configs" / "zero3_offload.json")}),
    "base_whole": ("llama", {"ds_config": str(ROOT / "ds_configs" / "zero2.json")}),
    "full_whole": (
        "llama_tied",
        {
            "method": "full",
            "training": {"learning_rate": 1e-3},
            "ds_config": str(ROOT / "ds_configs" / "zero2.json"),
        },
    ),
    "decay": ("llama", {"training": {"weight_decay": 0.1, "betas": [0.8, 0.99]}}),
    "quarter": ("llama", {"selection": {"fraction": 0.25}, "adapter": {"rank": 1, "target_modules": ["q_proj"]}}),
    "full": ("llama", {"method": "full", "training": {"learning_rate": 1e-3}}),
    "full_tied": ("llama_tied", {"method": "full", "training": {"learning_rate": 1e-3}}),
}


POLICIES = ("none", "selective", "lean", "layer")


# Runs of 14 steps that stop after the third, in the middle of an epoch of 10 (packed: 6), and go on.
RESUMED = {
    "adapters": {
        "examples": LONG,
        "micro": 2,  # two micro batches a rank
        "steps": 14,
        "adapter": {"dropout": 0.2},
        "data": {"packing": True, "max_length": 48},
        "training": {"epochs": 4.0},
    },
    "full": {
        "examples": LONG,
        "micro": 4,
        "steps": 14,
        "method": "full",
        "training": {"epochs": 2.0, "learning_rate": 1e-3},
    },
    "base_whole": {
        "examples": LONG,
        "micro": 4,
        "steps": 14,
        "training": {"epochs": 2.0},
        "ds_config": str(ROOT / "ds_configs" / "zero2.json"),
    },
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Where jobs leave their checkpoints, a directory each."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="session")
def two_ranks(models, no_prefetch, saved, tmp_path_factory):
    jobs = {name: job(models[kind], micro=4, gradients_of=0, **changes) for name, (kind, changes) in FAMILIES.items()}
    short = {"steps": 3, "ds_config": no_prefetch}
    for policy in POLICIES:
        how = {**short, "training": {"activation_checkpointing": policy}}
        flags = dict.fromkeys(("live", "count_operations", "gathers", "codes"), True)
        jobs[f"memory_{policy}"] = job(models["llama"], micro=4, **flags, **how)
    jobs["gathers_tied"] = job(models["llama_tied"], micro=4, gathers=True, **short)
    # Every parameter of 1,000 bytes by a collective of its own, as embeddings and large matrices are.
    jobs["alone"] = job(models["llama"], micro=4, gathers=True, large=1000, **short)
    for strategy in ("uniform", "structured"):
        jobs[f"{strategy}_steady"] = job(
            models["llama"], micro=4, count_operations=True, selection={"strategy": strategy}, **short
        )
    jobs["accumulation_steady"] = job(models["llama"], micro=2, count_operations=True, **short)
    jobs["deep"] = job(models["llama_deep"], micro=4, steps=1, adapter={"rank": 1, "target_modules": ["q_proj"]})
    for name, changes in SPARSELY_LABELLED.items():
        jobs[name] = job(models["llama"], micro=1, examples=SPARSE, gradients_of=A_RANK_WITHOUT, **changes)
    whole = str(ROOT / "ds_configs" / "zero2.json")
    jobs["gathers_base_whole"] = job(models["llama"], micro=4, gathers=True, **short | {"ds_config": whole})
    jobs["residual"] = job(models["llama"], micro=4, steps=2, quantization={"init": "residual"})
    for name, how in RESUMED.items():
        jobs[f"whole_{name}"] = job(models["llama"], save_at=3, save_to=str(saved / name), **how)
        jobs[f"2_to_2_{name}"] = job(models["llama"], resume=str(saved / name), **how)
    jobs["lora"] = job(models["llama"], micro=4, steps=2, method="lora")
    jobs["half_rank"] = job(models["llama"], micro=4, steps=2, method="lora", adapter={"rank": 4})
    return run_jobs(2, jobs, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def one_rank(models, two_ranks, saved, tmp_path_factory):
    how = RESUMED["adapters"] | {"resume": str(saved / "adapters"), "save_at": 4, "save_to": str(saved / "by_one")}
    jobs = {
        "2_to_1_adapters": job(models["llama"], **how | {"micro": 4}),
        "2_to_1_full": job(models["llama"], resume=str(saved / "full"), **RESUMED["full"]),
        "twice_the_batch": job(models["llama"], micro=8, gradients_of=0),
        "accumulation": job(models["llama"], micro=4, gradients_of=0),
        "memory_selective": job(models["llama"], micro=8, count_operations=True, steps=3),
        "residual": job(models["llama"], micro=4, steps=2, quantization={"init": "residual"}),
        "more_accumulation": job(models["llama"], micro=2),
        "full_accumulation": job(models["llama"], micro=4, method="full", training={"learning_rate": 1e-3}),
    }
    return run_jobs(1, jobs, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="session")
def four_ranks(models, two_ranks, saved, tmp_path_factory):
    # A set of shards in each half of the ranks, as in nodes of two.
    config = json.loads((ROOT / "ds_configs" / "zero3_hpz.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    hpz = tmp_path_factory.mktemp("ds") / "hpz.json"
    hpz.write_text(json.dumps(config))
    jobs = {"hpz": job(models["llama"], micro=1, ds_config=str(hpz))}
    full = RESUMED["full"] | {"micro": 2, "resume": str(saved / "full"), "ds_config": str(hpz)}
    jobs["2_to_4_full_hpz"] = job(models["llama"], **full)
    how = RESUMED["adapters"] | {"resume": str(saved / "adapters"), "save_at": 4, "save_to": str(saved / "by_four")}
    jobs["2_to_4_adapters"] = job(models["llama"], **how)
    jobs |= {"nf4": job(models["llama"], micro=1), "lora": job(models["llama"], micro=1, steps=2, method="lora")}
    return run_jobs(4, jobs, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="session")
def two_again(models, one_rank, four_ranks, saved, tmp_path_factory):
    jobs = {
        f"{ranks}_to_2_adapters": job(models["llama"], resume=str(saved / by), **RESUMED["adapters"])
        for ranks, by in ((1, "by_one"), (4, "by_four"))
    }
    return run_jobs(2, jobs, tmp_path_factory.mktemp("again"))


@pytest.fixture(scope="session")
def bf16(models, no_prefetch, saved, tmp_path_factory):
    resumed = {name: {**how, "model": {"dtype": "bfloat16"}} for name, how in RESUMED.items() if name != "base_whole"}
    jobs = {
        f"whole_{name}": job(models["llama"], save_at=3, save_to=str(saved / f"{name}_bf16"), **how)
        for name, how in resumed.items()
    }
    jobs |= {
        f"2_to_2_{name}": job(models["llama"], resume=str(saved / f"{name}_bf16"), **how)
        for name, how in resumed.items()
    }
    jobs |= {
        policy: job(
            models["llama"],
            micro=4,
            ds_config=no_prefetch,
            live=True,
            model={"dtype": "bfloat16"},
            training={"activation_checkpointing": policy},
        )
        for policy in POLICIES
    }
    return run_jobs(2, jobs, tmp_path_factory.mktemp("bf16"))


def assert_close(ours, reference, tolerance=1e-5):
    for a, b in zip(ours, reference, strict=True):
        assert a == pytest.approx(b, rel=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_sharded_ranks_equal_plain_pytorch_on_one_process(name, two_ranks, models):
    """Losses and gradient norms of six steps, and every gradient of the first, to 1e-5; the weights in the end.

    The reference reads the same checkpoint, quantizes and dequantizes with bitsandbytes, pads, and keeps A and B dense
    under their masks.
    """
    kind, changes = FAMILIES[name]
    settings = Recipe(**recipe(models[kind], micro=4, **changes))
    assert_equal_to_plain_pytorch(two_ranks[name], settings, EXAMPLES)
    if name in ("nf4", "decay"):  # clipping took part
        assert min(two_ranks[name][0]["norms"]) < settings.training.max_grad_norm < max(two_ranks[name][0]["norms"])


@pytest.mark.parametrize("name", SPARSELY_LABELLED)
def test_a_rank_without_labels_in_the_middle_of_a_run_changes_nothing(name, two_ranks, models):
    """One row a rank, most of them with tokens and no label: steps with labels on one rank alone and on none."""
    ranks = two_ranks[name]
    labelled = [sum(bool(sum(rank["labels"][step])) for rank in ranks) for step in range(STEPS)]
    assert {0, 1} <= set(labelled) and labelled[A_RANK_WITHOUT] == 1, labelled
    assert all(ranks[0]["losses"][step] == 0 for step in range(STEPS) if labelled[step] == 0)
    settings = Recipe(**recipe(models["llama"], micro=1, **SPARSELY_LABELLED[name]))
    assert_equal_to_plain_pytorch(ranks, settings, SPARSE, gradients_of=A_RANK_WITHOUT)


def assert_equal_to_plain_pytorch(ranks, settings, examples, gradients_of=0):
    batches = [sum((rank["rows"][step] for rank in ranks), []) for step in range(STEPS)]
    reference = reference_run(settings.model.path, settings, examples, batches, gradients_of)
    for rank in ranks:
        assert_close(rank["losses"], reference["losses"])
        assert_close(rank["norms"], reference["norms"])
    masks = reference["masks"]
    for what, tolerance in (("gradients", 1e-5), ("values", 1e-4)):
        for key, dense in reference[what].items():
            expected = dense[masks[key]] if key in masks else dense.flatten()
            ours = torch.tensor(ranks[0][what][f"model.{key}"])
            error = (ours - expected).norm() / expected.norm().clamp(min=1e-6)
            assert error < tolerance, f"{what} of {key}: {error:.2e}"
            if key in masks:
                assert torch.all(dense[~masks[key]] == 0)


def test_ranks_and_accumulation_do_not_change_the_run(two_ranks, one_rank, four_ranks):
    """2 ranks × 4, 1 rank × 8, 1 rank × 4 twice, 1 × 2 four times, 4 ranks × 1 twice: losses, norms, last values."""
    base = two_ranks["nf4"][0]
    others = [one_rank[name][0] for name in ("twice_the_batch", "accumulation", "more_accumulation")]
    for other in [*others, four_ranks["nf4"][0]]:
        assert_close(other["losses"], base["losses"])
        assert_close(other["norms"], base["norms"])
        for name, values in base["values"].items():
            torch.testing.assert_close(torch.tensor(other["values"][name]), torch.tensor(values), rtol=1e-4, atol=1e-6)
    for name in ("twice_the_batch", "accumulation"):
        for key, gradient in base["gradients"].items():
            ours, theirs = torch.tensor(one_rank[name][0]["gradients"][key]), torch.tensor(gradient)
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert_close(one_rank["full_accumulation"][0]["losses"], two_ranks["full"][0]["losses"])


def test_a_set_of_shards_in_each_node_changes_no_number(four_ranks):
    """And costs what it says: beside a quarter of everything, a half."""
    for nodes, plain in zip(four_ranks["hpz"], four_ranks["nf4"], strict=True):
        assert_close(nodes["losses"], plain["losses"], 1e-6)
        assert_close(nodes["norms"], plain["norms"], 1e-6)
        assert nodes["held"]["base_shard"] == 3 * plain["held"]["base_shard"]
        assert nodes["held"]["optimizer"] == plain["held"]["optimizer"]


def test_a_base_that_stays_whole_is_never_gathered(two_ranks):
    """ZeRO's stage 2: every rank holds the base and what is trained; gradients and optimizer are shared out."""
    for whole, sharded in zip(two_ranks["base_whole"], two_ranks["nf4"], strict=True):
        assert_close(whole["losses"], sharded["losses"], 1e-6)
        assert whole["base"] == {}  # nothing of it is a shard
        assert whole["held"]["base_shard"] == pytest.approx(2 * sharded["held"]["base_shard"], rel=0.01)
        assert whole["held"]["adapters"] == pytest.approx(3 * sharded["held"]["adapters"], rel=0.01)
        for part in ("masks", "buffers", "gradients", "optimizer"):
            assert whole["held"][part] == sharded["held"][part]
    for rank in two_ranks["gathers_base_whole"]:
        assert rank["gathers"] == {"0": [0], "1": [0], "2": [0]} and rank["gathered"] == 0


def test_what_quantization_loses_is_fitted_the_same_on_one_rank_and_two(two_ranks, one_rank):
    """On as many threads: Eq. 3's start is another one for each linear, wherever it is made."""
    ours, one = two_ranks["residual"], one_rank["residual"][0]
    for rank in ours:
        assert_close(rank["losses"], one["losses"], 1e-5)
        assert rank["base_digest"] == one["base_digest"] == two_ranks["nf4"][0]["base_digest"]
    assert ours[0]["losses"][0] != pytest.approx(two_ranks["nf4"][0]["losses"][0], rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "name"), [*(("float32", name) for name in RESUMED), ("bfloat16", "adapters"), ("bfloat16", "full")]
)
def test_a_resumed_run_is_the_same_run_to_the_bit(name, dtype, two_ranks, bf16):
    """Losses and norms of the 11 steps after, and the weights in the end: nothing was rounded on the way."""
    jobs = two_ranks if dtype == "float32" else bf16
    for whole, resumed in zip(jobs[f"whole_{name}"], jobs[f"2_to_2_{name}"], strict=True):
        assert len(resumed["losses"]) == 11 and resumed["rows"] == whole["rows"][3:]
        assert resumed["losses"] == whole["losses"][3:] and resumed["norms"] == whole["norms"][3:]
        assert resumed["values"] == whole["values"]
        assert len(set(whole["losses"])) == 14


@pytest.mark.parametrize("way", ["2_to_1", "2_to_4", "1_to_2", "4_to_2"])
def test_a_run_goes_on_with_another_number_of_ranks(way, two_ranks, one_rank, four_ranks, two_again):
    """With dropout, packs, and accumulation that is another on each number of ranks."""
    jobs = {"2_to_1": one_rank, "2_to_4": four_ranks}.get(way, two_again)
    whole, resumed = two_ranks["whole_adapters"][0], jobs[f"{way}_adapters"][0]
    done = len(resumed["losses"])
    assert done == (11 if way.startswith("2") else 10)
    assert_close(resumed["losses"], whole["losses"][-done:])
    assert_close(resumed["norms"], whole["norms"][-done:], 1e-4)
    for name, values in whole["values"].items():
        torch.testing.assert_close(torch.tensor(resumed["values"][name]), torch.tensor(values), rtol=1e-3, atol=1e-5)
    if way == "2_to_1":
        assert_close(one_rank["2_to_1_full"][0]["losses"], two_ranks["whole_full"][0]["losses"][3:])
    if way == "2_to_4":  # the node's set of shards is of the restored weights too
        assert_close(four_ranks["2_to_4_full_hpz"][0]["losses"], two_ranks["whole_full"][0]["losses"][3:])


def test_a_checkpoint_is_twelve_bytes_a_trained_entry_and_the_bits(two_ranks):
    for name in ("adapters", "full"):
        rank = two_ranks[f"whole_{name}"][0]
        trained = sum(elements for _, elements in rank["trained"])
        headers = 200 * 3 * len(rank["trained"]) + 4096  # names, shapes and offsets
        assert (
            12 * trained + rank["held"]["masks"]
            <= rank["saved_bytes"]
            < 12 * trained + rank["held"]["masks"] + headers
        )


def test_the_batches_were_ragged_and_a_rank_had_no_label(two_ranks, four_ranks):
    counts = [sum(labels) for rank in four_ranks["nf4"] for labels in rank["labels"]]
    assert min(counts) == 0 < max(counts)
    for ranks in (two_ranks["nf4"], four_ranks["nf4"]):
        for step in range(STEPS):
            rows = [row for rank in ranks for row in rank["rows"][step]]
            assert len(rows) == len(set(rows)) == (GLOBAL_BATCH if step < STEPS - 1 else 3)


@pytest.mark.parametrize("ranks", [2, 4])
def test_base_bytes_a_rank_are_codes_and_scales_over_n(ranks, two_ranks, four_ranks):
    """⌈n/N⌉ elements a tensor: at most N - 1 of padding in all. Nothing of codes and scales is whole on a rank."""
    found = {2: two_ranks, 4: four_ranks}[ranks]["nf4"]
    for rank in found:
        assert rank["world_size"] == ranks and len(rank["base"]) == 3 * 7 * 2  # layers · linears · (codes, scales)
        for whole, held, dtype in rank["base"].values():
            assert held == -(-whole // ranks) and dtype == "torch.uint8"


@pytest.mark.parametrize("ranks", [2, 4])
def test_optimizer_state_is_half_of_loras_and_sharded(ranks, two_ranks, four_ranks):
    jobs = {2: two_ranks, 4: four_ranks}[ranks]
    trained = {}
    for name in ("nf4", "lora"):
        for rank in jobs[name]:
            held = {kind: elements for kind, elements, _ in rank["optimizer"]}
            assert held.keys() == {"master", "exp_avg", "exp_avg_sq"}
            # ⌈n/N⌉ elements of each compact vector, and nothing else.
            expected = sum(-(-elements // ranks) for _, elements in rank["trained"])
            assert set(held.values()) == {expected}
            # Three fp32 vectors, and AdamW's step counter, one fp32.
            assert rank["held"]["optimizer"] == 3 * 4 * expected + 4
        trained[name] = sum(elements for _, elements in jobs[name][0]["trained"])
    assert 2 * trained["nf4"] == trained["lora"] == jobs["lora"][0]["counts"][1]
    # The same batch before anything was trained: B is zero, and so the model the same.
    assert_close(jobs["lora"][0]["losses"][:1], jobs["nf4"][0]["losses"][:1])


def test_lora_at_half_the_rank_trains_as_many_entries(two_ranks):
    assert two_ranks["half_rank"][0]["counts"][2] == two_ranks["nf4"][0]["counts"][2]


def test_forward_pins_at_most_one_unit_of_what_was_gathered(two_ranks):
    """What lives after a training forward of 2 tokens, beyond the shards: 2 tokens' activations and at most one unit.

    Without checkpointing as well: a plain linear would hold every layer's gathered weight until backward.
    """
    for policy in POLICIES:
        for rank in two_ranks[f"memory_{policy}"]:
            assert rank["gathered_short"] == rank["gathered_long"] == 0
            activations = 2 * (rank["live_long"] - rank["live_short"]) / (rank["long_tokens"] - 2)
            assert rank["live_short"] <= rank["largest_unit"] + activations + 2048  # and a label's logits
            assert rank["all_units"] > 3 * rank["largest_unit"]
    for plain, selective, lean, layer in zip(*(two_ranks[f"memory_{policy}"] for policy in POLICIES), strict=True):
        assert layer["live_long"] < lean["live_long"] < selective["live_long"] < plain["live_long"]
        assert layer["live_long"] < plain["live_long"] / 3


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_recomputation_gives_the_same_run(policy, two_ranks):
    for plain, ours in zip(two_ranks["memory_none"], two_ranks[f"memory_{policy}"], strict=True):
        assert_close(ours["losses"], plain["losses"], 1e-7 if policy == "layer" else 1e-5)
        assert_close(ours["norms"], plain["norms"], 1e-6 if policy == "layer" else 1e-5)


@pytest.mark.parametrize(
    "name",
    [*(f"memory_{policy}" for policy in POLICIES), "uniform_steady", "structured_steady", "accumulation_steady"],
)
def test_a_steady_step_asks_the_device_for_one_number_only(name, two_ranks):
    """DeepSpeed reads the gradient norm once a step to refuse a NaN (stage3.py, is_invalid_grad_norm); we add none."""
    for rank in two_ranks[name]:
        assert rank["operations"] > 1000
        assert rank["synchronising"] == {"_local_scalar_dense": 1}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_is_gathered_twice_a_step_and_one_unit_at_a_time(policy, two_ranks):
    """Once for forward, once for backward; the recomputation of `layer` shares backward's gather."""
    for rank in two_ranks[f"memory_{policy}"]:
        assert rank["gathers"] == {"0": [2], "1": [2], "2": [2]}
        assert 0 < rank["gathered_in_backward"] <= rank["largest_unit"]


@pytest.mark.parametrize("name", [*(f"memory_{policy}" for policy in POLICIES), "gathers_tied"])
def test_gathered_bytes_are_those_that_the_cost_model_counts(name, two_ranks, models):
    kind = "llama_tied" if name == "gathers_tied" else "llama"
    settings = Recipe(**recipe(models[kind], micro=4))
    model = build_on_meta(load_config(models[kind], settings.model), settings, torch.float32)
    for rank in two_ranks[name]:
        assert rank["gathered"] == gathered_bytes(model)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_plan_counts_what_a_rank_holds_between_steps(ranks, request, models):
    found = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[ranks])
    families = FAMILIES
    if ranks == 1:
        families = {"accumulation": FAMILIES["nf4"]}
    elif ranks == 4:
        families = {"nf4": FAMILIES["nf4"], "hpz": ("llama", {"ds_config": found["hpz"][0]["ds_config"]})}
    for name, (kind, changes) in families.items():
        planned = planned_for(models[kind], world_size=ranks, **changes).phases["train"]
        for rank in found[name]:
            assert {part: planned[part] for part in rank["held"]} == rank["held"], name


@pytest.mark.parametrize(("ranks", "policy"), [*((2, policy) for policy in POLICIES), (1, "selective")])
def test_the_plan_foresees_the_tensors_of_a_step(ranks, policy, models, request):
    """Traced on fake tensors against counted in a real step, gathers included."""
    found = request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[ranks])
    for rank in found[f"memory_{policy}"]:
        rows = [Example(tuple(EXAMPLES[row][0]), EXAMPLES[row][1]) for row in rank["step_rows"]]
        how = {"activation_checkpointing": policy}
        planned = planned_for(models["llama"], world_size=ranks, batch=collate(rows, range(len(rows))), training=how)
        parts = planned.phases["train"]
        assert abs(parts["gathered"] + parts["activations"] - rank["step_peak"]) <= 0.1 * rank["step_peak"]


def planned_for(directory, *, world_size, batch=None, **changes):
    settings = Recipe(**recipe(directory, micro=4, **changes))
    config = load_config(directory, settings.model)
    return plan(settings, config, world_size=world_size, dtype=torch.float32, device="cpu", batch=batch)


def test_what_is_gathered_alone_is_what_is_gathered_together(two_ranks):
    for alone, together in zip(two_ranks["alone"], two_ranks["memory_selective"], strict=True):
        assert alone["losses"] == together["losses"] and alone["norms"] == together["norms"]
        assert alone["gathers"] == together["gathers"]
        assert alone["gathered_in_backward"] <= together["gathered_in_backward"]


def test_loading_peaks_at_a_shard_and_a_unit(two_ranks):
    """Bytes that live at once while a model of 24 layers is built, on each of two ranks.

    Its own shard; the adapters, whole on each rank until their unit is sharded, and S; and the unit at hand, whole as
    it will be sharded. Rank 0, which reads, holds a layer in the file's fp32 besides, and a copy of a weight.
    """
    attention, mlp, norms = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 160, 2 * 64
    read = 4 * (attention + mlp + norms) + 4 * 64 * 160
    for rank in two_ranks["deep"]:
        held = rank["held"]
        bound = held["base_shard"] + 2 * held["adapters"] + held["masks"] + held["buffers"] + rank["largest_unit"]
        bound += read if rank["rank"] == 0 else 0
        assert rank["load_peak"] <= bound
        assert bound < 2 * held["base_shard"]  # the whole base alone, quantized, would be above it


def test_gathered_codes_and_scales_are_bitsandbytes_own(two_ranks):
    for rank in two_ranks["memory_none"]:
        assert len(rank["codes"]) == 3 * 7 and not any(rank["codes"].values())


def test_selection_and_base_digests_do_not_depend_on_the_world_size(one_rank, two_ranks, four_ranks):
    found = [*one_rank["accumulation"], *two_ranks["nf4"], *four_ranks["nf4"]]
    assert len({rank["selection_digest"] for rank in found}) == 1
    assert len({rank["base_digest"] for rank in found}) == 1


def test_a_bf16_engine_keeps_codes_as_bytes_and_masters_in_fp32(bf16, two_ranks):
    for policy in POLICIES:
        for rank in bf16[policy]:
            assert {dtype for _, _, dtype in rank["base"].values()} == {"torch.uint8"}
            assert {dtype for _, _, dtype in rank["optimizer"]} == {"torch.float32"}
            assert rank["activation_dtypes"] == ["torch.bfloat16"]
            # bf16 keeps 8 bits of a number: 2^-9 of rounding each time, some dozens in a row.
            assert_close(rank["losses"], two_ranks["nf4"][0]["losses"], 2e-2)
