"""A recipe's settings side by side with another's, by dotted name."""

from collections.abc import Collection, Mapping
from typing import Any


def flat_settings(recipe: Mapping[str, Any], without: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """The settings of `Recipe.to_dict()` as `section.key`; `without`: names of settings, or of whole sections."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        if name in without:
            continue
        if isinstance(value, Mapping) and not prefix:
            found |= flat_settings(value, without, f"{name}.")
        else:
            found[name] = value
    return found


def differing_settings(ours: Mapping[str, Any], its: Mapping[str, Any]) -> list[str]:
    """A text for each flat setting that is not the same in both."""
    return [f"{key} is {ours.get(key)}, was {its.get(key)}" for key in ours | its if ours.get(key) != its.get(key)]
