"""Answers of a model that is whole on one process: with a cache of keys and values, written as they come."""

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from lorasp.data.alpaca import format_prompt
from lorasp.data.examples import prompt_ids
from lorasp.models.causal_lm import CausalLM
from lorasp.recipe import RecipeError

# Of transformers' implementations the one that keeps a cache; `ATTENTION` computes whole examples.
CACHED_ATTENTION = "sdpa"


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, format: str, input: str = "") -> list[int]:
    """The tokens of `text` as training saw prompts; format: as `FinishedRun.prompt_format` gives it.

    input: the second field of Alpaca's rows. Raises RecipeError for "chat" where the tokenizer has no template, and
    for a prompt that has no token.
    """
    if format == "chat":
        if not tokenizer.chat_template:
            raise RecipeError("the tokenizer has no chat template; give --template alpaca, short or none")
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    elif format != "none":
        text = format_prompt({"instruction": text, "input": input}, format)
    tokens = prompt_ids(tokenizer, text.rstrip(" "), format)  # spaces before a response are the response's
    if not tokens:
        raise RecipeError(
            "the prompt is empty, and this tokenizer puts no token before a text; give a word to begin with"
        )
    return tokens


def generate_answer(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    streams: bool,
) -> list[int]:
    """The tokens that follow `prompt`, without the end of sequence; printed on the way where it `streams`.

    model: built with `CACHED_ATTENTION`. temperature: 0 takes the likeliest token.
    """
    ids = torch.tensor([prompt], device=model.model.device)
    # Training ends a response with the tokenizer's EOS; a chat model's turn may end with another of the model's.
    known = model.model.config.eos_token_id
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id,
        **how,
    )
    # Otherwise the base's own defaults, such as a temperature, would fill what is not said here.
    model.model.generation_config = settings
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    written = model.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer)
    answer = written[0, ids.shape[1] :].tolist()
    return answer[:-1] if answer and answer[-1] in ends else answer
