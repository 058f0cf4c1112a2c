"""Write what a run trained in a layout that other software reads: PEFT, a merged model, or bitsandbytes' 4 bits.

    python launch/export.py runs/quickstart --to peft --verify
    python launch/export.py runs/quickstart --to merged --base dequantized --dtype bfloat16 --out my-model
    python launch/export.py runs/quickstart --to bnb4bit

One process; no launcher is needed. merged adds the adapter to the base's original weights, or with
--base dequantized to those that it was trained on. bnb4bit writes the quantized base of training and the adapter
beside it. The model is streamed: in memory are a layer, the embeddings, and about 4 GiB on their way to the disk.
Exit codes: 0 written; 1 --verify found other logits, and nothing was written; 2 bad input.
"""

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import argument_parser, refuse_several_processes, run_reporting_errors
from lorasp.recipe import RecipeError

DIFFERS = 1


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dir", help="a run's directory, such as runs/quickstart")
    parser.add_argument("--to", required=True, choices=("peft", "merged", "bnb4bit"), help="the layout")
    parser.add_argument("--out", type=Path, help="a new or empty directory (default: RUN_DIR/export/LAYOUT)")
    parser.add_argument(
        "--base", choices=("original", "dequantized"), help="merged: which weights to add to (default: original)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="merged: of its weights (default: the base's)"
    )
    parser.add_argument("--verify", action="store_true", help="load it with transformers and peft, compare logits")
    options = parser.parse_args()
    refuse_several_processes()
    if options.to != "merged" and (options.base or options.dtype):
        raise RecipeError(f"--base and --dtype are of --to merged; {options.to} is as the run was trained")

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' about itself
    import torch

    from lorasp.export.verify import VerificationError
    from lorasp.export.write import Export, write_export
    from lorasp.finished_run import read_run
    from lorasp.reporting.console import Console

    console = Console(is_main=True)
    run = read_run(options.run_dir)
    run.refuse_unless_causal_lm("an export")
    for warning in run.warnings():
        console.warn(warning)
    export = Export(
        kind=options.to,
        out=options.out or run.directory / "export" / options.to,
        base=options.base or "original",
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        verify=options.verify,
    )
    try:
        difference = write_export(run, export, console)
    except VerificationError as error:
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return DIFFERS
    if difference is not None:
        console.info(f"verified: {difference}")
        if difference.doubt is not None:
            console.warn(difference.doubt)
    console.info(f"exported {export.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
