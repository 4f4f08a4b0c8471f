"""One voice: a terminal gets colours and bars, a pipe and VLM_TUNE_QUIET=1 plain and whole lines, as they are."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.table import Table

from vlm_tune import console
from vlm_tune.console import follow, make_console
from vlm_tune.training.callbacks.chats import SampleAnswers

ESCAPE = "\x1b"
LONG = " ".join(["word"] * 100)


class Screen(io.StringIO):
    """What was written to a terminal."""

    def isatty(self):
        return True


@pytest.fixture(params=["stdout", "stderr"])
def stream(request):
    return request.param


@pytest.fixture
def open_screen(monkeypatch):
    """Give a function that puts a terminal in the place of one of the two streams."""

    def open_screen(stream):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(sys, stream, screen := Screen())
        return screen

    return open_screen


def say(stream, what):
    make_console(stderr=stream == "stderr").print(what, style="red")


def table(cell):
    made = Table("first", "second")
    made.add_row(cell, "two")
    return made


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "40"}])
@pytest.mark.parametrize("what", [LONG, table(LONG)], ids=["line", "table"])
def test_a_pipe_gets_whole_lines_without_colours(monkeypatch, capfd, stream, variables, what):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    say(stream, what)
    said = "".join(capfd.readouterr())
    assert any(LONG in line for line in said.splitlines())
    assert ESCAPE not in said


def test_a_terminal_gets_colours(open_screen, stream):
    screen = open_screen(stream)
    say(stream, "red")
    assert ESCAPE in screen.getvalue()


def test_a_quiet_terminal_gets_none(monkeypatch, open_screen, stream):
    monkeypatch.setenv("VLM_TUNE_QUIET", "1")
    screen = open_screen(stream)
    say(stream, "red")
    assert screen.getvalue() == "red\n"


@pytest.mark.parametrize("text", ["[INST] Who? [/INST]", "[bold]x[/bold]", "a :x: b", "1 2.5 'text' http://a.b"])
@pytest.mark.parametrize("what", [str, table], ids=["line", "table"])
def test_text_is_shown_as_it_is(capfd, text, what):
    make_console().print(what(text))
    assert text in capfd.readouterr().out


def test_an_answer_with_brackets_stops_no_run(tmp_path, capfd):
    question = SimpleNamespace(text="[/INST] Who?", expected="[red]")
    answers = SampleAnswers(None, None, [question], 0, tmp_path, make_console())
    answers.before = ["[/bold]"]
    answers._print("step 1", ["[a/b]"])
    assert "[/bold]" in capfd.readouterr().out


def test_of_the_processes_of_a_run_one_speaks(monkeypatch, capfd):
    monkeypatch.setenv("LOCAL_RANK", "1")
    make_console().print("said once")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("quiet", "is_shown"), [("", True), ("0", True), ("1", False)])
def test_a_terminal_gets_a_bar_unless_it_is_quiet(monkeypatch, open_screen, quiet, is_shown):
    monkeypatch.setenv("VLM_TUNE_QUIET", quiet)
    screen = open_screen("stderr")
    assert list(follow("abc", "reading [x]", "rows")) == ["a", "b", "c"]
    assert ("reading [x]" in screen.getvalue()) == is_shown


def test_a_quiet_log_file_gets_no_progress(monkeypatch, capfd):
    monkeypatch.setenv("VLM_TUNE_QUIET", "1")
    monkeypatch.setattr(console, "LINE_SECONDS", 0)
    list(follow("abc", "reading", "rows"))
    assert capfd.readouterr() == ("", "")


def test_an_item_counts_as_its_size(monkeypatch, capfd):
    monkeypatch.setattr(console, "LINE_SECONDS", 0)
    list(follow(iter([[1, 2], [3]]), "reading", "rows", 3, len))
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["reading: 2 of 3", "reading: 3 of 3"]


@pytest.mark.parametrize("verb", [["check"], ["inspect", "row=0", "--text"]], ids=["check", "inspect"])
def test_a_verb_in_a_pipe_is_plain(toys, run_cli, monkeypatch, tmp_path, verb):
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = run_cli(*verb, *toys.arguments(runs=tmp_path))
    assert done.code == 0
    assert done.out
    assert ESCAPE not in done.out + done.err
