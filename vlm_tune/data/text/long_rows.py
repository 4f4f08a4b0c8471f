"""Rows that are far too long: only the part of their beginning that can matter is tokenized.

Tokenizing takes about a second and 250 MB per million characters. A row of 60 million, usually a book or a log that
should have been many rows, is found to be too long by its beginning alone.
"""

from dataclasses import dataclass, replace

from vlm_tune.data.sample import Message, Part, Sample
from vlm_tune.data.text.tokens import TextTokenizer

LONG = 1 << 20  # characters; a row of up to this length is tokenized whole, so its tokens are counted exactly
_SPARE = 64  # tokens by which a text's count may change next to the text of a template


@dataclass(frozen=True, slots=True)
class Beginning(Sample):
    """The beginning of a row that is too long; up to the limit, its tokens are those of the whole row."""

    num_answers: int = 0  # of the whole row


def shortened(sample: Sample, tokens: TextTokenizer, limit: int) -> Sample:
    """Return the sample itself, or if it exceeds LONG characters and `limit` tokens, its beginning.

    The beginning has more than `limit` tokens, too, and a supervised answer if the row has one.
    """
    texts = (part for message in sample.messages for part in (message.reasoning, *message.parts))
    if sum(len(text) for text in texts if isinstance(text, str)) <= LONG:
        return sample
    room = limit + _SPARE
    messages: list[Message] = []
    for message in sample.messages:
        if room <= 0 and message.role != "assistant" and any(each.supervised for each in messages):
            break
        thought, num_tokens = _beginning(message.reasoning, tokens, max(room, _SPARE))
        room -= num_tokens
        parts: list[Part] = []
        for part in message.parts:
            if isinstance(part, str):
                part, num_tokens = _beginning(part, tokens, max(room, _SPARE))
                room -= num_tokens
            parts.append(part)
        messages.append(replace(message, parts=tuple(parts), reasoning=thought))
    if room > 0:
        return sample
    num_answers = sum(message.role == "assistant" for message in sample.messages)
    return Beginning(sample.id, tuple(messages), sample.where, sample.is_plain, num_answers=num_answers)


def _beginning(text: str, tokens: TextTokenizer, limit: int) -> tuple[str, int]:
    """Cut a text where its first `limit` tokens no longer depend on what follows; return it with its token count.

    That is where twice as much text begins with the same tokens. A text of fewer tokens stays whole.
    """
    size = max(16 * limit, 1 << 14)
    before: list[int] = []
    while size < len(text):
        ids = _ids(text[:size], tokens)
        if len(before) > limit and before[:limit] == ids[:limit]:
            return text[:size], len(ids)
        before, size = ids, 2 * size
    return text, len(_ids(text, tokens))


def _ids(text: str, tokens: TextTokenizer) -> list[int]:
    return tokens.plain([(False, text)])[False, text].ids


def most_turns(sample: Sample, tokens: TextTokenizer, limit: int) -> int:
    """Return an upper bound for how many of a sample's turns (each ends with an answer) fit into `limit` tokens.

    The turns up to the first supervised one count in any case, whether they fit or not.
    """
    texts = [message.text for message in sample.messages]
    encodings = tokens.plain((False, text) for text in texts)
    num_tokens = num_turns = 0
    is_supervised = False
    for message, text in zip(sample.messages, texts, strict=True):
        num_tokens += len(encodings[False, text]) - 2  # either end may merge with the text next to it
        num_turns += message.role == "assistant"
        is_supervised |= message.supervised
        if num_tokens > limit and is_supervised and message.role == "assistant":
            break
    return num_turns
