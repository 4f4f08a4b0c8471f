"""Train on the work of another trainer, its batches in its order, and write down what each step took.

COMMAND: python benchmarks/speed_steps.py --workload w1|w2|w3|pairs --bs N --steps N --dtype bf16|fp32
with BENCH_WORK (the work folder) and BENCH_OUT (the JSON to write) in the environment.
OPTIONS: --packing 1 --max_length N packs samples up to N tokens, `bs` packs a step; --cache 1 is a later epoch: the
features of the pictures are kept; --unpacked 1 pads instead of packing; --share 1 lets rows share what they begin with.

`speed.py` calls this and reads its JSON: steps[{wall, cpu, samples, nonpad, padded, sup, tiles, loss}], peak_rss_mb,
startup_s. It is the trainer itself, callbacks and all, but for the order of the rows. What is done with all rows before
the first step is there too: `encoding_cpu_s`, where features are kept, and `reference_cpu_s` of pairs.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

STARTED = time.time()
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from vlm_tune.cli import quiet_libraries  # noqa: E402 (its environment must stand before torch is imported)

quiet_libraries()

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from vlm_tune.config.parse import load_config  # noqa: E402
from vlm_tune.config.schema import Config  # noqa: E402
from vlm_tune.console import make_console  # noqa: E402
from vlm_tune.data.batch import Batch  # noqa: E402
from vlm_tune.data.datamodule import DataModule, Part  # noqa: E402
from vlm_tune.data.encode import Encoder  # noqa: E402
from vlm_tune.data.stream import MicroBatch  # noqa: E402
from vlm_tune.model.build import build_model  # noqa: E402
from vlm_tune.model.kernels.freed import hand_back_freed_memory  # noqa: E402
from vlm_tune.model.parts.stage import apply_stage, trained_parameters  # noqa: E402
from vlm_tune.model.preference.facts import FACTS  # noqa: E402
from vlm_tune.model.preference.reference import fill_reference  # noqa: E402
from vlm_tune.training.module import VlmModule  # noqa: E402
from vlm_tune.training.run import keep_features  # noqa: E402
from vlm_tune.training.trainer import make_trainer  # noqa: E402

FILES = {"w1": "cap.json", "w2": "mm.json", "w3": "text.json", "pairs": "pairs.json"}
STAGES = {
    "w1": ["stage=pretrain", "model.tiles.max=1"],
    "w2": ["stage=finetune", "model.tiles.max=6"],
    "w3": ["stage=sft", "model.tiles.max=6"],
    "pairs": ["stage=dpo", "stage.train.projector=full", "model.tiles.max=6"],
}


class InFileOrder(DataModule):
    """Serve the rows as the other trainers do: one after the other, `num_rows` a step."""

    def plan(self, num_rows: int, num_steps: int, max_length: int | None) -> None:
        """Name the rows of each step: `num_rows` rows, or as many packs of at most `max_length` tokens."""
        assert self.train is not None
        self.groups = groups_of(self.train, num_rows, num_steps, max_length)
        if self.config.stage.preference.is_on:  # its loss is the mean of pairs, not of tokens
            self.groups = [replace(group, step_weight=float(len(group.rows))) for group in self.groups]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Serve those steps."""
        assert self.train is not None
        settings = self.settings(1)
        return self._loader(self.train.batches(settings, True), self.groups)


def groups_of(part: Part, num_rows: int, num_steps: int, max_length: int | None) -> list[MicroBatch]:
    """Cut the rows, in their order, into steps."""
    groups: list[list[int]] = [[]]
    packs, filled = 1, 0
    for row in range(len(part.index)):
        length = int(part.index.tokens[row])
        is_full = max_length is not None and filled + length > max_length
        packs, filled = (packs + 1, length) if is_full else (packs, filled + length)
        if len(groups[-1]) == num_rows if max_length is None else packs > num_rows:
            groups.append([])
            packs, filled = 1, length
        groups[-1].append(row)
    weights = [float(part.index.supervised[group].sum()) for group in groups]
    steps = [MicroBatch(tuple(group), 0, weight, (0, 0, 0)) for group, weight in zip(groups, weights, strict=True)]
    return (steps * num_steps)[:num_steps]


def processor_seconds() -> float:
    """Processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Clock(L.Callback):
    """Write down each step's time and counts."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start."""
        self.result["startup_s"] = time.time() - STARTED
        self.last = (time.perf_counter(), processor_seconds())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count."""
        now = (time.perf_counter(), processor_seconds())
        pictures = batch.tiles if batch.tiles is not None else batch.features
        self.result["steps"].append(
            {
                "wall": now[0] - self.last[0],
                "cpu": now[1] - self.last[1],
                "samples": len(batch.sample_ids),
                "nonpad": batch.num_tokens,
                "padded": batch.input_ids.numel(),
                "sup": len(batch.targets),
                "tiles": 0 if pictures is None else len(pictures),
                "loss": [float(pl_module.step_loss)],
            }
            | (count_pairs(batch, pl_module.step_facts.tolist()) if batch.answers is not None else {})
        )
        self.last = now


def count_pairs(batch: Batch, facts: list[float]) -> dict[str, float]:
    """Count the tokens of the chosen and of the rejected answers, each with all that it follows."""
    assert batch.segments is not None
    parents = batch.parents or [-1] * len(batch.segments)
    leaves = [each for each in range(len(parents)) if each not in parents]
    sizes = [batch.segments[each] + (batch.segments[parents[each]] if parents[each] >= 0 else 0) for each in leaves]
    known = dict(zip(FACTS, facts, strict=True))
    said = {name: known[name] for name in ("logp_chosen", "logp_rejected")}
    return {"chosen": sum(sizes[::2]), "rejected": sum(sizes[1::2])} | said


def main() -> None:
    """Train the steps and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=list(FILES), required=True)
    parser.add_argument("--bs", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), required=True)
    parser.add_argument("--max_length", type=int)
    for switch in ("--packing", "--cache", "--unpacked", "--share"):
        parser.add_argument(switch, type=int, default=0)
    arguments = parser.parse_args()
    assets = Path(os.environ["BENCH_WORK"]) / "assets"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    result: dict[str, Any] = {"steps": []}
    train(arguments, assets, result)
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(os.environ["BENCH_OUT"]).write_text(json.dumps(result), encoding="utf-8")


def train(arguments: argparse.Namespace, assets: Path, result: dict[str, Any]) -> None:
    """Train on the rows of the other trainers."""
    config = load_config(
        [
            *STAGES[arguments.workload],
            "model=tiny",
            f"model.path={assets / os.environ.get('BENCH_MODEL', 'R')}",
            "model.system=''",
            "model.tiles.size=448",
            "model.tiles.min=1",
            f"data.path={assets / FILES[arguments.workload]}",
            f"data.image.root={assets}",
            "data.val=none",
            "data.test=none",
            "data.workers=0",
            f"data.feature_cache={'on' if arguments.cache else 'off'}",
            f"stage.packing={str(not arguments.unpacked).lower()}",
            "stage.init_from=none",
            "stage.lora={rank: 16, alpha: 32, dropout: 0}",
            "stage.lr={projector: 1e-4, llm: 1e-4}",
            "trainer={global_batch: 1, chat_every: 0, val_every: 1000, save_every: 1000}",
            f"trainer.precision={arguments.dtype}",
            *(["stage.share_prefix=on"] if arguments.share else []),
        ]
    )
    max_length = arguments.max_length if arguments.packing else None

    def open_rows(encoder: Encoder) -> DataModule:
        data = InFileOrder(config, encoder)
        data.setup()
        data.plan(arguments.bs, arguments.steps, max_length)
        return data

    run_steps(config, arguments.steps, open_rows, result)


def run_steps(
    config: Config,
    num_steps: int,
    open_rows: Callable[[Encoder], DataModule],
    result: dict[str, Any],
    watch: AbstractContextManager[Any] = nullcontext(),  # noqa: B008 (it holds nothing)
) -> None:
    """Train some steps as a run does, in a folder of its own; each step's time and counts go into the result.

    `watch` is entered for the steps alone.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    model = build_model(config)
    apply_stage(model.vlm, config)
    data = open_rows(model.encoder)
    with tempfile.TemporaryDirectory() as run:
        (Path(run) / "checkpoints").mkdir()
        console = make_console()
        trainer = make_trainer(config, num_steps, Path(run), [Clock(result)], console)
        began = processor_seconds()
        keep_features(model.vlm, data, config, trainer.strategy.root_device, console)
        encoded = processor_seconds()
        fill_reference(model.vlm, data, trainer.strategy.root_device)
        hand_back_freed_memory()
        result["encoding_cpu_s"], result["reference_cpu_s"] = encoded - began, processor_seconds() - encoded
        result["trained"] = sum(weight.numel() for _, weight in trained_parameters(model.vlm))
        with watch:
            trainer.fit(VlmModule(model, config, num_steps), datamodule=data)


if __name__ == "__main__":
    main()
