"""lm-evaluation-harness on the sharded model: any of its tasks, by its own interface (the extra `lm-eval`).

Every rank builds the same requests and is given all of them; which rank computes which is ours to decide, so that all
run as many forwards. To the harness this is one process.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed as dist
from transformers import PreTrainedTokenizerBase

from lorasp.evaluation.mmlu_prompts import encode_texts, model_max_length
from lorasp.evaluation.scoring import ScoredRow, plan_forwards, score_forward
from lorasp.models.kept_states import KeptStates, Link
from lorasp.recipe import LmEval, RecipeError
from lorasp.recipe_errors import shown
from lorasp.zero.engine import Engine
from lorasp.zero.launch import Ranks

_FAMILY_TOKENS = 64  # rows that agree in so many at their beginning are looked through for all that they share
_MOST_NEW_TOKENS = 256  # of an answer, where a task does not say: the harness's
# For the standard errors that have no closed form; of 1,000 draws they are good to 2 %. The harness's own 100,000 take
# minutes of one process.
_BOOTSTRAP_DRAWS = 1000


def check_harness(settings: LmEval) -> None:
    """Raises RecipeError unless the harness is installed, knows the tasks and has, or can download, their data."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("lm_eval.tasks: lm-evaluation-harness is not installed here; pip install 'lorasp[lm-eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=settings.include_path)
    unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
    if unknown:
        raise RecipeError(
            f"lm_eval.tasks: the harness has no task {shown(unknown[0])}; `lm-eval ls tasks` lists what it has, and "
            f"lm_eval.include_path names a directory of your own"
        )
    try:
        manager.load(list(settings.tasks))
    except Exception as error:  # of the hub's client, datasets, Arrow, a task's own code
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise RecipeError(
            f"lm_eval.tasks: the harness cannot load {', '.join(settings.tasks)} "
            f"({type(error).__name__}: {reason:.200})"
        ) from None


def run_harness(engine: Engine, settings: LmEval, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> dict[str, Any]:
    """`version` of the harness and, for each of `tasks` and groups, `metrics`, `standard_errors` and `documents`.

    Collective; the same on each rank. Raises RecipeError where a task asks for sampling, or more than the model takes.
    A metric for which the harness has no standard error is not in `standard_errors`.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    engine.train_mode(False)
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork a process with threads, a GPU and open sockets
    # To itself every rank is the first: only that one is to show progress.
    shown = contextlib.nullcontext() if ranks.is_main else contextlib.redirect_stderr(io.StringIO())
    with shown:
        results = lm_eval.simple_evaluate(
            _sharded_lm(engine, settings, tokenizer, ranks),
            tasks=list(settings.tasks),
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            task_manager=TaskManager(include_path=settings.include_path),
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP_DRAWS if ranks.is_main else 0,  # whose results are those that count
        )
    found = _plain(results) if results is not None else None  # it keeps them from other ranks of a node
    return ranks.gather(found)[0]


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    tasks = {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        tasks[name] = {
            "metrics": {key: value for key, value in numbers.items() if "_stderr" not in key and "," in key},
            "standard_errors": {
                key.replace("_stderr", ""): value for key, value in numbers.items() if "_stderr" in key
            },
            "documents": results.get("n-samples", {}).get(name, {}).get("effective"),
        }
    from importlib import metadata

    return {"version": metadata.version("lm-eval"), "tasks": tasks}


def _sharded_lm(engine: Engine, settings: LmEval, tokenizer: PreTrainedTokenizerBase, ranks: Ranks):
    """A subclass of the harness's `TemplateLM`, made where that is there to be imported."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

    class ShardedLM(TemplateLM):
        """Log-likelihoods and greedy answers; tokens, truncation and stopping as the harness's own HFLM has them."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.max_length = settings.max_length or model_max_length(engine.model.model.config, tokenizer)

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.name_or_path.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            if add_special_tokens is None:
                return encode_texts(tokenizer, [string])[0]
            return tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
            return _log_likelihoods([its[-2:] for its in requests], self.max_length, engine, settings.tokens, ranks)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for owner, request in enumerate(requests):
                rolling = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for window in map(utils.make_disjoint_window, rolling):
                    windows.append((None, *window))
                    owners.append(owner)
            sums = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                sums[owner] += value
            return sums

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            eos = tokenizer.decode(self.eot_token_id)
            asked = []
            for request in requests:
                context, given = request.args
                kwargs = normalize_gen_kwargs(given, _MOST_NEW_TOKENS)
                if kwargs.get("do_sample"):
                    raise RecipeError(
                        f"lm_eval.tasks: {request.task_name} samples its answers (do_sample), and here they are "
                        f"greedy; leave it out"
                    )
                most = kwargs["max_gen_toks"]
                if most >= self.max_length:
                    raise RecipeError(
                        f"lm_eval.max_length: {request.task_name} lets an answer have {most} tokens, and the model "
                        f"takes {self.max_length} with the prompt"
                    )
                tokens = self.tok_encode(context)[-(self.max_length - most) :]
                asked.append((tokens, most, handle_stop_sequences(kwargs.get("until"), eos=eos)))
            written = _greedy(asked, tokenizer, engine, settings.tokens, ranks)
            return [
                postprocess_generated_text(text, stop, None) for text, (_, _, stop) in zip(written, asked, strict=True)
            ]

    return ShardedLM()


def _log_likelihoods(
    pairs: Sequence[tuple[list[int], list[int]]], max_length: int, engine: Engine, tokens: int, ranks: Ranks
) -> list[tuple[float, bool]]:
    """Of each continuation after its context: (nats, whether greedy decoding would write it). Collective."""
    _check_alike(pairs, ranks)
    # What differs in the last token only is one row.
    rows: dict[tuple[tuple[int, ...], int], dict[tuple[int, ...], None]] = {}
    where = []
    for context, continuation in pairs:
        if len(continuation) > max_length:
            raise RecipeError(
                f"lm_eval.max_length: a continuation has {len(continuation)} tokens, the model takes {max_length}"
            )
        key = ((*context, *continuation[:-1])[-max_length:], len(continuation))
        rows.setdefault(key, {})[tuple(continuation)] = None
        where.append((key, tuple(continuation)))
    scored = [ScoredRow(its, tuple(found), its[:_FAMILY_TOKENS]) for (its, _), found in rows.items()]
    found: dict[tuple[int, tuple[int, ...]], tuple[float, bool]] = {}
    states = KeptStates()
    mine = []
    for forward in plan_forwards(scored, world_size=ranks.world_size, tokens=tokens)[ranks.rank]:
        mine += score_forward(engine, forward, scored, states, ranks.device)
    for row, values in (pair for its in ranks.gather(mine) for pair in its):
        found |= {(row, c): v for c, v in zip(scored[row].continuations, values, strict=True)}
    places = {key: row for row, key in enumerate(rows)}
    return [found[places[key], continuation] for key, continuation in where]


def _greedy(
    asked: Sequence[tuple[list[int], int, list[str]]],
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    tokens: int,
    ranks: Ranks,
) -> list[str]:
    """The text that greedy decoding writes after each prompt, up to where it holds a stop. Collective.

    asked: prompt, most new tokens, stops. A rank writes as many at once as have `tokens` tokens together.
    """
    _check_alike(asked, ranks)
    written: list[tuple[int, str]] = []
    queue = sorted(range(len(asked)), key=lambda i: -len(asked[i][0]))[ranks.rank :: ranks.world_size]
    batches = list(_batches(queue, asked, tokens))
    for number in range(max(ranks.gather(len(batches)))):
        batch = batches[number] if number < len(batches) else []
        written += _write(batch, asked, tokenizer, engine, ranks)
    texts = dict(pair for its in ranks.gather(written) for pair in its)
    return [texts[i] for i in range(len(asked))]


def _batches(queue: Sequence[int], asked: Sequence[tuple[list[int], int, list[str]]], tokens: int) -> Iterator[list]:
    batch, held = [], 0
    for i in queue:
        room = len(asked[i][0]) + asked[i][1]
        if batch and held + room > tokens:
            yield batch
            batch, held = [], 0
        batch.append(i)
        held += room
    if batch:
        yield batch


@torch.no_grad()
def _write(
    batch: Sequence[int],
    asked: Sequence[tuple[list[int], int, list[str]]],
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    ranks: Ranks,
) -> list[tuple[int, str]]:
    """Token by token, each prompt's keys and values kept; ranks whose answers are whole go on until all are."""
    states, device = KeptStates(), ranks.device
    answers: dict[int, list[int]] = {i: [] for i in batch}
    texts = dict.fromkeys(batch, "")
    open_ = list(batch)
    while True:
        flag = torch.tensor(bool(open_), dtype=torch.int32, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not flag:
            return list(texts.items())
        parts = [answers[i][-1:] or asked[i][0] for i in open_] or [[0]]
        lengths = tuple(map(len, parts))
        links = [Link(i, keeps=True, room=len(asked[i][0]) + asked[i][1]) for i in open_] or [Link()]
        starts = states.begin(links, lengths)
        logits = engine(
            input_ids=torch.tensor([[token for part in parts for token in part]], device=device),
            position_ids=torch.cat(
                [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
            )[None].to(device),
            example_lengths=lengths,
            positions=(torch.tensor(lengths).cumsum(0) - 1).to(device),
            kept_states=states,
        )
        for i, token in zip(list(open_), logits.argmax(-1).tolist(), strict=False):
            answers[i].append(token)
            texts[i] = tokenizer.decode(answers[i], skip_special_tokens=True)
            spelled = tokenizer.decode(answers[i])  # a stop may be the end of sequence
            if len(answers[i]) == asked[i][1] or any(stop and stop in spelled for stop in asked[i][2]):
                open_.remove(i)
                states.drop([i])


def _check_alike(requests: Any, ranks: Ranks) -> None:
    """Raises RecipeError unless all ranks ask the same: they would wait for one another for ever."""
    digests = ranks.gather(hashlib.sha256(repr(requests).encode()).hexdigest())
    if len(set(digests)) > 1:
        raise RecipeError("lm_eval.tasks: the ranks built other requests from a task; install the same on every node")
