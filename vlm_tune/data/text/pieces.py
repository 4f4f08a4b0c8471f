"""The items of a conversation: control tokens, pictures, and the text between them, each with its tokens and loss.

Every item answers two questions: which tokens it has (`ids`), and how long its runs of tokens with or without loss are
(`spans`). Counting and assembling a sample rely on the same answers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Encoding

from vlm_tune.data.sample import Picture
from vlm_tune.data.text.templates import Segment
from vlm_tune.data.text.tokens import TextTokenizer

Span = tuple[int, bool]
"""A number of consecutive tokens, and whether they are supervised."""


@dataclass(slots=True)
class ControlToken:
    """A token that only templates write."""

    id: int
    supervised: bool

    def spans(self) -> Iterable[Span]:
        """Return its one token."""
        return ((1, self.supervised),)

    def ids(self) -> Sequence[int]:
        """Return its id."""
        return (self.id,)


@dataclass(frozen=True, slots=True)
class ImageIds:
    """The tokens around a picture, and the one that each of its features replaces."""

    start: tuple[int, ...] = ()
    context: int | None = None  # None = the model takes no pictures
    end: tuple[int, ...] = ()


@dataclass(slots=True)
class ImageSlot:
    """The place of a picture; the number of its features is known once its tiles are chosen."""

    tokens: ImageIds
    num_features: int = 0

    def spans(self) -> Iterable[Span]:
        """Return the number of its tokens; none carries loss."""
        return ((len(self.tokens.start) + self.num_features + len(self.tokens.end), False),)

    def ids(self) -> Sequence[int]:
        """Return the tokens around the picture, with one for each feature between them."""
        return (*self.tokens.start, *[self.tokens.context or 0] * self.num_features, *self.tokens.end)


@dataclass(slots=True)
class TextPiece:
    """A stretch of text without control tokens, which the tokenizer sees as one string.

    It may have parts of both kinds: in "assistant\\nA cat." the header and the answer are one piece, because the
    references also tokenize them as one string, and characters may merge across the border.
    """

    opens: bool  # opens a string of the reference, where SentencePiece puts its space in front
    text: str = ""
    marks: tuple[tuple[int, bool], ...] = ()  # (end in characters, supervised) of its parts
    encoding: Encoding | None = None  # set by `tokenize`

    def append(self, text: str, supervised: bool) -> None:
        """Add text at the end."""
        self.text += text
        joined = self.marks[:-1] if self.marks and self.marks[-1][1] == supervised else self.marks
        self.marks = (*joined, (len(self.text), supervised))

    def spans(self) -> Iterator[Span]:
        """Yield the number of tokens of each part.

        A token across the border of two parts belongs to the first, as in InternVL, which masks as many tokens as the
        header has: an answer that begins with a newline may lose it to the header "assistant\\n".
        """
        assert self.encoding is not None
        start = 0
        for end_in_text, supervised in self.marks[:-1]:
            # In "ASSISTANT: The" the space belongs to the token of "The", which the model has to generate: LLaVA's
            # prompt ends at the colon.
            starts_word = not supervised and self.text[end_in_text - 1] == " "
            end = max(start, _first_token(self.encoding, end_in_text - starts_word, len(self.text)))
            yield end - start, supervised
            start = end
        yield len(self.encoding) - start, self.marks[-1][1]

    def ids(self) -> Sequence[int]:
        """Return the tokens of the text."""
        assert self.encoding is not None
        return self.encoding.ids


Item = ControlToken | ImageSlot | TextPiece


def _first_token(encoding: Encoding, start: int, stop: int) -> int:
    """Return the index of the first token that begins at or after a character, or the number of tokens if none does."""
    for position in range(start, stop):  # a normalizer may have dropped characters
        token = encoding.char_to_token(position)
        if token is not None:
            begin, _ = encoding.token_to_chars(token) or (start, stop)
            return token + (begin < start)
    return len(encoding)


def lay_out(segments: Sequence[Segment], tokens: TextTokenizer, bos_id: int | None, image: ImageIds) -> list[Item]:
    """Join the text between control tokens into pieces, with the tokenizer's first token, if any, in front.

    After a picture without edges, the text is a string of its own, as in LLaVA, which splits its prompt there.
    """
    items: list[Item] = []
    opens = True
    if bos_id is not None:
        items.append(ControlToken(bos_id, False))
    for segment in segments:
        opens = opens or segment.starts_piece
        if isinstance(segment.content, Picture):
            items.append(ImageSlot(image))
            opens = not image.start
        else:
            for part in tokens.control(segment.content) if segment.is_control else (segment.content,):
                opens = _append(items, part, segment.supervised, opens, tokens)
    if bos_id is not None and items[:1] == items[1:2]:  # the template writes the tokenizer's first token itself
        items.pop(0)
    return items


def _append(items: list[Item], part: int | str, supervised: bool, opens: bool, tokens: TextTokenizer) -> bool:
    """Add a control token or some text; return whether the next text still opens a string."""
    if isinstance(part, int):
        items.append(ControlToken(part, supervised))
        return False
    last = None if opens or not items else items[-1]
    if isinstance(last, ControlToken) and last.id in tokens.strips_right:
        part = part.lstrip()
    if isinstance(last, TextPiece):
        last.append(part, supervised)
    elif part:
        items.append(TextPiece(opens, part, ((len(part), supervised),)))
    else:
        return opens
    return False


def tokenize(items: Iterable[Item], tokens: TextTokenizer) -> None:
    """Tokenize every piece of text, in one batch."""
    pieces = [item for item in items if isinstance(item, TextPiece)]
    encodings = tokens.plain((piece.opens, piece.text) for piece in pieces)
    for piece in pieces:
        piece.encoding = encodings[piece.opens, piece.text]


def place_features(items: Iterable[Item], num_features: Sequence[int]) -> None:
    """Set the number of features of every picture, in the order of the text."""
    slots = [item for item in items if isinstance(item, ImageSlot)]
    for slot, number in zip(slots, num_features, strict=True):
        slot.num_features = number


def count(items: Sequence[Item]) -> tuple[int, int]:
    """Count the tokens and the supervised ones; the very first never is, as nothing before it could predict it."""
    num_tokens = num_supervised = 0
    for item in items:
        for number, supervised in item.spans():
            if supervised:
                num_supervised += number - (number > 0 and num_tokens == 0 and not isinstance(items[0], ImageSlot))
            num_tokens += number
    return num_tokens, num_supervised


def head_of(items: Sequence[Item]) -> tuple[str, int]:
    """Return what the tokens up to the end of the last picture are made of, and their number without its features.

    Two samples of equal heads whose pictures are equal begin with the same tokens. Without pictures: ("", 0).
    """
    last = max((number for number, item in enumerate(items) if isinstance(item, ImageSlot)), default=-1)
    head = items[: last + 1]
    made_of = [(item.opens, item.text) if isinstance(item, TextPiece) else item.ids() for item in head]
    return repr(made_of) if head else "", sum(number for item in head for number, _ in item.spans())


def drop_last_space(items: list[Item]) -> None:
    """Drop the space that ends a prompt: the model generates it with the first word."""
    last = items[-1]
    if isinstance(last, TextPiece) and last.text.endswith(" "):
        last.text = last.text[:-1]
        last.marks = ((len(last.text), False),)
