"""What a run of a sweep has come to, told from its directory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorasp.recipe import Recipe, RecipeError
from lorasp.recipe_settings import differing_settings, flat_settings

# Of a finished run: where it lies, how it was told of and kept alive. All else has its part in a number of its report,
# such as a peak or tokens a second.
_NO_MATTER = set(
    "name output_dir overwrite resume rehearse tracking profile memory health checkpoint quantization.cache".split()
)
_TOLD_SETTINGS = 4


@dataclass(frozen=True)
class Outcome:
    """kind: `absent`, `begun` (it goes on from its checkpoint, if it has one), `stopped` by its loss, or `finished`.

    report: of the last two.
    """

    kind: Literal["absent", "begun", "stopped", "finished"]
    report: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        return self.report is not None


def find_outcome(run_dir: Path, recipe: Recipe) -> Outcome:
    """Raises RecipeError for a report that cannot be read, or is of other settings than the recipe's."""
    path = run_dir / "report.json"
    if not path.is_file():
        began = any(run_dir.glob("checkpoints/step-*"))
        return Outcome("begun" if began else "absent")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        its = Recipe(**report["recipe"])
        status = report["status"]
        recipe = recipe.on_ranks(report["world_size"])  # as train.py has it
    except (OSError, ValueError, LookupError, TypeError) as error:  # ValueError: JSON's and pydantic's
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"{path} is no report that this version can read ({reason:.200}); remove that directory to run it again"
        ) from None
    ours, others = (flat_settings(tree.to_dict(), without=_NO_MATTER) for tree in (recipe, its))
    if differing := differing_settings(ours, others):
        more = f" and {len(differing) - _TOLD_SETTINGS} more" if len(differing) > _TOLD_SETTINGS else ""
        raise RecipeError(
            f"{run_dir} ended with other settings: {'; '.join(differing[:_TOLD_SETTINGS])}{more}. Set that back, give "
            f"the sweep another name, or remove that directory"
        )
    return Outcome("finished" if status == "finished" else "stopped", report)
