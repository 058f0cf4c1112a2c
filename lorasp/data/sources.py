"""Where rows come from: a JSON list, a JSONL file, or a data set of the hub, each row with its place for messages."""

import itertools
import json
import re
from pathlib import Path

from lorasp.recipe import RecipeError, Source

Placed = list[tuple[str, object]]  # ("row 17" or "line 17", its JSON value)

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # no leading "." or "/": those are paths
_HUB_FILES = ["README.md", "*.parquet", "*.json*", "*.csv*", "*.arrow"]  # "*.json*": .jsonl and .json.gz as well


def is_on_hub(source: Source) -> bool:
    """Whether `source` names a data set of the hub. Raises RecipeError for a path to nothing, or to a directory."""
    path = Path(source.path)
    if path.is_file():
        return False
    if path.is_dir():
        raise RecipeError(f"{source.path}: is a directory; give a JSON or JSONL file in it, or a hub data set")
    if path.suffix in (".json", ".jsonl") or not _HUB_NAME.fullmatch(source.path):
        raise RecipeError(f"{source.path}: no such data file")
    return True


def hub_snapshot(source: Source, *, download: bool) -> Path:
    """The cached files of a hub data set at its revision; the directory is named by the commit.

    Its token is the environment's (HF_TOKEN, or that of `hf auth login`). With `download` false, and with
    HF_HUB_OFFLINE=1, only the cache is looked into. Raises RecipeError if the files cannot be had.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    at = f" at revision {source.revision!r}" if source.revision else ""
    try:
        return Path(
            snapshot_download(
                source.path,
                repo_type="dataset",
                revision=source.revision,
                allow_patterns=_HUB_FILES,
                local_files_only=not download,
            )
        )
    except RevisionNotFoundError:
        raise RecipeError(f"{source.path}: the hub's data set has no revision {source.revision!r}") from None
    except (GatedRepoError, RepositoryNotFoundError):
        raise RecipeError(
            f"{source.path}: no such file, and no data set of the hub that may be read; if it is private or gated, "
            f"ask for access and set HF_TOKEN, or run `hf auth login`"
        ) from None
    except Exception as error:  # no network, and nothing cached: the hub's client raises a dozen kinds
        if constants.HF_HUB_OFFLINE:
            raise RecipeError(
                f"{source.path}: no such file, and no data set of that name{at} in the hub's cache "
                f"({constants.HF_HUB_CACHE}), while HF_HUB_OFFLINE=1 forbids to download it"
            ) from None
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise RecipeError(
            f"{source.path}: no such file, and no data set{at} that the hub could give ({type(error).__name__}: "
            f"{reason}); without a network give a JSON or JSONL file, or set HF_HOME to a cache that holds it"
        ) from None


def hub_commit(source: Source) -> str | None:
    """The commit of the cached hub data set; None for a file."""
    return hub_snapshot(source, download=False).name if is_on_hub(source) else None


def read_source(source: Source) -> Placed:
    """The rows behind the first `source.skip`, at most `source.limit` of them.

    A hub data set is read from the cache: `hub_snapshot` downloads it.

    Raises RecipeError naming the file, and the line at fault.
    """
    end = None if source.limit is None else source.skip + source.limit
    placed = _read_hub(source, end) if is_on_hub(source) else _read_file(Path(source.path), end)
    if len(placed) <= source.skip:
        where = f"{source.path}: split {source.split!r}" if is_on_hub(source) else source.path
        raise RecipeError(f"{where}: has no rows{f' behind the first {source.skip:,}' if placed else ''}")
    return placed[source.skip :]


def read_text(path: Path) -> str:
    """Raises RecipeError naming the file, and the line that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")  # a byte-order mark is no fault of the data
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}: line {line} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error


def _read_file(path: Path, limit: int | None) -> Placed:
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return _read_lines(path, text, limit)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}: is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise RecipeError(f"{path}: is not JSON that can be read ({error})") from error
    return [(f"row {number}", value) for number, value in enumerate(values[:limit], start=1)]


def _read_lines(path: Path, text: str, limit: int | None) -> Placed:
    placed: Placed = []
    # Not splitlines(): that also cuts at U+2028 and its like, which JSON strings may hold unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if limit is not None and len(placed) == limit:
            break
        if not line.strip():
            continue
        try:
            placed.append((f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            told = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
            raise RecipeError(
                f"{path}: line {number} is not JSON ({told}); "
                "a file that does not begin with [ is read as one JSON object a line"
            ) from error
    return placed


def _read_hub(source: Source, limit: int | None) -> Placed:
    snapshot = hub_snapshot(source, download=False)
    import datasets  # seconds to import: only where a hub data set is named

    try:
        # Streamed from the snapshot: no second copy in Arrow's cache, which ranks would have to take turns to write.
        data = datasets.load_dataset(str(snapshot), source.subset, split=source.split, streaming=True)
        rows = list(itertools.islice(data, limit))
    except Exception as error:  # its own, Arrow's, ValueError for an unknown split or subset
        # One line of it, as it lists what splits or subsets there are below its first one.
        reason = " ".join(str(error).replace(str(snapshot), source.path).split()) or type(error).__name__
        raise RecipeError(
            f"{source.path}: split {source.split!r} of the hub's data set cannot be read ({reason:.300}); "
            f"a source has the keys split and subset to choose"
        ) from error
    return [(f"row {number}", value) for number, value in enumerate(rows, start=1)]
