"""The command line: `python -m vlm_tune [VERB] key=value ...`. Without a verb it trains."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable

from vlm_tune.config.parse import GROUPS, load_config, options
from vlm_tune.errors import ConfigError, VlmTuneError

USAGE = """\
python -m vlm_tune [VERB] key=value ...

  train      (default) run a stage        stage=finetune model=internvl2_2b data.path=my.jsonl
  chat       talk to a trained model      ckpt=runs/latest image=photo.jpg
  evaluate   score a test file            ckpt=runs/latest data.test=test.jsonl
  export     write a merged model folder  ckpt=runs/latest out=my_model layout=hf dtype=bf16
  merge      fold a peft adapter into it  base=FOLDER adapter=FOLDER out=my_model
  check      find every fault in a file   data.path=my.jsonl model=internvl2_2b out=FOLDER
  cache      encode all pictures ahead    data.path=my.jsonl model=internvl2_2b
  inspect    see a row as the model does  data.path=my.jsonl row=17 out=row.html (or --text)
  configs    list stages, models, data

All keys with their defaults: docs/configuration.md. VLM_TUNE_DEBUG=1 shows the traceback of an error.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, or 2 for an error of the input."""
    given = sys.argv[1:] if arguments is None else arguments
    verb, rest = (given[0], given[1:]) if given and "=" not in given[0] else ("train", given)
    if verb == "help" or {"--help", "-h"} & set(given):
        sys.stdout.write(USAGE)
        return 0
    quiet_libraries()
    try:
        if verb not in VERBS:
            raise ConfigError(f"{verb}: no such verb. There are: {', '.join(VERBS)}")
        return VERBS[verb](rest)
    except VlmTuneError as error:
        if os.environ.get("VLM_TUNE_DEBUG"):
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (is_full or error.filename) or os.environ.get("VLM_TUNE_DEBUG"):
            raise
        if is_full:
            remedy = "Free some space; an interrupted run then goes on with resume=last"
        else:
            remedy = "Look at this path; VLM_TUNE_DEBUG=1 shows what it was needed for"
        sys.stderr.write(f"VlmTuneError: {error.filename or 'a file'}: {error.strerror}. {remedy}\n")
        return 2
    except KeyboardInterrupt:
        way_on = " Go on with resume=last, once a checkpoint was saved" if verb == "train" else ""
        sys.stderr.write(f"\nstopped.{way_on}\n")
        return 130


def train_verb(arguments: list[str]) -> int:
    """Train one stage."""
    config = load_config(arguments)
    from vlm_tune.training.run import train  # late: torch takes seconds to import

    train(config)
    return 0


def chat_verb(arguments: list[str]) -> int:
    """Talk to a trained model in the terminal."""
    own, overrides = split_own(arguments, {"ckpt": "runs/latest", "image": ""})
    from vlm_tune.serve.chat import chat

    chat(own["ckpt"], own["image"], overrides)
    return 0


def evaluate_verb(arguments: list[str]) -> int:
    """Score a trained model on a test file."""
    own, overrides = split_own(arguments, {"ckpt": "runs/latest", "out": ""})
    from vlm_tune.evaluation.verb import evaluate

    evaluate(own["ckpt"], own["out"], overrides)
    return 0


def export_verb(arguments: list[str]) -> int:
    """Write a trained model as a folder of its own."""
    defaults = {"ckpt": "runs/latest", "out": "", "layout": "auto", "dtype": "fp32"}
    own, overrides = split_own(arguments, defaults | {"base": "trained", "max_shard_size": "2GB"})
    if not own["out"]:
        raise ConfigError("out is not set. Give a folder for the exported model: out=FOLDER")
    from vlm_tune.export.export import Wanted, export

    wanted = Wanted(own["layout"], own["dtype"], own["base"], own["max_shard_size"])
    export(own["ckpt"], own["out"], wanted, overrides)
    return 0


def merge_verb(arguments: list[str]) -> int:
    """Fold an adapter that was made elsewhere into its base."""
    own, overrides = split_own(arguments, {"base": "", "adapter": "", "out": ""})
    if missing := [key for key, value in own.items() if not value]:
        raise ConfigError(f"{missing[0]} is not set. Give three folders: base=FOLDER adapter=FOLDER out=FOLDER")
    if overrides:
        raise ConfigError(
            f"{overrides[0]}: merge reads no run, so it has no keys of one: base, adapter and out are all"
        )
    from vlm_tune.export.merge_folders import merge

    merge(own["base"], own["adapter"], own["out"])
    return 0


def check_verb(arguments: list[str]) -> int:
    """Find every faulty row of a data file; 1 when there are any."""
    own, overrides = take_own(arguments, {"out": "", "repeated_ids": "error"})
    config = load_config(overrides)
    from vlm_tune.data.check import check
    from vlm_tune.model.encoder import build_encoder

    return check(config, build_encoder(config), own["out"], own["repeated_ids"])


def cache_verb(arguments: list[str]) -> int:
    """Encode the pictures of a run ahead of it."""
    config = load_config(arguments)
    from vlm_tune.training.run import fill_ahead

    fill_ahead(config)
    return 0


def inspect_verb(arguments: list[str]) -> int:
    """Show what the model sees of one row."""
    own, overrides = take_own([each for each in arguments if each != "--text"], {"row": "0", "out": ""})
    if not own["row"].isdecimal():
        raise ConfigError(f"row={own['row']}: give the number of a row, counted from 0")
    config = load_config(overrides)
    from vlm_tune.data.inspect import inspect
    from vlm_tune.model.encoder import build_encoder

    inspect(config, build_encoder(config), int(own["row"]), own["out"], "--text" in arguments)
    return 0


def configs_verb(arguments: list[str]) -> int:
    """List what each configuration group offers."""
    for group in GROUPS:
        sys.stdout.write(f"{group:11} {', '.join(options(group))}\n")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train_verb,
    "chat": chat_verb,
    "evaluate": evaluate_verb,
    "export": export_verb,
    "merge": merge_verb,
    "check": check_verb,
    "cache": cache_verb,
    "inspect": inspect_verb,
    "configs": configs_verb,
}


def split_own(arguments: list[str], defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Part a verb's own keys from overrides of the run's configuration."""
    own, overrides = dict(defaults), []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign:
            raise ConfigError(f"{argument}: keys are written key=value. This verb has: {', '.join(defaults)}")
        if key in defaults:
            own[key] = value
        elif "." in key or key == "seed":
            overrides.append(argument)
        else:
            raise ConfigError(
                f"{key}: no such key. This verb has: {', '.join(defaults)}, and keys of the run (data.test=...)"
            )
    return own, overrides


def take_own(arguments: list[str], defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Part the keys of a verb that reads the whole configuration, as `train` does, from the overrides."""
    own = {key: value for key, _, value in (each.partition("=") for each in arguments) if key in defaults}
    return defaults | own, [each for each in arguments if each.partition("=")[0] not in defaults]


def quiet_libraries() -> None:
    """Silence what other libraries say about themselves; our own lines and all errors remain."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads wait awake for the next product, but not for long: data workers need the cores (benchmarks/README.md)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_TQDM", "1")
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|peft|bitsandbytes|timm|tensorboard).*")
    talkative = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "bitsandbytes")
    for name in (*talkative, "lightning.pytorch.trainer.connectors.checkpoint_connector", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
