"""`python -m vlm_tune chat ckpt=RUN image=PICTURE`: talk to a trained model in the terminal."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
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
from vlm_tune.model.generate import Prompt, answer
from vlm_tune.model.trained import open_trained
from vlm_tune.pages.boxes import with_boxes

HELP = "/image PATH shows a picture, /reset starts anew, /exit ends"


class Chat:
    """One conversation."""

    def __init__(self, model: Model, config: Config) -> None:
        self.model = model
        self.tiles = config.model.tiles
        self.normalization = config.model.vision.normalize
        self.images = replace(config.data.image, root=None)  # the user names each file: its folder is the root
        self.messages: list[Message] = []
        self.pending: list[Picture] = []

    def show(self, path: str) -> None:
        """Show a picture with the next question; raise DataError when it cannot be read."""
        picture = Picture(str(Path(path).expanduser().resolve()))
        self._reader(picture).open_picture(picture, path, None)
        self.pending.append(picture)

    def ask(self, question: str, max_new_tokens: int = 256) -> str:
        """Answer a question, given the whole conversation so far."""
        parts: list[Part] = [part for picture in self.pending for part in (picture, "\n")]
        asked = Message("user", (*parts, question))
        open_turn = Message("assistant", ("",), supervised=True)
        sample = Sample("chat", (*self.messages, asked, open_turn), "chat")
        text = answer(self.model, [self._prompt(sample)], max_new_tokens)[0]
        self.messages += [asked, replace(open_turn, parts=(text,))]
        self.pending = []
        return text

    def draw(self, text: str) -> str:
        """Save a copy of the newest picture with the boxes of an answer on it, in a new temporary file.

        Return a line that says where, or "" where there is nothing to draw; raise DataError where it cannot be written.
        """
        shown = Sample("chat", tuple(self.messages)).pictures
        if not shown or "<box>" not in text:
            return ""
        drawn = with_boxes(self._reader(shown[-1]).open_picture(shown[-1], "chat", None), text)
        if drawn is None:
            return ""
        try:
            with tempfile.NamedTemporaryFile(prefix="vlm_tune_boxes_", suffix=".png", delete=False) as file:
                drawn.save(file, "PNG")
        except OSError as error:
            raise DataError(f"the boxes of this answer are not drawn: {error}. Set TMPDIR to another folder") from error
        return f"boxes drawn on {Path(shown[-1].path).name}: {file.name}"

    def reset(self) -> None:
        """Forget the conversation and its pictures."""
        self.messages, self.pending = [], []

    def _prompt(self, sample: Sample) -> Prompt:
        images = [self._reader(picture).open_picture(picture, "chat", None) for picture in sample.pictures]
        sizes, stills = [image.size for image in images], [False] * len(images)
        example = self.model.encoder.encode_prompt(sample, Tiling(sizes, stills, self.tiles))
        limits = tile_limits(stills, self.tiles, example.max_tiles)
        size = self.tiles.size
        made = [np.zeros((0, size, size, 3), dtype=np.uint8)]
        for image, limit in zip(images, limits, strict=True):
            made.append(make_tiles(image, self.tiles, limit, self.normalization))
        return Prompt(example, np.concatenate(made))

    def _reader(self, picture: Picture) -> ImageReader:
        return ImageReader(self.images, Path(picture.path).parent)


def chat(
    ckpt: str, image: str, overrides: list[str], console: Console, begin: Callable[[Model, Config], Chat] = Chat
) -> None:
    """Read questions from the terminal (or a pipe) until /exit or the end of the input."""
    model, config = open_trained(ckpt, overrides)
    talk = begin(model, config)
    aside = make_console(stderr=True)  # a pipe reads only the answers
    tell(aside, model.notes)
    aside.print(f"run: {find_checkpoint(ckpt)}", soft_wrap=True)
    if image:
        talk.show(image)
    shown = f"picture: {Path(image).expanduser().resolve()}" if image else "no picture is shown: /image PATH shows one"
    aside.print(shown, soft_wrap=True)
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
    if line == "/image":
        raise DataError("name a picture: /image PATH")
    elif command == "/image":
        talk.show(rest.strip())
        console.print("(picture shown)")
    elif command == "/reset":
        talk.reset()
        console.print("(new conversation)")
    elif line.startswith("/"):
        raise DataError(f"{command}: no such command. {HELP}")
    elif any("\ud800" <= letter <= "\udfff" for letter in line):
        raise DataError("this line is not UTF-8: ask again", "standard input")
    elif line:
        text = talk.ask(line)
        console.print(text)
        if drawn := talk.draw(text):
            make_console(stderr=True).print(drawn, soft_wrap=True)
