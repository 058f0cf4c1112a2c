"""MMLU for people: lines of the console, and the report's section, the paper's figure beside ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from lorasp.reporting.paper import paper_row

# hidden size, layers, MLP width. Llama 2 has the same, and takes 4096 tokens.
_SHAPES = {(4096, 32, 11008): "LLaMA-7B", (5120, 40, 13824): "LLaMA-13B"}
_LLAMA_TOKENS = 2048
_CATEGORIES = {"stem": "STEM", "social_sciences": "social sciences"}


def paper_figure(config: PreTrainedConfig, method: str) -> dict[str, Any] | None:
    """`model` and `accuracy` (a share) that the paper gives for this method; None for models that it does not have."""
    shape = tuple(getattr(config, key, None) for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    model = _SHAPES.get(shape)
    if model is None or config.model_type != "llama" or config.max_position_embeddings != _LLAMA_TOKENS:
        return None
    return {"model": model, "accuracy": paper_row(3, model, method).scores["mmlu"] / 100}


def mmlu_line(step: int, score: Mapping[str, Any], shots: int) -> str:
    """The result in a line, of `MmluScore.to_dict()`."""
    parts = [
        f"MMLU, {shots}-shot, step {step}: {_percent(score['micro'])} of {score['micro']['questions']:,} questions"
    ]
    parts.append(f"mean of {len(score['subjects'])} subjects {100 * score['macro']['accuracy']:.1f} %")
    if score["truncated"]:
        parts.append(f"{score['truncated']} prompts lost tokens (mmlu.max_length)")
    if score["dropped_shots"]:
        parts.append(f"{score['dropped_shots']} prompts lost shots (mmlu.max_length)")
    if score["questions_per_second"] is not None:
        parts.append(f"{score['questions_per_second']:.1f} questions/s")
    return ", ".join(parts)


def mmlu_rows(mmlu: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows with the header first) of each table: the course, and the last score by category and subject."""
    last = mmlu["scores"][-1]
    header = ["step", "all questions (%)", "95 % interval", "mean of subjects (%)", "95 % interval", "questions"]
    header += ["lost tokens", "lost shots", "questions/s"]
    course = [
        [
            str(score["step"]),
            *_accuracy_cells(score["micro"]),
            *_accuracy_cells(score["macro"]),
            f"{score['micro']['questions']:,}",
            str(score["truncated"]),
            str(score["dropped_shots"]),
            "–" if score["questions_per_second"] is None else f"{score['questions_per_second']:.2f}",
        ]
        for score in mmlu["scores"]
    ]
    tables = [("", [header, *course])]
    for title, kind in (("by category", "categories"), ("by subject", "subjects")):
        rows = [
            [_CATEGORIES.get(name, name.replace("_", " ")), *_accuracy_cells(its), f"{its['questions']:,}"]
            for name, its in last[kind].items()
        ]
        tables.append((title, [[title.removeprefix("by "), "accuracy (%)", "95 % interval", "questions"], *rows]))
    return tables


def mmlu_note(mmlu: Mapping[str, Any]) -> str:
    """What was asked, and the paper's figure, but of an evaluation without an adapter."""
    asked = mmlu["asked"]
    over_long = {"tokens": "tokens from the left", "shots": "their last shots"}[asked["truncate"]]
    told = (
        f"{asked['shots']} shots of the dev split; {asked['questions']:,} questions of the {asked['split']} split in "
        f"{asked['subjects']} subjects of `{asked['source']}` (SHA-256 {asked['digest'][:12]}); prompt: "
        f"{asked['prompt']}; prompts longer than {asked['max_length']:,} tokens lose {over_long}. Chance is 25 %. "
        f"Intervals are Wilson's; of a mean of subjects, 1.96 standard errors."
    )
    if "paper" not in mmlu:
        return told
    paper = mmlu["paper"]
    if paper is None:
        return f"{told} The paper (Table 3) has no figure for this model."
    return f"{told} The paper (Table 3) has {100 * paper['accuracy']:.1f} % for {paper['model']} by this method."


def _percent(its: Mapping[str, float]) -> str:
    share, low, high = (100 * its[key] for key in ("accuracy", "low", "high"))
    return f"{share:.1f} % ({low:.1f} to {high:.1f})"


def _accuracy_cells(its: Mapping[str, float]) -> Sequence[str]:
    return f"{100 * its['accuracy']:.1f}", f"{100 * its['low']:.1f}–{100 * its['high']:.1f}"
