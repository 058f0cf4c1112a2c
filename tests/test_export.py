"""Exports against plain transformers and peft: our logits, bit-equal codes, and nothing half-written."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from lorasp.adapter import adapted_linears
from lorasp.checkpoint import AdapterInfo, save_adapter
from lorasp.cli import BAD_INPUT, run_reporting_errors
from lorasp.evaluation.answers import greedy_answers
from lorasp.evaluation.generation import CACHED_ATTENTION, generate_answer, prompt_tokens
from lorasp.export import adapter as export_adapter
from lorasp.export import write as export_write
from lorasp.export.base import write_merged, write_packed
from lorasp.export.verify import VerificationError
from lorasp.export.write import Export, write_export
from lorasp.finished_run import read_run
from lorasp.memory import PhasePeak
from lorasp.models.build import build_on_meta, filled_units
from lorasp.models.weights import Checkpoint, load_config
from lorasp.quantization import ShardedLinear
from lorasp.recipe import Recipe, RecipeError
from lorasp.reporting.console import Console
from lorasp.reporting.run_report import build_report, rank_phases, write_report
from tests.distributed.launching import ROOT
from tests.test_evaluation import Unsharded
from tests.tiny_models import EOS, byte_tokenizer, save_model

CPU = torch.device("cpu")
SILENT = Console(is_main=False)
TOKENS = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
PEAKS = {"load": 5 * 2**20, "train": 9 * 2**20}  # bytes


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    found = {kind: save_model(kind, root / kind) for kind in ("llama", "llama_tied", "qwen2")}
    GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=EOS).save_pretrained(found["llama_tied"])
    return found


@pytest.fixture
def made(bases, tmp_path):
    """Makes a run's directory, as training would leave it, with random values in every trained entry."""

    def make(base="llama_tied", *, status="finished", dtype=torch.float32, strength=0.1, **sections) -> Path:
        base = bases.get(base, base)
        tree = {"name": "tiny", "output_dir": str(tmp_path / "runs"), "model": {"path": str(base)}}
        tree |= {"data": {"train": "rows.json", "template": "short"}, "quantization": {"format": "none"}}
        recipe = Recipe(**tree | {"adapter": {"rank": 4}} | sections)
        model = build_on_meta(load_config(base, recipe.model), recipe, dtype)
        checkpoint = Checkpoint(base)
        for _ in filled_units(model.model, checkpoint, device=CPU):
            pass
        generator = torch.Generator().manual_seed(2)
        for linear in adapted_linears(model):
            # Updates about as large as W: larger ones would amplify every rounding on the way.
            linear.A.data.normal_(generator=generator).mul_(linear.in_features**-0.5)
            linear.B.data.normal_(generator=generator).mul_(strength / linear.scale)
        values = [(name, p.detach().float()) for name, p in model.named_parameters() if p.requires_grad]
        info = AdapterInfo.of(recipe, model, base_digest=checkpoint.digest(), selection_seed=recipe.seed, step=40)
        save_adapter(recipe.run_dir / "adapter", info, model, values, writes=True)
        peaks = {name: peak(name, held) for name, held in PEAKS.items()}
        report = build_report(
            recipe=recipe.to_dict(),
            world_size=1,
            device="cpu",
            parameters={"total": 10, "adapter": 4, "trained": 2, "optimizer_state_bytes": 16},
            ranks=[rank_phases(0, peaks, {})],
            throughput={},
            metrics={"held_out_loss_before": 6.5, "held_out_loss_after": 0.25},
            data={"train": {"source": "rows.json", "digest": "cafe1234"}},
            samples=[],
            history=[],
            status=status,
            command="python launch/train.py tiny.yaml",
        )
        write_report(recipe.run_dir, report)
        return recipe.run_dir

    return make


def peak(name: str, held: int) -> PhasePeak:
    values = {"name": name, "seconds": 1.0, "source": "a test", "peak_bytes": held, "peak_total_bytes": 2 * held}
    return PhasePeak(**{f.name: values.get(f.name, 0) for f in fields(PhasePeak)})


@torch.no_grad()
def ours(run_dir: Path, **how) -> torch.Tensor:
    """[tokens, vocabulary] of the run's model, unsharded."""
    places = torch.arange(TOKENS.shape[1])
    return read_run(run_dir).load(CPU, **how)(TOKENS, places.unsqueeze(0), (len(places),), places)


def theirs(model) -> torch.Tensor:
    # With gradients: on a CPU with AVX512-BF16 bitsandbytes would round the scales, and refuse these small sizes.
    model.enable_input_require_grads()
    return model.eval()(TOKENS).logits[0].detach()


def export(run_dir: Path, kind: str, **options) -> Path:
    out = run_dir / "export" / kind
    write_export(read_run(run_dir), Export(kind, out, **options), SILENT)
    return out


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_adapters_of_these_tests_matter(made, bases):
    """Otherwise a lost adapter would pass everywhere below."""
    moved = (ours(made()) - theirs(AutoModelForCausalLM.from_pretrained(bases["llama_tied"]))).abs()
    assert moved.max() > 0.1 * ours(made()).abs().max()


# ---- PEFT

SHAPES = {
    "balanced": {},
    "uniform": {"selection": {"strategy": "uniform", "fraction": 0.3}},
    "a third of each group": {"selection": {"fraction": 1 / 3}},
    "rank 1": {"adapter": {"rank": 1, "alpha": 5.0}},
    "rank 16, rslora, alpha no integer": {"adapter": {"rank": 16, "rslora": True, "alpha": 12.5, "dropout": 0.1}},
    "frozen start kept": {"adapter": {"rank": 4, "frozen_entries": "init"}},
    "frozen start kept, uniform": {
        "adapter": {"rank": 3, "frozen_entries": "init"},
        "selection": {"strategy": "uniform"},
    },
    "structured": {"selection": {"strategy": "structured"}},
    "structured, frozen start kept": {
        "adapter": {"rank": 3, "frozen_entries": "init"},
        "selection": {"strategy": "structured"},
    },
    "two kinds of module": {"adapter": {"rank": 4, "target_modules": ["q_proj", "down_proj"]}},
    "one layer": {"adapter": {"rank": 4, "target_modules": ["*.layers.1.*"]}},
    "mixed": {"adapter": {"rank": 4, "target_modules": ["model.layers.0.mlp.up_proj", "v_proj"]}},
    "lora": {"method": "lora"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_peft_gives_our_logits(shape, made, bases):
    run_dir = made(**SHAPES[shape])
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases["llama_tied"]), export(run_dir, "peft")
    )
    assert_same_logits(theirs(model), ours(run_dir))


@pytest.mark.parametrize("base", ["llama", "qwen2"])
def test_peft_gives_our_logits_for_odd_sizes_and_biases(base, made, bases):
    run_dir = made(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[base]), export(run_dir, "peft"))
    assert_same_logits(theirs(model), ours(run_dir))


def test_peft_on_a_base_that_transformers_quantized_gives_our_logits(made, bases):
    run_dir = made(quantization={"format": "nf4"})
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(bases["llama_tied"], quantization_config=stored, device_map=CPU)
    base.enable_input_require_grads()
    assert_same_logits(theirs(PeftModel.from_pretrained(base, export(run_dir, "peft"))), ours(run_dir))


def test_peft_configuration_names_modules_shortly_where_that_is_exact(made):
    config = json.loads((export(made(**SHAPES["two kinds of module"]), "peft") / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["r"] == 4
    names = json.loads((export(made(name="one", **SHAPES["one layer"]), "peft") / "adapter_config.json").read_text())
    assert len(names["target_modules"]) == 7 and "model.layers.1.mlp.up_proj" in names["target_modules"]


def test_half_of_the_exported_entries_are_zero_and_none_with_their_frozen_start(made):
    """Of 4·64 and of 160·4 entries: exactly half are selected."""
    zero = load_file(export(made(), "peft") / "adapter_model.safetensors")
    start = load_file(export(made(name="init", **SHAPES["frozen start kept"]), "peft") / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora"
    assert (zero[f"{name}_A.weight"] == 0).sum() == 128 and (zero[f"{name}_B.weight"] == 0).sum() == 320
    assert (start[f"{name}_A.weight"] == 0).sum() == 0 and (start[f"{name}_B.weight"] == 0).sum() == 320


# ---- Merged


@pytest.mark.parametrize("base", ["llama", "llama_tied", "qwen2"])
def test_merged_model_gives_our_logits(base, made):
    run_dir = made(base)
    out = export(run_dir, "merged")
    assert_same_logits(theirs(AutoModelForCausalLM.from_pretrained(out)), ours(run_dir))
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in names) == (base == "llama")  # a tied head is stored once


def test_merged_into_the_dequantized_base_gives_the_logits_of_training_and_the_original_says_so(made):
    run_dir = made(quantization={"format": "nf4"})
    dequantized = export(run_dir, "merged", base="dequantized")
    assert_same_logits(theirs(AutoModelForCausalLM.from_pretrained(dequantized)), ours(run_dir))
    assert json.loads((dequantized / "config.json").read_text())["lorasp"]["merged_into"] == "the dequantized base"

    other = run_dir / "original"
    write_export(read_run(run_dir), Export("merged", other), SILENT)
    original = theirs(AutoModelForCausalLM.from_pretrained(other))
    assert_same_logits(original, ours(run_dir, dense=True))
    assert (original - ours(run_dir)).abs().max() > 1e-2 * original.abs().max()  # quantization's error, not hidden
    assert json.loads((other / "config.json").read_text())["lorasp"]["merged_into"] == "the original base"
    assert "**the original base**" in (other / "README.md").read_text()


def test_merged_dtype_is_the_one_asked_for(made):
    run_dir = made()
    out = export(run_dir, "merged", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # 8 bits of mantissa, in every weight: 1/256 of the largest logit, a few times over.
    found = theirs(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    assert (found - ours(run_dir)).abs().max() < 0.02 * ours(run_dir).abs().max()


@pytest.mark.parametrize("kind", ["merged", "bnb4bit"])
def test_a_layer_is_freed_before_the_next_is_read(kind, made, tmp_path):
    run = read_run(made(quantization={"format": "nf4"}))
    model = run.build_on_meta()
    held = []

    def on_unit():
        linears = [module for module in model.modules() if isinstance(module, ShardedLinear)]
        held.append(sum(not tensor.is_meta for linear in linears for _, tensor in linear.base_tensors()))

    if kind == "merged":
        write_merged(tmp_path, run, model, torch.float32, "dequantized", CPU, on_unit)
    else:
        write_packed(tmp_path, run, model, CPU, on_unit)
    assert held == [0] * 6  # embedding, three layers, norm, head


# ---- 4 bits

QUANTIZATIONS = {
    "nf4": {},
    "fp4": {"format": "fp4"},
    "no double quantization": {"double_quant": False},
    "blocks of 256": {"block_size": 256},
}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_4_bit_export_holds_our_codes_and_gives_our_logits(quantization, made):
    run_dir = made(quantization={"format": "nf4", **QUANTIZATIONS[quantization]})
    out = export(run_dir, "bnb4bit")
    base = AutoModelForCausalLM.from_pretrained(out, device_map=CPU)
    # No path of this machine: the adapter's base is the directory above it, wherever both are taken.
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == ".."
    base.enable_input_require_grads()
    for name, linear in read_run(run_dir).load(CPU).model.named_modules():
        if isinstance(linear, ShardedLinear):
            weight = base.get_submodule(name).weight
            assert weight.dtype == torch.uint8 and torch.equal(weight.view(-1), linear.codes)
            assert torch.equal(weight.quant_state.absmax, linear.scales)
    assert_same_logits(theirs(PeftModel.from_pretrained(base, out / "adapter")), ours(run_dir))


@pytest.mark.parametrize("base", ["llama_tied", "qwen2"])
@pytest.mark.parametrize("format,double_quant", [("nf4", True), ("fp4", False)])
def test_4_bit_checkpoint_of_transformers_is_read_code_by_code(base, format, double_quant, made, bases, tmp_path):
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=format, bnb_4bit_use_double_quant=double_quant)
    model = AutoModelForCausalLM.from_pretrained(bases[base], quantization_config=stored, device_map=CPU)
    model.save_pretrained(tmp_path / "4bit")
    AutoTokenizer.from_pretrained(bases[base]).save_pretrained(tmp_path / "4bit")
    run_dir = made(tmp_path / "4bit", quantization={"format": format, "double_quant": double_quant})
    mine = read_run(run_dir).load(CPU)
    compared = 0
    for name, linear in mine.model.named_modules():
        if isinstance(linear, ShardedLinear):
            weight = model.get_submodule(name).weight
            assert torch.equal(linear.codes, weight.view(-1))
            assert torch.equal(linear.scales, weight.quant_state.absmax)
            if double_quant:
                assert torch.equal(linear.scale_scales, weight.quant_state.state2.absmax)
                assert torch.equal(linear.scale_offset, weight.quant_state.offset)
            compared += 1
    assert compared == 3 * 7
    for linear in adapted_linears(mine):
        linear.B.data.zero_()
    places = torch.arange(TOKENS.shape[1])
    assert_same_logits(mine(TOKENS, places.unsqueeze(0), (len(places),), places), theirs(model))
    # And on: what was trained on it is exported with its codes again, and merges into nothing but them.
    assert write_export(read_run(run_dir), Export("bnb4bit", run_dir / "4", verify=True), SILENT).largest < 1e-3
    write_export(read_run(run_dir), Export("merged", run_dir / "m", "dequantized", verify=True), SILENT)
    write_export(read_run(run_dir), Export("peft", run_dir / "p", verify=True), SILENT)
    with pytest.raises(RecipeError, match="no original weights to merge into"):
        export(run_dir, "merged")


def test_linears_that_a_4_bit_checkpoint_keeps_dense_stay_dense(made, bases, tmp_path):
    stored = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "down_proj"]
    )
    model = AutoModelForCausalLM.from_pretrained(bases["llama_tied"], quantization_config=stored)
    model.save_pretrained(tmp_path / "4bit")
    AutoTokenizer.from_pretrained(bases["llama_tied"]).save_pretrained(tmp_path / "4bit")
    run_dir = made(tmp_path / "4bit", quantization={"format": "nf4", "double_quant": False})
    formats = {linear.name: linear.quantization.format for linear in adapted_linears(read_run(run_dir).load(CPU))}
    assert {name for name, format in formats.items() if format == "none"} == {
        f"model.layers.{layer}.mlp.down_proj" for layer in range(3)
    }
    write_export(read_run(run_dir), Export("bnb4bit", run_dir / "4", verify=True), SILENT)


@pytest.mark.parametrize(
    "quantization,sentence",
    [
        ({"format": "none"}, "in nf4 already, with double quantization"),
        ({"format": "fp4"}, "set quantization.format=nf4 quantization.double_quant=true"),
        ({"format": "nf4", "double_quant": False}, "set quantization.format=nf4 quantization.double_quant=true"),
        ({"format": "nf4", "block_size": 128}, "of a wrong shape"),
    ],
)
def test_a_recipe_that_quantizes_otherwise_than_the_checkpoint_is_refused(
    quantization, sentence, made, bases, tmp_path
):
    out = export(made(quantization={"format": "nf4"}), "bnb4bit")
    with pytest.raises(RecipeError, match=sentence):
        made(out, name="other", quantization=quantization)


# ---- What goes with it


def test_tokenizer_generation_settings_and_card_go_with_every_export(made, bases):
    run_dir = made(quantization={"format": "nf4"})
    for kind in ("peft", "merged", "bnb4bit"):
        out = export(run_dir, kind)
        assert AutoTokenizer.from_pretrained(out)("ash")["input_ids"] == [256, *tokens(bases, "ash")]
        assert GenerationConfig.from_pretrained(out).temperature == 0.3
        card = (out / "README.md").read_text()
        for told in ("cafe1234", "held out loss after | 0.25", "python launch/train.py tiny.yaml", "format: nf4"):
            assert told in card
        assert "train" in card and "0.009" in card  # 9 MiB are 0.0088 GiB


def tokens(bases, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(bases["llama"])(text)["input_ids"][1:]


def test_full_fine_tuning_exports_as_a_model_and_as_nothing_else(made, bases, tmp_path):
    run_dir = made()
    report = json.loads((run_dir / "report.json").read_text())
    report["recipe"] = Recipe(
        method="full", model={"path": str(bases["qwen2"])}, data={"train": "rows.json"}
    ).to_dict()
    (run_dir / "report.json").write_text(json.dumps(report))
    save_model("qwen2", run_dir / "model")
    out = export(run_dir, "merged", verify=True)
    assert_same_logits(
        theirs(AutoModelForCausalLM.from_pretrained(out)), theirs(AutoModelForCausalLM.from_pretrained(bases["qwen2"]))
    )
    with pytest.raises(RecipeError, match="method full trains no adapter"):
        export(run_dir, "peft")


# ---- Verified


@pytest.mark.parametrize(
    "kind,options",
    [("peft", {}), ("merged", {}), ("merged", {"base": "dequantized"}), ("bnb4bit", {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_verifies(kind, options, dtype, made):
    run_dir = made(quantization={"format": "nf4"}, dtype=dtype)
    difference = write_export(read_run(run_dir), Export(kind, run_dir / "out", verify=True, **options), SILENT)
    assert difference.largest <= difference.tolerance < difference.effect / 2
    rounded = dtype == torch.bfloat16 and options.get("base") == "dequantized"  # in the run's precision
    assert difference.tolerance < (0.1 if rounded else 1e-3) * difference.scale and difference.doubt is None


def test_the_adapter_of_a_short_run_in_bf16_is_verified_too(made, monkeypatch):
    """It moves logits by less than bf16's own rounding; one that is lost, or 5 % off, is found all the same."""
    run_dir = made(quantization={"format": "nf4"}, dtype=torch.bfloat16, strength=1e-3)
    for kind in ("peft", "bnb4bit"):
        difference = write_export(read_run(run_dir), Export(kind, run_dir / kind, verify=True), SILENT)
        assert difference.effect < torch.finfo(torch.bfloat16).eps * difference.scale
        assert difference.tolerance < difference.effect / 4 and difference.doubt is None
    for wrong in (0.0, 1.05):
        monkeypatch.setattr(export_write, "write_peft", with_alpha(wrong))
        for kind in ("peft", "bnb4bit"):
            with pytest.raises(VerificationError, match="largest difference"):
                write_export(read_run(run_dir), Export(kind, run_dir / "wrong", verify=True), SILENT)


def test_a_verification_that_says_little_of_the_adapter_says_so(made):
    """bf16 weights cannot hold an update that is smaller than a step of theirs."""
    run_dir = made(strength=1e-3)
    difference = write_export(
        read_run(run_dir), Export("merged", run_dir / "merged", dtype=torch.bfloat16, verify=True), SILENT
    )
    assert difference.largest <= difference.tolerance > difference.effect > 0
    assert difference.doubt == (
        f"this verifies the base and proves little of the adapter, which moves logits by {difference.effect:.3g} "
        f"only: one that is lost would pass as well"
    )
    in_full = write_export(read_run(run_dir), Export("merged", run_dir / "fp32", verify=True), SILENT)
    assert in_full.doubt is None
    assert "one 50% off would pass" in replace(in_full, effect=2 * in_full.tolerance).doubt


def with_alpha(factor: float):
    """`write_peft`, but for the scale of the adapter."""
    write_peft = export_adapter.write_peft

    def damaged(directory, run, *rest):
        write_peft(directory, run, *rest)
        config = json.loads((directory / "adapter_config.json").read_text())
        config["lora_alpha"] *= factor
        (directory / "adapter_config.json").write_text(json.dumps(config))

    return damaged


def test_an_export_with_wrong_weights_is_told_and_not_left(made, monkeypatch):
    run_dir = made()
    monkeypatch.setattr(export_write, "write_peft", with_alpha(1.01))
    with pytest.raises(VerificationError, match="largest difference"):
        export(run_dir, "peft", verify=True)
    assert list((run_dir / "export").iterdir()) == []


# ---- Refused, with nothing half-written


def refused(run_dir: Path, kind: str, sentence: str, **options) -> None:
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(RecipeError, match=sentence) as told:
        export(run_dir, kind, **options)
    assert "\n" not in str(told.value)
    assert [path for path in sorted(run_dir.rglob("*")) if path.name != "export"] == before


def test_what_is_no_finished_run_is_told(made, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "tensorboard").mkdir(parents=True)
    refused(tmp_path / "empty", "peft", "is no run: it holds no report.json")
    refused(tmp_path / "begun", "peft", "the run has not come to its end")
    with pytest.raises(RecipeError, match="is no directory"):
        read_run(tmp_path / "nowhere")
    run_dir = made()
    (run_dir / "adapter" / "adapter.safetensors").unlink()
    refused(run_dir, "peft", "holds a report but no adapter")
    (run_dir / "report.json").write_text("{")
    refused(run_dir, "peft", "is no report that this version can read")


@pytest.mark.parametrize(
    "trained_on, there_is_a_gpu, read_on", [("cpu", True, "cpu"), ("cuda:3", True, "cuda"), ("cuda:3", False, "cpu")]
)
def test_a_run_is_read_back_on_what_it_was_trained_on(trained_on, there_is_a_gpu, read_on, made, monkeypatch):
    """Another device's base differs in single codes: export and generate would be of another model."""
    run = read_run(made(quantization={"format": "nf4"}))
    run.report["device"] = trained_on
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_a_gpu)
    assert run.device == torch.device(read_on)
    elsewhere = ["the base was quantized on cuda; done again on cpu, single codes may differ"]
    assert run.warnings() == (elsewhere if not trained_on.startswith(read_on) else [])


def test_a_stopped_run_is_exported_with_a_warning(made):
    run_dir = made(status="stopped: the loss is nan")
    assert read_run(run_dir).warnings() == [f"{run_dir}: the run did not finish (stopped: the loss is nan)"]
    assert "did not finish" in (export(run_dir, "peft") / "README.md").read_text()


@pytest.mark.parametrize("kind", ["peft", "merged", "bnb4bit"])
def test_an_adapter_of_another_base_is_refused(kind, made, bases, tmp_path):
    """Same names and shapes, one weight moved."""
    model = AutoModelForCausalLM.from_pretrained(bases["llama_tied"])
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(bases["llama_tied"]).save_pretrained(tmp_path / "base")
    run_dir = made(tmp_path / "base", quantization={"format": "nf4"})
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "base")
    refused(run_dir, kind, "trained on another base")


def test_a_full_disk_is_told_before_anything_is_written(made, monkeypatch):
    """What is needed is counted to the byte: the tied LLaMA's 146,176 entries of fp32, its head not a second time."""
    run_dir = made()
    usage = export_write.shutil.disk_usage(run_dir)
    count = AutoModelForCausalLM.from_pretrained(read_run(run_dir).base).num_parameters()
    monkeypatch.setattr(export_write.shutil, "disk_usage", lambda _: usage._replace(free=4 * count - 1))
    refused(run_dir, "merged", "GiB are free")
    monkeypatch.setattr(export_write.shutil, "disk_usage", lambda _: usage._replace(free=4 * count))
    export(run_dir, "merged")


def test_what_a_run_or_a_place_cannot_give_is_refused(made, monkeypatch):
    run_dir = made()
    refused(run_dir, "bnb4bit", "quantized nothing")
    refused(run_dir, "merged", "leave out --base dequantized", base="dequantized")
    monkeypatch.setattr(export_write.util, "find_spec", lambda _: None)
    refused(run_dir, "peft", "pip install peft", verify=True)
    out = export(run_dir, "peft")
    (out / "mine").write_text("kept")
    with pytest.raises(RecipeError, match="is not empty"):
        export(run_dir, "peft")
    assert (out / "mine").read_text() == "kept"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def written(run_dir: Path, out: Path, kind: str = "peft") -> None:
    """Exports to `out` and asserts that it holds the export and nothing else."""
    write_export(read_run(run_dir), Export(kind, out), SILENT)
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "tokenizer.json", "adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.endswith(".writing") for name in names)


def test_an_empty_directory_that_is_there_stays_itself(made, here):
    """The working directory as `.`, and a link to an empty directory."""
    run_dir, inode = made(), here.stat().st_ino
    written(run_dir, Path("."))
    assert here.stat().st_ino == inode and (here / "README.md").is_file()

    (run_dir / "target").mkdir()
    (run_dir / "link").symlink_to(run_dir / "target")
    written(run_dir, run_dir / "link")
    assert (run_dir / "link").is_symlink() and (run_dir / "target" / "README.md").is_file()

    (run_dir / "to be").symlink_to(run_dir / "made")
    written(run_dir, run_dir / "to be")
    assert (run_dir / "made" / "README.md").is_file()


def test_what_a_killed_export_left_is_no_obstacle(made, here):
    (here / ".export.writing").mkdir()
    (here / ".export.writing" / "model-00001.safetensors").write_bytes(b"half")
    written(made(), here)
    assert not (here / "model-00001.safetensors").exists()


def test_an_export_that_fails_leaves_an_empty_directory_empty(made, here, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_write, "write_peft", fail)
    with pytest.raises(OSError):
        write_export(read_run(made()), Export("peft", here), SILENT)
    assert list(here.iterdir()) == []


def test_places_that_cannot_be_written_are_one_sentence(made, here):
    run_dir = made()
    (here / "loop").symlink_to(here / "loop")
    (here / "file").touch()
    for out, sentence in (
        (Path("/"), "--out: / exists and is not empty; remove it or name another --out"),
        (here / "file", "is a file, not a directory"),
        (here / "file" / "within", "cannot be written (File exists); name another --out"),
        (here / ("x" * 300), "cannot be written (File name too long); name another --out"),
        (here / "loop", "cannot be written ("),
        (Path("/proc/new"), "cannot be written ("),
    ):
        with pytest.raises(RecipeError) as told:
            write_export(read_run(run_dir), Export("peft", out), SILENT)
        assert sentence in str(told.value) and str(told.value).startswith(f"--out: {out} ")
        assert "\n" not in str(told.value)
    assert {path.name for path in here.iterdir()} == {"loop", "file"}


@contextmanager
def small_disk(path: Path, size: int):
    """A file system of `size` bytes at `path`; skips the test where none can be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("kind", ["peft", "merged", "bnb4bit"])
def test_a_disk_that_is_full_is_one_sentence_with_nothing_half_written(kind, made, tmp_path, monkeypatch, capsys):
    """A real one: too small by count, and then full on the way, as what is counted are the weights alone."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    run_dir = made(quantization={"format": "nf4"})
    run = read_run(run_dir)
    dense = kind == "merged"
    needed = export_write._bytes(run, Export(kind, run_dir), run.build_on_meta(dense=dense), torch.float32)
    page = 4096
    for size, told in (
        (needed // page * page, "GiB are free; free space, name an --out on another disk"),
        (-(-needed // page) * page + 2 * page, "No space left on device"),
    ):
        with small_disk(tmp_path / f"disk{size}", size) as disk:
            for out in (disk, disk / "new"):
                with pytest.raises(SystemExit) as left:
                    run_reporting_errors(lambda out=out: write_export(run, Export(kind, out), SILENT))
                (line,) = capsys.readouterr().err.splitlines()
                assert left.value.code == BAD_INPUT and line.startswith("error: ") and told in line
                assert list(disk.iterdir()) == []
    with small_disk(tmp_path / "enough", needed + 100 * page) as disk:  # an empty mount point is a place like others
        write_export(run, Export(kind, disk), SILENT)
        assert (disk / "README.md").is_file()


# ---- Answers


def test_answers_with_a_cache_are_those_of_training_without(made, bases, capsys):
    """Also after the base's own generation settings, which would sample."""
    run_dir = made("llama_tied", quantization={"format": "nf4"})
    run, tokenizer = read_run(run_dir), AutoTokenizer.from_pretrained(bases["llama_tied"])
    prompts = ["elm", "ash and oak\n### Response:\n", "x"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    expected = greedy_answers(
        Unsharded(run.load(CPU)),
        [tokenizer(prompt)["input_ids"] for prompt in prompts],
        eos=EOS,
        max_new_tokens=12,
        device=CPU,
    )
    dist.destroy_process_group()
    model = run.load(CPU, attention=CACHED_ATTENTION)
    how = {"max_new_tokens": 12, "temperature": 0.0, "streams": True}
    answers = [
        generate_answer(model, tokenizer, prompt_tokens(tokenizer, prompt, "none"), **how) for prompt in prompts
    ]
    assert answers == expected
    assert any(expected)
    assert capsys.readouterr().out == "".join(
        tokenizer.decode(answer, skip_special_tokens=True) + "\n" for answer in expected
    )


def test_a_prompt_without_a_token_is_one_sentence_and_no_prompt_of_a_verification(made, bases):
    """Where the tokenizer puts nothing before a text."""
    tokenizer = AutoTokenizer.from_pretrained(bases["llama_tied"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(RecipeError, match="^the prompt is empty, and this tokenizer puts no token before a text"):
        prompt_tokens(tokenizer, " ", "none")
    run_dir = made()
    tokenizer.save_pretrained(read_run(run_dir).base)
    report = json.loads((run_dir / "report.json").read_text())
    report["samples"] = [{"prompt": "", "expected": "x"}]
    (run_dir / "report.json").write_text(json.dumps(report))
    try:
        difference = write_export(read_run(run_dir), Export("peft", run_dir / "out", verify=True), SILENT)
    finally:
        byte_tokenizer().save_pretrained(read_run(run_dir).base)
    assert difference.tokens > 10


def test_prompts_are_put_into_what_training_put_them_into(made, bases):
    """By the recipe's format, or by what was found in the data; spaces at the end belong to the response."""
    tokenizer = AutoTokenizer.from_pretrained(bases["llama_tied"])
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}A: "
    ash = tokens(bases, "ash")
    for data, layout, format, expected in (
        ({"template": "short"}, "alpaca", "short", [256, *tokens(bases, "ash\n### Response:\n")]),
        ({"format": "chat"}, "alpaca", "chat", [256, *ash, EOS, *tokens(bases, "A:")]),
        ({}, "chat", "chat", [256, *ash, EOS, *tokens(bases, "A:")]),
        ({}, "prompt_completion", "none", [256, *ash]),
    ):
        run_dir = made(name=f"{layout}-{format}-{len(data)}", data={"train": "rows.json", **data})
        report = json.loads((run_dir / "report.json").read_text())
        report["data"]["train"]["layout"] = layout
        (run_dir / "report.json").write_text(json.dumps(report))
        assert read_run(run_dir).prompt_format == format
        assert prompt_tokens(tokenizer, "ash", format) == expected


def test_prompts_that_are_no_text_and_temperatures_that_are_no_number_are_told(monkeypatch):
    script = runpy.run_path(str(ROOT / "launch" / "generate.py"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(RecipeError, match="the prompts on stdin are not in utf-8; convert them"):
        list(script["_asked"]())
    monkeypatch.setattr("sys.argv", ["generate.py", "run", "x", "--temperature", "nan"])
    with pytest.raises(RecipeError, match="--temperature a number that is at least 0"):
        script["main"]()
