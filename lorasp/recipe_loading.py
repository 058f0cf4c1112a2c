"""From a YAML file and `key=value` overrides to a `Recipe`.

Whatever is wrong is told at once, one line a fault with the place it comes from, before anything heavy is imported:

    recipes/x.yaml:14: adapter.rnak: unknown key, did you mean adapter.rank?
    command line: training.epochs: "tree" is not a number
"""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorasp.recipe import DS_CONFIGS, DeepSpeed, Recipe, Section, named_shapes
from lorasp.recipe_deepspeed import check_deepspeed_config
from lorasp.recipe_errors import RecipeError, Report, near_files, sentence, shown
from lorasp.recipe_yaml import read_settings

_SECTIONS = {
    name: section
    for name, section in ((name, field.annotation) for name, field in Recipe.model_fields.items())
    if isinstance(section, type) and issubclass(section, Section)
}


def _keys(section: type[Section]) -> list[str]:
    """As a recipe writes them: `with` is no name for an attribute."""
    return [field.alias or name for name, field in section.model_fields.items()]


_KEYS = [
    *Recipe.model_fields,
    *(f"{name}.{key}" for name, section in _SECTIONS.items() for key in _keys(section)),
]
_REQUIRED = {  # key -> what to give
    f"{name}.{key}": field.description
    for name, section in _SECTIONS.items()
    for key, field in section.model_fields.items()
    if field.is_required()
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file with `key=value` overrides, e.g. `adapter.rank=8`; `selection=null` empties a section.

    Relative paths of data, models and adapters are looked for in the recipe's directory, then in the working one, and
    become absolute. Raises RecipeError with all faults, one a line.
    """
    path = Path(path)
    report = Report(path)
    settings = read_settings(path, overrides, report)
    if settings.get("quantization", {}) is None:
        report.add("quantization", "has no value; write none, nf4 or fp4")
    # A section whose keys are all commented out is there and empty.
    tree = {"name": path.stem} | settings | {name: {} for name in _SECTIONS if settings.get(name) is None}
    _drop_unknown(tree, report)
    _resolve_paths(tree, report, [path.absolute().parent, Path.cwd()])
    recipe = _validate(tree, report)
    if report.text():
        raise RecipeError(report.text())
    return recipe


def _drop_unknown(tree: dict[Any, Any], report: Report) -> None:
    for name in [name for name in tree if name not in Recipe.model_fields]:
        value = tree.pop(name)
        if isinstance(value, dict) and value and not difflib.get_close_matches(str(name), _SECTIONS):
            for key in value:  # `lora: {rank: 8}`: no section is meant, but its keys may be known
                report.add_unknown(f"{name}.{key}", _KEYS)
        else:
            report.add_unknown(str(name), _KEYS)
    for name, section in _SECTIONS.items():
        if isinstance(tree[name], dict):
            for key in [key for key in tree[name] if key not in _keys(section)]:
                del tree[name][key]
                report.add_unknown(f"{name}.{key}", _KEYS)


def _resolve_paths(tree: dict[str, Any], report: Report, bases: Sequence[Path]) -> None:
    """Makes paths absolute; tells of those that are missing. What may be a hub name is left alone."""
    if isinstance(tree["deepspeed"], dict):
        tree["deepspeed"].setdefault("config", DeepSpeed().config)
    for key, is_file, is_local in (
        ("model.path", False, False),
        ("adapter.init_from", False, True),
        ("data.train", True, False),
        ("data.held_out", True, False),
        ("translation.test", False, False),
        ("mmlu.data", False, False),
        ("lm_eval.include_path", False, True),
        ("deepspeed.config", True, True),
    ):
        section, _, name = key.partition(".")
        if not isinstance(tree[section], dict):
            continue
        if section == "data" and tree.get("task", "causal_lm") != "causal_lm":
            is_file = False  # the directory that holds the task's own
        only_shape = key == "model.path" and tree[section].get("weights") == "random"
        for holder, place in _paths_at(tree[section], name):
            if not holder[place].startswith("pypi:") and not (only_shape and holder[place] in named_shapes()):
                is_file = is_file or (only_shape and holder[place].endswith(".json"))  # a config file does as well
                _resolve_path(holder, place, key, is_file, is_local, report, bases)


def _paths_at(section: dict[str, Any], name: str) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of each text that names a path in `section[name]`: itself, or in a list, or as a `path` key."""
    places = [(section, name)]
    if isinstance(section.get(name), list):
        places = [(section[name], index) for index in range(len(section[name]))]
    for holder, place in places:
        value = holder.get(place) if isinstance(holder, dict) else holder[place]
        if isinstance(value, dict):
            holder, place, value = value, "path", value.get("path")
        if isinstance(value, str):
            yield holder, place


def _resolve_path(
    holder: Any, place: Any, key: str, is_file: bool, is_local: bool, report: Report, bases: Sequence[Path]
) -> None:
    given = holder[place]
    shipped = [DS_CONFIGS] if key == "deepspeed.config" else []
    candidates = [base / os.path.expanduser(given) for base in (*shipped, *bases)]
    found = next((path for path in candidates if (path.is_file() if is_file else path.is_dir())), None)
    if found:
        holder[place] = os.path.abspath(found)
        if shipped:
            for fault in check_deepspeed_config(found):
                report.add(key, fault)
    elif any(path.exists() for path in candidates):
        report.add(key, f"{shown(given)} is {'a directory, not a file' if is_file else 'a file, not a directory'}")
    elif is_local or not given or given.endswith((".json", ".jsonl")) or given[0] in "./~" or given.count("/") > 1:
        directories = dict.fromkeys(path.parent for path in candidates)
        near = near_files(Path(given).name, directories, (".json", ".jsonl") if is_file else ())
        places = " or ".join(dict.fromkeys(os.path.abspath(path) for path in candidates))
        report.add(key, f"{shown(given)} does not exist (looked for {places}); {near}")


def _validate(tree: dict[str, Any], report: Report) -> Recipe | None:
    """The typed recipe, or None after telling what is wrong."""
    # What keys have to do with each other is checked once each is valid: so drop the invalid ones and look again,
    # telling only of what the dropped ones have no part in.
    for _ in range(2):
        try:
            return Recipe(**tree)
        except ValidationError as errors:
            for error in errors.errors(include_url=False):
                if error["type"] == "conflicts":
                    for keys, message in error["ctx"]["conflicts"]:
                        if report.faulty.isdisjoint(keys):
                            written = (report.lines[key] for key in keys if key in report.lines)
                            report.add(keys[0], message, next(written, None))
                    continue
                section, *rest = error["loc"]
                key = ".".join([section, *map(str, rest[:1])])
                meant = error["type"] == "missing" and not report.suggested.isdisjoint((key, section))
                if not meant:
                    report.add(key, sentence(error, _REQUIRED))
                if section not in _SECTIONS:
                    tree.pop(section)
                elif not rest:
                    tree[section] = {
                        required.partition(".")[2]: "?" for required in _REQUIRED if required.startswith(f"{section}.")
                    }
                elif key in _REQUIRED:
                    tree[section][rest[0]] = "?"
                else:
                    tree[section].pop(rest[0], None)
    return None
