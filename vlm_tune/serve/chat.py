"""`python -m vlm_tune chat ckpt=RUN image=PICTURE`: talk to a trained model in the terminal."""

import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from vlm_tune.config.schema import Config
from vlm_tune.console import make_console, tell
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Message, Part, Picture, Sample
from vlm_tune.data.sets.dataset import Tiling
from vlm_tune.data.tiles import make_tiles, tile_limits
from vlm_tune.errors import DataError, VlmTuneError
from vlm_tune.model.build import Model
from vlm_tune.model.checkpoint import find_checkpoint
from vlm_tune.model.generate import GREEDY, Prompt, Sampling, Writer, write
from vlm_tune.model.trained import open_base, open_trained
from vlm_tune.pages.boxes import with_boxes
from vlm_tune.serve.kept import load_messages, save_messages

HELP = (
    "/image PATH shows a picture (again for more), /system TEXT tells it how to answer, /save FILE and /load FILE keep "
    "the conversation, /reset starts anew, /exit ends"
)
NEEDS = {
    "/image": ("name a picture", "PATH"),
    "/system": ("say how to answer", "TEXT"),
    "/save": ("name a new file", "FILE.jsonl"),
    "/load": ("name a file of a conversation", "FILE.jsonl"),
}


class Chat:
    """One conversation."""

    def __init__(self, model: Model, config: Config) -> None:
        self.model, self.config = model, config
        self.tiles = config.model.tiles
        self.normalization = config.model.vision.normalize
        self.images = replace(config.data.image, root=None)  # the user names each file: its folder is the root
        self.messages: list[Message] = []
        self.pending: list[Picture] = []
        self.sampling = GREEDY

    def show(self, path: str) -> None:
        """Show a picture with the next question; raise DataError when it cannot be read."""
        picture = Picture(str(Path(path).expanduser().resolve()))
        self._reader(picture).open_picture(picture)
        self.pending.append(picture)

    def ask(self, question: str, max_new_tokens: int = 256, say: Callable[[str], bool] = lambda _: True) -> str:
        """Answer a question, given the whole conversation so far; `say` gets the answer piece by piece."""
        parts: list[Part] = [part for picture in self.pending for part in (picture, "\n")]
        asked = Message("user", (*parts, question))
        open_turn = Message("assistant", ("",), supervised=True)
        sample = Sample("chat", (*self.messages, asked, open_turn), "chat")
        writer = Writer(self.model, max_new_tokens, say)
        write(self.model, [self.prompt(sample)], [writer], self.sampling)
        self.messages += [asked, replace(open_turn, parts=(writer.text,))]
        self.pending = []
        return writer.text

    def begin_with(self, messages: list[Message]) -> None:
        """Go on after these turns, or under a system text alone."""
        self.messages, self.pending = messages, []

    def draw(self, text: str) -> str:
        """Save a copy of the newest picture with the boxes of an answer on it, in a new temporary file.

        Return a line that says where, or "" where there is nothing to draw; raise DataError where it cannot be written.
        """
        found = self.boxed(self.messages, text)
        if found is None:
            return ""
        name, drawn = found
        try:
            with tempfile.NamedTemporaryFile(prefix="vlm_tune_boxes_", suffix=".png", delete=False) as file:
                drawn.save(file, "PNG")
        except OSError as error:
            raise DataError(f"the boxes of this answer are not drawn: {error}. Set TMPDIR to another folder") from error
        return f"boxes drawn on {name}: {file.name}"

    def boxed(self, messages: Sequence[Message], text: str) -> tuple[str, Image.Image] | None:
        """Return the newest picture's name and a copy with the boxes of a text; None where there is nothing to draw."""
        shown = Sample("chat", tuple(messages)).pictures
        if not shown or "<box>" not in text:
            return None
        drawn = with_boxes(self._reader(shown[-1]).open_picture(shown[-1], "chat", None), text)
        return None if drawn is None else (Path(shown[-1].path).name, drawn)

    def reset(self) -> None:
        """Forget the conversation and its pictures."""
        self.messages, self.pending = [], []

    def prompt(self, sample: Sample) -> Prompt:
        """Encode a conversation up to its last question."""
        images = [self._reader(picture).open_picture(picture, "chat", None) for picture in sample.pictures]
        sizes, is_frame = [image.size for image in images], [picture.is_frame for picture in sample.pictures]
        example = self.model.encoder.encode_prompt(sample, Tiling(sizes, is_frame, self.tiles))
        limits = tile_limits(is_frame, self.tiles, example.max_tiles)
        size = self.tiles.size
        made = [np.zeros((0, size, size, 3), dtype=np.uint8)]
        for image, limit in zip(images, limits, strict=True):
            made.append(make_tiles(image, self.tiles, limit, self.normalization))
        return Prompt(example, np.concatenate(made))

    def _reader(self, picture: Picture) -> ImageReader:
        return ImageReader(self.images, Path(picture.path).parent)


@dataclass(frozen=True)
class Wishes:
    """What a chat begins with."""

    images: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    is_base: bool = False  # the model before its training


def chat(
    ckpt: str, wishes: Wishes, overrides: list[str], console: Console, begin: Callable[[Model, Config], Chat] = Chat
) -> None:
    """Read questions from the terminal (or a pipe) until /exit or the end of the input."""
    model, config = (open_base if wishes.is_base else open_trained)(ckpt, overrides)
    talk = begin(model, config)
    talk.sampling = wishes.sampling
    aside = make_console(stderr=True)  # a pipe reads only the answers
    tell(aside, model.notes)
    untrained = ", without its training" if wishes.is_base else ""
    aside.print(f"run: {find_checkpoint(ckpt)}{untrained}", soft_wrap=True)
    for image in wishes.images:
        talk.show(image)
        aside.print(f"picture: {talk.pending[-1].path}", soft_wrap=True)
    if not wishes.images:
        aside.print("no picture is shown: /image PATH shows one", soft_wrap=True)
    if sys.stdin.isatty():
        console.print(HELP)
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip() if sys.stdin.isatty() else input().strip()
        except EOFError:
            return
        if line == "/exit":
            return
        try:
            respond(talk, line, console)
        except VlmTuneError as error:
            console.print(f"{type(error).__name__}: {error}")


def respond(talk: Chat, line: str, console: Console) -> None:
    """Carry out a command, or answer a question."""
    command, _, rest = line.partition(" ")
    given = rest.strip()
    if any("\ud800" <= letter <= "\udfff" for letter in line):
        raise DataError("this line is not UTF-8: ask again", "standard input")
    if command in NEEDS and not given:
        raise DataError(f"{NEEDS[command][0]}: {command} {NEEDS[command][1]}")
    if command == "/image":
        talk.show(pasted(given))
        console.print("(picture shown)")
    elif command == "/system":
        talk.begin_with([Message("system", (given,))])
        console.print("(new conversation)")
    elif command == "/save":
        console.print(f"(saved: {save_messages(talk.messages, pasted(given))})", soft_wrap=True)
    elif command == "/load":
        talk.begin_with(load_messages(pasted(given), talk.config))
        console.print(f"(the conversation goes on after {len(talk.messages)} turns)")
    elif command == "/reset":
        talk.reset()
        console.print("(new conversation)")
    elif line.startswith("/"):
        raise DataError(f"{command}: no such command. {HELP}")
    elif line:
        say_answer(talk, line, console)


def say_answer(talk: Chat, question: str, console: Console) -> None:
    """Print an answer as it is written, and draw the boxes that it names."""
    said: list[str] = []

    def say(piece: str) -> bool:
        said.append(piece)
        console.print(piece, end="", soft_wrap=True)
        return True

    text = talk.ask(question, say=say)
    console.print(text.removeprefix("".join(said)), soft_wrap=True)
    if drawn := talk.draw(text):
        make_console(stderr=True).print(drawn, soft_wrap=True)


def pasted(path: str) -> str:
    """Return a path as a terminal pastes it, without its quotes or backslashes; a file of just this name comes first.

    `'my cat.png'`, `"my cat.png"` and `my\\ cat.png` are my cat.png, and so is `my cat.png` itself.
    """
    if Path(path).expanduser().exists():
        return path
    try:
        words = shlex.split(path)
    except ValueError:  # an apostrophe
        return path
    return words[0] if len(words) == 1 else path
