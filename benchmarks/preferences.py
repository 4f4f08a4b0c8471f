"""Make pairs of the fine-tuned demo's own answers, train on them, and write what that did to results/preferences.json.

COMMAND: python benchmarks/preferences.py [--seeds 0 1 2] [--stage mpo] [--set stage.lr.llm=1e-4 ...]
TIME: the demo of each seed about 5 minutes on two idle cores, unless benchmarks/demo.py has trained it; then about 2.
Finished runs are kept and not repeated; results of other seeds stay.

A pair is a training photo's question about its food group: chosen is the right group, rejected the wrong one that the
fine-tuned model finds likeliest. The test asks about foods that occur in no pair.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from demo import HERE, run_stages

from vlm_tune.evaluation.evaluate import open_test, read_questions
from vlm_tune.evaluation.likelihood import token_losses, weigh
from vlm_tune.evaluation.metrics import METRICS
from vlm_tune.model.trained import open_trained
from vlm_tune.recipes.recipe import run_recipe

RESULTS = HERE / "results" / "preferences.json"
TASK = "food_group"


def make_pairs(run: Path, file: Path, to: Path) -> None:
    """Write a pair for each question of the task in a file, with the wrong answer that the run finds likeliest."""
    model, config = open_trained(str(run), [f"data.test={file}"])
    test = open_test(config, model)
    assert test is not None
    asked = [question for question in read_questions(test, len(test)) if question.task == TASK]
    groups = sorted({question.expected for question in asked})
    losses = token_losses(model, test, [(question, groups) for question in asked])
    rows = []
    for question, measured in zip(asked, losses, strict=True):
        totals = {group: float(each.sum()) for group, each in zip(groups, measured, strict=True)}
        wrong = min((group for group in groups if group != question.expected), key=totals.__getitem__)
        record: dict[str, Any] = test.rows[question.row]
        prompt = record["conversations"][0]["value"]
        row = {"id": question.sample.id, "image": record["image"], "question": prompt}
        rows.append(row | {"chosen": question.expected, "rejected": wrong})
    to.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def perplexity(run: Path, pairs: Path, data: Path) -> float:
    """Measure how surprised a run is by the chosen answers."""
    model, config = open_trained(str(run), [f"data.test={pairs}", f"data.image.root={data}"])
    test = open_test(config, model)
    assert test is not None
    metric = METRICS["perplexity"]
    (value,) = metric.scores(weigh(model, test, read_questions(test, len(test)), metric)).values()
    return value


def train(stage: str, rows: Path, runs: Path, *more: str) -> Path:
    """Train a stage of the demo on some rows, unless that has been done; return its run."""
    if (runs / "latest" / "report.json").is_file():
        return (runs / "latest").resolve()
    given = [f"stage={stage}", "model=demo", f"data.path={rows}", f"runs={runs}", *more]
    subprocess.run([sys.executable, "-m", "vlm_tune", *given], check=True)
    return (runs / "latest").resolve()


def keep_chosen(pairs: Path, to: Path) -> None:
    """Write the chosen answers of pairs as conversations."""
    rows = []
    for pair in map(json.loads, pairs.read_text(encoding="utf-8").splitlines()):
        said = zip(("human", "gpt"), (pair["question"], pair["chosen"]), strict=True)
        turns = [{"from": speaker, "value": text} for speaker, text in said]
        rows.append({"id": pair["id"], "image": pair["image"], "conversations": turns})
    to.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(seed: int, stage: str, data: Path, root: Path, settings: list[str]) -> dict[str, Any]:
    """Train one seed's demo on pairs, and on their chosen answers alone; compare what came of it."""
    run_stages("demo", seed, root / f"demo_{seed}", data)
    start, runs = (root / f"demo_{seed}" / "latest").resolve(), root / f"preferences_{stage}_{seed}"
    runs.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        if not (runs / f"chosen_{part}.jsonl").is_file():
            make_pairs(start, data / f"finetune_{part}.jsonl", runs / f"pairs_{part}.jsonl")
            keep_chosen(runs / f"pairs_{part}.jsonl", runs / f"chosen_{part}.jsonl")
    common = [f"seed={seed}", f"stage.init_from={start}", f"data.test={data}/test.jsonl"]
    common += [f"data.image.root={data}", "trainer.num_chats=0"]
    found: dict[str, Any] = {"seed": seed, "stage": stage, "settings": settings}
    for name, kind, more in (
        (stage, "pairs", settings),
        ("finetune", "chosen", ["stage.epochs=3", "stage.lr.llm=2e-4"]),
    ):
        run = train(name, runs / f"{kind}_train.jsonl", runs / kind, *common, *more)
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        found[kind] = {
            "seconds": report["run"]["seconds"],
            "steps": report["run"]["steps"],
            "peak_rss_mb": report["peak_rss_mb"],
            "test_before": report["evaluation"]["before"],
            "test_after": report["evaluation"]["after"],
            "perplexity_before": perplexity(start, runs / "pairs_val.jsonl", data),
            "perplexity_after": perplexity(run, runs / "pairs_val.jsonl", data),
            "curves": report["pairs"] and {key: points[-1] for key, points in report["pairs"].items()},
        }
    return found


def main() -> None:
    """Run all seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--stage", default="mpo", choices=["dpo", "mpo"])
    parser.add_argument("--set", nargs="*", default=[], help="further settings of the stage")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    data = run_recipe("demo").resolve()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    for seed in options.seeds:
        found = measure(seed, options.stage, data, options.runs.resolve(), options.set)
        kept = [each for each in kept if (each["seed"], each["stage"]) != (seed, options.stage)] + [found]
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for each in kept:
        for kind in ("pairs", "chosen"):
            scores = [each[kind][when][TASK] for when in ("test_before", "test_after")]
            print(f"seed {each['seed']}, {kind}: food group of unseen foods {scores[0]:.1%} -> {scores[1]:.1%}")


if __name__ == "__main__":
    main()
