"""What a recipe will hold at most on each rank, by phase and part, before anything is loaded; no GPU, no weights.

python launch/plan.py recipes/llama13b_alpaca.yaml --world-size 8 --gpu-memory 24GiB
python launch/plan.py recipes/llama13b_alpaca.yaml --world-size 2 --fit 24GiB
python launch/plan.py recipes/llama13b_alpaca.yaml --sweep sweep.png

Planned, not measured: bytes of tensors. Leave 1.5 GiB of a GPU for CUDA's context and NCCL.
"""

import gc
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import argument_parser, refuse_several_processes, run_reporting_errors
from lorasp.recipe import RecipeError
from lorasp.recipe_loading import load_recipe

_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SWEPT = (1, 2, 4, 8, 16)
DOES_NOT_FIT = 1


def main() -> int:
    refuse_several_processes()
    parser = argument_parser(__doc__)
    parser.add_argument("recipe", help="a YAML file of recipes/, or your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    parser.add_argument("--world-size", type=int, default=1, help="ranks, over all machines")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of one rank: tells whether it fits")
    parser.add_argument("--fit", metavar="SIZE", help="which settings fit into that, the fastest first")
    parser.add_argument("--sweep", metavar="FILE.png", help="the peak against ranks and length, also as a picture")
    parser.add_argument("--cpu", action="store_true", help="in float32, as ranks without a GPU compute")
    options = parser.parse_intermixed_args()
    if options.world_size < 1:
        raise RecipeError("--world-size: a run has at least one rank")
    limit, fit = (None if size is None else _bytes(size) for size in (options.gpu_memory, options.fit))
    picture = None if options.sweep is None else Path(options.sweep)
    if picture is not None and picture.suffix != ".png":
        raise RecipeError(f"--sweep: {picture} is no name of a picture; write one that ends in .png")
    recipe = load_recipe(options.recipe, options.overrides)
    if fit is None or recipe.training.global_batch_size % options.world_size:  # --fit tries micro batches that divide
        recipe.accumulation(options.world_size)  # refuses a batch that does not
    recipe = recipe.on_ranks(options.world_size)

    gc.disable()  # imports make a million objects, which all stay: looking through them would take most of a second
    import torch

    from lorasp.models.weights import load_config, locate_model
    from lorasp.planning import as_method, plan, plans_that_fit, with_whole_base
    from lorasp.reporting.plan_text import fits, format_plans, format_sweep, format_whole_base
    from lorasp.tracing import NoPlan, Traces

    config = load_config(locate_model(recipe.model, weights=False), recipe.model)
    asked = recipe.model.dtype
    dtype = getattr(torch, asked) if asked != "auto" else torch.float32 if options.cpu else torch.bfloat16
    how = {"world_size": options.world_size, "dtype": dtype, "device": "cpu" if options.cpu else "cuda"}
    methods = dict.fromkeys((recipe.method, "lorasp", "lora", "full"))
    traces = {method: Traces() for method in methods}
    try:
        plans = {method: plan(as_method(recipe, method), config, **how, traces=traces[method]) for method in methods}
    except NoPlan as reason:
        raise RecipeError(f"model.path: {reason}") from None
    print(format_plans(recipe, plans, dtype, limit))
    own_traces = traces[recipe.method]
    if (own := plans[recipe.method]).received_bytes:
        whole = plan(with_whole_base(recipe), config, **how, traces=own_traces)
        print(f"\n{format_whole_base(own, whole, limit)}")
    if picture is not None:
        from lorasp.reporting.plots import draw_sweep

        lengths = sorted({max(1, recipe.data.max_length // 2), recipe.data.max_length, 2 * recipe.data.max_length})
        swept = {}
        for length in lengths:
            longer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})
            swept[length] = {n: plan(longer, config, **how | {"world_size": n}, traces=own_traces) for n in _SWEPT}
        print(f"\n{format_sweep(swept)}")
        try:
            draw_sweep({n: {ranks: its.highest for ranks, its in of.items()} for n, of in swept.items()}, picture)
        except OSError as error:
            raise RecipeError(f"--sweep: {picture} cannot be written ({error.strerror}); name another place") from None
        print(f"\ndrawn: {picture}")
    if fit is not None:
        found = list(plans_that_fit(recipe, config, limit_bytes=fit, **how))
        print(f"\n{fits(found, fit)}")
        return 0 if found else DOES_NOT_FIT
    too_large = limit is not None and plans[recipe.method].highest > limit
    return DOES_NOT_FIT if too_large else 0


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in _UNITS:
        raise RecipeError(f"{text!r} is no size; write 24GiB, or 24GB")
    return int(float(found[1]) * _UNITS[found[2]])


if __name__ == "__main__":
    code = run_reporting_errors(main)
    sys.stdout.flush()
    os._exit(code)  # taking apart what was imported would take a second
