"""Run many recipes that differ in method, task, seed or any setting, with learning rates chosen on rows not reported.

python launch/sweep.py recipes/sweeps/glue_encoder.yaml --list
python launch/sweep.py recipes/sweeps/glue_encoder.yaml
python launch/sweep.py recipes/sweeps/glue_encoder.yaml --launcher "--use_deepspeed --num_processes 2"
python launch/sweep.py recipes/sweeps/smollm2_alpaca.yaml data.train=alpaca.json output_dir=/scratch/runs
sbatch --array 0-59 --gpus-per-node 1 --cpus-per-task 4 launch/slurm/sweep.sbatch recipes/sweeps/glue_encoder.yaml

The file is explained in lorasp/sweep/definition.py. The same command goes on: what has finished is passed over, what
left in the middle is resumed. Exit code 1: some run failed, all others were tried.
"""

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone as well as installed

from lorasp.cli import INTERRUPTED, PREEMPTED, argument_parser, refuse_several_processes, run_reporting_errors
from lorasp.recipe import RecipeError
from lorasp.sweep.cells import Cell, candidates, check, final_cells, groups
from lorasp.sweep.choice import choose, read_choice, score_to_choose_by
from lorasp.sweep.definition import Sweep, read_sweep
from lorasp.sweep.launching import LOG, Busy, Launcher, last_words, ranks_of
from lorasp.sweep.outcome import find_outcome

SOME_FAILED = 1
_LEFT = "left.json"  # resume.LEFT, without importing torch


def main() -> int:
    refuse_several_processes()
    options = _options()
    sweep = read_sweep(options.sweep, options.overrides)
    arguments = _words(options.launcher) if options.launcher is not None else map(str, sweep.file.launcher)
    launcher = Launcher(list(arguments), tell)

    # Every run's recipe, and what is there of other settings, before a minute is spent.
    first, second = candidates(sweep), final_cells(sweep, _chosen_before(sweep))
    check(first + second, ranks_of(launcher.arguments))
    for cell in first + second:
        find_outcome(cell.run_dir, cell.recipe)
    if options.list:
        print(_listed(sweep, first, second))
        return 0
    if options.arguments:
        _print_arguments(_numbered(sweep, first, second, options.index))
        return 0

    launcher.listen()
    story = Story(launcher)
    if options.index is not None:
        story.run([_numbered(sweep, first, second, options.index)])
    else:
        story.run(first)
        story.run(_second_stage(sweep, first, story))
    return story.end()


class Story:
    """What becomes of the runs, told line by line."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._finished: set[str] = set()
        self.failed: dict[str, str] = {}  # name -> why, or why it was not started

    def run(self, cells: list[Cell]) -> None:
        """Each of them to its end, unless it is there. One that fails is remembered, and the next one started."""
        for number, cell in enumerate(cells, start=1):
            if self._launcher.asked is not None:
                return
            name = f"{number}/{len(cells)} {cell.name}"
            outcome = find_outcome(cell.run_dir, cell.recipe)
            if outcome.has_ended:
                tell(f"{name}: {outcome.kind} already")
            else:
                tell(f"{name}: {'goes on' if outcome.kind == 'begun' else 'starts'}, see {cell.run_dir / LOG}")
                (cell.run_dir / _LEFT).unlink(missing_ok=True)  # of the start before this one
                begun = time.monotonic()
                try:
                    code = self._launcher.run(self._launcher.command(cell.sweep.recipe, cell.overrides), cell.run_dir)
                except Busy:
                    self.failed[cell.name] = "another process is at it"
                    tell(f"{name}: another process is at it")
                    continue
                if (cell.run_dir / _LEFT).exists() or self._launcher.asked is not None:
                    self._launcher.asked = self._launcher.asked or signal.SIGTERM  # whoever sent it meant this
                    tell(f"{name}: left; the same command goes on")
                    return
                outcome = find_outcome(cell.run_dir, cell.recipe)
                if not outcome.has_ended:
                    self.failed[cell.name] = f"exit code {code}: {last_words(cell.run_dir)}"
                    tell(f"{name}: failed, {self.failed[cell.name]}")
                    continue
                tell(f"{name}: {outcome.report['status']} in {time.monotonic() - begun:.0f} s{_score(cell, outcome)}")
            if outcome.kind == "finished":
                self._finished.add(cell.name)
            elif not cell.is_candidate:  # a rate at which a candidate diverges is a result
                self.failed[cell.name] = outcome.report["status"]

    def end(self) -> int:
        """Tells what failed; the exit code."""
        tell(f"{len(self._finished)} runs have finished")
        for name, why in self.failed.items():
            tell(f"not finished: {name}: {why}")
        if self._launcher.asked is not None:
            return INTERRUPTED if self._launcher.asked == signal.SIGINT else PREEMPTED
        return SOME_FAILED if self.failed else 0


def _second_stage(sweep: Sweep, first: list[Cell], story: Story) -> list[Cell]:
    """The runs to report, of each group whose learning rate is chosen now; the others count as failed."""
    if sweep.file.choose is None:
        return final_cells(sweep, {})
    rates = {}
    for group in groups(sweep):
        found = choose(sweep, group, [cell for cell in first if cell.group == group])
        if isinstance(found, str):
            story.failed[group or "the second stage"] = f"its learning rate is not chosen, as {found}"
            continue
        rates[group] = found.learning_rate
        tell(f"chosen: {found.describe()}")
    return [cell for cell in final_cells(sweep, rates) if cell.is_chosen]


def _chosen_before(sweep: Sweep) -> dict[str, float]:
    if sweep.file.choose is None:
        return {}
    found = {group: read_choice(sweep, group) for group in groups(sweep)}
    return {group: choice.learning_rate for group, choice in found.items() if choice is not None}


def _numbered(sweep: Sweep, first: list[Cell], second: list[Cell], index: int) -> Cell:
    """The run of that number, its learning rate chosen. Raises RecipeError where there is none, or it must wait."""
    cells = first + second
    if not 0 <= index < len(cells):
        raise RecipeError(f"--index: the runs have the numbers 0 to {len(cells) - 1}; --list shows them")
    cell = cells[index]
    if cell.is_chosen:
        return cell
    found = choose(sweep, cell.group, [its for its in first if its.group == cell.group])
    if isinstance(found, str):
        raise RecipeError(f"run {index} waits for the learning rate of {cell.group or 'the first stage'}: {found}")
    tell(f"chosen: {found.describe()}", file=sys.stderr)
    return final_cells(sweep, {cell.group: found.learning_rate})[index - len(first)]


def _words(launcher: str) -> list[str]:
    try:
        return shlex.split(launcher)
    except ValueError as error:
        raise RecipeError(f"--launcher: {launcher!r} is no list of arguments ({error})") from None


def _print_arguments(cell: Cell) -> None:
    if not find_outcome(cell.run_dir, cell.recipe).has_ended:
        print("\n".join([str(cell.sweep.recipe), *cell.overrides]))


def _listed(sweep: Sweep, first: list[Cell], second: list[Cell]) -> str:
    cells = first + second
    width = max(len(cell.name) for cell in cells)
    lines = []
    for number, cell in enumerate(cells):
        kind = find_outcome(cell.run_dir, cell.recipe).kind if cell.is_chosen else "waits"
        lines.append(f"{number:>4}  {cell.name:<{width}}  {kind:<8}  {' '.join(cell.settings)}")
    parts = [f"{len(cells)} runs in {sweep.directory}"]
    if first:
        parts.append(f"0-{len(first) - 1} to choose learning rates, then {len(first)}-{len(cells) - 1} to report")
    return "\n".join([*lines, ": ".join(parts)])


def _score(cell: Cell, outcome) -> str:
    by = cell.sweep.file.choose.by if cell.is_candidate else "held_out"
    split = score_to_choose_by(outcome.report, by)
    if split is None or split["score"] is None:
        return ""
    return f", {'selection' if by == 'selection' else 'reported'} {split['metric']} {split['score']:.4g}"


def _options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("sweep", help="a YAML file of recipes/sweeps/, or your own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, or output_dir")
    parser.add_argument("--list", "--dry-run", action="store_true", help="the runs, and what has become of each")
    parser.add_argument("--index", type=int, metavar="N", help="the run of that number in --list alone")
    parser.add_argument("--arguments", action="store_true", help="of launch/train.py for --index, one a line")
    parser.add_argument("--launcher", metavar="ARGUMENTS", help="of `accelerate launch`, instead of the file's")
    options = parser.parse_intermixed_args()
    if options.arguments and options.index is None:
        raise RecipeError("--arguments: of which run? Give its --index as well")
    return options


def tell(line: str, file=None) -> None:
    print(line, file=file or sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
