"""A few greedy answers of the sharded model, for people to read."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist

from lorasp.zero.engine import Engine


@torch.no_grad()
def greedy_answers(
    engine: Engine,
    prompts: list[list[int]],
    *,
    eos: int,
    max_new_tokens: int,
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The tokens that greedy decoding writes after each prompt, without the end of sequence.

    Every rank decodes all prompts, so that the forwards, and with them ZeRO-3's gathers, stay in step; rank 0's
    choices count. Each prompt has a token at least. They are recomputed at each token: right for a handful of short
    answers, not for a benchmark. before_batch: called on all ranks before each forward; what it raises ends it.
    """
    engine.train_mode(False)
    answers: list[list[int]] = [[] for _ in prompts]
    open_ = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not open_:
            break
        before_batch()
        chosen = next_token_logits(engine, [prompts[i] + answers[i] for i in open_], device).argmax(-1)
        dist.broadcast(chosen, 0)
        for i, token in zip(open_, chosen.tolist(), strict=True):
            answers[i].append(token)
        open_ = [i for i in open_ if answers[i][-1] != eos]
    return [answer[:-1] if answer and answer[-1] == eos else answer for answer in answers]


@torch.no_grad()
def next_token_logits(engine: Engine, rows: list[list[int]], device: torch.device) -> Tensor:
    """[rows, vocabulary]: logits of the token that follows each row. Collective."""
    lengths = tuple(map(len, rows))
    return engine(
        input_ids=torch.tensor([sum(rows, [])], device=device),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device),
        example_lengths=lengths,
        positions=(torch.tensor(lengths).cumsum(0) - 1).to(device),
    )
