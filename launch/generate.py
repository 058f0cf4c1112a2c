"""Ask a trained model, with the prompt in the words of its training; the answer is printed as it is written.

    python launch/generate.py runs/quickstart "Make a ticket for the bar: One large latte, please. I'm Bo."
    python launch/generate.py runs/quickstart --max-new-tokens 200 --temperature 0.7
    python launch/generate.py runs/quickstart --template none "Once upon a time"

One process; no launcher is needed. Without a prompt it asks for one, again and again, until the end of input; each
line is a prompt of its own. --template says what a prompt is put into: Alpaca's words, the short form of them, the
tokenizer's chat template, or nothing. Answers go to stdout, all else to stderr.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import argument_parser, refuse_several_processes, run_reporting_errors
from lorasp.recipe import RecipeError


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dir", help="a run's directory, such as runs/quickstart")
    parser.add_argument("prompt", nargs="?", help="the instruction (default: asked for, line by line)")
    parser.add_argument("--input", default="", help="Alpaca's second field")
    parser.add_argument("--template", choices=("alpaca", "short", "chat", "none"), help="default: as trained")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    options = parser.parse_args()
    refuse_several_processes()
    if options.max_new_tokens < 1 or not 0 <= options.temperature < math.inf:
        raise RecipeError("--max-new-tokens must be at least 1, --temperature a number that is at least 0")

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    from lorasp.evaluation.generation import CACHED_ATTENTION, generate_answer, prompt_tokens
    from lorasp.finished_run import read_run
    from lorasp.models.weights import load_tokenizer
    from lorasp.reporting.console import Console

    console = Console(is_main=True, stream=sys.stderr)
    run = read_run(options.run_dir)
    run.refuse_unless_causal_lm("an answer")
    for warning in run.warnings():
        console.warn(warning)
    tokenizer = load_tokenizer(run.base, run.recipe.model)
    model = run.load(run.device, attention=CACHED_ATTENTION)

    for text in [options.prompt] if options.prompt is not None else _asked():
        generate_answer(
            model,
            tokenizer,
            prompt_tokens(tokenizer, text, options.template or run.prompt_format, options.input),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            streams=True,
        )
    return 0


def _asked() -> Iterator[str]:
    """Lines from a terminal, or from a pipe, until their end; empty ones are passed over."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise RecipeError(f"the prompts on stdin are not in {error.encoding}; convert them (iconv)") from None
        if not line:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
