"""Log-probabilities of all answers under the model that a run starts from: read once, before the first step, and kept.

No second model is needed in training then. The reference is the model as the stage finds it, the adapters of an earlier
stage included; adapters that are new change nothing before they are trained.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from vlm_tune.config.schema import Config, Precision
from vlm_tune.data.datamodule import DataModule, Part, validation_packs
from vlm_tune.data.pictures.feature_cache import fingerprint
from vlm_tune.data.progress import Follow, unseen
from vlm_tune.data.sets.mixture import is_augmented
from vlm_tune.errors import ConfigError
from vlm_tune.model.build import DTYPES, resolve_precision
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.recipes.fetch import cache_folder

NAME = "logps.npy"  # (rows, 2) float32, by entry of the index: chosen, rejected; NaN = not known yet


def fill_reference(vlm: VisionLanguageModel, data: DataModule, device: torch.device, follow: Follow = unseen) -> None:
    """Give pairs the log-probabilities of their answers, those that are not kept yet computed by this model.

    What is known is kept as it comes, so that a killed process goes on; of several processes one works. Nothing is done
    where the rows are conversations. Raise ConfigError where pictures are changed at random: the reference would see
    others than training.
    """
    config = data.config
    if not config.stage.preference.is_on:
        return
    if any(is_augmented(part.data) for part in data.parts):
        raise ConfigError(
            'the mixture\'s "data_augment" changes pictures at random, and stage.preference compares with a reference '
            "that saw them once: leave it out"
        )
    weights = fingerprint(vlm.state_dict(), settings(config, data))
    for part in data.parts:
        folder = cache_folder() / "reference" / weights / name_of(part)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            table = open_table(folder / NAME, len(part.index))
            compute_missing(table, vlm, (data, part), (device, follow))
        part.reference = np.array(table)


def settings(config: Config, data: DataModule) -> str:
    """Return what else decides log-probabilities: tokens, tiles, arithmetic, and how adapters are weighed."""
    model, image = config.model, config.data.image
    sight = f"{model.tiles} {model.vision.normalize} {model.vision.select_layer} {image.exif} {image.alpha}"
    return f"{data.encoder.fingerprint()} {sight} {resolve_precision(config.trainer.precision)} {config.stage.lora}"


def name_of(part: Part) -> str:
    """Name the rows of a part by their sizes, their contents and their pictures."""
    index = part.index
    return "-".join((index.fingerprint(), index.content_fingerprint(), index.picture_fingerprint()))


def open_table(path: Path, num_rows: int) -> npt.NDArray[np.float32]:
    """Map the table of log-probabilities into memory; a new one knows nothing."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, np.full((num_rows, 2), np.nan, np.float32))
        partial.replace(path)
    table: npt.NDArray[np.float32] = np.load(path, mmap_mode="r+")
    return table


def compute_missing(
    table: npt.NDArray[np.float32],
    vlm: VisionLanguageModel,
    rows: tuple[DataModule, Part],
    how: tuple[torch.device, Follow],
) -> None:
    """Read the pairs that the table lacks in packs, without dropout, in the arithmetic of training."""
    (data, part), (device, follow) = rows, how
    packs = [pack for pack in validation_packs(part.index, data.settings(1)) if np.isnan(table[list(pack.rows)]).any()]
    if not packs:
        return
    precision = resolve_precision(data.config.trainer.precision)
    modes = {module: module.training for module in vlm.modules()}
    vlm.to(device).eval()
    with torch.no_grad(), torch.autocast(device.type, DTYPES[precision], enabled=precision is not Precision.fp32):
        batches = follow(data.reading(part, packs), "reading with the reference", "packs", len(packs))
        for pack, batch in zip(packs, batches, strict=True):
            table[list(pack.rows)] = vlm(batch.to(device)).float().cpu().numpy()
    for module, mode in modes.items():
        module.training = mode
