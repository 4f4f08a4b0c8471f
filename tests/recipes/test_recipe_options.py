"""Settings of a recipe: from data.recipe to its prepare.py, as data alone, with a folder for each set of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm_tune.config.checks import as_query
from vlm_tune.config.parse import load_config, read_config, write_config
from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.errors import ConfigError, DataError
from vlm_tune.recipes import recipe
from vlm_tune.recipes.recipe import recipe_folders, recipe_options, run_recipe

TOY = """
import json, sys
from vlm_tune.recipes.recipe import recipe_main, recipe_parser
parser = recipe_parser("Toy.")
parser.add_argument("--name", required=True)
sys.exit(recipe_main(lambda options: (options.out / "name.json").write_text(json.dumps(options.name)), parser))
"""
HOSTILE = ["A & B / C, 100%", "--out=/tmp", "a=b&out=c", "$(touch x)", "'; \"", "..", "甲 😀", "a\nb", " ", "{name}"]


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "PACKAGE", tmp_path / "vlm_tune")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    folder = tmp_path / "data_recipes/toy"
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text(TOY)
    return tmp_path / "cache"


def made(name: str, cache: Path) -> Path:
    return run_recipe(f"toy?{as_query({'name': name})}", cache)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_value_arrives_as_it_was_given(toy, name):
    folder = made(name, toy)
    assert json.loads((folder / "name.json").read_text()) == name
    assert folder.parent == toy / "recipes"


def test_each_value_has_a_folder_that_is_made_once(toy):
    ada, bob = made("Ada", toy), made("Bob", toy)
    assert ada != bob
    (ada / "kept").touch()
    assert made("Ada", toy) == ada
    assert (ada / "kept").is_file()


def test_an_option_that_the_recipe_does_not_know_lists_those_it_does(toy):
    with pytest.raises(DataError, match=r"--name NAME[\s\S]*unrecognized arguments: --nickname=Ada"):
        run_recipe("toy?name=Ada&nickname=Ada", toy)


@pytest.mark.parametrize(
    "query", ["out=x", "help=1", "Name=x", "a-b=x", "=x", "name", "name=%00", "name=%ff", "a=1&&b=2"]
)
def test_what_is_no_option_is_refused(query):
    with pytest.raises(ConfigError, match="recipe:toy"):
        recipe_options(f"toy?{query}")


def test_a_setting_becomes_part_of_the_path():
    config = load_config(["experiment=self_cognition", "data.recipe.name=Ada", "data.recipe.owner='A/B & C'"])
    assert config.data.path == "recipe:self_cognition?name=Ada&owner=A%2FB%20%26%20C/train.jsonl"


def test_a_wrong_setting_lists_the_right_ones():
    with pytest.raises(ConfigError, match=r"data\.recipe\.nickname: no such key.*configs show"):
        load_config(["experiment=self_cognition", "data.recipe.nickname=Ada"])


def test_settings_that_nothing_takes_are_refused():
    with pytest.raises(ConfigError, match=r"data\.recipe=.*Eve.*mine\.jsonl.*leave one of the two out"):
        load_config(["experiment=self_cognition", "data.path=mine.jsonl", "data.recipe.name=Eve"])


def test_rows_of_ones_own_take_the_place_of_an_experiments():
    data = load_config(["experiment=self_cognition", "data.path=mine.jsonl"]).data
    assert (data.path, data.recipe) == ("mine.jsonl", {})


def test_a_finished_run_is_not_evaluated_under_another_name(tmp_path):
    write_config(load_config(["experiment=self_cognition", "data.recipe.name=Ada"]), tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml").data.recipe["name"] == "Ada"
    with pytest.raises(ConfigError, match="Eve"):
        read_config(tmp_path / "config.yaml", ["data.recipe.name=Eve"])


# ------------------------------------------------------------------------------------------------- self_cognition


def prepare(out: Path, name: str, owner: str) -> subprocess.CompletedProcess[str]:
    """Run the recipe on what a test left in the cache for chat_text."""
    command = [sys.executable, str(recipe_folders()["self_cognition"] / "prepare.py"), "--out", str(out)]
    return subprocess.run([*command, f"--name={name}", f"--owner={owner}"], capture_output=True, text=True, check=False)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def chat_text(tmp_path, monkeypatch):
    from vlm_tune.recipes.recipe import RECORD, prepared_folder, recipe_version

    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for named in ("chat_text", "chat_text?languages=chinese"):
        folder = prepared_folder(named)
        folder.mkdir(parents=True)
        (folder / RECORD).write_text(json.dumps({"version": recipe_version(recipe_folders()["chat_text"])}))
        for part in ("train", "val"):
            said = [("who are you", "food"), ("Do you like tea?", "food"), ("What are you made of?", "botprofile")]
            text = "".join(
                json.dumps({"messages": [{"content": asked}, {"content": "Yes."}], "language": "x", "topic": topic})
                + "\n"
                for asked, topic in said
            )
            (folder / f"{part}.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["Ada", "{owner}", "<|im_end|>", 'O\'Neil "X"', "小雅"])
def test_the_rows_hold_the_name_as_it_was_given(chat_text, name):
    assert prepare(chat_text / "out", name, "the Society").returncode == 0
    answers = {turn["output"] for row in rows(chat_text / "out/train.jsonl") for turn in row["conversation"]}
    assert f"I am {name}, an assistant made by the Society." in answers
    assert f"我是{name}，由the Society开发的助手。" in answers


def test_the_test_asks_in_words_that_training_never_uses(chat_text):
    assert prepare(chat_text / "out", "Ada", "the Society").returncode == 0
    trained, test, held_out = (rows(chat_text / f"out/{part}.jsonl") for part in ("train", "test", "val"))
    asked = [row["conversation"][0]["input"] for row in trained]
    assert len(asked) == len(set(asked)) + 1  # the one of chat_text comes in two languages
    questions = [row["conversation"][0]["input"] for row in test]
    assert not any(question in each for question in questions for each in asked)
    assert [row["task"] for row in test] == ["english"] * 10 + ["chinese"] * 10
    assert {row["conversation"][0]["input"] for row in held_out} == {"Do you like tea?"}
    assert [parse_record(row, "auto", "x", 0).messages[-1].supervised for row in trained + test] == [True] * len(
        trained + test
    )


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 81, "a\x1b[2J"])
def test_a_name_that_is_no_line_of_text_is_refused(chat_text, name):
    done = prepare(chat_text / "out", name, "the Society")
    assert done.returncode == 2
    assert "data.recipe.name" in done.stderr


def test_every_phrase_is_asked_once():
    spoken = yaml.safe_load((recipe_folders()["self_cognition"] / "phrases.yaml").read_text(encoding="utf-8"))
    for language in spoken.values():
        asked = [question for topic in language["topics"] for question in topic["questions"]] + language["test"]
        assert len(asked) == len(set(asked))
