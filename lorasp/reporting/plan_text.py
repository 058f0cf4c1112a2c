"""A memory plan as text: Markdown tables that a terminal shows as well."""

from collections.abc import Mapping, Sequence

import torch

from lorasp.memory import gib
from lorasp.planning import Plan
from lorasp.recipe import Recipe


def format_plans(recipe: Recipe, plans: Mapping[str, Plan], dtype: torch.dtype, limit_bytes: int | None = None) -> str:
    """One table of all methods (the recipe's own first), in GiB a rank, and whether the recipe's fits into the limit.

    limit_bytes: of one rank; None where it is not known.
    """
    own = next(iter(plans.values()))
    precision = str(dtype).removeprefix("torch.")
    lines = [
        f"planned peak of each of {own.world_size} rank(s), GiB: {recipe.model.path}, {precision}, micro batch "
        f"{recipe.training.micro_batch_size} × {recipe.data.max_length} tokens, "
        f"activations {recipe.training.activation_checkpointing}",
        "",
        f"| phase | part | {' | '.join(plans)} |",
        f"| --- | --- |{' ---: |' * len(plans)}",
    ]
    for phase in own.phases:
        for part in dict.fromkeys(part for plan in plans.values() for part in plan.phases[phase]):
            cells = " | ".join(gib(plan.phases[phase].get(part, 0)) for plan in plans.values())
            lines.append(f"| {phase} | {part.replace('_', ' ')} | {cells} |")
        total = " | ".join(f"**{gib(plan.peak(phase))}**" for plan in plans.values())
        lines.append(f"| {phase} | **peak** | {total} |")
    if limit_bytes is not None:
        lines.append("")
        if own.highest <= limit_bytes:
            lines.append(f"fits into {gib(limit_bytes)} GiB, with {gib(limit_bytes - own.highest)} GiB to spare")
        else:
            lines.append(
                f"does not fit into {gib(limit_bytes)} GiB: {gib(own.highest - limit_bytes)} GiB too much; "
                f"--fit shows what does"
            )
    return "\n".join(lines)


def format_whole_base(sharded: Plan, whole: Plan, limit_bytes: int | None = None) -> str:
    """When ZeRO's stage 2 is the better choice: each rank then holds the base `whole`, and receives none of it."""
    told = (
        f"each rank receives {gib(sharded.received_bytes)} GiB of shards a micro batch; deepspeed.config=zero2.json "
        f"keeps the base whole on each and receives none, at a planned peak of {gib(whole.highest)} GiB"
    )
    if limit_bytes is None:
        return f"{told}: the better choice where that fits"
    return f"{told}: {'it fits, and is the faster choice' if whole.highest <= limit_bytes else 'it does not fit'}"


def format_sweep(plans: Mapping[int, Mapping[int, Plan]]) -> str:
    """Peaks in GiB by length (rows) and ranks (columns)."""
    ranks = list(next(iter(plans.values())))
    lines = [
        "planned peak of a rank (GiB), by tokens a row and number of ranks",
        "",
        f"| max_length | {' | '.join(f'{n} rank(s)' for n in ranks)} |",
        f"| ---: |{' ---: |' * len(ranks)}",
    ]
    for length, of_ranks in plans.items():
        lines.append(f"| {length} | {' | '.join(gib(of_ranks[n].highest) for n in ranks)} |")
    return "\n".join(lines)


def fits(found: Sequence[tuple[list[str], Plan]], limit_bytes: int) -> str:
    """The overrides that fit, one line each."""
    if not found:
        return (
            f"nothing fits into {gib(limit_bytes)} GiB: take more ranks, a smaller data.max_length or mmlu.tokens, or "
            f"a smaller model"
        )
    lines = [f"fits into {gib(limit_bytes)} GiB, the fastest first:"]
    lines += [f"  {' '.join(overrides)}  # planned {gib(plan.highest)} GiB" for overrides, plan in found]
    return "\n".join(lines)
