"""(1) One conversation, independent of any dialect: `dialects` creates it, `encode` turns it into tokens."""

from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, or a frame of a video, at its place in the text."""

    path: str  # as written in the row, relative to data.image.root; "" if `content` holds the file
    content: bytes | None = None  # the encoded file itself (base64, parquet and tar rows)
    size: tuple[int, int] | None = None  # (width, height) that the row declares
    is_frame: bool = False  # a frame of a video, or a picture shown in low detail: always one tile
    frame: int | None = None  # its index in the video file `path`; None if `path` is a picture


@dataclass(frozen=True, slots=True)
class Boxes:
    """What one mark of a row's boxes stands for, until the size of its picture is known."""

    corners: tuple[tuple[float, float, float, float], ...]  # (x1, y1, x2, y2) of each
    scale: float | None  # the width and height of the whole picture in these numbers; None = its pixels
    picture: int  # its number in the sample, counted from 0


Part = str | Picture


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Pictures are between the pieces of text exactly where the model sees them."""

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = False  # train on this turn (assistant turns only)
    reasoning: str = ""  # of an answer, written before it

    @property
    def text(self) -> str:
        """Return the text of the turn, without pictures."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def written(self) -> str:
        """Return the text of the turn with the reasoning before it."""
        return self.reasoning + self.text


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: its id, its turns, and where it comes from."""

    id: str
    messages: tuple[Message, ...]
    where: str = ""  # "train.jsonl:17"
    is_plain: bool = False  # plain text for continued pretraining: no turns, so no template
    boxes: tuple[Boxes, ...] = ()  # that are not in the text yet: `<bbox>` marks stand in their places
    rejected: Message | None = None  # of a pair: the answer that is worse than the last one, which alone is supervised

    @property
    def turns(self) -> tuple[Message, ...]:
        """Return all messages, of a pair the rejected answer too."""
        return self.messages if self.rejected is None else (*self.messages, self.rejected)

    @property
    def branches(self) -> tuple["Sample", ...]:
        """Return the conversation with each of its last answers: itself, or of a pair the chosen and the rejected."""
        if self.rejected is None:
            return (self,)
        chosen = replace(self, rejected=None)
        return chosen, replace(chosen, messages=(*self.messages[:-1], self.rejected))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Return all pictures, in the order of the text."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Picture))

    @property
    def is_located(self) -> bool:
        """Return whether the text says where something is in a picture, which must not be mirrored or cropped then."""
        return any("<box>" in message.written for message in self.turns)
