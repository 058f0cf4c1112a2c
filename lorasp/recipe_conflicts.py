"""What settings of a recipe do not go together, each sound by itself."""

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasp.recipe import Recipe

Conflict = tuple[tuple[str, ...], str]  # the keys concerned, and the sentence about the first of them

# What a method has no use for. An explicit setting of these is an error, since nothing would come of it.
IGNORED = {
    "lorasp": (),
    "lora": ("selection", "adapter.frozen_entries", "adapter.head"),
    "full": ("selection", "adapter"),
}
# And what data a task has no use for.
_UNUSED_DATA = {
    "causal_lm": ("selection",),
    "classification": ("held_out", "format", "template", "too_long", "empty_output", "packing", "limit"),
    "translation": ("selection", "format", "template", "packing"),
}


def conflicts_of(recipe: "Recipe") -> Iterator[Conflict]:
    """What does not go together in it."""
    if recipe.training.global_batch_size % recipe.training.micro_batch_size:
        yield (
            ("training.global_batch_size", "training.micro_batch_size"),
            f"{recipe.training.global_batch_size} is no multiple of training.micro_batch_size, "
            f"{recipe.training.micro_batch_size}",
        )
    if recipe.training.offload_activations and recipe.training.activation_checkpointing == "layer":
        yield (
            ("training.offload_activations", "training.activation_checkpointing"),
            "layer keeps its inputs where they cannot be moved; use activation_checkpointing: lean with it",
        )
    fraction = recipe.selection.fraction
    nearest = Fraction(fraction).limit_denominator(8)
    if recipe.selection.strategy == "balanced" and not (nearest and abs(float(nearest) - fraction) <= 1e-3):
        yield (
            ("selection.fraction", "selection.strategy"),
            f"{fraction:g} is not k/m with m at most 8, which the balanced strategy needs; "
            f"use {nearest or Fraction(1, 8)}, as a decimal, or selection.strategy: uniform",
        )
    if recipe.method == "full" and recipe.quantization.format != "none":
        yield (
            ("quantization.format", "method"),
            f"method full trains the weights themselves, which {recipe.quantization.format} would freeze; "
            f"use quantization: none",
        )
    if recipe.quantization.init == "residual" and recipe.quantization.format == "none":
        yield (
            ("quantization.init", "quantization.format"),
            "nothing is quantized, so there is no residual to start adapters from; use init: plain",
        )
    if recipe.quantization.init == "plain" and "iterations" in recipe.quantization.model_fields_set:
        yield ("quantization.iterations", "quantization.init"), "they are of init: residual; remove this setting"
    for ignored in IGNORED[recipe.method]:
        section, _, only = ignored.partition(".")
        for key in sorted(getattr(recipe, section).model_fields_set):
            if only in ("", key) and not (recipe.method == "lora" and key == "fraction" and fraction == 1):
                why = "trains no adapter" if recipe.method == "full" else "trains all of an adapter's entries"
                yield (f"{section}.{key}", "method"), f"method {recipe.method} {why}; remove this setting"
    if recipe.quantization.init == "residual" and recipe.model.weights == "random" and recipe.adapter.init_from:
        yield (
            ("adapter.init_from", "model.weights"),
            "a base that was made with quantization.init: residual is not read beside random weights",
        )
    if recipe.data.is_random and recipe.data.held_out is not None:
        yield ("data.held_out", "data.train"), "random tokens teach nothing that could be held out; remove it"
    if recipe.data.packing and recipe.data.group_by_length:
        yield (
            ("data.group_by_length", "data.packing"),
            "packs are all of about one length; remove one of data.group_by_length and data.packing",
        )
    for key in ("revision", "limit"):
        if getattr(recipe.data, key) is not None and not isinstance(recipe.data.train, str):
            yield (f"data.{key}", "data.train"), f"data.train is a list: write {key} beside the paths in it"
    for section, key, absent in (
        ("mmlu", "data", "is no mmlu.data"),
        ("lm_eval", "tasks", "are no lm_eval.tasks"),
    ):
        its = getattr(recipe, section)
        if getattr(its, key) and recipe.data.is_random:
            yield (f"{section}.{key}", "data.train"), "random tokens come without a tokenizer, which this needs"
        if getattr(its, key):
            continue
        for other in sorted(its.model_fields_set):
            if getattr(its, other) != type(its).model_fields[other].default:
                yield (f"{section}.{other}", f"{section}.{key}"), f"there {absent} to score; remove this setting"
    yield from _conflicts_with_task(recipe)
    if recipe.training.evaluate_every and not (recipe.data.held_out or recipe.kind == "classification"):
        yield ("training.evaluate_every", "data.held_out"), "there is no data.held_out to evaluate on"


def _conflicts_with_task(recipe: "Recipe") -> Iterator[Conflict]:
    for key in _UNUSED_DATA[recipe.kind]:
        if getattr(recipe.data, key) != type(recipe.data).model_fields[key].default:
            yield (f"data.{key}", "task"), f"task {recipe.task} has no use for it; remove this setting"
    if recipe.kind != "translation":
        for key in sorted(recipe.translation.model_fields_set):
            if getattr(recipe.translation, key) != type(recipe.translation).model_fields[key].default:
                yield (f"translation.{key}", "task"), f"task {recipe.task} translates nothing; remove this setting"
    if recipe.kind != "classification" and recipe.method == "lorasp" and "head" in recipe.adapter.model_fields_set:
        yield ("adapter.head", "task"), "a language model's head is not trained; remove this setting"
    if recipe.kind == "causal_lm":
        return
    if recipe.kind == "classification" and not isinstance(recipe.data.train, str):
        yield ("data.train", "task"), f"task {recipe.task} has one data set; give GLUE's directory, or its hub name"
    if recipe.data.is_random:
        yield ("data.train", "task"), f"random tokens are of task causal_lm; give the data of {recipe.task}"
    for section, key in (("mmlu", "data"), ("lm_eval", "tasks")):
        if getattr(getattr(recipe, section), key):
            yield (f"{section}.{key}", "task"), f"it asks a causal language model, not one of task {recipe.task}"
