"""What a user can get wrong: one sentence, exit code 2, before a weight is read, and nobody's run harmed.

Most faults are shown in this process, by the stages of launch/train.py in its order; a handful by real launches, which
show that the sentence comes once from many ranks and that the launch ends.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorasp.checkpoint import ADAPTER_FILE, AdapterInfo, load_adapter, save_adapter
from lorasp.cli import BAD_INPUT, STOPPED, recipe_from_command_line, run_reporting_errors
from lorasp.data.load import load_data
from lorasp.models.build import build_on_meta
from lorasp.models.weights import Checkpoint, load_config, load_tokenizer
from lorasp.recipe import Recipe, RecipeError
from lorasp.recipe_loading import load_recipe
from lorasp.resume import newest_checkpoint
from lorasp.run import claim_run_directory, compute_dtype, load_model
from lorasp.zero.launch import check_zero_settings
from tests.distributed.commands import TRAIN, Done, accelerate_on_two, python, run, torchrun_on_two
from tests.distributed.launching import ROOT

OTHER_DIGEST = "0" * 64


@dataclass(frozen=True)
class Alone:
    """One rank without a process group."""

    rank = 0
    world_size = 1
    is_main = True
    device = torch.device("cpu")

    def gather(self, value):
        return [value]


class WeightRead(Exception):
    """The first weight of the model was asked for: the input was found good."""


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def read(*_):
        raise WeightRead

    monkeypatch.setattr(Checkpoint, "read", read)


@pytest.fixture
def work(place, tmp_path) -> Path:
    """A place of the test's own, with an earlier run named `tiny` in it."""
    shutil.copytree(place, tmp_path, ignore=shutil.ignore_patterns("runs"), dirs_exist_ok=True)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace(str(place), str(tmp_path)))
    leave_a_run(tmp_path / "runs" / "tiny")
    return tmp_path


def leave_a_run(directory: Path) -> None:
    for name in ("report.json", "adapter/adapter.safetensors", "tensorboard/events.out.tfevents.1"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"the earlier run's {name}")


def everything_in(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def told(monkeypatch, capsys):
    """Runs stages as a launch script does and gives the lines of stderr; asserts the exit code."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)

    def run_stages(stages) -> list[str]:
        with pytest.raises(SystemExit) as left:
            run_reporting_errors(stages)
        assert left.value.code == BAD_INPUT
        return capsys.readouterr().err.splitlines()

    return run_stages


def until_the_first_weight(work: Path, *overrides: str) -> None:
    recipe = load_recipe(work / "tiny.yaml", overrides)
    dtype, ranks = compute_dtype(recipe), Alone()
    recipe.accumulation(ranks.world_size)
    claim_run_directory(recipe, ranks)
    directory = Path(recipe.model.path)
    load_data(recipe, load_tokenizer(directory, recipe.model))
    load_model(recipe, directory, ranks, dtype)


def test_good_input_gets_as_far_as_the_weights(work):
    with pytest.raises(WeightRead):
        until_the_first_weight(work, "name=other")


# ---- Faults of the recipe and of the files that it names: (what is done to the place, overrides, what is told)


def rows(work: Path, *given: object) -> None:
    (work / "train.json").write_text(json.dumps(given))


def row(**changes: str) -> dict[str, str]:
    return {"instruction": "Name a tree", "input": "", "output": "elm", **changes}


def tensors(change):
    def do(work: Path) -> None:
        with rewritten(work / "model" / "model.safetensors") as found:
            change(found)

    return do


def index(weight_map):
    """Splits nothing, but gives the single file an index: `weight_map` of the tensors' names."""

    def do(work: Path) -> None:
        model = work / "model"
        names = list(load_file(model / "model.safetensors"))
        (model / "model.safetensors").rename(model / "model-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map(names)}))

    return do


def pickled(work: Path) -> None:
    model = work / "model"
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def config(directory: str = "model", **changes):
    def do(work: Path) -> None:
        path = work / directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return do


def widened(work: Path) -> None:
    """A second model, `wider/`, of other sizes."""
    shutil.copytree(work / "model", work / "wider")
    config(hidden_size=48, directory="wider")(work)


def cut(name: str, size: int):
    def do(work: Path) -> None:
        (work / name).write_bytes((work / name).read_bytes()[:size])

    return do


def write(name: str, text: str):
    def do(work: Path) -> None:
        (work / name).write_text(text)

    return do


def remove(*names: str):
    def do(work: Path) -> None:
        for name in names:
            (work / name).unlink()

    return do


def gpt2(work: Path) -> None:
    """Its projections are transformers' Conv1D."""
    small = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 261}
    (work / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2", **small}))


def ds_config(**zero):
    return write("mine.json", json.dumps({"zero_optimization": {"stage": 3, **zero}}))


def nothing(work: Path) -> None:
    pass


def both(first, second):
    def do(work: Path) -> None:
        first(work)
        second(work)

    return do


def adapter(**changes):
    """Saves an adapter of the recipe in `saved/`, made with other settings, or with a changed info."""
    info_changes = changes.pop("info", {})

    def do(work: Path) -> None:
        recipe = load_recipe(work / "tiny.yaml")
        settings = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update=changes)})
        save_start(settings, work / "saved", **info_changes)

    return do


def save_start(recipe: Recipe, directory: Path, **info_changes) -> None:
    """The adapter of a model that nobody trained."""
    model = build_on_meta(load_config(Path(recipe.model.path), recipe.model), recipe, torch.float32)
    info = AdapterInfo.of(recipe, model, base_digest=OTHER_DIGEST, selection_seed=recipe.seed, step=1)
    values = ((name, value.detach()) for name, value in model.named_parameters() if value.requires_grad)
    save_adapter(directory, replace(info, **info_changes), model, values, writes=True)


def damaged_adapter(change):
    """An adapter that fits the recipe, and then `change` of its bytes, or of its tensors under the same header."""

    def do(work: Path) -> None:
        adapter()(work)
        change(work / "saved" / ADAPTER_FILE)

    return do


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit_of_S(file: Path) -> None:
    with rewritten(file) as found:
        found["model.layers.0.mlp.up_proj.A_bits"][0] ^= 1


def lose_S(file: Path) -> None:
    with rewritten(file) as found:
        del found["model.layers.0.mlp.up_proj.A_bits"]


@contextmanager
def rewritten(file: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The file's tensors, to be changed; they are saved under the metadata that they had."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    found = load_file(file)
    yield found
    save_file(found, file, metadata=metadata)


INIT = "adapter.init_from=saved"

FAULTS = {
    # the recipe
    "mistyped key": (nothing, ["adapter.rnak=8"], "adapter.rnak: unknown key, did you mean adapter.rank?"),
    "wrong type": (nothing, ["training.epochs=tree"], 'training.epochs: "tree" is not a number'),
    "8-bit": (nothing, ["quantization=int8"], "8-bit is not supported: bitsandbytes keeps whole unsharded copies"),
    "float16": (nothing, ["model.dtype=float16"], "float16 is not supported: the chunked loss"),
    "batch on one rank": (nothing, ["training.micro_batch_size=3"], "8 is no multiple of training.micro_batch_size"),
    "stage 1": (ds_config(stage=1), ["deepspeed.config=mine.json"], "ZeRO stage 1 would keep the whole base"),
    "zero_quantized_weights": (
        ds_config(zero_quantized_weights=True),
        ["deepspeed.config=mine.json"],
        "zero_quantized_weights would quantize again",
    ),
    "zero_quantized_nontrainable_weights": (
        ds_config(zero_quantized_nontrainable_weights=True),
        ["deepspeed.config=mine.json"],
        "zero_quantized_nontrainable_weights would quantize again",
    ),
    # files that are not there
    "no recipe": (remove("tiny.yaml"), [], "tiny.yaml: no such recipe"),
    "no model": (nothing, ["model.path=./modle"], 'model.path: "./modle" does not exist'),
    "no data": (nothing, ["data.train=trian.json"], "did you mean train.json?"),
    "no held-out data": (nothing, ["data.held_out=held.json"], 'data.held_out: "held.json" does not exist'),
    "no adapter": (nothing, [INIT], 'adapter.init_from: "saved" does not exist'),
    # data
    "no rows": (rows, [], "train.json: has no rows"),
    "missing column": (
        lambda work: rows(work, {"instruction": "a", "text": "b"}),
        [],
        "train.json: 1 row has no column 'output' (first: row 1, which has 'instruction', 'text')",
    ),
    "empty outputs": (
        lambda work: rows(work, row(), row(output=" "), row(output="")),
        ["data.empty_output=error"],
        "train.json: 2 rows have an empty output (first: row 2); fill them in, or set data.empty_output=drop",
    ),
    "nothing but empty outputs": (lambda work: rows(work, row(output="")), [], "the output of all 1 is empty"),
    "prompt too long": (  # BOS, 200 bytes, and 15 of the template
        lambda work: rows(work, row(), row(instruction="a" * 200)),
        [],
        "1 row has a prompt that leaves no room for a response in data.max_length=96 (first: row 2, 216 tokens)",
    ),
    "held-out prompt too long": (
        lambda work: (work / "held_out.json").write_text(json.dumps([row(instruction="a" * 200)])),
        [],
        "held_out.json: 1 row has a prompt that leaves no room",
    ),
    "response too long": (
        lambda work: rows(work, row(output="a" * 200)),
        ["data.too_long=error"],
        "1 row has more tokens than data.max_length=96",
    ),
    # the model's directory
    "no config": (remove("model/config.json"), [], "holds no config.json, so it is no Hugging Face model"),
    "broken config": (cut("model/config.json", 20), [], "config.json cannot be used"),
    "config of a wrong type": (config(hidden_size="wide"), [], "config.json cannot be used: Validation error"),
    "unknown architecture": (config(model_type="zorblax"), [], "model type `zorblax`"),
    "no decoder": (config(model_type="t5"), [], "t5 is no causal language model here"),
    "quantized already": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        [],
        "this checkpoint is quantized already (gptq)",
    ),
    "no tokenizer": (
        remove("model/tokenizer.json", "model/tokenizer_config.json"),
        [],
        "no tokenizer can be loaded from",
    ),
    "broken tokenizer": (write("model/tokenizer.json", "[]"), [], "no tokenizer can be loaded from"),
    # its weights
    "pickled weights": (pickled, [], "holds no model.safetensors; pickled checkpoints (.bin) are not read"),
    "cut weights": (cut("model/model.safetensors", 60_000), [], "model.safetensors is damaged"),
    "cut header": (cut("model/model.safetensors", 100), [], "model.safetensors is damaged"),
    "empty weights": (cut("model/model.safetensors", 0), [], "model.safetensors is damaged"),
    "missing shard": (
        index(lambda names: {name: f"model-0000{1 + (name == names[-1])}.safetensors" for name in names}),
        [],
        "model-00002.safetensors is missing; the checkpoint's index names it",
    ),
    "shard without its tensor": (
        index(lambda names: dict.fromkeys([*names, "model.extra"], "model-00001.safetensors")),
        [],
        "model-00001.safetensors lacks the tensor model.extra that the index promises",
    ),
    "misshapen index": (index(lambda names: names), [], "model.safetensors.index.json is no safetensors index"),
    "missing tensor": (
        tensors(lambda found: found.pop("model.norm.weight")),
        [],
        "does not fit LlamaForCausalLM: tensors 1 missing: model.norm.weight",
    ),
    "unexpected tensor": (
        tensors(lambda found: found.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)})),
        [],
        "tensors 1 unexpected: model.layers.9.mlp.up_proj.weight",
    ),
    "tensor of a wrong shape": (
        tensors(lambda found: found.update({"model.norm.weight": torch.zeros(7)})),
        [],
        "tensors 1 of a wrong shape: model.norm.weight is [7], expected [45]",
    ),
    "nothing to adapt": (
        gpt2,
        [],
        "adapter.target_modules: this model has no linear layer (nn.Linear) to adapt",
    ),
    "a matrix too small for its share": (
        nothing,
        ["selection.strategy=uniform", "selection.fraction=0.001", "adapter.rank=1"],
        "selection.fraction: model.layers.0.self_attn.q_proj.A has 45 entries: too few to train 0.001 of them",
    ),
    "target that matches nothing": (
        nothing,
        ["adapter.target_modules=[q_proj,qkv]"],
        "'qkv' matches no linear layer of this model; it has: down_proj, gate_proj, k_proj, o_proj, q_proj",
    ),
    # a saved adapter
    "empty adapter directory": (lambda work: (work / "saved").mkdir(), [INIT], "holds no adapter.safetensors"),
    "adapter of another rank": (adapter(rank=8), [INIT], "adapter.rank is 4, the adapter's 8"),
    "adapter of another scale": (adapter(alpha=1.0), [INIT], "adapter.alpha is 32.0, the adapter's 1.0"),
    "adapter for another method": (
        adapter(),
        [INIT, "method=lora"],
        "selection.fraction is 1.0, the adapter's 0.5",
    ),
    "adapter for another base's rounding": (
        lambda work: save_start(load_recipe(work / "tiny.yaml", ["quantization.double_quant=false"]), work / "saved"),
        [INIT, "quantization.block_size=128"],
        "quantization.double_quant is True, the adapter's False; quantization.block_size is 128, the adapter's 64",
    ),
    "adapter of other layers": (
        adapter(target_modules=["q_proj"]),
        [INIT],
        "adapts other linear layers than this model and recipe: 18 differ",
    ),
    "adapter of another model": (
        both(adapter(), widened),
        [INIT, "model.path=wider"],
        "q_proj.A has another size here",
    ),
    "adapter of a later version": (
        adapter(info={"format": "lorasp-adapter-9"}),
        [INIT],
        "is of format lorasp-adapter-9",
    ),
    "adapter cut off": (damaged_adapter(halve), [INIT], "is damaged or not ours"),
    "adapter with a bit of S flipped": (damaged_adapter(flip_a_bit_of_S), [INIT], "its S is not the one"),
    "adapter without its S": (damaged_adapter(lose_S), [INIT], "A_bits has another size here"),
    "weights for an adapter": (
        both(
            lambda work: (work / "saved").mkdir(),
            lambda work: shutil.copy(work / "model" / "model.safetensors", work / "saved" / ADAPTER_FILE),
        ),
        [INIT],
        "is damaged or not ours",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_sentence_before_a_weight_is_read_and_harms_no_run(fault, work, told):
    prepare, overrides, sentence = FAULTS[fault]
    prepare(work)
    before = everything_in(work / "runs")
    # As if the earlier run were to be replaced: whoever mistypes must not lose it.
    [line] = told(lambda: until_the_first_weight(work, "overwrite=true", *overrides))
    assert line.startswith("error: ") and sentence in line
    assert everything_in(work / "runs") == before


def test_several_faults_are_told_together(work, told):
    found = told(lambda: until_the_first_weight(work, "adapter.rnak=8", "data.train=trian.json", "seed=x"))
    assert len(found) == 3 and sum(line.startswith("error: ") for line in found) == 1


def test_a_flag_that_there_is_not_is_told_with_the_usage(work, told):
    [line] = told(lambda: recipe_from_command_line("Trains.", [str(work / "tiny.yaml"), "--rank", "8"]))
    assert line.startswith("error: unrecognized arguments: --rank 8; usage: ")


def test_a_directory_that_holds_another_run_is_left_alone(work, told):
    before = everything_in(work / "runs")
    [line] = told(lambda: until_the_first_weight(work))
    assert "runs/tiny holds another run (report.json, adapter)" in line
    assert "name=" in line and "overwrite=true" in line
    assert everything_in(work / "runs") == before


def test_a_directory_that_another_process_writes_is_left_alone_until_that_one_has_ended(work, told, monkeypatch):
    """Ranks outlive their launcher: the same command, given again, would write among their files."""
    monkeypatch.setattr("lorasp.run._LAST_RUN_ENDS", 0.0)
    place = work / "runs" / "taken"
    place.mkdir()
    holds = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{holds}; sys.stdin.read()", str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        [line] = told(lambda: until_the_first_weight(work, "name=taken"))
        assert "runs/taken is being written by another run that has not ended" in line and "name=" in line
        other.kill()
    with pytest.raises(WeightRead):
        until_the_first_weight(work, "name=taken")


def test_a_refused_run_leaves_no_trace_that_would_refuse_the_next(work, told):
    told(lambda: until_the_first_weight(work, "name=next", "adapter.target_modules=[qkv]"))
    with pytest.raises(WeightRead):
        until_the_first_weight(work, "name=next")


def test_an_output_directory_that_cannot_be_written_is_told(work, told):
    [line] = told(lambda: until_the_first_weight(work, f"output_dir={work / 'train.json'}/runs"))
    assert "train.json/runs/tiny cannot be written (Not a directory); name another output_dir" in line


@pytest.mark.parametrize(
    ("cuda", "bf16", "asked", "expected"),
    [
        (False, False, "auto", torch.float32),
        (False, False, "bfloat16", torch.bfloat16),
        (True, True, "auto", torch.bfloat16),
        (True, False, "auto", torch.float32),
        (True, False, "float32", torch.float32),
        (True, False, "bfloat16", None),
    ],
)
def test_bf16_is_refused_only_where_the_hardware_lacks_it(cuda, bf16, asked, expected, work, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    # Emulation, which torch offers on such a GPU, would be slower than fp32.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    if expected is None:
        [line] = told(lambda: until_the_first_weight(work, f"model.dtype={asked}", "name=other"))
        assert line == "error: model.dtype: Tesla T4 has no bfloat16; set model.dtype=float32 (twice the memory)"
    else:
        assert compute_dtype(load_recipe(work / "tiny.yaml", [f"model.dtype={asked}"])) == expected


def test_a_zero_setting_that_deepspeed_lacks_is_told(work, told):
    ds_config(stage3_prefetch_bucket_sise=0)(work)
    recipe = load_recipe(work / "tiny.yaml", ["deepspeed.config=mine.json"])
    [line] = told(lambda: check_zero_settings(recipe))
    assert "mine.json: zero_optimization.stage3_prefetch_bucket_sise: DeepSpeed has no such setting" in line
    assert line.endswith("did you mean stage3_prefetch_bucket_size?")


def test_a_fault_of_one_rank_alone_is_told_after_waiting_for_rank_0(told, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")

    def stages():
        raise RecipeError("model.path: /local/model does not exist")

    assert told(stages) == ["error on rank 1: model.path: /local/model does not exist"]
    assert waited == [10]


def test_a_rank_whom_the_launcher_asks_to_leave_before_it_sees_the_fault_is_silent(told, monkeypatch):
    """Rank 0 was seconds ahead: it has told the fault and ended, for which the launcher ends the others."""
    monkeypatch.setattr("lorasp.health._asked", True)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    monkeypatch.setenv("RANK", "1")

    def stages():
        raise RecipeError("model.path: /local/model does not exist")

    assert told(stages) == []


# ---- Real launches


def assert_refused_once(done: Done, sentence: str) -> None:
    [line] = done.errors
    assert line.startswith("error: ") and sentence in line
    assert done.stderr.count(sentence) == 1
    assert "[rank" not in done.stderr  # how torch marks the traceback of a rank
    assert "(exitcode: 2)" in done.stderr  # the launcher's word; its own exit code is 1
    assert done.returncode != 0 and done.lingered < 30
    assert "step 1/" not in done.stdout and "model: " not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["adapter.rnak=8"], "command line: adapter.rnak: unknown key, did you mean adapter.rank?"),
        # Rank 0's fault alone: the other one loses it in a collective.
        (["name=tiny"], "runs/tiny holds another run"),
        (["adapter.target_modules=[qkv]", "overwrite=true"], "'qkv' matches no linear layer of this model; it has: "),
    ],
    ids=["unknown key", "another run", "target modules"],
)
def test_two_ranks_tell_a_fault_once_and_end(overrides, sentence, work, home):
    before = everything_in(work / "runs")
    done = run(
        accelerate_on_two(str(work / "tiny.yaml"), *(override.format(work=work) for override in overrides)), home
    )
    assert_refused_once(done, sentence)
    assert everything_in(work / "runs") == before


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused_and_the_run_to_be_replaced_is_not_harmed(work, home):
    """The digest of the base is known when its weights were read: the one refusal after that."""
    adapter()(work)
    before = everything_in(work / "runs")
    done = run(python(str(work / "tiny.yaml"), "overwrite=true", f"adapter.init_from={work / 'saved'}"), home)
    assert done.returncode == BAD_INPUT
    [line] = done.errors
    assert "was trained on another base" in line and OTHER_DIGEST[:12] in line
    assert everything_in(work / "runs") == before


def read_adapter(directory: Path, recipe: Recipe) -> AdapterInfo:
    """The saved adapter's info; asserts that all of it is finite."""
    saved = load_adapter(directory / "adapter", recipe)
    assert saved.tensors and all(torch.isfinite(value.float()).all() for value in saved.tensors.values())
    return saved.info


# launch/train.py with a learning rate of 1e30 at one step: an update that ruins the weights and is itself finite.
SPIKE = """
import runpy
import sys
sys.path.insert(0, {root!r})
import lorasp.trainer

schedule = lorasp.trainer.learning_rate
lorasp.trainer.learning_rate = lambda step, *rest: 1e30 if step + 1 == {step} else schedule(step, *rest)
sys.argv[0] = {train!r}
runpy.run_path({train!r}, run_name="__main__")
"""


def with_a_spike(work: Path, step: int, *arguments: str) -> list[str]:
    (work / "spike.py").write_text(SPIKE.format(root=str(ROOT), train=TRAIN, step=step))
    command = torchrun_on_two(str(work / "tiny.yaml"), *arguments)
    return [str(work / "spike.py") if part == TRAIN else part for part in command]


@pytest.mark.slow
def test_an_update_that_ruins_the_weights_is_not_saved_over_a_good_adapter(work, home):
    """The third update does, after a loss that was finite: step 3 is not saved, and the adapter of step 2 is kept.

    The loss of step 3 is that of the weights before its update, and cannot vouch for those that step 3 would save.
    """
    done = run(with_a_spike(work, 3, "name=spike", "checkpoint.every_steps=1"), home)
    assert done.returncode != 0 and f"(exitcode: {STOPPED})" in done.stderr, done.stderr[-3000:]
    report = json.loads((work / "runs" / "spike" / "report.json").read_text())
    assert "NaN or infinite after the update of step 3" in report["status"]
    assert report["status"].endswith("kept is what step 2 gave") and done.stdout.count(report["status"][9:]) == 1
    assert [point["step"] for point in report["history"]] == [1, 2, 3]
    assert read_adapter(work / "runs" / "spike", load_recipe(work / "tiny.yaml")).step == 2


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_both_ranks_and_ruined_weights_are_not_kept(work, home):
    """After a step of 1e30 the next loss is no number, and nothing was saved before."""
    done = run(accelerate_on_two(str(work / "tiny.yaml"), "name=far", "training.learning_rate=1e30"), home)
    assert done.returncode != 0 and f"(exitcode: {STOPPED})" in done.stderr and "[rank" not in done.stderr
    report = json.loads((work / "runs" / "far" / "report.json").read_text())
    assert report["status"].startswith("stopped: ") and "NaN or infinite at step 2" in report["status"]
    assert report["status"].endswith("nothing was saved (checkpoint.every_steps)")
    assert done.stdout.count("NaN or infinite at step 2") == 1
    assert [rank["rank"] for rank in report["phases"]["train"]["ranks"]] == [0, 1]
    assert not (work / "runs" / "far" / "adapter").exists()


@pytest.mark.slow
def test_a_loss_that_is_far_too_high_stops_the_run(work, home):
    """The untrained model's is ln(261) = 5.6: below the default of four times that, above a limit of 5."""
    done = run(python(str(work / "tiny.yaml"), "name=high", "health.max_loss=5"), home)
    assert done.returncode == STOPPED and done.errors == []
    status = json.loads((work / "runs" / "high" / "report.json").read_text())["status"]
    assert re.search(r"the loss became 5\.[56]\d*, above health.max_loss, at step 1;", status), status


@pytest.mark.slow
def test_poisoned_weights_are_refused_by_the_rehearsal_or_stop_the_first_step(work, home):
    tensors(lambda found: found["model.norm.weight"].fill_(float("nan")))(work)
    done = run(python(str(work / "tiny.yaml"), "name=rehearsed"), home)
    assert done.returncode == BAD_INPUT and not (work / "runs" / "rehearsed" / "report.json").exists()
    [line] = done.errors
    assert "the untrained model's loss or gradient on the longest rows is NaN" in line

    done = run(python(str(work / "tiny.yaml"), "name=nan", "rehearse=false"), home)
    assert done.returncode == STOPPED and done.errors == []
    report = json.loads((work / "runs" / "nan" / "report.json").read_text())
    assert "NaN or infinite at step 1" in report["status"]
    assert report["metrics"]["held_out_loss_before"] is None
    assert (work / "runs" / "nan" / "report.md").read_text().startswith("# nan: ")
    assert not (work / "runs" / "nan" / "adapter").exists()


@pytest.mark.slow
def test_a_full_disk_stops_before_step_1_or_leaves_the_checkpoint_before_whole(work, home, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # A checkpoint takes some 1.05 MB: room for two, and for the result and its report, not for a third beside them.
    mount = ["mount", "-t", "tmpfs", "-o", "size=2900k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        recipe = [str(work / "tiny.yaml"), f"output_dir={disk}", "checkpoint.every_steps=1", "adapter.rank=80"]
        done = run(python(*recipe, "name=rehearsed"), home)
        assert done.returncode == BAD_INPUT
        [line] = done.errors
        assert "GiB of checkpoints, and" in line and "lower checkpoint.keep_last" in line
        assert "step 1/4" not in done.stdout and list((disk / "rehearsed").iterdir()) == []

        done = run(python(*recipe, "rehearse=false"), home)
        assert done.returncode == 0, done.stderr
        for step in (3, 4):
            assert f"the checkpoint of step {step} could not be written" in done.stdout
        assert done.stdout.count("that of step 2 stays") == 2
        assert read_adapter(disk / "tiny", load_recipe(work / "tiny.yaml", ["adapter.rank=80"])).step == 4
        assert newest_checkpoint(disk / "tiny", pytest.fail).state.step == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)
