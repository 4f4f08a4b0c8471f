"""Measure how fast pictures become tiles, beside the reference's way, on one core.

    python benchmarks/tiles.py [FOLDER ...]

Ours: decode, resize, cut to uint8 (normalised later, on the device). The reference's way is InternVL's: decode, resize,
crop a PIL picture for each tile, then ToTensor and Normalize for each. Both must give the same tiles, bit for bit.
Pictures: the golden ones, the demo's where its recipe has run, scikit-image's where it is installed, and FOLDERs.
Writes `tiles_speedup` (pictures of up to 0.8 megapixels) to benchmarks/results/data.json.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts its threads: the comparison is per core

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from vlm_tune.config.schema import ImageConfig, TilesConfig
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Picture
from vlm_tune.data.tiles import NORMALIZATIONS, choose_grid, make_tiles, normalize
from vlm_tune.recipes.fetch import cache_folder

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "data.json"
SMALL = 0.8e6  # pixels
TILES = TilesConfig(size=448, min=1, max=12, thumbnail=True)
TRANSFORM = transforms.Compose(
    [
        transforms.Lambda(lambda image: image.convert("RGB") if image.mode != "RGB" else image),
        transforms.Resize((TILES.size, TILES.size), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(*NORMALIZATIONS["imagenet"]),
    ]
)


def main() -> None:
    """Compare both ways on all pictures, print the table and write the figure."""
    parser = argparse.ArgumentParser(description="Measure tile making beside the reference's way.")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=9, help="runs a picture, of which the median counts")
    parser.add_argument("--max-pictures", type=int, default=24, help="of each folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folders = [*picture_folders(), *arguments.folders]
    rows = [row for folder in folders for row in compare_folder(folder, arguments.max_pictures, arguments.repeats)]
    small = [row for row in rows if row["pixels"] <= SMALL]
    large = [row for row in rows if row["pixels"] > SMALL]
    figure = summarise("up to 0.8 megapixels", small)
    if large:
        summarise("larger", large)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["tiles_speedup"] = round(figure, 3)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


def picture_folders() -> list[Path]:
    """List the folders of pictures that are there on this machine."""
    folders = [HERE.parent / "tests" / "golden" / "images", cache_folder() / "recipes" / "demo" / "images"]
    skimage = importlib.util.find_spec("skimage")
    if skimage is not None and skimage.origin is not None:
        folders.append(Path(skimage.origin).parent / "data")
    return [folder for folder in folders if folder.is_dir()]


def compare_folder(folder: Path, max_pictures: int, repeats: int) -> list[dict[str, Any]]:
    """Compare both ways on the pictures of one folder, evenly chosen where there are more than `max_pictures`."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"})
    chosen = files[:: max(1, len(files) // max_pictures)][:max_pictures]
    return [compare(file, repeats) for file in chosen]


def compare(file: Path, repeats: int) -> dict[str, Any]:
    """Return the times of one picture in milliseconds, after checking that both ways give the same tiles."""
    reader = ImageReader(ImageConfig(), file.parent)

    def ours() -> np.ndarray:
        return make_tiles(reader.open_picture(Picture(file.name)), TILES)

    def reference() -> torch.Tensor:
        return torch.stack([TRANSFORM(tile) for tile in crop_like_reference(file)])

    made = ours()
    assert np.array_equal(made, np.stack([np.asarray(tile) for tile in crop_like_reference(file)])), file
    assert torch.equal(normalize(torch.from_numpy(made), "imagenet", torch.float32), reference()), file
    times: dict[str, list[float]] = {"ours": [], "reference": []}
    for _ in range(repeats):  # in turn, so that a busy moment of the machine meets both
        times["reference"].append(measure(reference))
        times["ours"].append(measure(ours))
    width, height = reader.read_size(Picture(file.name))
    row: dict[str, Any] = {name: statistics.median(values) for name, values in times.items()}
    row |= {"name": file.name, "pixels": width * height, "size": f"{width}x{height}", "tiles": len(made)}
    print(
        f"{row['name'][:32]:32} {row['size']:>10} {row['tiles']:3} tiles  reference {row['reference']:7.1f} ms  "
        f"ours {row['ours']:7.1f} ms  {row['reference'] / row['ours']:5.2f} x"
    )
    return row


def crop_like_reference(file: Path) -> list[Image.Image]:
    """Cut a picture into PIL tiles as InternVL's dynamic_preprocess does."""
    size = TILES.size
    image = Image.open(file).convert("RGB")
    columns, rows = choose_grid(*image.size, TILES)
    resized = image.resize((size * columns, size * rows))
    boxes = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = [resized.crop((left, top, left + size, top + size)) for left, top in boxes]
    return [*tiles, image.resize((size, size))] if len(tiles) > 1 else tiles


def measure(work: Callable[[], object]) -> float:
    """Return the processor time of one call in milliseconds."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1000


def summarise(title: str, rows: list[dict[str, Any]]) -> float:
    """Print the totals of some pictures and return how many times as fast ours is."""
    reference, ours = sum(row["reference"] for row in rows), sum(row["ours"] for row in rows)
    per_picture = statistics.median(row["reference"] / row["ours"] for row in rows)
    print(
        f"{title}: {len(rows)} pictures, reference {reference:.0f} ms, ours {ours:.0f} ms: "
        f"{reference / ours:.2f} times as fast (median of the pictures {per_picture:.2f})"
    )
    return reference / ours


if __name__ == "__main__":
    main()
