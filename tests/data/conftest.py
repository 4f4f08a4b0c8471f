"""A model of which only the small files are there: what reads data needs no more."""

import shutil
from pathlib import Path

import pytest

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer"


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Name the toy model on the command line, its weights left out."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text('{"patch_size": 14}')
    shutil.copytree(TOKENIZER, folder / "llm")
    (folder / "llm" / "config.json").write_text('{"model_type": "llama"}')
    paths = [f"model.{part}.path={folder / part}" for part in ("vision", "llm")]
    return ["model=tiny", *paths, "data.workers=0"]
