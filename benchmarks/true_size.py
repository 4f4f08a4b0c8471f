"""Fine-tune InternVL2-2B at its true size with random weights, from a folder in its original layout; print a table row.

COMMAND: python benchmarks/true_size.py [--folder FOLDER] [--steps 2] [--pack 2048] [--keep] [KEY=VALUE ...]
TIME: about 10 minutes on two CPU cores; 5 GB of disk, 18 GiB of memory with packs of 2048 tokens.
What is measured is memory and time: random weights learn nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2 as protobuf

from vlm_tune.config.parse import load_config
from vlm_tune.model.layouts.internvl.official import empty_model, original_entries
from vlm_tune.model.layouts.weights import write_shards
from vlm_tune.recipes.recipe import run_recipe

BASE = 92544  # pieces of InternLM2's tokenizer, its own special tokens among them
NAMED = {92538: "<|plugin|>", 92539: "<|interpreter|>", 92540: "<|action_end|>", 92541: "<|action_start|>"}
NAMED |= {92542: "<|im_end|>", 92543: "<|im_start|>"}
ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
VISION = {
    "model_type": "intern_vit_6b",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
}
LLM = {
    "model_type": "internlm2",
    "vocab_size": BASE + len(ADDED),
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "bias": False,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
CONFIG: dict[str, Any] = {
    "model_type": "internvl_chat",
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "vision_config": VISION,
    "llm_config": LLM,
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "force_image_size": 448,
    "template": "internlm2-chat",
}
LOAD = """
import sys, time, torch
from pathlib import Path
from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import Quantize
from vlm_tune.model.layouts.internvl import official as internvl_official
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
model = load_config(["model=internvl2_2b"]).model
open("/proc/self/clear_refs", "w").write("5")
before, start = status("VmRSS"), time.perf_counter()
vlm = internvl_official.load(Path(sys.argv[1]), model, torch.bfloat16, Quantize.none).vlm
print(status("VmHWM") - before, sum(weight.nbytes for weight in vlm.parameters()), time.perf_counter() - start)
"""


def make_folder(folder: Path, seed: int) -> None:
    """Write config, tokenizer and random bfloat16 weights, one shard in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    make_tokenizer(folder)
    vlm = empty_model(CONFIG, load_config(["model=internvl2_2b"]).model, folder)
    shapes = {entry.stored: entry.shape for entry in original_entries(vlm, CONFIG)}
    generator = torch.Generator().manual_seed(seed)

    def random(key: str) -> torch.Tensor:
        if "norm" in key and key.endswith("weight"):
            return torch.ones(shapes[key], dtype=torch.bfloat16)
        return torch.empty(shapes[key], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    write_shards(shapes, random, folder)


def make_tokenizer(folder: Path) -> None:
    """Train a small sentencepiece model on the demo's texts, and fill it up to InternLM2's number of pieces."""
    rows = (run_recipe("demo") / "finetune_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [turn["value"] for row in rows for turn in json.loads(row)["conversations"]]
    (folder / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=2000,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    proto: Any = protobuf.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    for index in range(len(proto.pieces), BASE):
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{index}]", score=-1e6, type=5)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    names = {0: "<unk>", 1: "<s>", 2: "</s>"} | NAMED | {BASE + i: token for i, token in enumerate(ADDED)}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {str(index): {"content": name, "special": True} for index, name in names.items()},
        "additional_special_tokens": [name for index, name in names.items() if index > 2],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for name in ("corpus.txt", "tokenizer.vocab"):
        (folder / name).unlink()


def measure_load(folder: Path) -> tuple[int, int, float]:
    """Load the folder in a process of its own: bytes that it grew by at most, bytes of the weights, seconds."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    grown, weights, seconds = done.stdout.split()[-3:]
    return int(grown), int(weights), float(seconds)


def fine_tune(folder: Path, runs: Path, options: argparse.Namespace) -> tuple[dict[str, Any], int, float]:
    """Run the command of the table; return its report, the most memory of its process in bytes, its CPU seconds."""
    settings = [
        "stage=finetune",
        "model=internvl2_2b",
        f"model.path={folder}",
        "data=demo",
        f"runs={runs}",
        f"stage.max_steps={options.steps}",
        f"stage.pack_length={options.pack}",
        "stage.evaluate=false",
        "data.val=none",
        "data.test=none",
        "data.feature_cache=off",
        "data.workers=0",
        "trainer.global_batch=1",
        "trainer.precision=bf16",
        "trainer.num_chats=0",
        "trainer.chat_every=0",
        "logger=csv",
        *options.settings,
    ]
    process = subprocess.Popen([sys.executable, "-m", "vlm_tune", *settings])
    _, code, usage = os.wait4(process.pid, 0)
    if code:
        raise SystemExit("the run failed")
    report: dict[str, Any] = json.loads((runs / "latest" / "report.json").read_text(encoding="utf-8"))
    return report, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def row(report: dict[str, Any], peak: int, cpu: float, load: tuple[int, int, float], steps: int) -> str:
    """Write the table's heading and its row."""
    grown, weights, seconds = load
    tokens = report["run"]["tokens"] / steps
    cells = [
        f"{weights / 2**30:.2f}",
        f"{seconds:.0f}",
        f"{grown / weights:.2f}",
        f"{peak / 2**30:.1f}",
        f"{tokens:,.0f}",
        f"{report['train_seconds'] / steps:.0f}",
        f"{cpu:.0f}",
    ]
    return (
        "| weights GiB | load s | load: peak / weights | run: peak GiB | tokens a step | s a step | run: CPU s |\n"
        f"|---|---|---|---|---|---|---|\n| {' | '.join(cells)} |"
    )


def main() -> None:
    """Make the folder, measure, print, and delete it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vlm_tune_true_size")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pack", type=int, default=2048, help="tokens of a pack")
    parser.add_argument("settings", nargs="*", help="more keys of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="do not delete the folder")
    options = parser.parse_args()
    model, runs = options.folder / "model", options.folder / "runs"
    try:
        if not model.is_dir():
            start = time.perf_counter()
            make_folder(model, options.seed)
            os.sync()  # or the load would wait for the disk to finish
            print(f"folder made in {time.perf_counter() - start:.0f} s")
        load = measure_load(model)
        print(f"loaded: {load}, load average {os.getloadavg()[0]:.1f}")
        report, peak, cpu = fine_tune(model, runs, options)
        print(row(report, peak, cpu, load, options.steps))
        print(f"load average {os.getloadavg()[0]:.1f}; losses {report['loss_curve']}")
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
