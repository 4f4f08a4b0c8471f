"""Run a frozen vision encoder over all pictures of a run, once, before the first step."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from vlm_tune.config.schema import AugmentConfig, Config, FeatureCaching, Train
from vlm_tune.data.datamodule import DataModule, Part
from vlm_tune.data.pictures.feature_cache import FeatureCache, fingerprint
from vlm_tune.data.progress import Follow, unseen
from vlm_tune.data.sets.mixture import is_augmented
from vlm_tune.errors import ConfigError
from vlm_tune.model.flops import count_flops, peak_tflops
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.recipes.fetch import cache_folder

GIB = 1024**3
DISK = 3.5e9  # bytes a second: an NVMe drive of four PCIe 3 lanes, which all GPUs of a machine share (not measured)
REACHED = 0.4  # of a card's published rate by a frozen encoder (not measured)


class CachePlan(NamedTuple):
    """Where features are cached, and whether they fit."""

    folder: Path
    fits: bool
    summary: str  # the arithmetic in one line
    num_patches: int  # of a tile


def plan_cache(vlm: VisionLanguageModel, data: DataModule, config: Config) -> CachePlan | None:
    """Decide by the arithmetic; None if features cannot or should not be cached.

    Raise ConfigError if data.feature_cache=on is impossible.
    """
    num_tiles = sum(int(part.index.tiles.sum()) for part in data.parts)
    wanted = config.data.feature_cache
    if wanted is FeatureCaching.off or num_tiles == 0:
        return None
    reason = obstacle(config)
    if reason is None and any(is_augmented(part.data) for part in data.parts):
        reason = '"data_augment" of the mixture changes pictures at random'
    if reason:
        if wanted is FeatureCaching.on:
            raise ConfigError(f"data.feature_cache=on, but {reason}: set data.feature_cache=off")
        return None
    folder = cache_folder() / "features" / fingerprint(vlm.vision.state_dict(), _settings(vlm, config))
    num_patches = vlm.vision.num_patches(config.model.tiles.size)
    tile_bytes = num_patches * vlm.vision.width * vlm.vision.dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    allowed = min(config.data.feature_cache_gib, shutil.disk_usage(folder).free / GIB / 2)
    need = num_tiles * tile_bytes / GIB  # an upper bound: a picture that occurs in several rows is cached once
    fits = need <= allowed
    if not fits and wanted is FeatureCaching.on:
        raise ConfigError(
            f"data.feature_cache=on needs {need:.1f} GiB, {allowed:.1f} are allowed or free: raise "
            "data.feature_cache_gib, or set data.feature_cache=auto"
        )
    told = f"{num_tiles:,} tiles x {tile_bytes / 1024:,.0f} KiB = {need:.2f} GiB at most, {allowed:.1f} GiB allowed"
    slower = 0.0 if wanted is FeatureCaching.on else slower_to_read(vlm, tile_bytes, config)
    if fits and slower:
        told, fits = f"{told}, but this GPU encodes a tile {slower:.1f} times as fast as a disk brings it", False
    return CachePlan(folder, fits, f"feature cache: {told}: {'on' if fits else 'off'}", num_patches)


def slower_to_read(vlm: VisionLanguageModel, tile_bytes: int, config: Config) -> float:
    """Return how many times longer a tile's features are read than encoded; 0 = not longer, or not known.

    InternViT-300M on an H100: 2.1 MB in 0.6 ms, or 0.7 TFLOP in 1.8 ms; eight of them read for 4.8 ms.
    """
    flops = count_flops(vlm)
    if flops is None or config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return 0.0
    peak = peak_tflops(torch.cuda.get_device_name())
    if peak is None:
        return 0.0
    times = config.trainer.devices * tile_bytes / DISK * REACHED * peak * 1e12 / flops.tile
    return times if times > 1 else 0.0


def fill_cache(
    plan: CachePlan, vlm: VisionLanguageModel, data: DataModule, device: torch.device, follow: Follow = unseen
) -> None:
    """Compute the missing features, and make the rows use them.

    Each picture is encoded on its own, so that its features do not depend on what shared its batch:
    a resumed run sees the same bits.
    """
    cache = FeatureCache(plan.folder)
    with FileLock(plan.folder / ".lock"):  # one rank does the work, the others find it done
        vlm.vision.to(device)
        for part in data.parts:
            rows = part.index.rows[part.index.tiles > 0].tolist()
            for row in follow(rows, "encoding pictures", "rows"):
                keep_row(vlm, part, row, (cache, device))
    for each in (each for part in data.parts for each in part.data.sets):
        each.cache = cache
    vlm.kept_patches = plan.num_patches


def obstacle(config: Config) -> str | None:
    """Return why features may not be cached, if so."""
    if config.stage.train.vision is not Train.frozen:
        return f"stage.train.vision={config.stage.train.vision.value} changes the encoder"
    if config.data.augment != AugmentConfig():
        return "data.augment changes the pictures at random"
    return None


def keep_row(vlm: VisionLanguageModel, part: Part, row: int, target: tuple[FeatureCache, torch.device]) -> None:
    """Encode the pictures of a row whose features are not there yet."""
    cache, device = target
    data, number = part.data.locate(row)
    sample = data.sample(number)
    example = data.encoder.encode_all(sample, data.tiling(sample))[0]
    for picture, limit in data.limited_pictures(sample, example):
        key = cache.key(data.reader.read_content(picture, sample.where, sample.id), limit)
        if not cache.has(key):
            tiles = torch.from_numpy(data.cut(picture, limit, sample)).to(device)
            with torch.no_grad():
                cache.write(key, vlm.see(tiles))


def _settings(vlm: VisionLanguageModel, config: Config) -> str:
    seen = f"{vlm.vision.select_layer} {vlm.vision.keeps_class}"
    image = config.data.image
    return f"{seen} {config.model.tiles} {config.model.vision.normalize} {image.exif} {image.alpha}"
