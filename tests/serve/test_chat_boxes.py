"""An answer with boxes is drawn: a copy of the conversation's newest picture, beside no file of the user."""

from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vlm_tune.config.parse import load_config
from vlm_tune.data.sample import Message, Picture
from vlm_tune.errors import DataError
from vlm_tune.serve.chat import Chat, respond

BOX = "<box>[[250, 500, 750, 1000]]</box>"
WHITE = (255, 255, 255)


class Canned(Chat):
    """A chat about a picture whose model always gives one answer."""

    def __init__(self, answer: str, *pictures: Path) -> None:
        super().__init__(None, load_config(["data.path=none"]))
        self.answer = answer
        self.messages = [Message("user", (*(Picture(str(path)) for path in pictures), "Where is it?"))]

    def ask(self, question, max_new_tokens=256, say=None):
        return self.answer


@pytest.fixture
def wide(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    Image.new("RGB", (200, 100), WHITE).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def drawn_in(folder):
    return list((folder / "temporary").iterdir())


def test_an_answer_with_a_box_is_drawn_and_its_path_told_once(wide, tmp_path, capsys):
    before = wide.read_bytes()
    respond(Canned(BOX, wide), "Where is it?", Console())
    told = capsys.readouterr()
    [path] = drawn_in(tmp_path)
    assert told.out.strip() == BOX  # a pipe reads only the answers
    assert told.err.strip() == f"boxes drawn on wide.png: {path}"
    with Image.open(path) as image:
        assert (image.size, image.getpixel((0, 0))) == ((200, 100), WHITE)
        assert image.getpixel((50, 75)) != WHITE
    assert wide.read_bytes() == before


def test_every_answer_has_a_file_of_its_own(wide, tmp_path):
    talk = Canned(BOX, wide)
    for _ in range(2):
        respond(talk, "Where is it?", Console(quiet=True))
    assert len(drawn_in(tmp_path)) == 2


def test_boxes_are_drawn_on_the_newest_picture(wide, tmp_path):
    Image.new("RGB", (60, 80)).save(tmp_path / "high.png")
    respond(Canned(BOX, wide, tmp_path / "high.png"), "Where is it?", Console(quiet=True))
    with Image.open(drawn_in(tmp_path)[0]) as image:
        assert image.size == (60, 80)


@pytest.mark.parametrize(("answer", "pictures"), [("In the middle.", 1), (BOX, 0)], ids=["no box", "no picture"])
def test_nothing_is_written_where_there_is_nothing_to_draw(wide, tmp_path, capsys, answer, pictures):
    respond(Canned(answer, *[wide] * pictures), "Where is it?", Console())
    assert drawn_in(tmp_path) == []
    assert capsys.readouterr().err == ""


def test_a_folder_that_takes_no_file_is_an_error_after_the_answer(wide, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(wide.parent / "nowhere"))
    with pytest.raises(DataError, match=r"boxes of this answer are not drawn: .*nowhere"):
        respond(Canned(BOX, wide), "Where is it?", Console())
    assert capsys.readouterr().out.strip() == BOX
