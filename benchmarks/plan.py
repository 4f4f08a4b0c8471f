"""Compare `plan` with real runs on this CPU: peak memory and seconds a step; write results/plan.json.

COMMAND: python benchmarks/plan.py [--only "NAME;NAME"] [--reps 3]
measured_mb   the largest private memory of a few steps (Linux: VmHWM, set back when the model is loaded, less RssFile),
              less RssAnon before the model is loaded, when the libraries and the tokenizer have been there once. Pages
              of files are no part of it: of the libraries' code, and of weight files, out of which weights are copied
measured_s    the median processor seconds of an optimizer step by one thread, which others on the machine do not
              change; reading of rows, the first two steps and the last left out, beside which a checkpoint is written
Prediction and run are processes of their own, one after the other, `reps` times in turns; the file holds medians. With
--only the rows of those configurations alone are written anew.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "plan.json"
STEPS, WARM, SAVED = 6, 2, 5  # a checkpoint is written beside the last step: its memory counts, its time does not
COMMON = ["data.feature_cache=off", "data.workers=0", "data.val=none", "data.test=none", "stage.evaluate=false"]
COMMON += ["stage.init_from=none", "logger=csv", "trainer.chat_every=0", "trainer.num_chats=0", "stage.pack_length=512"]
COMMON += ["trainer.global_batch=1", f"trainer.save_every={SAVED}"]
BF16, FP32 = "trainer.precision=bf16", "trainer.precision=fp32"
CONFIGS = {
    "LoRA, bf16": ["stage=finetune", BF16],
    "QLoRA, bf16": ["stage=qlora", BF16],
    "full, float32, two passes a step": ["stage=finetune_full", "trainer.global_batch=2", FP32],
    "tiling, float32": ["stage=finetune", "model.tiles.max=6", "stage.pack_length=768", FP32],
    "long packs, bf16": ["stage=finetune", "stage.pack_length=2048", "stage.pack_tiles=100", BF16],
    "recomputation, float32": [
        *("stage=finetune_full", "stage.pack_length=1024", "stage.gradient_checkpointing.llm=true", FP32),
    ],
}
ENVIRONMENT = {  # one thread: its seconds are its own beside others; the rest is what the command line sets
    "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1",
    "LRU_CACHE_CAPACITY": "1",
}  # fmt: skip


def status(key: str) -> float:
    """Read VmHWM, RssAnon or RssFile of this process in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def own_memory(model: Any) -> None:
    """Copy weights out of the files that they are mapped from: such pages count as a file's, not as the process's."""
    copied = {}
    for weight in model.parameters():
        place = weight.data_ptr()
        weight.data = copied.setdefault(place, weight.data.clone())


def measure(arguments: list[str]) -> dict[str, float]:
    """Train a few steps; return peak memory and the time of a step."""
    import lightning as L
    import torch

    from vlm_tune.cli import quiet_libraries

    quiet_libraries()
    import bitsandbytes  # noqa: F401
    import torch._dynamo
    from transformers import InternVLVisionModel, LlamaForCausalLM  # noqa: F401

    from vlm_tune.config.parse import load_config
    from vlm_tune.console import make_console
    from vlm_tune.data.datamodule import DataModule
    from vlm_tune.model.build import build_model
    from vlm_tune.model.encoder import build_encoder
    from vlm_tune.model.kernels.freed import hand_back_freed_memory
    from vlm_tune.model.parts.stage import apply_stage
    from vlm_tune.training.module import VlmModule
    from vlm_tune.training.trainer import make_trainer

    class Clock(L.Callback):
        """Time each optimizer step, and read the memory before anything is saved."""

        def __init__(self) -> None:
            self.steps: list[tuple[float, float]] = []
            self.micro: list[tuple[float, float]] = []
            self.peak = 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.micro.append((time.perf_counter() - self.start[0], time.process_time() - self.start[1]))
            if len(self.micro) == trainer.accumulate_grad_batches:
                self.steps.append((sum(each[0] for each in self.micro), sum(each[1] for each in self.micro)))
                self.micro = []
            self.peak = status("VmHWM") - status("RssFile")

    config = load_config([*arguments, f"stage.max_steps={STEPS}"])
    build_encoder(config)
    for dtype in (torch.float32, torch.bfloat16):
        small = torch.ones(64, 64, dtype=dtype, requires_grad=True)
        torch.nn.functional.softmax(small @ small, -1).sum().backward()
        torch.optim.AdamW([small], fused=True).step()
    before = status("RssAnon")
    model = build_model(config)
    apply_stage(model.vlm, config)
    own_memory(model.vlm)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    data = DataModule(config, model.encoder)
    data.setup()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "checkpoints").mkdir()
        trainer = make_trainer(config, STEPS, run, [clock], make_console())
        hand_back_freed_memory()
        trainer.fit(VlmModule(model, config, STEPS), datamodule=data)
    wall, processor = ([step[place] for step in clock.steps[WARM:SAVED]] for place in (0, 1))
    return {"mb": clock.peak - before, "s": statistics.median(processor), "wall_s": statistics.median(wall)}


def predict(arguments: list[str]) -> dict[str, float]:
    """Ask the plan."""
    from vlm_tune.config.parse import load_config
    from vlm_tune.planning.plan import open_run
    from vlm_tune.planning.seconds import Cpu, step_seconds

    with open_run(load_config(arguments), on_gpu=False) as run:
        needs = run.needs()
        return {"mb": needs.total / 2**20, "s": step_seconds(needs, Cpu(clock=time.process_time))}


def main() -> None:
    """Measure all, or one in this process for the caller."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--do", choices=("measure", "predict"))
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    if options.do:
        made = (measure if options.do == "measure" else predict)(options.arguments)
        print("RESULT", json.dumps(made))
        return
    chosen = options.only.split(";") if options.only else list(CONFIGS)
    if unknown := [name for name in chosen if name not in CONFIGS]:
        parser.error(f"no such configuration: {unknown}; choose from {list(CONFIGS)}")
    rows = {row["config"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))} if options.only else {}
    for name in chosen:
        found: dict[str, list[dict[str, float]]] = {"predict": [], "measure": []}
        for _ in range(options.reps):
            for kind, made in found.items():
                command = [sys.executable, __file__, "--do", kind, "--", *COMMON, *CONFIGS[name]]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, env=os.environ | ENVIRONMENT
                )
                if done.returncode:
                    raise SystemExit(f"{name}, {kind}:\n{done.stderr[-3000:]}")
                made.append(json.loads(done.stdout.rpartition("RESULT")[2]))
        row: dict[str, Any] = {"config": name}
        for kind, label in (("predict", "predicted"), ("measure", "measured")):
            row |= {
                f"{label}_{key}": round(statistics.median(each[key] for each in found[kind]), 3) for key in ("mb", "s")
            }
        rows[name] = row
        off = {key: row[f"predicted_{key}"] / row[f"measured_{key}"] - 1 for key in ("mb", "s")}
        memory = f"{row['predicted_mb']:7.0f} of {row['measured_mb']:7.0f} MB ({off['mb']:+.1%})"
        seconds = f"{row['predicted_s']:6.2f} of {row['measured_s']:6.2f} s ({off['s']:+.1%})"
        print(f"{name:34} {memory}   {seconds}", flush=True)
        RESULTS.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
