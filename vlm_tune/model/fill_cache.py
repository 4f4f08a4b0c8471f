"""Run a frozen vision encoder over all pictures of a run, once, before the first step."""

import shutil

import torch
from filelock import FileLock
from rich.console import Console

from vlm_tune.config.schema import AugmentConfig, Config, FeatureCaching, Train
from vlm_tune.data.datamodule import DataModule, Part
from vlm_tune.data.pictures.feature_cache import FeatureCache, fingerprint
from vlm_tune.data.progress import follow
from vlm_tune.data.sets.mixture import is_augmented
from vlm_tune.errors import ConfigError
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.recipes.fetch import cache_folder

GIB = 1024**3


def use_feature_cache(vlm: VisionLanguageModel, data: DataModule, config: Config, device: torch.device) -> None:
    """Decide by the arithmetic, say it, and fill the cache with what is missing.

    Each picture is encoded by itself, so that its features do not depend on what happened to share a batch with it:
    a resumed run sees the same bits.
    """
    console = Console()
    parts = [part for part in (data.train, data.val) if part is not None]
    num_tiles = sum(int(part.index.tiles.sum()) for part in parts)
    wanted = config.data.feature_cache
    if wanted is FeatureCaching.off or num_tiles == 0:
        return
    reason = obstacle(config)
    if reason is None and any(is_augmented(part.data) for part in parts):
        reason = '"data_augment" of the mixture changes pictures at random'
    if reason:
        if wanted is FeatureCaching.on:
            raise ConfigError(f"data.feature_cache=on, but {reason}: set data.feature_cache=off")
        return
    folder = cache_folder() / "features" / fingerprint(vlm.vision.state_dict(), _settings(vlm, config))
    num_patches = vlm.vision.num_patches(config.model.tiles.size)
    tile_bytes = num_patches * vlm.vision.width * vlm.vision.dtype.itemsize
    need = num_tiles * tile_bytes / GIB  # an upper bound: a picture that stands in several rows is kept once
    folder.mkdir(parents=True, exist_ok=True)
    limit = min(config.data.feature_cache_gib, shutil.disk_usage(folder).free / GIB / 2)
    fits = need <= limit
    console.print(
        f"feature cache: {num_tiles:,} tiles x {tile_bytes / 1024:,.0f} KiB = {need:.2f} GiB at most, "
        f"{limit:.1f} GiB allowed: {'on' if fits else 'off'}",
        highlight=False,
    )
    if not fits:
        if wanted is FeatureCaching.on:
            raise ConfigError(
                f"data.feature_cache=on needs {need:.1f} GiB, {limit:.1f} are allowed or free: raise "
                "data.feature_cache_gib, or set data.feature_cache=auto"
            )
        return
    cache = FeatureCache(folder)
    with FileLock(folder / ".lock"):  # of several ranks one works, the others find everything done
        vlm.vision.to(device)
        for part in parts:
            fill(vlm, part, cache, device)
    for each in (each for part in parts for each in part.data.sets):
        each.cache = cache
    vlm.kept_patches = num_patches


def obstacle(config: Config) -> str | None:
    """Say why features may not be kept."""
    if config.stage.train.vision is not Train.frozen:
        return f"stage.train.vision={config.stage.train.vision.value} changes the encoder"
    if config.data.augment != AugmentConfig():
        return "data.augment changes the pictures at random"
    return None


def fill(vlm: VisionLanguageModel, part: Part, cache: FeatureCache, device: torch.device) -> None:
    """Encode the pictures whose features are not there yet."""
    rows = part.index.rows[part.index.tiles > 0].tolist()
    for row in follow(rows, "encoding pictures", "rows"):
        data, number = part.data.locate(row)
        sample = data.sample(number)
        example = data.encoder.encode(sample, data.tiling(sample))
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
