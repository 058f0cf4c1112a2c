"""A report for people, out of its plain data (run_report.py): `report.md`, and the console's table of peaks.

Every header names its unit; what is a remainder is called one.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lorasp.glue import GLUE
from lorasp.memory import NOT_RESIDENT, WORKSPACE, gib, mib
from lorasp.reporting.markdown import table
from lorasp.reporting.mmlu_text import mmlu_note, mmlu_rows

_METHODS = {"lorasp": "LoRA-SP", "lora": "LoRA", "full": "full fine-tuning"}
# What plots.py draws, in words for those who do not see it.
_PICTURES = {
    "loss": "loss of the training batches and of the held-out rows by optimizer step",
    "memory": "memory of each rank over time, by phase",
    "memory_parts": "what the peak of each rank in each phase consists of",
    "throughput": "tokens a second and seconds a step by optimizer step",
}
_LONGEST_CELL = 240  # characters of a prompt or an answer
_HISTORY_ROWS = 10
# (how a number's name ends, its unit for people, what to multiply it by)
_UNITS = (
    ("exact_match", "%", 100.0),
    ("accuracy", "%", 100.0),
    ("tokens_per_second", "tokens/s", 1.0),
    ("seconds", "s", 1.0),
    ("gib", "GiB", 1.0),
)


def format_peaks(report: Mapping[str, Any]) -> str:
    """The console's table of peaks at a run's end. Needs `report["phases"]` alone: it serves a dying run as well."""
    header = ("phase", "rank", "peak above baseline (GiB)", "in all (GiB)", "seconds")
    rows = [
        (name, str(rank["rank"]), gib(rank["peak_bytes"]), gib(rank["peak_total_bytes"]), _number(rank["seconds"]))
        for name, phase in report["phases"].items()
        for rank in phase["ranks"]
    ]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        left = row[0].ljust(widths[0])
        lines.append("  ".join([left, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]))
    return "\n".join([f"peak memory, by {', '.join(_sources(report))}", *lines])


def render_markdown(report: Mapping[str, Any], plots: Mapping[str, PurePath] | None = None) -> str:
    """The report as Markdown: the result first, what made it last. Every header names its unit.

    plots: the pictures of `plots.draw_plots` that there are, by name, relative to the report.
    """
    pictures = {name: f"![{_PICTURES[name]}]({path.as_posix()})" for name, path in (plots or {}).items()}
    sections = [
        f"# {report['name']}: {_headline(report)}",
        _method_line(report),
        "" if _is_evaluation(report) else _parameters_line(report["parameters"]),
    ]
    if report["status"] != "finished":
        sections.insert(
            1, f"**The run {_inline(' '.join(report['status'].split()))}.** What follows is what it reached."
        )
    sections += _metrics_section(report)
    sections += _splits_section(report)
    sections += _translations_section(report.get("reported", {}))
    sections.append(pictures.get("loss", ""))
    sections += _mmlu_section(report.get("mmlu"))
    sections += _lm_eval_section(report.get("lm_eval"))
    sections += _samples_section(report)
    sections += _memory_section(report, pictures)
    sections += _throughput_section(report["throughput"])
    sections.append(pictures.get("throughput", ""))
    sections += _history_section(report["history"], loss_unit(report["recipe"]))
    sections += _data_section(report["data"])
    sections += _origin_section(report)
    return "\n\n".join(section for section in sections if section) + "\n"


def _is_evaluation(report: Mapping[str, Any]) -> bool:
    """Whether nothing was trained: it scored a model that was there."""
    return "train" not in report["phases"]


def _held_out_loss(report: Mapping[str, Any]) -> str:
    """What `held_out_loss` is called: a classifier's is the selection rows' where it has some, its score is not."""
    is_of_others = "selection" in report and "majority" in report["selection"]
    return "loss of the selection rows" if is_of_others else "held-out loss"


def _headline(report: Mapping[str, Any]) -> str:
    metrics = report["metrics"]
    parts = []
    for name, text, scale, places, unit in (
        ("exact_match", "held-out exact match", 100, 1, " %"),
        ("held_out_loss", _held_out_loss(report), 1, 3, ""),
    ):
        before, after = metrics.get(f"{name}_before"), metrics.get(f"{name}_after", metrics.get(name))
        if after is not None:
            values = (f"{value * scale:.{places}f}{unit}" for value in (before, after) if value is not None)
            parts.append(f"{text} {' → '.join(values)}")
    reported = report.get("reported", {})
    if "majority" in reported:
        name = reported["metric"]
        keys = (f"{name}_before", f"{name}_after", name)
        values = (f"{metrics[key]:.3f}" for key in keys if metrics.get(key) is not None)
        parts.insert(0, f"{name} {' → '.join(values)}")
    return ", ".join(parts) or report["status"].partition(":")[0]


def _method_line(report: Mapping[str, Any]) -> str:
    recipe, parts = report["recipe"], []
    what, model = f"**{_METHODS[recipe['method']]}**", f"`{recipe['model']['path']}`"
    has_adapter = recipe["method"] != "full"
    if _is_evaluation(report):
        start = recipe["adapter"]["init_from"]
        what, has_adapter = "**Evaluation**", start is not None
        if has_adapter:
            model += f" with the {_METHODS[recipe['method']]} adapter of `{start}`"
    if has_adapter:
        adapter = recipe["adapter"]
        parts.append(f"rank {adapter['rank']}, alpha {adapter['alpha']:g}")
    if has_adapter and recipe["method"] == "lorasp":
        selection = recipe["selection"]
        parts.append(f"{selection['strategy']} selection of {selection['fraction']:g} of the entries")
    quantization = recipe["quantization"]
    if quantization["format"] == "none":
        parts.append("base not quantized")
    else:
        double = " with double quantization" if quantization["double_quant"] else ""
        parts.append(f"base in {quantization['format'].upper()}{double}")
    ranks = "1 rank" if report["world_size"] == 1 else f"{report['world_size']} ranks"
    parts.append(f"{ranks} on {_inline(report['device'])}")
    return f"{what} of {model}: {'; '.join(parts)}."


def _parameters_line(parameters: Mapping[str, int]) -> str:
    if not parameters:
        return ""
    share = 100 * parameters["trained"] / parameters["total"]
    return (
        f"{parameters['trained']:,} of {parameters['total']:,} parameters were trained ({share:.2f} %); "
        f"the optimizer's state holds {gib(parameters['optimizer_state_bytes'])} GiB over all ranks."
    )


def loss_unit(recipe: Mapping[str, Any]) -> str:
    """What the loss of the recipe's task is counted in."""
    task = recipe.get("task", "causal_lm")
    if task not in GLUE:
        return "nats a token"
    return "squared error" if GLUE[task].is_regression else "nats a row"


def _splits_section(report: Mapping[str, Any]) -> list[str]:
    """Of a classifier: each set that was scored, beside who always answers the same. A text's are above already."""
    rows = [
        (
            _words(name),
            f"**{metric}**" if metric == split["metric"] else _words(metric),
            _number(value),
            _number(split["majority"].get(metric)),
            f"{split['count']:,}",
        )
        for name in ("selection", *(name for name in report if name.startswith("reported")))
        for split in [report.get(name, {})]
        if "majority" in split
        for metric, value in split["metrics"].items()
    ]
    if not rows:
        return []
    told = "The majority answers every row with the commonest label of the training rows (scores: with their mean)."
    if "selection" in report:
        told += " Settings are to be chosen on the selection rows, which are of train and were not trained."
    return ["## Scores", told, table(("rows", "metric", "score", "majority's", "count"), rows, "llrrr")]


def _metrics_section(report: Mapping[str, Any]) -> list[str]:
    metrics, unit = report["metrics"], loss_unit(report["recipe"])
    header = ("metric", "value") if _is_evaluation(report) else ("metric", "before training", "after training")
    names = dict.fromkeys(name.removesuffix("_before").removesuffix("_after") for name in metrics)
    rows = []
    for name in names:
        if f"{name}_before" in metrics or f"{name}_after" in metrics:
            before, after = metrics.get(f"{name}_before"), metrics.get(f"{name}_after")
        else:
            before, after = None, metrics[name]
        label, scale = _label(name, unit)
        if name == "held_out_loss":
            label = label.replace(_words(name), _held_out_loss(report))
        cells = ["–" if value is None else _number(value * scale) for value in (before, after)]
        rows.append((label, *cells[-len(header) + 1 :]))
    return ["## Results", table(header, rows, "lrr"[: len(header)])] if rows else []


def _translations_section(reported: Mapping[str, Any]) -> list[str]:
    if "bleu_signature" not in reported:
        return []
    return [
        f"BLEU is sacrebleu's, `{reported['bleu_signature']}`, of {reported['count']:,} sentences; ROUGE is "
        f"rouge-score's mean F1 in %, without stemming, which cuts words at letters outside a to z. The translations "
        f"are in `translations.txt`."
    ]


def _mmlu_section(mmlu: Mapping[str, Any] | None) -> list[str]:
    if mmlu is None:
        return []
    sections = ["## MMLU", mmlu_note(mmlu)]
    for title, (header, *rows) in mmlu_rows(mmlu):
        sections += [f"### {title.capitalize()}"] if title else []
        sections.append(table(header, rows, ("r" if not title else "l") + "r" * (len(header) - 1)))
    return sections


def _lm_eval_section(results: Mapping[str, Any] | None) -> list[str]:
    """Every number as the harness names it; its own standard error beside it."""
    if results is None:
        return []
    rows = [
        (task, metric, _number(value), _number(errors.get(metric)))
        for task, its in results["tasks"].items()
        for errors in [its["standard_errors"]]
        for metric, value in its["metrics"].items()
    ]
    header = ("task", "metric", "value", "standard error")
    return [f"## lm-evaluation-harness {results['version']}", table(header, rows, "llrr")]


def _samples_section(report: Mapping[str, Any]) -> list[str]:
    samples = report["samples"]
    if not samples:
        return []
    keys = {"prompt": "prompt", "expected": "expected"}
    keys |= (
        {"answer": "answer"} if _is_evaluation(report) else {"before": "before training", "after": "after training"}
    )
    rows = [[_cell(sample.get(key, "")) for key in keys] for sample in samples]
    return ["## Sample answers", table(tuple(keys.values()), rows, "l" * len(keys))]


def _memory_section(report: Mapping[str, Any], pictures: Mapping[str, str]) -> list[str]:
    phases = report["phases"]
    if not phases:
        return []
    ranks = [(name, rank) for name, phase in phases.items() for rank in phase["ranks"]]
    header = ["phase", "rank", "time (s)", "peak above baseline (GiB)", "planned: tensors of the worst rank (GiB)"]
    header += ["peak in all (GiB)", "baseline (GiB)"]
    planned = {name: gib(sum(parts.values())) for name, parts in report.get("planned", {}).items()}
    columns = ["peak_bytes", "peak_total_bytes", "baseline_bytes"]
    if any(rank["reserved_bytes"] is not None for _, rank in ranks):
        header.append("reserved by the allocator, peak (GiB)")
        columns.append("reserved_bytes")
    if any(rank["anonymous_bytes_end"] is not None for _, rank in ranks):
        header += ["anonymous at the end (GiB)", "file-backed at the end (GiB)"]
        columns += ["anonymous_bytes_end", "file_bytes_end"]
    rows = [
        (
            name,
            str(rank["rank"]),
            _number(rank["seconds"]),
            gib(rank["peak_bytes"]),
            planned.get(name, "–"),
            *("–" if rank[column] is None else gib(rank[column]) for column in columns[1:]),
        )
        for name, rank in ranks
    ]
    parts = [
        "## Peak memory",
        f"Measured by {_inline(', '.join(_sources(report)))}. The baseline is what the process held before the model: "
        "libraries and data.",
        pictures.get("memory", ""),
        table(header, rows, "l" + "r" * (len(header) - 1)),
    ]
    if first := report["recipe"]["profile"]["first_step"]:
        parts.append(f"From step {first} on what was measured holds the profiler's own memory too.")
    if drift := report.get("drift"):
        told = "; ".join(
            f"rank {its['rank']} {its['share']:+.1%} (step {its['most_at_step']}, {gib(its['most_bytes'])} GiB)"
            for its in drift
        )
        parts.append(f"Held between steps, most after step {drift[0]['from_step']} against then: {told}.")

    names = list(dict.fromkeys(part for _, rank in ranks for part in rank["breakdown"]))
    for last in (WORKSPACE, NOT_RESIDENT):  # at the end also where the first phase has fewer parts than the others
        if last in names:
            names.remove(last)
            names.append(last)
    labels = {WORKSPACE: "workspace, the remainder (MiB)", NOT_RESIDENT: "counted but not resident (MiB)"}
    header = ["phase", "rank", *(labels.get(name, f"{_words(name)} (MiB)") for name in names), "peak (MiB)"]
    rows = [
        (
            name,
            str(rank["rank"]),
            *(mib(rank["breakdown"][part]) if part in rank["breakdown"] else "–" for part in names),
            mib(rank["peak_bytes"]),
        )
        for name, rank in ranks
    ]
    parts += [
        "### What the peaks above the baseline consist of",
        "Parts are counted from the tensors that a rank holds. The workspace is what remains of the peak: "
        "activations, buffers, libraries loaded in that phase, and what the allocator keeps.",
        pictures.get("memory_parts", ""),
        table(header, rows, "l" + "r" * (len(header) - 1)),
    ]
    return parts


def _throughput_section(throughput: Mapping[str, Any]) -> list[str]:
    labels = {
        "real_tokens_per_second": "real tokens (tokens/s, all ranks)",
        "computed_tokens_per_second": "computed tokens, padding included (tokens/s, all ranks)",
        "step_seconds_median": "optimizer step, median (s)",
        "mfu": "MFU: share of the ranks' measured matrix-product limit that the model needs for its real tokens",
    }
    rows = [(labels.get(name, _words(name)), _number(value)) for name, value in throughput.items() if name != "ranks"]
    sections = ["## Throughput", table(("measure", "value"), rows, "lr")] if rows else []
    if ranks := throughput.get("ranks"):
        sections += [
            "Seconds of a step by part, medians. gather and reduce include waiting for the slowest rank; compute is "
            "the rest.",
            table(
                tuple(ranks[0]), [[_number(value) for value in rank.values()] for rank in ranks], "r" * len(ranks[0])
            ),
        ]
    return sections


def _history_section(history: Sequence[Mapping[str, float]], loss_unit: str) -> list[str]:
    if not history:
        return []
    count = min(len(history), _HISTORY_ROWS)
    last = len(history) - 1
    chosen = [history[round(i * last / max(1, count - 1))] for i in range(count)]
    # The ranks' memory curves would need a column each; TensorBoard has them.
    names = [name for name in dict.fromkeys(n for row in history for n in row) if not name.startswith("memory/")]
    labels = {name: _label(name, loss_unit) for name in names}
    rows = []
    for row in chosen:
        values = ((row.get(name), labels[name][1]) for name in names)
        # int * float would show step 10 as 10.00
        rows.append([_number(value * scale if isinstance(value, float) else value) for value, scale in values])
    header = [labels[name][0] for name in names]
    note = f"{count} of {len(history)} log points; all are in `report.json`." if count < len(history) else ""
    return ["## Course of training", note, table(header, rows, "r" * len(names))]


def _data_section(data: Mapping[str, Any]) -> list[str]:
    """A column for each data set."""
    names = list(dict.fromkeys(name for described in data.values() for name in described))
    rows = [(_words(name), *(_cell(_value(described.get(name, ""))) for described in data.values())) for name in names]
    header = ("property", *(_words(kind) for kind in data))
    return ["## Data", table(header, rows, "l" * len(header))] if rows else []


def _origin_section(report: Mapping[str, Any]) -> list[str]:
    rows = [(_words(name), _cell(_value(value))) for name, value in report["versions"].items()]
    if "model_commit" in report:
        rows.insert(0, (f"commit of {report['recipe']['model']['path']}", report["model_commit"]))
    return [
        "## What made this",
        f"```\n{report['command']}\n```",
        table(("component", "version or value"), rows, "ll"),
        "The resolved recipe is in `report.json`.",
    ]


def _sources(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(rank["source"] for phase in report["phases"].values() for rank in phase["ranks"]))


def _cell(text: str) -> str:
    """Text of data or a model as one table cell: shown literally, line breaks kept, cut where it is very long."""
    text = text.strip()
    if len(text) > _LONGEST_CELL:
        text = text[: _LONGEST_CELL - 1] + "…"
    return _inline(text).replace("\r", "").replace("\n", "<br>")


def _inline(text: str) -> str:
    # An underscore within a word emphasizes nothing in GitHub's Markdown.
    text = re.sub(r"[\\`*\[\]|~]|\b_|_\b", lambda match: f"\\{match[0]}", text)
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _words(name: str) -> str:
    return name.replace("held_out", "held-out").replace("_", " ").replace("/", " ")


def _label(name: str, loss_unit: str) -> tuple[str, float]:
    """The header of a number named `name`, with its unit, and the factor to that unit."""
    for ending, unit, scale in (("loss", loss_unit, 1.0), *_UNITS):
        if name.endswith(ending):
            return f"{_words(name)} ({unit})", scale
    return _words(name), 1.0


def _number(value: float | str | None) -> str:
    """Four significant digits, in plain notation where that is short."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    if value == 0 or not math.isfinite(value) or abs(value) < 1e-3:
        return f"{value:.4g}"
    places = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(part)}" for key, part in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(part) for part in value) or "–"
    return _number(value)
