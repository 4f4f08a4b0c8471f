"""A function of the user's own runs when this command line names it; a run folder remembers it and runs nothing."""

import io
import shutil
import sys

import pytest

from vlm_tune.config.own_function import MARK
from vlm_tune.config.parse import load_config, read_config
from vlm_tune.model.checkpoint import CHECKPOINTS
from vlm_tune.training.run import train

SHORT = ("stage=finetune", "stage.init_from=none", "stage.max_steps=2", "stage.evaluate=false", "trainer.num_chats=0")
FUNCTION = "def read(row):\n    open({witness!r}, 'a').close()\n    return row\n"


@pytest.fixture(scope="module")
def made(toys, tmp_path_factory):
    """Train with a function that leaves a file behind whenever it runs; return its folder, function and run."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "rows.py").write_text(FUNCTION.format(witness=str(folder / "it_ran")), encoding="utf-8")
    given = toys.arguments(*SHORT, f"data.format='{folder}/rows.py:read'", runs=folder / "runs")
    run = train(load_config(given))
    (folder / "it_ran").unlink()
    return folder, f"{folder}/rows.py:read", run


@pytest.fixture
def stranger(made, tmp_path):
    """Give a run folder as a stranger may write it: its configuration names a function without a hash."""
    _, function, run = made
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text(encoding="utf-8")
    start = text.index("  format: ")
    end = text.index("\n", text.index("sha256=", start))
    config.write_text(f"{text[:start]}  format: '{function}'{text[end:]}", encoding="utf-8")
    return tmp_path / "run"


def test_a_run_remembers_the_function_by_name_and_hash(made):
    _, function, run = made
    name, _, digest = read_config(run / "config.yaml").data.format.partition(MARK)
    assert name == function
    assert len(digest) == 64


@pytest.mark.parametrize("verb", ["evaluate", "export"])
@pytest.mark.parametrize("written", ["remembered", "by a stranger"])
def test_a_run_folder_runs_no_function(made, stranger, run_cli, tmp_path, verb, written):
    folder, function, run = made
    ckpt = run if written == "remembered" else stranger
    done = run_cli(verb, f"ckpt={ckpt}", f"out={tmp_path / 'out'}")
    assert done.code == 2
    assert f"the rows of this run were read by a function, {function}" in done.err
    assert f"name it on this command line, data.format={function}" in done.err
    assert not (folder / "it_ran").exists()


def test_an_interpolation_runs_no_function(made, stranger, run_cli, tmp_path):
    folder, function, _ = made
    config = stranger / "config.yaml"
    text = config.read_text(encoding="utf-8").replace(f"format: '{function}'", "format: ${runs}")
    config.write_text(text.replace("runs: ", f"runs: '{function}' #"), encoding="utf-8")
    assert run_cli("evaluate", f"ckpt={stranger}", f"out={tmp_path / 'answers'}").code == 2
    assert not (folder / "it_ran").exists()


def test_chat_needs_no_function_and_runs_none(made, stranger, run_cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/exit\n"))
    done = run_cli("chat", f"ckpt={stranger}")
    assert done.code == 0
    assert f"run: {stranger}/{CHECKPOINTS}/step_00000002.ckpt" in done.err
    assert "no picture is shown: /image PATH shows one" in done.err
    assert not (made[0] / "it_ran").exists()


def test_a_function_that_is_named_again_runs(made, run_cli, tmp_path):
    folder, function, run = made
    done = run_cli("evaluate", f"ckpt={run}", f"out={tmp_path / 'answers'}", f"data.format='{function}'")
    assert done.code == 0, done.err
    (folder / "it_ran").unlink()


def test_a_function_whose_file_has_changed_is_refused(made, run_cli, tmp_path):
    folder, function, run = made
    before = (folder / "rows.py").read_text(encoding="utf-8")
    (folder / "rows.py").write_text(before + "# changed\n", encoding="utf-8")
    try:
        done = run_cli("evaluate", f"ckpt={run}", f"out={tmp_path / 'answers'}", f"data.format='{function}'")
    finally:
        (folder / "rows.py").write_text(before, encoding="utf-8")
    assert done.code == 2
    assert f"data.format={function}: the file is not the one that the run was trained with (sha256 " in done.err
    assert not (folder / "it_ran").exists()


@pytest.mark.parametrize("change", ["left out", "changed"])
def test_a_run_goes_on_with_the_same_function_alone(toys, made, run_cli, change):
    folder, function, run = made
    before = (folder / "rows.py").read_text(encoding="utf-8")
    given = [f"data.format='{function}'"] if change == "changed" else []
    try:
        (folder / "rows.py").write_text(before + ("# x\n" if change == "changed" else ""), encoding="utf-8")
        done = run_cli(*toys.arguments(*SHORT, *given, f"resume='{run}'", runs=folder / "runs"))
    finally:
        (folder / "rows.py").write_text(before, encoding="utf-8")
    assert done.code == 2
    assert f"data.format: {function}{MARK}" in done.err
