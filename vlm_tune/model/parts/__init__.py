"""The parts of a model: vision encoder, projector, language model, and what a stage does to them."""
