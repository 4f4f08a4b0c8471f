"""Join FoodieQA's three files, as they were unpacked, into one mixture; rows and pictures stay where they are."""

import argparse
import json
import sys

from vlm_tune.recipes.recipe import recipe_main, recipe_parser

FILES = {"four_pictures": "mivqa_tidy.json", "one_picture": "sivqa_tidy.json", "text": "textqa_tidy.json"}


def prepare(options: argparse.Namespace) -> None:
    """Write train.yaml: the questions about four pictures, about one and about none, each seen once in an epoch."""
    sets = [
        {"name": name, "annotation": f"{options.folder}/{file}", "root": options.folder, "format": "vqa"}
        for name, file in FILES.items()
    ]
    (options.out / "train.yaml").write_text(json.dumps(sets, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = recipe_parser(str(__doc__))
    parser.add_argument("--folder", required=True, help="the unpacked FoodieQA.zip")
    sys.exit(recipe_main(prepare, parser))
