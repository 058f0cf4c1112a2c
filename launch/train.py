"""Fine-tune a model as a recipe says, on the ranks that the launcher starts, and report every rank's peak memory.

accelerate launch launch/train.py recipes/quickstart.yaml
accelerate launch --use_deepspeed --num_processes 2 launch/train.py recipes/quickstart.yaml training.epochs=2
torchrun --nproc_per_node 2 launch/train.py recipes/quickstart.yaml
"""

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import PREEMPTED, STOPPED, recipe_from_command_line, run_reporting_errors
from lorasp.health import Preempted, listen_for_signals, stale_build_locks


def main() -> int:
    listen_for_signals()
    recipe = recipe_from_command_line(__doc__)

    # The recipe is known to be good before anything heavy is imported.
    from lorasp.accounting import held_bytes
    from lorasp.agreement import Agreement
    from lorasp.checkpoint import load_adapter
    from lorasp.data.batches import training_batches
    from lorasp.evaluation.harness import check_harness, run_harness
    from lorasp.models.build import call_within_layers
    from lorasp.models.weights import hub_commit
    from lorasp.profiling import check_profile, profiled
    from lorasp.rehearsal import rehearse_answers, rehearse_save, rehearse_step
    from lorasp.reporting.console import Console
    from lorasp.reporting.out_of_memory import ANSWERING
    from lorasp.reporting.run_log import RunLog
    from lorasp.resume import LEFT, Checkpoints, RunState, agreed_checkpoint, find_checkpoint, newest_checkpoint
    from lorasp.run import (
        adapter_info,
        answer_samples,
        claim_run_directory,
        clear_run_directory,
        compute_dtype,
        data_digests,
        fetch_data,
        find_model,
        load_model,
        plan_memory,
        read_data,
        read_mmlu_questions,
        save_result,
        score_mmlu,
    )
    from lorasp.tasks import task_of
    from lorasp.timing import matrix_product_limit
    from lorasp.trainer import Diverged, every, train
    from lorasp.watchdog import Watchdog
    from lorasp.whole_files import write_text_whole
    from lorasp.zero.engine import Engine
    from lorasp.zero.launch import start_ranks, stop_ranks

    training, task = recipe.training, task_of(recipe)
    dtype = compute_dtype(recipe)
    ranks = start_ranks(recipe, dtype)
    warn = Console(ranks.is_main).warn
    resumed = agreed_checkpoint(ranks, lambda: find_checkpoint(recipe, warn))
    goes_on = resumed is not None and resumed.is_of(recipe.run_dir)  # a named one may be another run's
    run_dir = claim_run_directory(recipe, ranks, goes_on)
    product_limit = matrix_product_limit(ranks.device, dtype)  # before anything is measured
    log = RunLog(recipe, ranks, run_dir)
    log.console.info(f"{recipe.name}: {recipe.method}, {ranks.world_size} rank(s) on {ranks.device.type}, {dtype}")
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
    tokenizer = data.tokenizer
    order = data.order(recipe)
    check_profile(recipe.profile, order.total_steps)
    for line in data.describe():
        log.console.info(line)
    mmlu = read_mmlu_questions(recipe, directory, tokenizer)
    if recipe.lm_eval.tasks:
        check_harness(recipe.lm_eval)

    # And what cannot fit, before a weight is read.
    units = order.largest_units(data.train.examples, training.micro_batch_size)
    largest = task.worst_batch(units, training.micro_batch_size)
    planned = plan_memory(recipe, directory, ranks, dtype, largest, warn=log.console.warn)
    if planned is not None:
        log.planned(planned)

    with log.phase("load"):
        loaded = load_model(recipe, directory, ranks, dtype, log.console.info, None if goes_on else run_dir, resumed)
        engine = Engine(ranks, loaded.model, training)
        if recipe.adapter.init_from is not None and resumed is None:  # what a bf16 model holds of it is rounded
            engine.set_trained_values(load_adapter(recipe.adapter.init_from, recipe).trained_values(loaded.model))
        log.model_loaded(asdict(loaded.counts), lambda: held_bytes(loaded.model, engine))
        log.started(loaded.start_errors)
        log.recomputes(loaded.model.model.config, dtype, loaded.recomputation, loaded.fallback)

    if loaded.start is not None and loaded.start.dtype != str(dtype).removeprefix("torch."):
        log.console.warn(
            f"adapter.init_from: it was trained in {loaded.start.dtype}, its base is rounded to {dtype} here"
        )

    samples = data.samples(recipe.evaluation.samples)

    def evaluate(step: int) -> None:
        with log.phase("evaluate"), watchdog.watching():
            asks, final = partial(leave_if_asked, step), step == order.total_steps
            score = task.score(engine, data, ranks, asks, final=final)
        if score is not None:
            log.scored(step, score)

    def answer(when: str, step: int) -> None:
        with log.phase("evaluate", ANSWERING), watchdog.watching():
            asks = partial(leave_if_asked, step)
            answer_samples(engine, samples, when, tokenizer, recipe.evaluation, ranks, asks)

    checkpoints = Checkpoints(run_dir, recipe.checkpoint, is_main=ranks.is_main, warn=log.console.warn)

    def evaluate_mmlu(step: int, limit: int | None = None) -> None:
        asked = mmlu if limit is None else mmlu.first(limit)
        with log.phase("evaluate_mmlu"), watchdog.watching():
            found = score_mmlu(
                engine,
                asked,
                step,
                recipe,
                loaded,
                ranks,
                run_dir,
                log.console,
                again=resumed is None,
                leaves=agreement.to_leave,
            )
        if found is None:
            leave(step)
        log.mmlu_scored(step, asked, found, loaded.model.model.config, whole=limit is None)

    def save(step: int) -> None:
        checkpoints.wait()  # one that the disk refuses fills it until it is given up
        with log.phase("save"):
            path = save_result(run_dir, recipe, loaded, engine, tokenizer, step, writes=ranks.is_main)
        log.console.info(f"saved {path} at step {step}")

    watchdog = Watchdog(ranks.rank, ranks.world_size, recipe.health.hang_seconds)
    engine.on_progress = [watchdog.count, log.advanced]
    call_within_layers(loaded.model.model, log.advanced)
    agreement = Agreement(on_progress=watchdog.count)

    def checkpoint(step: int) -> None:
        state = RunState.of(
            step,
            recipe,
            base_digest=loaded.base_digest,
            data=data_digests(data),
            world_size=ranks.world_size,
            log=log.state(samples),
        )
        with log.phase("save"), watchdog.patient():
            checkpoints.save(state, engine, adapter_info(recipe, loaded, step), loaded.model)

    def leave(step: int) -> None:
        if checkpoints.newest != step:
            checkpoint(step)
        raise Preempted(step)

    def leave_if_asked(step: int) -> None:
        if agreement.to_leave():
            leave(step)

    if recipe.rehearse:
        with log.phase("rehearse_train"), watchdog.watching():
            accumulation = recipe.accumulation(ranks.world_size)
            rehearse_step(engine, largest, accumulation, dtype=dtype, device=ranks.device, world_size=ranks.world_size)
        with log.phase("rehearse_evaluate"), watchdog.watching():
            task.rehearse_scoring(engine, data, ranks)
        with log.phase("rehearse_evaluate", ANSWERING), watchdog.watching():
            prompts = [tokenizer(sample["prompt"])["input_ids"] for sample in samples]
            rehearse_answers(engine, prompts, recipe.evaluation.max_new_tokens, ranks.device)
        if mmlu is not None:
            with log.phase("rehearse_evaluate_mmlu"), watchdog.watching():
                mmlu.rehearse(engine, ranks)
        with log.phase("rehearse_save"):
            rehearse_save(
                run_dir,
                lambda path: save_result(path, recipe, loaded, engine, tokenizer, 0, writes=ranks.is_main),
                more_bytes=checkpoints.more_bytes(loaded.counts.trained),
                is_main=ranks.is_main,
            )
        log.rehearsed()
    # Only now can nothing be refused any more.
    if not goes_on:
        clear_run_directory(run_dir, ranks)
        if loaded.own_base is not None:
            loaded.own_base.place()
    start_step = 0
    if resumed is not None:
        resumed.restore(engine)
        (run_dir / LEFT).unlink(missing_ok=True)
        start_step, samples = resumed.state.step, resumed.state.log["samples"]
        log.resume(resumed.state.log, start_step, resumed.state.world_size)
    checkpoints.newest = start_step

    def mmlu_is_due(step: int) -> bool:
        return mmlu is not None and every(recipe.mmlu.every_steps)(step) and step < order.total_steps

    def evaluate_some_mmlu(step: int) -> None:
        evaluate_mmlu(step, recipe.mmlu.every_steps_limit)

    batches = training_batches(
        data.train.examples,
        order,
        micro_batch_size=training.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start_step,
        collate=task.collate,
    )
    batches = profiled(batches, recipe.profile, run_dir, rank=ranks.rank, device=ranks.device, warn=log.console.warn)
    is_scored = every(training.evaluate_every)
    try:
        leave_if_asked(start_step)  # while it loaded
        if resumed is None and recipe.evaluation.before:
            evaluate(0)
            answer("before", 0)
        if resumed is None and mmlu is not None and recipe.mmlu.before:
            evaluate_mmlu(0)
        if 0 < start_step < order.total_steps:  # what the run may have left in the middle of
            if is_scored(start_step) and resumed.state.held_out_loss is None:
                evaluate(start_step)
            if mmlu_is_due(start_step) and not log.has_mmlu(start_step):
                evaluate_some_mmlu(start_step)
        with log.training(order.total_steps, loaded.flops, product_limit), watchdog.watching():
            train(
                engine,
                batches,
                order.total_steps,
                training,
                device=ranks.device,
                world_size=ranks.world_size,
                max_loss=recipe.health.max_loss or task.highest_sound_loss(loaded.model.model.config),
                on_step=log.stepped,
                on_log=log.trained,
                when=[
                    (is_scored, evaluate),
                    (mmlu_is_due, evaluate_some_mmlu),
                    (
                        lambda step: agreement.saves(ranks.is_main and checkpoints.is_due(step)),
                        lambda step: leave(step) if agreement.leaves else checkpoint(step),
                    ),
                ],
            )
        save(order.total_steps)  # before the checkpoint: where room is short, the result has it
        checkpoint(order.total_steps)
        checkpoints.wait()
        evaluate(order.total_steps)
        answer("after", order.total_steps)
        if mmlu is not None:
            evaluate_mmlu(order.total_steps)
        if recipe.lm_eval.tasks:
            with log.phase("evaluate_lm_eval"):
                found = run_harness(engine, recipe.lm_eval, tokenizer, ranks)
            log.harness_scored(found)
        status = "finished"
    except Diverged as stopped:
        # Weights that gave no sound loss are not worth keeping, and must not replace those that did.
        checkpoints.wait()
        kept_step = stopped.step - 1 if stopped.weights_are_good else None
        if kept_step is None and (last := agreed_checkpoint(ranks, lambda: newest_checkpoint(run_dir, warn))):
            last.restore(engine)
            kept_step = last.state.step
        kept = "nothing was saved (checkpoint.every_steps)"
        if kept_step is not None:
            save(kept_step)
            kept = f"kept is what step {kept_step} gave"
        log.console.warn(f"{stopped}; {kept}")
        status = f"stopped: {stopped}; {kept}"
    except Preempted as left:
        checkpoints.wait()
        if ranks.is_main:
            write_text_whole(run_dir / LEFT, json.dumps(checkpoints.left_at(left.step)))
        log.console.info(f"{left}; the same command goes on")
        stop_ranks(ranks)
        return PREEMPTED

    log.finish(
        status,
        parameters=asdict(loaded.counts),
        optimizer_state_bytes=engine.optimizer_state_bytes(),
        data=data.report(),
        samples=samples,
        model_commit=hub_commit(directory, recipe.model),
    )
    stop_ranks(ranks)
    return 0 if status == "finished" else STOPPED


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
