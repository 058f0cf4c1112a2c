"""The paper's tables from finished runs, its figures beside ours; or any runs, a row for each set of settings.

python launch/compare.py runs/glue_encoder --table 1 --csv table1.csv --png table1.png
python launch/compare.py runs/quickstart runs/rank8
python launch/compare.py runs/ablations --csv ablations.csv
python launch/compare.py --counts

Runs are directories of launch/train.py, or of a launch/sweep.py, whose runs that only chose a learning rate are left
out. Markdown on stdout; what was left out, and why, on stderr.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import argument_parser, refuse_several_processes, run_reporting_errors
from lorasp.recipe import RecipeError


def main() -> int:
    refuse_several_processes()
    options = _options()

    from lorasp.comparison.runs import read_runs
    from lorasp.whole_files import write_text_whole

    if options.counts:
        from lorasp.comparison.counts import count_rows, format_counts

        print(format_counts(list(count_rows())))
        return 0
    runs, left_out = read_runs(options.runs)
    text, csv, more = _paper_table(runs, options) if options.table else _free_table(runs)
    print(text, flush=True)
    for line in left_out + more:
        print(f"left out: {line}", file=sys.stderr)
    if options.csv is not None:
        write_text_whole(options.csv, csv)
    return 0


def _paper_table(runs: list, options: argparse.Namespace) -> tuple[str, str, list[str]]:
    """(Markdown, CSV, what was left out); draws the picture, if one is asked for."""
    from lorasp.comparison.comparable import comparable
    from lorasp.comparison.notes import notes_of
    from lorasp.comparison.summary import summarize
    from lorasp.comparison.tables import format_costs, format_table, scored_in, table_csv, table_rows

    number = options.table
    agreeing, left_out = comparable(runs)
    summaries, more = summarize(agreeing)
    scored = [summary for summary in summaries if scored_in(number, summary)]
    for summary in summaries:
        if summary not in scored:
            names = ", ".join(run.directory.name for run in summary.runs)
            more.append(f"{names}: no score of Table {number} (task {summary.task})")
    rows = table_rows(number, scored)
    parts = [format_table(number, rows), *notes_of(number)]
    if scored:
        parts.append(format_costs(scored))
    if options.png is not None:
        from lorasp.comparison.figure import draw_table

        draw_table(number, rows, options.png)
    return "\n\n".join(parts), table_csv(number, rows), left_out + more


def _free_table(runs: list) -> tuple[str, str, list[str]]:
    from lorasp.comparison.free import format_groups, grouped, groups_csv

    groups, left_out = grouped(runs)
    return format_groups(groups), groups_csv(groups), left_out


def _options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="directories of runs, or of sweeps")
    parser.add_argument("--table", type=int, choices=(1, 2, 3), help="of the paper; without it, any runs side by side")
    parser.add_argument("--counts", action="store_true", help="trained parameters of every row of the paper's tables")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the numbers for programs")
    parser.add_argument("--png", type=Path, metavar="FILE", help="with --table: a picture like the paper's Figure 2")
    options = parser.parse_args()
    if options.counts and (options.runs or options.table):
        raise RecipeError("--counts takes no runs and no --table: it shows the rows of all three")
    if not options.counts and not options.runs:
        raise RecipeError(f"which runs? {parser.format_usage().strip()}")
    if options.png is not None and (options.table is None or options.png.suffix != ".png"):
        raise RecipeError("--png: write the name of a picture, which ends in .png, and the --table that it shows")
    return options


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
