"""Markdown that a terminal shows as well."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    """A Markdown table; `alignment` has an l or r for each column. Padded, so that the source can be read as well."""
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(header, *rows, strict=True)]
    # One long answer would otherwise make every row of the source as wide.
    widths = [min(width, 60) for width in widths]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(cells, widths, alignment, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rules = ("-" * (w - 1) + ":" if side == "r" else "-" * w for w, side in zip(widths, alignment, strict=True))
    return "\n".join([line(header), f"| {' | '.join(rules)} |", *map(line, rows)])
