"""What every layout's `load` returns."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from vlm_tune.model.vlm import ImageTokens, VisionLanguageModel


class Loaded(NamedTuple):
    """A model with its tokenizer and the tokens that stand for pictures in its text."""

    vlm: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    tokens: ImageTokens
