"""A folder of every layout of whole checkpoints that is read."""

from pathlib import Path

from llava_toys import save_llava, write_original
from official_toys import write_official
from toys import Toys

from vlm_tune.model.build import Model
from vlm_tune.model.layouts.internvl import hf as internvl_hf


def write_layouts(toys: Toys, root: Path, text_kind: str) -> Model:
    """Write a folder for each layout, under its model_type; return the plain model, which has no folder of its own.

    `text_kind` is the language model of InternVL's own layout.
    """
    plain = toys.model()
    internvl_hf.save(plain.vlm, root / "internvl")
    plain.tokenizer.save_pretrained(root / "internvl")
    write_official(root / "internvl_chat", {"model_type": text_kind})
    save_llava(root / "llava")
    save_llava(root / "llava_next", is_next=True)
    write_original(root / "both")
    (root / "both" / "original").rename(root / "llava_original")
    return plain
