"""How many tokens of a sample the positions of a language model support, read from its configuration."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_tune.words import counted

NAME = "max_position_embeddings"


@dataclass(frozen=True, slots=True)
class Limit:
    """The most tokens of a sample, where that limit comes from ("data.max_length=8192"), and a way out."""

    tokens: int
    name: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the positions of a language model end.

    Up to `named` tokens it works as it was trained, up to `end` by rope scaling. Beyond that, a table of learned
    positions has no entry, and rotary positions have values that the model has never seen.
    """

    named: int | None = None  # max_position_embeddings; None = the model does not have it
    end: int | None = None  # None = there is none
    rope: str = ""  # what scales them: "linear, factor 4"

    @classmethod
    def of(cls, config: Any) -> "Positions":
        """Read them from transformers' configuration of a language model.

        linear: they end at factor times max_position_embeddings, the length that was trained without scaling. yarn: at
        factor times original_max_position_embeddings. dynamic: nowhere, as the frequencies follow each sample's length.
        longrope and llama3 store the scaled length in max_position_embeddings; so do models with a scaling per kind of
        layer (Gemma 3). Source: transformers' modeling_rope_utils.py, vLLM's max_model_len.
        """
        named = getattr(config, NAME, None)
        if not isinstance(named, int) or named < 1:
            return cls()
        rope = getattr(config, "rope_parameters", None) or {}
        kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1
        if kind == "dynamic":
            return cls(named, None, f"{kind}, factor {factor:g}")
        original = {"linear": named, "yarn": rope.get("original_max_position_embeddings") or named}.get(kind)
        end = max(named, int(original * factor)) if original else named
        return cls(named, end, f"{kind}, factor {factor:g}" if end > named else "")

    def limit(self, max_length: int) -> Limit:
        """Return the smaller of data.max_length and the end of the positions."""
        if self.end is None or max_length <= self.end:
            return Limit(max_length, f"data.max_length={max_length}", "raise it")
        end = f", which ends at {self.end}" if self.end != self.named else ""
        return Limit(self.end, f"the language model's {self}{end}", "shorten the row")

    def __str__(self) -> str:
        stretched = f" with rope scaling {self.rope}" if self.rope else ""
        return f"{NAME}={self.named}{stretched}"


UNLIMITED = Positions()


def length_notes(positions: Positions, max_length: int, tokens: npt.NDArray[np.int32]) -> list[str]:
    """Return notes about the limits of a run, and about rows whose number of `tokens` exceeds them."""
    notes = []
    if positions.end is not None and positions.end < max_length:
        notes.append(
            f"a row may have {positions.end:,} tokens, less than data.max_length={max_length:,}, by "
            f"{positions.limit(max_length).name}"
        )
    long = tokens[tokens > positions.named] if positions.named is not None else tokens[:0]
    if len(long):
        notes.append(
            f"{counted(len(long), 'row')} of up to {long.max():,} tokens: more than the language model's {positions}. "
            "The scaling allows them, but the model may never have seen texts of that length"
        )
    return notes
