"""From a recipe's YAML and the command line's `key=value` to one tree of settings, each with the line it stands in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasp.recipe_errors import COMMAND_LINE, RecipeError, Report, near_files, shown


def read_settings(path: Path, overrides: Sequence[str], report: Report) -> dict[Any, Any]:
    """The settings of the file under those of the command line, untyped, with shorthands and interpolations resolved.

    Tells `report` where each stands, and of keys given twice and misshapen overrides. Raises RecipeError if what is
    left cannot be read at all.
    """
    settings = OmegaConf.create(_written_out(read_yaml(path, report), report))
    for override in overrides:
        key, equals, _ = override.partition("=")
        try:
            if not equals or not key:
                raise ValueError
            given = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (ValueError, yaml.YAMLError, OmegaConfBaseException):
            report.add("", f"{shown(override)} is no override; write key=value, e.g. adapter.rank=8", COMMAND_LINE)
            continue
        report.lines[key] = COMMAND_LINE
        for section, value in given.items():
            report.lines.setdefault(section, COMMAND_LINE)
            if isinstance(value, dict):
                report.lines |= {f"{section}.{name}": COMMAND_LINE for name in value}
        try:
            settings = OmegaConf.merge(settings, _written_out(given, report))
        except (TypeError, OmegaConfBaseException):  # a list over a section, or betas[0], which reads as a section
            report.add(key, "cannot be set like this over what the recipe holds; give the whole value", COMMAND_LINE)
    try:
        return OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, or ???
        report.add(str(error.full_key or ""), str(error).splitlines()[0])
        raise RecipeError(report.text()) from None


def _written_out(settings: dict[Any, Any], report: Report) -> dict[Any, Any]:
    """`quantization: nf4` as `quantization: {format: nf4}`; before merging, so that the section's other keys stay."""
    if isinstance(settings.get("quantization"), str):
        settings["quantization"] = {"format": settings["quantization"]}
        report.lines["quantization.format"] = report.lines.get("quantization", 0)
    return settings


def read_yaml(path: Path, report: Report, kind: str = "recipe", depth: int = 2) -> dict[Any, Any]:
    """The file's settings, unchecked; notes the line of each. Raises RecipeError if they cannot be read at all.

    kind: what such a file is called. depth: of the keys whose lines are noted: 2 for `section.key`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        near = near_files(path.name, [path.absolute().parent], (".yaml", ".yml"))
        raise RecipeError(f"{path}: no such {kind}; {near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise RecipeError(_yaml_fault(path, error)) from None
    if root is None:
        raise RecipeError(f"{path}: the {kind} is empty; start from a copy of another")
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}:{root.start_mark.line + 1}: a {kind} is made of `key: value` lines; this is none")
    if _note_lines(root, "", report, depth):
        text = yaml.serialize(root)  # without the duplicates, so that the rest can be checked as well
    try:
        # OmegaConf's reading of YAML, not PyYAML's, to which 2e-5 is text.
        return OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(_yaml_fault(path, error)) from None


def _note_lines(node: yaml.MappingNode, prefix: str, report: Report, depth: int) -> bool:
    """Notes where the keys of `node` and its sections stand; tells of keys given twice, drops and returns whether."""
    kept, dropped = {}, False
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in kept:
            dropped = True
            report.add(name, f"given twice, first in line {report.lines[name]}", line)
            continue
        kept[name] = (key, value)
        report.lines[name] = line
        if depth > 1 and isinstance(value, yaml.MappingNode):
            dropped |= _note_lines(value, f"{name}.", report, depth - 1)
    node.value = list(kept.values())
    return dropped


def _yaml_fault(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    return f"{path}{line}: this is not YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"
