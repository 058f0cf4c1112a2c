"""Hub data sets and models from a handmade cache, without a network; what a launch script then does with them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from lorasp.data.sources import hub_snapshot, read_source
from lorasp.models.weights import hub_commit, locate_model
from lorasp.recipe import Model, RecipeError, Source
from tests.distributed.commands import TRAIN, accelerate_on_two, python, run
from tests.tiny_models import save_model

ROOT = Path(__file__).parents[1]
COMMIT, EARLIER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


def cache(hub: Path, kind: str, name: str, commit: str, files: dict[str, bytes], branch: str | None = "main") -> None:
    """One commit of a repository as the hub's client keeps it."""
    repository = hub / f"{kind}s--{name.replace('/', '--')}"
    for file, content in files.items():
        path = repository / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if branch:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)


def lines(*values: dict) -> bytes:
    return "\n".join(map(json.dumps, values)).encode()


def pairs(count: int, mark: str = "") -> list[dict[str, str]]:
    return [{"prompt": f"{mark}{n}\n", "completion": "yes"} for n in range(count)]


def parquet(path: Path, values: list[dict[str, str]]) -> bytes:
    columns = {key: [value[key] for value in values] for key in ("prompt", "completion")}
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return path.read_bytes()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An offline cache with `me/rows`: 5 rows at main, 3 at an earlier commit, and a split to test on."""
    hub = tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files = {
        "data/train-0.parquet": parquet(tmp_path / "a.parquet", pairs(5)),
        "data/test-0.parquet": parquet(tmp_path / "b.parquet", pairs(2, "t")),
    }
    cache(hub, "dataset", "me/rows", COMMIT, files)
    cache(hub, "dataset", "me/rows", EARLIER, {"train.jsonl": lines(*pairs(3))}, branch=None)
    return hub


def refusal(source: Source, act=read_source) -> str:
    with pytest.raises(RecipeError) as caught:
        act(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cached_data_set_is_read_by_its_name_without_a_network(hub):
    assert hub_snapshot(Source(path="me/rows"), download=True).name == COMMIT  # allowed to, not able to
    found = read_source(Source(path="me/rows"))
    assert [value for _, value in found] == pairs(5) and found[0][0] == "row 1"
    assert [value for _, value in read_source(Source(path="me/rows", limit=2))] == pairs(2)
    assert [value for _, value in read_source(Source(path="me/rows", split="test"))] == pairs(2, "t")


def test_rows_that_training_has_are_skipped_and_the_others_keep_their_numbers(hub, tmp_path):
    """So that one source gives the rows to train, those to choose by and those to report, none of them twice."""
    (tmp_path / "rows.json").write_text(json.dumps(pairs(5)))
    (tmp_path / "rows.jsonl").write_bytes(lines(*pairs(5)))
    for path in ("me/rows", str(tmp_path / "rows.json"), str(tmp_path / "rows.jsonl")):
        found = read_source(Source(path=path, skip=3, limit=1))
        assert [value for _, value in found] == pairs(5)[3:4] and found[0][0].endswith(" 4")
        assert [value for _, value in read_source(Source(path=path, skip=3))] == pairs(5)[3:]
        assert refusal(Source(path=path, skip=5)).endswith("has no rows behind the first 5")


def test_a_pinned_revision_is_that_commit_and_never_another_one_of_the_cache(hub):
    assert [value for _, value in read_source(Source(path="me/rows", revision=EARLIER))] == pairs(3)
    message = refusal(Source(path="me/rows", revision="v2"))
    assert message.startswith(
        "me/rows: no such file, and no data set of that name at revision 'v2' in the hub's cache"
    )
    assert "HF_HUB_OFFLINE=1 forbids to download it" in message


def test_subsets_are_chosen_and_what_is_not_there_is_told_with_what_is(hub):
    subsets = "".join(f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in ("one", "two"))
    config = f"---\nconfigs:\n{subsets}---\n"
    files = {"README.md": config.encode(), "one.jsonl": lines(*pairs(1)), "two.jsonl": lines(*pairs(2))}
    cache(hub, "dataset", "me/both", COMMIT, files)
    assert len(read_source(Source(path="me/both", subset="two"))) == 2
    assert "'one', 'two'" in refusal(Source(path="me/both")).replace('"', "'")
    message = refusal(Source(path="me/rows", split="validation"))
    assert message.startswith("me/rows: split 'validation' of the hub's data set cannot be read")
    assert "train" in message and "test" in message


def test_an_empty_split_is_told(hub):
    cache(hub, "dataset", "me/empty", COMMIT, {"train.parquet": parquet(hub / "e.parquet", [])})
    assert refusal(Source(path="me/empty")) == "me/empty: split 'train': has no rows"


@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        (errors.RevisionNotFoundError, 404, "me/other: the hub's data set has no revision 'v9'"),
        (errors.RepositoryNotFoundError, 401, "me/other: no such file, and no data set of the hub that may be read"),
        (errors.GatedRepoError, 403, "set HF_TOKEN, or run `hf auth login`"),
        (ConnectionError, None, "at revision 'v9' that the hub could give (ConnectionError: no route); without a"),
    ],
)
def test_what_the_hub_answers_is_one_sentence(hub, monkeypatch, kind, status, told):
    def snapshot_download(*_, **__):
        if status is None:
            raise kind("no route\nto host")
        raise kind(
            "a long\nstory",
            response=SimpleNamespace(status_code=status, headers={}, request=None, server_message=None),
        )

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert told in refusal(Source(path="me/other", revision="v9"), lambda source: hub_snapshot(source, download=True))


@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        (errors.RevisionNotFoundError, 404, "model.path: 'me/other' has no revision 'v9' on the hub"),
        (
            errors.RepositoryNotFoundError,
            401,
            "model.path: 'me/other' is no local directory, and no model of the hub that may be read; if it is private "
            "or gated, ask for access and set HF_TOKEN, or run `hf auth login`",
        ),
        (
            ConnectionError,
            None,
            "model.path: 'me/other' at revision 'v9' is no local directory and could not be had from the hub (no "
            "route); download it where there is a network, then give its directory, or set HF_HOME to its cache",
        ),
    ],
)
def test_what_the_hub_answers_about_a_model_is_one_sentence(hub, monkeypatch, kind, status, told):
    def snapshot_download(*_, **__):
        if status is None:
            raise kind("no route\nto host")
        raise kind(
            "a long\nstory",
            response=SimpleNamespace(status_code=status, headers={}, request=None, server_message=None),
        )

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(RecipeError) as caught:
        locate_model(Model(path="me/other", revision="v9"))
    assert str(caught.value) == told


def test_a_models_revision_is_that_commit_and_one_that_is_not_cached_is_one_sentence(hub):
    model = {"config.json": b"{}", "LICENSE.txt": b"terms", "NOTICE": b"by"}
    cache(hub, "model", "me/base", COMMIT, model)
    cache(hub, "model", "me/base", EARLIER, {"config.json": b"[]"}, branch=None)
    assert hub_commit(locate_model(Model(path="me/base")), Model(path="me/base")) == COMMIT
    assert locate_model(Model(path="me/base", revision=EARLIER)).name == EARLIER
    with pytest.raises(RecipeError) as caught:
        locate_model(Model(path="me/base", revision="v9"))
    assert str(caught.value) == (
        f"model.path: 'me/base' is no local directory and could not be had from the hub: no model of that name at "
        f"revision 'v9' is in its cache ({hub}), while HF_HUB_OFFLINE=1 forbids to download it"
    )


def test_a_models_licence_is_downloaded_with_it_and_its_weights_once(monkeypatch):
    """It binds what is derived from the model: exports carry it along. Mistral's files hold all weights twice."""
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **options: asked.update(options) or "/found")
    assert locate_model(Model(path="me/base")) == Path("/found")
    files = ["LICENSE", "LICENSE.txt", "NOTICE.md", "config.json", "a.safetensors", "tokenizer.model"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "model.fp16-00001-of-00002.safetensors"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*files, *others], **patterns)) == files


RECIPE = """\
output_dir: {home}/runs
model: {{path: me/tiny}}
adapter: {{rank: 4}}
data: {{train: me/rows, held_out: 0.2, max_length: 96, packing: true}}
training: {{epochs: 1, global_batch_size: 2, micro_batch_size: 1, eps: 1.0e-5}}
evaluation: {{samples: 1, max_new_tokens: 2}}
"""


@pytest.fixture
def home(hub, tmp_path) -> Path:
    """A user whose hub cache holds the data set and a model, and a recipe that names both."""
    model = save_model("llama", tmp_path / "model")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    cache(hub, "model", "me/tiny", COMMIT, files)
    shutil.rmtree(model)
    (tmp_path / "hub.yaml").write_text(RECIPE.format(home=tmp_path))
    return tmp_path


def inspect(home: Path, *overrides: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch" / "inspect_data.py"), str(home / "hub.yaml"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, timeout=120)


def test_inspect_data_shows_rows_as_trained_and_needs_no_weights(home, hub):
    (weights,) = hub.rglob("*.safetensors")
    weights.unlink()
    done = inspect(home)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train: 4 rows of me/rows (prompt_completion)" in done.stdout
    assert "held out: 1 rows of me/rows" in done.stdout
    # BOS, a digit and a line end; y, e, s and EOS: 4 of 7 tokens, four times; all in one pack of 96.
    assert "28" in done.stdout and "57.1%" in done.stdout
    assert "packing to 96 tokens makes 1 packs an epoch, 29.2% full" in done.stdout
    assert "example 1: 7 tokens, of which 4 labels between ⟦ and ⟧" in done.stdout
    assert "\n⟦y·e·s·</s>⟧" in done.stdout


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "data.revision=v9",
            "me/rows: no such file, and no data set of that name at revision 'v9' in the hub's cache",
        ),
        ("data.train=me/none", "me/none: no such file, and no data set of that name in the hub's cache"),
        ("data.train={home}/bad.jsonl", "bad.jsonl: line 2 is not JSON"),
        ("data.train={home}/chat.jsonl", "the tokenizer has no chat template"),
        ("data.train={home}/huge.jsonl", "huge.jsonl: 1 row has more than 1,000,000 characters"),
    ],
)
def test_inspect_data_tells_bad_input_in_one_sentence(home, override, told):
    (home / "bad.jsonl").write_bytes(lines(*pairs(1)) + b'\n{"prompt": ')
    (home / "chat.jsonl").write_bytes(
        lines({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    (home / "huge.jsonl").write_bytes(lines(*pairs(3), {"prompt": "a", "completion": "b" * 10_000_000}))
    done = inspect(home, override.format(home=home), "data.held_out=null")
    assert done.returncode == 2 and told in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_run_finds_model_and_data_by_their_hub_names_without_a_network(home):
    done = run(python(str(home / "hub.yaml")), home)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((home / "runs" / "hub" / "report.json").read_text())
    assert report["data"]["train"]["source"] == "me/rows" and report["data"]["train"]["rows"] == 4
    assert report["model_commit"] == report["data"]["train"]["commit"] == COMMIT
    assert f"| commit of me/tiny | {COMMIT} |" in " ".join((home / "runs" / "hub" / "report.md").read_text().split())
    assert report["data"]["held_out"]["rows"] == 1 and report["metrics"]["held_out_loss_after"] > 0


_ASKED = """
import json, os, runpy, sys
sys.path.insert(0, os.getcwd())
import huggingface_hub

snapshot_download, asked = huggingface_hub.snapshot_download, []
def recorded(name, **options):
    asked.append([name, options["local_files_only"]])
    open({out!r} + os.environ["RANK"], "w").write(json.dumps(asked))
    return snapshot_download(name, **options)
huggingface_hub.snapshot_download = recorded
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_only_one_process_of_a_node_may_download(home):
    """Of two ranks: the other one asks for what is cached by then."""
    script = home / "asked.py"
    arguments = [str(home / "hub.yaml"), "name=two", "evaluation.samples=0", "training.max_steps=1", "rehearse=false"]
    script.write_text(_ASKED.format(out=f"{home}/asked", argv=[TRAIN, *arguments]))
    command = accelerate_on_two()
    done = run([*command[: command.index(TRAIN)], str(script)], home)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((home / f"asked{rank}").read_text()) for rank in range(2))
    assert ["me/tiny", False] in first and ["me/rows", False] in first
    assert {name for name, _ in second} == {"me/tiny", "me/rows"} and all(cached for _, cached in second)
