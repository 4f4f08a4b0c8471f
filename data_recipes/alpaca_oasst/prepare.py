"""Join alpaca and oasst-guanaco, as they were downloaded, into one mixture; the rows stay where they are."""

import argparse
import json
import sys

from vlm_tune.recipes.recipe import recipe_main, recipe_parser


def prepare(options: argparse.Namespace) -> None:
    """Write train.yaml, a mixture of both sets, each seen once in an epoch."""
    sets = [
        {"name": "alpaca", "annotation": options.alpaca, "format": "alpaca"},
        {"name": "oasst", "annotation": options.oasst, "format": "oasst1"},
    ]
    (options.out / "train.yaml").write_text(json.dumps(sets, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = recipe_parser(str(__doc__))
    parser.add_argument("--alpaca", required=True, help="file or folder of tatsu-lab/alpaca")
    parser.add_argument("--oasst", required=True, help="the training file of timdettmers/openassistant-guanaco")
    sys.exit(recipe_main(prepare, parser))
