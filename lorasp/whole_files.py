"""Files that are whole or absent, whatever ends the process that writes them; imports nothing heavy."""

import os
from collections.abc import Callable
from pathlib import Path

from lorasp.recipe_errors import RecipeError


def write_text_whole(path: Path, text: str) -> None:
    """Writes beside, syncs, renames. Raises RecipeError when the disk refuses."""
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """The file that `write` makes at the path given to it becomes `path`. Raises RecipeError when the disk refuses."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.chmod(0o644)  # safetensors' 0600 would hide it from one's group
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except Exception as error:  # safetensors wraps the operating system's error in its own
        beside.unlink(missing_ok=True)
        raise RecipeError(
            f"{path} could not be written ({error}); what was saved there before is unharmed. Free space or name "
            f"another output_dir"
        ) from error
