"""`configs`: choices are listed, shown and copied, and a copy is used like the project's own."""

import pytest

from vlm_tune.config import parse
from vlm_tune.config.parse import GROUPS, load_config, options


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_is_what_the_verb_does_alone(run_cli):
    assert run_cli("configs").out == run_cli("configs", "list").out != ""


@pytest.mark.parametrize("name", ["model/internvl2_2b", "internvl2_2b", "model=internvl2_2b"])
def test_show_prints_the_file_with_its_comments(run_cli, name):
    assert (parse.CONF / "model" / "internvl2_2b.yaml").read_text() in run_cli("configs", "show", name).out


CHOICES = [(group, name) for group in GROUPS for name in options(group)]


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=["/".join(each) for each in CHOICES])
def test_the_command_that_copy_prints_is_understood(run_cli, elsewhere, group, name):
    done = run_cli("configs", "copy", f"{group}/{name}")
    assert done.code == 0, done.err
    command = next(line for line in done.out.splitlines() if line.startswith("use it:"))
    load_config(command.partition("vlm_tune ")[2].split())


def test_a_copy_is_edited_and_then_used(run_cli, elsewhere):
    run_cli("configs", "copy", "model/internvl2_2b", "mine")
    path = elsewhere / "conf" / "model" / "mine.yaml"
    path.write_text(path.read_text().replace("max: 12", "max: 3"))
    config = load_config(["model=mine"])
    assert (config.model.name, config.model.tiles.max) == ("mine", 3)
    assert "mine" in run_cli("configs").out


def test_a_copy_says_which_tuned_settings_it_leaves_behind(run_cli, elsewhere):
    assert "demo_finetune" in run_cli("configs", "copy", "model/demo", "mine").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "demo"], "model/demo, data/demo"),
        (["show", "intervl2_2b"], "Did you mean internvl2_2b?"),
        (["show"], "no such form"),
        (["copy", "model/demo", "demo"], "nothing is overwritten"),
        (["copy", "model/demo", "../x"], "not a name"),
    ],
)
def test_faults_say_what_to_do(run_cli, elsewhere, words, said):
    done = run_cli("configs", *words)
    assert done.code == 2
    assert said in done.err
    assert not list(elsewhere.iterdir())


def test_a_file_of_ones_own_never_takes_the_place_of_the_projects(elsewhere):
    (elsewhere / "conf" / "stage").mkdir(parents=True)
    (elsewhere / "conf" / "stage" / "finetune.yaml").write_text("# @package _global_\nstage: {name: mine}\n")
    assert load_config(["stage=finetune"]).stage.name == "finetune"
