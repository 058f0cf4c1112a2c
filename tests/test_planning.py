"""The plan of a run's memory: what it says without weights, and what it refuses."""

import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoConfig

from lorasp import memory, planning, run, tracing
from lorasp.data.batches import collate
from lorasp.data.examples import Example
from lorasp.evaluation.mmlu_prompts import assumed_forward
from lorasp.models.build import build_on_meta
from lorasp.models.causal_lm import CHUNK_ROWS, CausalLM
from lorasp.models.recompute import kept_bytes_per_token
from lorasp.models.weights import load_config, locate_model
from lorasp.planning import as_method, excess, plan, plans_that_fit, with_whole_base
from lorasp.recipe import Mmlu, Recipe, RecipeError
from lorasp.reporting.plan_text import format_whole_base
from lorasp.tracing import Traces, layer_kinds, trace, trace_scoring
from tests.distributed.launching import ROOT

GIB = 2**30
BATCH = collate([Example((0,) * 64, 1)], [0])


def recipe(path="llama-7b", length=256, micro=2, **sections):
    training = {"micro_batch_size": micro, "global_batch_size": 64, **sections.pop("training", {})}
    data = {"train": "random", "max_length": length}
    return Recipe(model={"path": path, "weights": "random"}, data=data, training=training, **sections)


TRACES: dict[tuple, Traces] = {}


def traces_of(settings, config, dtype=torch.bfloat16):
    """Shared by this file's tests, of all that a model follows from: to make one takes a second."""
    sections = settings.model_dump(include={"model", "method", "adapter", "quantization", "selection"})
    return TRACES.setdefault((str(sections), str(config.to_dict()), dtype), Traces())


def planned(settings, world_size=1, dtype=torch.bfloat16, **how):
    config = load_config(locate_model(settings.model), settings.model)
    traces = traces_of(settings, config, dtype)
    return plan(settings, config, world_size=world_size, dtype=dtype, traces=traces, **how)


def whole_model(settings, config, dtype=torch.bfloat16):
    """To be traced: as a plan has it, but with all layers."""
    traces = Traces()
    return traces.model(settings, config, dtype, sum(layer_kinds(traces.whole(settings, config, dtype)), []))


def test_the_base_of_a_7b_is_cut_over_the_ranks():
    """4.13 bits a weight of the linears (codes, scales of 64, no second level, which is a buffer), 16 of the rest."""
    linears, rest = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    whole = linears // 2 + linears // 64 + 2 * rest
    for ranks in (1, 2, 8):
        shard = planned(recipe(), ranks).phases["train"]["base_shard"]
        assert abs(shard - whole / ranks) < 1e-4 * whole / ranks


def test_lora_sp_halves_what_lora_keeps_and_full_fine_tuning_keeps_sixteen_bytes_a_weight():
    ours, lora, full = (
        planned(as_method(recipe(), method), 4).phases["train"] for method in ("lorasp", "lora", "full")
    )
    assert ours["optimizer"] == pytest.approx(lora["optimizer"] / 2, rel=1e-6)
    assert ours["adapters"] == pytest.approx(lora["adapters"] / 2, rel=1e-6)
    assert full["optimizer"] == pytest.approx(12 * 6_738_415_616 / 4, rel=1e-6) and full["adapters"] == 0


def test_each_method_can_be_planned_from_each():
    for own in ("lorasp", "lora", "full"):
        settings = as_method(recipe(), own)
        assert [as_method(settings, method).method for method in ("lorasp", "lora", "full")] == [
            "lorasp",
            "lora",
            "full",
        ]
        assert as_method(settings, "lora").quantization.format == "nf4"


@pytest.mark.parametrize(
    ("targets", "layers", "linears"),
    [
        (["*.layers.[01].*"], 2, 7),
        (["*.layers.31.*"], 1, 7),
        (["model.layers.2.self_attn.q_proj"], 1, 1),
    ],
)
def test_adapters_of_some_layers_are_those_counted(targets, layers, linears):
    """Half of the entries of A and B at rank 16: fp32 master and two moments each, and Adam's step."""
    square, up = 2 * 4096, 4096 + 11008
    trained = 16 * layers * (4 * square + 3 * up if linears == 7 else square) // 2
    its = planned(recipe(length=64, micro=1, adapter={"target_modules": targets}))
    assert its.phases["train"]["optimizer"] == 12 * trained + 4


def uneven():
    """Two dense layers, and four of 32 experts each."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000}
    experts = {"n_routed_experts": 32, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    return AutoConfig.for_model("dots1", **shape, **heads, **experts, first_k_dense_replace=2)


@pytest.mark.parametrize("targets", ["all-linear", ["*.layers.[0-3].*"]])
def test_layers_of_several_kinds_are_counted_and_traced_as_they_are(targets):
    config, dtype = uneven(), torch.bfloat16
    settings = recipe(length=64, micro=1, quantization={"format": "none"}, adapter={"target_modules": targets})
    model = build_on_meta(config, settings, dtype, draws=False)
    its = plan(settings, config, world_size=2, dtype=dtype).phases
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert its["train"]["base_shard"] == sum(-(-p.numel() // 2) * p.element_size() for p in frozen)
    # Two layers of experts, as far as adapters are, at once; a dense one is smaller.
    assert its["train"]["gathered"] == 2 * max(_bytes_of(layer) for layer in model.model.model.layers)
    of_all = trace(whole_model(settings, config), BATCH, activations_away=False)
    assert its["train"]["activations"] == of_all["peak_in_backward"]


def _bytes_of(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("policy", ["selective", "lean", "layer"])
def test_a_layer_more_keeps_what_the_policy_says(policy):
    """Traced, against the formula of models/recompute.py: 32 layers against 40 of the same width would show it."""
    settings = recipe(micro=1, training={"activation_checkpointing": policy})
    config = load_config(locate_model(settings.model), settings.model)

    def activations(layers):
        config.num_hidden_layers = layers
        how = {"world_size": 1, "dtype": torch.bfloat16, "traces": traces_of(settings, config)}
        return plan(settings, config, **how).phases["train"]["activations"]

    ten, twenty = activations(10), activations(20)
    told = 10 * 256 * kept_bytes_per_token(policy, config, 2)
    assert twenty - ten == pytest.approx(told, rel=0.01)


def test_mmlu_holds_the_shots_of_two_subjects_and_a_forward_of_all_layers():
    settings = recipe().model_copy(update={"mmlu": Mmlu(data="mmlu")})
    config = load_config(locate_model(settings.model), settings.model)
    config.num_hidden_layers = 6
    how = {"world_size": 2, "dtype": torch.bfloat16, "traces": traces_of(settings, config)}
    planned_of = plan(settings, config, **how).phases
    evaluation = planned_of["evaluate_mmlu"]
    # A layer, its adapters and the head are whole at once, in 16 bits: codes, scales, two norms; half of rank 16's
    # entries, of four linears of 4096 and three of 4096 and 11008. All that is trained is saved in fp32.
    trained = 16 * (4 * 2 * 4096 + 3 * (4096 + 11008)) // 2
    linears = 4 * 4096**2 + 3 * 4096 * 11008
    layer = linears // 2 + linears // 64 + 2 * 2 * 4096 + 2 * trained
    assert evaluation["gathered"] == layer + 2 * 32000 * 4096
    assert planned_of["save"]["gathered"] == 6 * 4 * trained
    # LLaMA's 2,048 tokens hold no more of the longest subject's prompts.
    assert evaluation["kept_shots"] == 6 * 2 * 4096 * 2 * (2048 + 1400)
    forward, rows = assumed_forward(settings.mmlu, config)
    of_all = trace_scoring(whole_model(settings, config), forward, rows)
    assert evaluation["activations"] == of_all["peak_in_scoring"]
    assert "evaluate_mmlu" not in plan(recipe(), config, **how).phases
    # A forward of half as many tokens needs half of the rest, and the shots all the same.
    smaller = settings.model_copy(update={"mmlu": Mmlu(data="mmlu", tokens=2048)})
    less = plan(smaller, config, **how).phases["evaluate_mmlu"]
    assert less["kept_shots"] == evaluation["kept_shots"] and less["activations"] < 0.8 * evaluation["activations"]
    alone = settings.model_copy(update={"mmlu": Mmlu(data="mmlu", reuse_prefix=False)})
    assert plan(alone, config, **how).phases["evaluate_mmlu"]["kept_shots"] == 0


def test_dropout_and_other_families_are_traced_too():
    more = planned(recipe(adapter={"dropout": 0.1})).peak("train")
    assert more > planned(recipe()).peak("train")
    grouped = planned(recipe("llama2-70b", micro=1), 8)
    assert 4.2 < grouped.phases["train"]["base_shard"] / GIB < 4.6


@pytest.mark.parametrize("method", ["lorasp", "full"])
def test_two_chunks_of_labels_stand_for_all(method, monkeypatch):
    """To the byte, where the head's logits are most of what a step needs."""
    settings = as_method(recipe(length=7 * CHUNK_ROWS + 20, micro=1), method)
    config = load_config(locate_model(settings.model), settings.model)
    config.hidden_size = config.intermediate_size = 64
    config.num_attention_heads = config.num_key_value_heads = 4
    how = {"world_size": 2, "dtype": torch.bfloat16}
    two = plan(settings, config, **how)
    assert two.phases["train"]["activations"] > CHUNK_ROWS * config.vocab_size * (2 + 4)
    monkeypatch.setattr(tracing, "_TRACED_LABELS", settings.data.max_length)
    assert plan(settings, config, **how) == two


@pytest.fixture
def shared(monkeypatch):
    """Has all plans of a model share `traces_of` it, also those that find traces of their own."""
    return lambda *of: monkeypatch.setattr(planning, "Traces", lambda: traces_of(*of))


def test_what_fits_is_found_and_the_fastest_comes_first(shared):
    settings = recipe(length=2048)
    config = load_config(locate_model(settings.model), settings.model)
    shared(settings, config)
    how = {"world_size": 2, "dtype": torch.bfloat16}
    limit = 12 * GIB
    found = list(plans_that_fit(settings, config, limit_bytes=limit, **how))
    assert all(its.highest <= limit for _, its in found)
    whole = [words[-1] == "deepspeed.config=zero2.json" for words, _ in found]
    assert whole == sorted(whole, reverse=True) and whole[0]  # what gathers nothing of the base comes first
    found = found[sum(whole) :]
    # Nothing needs to move to the host: what does comes last.
    moved = ["deepspeed.config=zero3_offload.json" in words for words, _ in found]
    assert moved == sorted(moved) and any(moved)
    assert ["training.offload_activations=true" in words for words, _ in found[:4]] == [False] * 3 + [True]
    found = found[:3]
    sizes = {words[0].partition("=")[2]: int(words[1].partition("=")[2]) for words, _ in found}
    assert list(sizes) == ["selective", "lean", "layer"] and sizes["selective"] < sizes["layer"]
    # The next larger micro batch of the first does not fit.
    more = settings.training.model_copy(
        update={"activation_checkpointing": "selective", "micro_batch_size": 2 * sizes["selective"]}
    )
    assert plan(settings.model_copy(update={"training": more}), config, **how).highest > limit


def test_what_fits_only_with_shards_in_the_hosts_memory(shared):
    """Little more than one layer is needed then, and `selective` on 256 tokens is the first to fit."""
    settings = recipe(micro=1, training={"global_batch_size": 2})
    config = load_config(locate_model(settings.model), settings.model)
    shared(settings, config)
    how = {"world_size": 2, "dtype": torch.bfloat16, "limit_bytes": 2 * GIB}
    words, its = next(plans_that_fit(settings, config, **how))
    assert words[-1] == "deepspeed.config=zero3_offload.json" and its.phases["train"]["base_shard"] == 0
    assert not list(plans_that_fit(settings, config, device="cpu", **how))


def test_sets_of_shards_in_each_node_are_tried_first_where_there_are_several_nodes(shared):
    settings = recipe(length=256, micro=1, training={"global_batch_size": 16})
    config = load_config(locate_model(settings.model), settings.model)
    shared(settings, config)
    how = {"world_size": 16, "dtype": torch.bfloat16, "limit_bytes": 80 * GIB}
    found = [found for found in plans_that_fit(settings, config, **how) if "=selective" in found[0][0]]
    (whole, _), (words, grouped) = found[:2]
    assert whole[-1] == "deepspeed.config=zero2.json" and words[-1] == "deepspeed.config=zero3_hpz.json"
    plain = planned(settings, 16)
    assert grouped.phases["train"]["base_shard"] > 2.9 * plain.phases["train"]["base_shard"]  # 1/16 + 1/8 against 1/16


def test_a_whole_base_costs_its_bytes_and_receives_none():
    """13B on 8 ranks: 6.6 GiB of codes, scales, embedding and head on each, where an eighth would do."""
    settings = recipe("llama-13b", length=512, micro=1)
    sharded, whole = (planned(one, 8) for one in (settings, with_whole_base(settings)))
    assert whole.phases["train"]["base_shard"] == pytest.approx(8 * sharded.phases["train"]["base_shard"], rel=1e-3)
    assert whole.phases["train"]["gathered"] == whole.received_bytes == 0
    for part in ("optimizer", "gradients", "masks", "buffers"):
        assert whole.phases["train"][part] == sharded.phases["train"][part]
    stored = whole.phases["train"]["base_shard"] + whole.phases["train"]["adapters"] * 8 / 9
    once = 2 * 2 * 32000 * 5120  # embedding and head, in bfloat16
    assert sharded.received_bytes == pytest.approx(7 / 8 * (2 * stored - once), rel=1e-3)
    assert "it fits, and is the faster choice" in format_whole_base(sharded, whole, whole.highest)
    assert "it does not fit" in format_whole_base(sharded, whole, whole.highest - 1)


def test_kept_activations_that_wait_on_the_host_are_not_on_the_gpu():
    """Of 32 layers what `lean` keeps is the host's; the head's and one layer's own remain."""
    settings = recipe(length=1024, micro=4, training={"activation_checkpointing": "lean"})
    away = recipe(length=1024, micro=4, training={"activation_checkpointing": "lean", "offload_activations": True})
    here, gone, on_cpu = planned(settings, 2), planned(away, 2), planned(away, 2, device="cpu")
    assert gone.phases["train"]["activations"] < here.phases["train"]["activations"] / 4
    assert on_cpu.phases == here.phases


def test_too_little_memory_is_told_with_what_takes_it():
    its = planned(recipe(), 2)
    assert excess(its, its.highest) is None
    told = excess(its, its.highest - 1)
    assert (
        "at the peak of train (base shard" in told and "--world-size 2 --fit" in told and "memory.check=warn" in told
    )


@pytest.mark.parametrize("check", ["refuse", "warn"])
def test_a_run_that_cannot_fit_is_refused_before_a_weight_is_read(check, monkeypatch, tmp_path):
    settings = recipe(memory={"check": check})
    monkeypatch.setattr(run, "free_bytes", lambda device, processes: GIB)
    ranks, warned = SimpleNamespace(world_size=2, device=torch.device("cpu")), []
    arguments = (settings, locate_model(settings.model), ranks, torch.float32, BATCH, None)
    if check == "refuse":
        with pytest.raises(RecipeError, match="has 1.000 GiB free"):
            run.plan_memory(*arguments, warn=warned.append)
    else:
        told = run.plan_memory(*arguments, warn=warned.append)
        assert told.highest > GIB and len(warned) == 1


def test_a_model_that_cannot_be_traced_trains_without_a_plan(monkeypatch):
    def look(self, **inputs):
        return inputs["input_ids"].sum().item()

    monkeypatch.setattr(CausalLM, "forward", look)
    settings, warned = recipe(), []
    ranks = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    directory = locate_model(settings.model)
    assert run.plan_memory(settings, directory, ranks, torch.float32, BATCH, None, warn=warned.append) is None
    assert "LlamaForCausalLM cannot be traced without memory" in warned[0]


def test_free_memory_is_shared_by_the_processes_of_a_machine():
    one, four = (memory.free_bytes(torch.device("cpu"), processes) for processes in (1, 4))
    assert 0 < four < one <= psutil.virtual_memory().total


def test_the_command_needs_neither_deepspeed_nor_bitsandbytes(tmp_path):
    script = (
        "import runpy, sys\n"
        "sys.argv = ['plan.py', 'recipes/rehearsal_13b.yaml', '--world-size', '8', *sys.argv[1:]]\n"
        "print(runpy.run_path('launch/plan.py')['main']())\n"
        "print([name for name in ('deepspeed', 'bitsandbytes') if name in sys.modules])"
    )
    arguments = ["--gpu-memory", "24GiB", "--sweep", str(tmp_path / "sweep.png")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["0", "[]"], done.stdout + done.stderr
    assert "| phase | part | lorasp | lora | full |" in lines and any("| max_length |" in line for line in lines)
    assert any(line.startswith("fits into 24.000 GiB") for line in lines)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "24GuB"], "'24GuB' is no size; write 24GiB"),
        (["--gpu-memory", "24"], "'24' is no size; write 24GiB"),
        (["data.max_length=1", "--sweep", "/proc/x.png"], "--sweep: /proc/x.png cannot be written (No such file"),
        (["--sweep", "picture.jpg"], "write one that ends in .png"),
        (["--world-size", "0"], "a run has at least one rank"),
        (["--world-size", "3"], "do not divide over 3 ranks"),
    ],
)
def test_bad_arguments_are_told(arguments, said):
    command = [sys.executable, "launch/plan.py", "recipes/rehearsal_7b.yaml", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_micro_batches_that_divide_are_found_where_the_recipes_does_not():
    command = [sys.executable, "launch/plan.py", "recipes/quickstart.yaml", "--cpu", "--world-size", "4"]
    command += ["training.global_batch_size=24", "training.micro_batch_size=4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "do not divide over 4 ranks with micro batches of 4" in done.stderr
    done = subprocess.run([*command, "--fit", "8GiB"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "training.activation_checkpointing=selective training.micro_batch_size=6" in done.stdout


def test_a_plan_that_does_not_fit_exits_with_one():
    command = [
        sys.executable,
        "launch/plan.py",
        "recipes/rehearsal_7b.yaml",
        "--world-size",
        "2",
        "--gpu-memory",
        "1GiB",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "does not fit into 1.000 GiB" in done.stdout
