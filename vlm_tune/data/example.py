"""What a Sample becomes: token ids with their labels, or only their numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlm_tune.data.pictures.anyres import Spread

NO_LOSS = -100  # label of a token that is not supervised


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded sample of L tokens."""

    id: str
    where: str
    input_ids: np.ndarray  # (L,) int32
    labels: np.ndarray  # (L,) int32, each at its own token's position (not shifted); -100 = no loss
    num_tiles: tuple[int, ...] = ()  # of each picture; fewer than the sample's pictures if trim_text left out turns
    max_tiles: int = 0  # the limit under which `num_tiles` was computed
    note: str = ""  # what data.on_too_long did to the row: "fewer_tiles: 13 -> 7 tiles"
    spreads: tuple[Spread, ...] = ()  # how the tiles of each picture lie, if its tokens depend on that

    @property
    def num_supervised(self) -> int:
        """Count the tokens that carry loss; the first one never does, as nothing before it could predict it."""
        return int(np.count_nonzero(self.labels[1:] != NO_LOSS))


@dataclass(frozen=True, slots=True)
class Lengths:
    """What an index needs to know about an encoded sample, without its tokens."""

    num_tokens: int
    num_supervised: int
    num_tiles: tuple[int, ...] = ()
    max_tiles: int = 0
    note: str = ""
    head: str = ""  # what the tokens up to the last picture's end are made of; "" = no pictures
    num_head: int = 0  # those tokens
    num_shared: int = 0  # tokens with which both answers of a pair begin, which stand in a pack once


def common_prefix(tokens: Sequence[npt.NDArray[np.int32]]) -> int:
    """Count the tokens with which all begin, leaving at least one to each."""
    length = min(map(len, tokens)) - 1
    for other in tokens[1:]:
        differs = np.flatnonzero(tokens[0][:length] != other[:length])
        length = int(differs[0]) if len(differs) else length
    return length


def num_in_pack(tokens: Sequence[npt.NDArray[np.int32]]) -> int:
    """Count the tokens of a conversation, or of both answers of a pair: those that both begin with count once."""
    return sum(map(len, tokens)) - (len(tokens) - 1) * common_prefix(tokens)
