"""Tokenize control text with its control tokens, and everything else without any, whatever a user writes.

There are two kinds of added tokens. Control tokens say who speaks, where an answer ends and where a picture is: only
templates write them, and in the text of a user their names are split into ordinary tokens. Markup (`<box>`, `<think>`,
`<tool_call>`) belongs to the content and is one token there, as in every engine.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

from vlm_tune.data.text.templates import BOS, EOS
from vlm_tune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PlainKey = tuple[bool, str]  # (opens a string, text)


class TextTokenizer:
    """Split a tokenizer in two: control tokens, which only templates may write, and the model of plain text.

    That model ignores the control tokens, so no text can become one, not even those that are not marked as special,
    for which `split_special_tokens` would do nothing. `markup` are the added tokens that it keeps, found in a text as
    the tokenizer itself finds them.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", add_bos: bool | None = None, markup: Sequence[str] = ()
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"{tokenizer.name_or_path}: {type(tokenizer).__name__} is not a fast tokenizer: "
                "save it with tokenizer.json (transformers.AutoTokenizer converts most)"
            )
        self.name: str = tokenizer.name_or_path
        spec = json.loads(backend.to_str())
        added = [each for each in spec["added_tokens"] if each["content"].strip()]
        self._added = {each["content"]: each["id"] for each in added}
        if unknown := [content for content in markup if content not in self._added]:
            raise ConfigError(
                f"model.markup names {unknown[0]!r}, which is no added token of {tokenizer.name_or_path}: remove it"
            )
        self.markup = {content: self._added[content] for content in markup}  # token -> id
        longest_first = sorted([*self._added, BOS, EOS], key=len)[::-1]
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        self.strips_right = {each["id"] for each in added if each["rstrip"]}  # these swallow the white space after them

        bos = tokenizer.bos_token_id
        if add_bos is None:
            add_bos = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
        if add_bos and bos is None:
            raise ConfigError(f"{tokenizer.name_or_path}: the tokenizer has no first token (bos_token) to add")
        self.bos_id: int | None = bos if add_bos else None
        self.eos_id: int | None = tokenizer.eos_token_id

        # `encode_special_tokens` ignores special tokens; shortening the list instead would renumber the others.
        # White space (GPT-NeoX has added tokens for runs of it) controls nothing and keeps its tokens.
        for each in spec["added_tokens"]:
            each["special"] = bool(each["content"].strip()) and each["content"] not in self.markup
        spec["truncation"] = spec["padding"] = spec["post_processor"] = None  # it would trim offsets
        self._opening = self._inner = _plain_model(spec)
        if _prefix_only_where_text_opens(spec["pre_tokenizer"]):
            self._inner = _plain_model(spec)
        self._check_neutral(tokenizer.unk_token_id)
        self._control: dict[str, tuple[int | str, ...]] = {}

    def fingerprint(self) -> str:
        """Hash everything that decides which tokens a text becomes."""
        control = f"{sorted(self._added.items())} {sorted(self.strips_right)} {self.bos_id} {self.eos_id}"
        return hashlib.blake2b(f"{self._opening.to_str()} {control}".encode(), digest_size=16).hexdigest()

    def control(self, text: str) -> tuple[int | str, ...]:
        """Split control text into the ids of its special tokens and the plain text between them."""
        if text not in self._control:  # templates write the same few strings over and over
            self._control[text] = tuple(part for part in self._split(text) if part != "")
        return self._control[text]

    def plain(self, keys: Iterable[PlainKey]) -> dict[PlainKey, Encoding]:
        """Tokenize the distinct texts in one batch, without producing any control token."""
        opening: list[PlainKey] = []
        inner: list[PlainKey] = []
        for key in dict.fromkeys(keys):
            (opening if key[0] else inner).append(key)
        encodings: dict[PlainKey, Encoding] = {}
        for model, chosen in ((self._opening, opening), (self._inner, inner)):
            if chosen:
                batch = model.encode_batch([text for _, text in chosen], add_special_tokens=False)
                encodings.update(zip(chosen, batch, strict=True))
        return encodings

    def token_id(self, content: str) -> int | None:
        """Return the id of an added token, or None if the tokenizer does not have it."""
        return self._added.get(content)

    def _split(self, text: str) -> Iterator[int | str]:
        end = 0
        for match in self._pattern.finditer(text):
            yield text[end : match.start()]
            yield from self._special(match.group())
            end = match.end()
        yield text[end:]

    def _special(self, content: str) -> list[int]:
        if content == BOS:
            return [] if self.bos_id is None else [self.bos_id]
        if content == EOS:
            if self.eos_id is None:
                raise ConfigError("an answer or plain text ends with the tokenizer's end token, and it has none")
            return [self.eos_id]
        return [self._added[content]]

    def _check_neutral(self, unk_id: int | None) -> None:
        control_ids = set(self._added.values()) - set(self.markup.values()) - {unk_id}
        keys = [(False, content) for content in self._added if content not in self.markup]
        for (_, content), encoding in self.plain(keys).items():
            if control_ids.intersection(encoding.ids):
                raise ConfigError(f"this tokenizer reads {content!r} as a special token even in the text of a user")


def _plain_model(spec: dict[str, Any]) -> Tokenizer:
    model: Tokenizer = Tokenizer.from_str(json.dumps(spec))
    model.encode_special_tokens = True
    return model


def _prefix_only_where_text_opens(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Switch off, in place, SentencePiece's space in front of a text; return whether it was on.

    "first" puts it only in front of a whole string, not after a special token inside it. "always" needs no second
    model: it treats every stretch of text alike.
    """
    found = False
    for each in [pre_tokenizer, *(pre_tokenizer or {}).get("pretokenizers", [])]:
        if each is not None and each.get("prepend_scheme") == "first":
            each["prepend_scheme"] = "never"
            found = True
    return found
