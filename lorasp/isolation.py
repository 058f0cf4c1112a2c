"""Whether examples of a row see nothing of each other, nor a token what follows it: a loss of rows rests on that.

An architecture whose code passes nobody the lengths of examples, or that sees both ways, would train all the same, and
score, with other numbers.
"""

import torch
from torch import Tensor

from lorasp.models.causal_lm import CausalLM
from lorasp.recipe import RecipeError
from lorasp.zero.engine import Engine

_BEFORE, _OWN = 8, 4  # tokens
# Of the logits' norm: what another order of sums makes of it. In 16 bits a router of experts may choose others too, at
# a token or two: the median counts.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@torch.no_grad()
def check_isolation(engine: Engine, dtype: torch.dtype, device: torch.device) -> None:
    """Compares an example's logits behind another one with those of it alone, with another last token. Collective.

    Raises RecipeError where they differ. Only of a causal language model.
    """
    if not isinstance(engine.model, CausalLM):
        return
    config = engine.model.model.config
    tokens = torch.randint(config.get_text_config().vocab_size, (_BEFORE + _OWN + 1,), generator=_generator()).tolist()
    before, own, last = tokens[:_BEFORE], tokens[_BEFORE:-1], tokens[-1:]
    engine.train_mode(False)
    behind = _logits(engine, [before, own], device)
    alone = _logits(engine, [own[:-1] + last], device)
    difference = float(((behind - alone).norm(dim=1) / alone.norm(dim=1)).median())
    if difference > _ROUNDING[dtype]:  # NaN is damaged weights', of which the rehearsal tells
        raise RecipeError(
            f"model.path: with {config.model_type} the examples of a row see each other, or a token what follows it "
            f"(logits differ by {difference:.0%} of their norm): its loss would be another; it is not supported"
        )


def _logits(engine: Engine, rows: list[list[int]], device: torch.device) -> Tensor:
    """fp32 [tokens, vocabulary], around their mean: of the last row's tokens but its last."""
    lengths = tuple(map(len, rows))
    logits = engine(
        input_ids=torch.tensor([sum(rows, [])], device=device),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device),
        example_lengths=lengths,
        positions=torch.arange(sum(lengths) - lengths[-1], sum(lengths) - 1, device=device),
    ).float()
    return logits - logits.mean(1, keepdim=True)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
