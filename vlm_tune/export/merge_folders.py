"""`python -m vlm_tune merge base=DIR adapter=DIR out=DIR`: merge a peft adapter into the folder of its base."""

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_tune.console import tell
from vlm_tune.errors import ConfigError
from vlm_tune.export.export import settle
from vlm_tune.export.merge_plain import GENERATION, merge_plain
from vlm_tune.export.merge_stored import KINDS, is_llava, merge_stored
from vlm_tune.export.parity import FLOAT32_BOUND
from vlm_tune.export.peft_folder import HOLDS_WEIGHTS, TOKENIZER, WHOLE, PeftFolder, read_peft_folder
from vlm_tune.export.wanted import empty_folder
from vlm_tune.model.layouts.folder_files import read_object
from vlm_tune.model.layouts.folders import ADAPTER_SETTINGS, PARTS_SETTINGS, model_kind, read_json
from vlm_tune.model.layouts.pretrained import reading
from vlm_tune.model.layouts.tokenizer import needs_building
from vlm_tune.model.layouts.weights import notes
from vlm_tune.model.parts.llm import load_tokenizer

OTHERS = (WHOLE, "mm_projector.bin")  # of LLaVA's trainer: weights that replace those of the folder


def merge(base: str, adapter: str, out: str, console: Console) -> Path:
    """Merge in float32, write in the base's dtype with its tokenizer and processor, load back, and compare.

    Raises ConfigError or CheckpointError for a missing folder, a packed base, and weights that match nothing.
    """
    folder = empty_folder(out)
    base_folder, adapter_folder = find(base, "base", "config.json"), find(adapter, "adapter", ADAPTER_SETTINGS)
    refuse_base(base, base_folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tell(console, notes(base_folder))
    try:
        with reading(adapter_folder):  # the base's files have errors of their own
            read = read_peft_folder(adapter_folder)
            is_stored = model_kind(base_folder) in KINDS or is_llava(read)
            report = (merge_stored if is_stored else merge_plain)(base_folder, read, partial)
            copy_beside(base_folder, read, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (partial / "parity.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    what = "outputs of its layers" if is_stored else "logits"
    summary = (
        f"{what} differ by {report['merged_in_float32']:.1e} at most after merging in float32, by "
        f"{report['as_stored']:.1e} as stored in {report['dtype']}; the adapter itself changes them by "
        f"{report['adapter_changes']:.1e}"
    )
    console.print(summary)
    bound = FLOAT32_BOUND * max(1.0, report["scale"])
    passed = all(report[key] <= bound for key in ("merged_in_float32", "loaded_back"))
    return settle(partial, folder, passed, summary, console)


def find(path: str, key: str, file: str) -> Path:
    """Return a local folder that holds a file; raise ConfigError when there is none."""
    folder = Path(path).expanduser()
    if not any((folder / name).is_file() for name in (file, *((PARTS_SETTINGS,) if key == "base" else ()))):
        raise ConfigError(f"{key}={path}: there is no {file} in it. Name a local folder: {key}=FOLDER")
    return folder


def refuse_base(base: str, folder: Path) -> None:
    """Raise ConfigError for packed weights, and weights next to the base that change it."""
    if model_kind(folder) == "parts":
        raise ConfigError(
            f"base={base}: parts side by side. Name the folder of the part that the adapter belongs to: base={base}/llm"
        )
    if read_json(folder).get("quantization_config"):
        raise ConfigError(
            f"base={base}: its weights are packed, and nothing is merged into those. Name the 16-bit base"
        )
    if (folder / GENERATION).is_file():
        read_object(folder / GENERATION)  # transformers would pass over one that is damaged
    if found := [name for name in OTHERS if (folder / name).is_file()]:
        raise ConfigError(
            f"base={base}: {', '.join(found)} beside its weights, which would have to be put in first. Name a whole "
            "base, or move the file away"
        )


def copy_beside(base: Path, adapter: PeftFolder, out: Path) -> None:
    """Copy the files next to the base's weights; the adapter's tokenizer replaces the base's."""
    theirs = adapter.tokenizer
    left_out = set(TOKENIZER) if theirs is not None else set()
    if theirs is not None and not theirs.chat_template:
        left_out -= {name for name in TOKENIZER if name.startswith("chat_template")}
    for file in base.iterdir():
        is_weights = file.name.endswith((*HOLDS_WEIGHTS, ".index.json"))
        if file.is_file() and not is_weights and file.name not in left_out and not (out / file.name).exists():
            shutil.copy(file, out / file.name)
    tower = Path(str(read_json(out).get("mm_vision_tower")))  # a LLaVA's encoder may be a folder inside its own
    if len(tower.parts) == 1 and (base / tower / "config.json").is_file():
        shutil.copytree(base / tower, out / tower)
    for file in adapter.tokenizer_files:
        shutil.copy(file, out / file.name)
    source = base if theirs is None else adapter.folder
    if needs_building(source):
        (theirs or load_tokenizer(base)).save_pretrained(out)
    if theirs is not None:
        add_stop(out / GENERATION, theirs.eos_token_id)


def add_stop(path: Path, stop: Any) -> None:
    """Also end answers at the end token of the adapter's tokenizer, with which it was trained."""
    settings = read_object(path) if path.is_file() else {}
    ends = settings.get("eos_token_id", read_json(path.parent).get("eos_token_id"))
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if isinstance(stop, int) and stop not in known:
        settings["eos_token_id"] = [stop, *known]
        path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
