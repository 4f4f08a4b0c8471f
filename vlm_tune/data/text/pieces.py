"""Lay a rendered conversation out as special tokens, pictures, and the text pieces between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Encoding

from vlm_tune.data.sample import Picture
from vlm_tune.data.text.templates import Segment
from vlm_tune.data.text.tokens import PlainKey, TextTokenizer


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

    def spans(self, encoding: Encoding) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, supervised) in tokens for each part.

        A token across the border of two parts belongs to the first, as in InternVL, which masks as many tokens as the
        header has: an answer that begins with a newline may lose it to the header "assistant\\n".
        """
        start = 0
        for end_in_text, supervised in self.marks[:-1]:
            # In "ASSISTANT: The" the space belongs to the token of "The", which the model has to generate: LLaVA's
            # prompt ends at the colon.
            starts_word = not supervised and self.text[end_in_text - 1] == " "
            end = max(start, _first_token(encoding, end_in_text - starts_word, len(self.text)))
            yield start, end, supervised
            start = end
        yield start, len(encoding), self.marks[-1][1]


Item = tuple[int, bool] | Piece | Picture
"""(id, supervised) of a special token, a piece of text, or a picture."""


def _first_token(encoding: Encoding, start: int, stop: int) -> int:
    """Return the first token that lies wholly at or behind a character, the number of tokens where none does."""
    for position in range(start, stop):  # a normalizer may have dropped characters
        token = encoding.char_to_token(position)
        if token is not None:
            begin, _ = encoding.token_to_chars(token) or (start, stop)
            return token + (begin < start)
    return len(encoding)


def lay_out(
    segments: Sequence[Segment], tokens: TextTokenizer, bos_id: int | None, *, splits_at_pictures: bool
) -> list[Item]:
    """Join the text between special tokens into pieces, the tokenizer's first token in front where it has one.

    `splits_at_pictures`: the text after a picture is a string of its own, as in LLaVA, which splits its prompt there.
    """
    items: list[Item] = []
    opens = True
    if bos_id is not None:
        items.append((bos_id, False))
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


def is_supervised_first(item: Item) -> bool:
    """Say whether the first token of an item is supervised."""
    if isinstance(item, Piece):
        return item.marks[0][1]
    return isinstance(item, tuple) and item[1]


def keys_of(items: Sequence[Item]) -> Iterator[PlainKey]:
    """Yield what the tokenizer has to read for these items."""
    return ((item.opens, item.text) for item in items if isinstance(item, Piece))
