import json

import pytest
from tokenizers.processors import TemplateProcessing

from lorasp.data.examples import prompt_ids
from lorasp.data.load import load_data
from lorasp.recipe import Recipe, RecipeError
from lorasp.recipe_loading import load_recipe
from tests.tiny_models import byte_tokenizer


def write(path, count: int, mark: str = "a") -> str:
    path.write_text("\n".join(json.dumps({"prompt": f"{mark}{n}\n", "completion": "yes"}) for n in range(count)))
    return str(path)


def load(seed: int = 0, **data):
    recipe = Recipe(model={"path": "unused"}, data=data, seed=seed)
    return load_data(recipe, byte_tokenizer()), recipe


def texts(data_set) -> list[str]:
    return [part.rows.rows[row]["prompt"] for part in data_set.parts for row in part.encoded.rows]


def test_a_share_of_the_rows_is_held_out_by_the_seed_and_no_row_is_on_both_sides(tmp_path):
    path = write(tmp_path / "a.jsonl", 200)
    data, _ = load(train=path, held_out=0.05)
    train, held_out = texts(data.train), texts(data.held_out)
    assert (len(train), len(held_out)) == (190, 10)
    assert set(train).isdisjoint(held_out) and len({*train, *held_out}) == 200
    assert texts(load(train=path, held_out=0.05)[0].held_out) == held_out
    assert texts(load(train=path, held_out=0.05, seed=1)[0].held_out) != held_out
    # More rows held out are these and others.
    assert set(texts(load(train=path, held_out=0.1)[0].held_out)) > set(held_out)
    assert data.report()["train"]["digest"] != data.report()["held_out"]["digest"]


def test_equal_rows_are_held_out_together_even_of_two_sources(tmp_path):
    one, two = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 60)  # 40 rows stand in both
    data, _ = load(train=[{"path": one}, {"path": two}], held_out=0.3)
    train, held_out = texts(data.train), texts(data.held_out)
    assert set(train).isdisjoint(held_out) and len(train) + len(held_out) == 100
    assert 30 <= len(held_out) <= 31
    assert [part.rows.source for part in data.held_out.parts] == [one, two]


@pytest.mark.parametrize(
    ("rows", "share", "told"),
    [
        (20, 0.01, "data.held_out: 0.01 of 20 rows is none; give a larger share, or a file"),
        (1, 0.9, "data.held_out: 0.9 of the rows is all of "),
    ],
)
def test_an_empty_side_of_the_split_is_refused(tmp_path, rows, share, told):
    with pytest.raises(RecipeError) as caught:
        load(train=write(tmp_path / "a.jsonl", rows), held_out=share)
    assert str(caught.value).startswith(told)


def test_a_mixture_is_visited_by_weight_and_told_source_by_source(tmp_path):
    one, two = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 60, "b")
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"instruction": f"c{n}", "output": "no"}) for n in range(10))
    )
    data, recipe = load(
        train=[one, {"path": two, "weight": 0.5, "limit": 50}, {"path": str(tmp_path / "c.jsonl"), "weight": 3}],
        template="short",
    )
    order = data.order(recipe)
    visited = order.examples_of(0)
    assert [sum(low <= row < high for row in visited) for low, high in ((0, 40), (40, 90), (90, 100))] == [40, 25, 30]
    report = data.report()
    assert list(report) == ["train", "train_1", "train_2", "train_3"]
    assert (report["train"]["rows"], report["train_2"]["rows"], report["train_2"]["weight"]) == (100, 50, 0.5)
    assert report["train"]["tokens"] == sum(report[f"train_{n}"]["tokens"] for n in (1, 2, 3))
    assert len({entry["digest"] for entry in report.values()}) == 4
    assert data.describe()[1] == f"train: 50 rows of {two} (prompt_completion), 0.5 times an epoch"


def test_the_digest_of_a_mixture_sees_the_order_of_its_sources(tmp_path):
    one, two = write(tmp_path / "a.jsonl", 4), write(tmp_path / "b.jsonl", 6, "b")
    digests = {load(train=train)[0].report()["train"]["digest"] for train in ([one, two], [two, one], [one], one)}
    assert len(digests) == 3  # a list of one is that one


def test_samples_are_the_first_held_out_rows_as_a_prompt_and_its_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", 5)
    data, _ = load(train=path, held_out=path)
    assert data.samples(2) == [{"prompt": f"a{n}\n", "expected": "yes"} for n in (0, 1)]
    assert load(train=path)[0].samples(2) == []


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"train": []}, "[] is neither a path, a hub name, nor a list of {path, weight}"),
        ({"train": 3}, "3 is neither a path, a hub name, nor a list of {path, weight}"),
        ({"train": ["a", 3]}, "entry 2: 3 is no data set; write a path, or some of path, revision"),
        ({"train": [{"weight": 2}]}, "entry 1: path: is missing; give a file or a hub data set"),
        ({"train": [{"path": "a", "weight": 0}]}, "entry 1: weight: 0 is not greater than 0"),
        ({"train": [{"path": "a", "wieght": 2}]}, "entry 1: unknown key wieght; a data set has path, revision"),
        ({"train": "a", "held_out": {"path": "b", "weight": 2}}, "unknown key weight; a data set has path"),
        ({"train": "a", "held_out": 1.5}, "1.5 is neither a path, a hub name, nor a share of train's rows like 0.05"),
        ({"train": "a", "held_out": 0}, "0 is neither a path"),
        ({"train": ["a"], "revision": "v1"}, "data.revision: data.train is a list: write revision beside the paths"),
        ({"train": ["a"], "limit": 3}, "data.limit: data.train is a list: write limit beside the paths in it"),
        ({"train": "a", "packing": True, "group_by_length": True}, "packs are all of about one length"),
    ],
)
def test_bad_data_sections_are_told(data, told):
    with pytest.raises(ValueError) as caught:
        Recipe(model={"path": "unused"}, data=data)
    assert told in str(caught.value)


def test_a_mixture_comes_back_from_the_recipe_that_a_run_keeps():
    recipe = Recipe(model={"path": "m"}, data={"train": ["a", {"path": "b", "weight": 2.5}], "held_out": 0.1})
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_paths_in_a_list_are_found_beside_the_recipe_and_missing_ones_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = write(tmp_path / "a.jsonl", 4), write(tmp_path / "b.jsonl", 6, "b")
    recipe = tmp_path / "x.yaml"
    recipe.write_text(
        "model: {path: m}\ndata:\n  train:\n  - a.jsonl\n  - {path: b.jsonl, weight: 2}\n  - {path: me/rows}\n"
        "  held_out: {path: b.jsonl, limit: 2}\n"
    )
    data = load_recipe(recipe).data
    assert [source.path for source in data.train_sources] == [one, two, "me/rows"]
    assert (data.held_out_source.path, data.held_out_source.limit) == (two, 2)
    assert load_recipe(recipe, ["data.held_out=0.25"]).data.held_out == 0.25
    recipe.write_text(recipe.read_text().replace("a.jsonl", "c.jsonl"))
    with pytest.raises(RecipeError, match=r'x.yaml:3: data.train: "c.jsonl" does not exist .*did you mean'):
        load_recipe(recipe)


def test_a_prompt_without_a_token_is_no_sample_to_answer(tmp_path):
    """An empty one, where the tokenizer puts nothing before a text: the row is trained and scored, not answered."""
    rows = [{"prompt": prompt, "completion": "yes"} for prompt in ("", "a", "b", "c")]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(model={"path": "unused"}, data={"train": str(path), "held_out": str(path)})
    with_bos, without = byte_tokenizer(), byte_tokenizer()
    without.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert without("")["input_ids"] == [] != with_bos("")["input_ids"]
    samples = load_data(recipe, without).samples(2)
    assert [sample["prompt"] for sample in samples] == ["a", "b"]
    assert [sample["prompt"] for sample in load_data(recipe, with_bos).samples(2)] == ["", "a"]
    data = load_data(recipe, without)
    assert [example.label_count for example in data.held_out.examples] == [3, 4, 4, 4]  # of yes and EOS


def test_a_chats_sample_is_asked_with_the_tokens_that_training_gave_it(tmp_path):
    """BOS once, as the template writes it, whatever the tokenizer puts before a text."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [{"role": "user", "content": "ash"}, {"role": "assistant", "content": "elm"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": messages}]))
    data = load_data(Recipe(model={"path": "unused"}, data={"train": str(path), "held_out": str(path)}), tokenizer)
    [sample], [example] = data.samples(1), data.held_out.examples
    asked = prompt_ids(tokenizer, sample["prompt"], sample["layout"])
    assert asked == list(example.input_ids[: example.prompt_length]) and asked.count(tokenizer.bos_token_id) == 1
    assert tokenizer(sample["prompt"])["input_ids"] != asked
