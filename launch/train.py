"""Fine-tune a model as a recipe says, on the ranks that the launcher starts, and report every rank's peak memory.

accelerate launch launch/train.py recipes/quickstart.yaml
accelerate launch --use_deepspeed --num_processes 2 launch/train.py recipes/quickstart.yaml training.epochs=2
torchrun --nproc_per_node 2 launch/train.py recipes/quickstart.yaml
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import PREEMPTED, STOPPED, end_rank, recipe_from_command_line, run_reporting_errors
from lorasp.health import Preempted, listen_for_signals, stale_build_locks


def main() -> int:
    listen_for_signals()
    recipe = recipe_from_command_line(__doc__)

    # The recipe is known to be good before anything heavy is imported.
    from lorasp.accounting import held_bytes
    from lorasp.checkpoint import load_adapter
    from lorasp.evaluation.harness import check_harness
    from lorasp.fine_tuning import FineTuning
    from lorasp.isolation import check_isolation
    from lorasp.models.build import call_within_layers
    from lorasp.models.weights import hub_commit
    from lorasp.profiling import check_profile
    from lorasp.reporting.console import Console
    from lorasp.reporting.run_log import RunLog
    from lorasp.resume import agreed_checkpoint, find_checkpoint
    from lorasp.run import (
        claim_run_directory,
        compute_dtype,
        data_digests,
        fetch_data,
        find_model,
        load_model,
        plan_memory,
        read_data,
        read_mmlu_questions,
    )
    from lorasp.session import Session
    from lorasp.tasks import task_of
    from lorasp.timing import matrix_product_limit
    from lorasp.trainer import Diverged
    from lorasp.zero.engine import Engine
    from lorasp.zero.launch import start_ranks, stop_ranks

    dtype = compute_dtype(recipe)
    ranks = start_ranks(recipe, dtype)
    asked, recipe = recipe, recipe.on_ranks(ranks.world_size)
    resumed = agreed_checkpoint(ranks, lambda: find_checkpoint(recipe, Console(ranks.is_main).warn))
    goes_on = resumed is not None and resumed.is_of(recipe.run_dir)  # a named one may be another run's
    run_dir = claim_run_directory(recipe, ranks, goes_on)
    product_limit = matrix_product_limit(ranks.device, dtype)  # before anything is measured
    log = RunLog(recipe, ranks, run_dir)
    log.console.info(f"{recipe.name}: {recipe.method}, {ranks.world_size} rank(s) on {ranks.device.type}, {dtype}")
    share = recipe.training.micro_batch_size
    if share < asked.training.micro_batch_size:
        log.console.info(f"micro batches of {share}, a rank's share, instead of {asked.training.micro_batch_size}")
    for setting in ranks.overruled:
        log.console.warn(f"the recipe overrules the launcher's {setting}")
    for lock in stale_build_locks():
        log.console.warn(f"{lock} was left by a build that was killed; whatever needs that waits for ever: remove it")

    # Data before the model: what is wrong with it shows in seconds.
    directory = find_model(recipe, ranks)
    fetch_data(recipe, ranks)
    data = read_data(recipe, directory)
    if resumed is not None:
        resumed.state.check_data(data_digests(data), resumed.path)
    order = data.order(recipe)
    check_profile(recipe.profile, order.total_steps)
    for line in data.describe():
        log.console.info(line)
    mmlu = read_mmlu_questions(recipe, directory, data.tokenizer)
    if recipe.lm_eval.tasks:
        check_harness(recipe.lm_eval)

    # And what cannot fit, before a weight is read.
    units = order.largest_units(data.train.examples, recipe.training.micro_batch_size)
    largest = task_of(recipe).worst_batch(units, recipe.training.micro_batch_size)
    planned = plan_memory(recipe, directory, ranks, dtype, largest, mmlu, warn=log.console.warn)
    if planned is not None:
        log.planned(planned)

    with log.phase("load"):
        loaded = load_model(recipe, directory, ranks, dtype, log.console.info, None if goes_on else run_dir, resumed)
        engine = Engine(ranks, loaded.model, recipe.training)
        if recipe.adapter.init_from is not None and resumed is None:  # what a bf16 model holds of it is rounded
            engine.set_trained_values(load_adapter(recipe.adapter.init_from, recipe).trained_values(loaded.model))
        log.model_loaded(asdict(loaded.counts), lambda: held_bytes(loaded.model, engine))
        log.started(loaded.start_errors)
        log.recomputes(loaded.model.model.config, dtype, loaded.recomputation, loaded.fallback)
    if loaded.start is not None and loaded.start.dtype != str(dtype).removeprefix("torch."):
        log.console.warn(
            f"adapter.init_from: it was trained in {loaded.start.dtype}, its base is rounded to {dtype} here"
        )
    check_isolation(engine, dtype, ranks.device)
    call_within_layers(loaded.model.model, log.advanced)

    session = Session.start(recipe, ranks, log, run_dir, loaded, engine, data.tokenizer, data, mmlu)
    run = FineTuning(session, order, resumed)
    if recipe.rehearse:
        run.rehearse(largest)
    run.begin()
    try:
        run.score_start()
        run.train(product_limit)
        run.finish()
        status = "finished"
    except Diverged as diverged:
        status = run.stop(diverged)
    except Preempted as preempted:
        run.left(preempted)
        stop_ranks(ranks)
        return PREEMPTED

    log.finish(
        status,
        parameters=asdict(loaded.counts),
        optimizer_state_bytes=engine.optimizer_state_bytes(),
        data=data.report(),
        samples=run.samples,
        model_commit=hub_commit(directory, recipe.model),
    )
    stop_ranks(ranks)
    return 0 if status == "finished" else STOPPED


if __name__ == "__main__":
    end_rank(run_reporting_errors(main))
