"""`python -m vlm_tune export ckpt=RUN out=DIR`: merge in float32, write, load back, compare."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from vlm_tune.config.schema import Config, Precision
from vlm_tune.errors import ConfigError
from vlm_tune.evaluation.evaluate import open_test, prompt_of, read_questions
from vlm_tune.export.merge import merge_adapters
from vlm_tune.export.parity import Parity, compare
from vlm_tune.model.build import Model, build_model
from vlm_tune.model.generate import Prompt
from vlm_tune.model.layouts import internvl_hf, internvl_official, llava_hf, parts
from vlm_tune.model.layouts.llava_processor import save_llava_processor
from vlm_tune.model.layouts.processor import save_processor
from vlm_tune.model.trained import open_trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("hf", "official", "llava_hf", "parts")


def export(ckpt: str, out: str, layout: str, dtype: str, overrides: list[str]) -> Path:
    """Write the merged model of a run, and fail when it does not answer as the trained one does."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: no such type. There are: {', '.join(DTYPES)}")
    folder = Path(out).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"out={out}: the folder is not empty. Name a new one: nothing is overwritten")
    console = Console()
    model, config = open_trained(ckpt, overrides, Precision.fp32)
    layout = choose_layout(model, layout)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    prompts = sample_prompts(model, config)
    before = Parity.measure(model, prompts)
    merge_adapters(model.vlm)
    for parameter in model.vlm.parameters():  # buffers (the rotary frequencies) stay in float32
        parameter.data = parameter.data.to(DTYPES[dtype])
    write(layout, model, config, partial)
    after = Parity.measure(reload(partial, config), prompts)
    result = compare(before, after, dtype)
    (partial / "parity.json").write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    console.print(f"{layout} folder, {dtype}: {result.summary}", highlight=False)
    return settle(partial, folder, result.passed, result.summary)


def settle(partial: Path, folder: Path, passed: bool, summary: str) -> Path:
    """Give the folder its name, or mark it as failed."""
    if not passed:
        failed = folder.with_name(folder.name + ".failed")
        shutil.rmtree(failed, ignore_errors=True)
        partial.rename(failed)
        raise ConfigError(f"{failed}: the exported model differs from the trained one ({summary}). Try dtype=fp32")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    Console().print(f"exported: {folder}", highlight=False)
    return folder


def choose_layout(model: Model, layout: str) -> str:
    """Take transformers' own layout where the model fits it, else the parts side by side."""
    if layout != "auto":
        if layout not in LAYOUTS:
            raise ConfigError(f"layout={layout}: no such layout. There are: auto, {', '.join(LAYOUTS)}")
        return layout
    try:
        internvl_hf.native_config(model.vlm)
    except ConfigError:
        return "parts"
    return "hf"


def sample_prompts(model: Model, config: Config, count: int = 4) -> list[Prompt]:
    """Take a few real questions with pictures; without a test file, none."""
    test = open_test(config, model)
    return [prompt_of(test, question.sample) for question in read_questions(test, count)] if test else []


def write(layout: str, model: Model, config: Config, folder: Path) -> None:
    """Write the folder of a layout."""
    if layout == "hf":
        internvl_hf.save(model.vlm, folder)
        save_processor(model.tokenizer, model.encoder, config.model, folder)
    elif layout == "official":
        internvl_official.save(model.vlm, model.encoder.template, config.model, folder)
        model.tokenizer.save_pretrained(folder)
    elif layout == "llava_hf":
        llava_hf.save(model.vlm, config.model.tiles, folder)
        save_llava_processor(model.tokenizer, model.encoder, config.model, folder)
    else:
        parts.save(model.vlm, model.tokenizer, folder)


def reload(folder: Path, config: Config) -> Model:
    """Load an exported folder as a user would: model.path=FOLDER."""
    model = replace(config.model, path=str(folder), vision=replace(config.model.vision, path=None))
    model.llm = replace(config.model.llm, path=None)
    trainer = replace(config.trainer, precision=Precision.fp32)
    return build_model(replace(config, model=model, trainer=trainer))
