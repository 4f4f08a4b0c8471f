"""Recipes: prepared once, whole or not at all, by one process at a time; their errors arrive in one line."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vlm_tune.errors import ConfigError, DataError
from vlm_tune.recipes import recipe
from vlm_tune.recipes.recipe import recipe_folders, recipe_main, recipe_parser, run_recipe, write_rows

COUNTING = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
with open({log!r}, "a") as log:
    log.write("ran\\n")
(out / "first.txt").write_text("1")
time.sleep({seconds})
{more}
(out / "last.txt").write_text("2")
"""


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty folder that stands for a checkout: its data_recipes are those that are found."""
    monkeypatch.setattr(recipe, "PACKAGE", tmp_path / "vlm_tune")
    return tmp_path


def write_recipe(checkout: Path, name: str, more: str = "", seconds: float = 0.0) -> Path:
    folder = checkout / "data_recipes" / name
    folder.mkdir(parents=True, exist_ok=True)
    text = COUNTING.format(log=str(checkout / "log"), seconds=seconds, more=more)
    (folder / "prepare.py").write_text(text)
    return folder


def count_runs(checkout: Path) -> int:
    return (checkout / "log").read_text().count("ran")


def test_a_recipe_runs_once(checkout: Path) -> None:
    write_recipe(checkout, "toy")
    folder = run_recipe("toy", checkout / "cache")
    assert folder == checkout / "cache" / "recipes" / "toy"
    assert {path.name for path in folder.iterdir()} == {"first.txt", "last.txt", "recipe.json"}
    assert json.loads((folder / "recipe.json").read_text())["recipe"] == "toy"
    assert run_recipe("toy", checkout / "cache") == folder
    assert count_runs(checkout) == 1


def test_a_changed_recipe_runs_again_and_a_changed_readme_does_not(checkout: Path) -> None:
    source = write_recipe(checkout, "toy")
    folder = run_recipe("toy", checkout / "cache")
    (folder / "stale.txt").write_text("of the old version")
    (source / "README.md").write_text("# toy")
    run_recipe("toy", checkout / "cache")
    assert count_runs(checkout) == 1
    (source / "phrases.json").write_text("{}")
    run_recipe("toy", checkout / "cache")
    assert count_runs(checkout) == 2
    assert not (folder / "stale.txt").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".toy.lock", "toy"]


def test_the_cache_is_that_of_the_environment(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(checkout, "toy", more="import os; (out / 'cache').write_text(os.environ['VLM_TUNE_CACHE'])")
    monkeypatch.setenv("VLM_TUNE_CACHE", str(checkout / "cache"))
    assert (run_recipe("toy") / "cache").read_text() == str(checkout / "cache")


def test_an_unknown_recipe_lists_those_there_are(checkout: Path) -> None:
    write_recipe(checkout, "toy")
    write_recipe(checkout, "other")
    with pytest.raises(ConfigError, match=r"there is no data recipe 'tpy'. Those there are: other, toy$"):
        run_recipe("tpy", checkout / "cache")
    with pytest.raises(ConfigError, match="no data recipe"):
        run_recipe("../data_recipes/toy", checkout / "cache")


def test_an_installation_without_recipes(checkout: Path) -> None:
    with pytest.raises(ConfigError, match=r"none at all below .*install vlm_tune again"):
        run_recipe("toy", checkout / "cache")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "sys.stderr.write('DataError: a.whl: no network. Get it\\n'); sys.exit(2)",
            r"toy: the recipe failed \(exit code 2\) and nothing was kept:\n  DataError: a.whl: no network. Get it$",
        ),
        ("raise KeyError('a bug')", r"(?s)exit code 1.*KeyError: 'a bug'\n  To see all of it, run .*prepare.py --out"),
        ("sys.exit(3)", r"exit code 3\) and nothing was kept:\n  \(it wrote no error\)"),
    ],
    ids=["its error", "a bug", "silent"],
)
def test_a_failing_recipe_keeps_what_was_there(more: str, message: str, checkout: Path) -> None:
    write_recipe(checkout, "toy")
    folder = run_recipe("toy", checkout / "cache")
    write_recipe(checkout, "toy", more)
    with pytest.raises(DataError, match=message):
        run_recipe("toy", checkout / "cache")
    assert (folder / "last.txt").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".toy.lock", "toy"]


def test_two_at_once_prepare_it_once(checkout: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_recipe(checkout, "toy", seconds=0.5)
    results: list[Path] = []

    def run() -> None:
        results.append(run_recipe("toy", checkout / "cache"))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert count_runs(checkout) == 1
    assert "another process prepares the data recipe toy: waiting for it" in caplog.text


def test_a_killed_run_leaves_nothing_that_counts(checkout: Path) -> None:
    write_recipe(checkout, "toy", seconds=60)
    script = "import sys; from pathlib import Path; from vlm_tune.recipes import recipe; "
    script += "recipe.PACKAGE = Path(sys.argv[1]); recipe.run_recipe('toy', Path(sys.argv[2]))"
    command = [sys.executable, "-c", script, str(recipe.PACKAGE), str(checkout / "cache")]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    while not list((checkout / "cache").glob("recipes/.toy-new-*/first.txt")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, 9)  # its own session: this process and the prepare.py that it started
    process.wait()
    write_recipe(checkout, "toy")
    folder = run_recipe("toy", checkout / "cache")
    assert (folder / "last.txt").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".toy.lock", "toy"]


def test_recipe_main_prints_one_line_and_returns_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    def fail(options: argparse.Namespace) -> None:
        assert options.out.is_dir()
        raise DataError("3 columns, expected 4. Report it", where="table.csv")

    def disk_is_full(options: argparse.Namespace) -> None:
        raise OSError(28, "No space left on device", str(options.out / "a"))

    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path / "out")])
    assert recipe_main(fail, recipe_parser("Make it.")) == 2
    assert capsys.readouterr().err == "DataError: table.csv: 3 columns, expected 4. Report it\n"
    assert recipe_main(disk_is_full, recipe_parser("Make it.")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert recipe_main(lambda options: None, recipe_parser("Make it.")) == 0


def test_write_rows(tmp_path: Path) -> None:
    assert write_rows([{"id": "1", "text": "甲\nयह"}, {"id": "2"}], tmp_path / "a.jsonl") == 2
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["1", "2"]
    assert "甲\\nयह" in lines[0]


def test_every_recipe_of_the_project_has_a_readme_and_a_help() -> None:
    folders = recipe_folders()
    assert set(folders) >= {"chat_text", "demo", "demo_cnn", "demo_llm", "demo_vision", "easy_vqa"}
    for folder in folders.values():
        readme = (folder / "README.md").read_text(encoding="utf-8")
        for word in ("licence", "sha256", "MB"):
            assert word in readme, (folder.name, word)
        compile((folder / "prepare.py").read_text(encoding="utf-8"), str(folder), "exec")
