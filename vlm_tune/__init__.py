"""Train vision-language models: vision encoder + projector + language model.

The shape legend of the whole project, used in every docstring and trailing comment:

B sequences, L tokens per sequence, T tiles in the batch (all samples, concatenated), P patches per tile,
C vision width, S tokens per tile after pixel shuffle, D LLM width, V vocabulary, H W pixels,
N supervised tokens in the batch, E experts, I inputs and O outputs of a weight.
"""

__version__ = "0.1.0"
