"""Score a recipe's held-out examples with a saved adapter, or with the base alone, still sharded over the ranks.

accelerate launch launch/evaluate.py recipes/quickstart.yaml adapter.init_from=runs/quickstart
accelerate launch launch/evaluate.py recipes/quickstart.yaml name=base
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import recipe_from_command_line, run_reporting_errors
from lorasp.recipe import RecipeError


def main() -> int:
    recipe = recipe_from_command_line(__doc__)
    if recipe.data.held_out is None:
        raise RecipeError("data.held_out: there is nothing to score; name a file of held-out rows")
    # Beside the run that trained the adapter, never over it.
    recipe = recipe.model_copy(update={"name": f"{recipe.name}-evaluation", "overwrite": True})

    from lorasp.accounting import held_bytes
    from lorasp.models.weights import hub_commit
    from lorasp.reporting.out_of_memory import ANSWERING
    from lorasp.reporting.run_log import RunLog
    from lorasp.run import (
        answer_samples,
        claim_run_directory,
        clear_run_directory,
        compute_dtype,
        fetch_data,
        find_model,
        load_model,
        read_data,
        score,
    )
    from lorasp.zero.engine import Engine
    from lorasp.zero.launch import start_ranks, stop_ranks

    dtype = compute_dtype(recipe)
    ranks = start_ranks(recipe, dtype)
    run_dir = claim_run_directory(recipe, ranks)
    log = RunLog(recipe, ranks, run_dir)
    directory = find_model(recipe, ranks)
    fetch_data(recipe, ranks)
    data = read_data(recipe, directory)
    tokenizer = data.tokenizer

    with log.phase("load"):
        loaded = load_model(recipe, directory, ranks, dtype, log.console.info)
        engine = Engine(ranks, loaded.model, recipe.training)
        log.model_loaded(asdict(loaded.counts), lambda: held_bytes(loaded.model, engine))

    clear_run_directory(run_dir, ranks)  # an earlier evaluation's

    samples = data.samples(recipe.evaluation.samples)
    step = loaded.start.step if loaded.start else 0
    when = "after" if step else "before"
    with log.phase("evaluate"):
        held_out = score(engine, data, recipe.evaluation, ranks)
    with log.phase("evaluate", ANSWERING):
        answer_samples(engine, samples, when, tokenizer, recipe.evaluation, ranks)
    log.scored(step, held_out)
    log.finish(
        "finished",
        parameters=asdict(loaded.counts),
        optimizer_state_bytes=engine.optimizer_state_bytes(),
        data=data.report(),
        samples=samples,
        model_commit=hub_commit(directory, recipe.model),
    )
    stop_ranks(ranks)
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
