"""Score a saved adapter, or the base alone, still sharded over the ranks: held-out rows, MMLU, the harness's tasks.

accelerate launch launch/evaluate.py recipes/quickstart.yaml adapter.init_from=runs/quickstart
accelerate launch launch/evaluate.py recipes/quickstart.yaml name=base
accelerate launch launch/evaluate.py my.yaml adapter.init_from=runs/my data.held_out=null mmlu.data=mmlu mmlu.limit=50
accelerate launch launch/evaluate.py my.yaml model.path=runs/my/export/merged quantization=none mmlu.data=cais/mmlu
accelerate launch launch/evaluate.py my.yaml adapter.init_from=runs/my 'lm_eval.tasks=[arc_easy,hellaswag]'
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import PREEMPTED, end_rank, recipe_from_command_line, run_reporting_errors
from lorasp.health import Preempted, listen_for_signals
from lorasp.recipe import RecipeError


def main() -> int:
    listen_for_signals()
    recipe = recipe_from_command_line(__doc__)
    has_rows = recipe.data.held_out is not None or recipe.kind == "classification"
    has_rows |= recipe.translation.test is not None
    if not has_rows and recipe.mmlu.data is None and not recipe.lm_eval.tasks:
        raise RecipeError(
            "data.held_out: there is nothing to score; name a file of held-out rows, MMLU's directory as mmlu.data, "
            "or lm_eval.tasks"
        )
    # Beside the run that trained the adapter, never over it.
    recipe = recipe.model_copy(update={"name": f"{recipe.name}-evaluation", "overwrite": True})

    from lorasp.accounting import held_bytes
    from lorasp.evaluation.harness import check_harness
    from lorasp.evaluations import Evaluations
    from lorasp.isolation import check_isolation
    from lorasp.models.weights import hub_commit, load_tokenizer
    from lorasp.reporting.run_log import RunLog
    from lorasp.run import (
        claim_run_directory,
        clear_run_directory,
        compute_dtype,
        fetch_data,
        find_model,
        load_model,
        read_data,
        read_mmlu_questions,
    )
    from lorasp.session import Session
    from lorasp.zero.engine import Engine
    from lorasp.zero.launch import start_ranks, stop_ranks

    dtype = compute_dtype(recipe)
    ranks = start_ranks(recipe, dtype, trains=False)
    run_dir = claim_run_directory(recipe, ranks)
    log = RunLog(recipe, ranks, run_dir, trains=False)
    directory = find_model(recipe, ranks)
    # Benchmarks ask nothing of the rows that were trained.
    fetch_data(recipe, ranks, trains=has_rows)
    data = read_data(recipe, directory) if has_rows else None
    tokenizer = data.tokenizer if data else load_tokenizer(directory, recipe.model)
    mmlu = read_mmlu_questions(recipe, directory, tokenizer)
    if recipe.lm_eval.tasks:
        check_harness(recipe.lm_eval)

    with log.phase("load"):
        loaded = load_model(recipe, directory, ranks, dtype, log.console.info)
        engine = Engine(ranks, loaded.model, recipe.training)
        log.model_loaded(asdict(loaded.counts), lambda: held_bytes(loaded.model, engine))
    check_isolation(engine, dtype, ranks.device)

    clear_run_directory(run_dir, ranks)  # an earlier evaluation's

    session = Session.start(recipe, ranks, log, run_dir, loaded, engine, tokenizer, data, mmlu)
    evaluations = Evaluations(session, leave=_leave, again=True)
    step = loaded.start.step if loaded.start else 0
    try:
        if data:
            evaluations.score(step)
            evaluations.answer("answer", step)
        if mmlu is not None:
            evaluations.mmlu(step)
    except Preempted:
        log.console.info("left within an evaluation, as it was asked to; the same command goes on")
        stop_ranks(ranks)
        return PREEMPTED
    if recipe.lm_eval.tasks:
        evaluations.harness()
    log.finish(
        "finished",
        parameters=asdict(loaded.counts),
        optimizer_state_bytes=engine.optimizer_state_bytes(),
        data=data.report() if data else {},
        samples=evaluations.samples,
        model_commit=hub_commit(directory, recipe.model),
    )
    stop_ranks(ranks)
    return 0


def _leave(step: int) -> NoReturn:
    raise Preempted(step)


if __name__ == "__main__":
    end_rank(run_reporting_errors(main))
