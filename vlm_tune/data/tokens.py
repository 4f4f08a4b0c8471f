"""Tokenize control text with its special tokens, and everything else without any, whatever a user writes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

from vlm_tune.data.templates import BOS, EOS
from vlm_tune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PlainKey = tuple[bool, str]  # (opens a string, text)


class TextTokenizer:
    """Split a tokenizer in two: special tokens, which only templates may write, and the bare model of plain text.

    The bare model is the tokenizer without its added tokens, so no text can become one: not even an added token that
    is not marked as special (`<tool_call>`), for which `split_special_tokens` would do nothing.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", add_bos: bool | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"{tokenizer.name_or_path}: {type(tokenizer).__name__} is not a fast tokenizer: "
                "save it with tokenizer.json (transformers.AutoTokenizer converts most)"
            )
        spec = json.loads(backend.to_str())
        added = [each for each in spec["added_tokens"] if each["content"].strip()]
        self._added = {each["content"]: each["id"] for each in added}
        self._pattern = re.compile(
            "|".join(re.escape(text) for text in sorted([*self._added, BOS, EOS], key=len)[::-1])
        )
        self.strips_right = {each["id"] for each in added if each["rstrip"]}  # swallow the white space after them

        bos = tokenizer.bos_token_id
        if add_bos is None:
            add_bos = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
        if add_bos and bos is None:
            raise ConfigError(f"{tokenizer.name_or_path}: the tokenizer has no first token (bos_token) to add")
        self.bos_id: int | None = bos if add_bos else None
        self.eos_id: int | None = tokenizer.eos_token_id

        # White space (GPT-NeoX has added tokens for runs of it) controls nothing: it keeps its tokens.
        spec["added_tokens"] = [each for each in spec["added_tokens"] if not each["content"].strip()]
        spec["truncation"] = spec["padding"] = spec["post_processor"] = None  # it would trim offsets
        self._opening = Tokenizer.from_str(json.dumps(spec))
        self._inner = self._opening
        if _prefix_only_where_text_opens(spec["pre_tokenizer"]):
            self._inner = Tokenizer.from_str(json.dumps(spec))
        self._check_neutral(tokenizer.unk_token_id)
        self._control: dict[str, tuple[int | str, ...]] = {}

    def fingerprint(self) -> str:
        """Name all that decides which tokens a text becomes."""
        control = f"{sorted(self._added.items())} {sorted(self.strips_right)} {self.bos_id} {self.eos_id}"
        return hashlib.blake2b(f"{self._opening.to_str()} {control}".encode(), digest_size=16).hexdigest()

    def control(self, text: str) -> tuple[int | str, ...]:
        """Split control text into the ids of its special tokens and the plain text between them."""
        if text not in self._control:  # templates write the same few strings again and again
            self._control[text] = tuple(part for part in self._split(text) if part != "")
        return self._control[text]

    def plain(self, keys: Iterable[PlainKey]) -> dict[PlainKey, Encoding]:
        """Tokenize distinct texts in one batch, no special token among the results."""
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
        """Return the id of a special token, None where the tokenizer has none of that name."""
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
        control_ids = set(self._added.values()) - {unk_id}
        keys = [(False, content) for content in self._added]
        for (_, content), encoding in self.plain(keys).items():
            if control_ids.intersection(encoding.ids):
                raise ConfigError(f"this tokenizer reads {content!r} as a special token even in the text of a user")


def _prefix_only_where_text_opens(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Switch off, in place, SentencePiece's space in front of the text; say whether there was one to switch off.

    "first" puts it in front of a whole string only, not after a special token inside it. "always" needs no second
    model: it does so for every stretch of text alike.
    """
    found = False
    for each in [pre_tokenizer, *(pre_tokenizer or {}).get("pretokenizers", [])]:
        if each is not None and each.get("prepend_scheme") == "first":
            each["prepend_scheme"] = "never"
            found = True
    return found
