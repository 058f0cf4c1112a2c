"""Eq. 3 from a recipe to other people's software: the base that was made for an adapter goes wherever it goes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorasp.cli import BAD_INPUT
from lorasp.export.write import Export, write_export
from lorasp.finished_run import read_run
from lorasp.recipe import RecipeError
from tests.distributed.commands import accelerate_on_two, python, run
from tests.distributed.launching import ROOT

pytestmark = pytest.mark.slow

SETTINGS = ("quantization.init=residual", "quantization.iterations=2")


@pytest.fixture(scope="module")
def trained(place, home, tmp_path_factory) -> Path:
    """Two ranks, 4 steps."""
    runs = tmp_path_factory.mktemp("residual")
    done = run(accelerate_on_two(str(place / "tiny.yaml"), f"output_dir={runs}", *SETTINGS), home)
    assert done.returncode == 0, done.stderr
    assert "(mean of 21 linears; " in done.stdout
    return runs / "tiny"


def test_a_run_keeps_its_base_and_tells_what_quantization_lost(trained):
    metrics = json.loads((trained / "report.json").read_text())["metrics"]
    assert 0 < metrics["quantization_error_residual"] < 0.9 * metrics["quantization_error_plain"]
    manifest = json.loads((trained / "base" / "manifest.json").read_text())
    assert len(manifest["stored"]) == 21 and len(list((trained / "base").glob("*.safetensors"))) == 3
    assert not [path for path in trained.iterdir() if path.name.startswith(".base")]


def test_evaluated_alone_and_trained_on_it_is_the_model_that_was_trained(trained, place, home, tmp_path):
    after = json.loads((trained / "report.json").read_text())["metrics"]["held_out_loss_after"]
    more = (str(place / "tiny.yaml"), f"output_dir={tmp_path}", *SETTINGS, f"adapter.init_from={trained}")
    done = run(accelerate_on_two(*more, "training.max_steps=1"), home)
    assert done.returncode == 0, done.stderr
    before = json.loads((tmp_path / "tiny" / "report.json").read_text())["metrics"]["held_out_loss_before"]
    assert before == pytest.approx(after, rel=1e-6)
    kept, again = (json.loads((of / "base" / "manifest.json").read_text()) for of in (trained, tmp_path / "tiny"))
    assert kept == again  # the same base goes on with the adapter
    plain = run(python(str(place / "tiny.yaml"), f"adapter.init_from={trained}"), home)
    assert plain.returncode == BAD_INPUT and "quantization.init is plain, the adapter's residual" in plain.errors[0]


def test_the_export_in_4_bits_holds_both_and_others_are_refused(trained, home):
    command = [sys.executable, str(ROOT / "launch" / "export.py"), str(trained), "--to", "bnb4bit", "--verify"]
    done = run(command, home)
    assert done.returncode == 0, done.stderr
    assert "verified: largest difference" in done.stdout
    finished = read_run(trained)
    assert finished.warnings() == []
    for kind in ("peft", "merged"):
        with pytest.raises(RecipeError, match="its adapter starts from what quantization took from the base"):
            write_export(finished, Export(kind, trained / "export" / kind), console=None)


@pytest.mark.parametrize("fault", ["gone", "changed"])
def test_a_base_that_is_gone_or_changed_is_told(fault, trained, home, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("export"))
    file = next((copy / "base").glob("*layers.1*"))
    tensors = load_file(file)
    if fault == "changed":
        name = next(name for name in tensors if name.endswith("up_proj.weight"))
        tensors[name][0] ^= 1
        save_file(tensors, file)
    else:
        file.unlink()
    done = run([sys.executable, str(ROOT / "launch" / "generate.py"), str(copy), "oak"], home)
    assert done.returncode == BAD_INPUT and len(done.errors) == 1
    told = "bring the run's whole directory" if fault == "gone" else "has changed); nothing but a copy can bring it"
    assert told in done.errors[0]
