"""Lay a rendered conversation out as special tokens, pictures, and the text pieces between them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Encoding

from vlm_tune.data.sample import Picture
from vlm_tune.data.templates import Segment
from vlm_tune.data.tokens import PlainKey, TextTokenizer


@dataclass(slots=True)
class Piece:
    """Hold a stretch of text without special tokens: the tokenizer sees it as one string.

    It may hold parts of several kinds: in "assistant\\nA cat." the header and the answer are one piece, because the
    references tokenize them in one string too and their characters may merge.
    """

    opens: bool  # opens a string of the reference, where SentencePiece puts its space in front
    text: str = ""
    marks: tuple[tuple[int, bool], ...] = ()  # (end in characters, supervised) of its parts

    def append(self, text: str, supervised: bool) -> None:
        """Add text at the end."""
        self.text += text
        joined = self.marks[:-1] if self.marks and self.marks[-1][1] == supervised else self.marks
        self.marks = (*joined, (len(self.text), supervised))

    def cuts(self) -> Iterator[tuple[str, bool]]:
        """Yield (the text up to the end of a part, supervised) for each part; the last is the whole text."""
        for index, (end, supervised) in enumerate(self.marks):
            text = self.text[:end]
            # In "ASSISTANT: The" the space belongs to the token of "The", which the model has to generate: LLaVA's
            # prompt ends at the colon.
            if not supervised and index + 1 < len(self.marks) and text.endswith(" "):
                text = text[:-1]
            yield text, supervised


Item = tuple[int, bool] | Piece | Picture
"""(id, supervised) of a special token, a piece of text, or a picture."""


def lay_out(segments: Sequence[Segment], tokens: TextTokenizer, *, splits_at_pictures: bool) -> list[Item]:
    """Join the text between special tokens into pieces, the tokenizer's first token in front where it has one.

    `splits_at_pictures`: the text after a picture is a string of its own, as in LLaVA, which splits its prompt there.
    """
    items: list[Item] = []
    opens = True
    if tokens.bos_id is not None:
        items.append((tokens.bos_id, False))
    for segment in segments:
        opens = opens or segment.starts_piece
        if isinstance(segment.content, Picture):
            items.append(segment.content)
            opens = splits_at_pictures
        elif not segment.is_control:
            opens = _append(items, segment.content, segment, opens, tokens)
        else:
            for part in tokens.control(segment.content):
                opens = _append(items, part, segment, opens, tokens)
    if items[:1] == items[1:2]:  # the template writes the tokenizer's first token itself
        items.pop(0)
    return items


def _append(items: list[Item], part: int | str, segment: Segment, opens: bool, tokens: TextTokenizer) -> bool:
    """Add a token or some text; say whether the next text still opens a string."""
    last = items[-1] if items else None
    if isinstance(part, int):
        items.append((part, segment.supervised))
        return False
    if isinstance(last, Piece) and not opens:
        last.append(part, segment.supervised)
        return False
    if isinstance(last, tuple) and not opens and last[0] in tokens.strips_right:
        part = part.lstrip()
    if not part:
        return opens
    piece = Piece(opens)
    piece.append(part, segment.supervised)
    items.append(piece)
    return False


def drop_last_space(items: list[Item]) -> list[Item]:
    """Drop the space that ends a prompt: the model generates it with the first word."""
    last = items[-1]
    if isinstance(last, Piece) and last.text.endswith(" "):
        shorter = Piece(last.opens)
        shorter.append(last.text[:-1], False)
        return [*items[:-1], shorter]
    return items


def spans(piece: Piece, encodings: Mapping[PlainKey, Encoding]) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, supervised) in tokens for each part of a piece.

    A token across the border of two parts belongs to the first, as in InternVL, which counts the tokens of the header
    and masks as many: after "assistant\\n" an answer that begins with a newline may lose it to the header.
    """
    start = 0
    for text, supervised in piece.cuts():
        end = max(start, len(encodings[piece.opens, text]))
        yield start, end, supervised
        start = end


def is_supervised_first(item: Item) -> bool:
    """Say whether the first token of an item is supervised."""
    if isinstance(item, Piece):
        return item.marks[0][1]
    return isinstance(item, tuple) and item[1]


def keys_of(items: Sequence[Item]) -> Iterator[PlainKey]:
    """Yield what the tokenizer has to read for these items."""
    for item in items:
        if isinstance(item, Piece):
            for text, _ in item.cuts():
                yield item.opens, text
