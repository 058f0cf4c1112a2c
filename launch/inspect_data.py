"""Show a recipe's data as it is trained: counts, lengths, packing, and rows as tokens with their labels coloured.

python launch/inspect_data.py recipes/quickstart.yaml
python launch/inspect_data.py recipes/quickstart.yaml data.train=my_rows.jsonl data.packing=true
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import recipe_from_command_line, run_reporting_errors
from lorasp.recipe import RecipeError

_ROWS = 3


def main() -> int:
    recipe = recipe_from_command_line(__doc__)
    if recipe.kind != "causal_lm":
        raise RecipeError(f"task: what is shown are rows of instruction data, and task {recipe.task} has its own")
    if recipe.data.is_random:
        raise RecipeError("data.train: random tokens are no rows to look at; give a file, or a hub data set")

    from rich.console import Console

    from lorasp.data.inspection import show
    from lorasp.data.load import download_data, load_data
    from lorasp.models.weights import load_tokenizer, locate_model

    # No ranks and no weights: only the model's tokenizer is looked at.
    tokenizer = load_tokenizer(locate_model(recipe.model, weights=False), recipe.model)
    download_data(recipe.data)
    console = Console()
    # Rich takes what is no terminal for 80 columns, and would fold the lines of a log.
    console = console if console.is_terminal else Console(width=1000)
    show(recipe, load_data(recipe, tokenizer), console, _ROWS)
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
