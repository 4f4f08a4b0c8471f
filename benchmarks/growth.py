"""How time and memory grow: with rows, pack length, vocabulary and tiles; and where a step's time goes.

COMMAND: python benchmarks/growth.py        (about 15 minutes on two CPU cores)
Writes results/growth.json, figures/growth.svg and figures/profile.svg. Each point is a process of its own; the model is
the demo's, but for the vocabulary, where a random language model of 22 million parameters grows its table.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plots import bars, lines
from speed import processor
from speed_steps import run_steps
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vlm_tune.config.parse import load_config
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.encode import Encoder
from vlm_tune.recipes.recipe import run_recipe

HERE = Path(__file__).resolve().parent
STEPS, WARM = 4, 1
REPEATS = {"rows": 3, "pack_length": 3, "start": 3}  # where time is compared: a shared machine's single runs scatter
TEXT = ["stage=sft", "data.val=none", "data.test=none", "stage.init_from=none", "data.workers=0"]
PICTURES = ["stage=finetune", "data.val=none", "data.test=none", "stage.init_from=none", "data.workers=0"]
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::mkldnn_convolution"),
    "copies and casts": ("aten::copy_", "aten::index_select", "aten::cat", "aten::index_copy_"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data", "aten::masked_fill_", "aten::max"),
    "optimizer": ("aten::_fused_adamw_", "aten::_foreach_norm"),
}


def measure(overrides: list[str], is_profiled: bool = False) -> dict[str, Any]:
    """Train a few steps; return processor microseconds a token, peak memory, start-up, and the profile by kind."""
    quiet = ["trainer={global_batch: 1, chat_every: 0, val_every: 1000, save_every: 1000}", f"stage.max_steps={STEPS}"]
    config = load_config([*overrides, *quiet])
    made: dict[str, Any] = {"steps": []}

    def open_rows(encoder: Encoder) -> DataModule:
        data = DataModule(config, encoder)
        data.setup()
        return data

    watched = profile(activities=[ProfilerActivity.CPU]) if is_profiled else nullcontext()
    run_steps(config, STEPS, open_rows, made, watched)
    result: dict[str, Any] = {
        "microseconds_per_token": statistics.median(
            step["cpu"] / step["nonpad"] * 1e6 for step in made["steps"][WARM:]
        ),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "startup_s": made["startup_s"],
    }
    return result | ({"profile": by_kind(watched)} if is_profiled else {})


def by_kind(watched: Any) -> dict[str, float]:
    """Add up the profile's own seconds by kind of work."""
    shares = dict.fromkeys([*KINDS, "elementwise and the rest"], 0.0)
    for event in watched.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key in names), "elementwise and the rest")
        shares[kind] += event.self_cpu_time_total / 1e6
    return shares


def write_text(path: Path, num_rows: int) -> None:
    """Write text rows of 20 to 400 tokens, from this project's own documentation."""
    words = np.array(" ".join(page.read_text(encoding="utf-8") for page in (HERE.parent / "docs").glob("*.md")).split())
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            asked, said = (" ".join(words[rng.integers(0, len(words), rng.integers(5, most))]) for most in (30, 180))
            turns = [
                {"from": "human", "value": asked.replace("<", "")},
                {"from": "gpt", "value": said.replace("<", "")},
            ]
            file.write(json.dumps({"id": str(row), "conversations": turns}) + "\n")


def write_llm(folder: Path, vocabulary: int) -> None:
    """Write a random language model with a table of that many rows, and the demo's tokenizer."""
    config = AutoConfig.for_model(
        "qwen2", hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(run_recipe("demo_llm")).save_pretrained(folder)


def points(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Name the settings of every point."""
    few, many = folder / "few.jsonl", folder / "many.jsonl"
    write_text(few, 1_000)
    write_text(many, 100_000)
    made: dict[str, dict[str, list[str]]] = {
        "rows": {
            str(num): [*TEXT, f"data.path={path}", "stage.pack_length=2048"]
            for num, path in ((1_000, few), (100_000, many))
        },
        "pack_length": {
            str(length): [*TEXT, f"data.path={few}", f"stage.pack_length={length}"] for length in (2048, 4096, 8192)
        },
        "pack_tiles": {
            str(tiles): [*PICTURES, f"stage.pack_tiles={tiles}", "stage.pack_length=8192", "data.feature_cache=off"]
            for tiles in (8, 16, 32)
        },
        "vocabulary": {},
    }
    for vocabulary in (50_000, 152_000, 256_000):
        write_llm(folder / f"llm_{vocabulary}", vocabulary)
        path = f"model.llm.path={folder / f'llm_{vocabulary}'}"
        made["vocabulary"][str(vocabulary)] = [*TEXT, f"data.path={few}", path]
    made["start"] = {"demo": PICTURES}
    return made


def main() -> None:
    """Measure every point in a process of its own; write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", help="the settings of one point, as JSON")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(json.loads(arguments.one), arguments.profile)))
        return
    results: dict[str, Any] = {"processor": processor()}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in points(Path(folder)).items():
            by = "startup_s" if name == "start" else "microseconds_per_token"
            results[name] = measure_in_turns(settings, REPEATS.get(name, 1), by)
            print(name, results[name], flush=True)
    results["step"] = {"demo": ask([*PICTURES, "stage.pack_length=1024"], "--profile")}
    (HERE / "results" / "growth.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results)


def measure_in_turns(settings: dict[str, list[str]], repeats: int, by: str) -> dict[str, Any]:
    """Measure every point, then every point again; keep the run of each that is the median by one of its figures."""
    runs = [{value: ask(overrides) for value, overrides in settings.items()} for _ in range(repeats)]
    return {value: sorted((run[value] for run in runs), key=lambda run: run[by])[repeats // 2] for value in settings}


def ask(overrides: list[str], *options: str) -> dict[str, Any]:
    """Measure one point in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(overrides), *options]
    made = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"GOMP_SPINCOUNT": "10000"}
    )
    answer: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return answer


def draw(results: dict[str, Any]) -> None:
    """Draw memory against pack length, vocabulary and tiles, and the profile."""
    figures = HERE / "figures"
    figures.mkdir(exist_ok=True)
    names = {
        "pack_length": "tokens of a pack",
        "vocabulary": "words of the vocabulary",
        "pack_tiles": "tiles of a pack",
    }
    panels = {
        title: [(float(value), float(row["peak_rss_mb"])) for value, row in results[name].items()]
        for name, title in names.items()
    }
    (figures / "growth.svg").write_text(lines(panels, f"peak memory, MB ({results['processor']})"), encoding="utf-8")
    (figures / "profile.svg").write_text(
        bars(results["step"]["demo"]["profile"], results["processor"]), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
