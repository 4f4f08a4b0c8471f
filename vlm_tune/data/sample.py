"""(1) One conversation of the user, free of any dialect: `formats` makes it, `encode` turns it into tokens."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Picture:
    """Name one picture (or one frame of a video) where it stands in the text."""

    path: str  # as the row writes it, relative to data.image.root; "" when `content` holds the file
    content: bytes | None = None  # the encoded file itself (base64, parquet and tar rows)
    size: tuple[int, int] | None = None  # (width, height) that the row declares
    is_frame: bool = False  # a frame of a video: always one tile
    frame: int | None = None  # its number in the video file `path`, from 0; None where `path` is a picture


Part = str | Picture


@dataclass(frozen=True, slots=True)
class Message:
    """Hold one turn. A picture stands between the pieces of text exactly where the model sees it."""

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = False  # train on this turn (assistant turns only)
    reasoning: str = ""  # what an answer is thought out with, written before it

    @property
    def text(self) -> str:
        """The turn's text, pictures left out."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold one row: its turns, who it is, and where it came from."""

    id: str
    messages: tuple[Message, ...]
    where: str = ""  # "train.jsonl:17"
    is_plain: bool = False  # running text for continued pretraining: no turns, hence no template

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in the order of the text."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Picture))
