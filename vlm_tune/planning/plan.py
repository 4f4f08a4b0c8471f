"""A run to be planned: where its sizes come from on this machine, without a download and without weights."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from vlm_tune.config.schema import Config, ModelConfig, Quantize
from vlm_tune.data.datamodule import DataModule
from vlm_tune.errors import ConfigError
from vlm_tune.model.build import DTYPES
from vlm_tune.model.encoder import build_encoder, joined, look_up
from vlm_tune.model.layouts.folders import require_weights
from vlm_tune.model.parts.projector import tokens_per_tile
from vlm_tune.planning.batches import Picture, Work, keeps_features, real_work, supposed_work
from vlm_tune.planning.rehearsal import Needs, Vocabulary, planned_precision, rehearse
from vlm_tune.planning.skeleton import CONTEXT_ID, make_skeleton
from vlm_tune.recipes.recipe import RECORD, prepared_folder

KNOWN = Path(__file__).with_name("known.yaml")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
NEW_TOKENS = 4  # for pictures, where the tokenizer is not there to be asked


@dataclass
class Run:
    """A run to be planned: its configuration with folders of this machine, its batches, its vocabulary."""

    config: Config
    picture: Picture
    work: Work
    vocabulary: Vocabulary
    on_gpu: bool
    notes: list[str]

    def needs(self) -> Needs:
        """Rehearse the largest batches; take the one with the highest peak, and the operations of a usual one."""
        batches = {id(batch): batch for batch in (*self.work.largest, self.work.usual)}
        rehearsed = {key: rehearse(self.config, batch, self.vocabulary, self.on_gpu) for key, batch in batches.items()}
        usual, most = rehearsed[id(self.work.usual)], max(rehearsed.values(), key=lambda needs: needs.total)
        return Needs(most.sizes, usual.micro, usual.update, usual.num_micro, usual.parts)


@contextmanager
def open_run(config: Config, on_gpu: bool) -> Iterator[Run]:
    """Find the model's sizes and the rows on this machine; nothing is downloaded, and no weight is read."""
    with TemporaryDirectory() as folder:
        model, notes = local_model(config.model, Path(folder))
        yield prepare(joined(replace(config, model=model)), on_gpu, notes)


def prepare(config: Config, on_gpu: bool, notes: list[str]) -> Run:
    """Measure the rows, where they and the tokenizer are there, and choose the batches."""
    picture, vocabulary_size, tile_bytes = look_at(config, on_gpu)
    has_tokenizer = any((look_up(config.model)[0][1] / name).is_file() for name in TOKENIZERS)
    missing = missing_rows(config)
    if not has_tokenizer or missing:
        notes.append(missing or "the tokenizer is not on this machine: rows are not measured")
        vocabulary = Vocabulary(vocabulary_size + NEW_TOKENS * (config.model.path is None), CONTEXT_ID)
        picture = Picture(picture.size, picture.tokens)
        return Run(config, picture, supposed_work(config, picture, CONTEXT_ID), vocabulary, on_gpu, notes)
    encoder, tokenizer = build_encoder(config)
    data = DataModule(config, encoder)
    data.setup()
    if not keeps_features(config, data, tile_bytes):
        picture = Picture(picture.size, picture.tokens)
    context_id = int(tokenizer.convert_tokens_to_ids(encoder.settings.image_context))
    vocabulary = Vocabulary(max(vocabulary_size, len(tokenizer)), context_id)
    return Run(config, picture, real_work(config, data, picture), vocabulary, on_gpu, notes)


def look_at(config: Config, on_gpu: bool) -> tuple[Picture, int, int]:
    """Ask a model of no numbers for its tiles, the rows of its table, and the bytes of a tile's features."""
    model = config.model
    dtype = DTYPES[planned_precision(config, on_gpu)]
    vlm = make_skeleton(model, 0, dtype, Quantize.none)
    num_patches = vlm.vision.num_patches(model.tiles.size)
    per_tile = tokens_per_tile(model.projector, num_patches)
    features = (num_patches, vlm.vision.width)
    rows = vlm.llm.get_input_embeddings().weight.shape[0]
    return Picture(model.tiles.size, per_tile, features), rows, num_patches * vlm.vision.width * dtype.itemsize


def missing_rows(config: Config) -> str:
    """Say that a recipe's rows were never prepared: a plan fetches nothing."""
    path = config.data.path
    if not path.startswith("recipe:"):
        return ""
    name = path.removeprefix("recipe:").partition("/")[0]
    return "" if (prepared_folder(name) / RECORD).is_file() else f"{path} is not prepared on this machine"


def local_model(model: ModelConfig, folder: Path) -> tuple[ModelConfig, list[str]]:
    """Name folders of this machine in a model; those that are not there are made of `known.yaml`, sizes alone.

    Raises ConfigError for a model of which not even the sizes are known.
    """
    if model.path is not None:
        path, notes = local_folder(model.path, "model.path", folder)
        return replace(model, path=path), notes
    require_weights(model)
    vision, notes = local_folder(str(model.vision.path), "model.vision.path", folder)
    llm, more = local_folder(str(model.llm.path), "model.llm.path", folder)
    chosen = replace(model, vision=replace(model.vision, path=vision), llm=replace(model.llm, path=llm))
    return chosen, [*notes, *more]


def local_folder(path: str, key: str, made: Path) -> tuple[str, list[str]]:
    """Find the folder of a path on this machine, or make one that holds config.json alone."""
    if path.startswith("recipe:"):
        prepared = prepared_folder(path.removeprefix("recipe:"))
        if (prepared / RECORD).is_file():
            return str(prepared), []
    elif Path(path).expanduser().is_dir():
        return str(Path(path).expanduser()), []
    elif (cached := cached_folder(path)) is not None:
        return str(cached), []
    known = yaml.safe_load(KNOWN.read_text(encoding="utf-8"))
    if path.startswith("_") or path not in known:
        raise ConfigError(
            f"{key}={path}: its config.json is not on this machine, and a plan downloads nothing. Where there is a "
            f"network, fetch the small files: `hf download {path} --include '*.json' '*.model'`, or set {key}=FOLDER"
        )
    folder = made / re.sub(r"\W+", "_", path)
    folder.mkdir()
    facts: dict[str, Any] = known[path]
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    return str(folder), [f"sizes of {path} from the trainer's own list"]


def cached_folder(path: str) -> Path | None:
    """Find a hub id in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() else None
