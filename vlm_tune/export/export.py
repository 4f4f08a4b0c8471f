"""`python -m vlm_tune export ckpt=RUN out=DIR`: merge in float32, write, load back, compare."""

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlm_tune.config.schema import Config, Precision, Quantize
from vlm_tune.console import tell
from vlm_tune.errors import ConfigError
from vlm_tune.export.adapter import (
    NATIVE,
    Goal,
    require_adapters,
    require_language_model,
    write_adapter,
    write_native,
)
from vlm_tune.export.merge import merge_adapters
from vlm_tune.export.parity import AGREEMENT_BOUND, Parity, compare
from vlm_tune.export.plain import measure, read
from vlm_tune.export.stranger import Questions, plain_agreement
from vlm_tune.export.wanted import ADAPTERS, GGUF_DTYPES, Wanted, empty_folder
from vlm_tune.model.build import Model, build_model
from vlm_tune.model.checkpoint import find_checkpoint, run_config
from vlm_tune.model.layouts import parts
from vlm_tune.model.layouts.internvl import hf as internvl_hf
from vlm_tune.model.layouts.internvl import official as internvl_official
from vlm_tune.model.layouts.llava import hf as llava_hf
from vlm_tune.model.layouts.native import OTHER_PARTS
from vlm_tune.model.trained import open_trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKEND = (
    "pictures: AutoProcessor takes torchvision where that is installed, whose pixels differ by up to 2/255 from those "
    'of training; processor.image_processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil") makes the same'
)


def export(ckpt: str, out: str, wanted: Wanted, overrides: list[str], console: Console) -> Path:
    """Write the merged model of a run, or its adapter; fail if its answers differ from the trained model's."""
    wanted.check()
    folder = empty_folder(out)
    if wanted.layout in ADAPTERS:
        require_adapters(wanted.layout, ckpt, overrides)
    quantized = measure_quantized(ckpt, overrides)
    model, config = open_for_merging(ckpt, overrides, wanted, console)
    tell(console, model.notes)
    layout = choose_layout(model, config, wanted.layout)
    dtype = GGUF_DTYPES[wanted.dtype] if layout == "gguf" else wanted.dtype
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    questions = Questions(model, config)
    prompts = questions.prompts
    before = Parity.measure(model, prompts)
    report: dict[str, Any] = {"layout": layout, "dtype": dtype}
    plain: Any = None
    if layout in ADAPTERS:
        kind = choose_layout(model, config, "auto")
        if kind not in NATIVE:
            require_language_model(layout, ckpt, overrides)
        goal = Goal(kind, partial, folder, DTYPES[dtype], wanted.shard, layout)
        plain, report["base_model"] = write_adapter(model, config, goal, console)
        after = measure(plain, model, prompts)
    else:
        merge_adapters(model.vlm)
        kind = layout
        written = write(layout, model, config, partial, replace(wanted, dtype=dtype), console)
        after = Parity.measure(written, prompts)
    result = compare(before, after, dtype)
    report |= asdict(result) | {"transparent_pictures": handing_over(config.data.image.alpha)}
    passed, summary = result.passed, result.summary
    alone = (
        plain_agreement(plain or read(partial), partial, questions, before.answers)
        if kind in NATIVE and prompts
        else None
    )
    if alone is not None:
        report["from_the_folder_alone"] = alone
        passed = passed and alone >= AGREEMENT_BOUND
        summary += f", {alone:.0%} of those that transformers generates from the folder alone"
    if config.data.image.alpha != "drop":
        console.print(report["transparent_pictures"])
    console.print(f"{layout} folder, {dtype}: {summary}")
    if quantized is not None:
        distance = compare(quantized, after, dtype)
        report |= {"base": "original" if layout in ADAPTERS else wanted.base, "to_quantized_run": asdict(distance)}
        console.print(f"beside the quantized run in its own arithmetic: {distance.summary}")
    (partial / "parity.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return settle(partial, folder, passed, summary, console)


def handing_over(alpha: str) -> str:
    """Describe how to treat transparent pictures as training did: tools that load the folder may differ."""
    make_rgb = "picture.convert('RGB')"
    if alpha != "drop":
        over = f"Image.new('RGBA', picture.size, '{alpha}')"
        make_rgb = f"Image.alpha_composite({over}, picture.convert('RGBA')).convert('RGB')"
    return f"trained with data.image.alpha={alpha}: hand a transparent picture over as {make_rgb}"


def measure_quantized(ckpt: str, overrides: list[str]) -> Parity | None:
    """Measure a quantized run as it was trained, packed weights and all; None for any other run."""
    if run_config(find_checkpoint(ckpt), overrides).stage.quantize is Quantize.none:
        return None
    model, config = open_trained(ckpt, overrides)
    return Parity.measure(model, Questions(model, config).prompts)


def open_for_merging(ckpt: str, overrides: list[str], wanted: Wanted, console: Console) -> tuple[Model, Config]:
    """Open a run in float32, adapters not merged, on the base they were trained on, or on a quantized one's original.

    Nothing is ever merged into packed weights: rounding to 4 bits would undo what was learned. An adapter exported
    alone is compared on the original weights: its user will load those.
    """
    quantize = run_config(find_checkpoint(ckpt), overrides).stage.quantize
    if quantize is Quantize.none:
        return open_trained(ckpt, overrides, Precision.fp32)
    if wanted.layout in ADAPTERS:
        notice = (
            f"the adapter was trained on a {quantize.value} base and is compared on the original one. For the model as "
            f"trained load the base quantized: BitsAndBytesConfig(..., llm_int8_skip_modules={OTHER_PARTS})"
        )
    elif wanted.base == "original":
        notice = (
            f"base=original: the adapters were trained on a {quantize.value} base. On the original weights they make "
            "another model"
        )
    else:
        return open_trained(ckpt, overrides, dequantized=True)
    console.print(notice)
    return open_trained(ckpt, [*overrides, "stage.quantize=none"], Precision.fp32)


def settle(partial: Path, folder: Path, passed: bool, summary: str, console: Console) -> Path:
    """Give the folder its name, or mark it as failed."""
    if not passed:
        failed = folder.with_name(folder.name + ".failed")
        shutil.rmtree(failed, ignore_errors=True)
        partial.rename(failed)
        remedy = "Try dtype=fp32, or compare its answers before you use it"
        raise ConfigError(f"{failed}: the exported model differs from the trained one ({summary}). {remedy}")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    console.print(f"exported: {folder}")
    return folder


def choose_layout(model: Model, config: Config, layout: str) -> str:
    """Take transformers' own layout where the model fits it, else separate parts."""
    if layout != "auto":
        return layout
    tiles = config.model.tiles
    classes = {
        "hf": lambda: internvl_hf.native_config(model.vlm),
        "llava_hf": lambda: llava_hf.native_config(model.vlm, tiles),
    }
    for name, describe in classes.items():
        with suppress(ConfigError):
            describe()
            return name
    return "parts"


def write(layout: str, model: Model, config: Config, folder: Path, wanted: Wanted, console: Console) -> Model:
    """Write the folder of a layout, print its limits, and load it back."""
    if layout == "gguf":
        from vlm_tune.model.layouts.gguf import files as gguf_files

        target = (config.model, folder, wanted.dtype)
        gguf_files.save(model.vlm, model.tokenizer, model.encoder, target)
        tell(console, [gguf_files.limits(config.model)])
        return replace(model, vlm=gguf_files.load_back(folder, model.vlm))
    for parameter in model.vlm.parameters():  # buffers (the rotary frequencies) stay in float32
        parameter.data = parameter.data.to(DTYPES[wanted.dtype])
    if layout in NATIVE:
        notes = write_native(model, config, layout, folder, wanted.shard)
        tell(console, [*notes, *([BACKEND] if layout == "hf" else [])])
    elif layout == "official":
        template = model.encoder.template
        tell(console, internvl_official.save(model.vlm, template, config.model, folder, shard=wanted.shard))
        model.tokenizer.save_pretrained(folder)
    else:
        parts.save(model.vlm, model.tokenizer, folder, wanted.shard)
    return reload(folder, config)


def reload(folder: Path, config: Config) -> Model:
    """Load an exported folder as a user would: model.path=FOLDER."""
    vision, llm = replace(config.model.vision, path=None), replace(config.model.llm, path=None)
    model = replace(config.model, path=str(folder), vision=vision, llm=llm)
    trainer = replace(config.trainer, precision=Precision.fp32)
    stage = replace(config.stage, quantize=Quantize.none)
    return build_model(replace(config, model=model, trainer=trainer, stage=stage))
