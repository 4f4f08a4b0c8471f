"""The command line: `python -m vlm_tune [VERB] key=value ...`. Without a verb it trains."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vlm_tune import __version__
from vlm_tune.config.hints import bare_hint
from vlm_tune.config.own_keys import (
    choices_of_groups,
    is_word,
    keys_only,
    number_of,
    port_of,
    split_own,
    take_own,
    words_and_keys,
)
from vlm_tune.config.parse import describe_sources, expand_sweep, load_config, nearest_of
from vlm_tune.config.schema import Config
from vlm_tune.config.usage import usage, usage_of
from vlm_tune.console import make_console
from vlm_tune.errors import ConfigError, Stopped, VlmTuneError


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return its exit code: 0; 2 for an error; 75 for a run that was asked to stop."""
    given = sys.argv[1:] if arguments is None else arguments
    verb, rest = (given[0], given[1:]) if given and is_word(given[0]) else ("train", given)
    if shown := help_text(verb, given):
        sys.stdout.write(shown)
        return 0
    quiet_libraries()
    try:
        if verb not in VERBS:
            raise no_verb(verb)
        return VERBS[verb](rest if verb in TAKE_WORDS else keys_only(verb, rest))
    except VlmTuneError as error:
        if os.environ.get("VLM_TUNE_DEBUG"):
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return stopped.code
    except ModuleNotFoundError as error:
        if (error.name or "vlm_tune").startswith("vlm_tune") or os.environ.get("VLM_TUNE_DEBUG"):
            raise
        sys.stderr.write(
            f"ConfigError: the package {error.name} is not installed. Install vlm_tune with all that it needs: "
            "`make install` in its checkout, or `pip install .` there\n"
        )
        return 2
    except OSError as error:
        return say_os_error(error)
    except KeyboardInterrupt:
        way_on = " Go on with resume=last, once a checkpoint was saved" if verb == "train" else ""
        sys.stderr.write(f"\nstopped.{way_on}\n")
        return 130


def say_os_error(error: OSError) -> int:
    """Report an OSError with its path and a remedy; re-raise one without either, which is a bug."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not (is_full or error.filename) or os.environ.get("VLM_TUNE_DEBUG"):
        raise error
    if is_full:
        remedy = "Free some space; an interrupted run then goes on with resume=last"
    else:
        remedy = "Look at this path; VLM_TUNE_DEBUG=1 shows what it was needed for"
    sys.stderr.write(f"VlmTuneError: {error.filename or 'a file'}: {error.strerror}. {remedy}\n")
    return 2


def help_text(verb: str, given: list[str]) -> str:
    """Return the text for `help`, `help VERB`, `VERB --help` or `--version`; "" for anything else."""
    if given and given[0] in ("--version", "-V", "version"):
        return f"vlm_tune {__version__}\n"
    if verb != "help" and not {"--help", "-h"} & set(given):
        return ""
    asked = next((word for word in given if word in VERBS), "")
    return usage_of(asked) if asked else usage()


def no_verb(word: str) -> ConfigError:
    """Return the error to raise for a first word that is not a verb, with a guess of what was meant."""
    groups = choices_of_groups()
    near = nearest_of(word, list(VERBS))
    is_choice = any(word in choices for choices in groups.values())
    hint = f"Did you mean {near}?" if near and not is_choice else bare_hint("train", word, groups)
    return ConfigError(f"{word}: no such verb. There are: {', '.join(VERBS)}. {hint}")


def train_verb(arguments: list[str]) -> int:
    """Train one stage, or with `-m` one run after the other."""
    if "-m" in arguments:
        return try_all([argument for argument in arguments if argument != "-m"])
    config = load_config(arguments)
    require_all(config)
    from vlm_tune.training.resume import find_resume, initial_checkpoint

    if find_resume(config) is None:
        initial_checkpoint(config)
    from vlm_tune.training.run import train  # late, as in all verbs: torch takes seconds to import

    console = make_console()
    console.print(describe_sources(arguments, config), end="", soft_wrap=True)
    train(config, console)
    return 0


def try_all(arguments: list[str]) -> int:
    """Train once for each combination of the values that keys list, one after the other, and compare the runs."""
    lines = expand_sweep(arguments)
    for line in lines:  # a mistake in the last one is said now, not in hours
        require_all(load_config(line))
    from vlm_tune.training.sweep import sweep

    return sweep(lines, Path(load_config(lines[0]).runs), make_console())


def require_all(config: Config) -> None:
    """Check everything that a run needs before anything expensive is loaded."""
    from vlm_tune.model.ready import require_model, require_packages, require_rows

    require_packages(config)
    require_model(config)
    require_rows(config)


def chat_verb(arguments: list[str]) -> int:
    """Talk to a trained model in the terminal."""
    own, overrides = split_own("chat", arguments)
    if own["base"] not in ("true", "false"):
        raise ConfigError(f"base={own['base']}: give true or false")
    temperature, top_p = number_of("temperature", own, 2), number_of("top_p", own, 1)
    seed = number_of("seed", own, 2**63 - 1) if own["seed"] else None
    from vlm_tune.model.ready import require_picture, require_run

    config = require_run(own["ckpt"], overrides)
    images = tuple(filter(None, own["image"].split(",")))
    for image in images:
        require_picture(image, config)
    from vlm_tune.serve.tools import parse_tools

    tools = parse_tools(own["tools"])
    from vlm_tune.model.generate import Sampling
    from vlm_tune.serve.chat import Chat, Wishes, chat
    from vlm_tune.serve.react import Agent

    begin = partial(Agent, tools, make_console(stderr=True).print) if tools else Chat
    sampling = Sampling(temperature, top_p, None if seed is None else int(seed))
    chat(own["ckpt"], Wishes(images, sampling, own["base"] == "true"), overrides, make_console(), begin)
    return 0


def web_verb(arguments: list[str]) -> int:
    """Serve a page to talk to one or two models."""
    own, overrides = split_own("web", arguments)
    port = port_of(own)
    user, _, password = own["auth"].partition(":")
    if own["auth"] and not (user and password):
        raise ConfigError("auth: give a name and a password: auth=USER:PASSWORD")
    from vlm_tune.model.ready import require_extra, require_run

    require_extra("gradio")
    for ckpt in (own["ckpt"], own["ckpt2"]):
        if ckpt not in ("", "base"):
            require_run(ckpt, overrides)
    from vlm_tune.serve.web import web

    web((own["ckpt"], own["ckpt2"]), port, (user, password) if own["auth"] else None, overrides, make_console())
    return 0


def server_verb(arguments: list[str]) -> int:
    """Answer OpenAI's chat requests."""
    own, overrides = split_own("server", arguments)
    port = port_of(own)
    from vlm_tune.model.ready import require_extra, require_run

    require_extra("uvicorn")
    require_extra("starlette")
    require_run(own["ckpt"], overrides)
    from vlm_tune.serve.server import serve

    serve(own["ckpt"], port, own["token"], overrides, make_console())
    return 0


def evaluate_verb(arguments: list[str]) -> int:
    """Score models on a test file."""
    own, overrides = split_own("evaluate", arguments)
    from vlm_tune.evaluation.wanted import Wanted

    wanted = Wanted.read(own, overrides)
    from vlm_tune.evaluation.verb import evaluate
    from vlm_tune.pages.worst import write_worst

    console = make_console()
    examined = evaluate(wanted, console)
    if wanted.page:
        write_worst(examined, Path(wanted.page))
        console.print(f"page: {wanted.page}", soft_wrap=True)
    return 0


def answer_verb(arguments: list[str]) -> int:
    """Answer a file of questions, or one question about each picture of a folder; 1 where some could not be."""
    own, overrides = split_own("answer", arguments)
    from vlm_tune.evaluation.wanted import Asked

    asked = Asked.read(own, overrides)
    from vlm_tune.evaluation.answers import answer_all

    return answer_all(asked, make_console())


def export_verb(arguments: list[str]) -> int:
    """Write a trained model as a standalone folder."""
    own, overrides = split_own("export", arguments)
    from vlm_tune.export.wanted import Wanted, empty_folder
    from vlm_tune.model.ready import require_questions, require_run

    wanted = Wanted(own["layout"], own["dtype"], own["base"], own["max_shard_size"])
    wanted.check()
    if not own["out"]:
        raise ConfigError("out is not set. Give a folder for the exported model: out=FOLDER")
    empty_folder(own["out"])
    require_questions(require_run(own["ckpt"], overrides))
    from vlm_tune.export.export import export

    export(own["ckpt"], own["out"], wanted, overrides, make_console())
    return 0


def merge_verb(arguments: list[str]) -> int:
    """Merge an adapter trained elsewhere into its base model."""
    own, overrides = split_own("merge", arguments)
    if missing := [key for key, value in own.items() if not value]:
        raise ConfigError(f"{missing[0]} is not set. Give three folders: base=FOLDER adapter=FOLDER out=FOLDER")
    if overrides:
        raise ConfigError(
            f"{overrides[0]}: merge reads no run, so it has no keys of one: base, adapter and out are all"
        )
    from vlm_tune.export.wanted import empty_folder

    empty_folder(own["out"])
    from vlm_tune.export.merge_folders import merge

    merge(own["base"], own["adapter"], own["out"], make_console())
    return 0


def check_verb(arguments: list[str]) -> int:
    """Find every faulty row of a data file; return 1 when there are any."""
    own, overrides = take_own("check", arguments)
    config = load_config(overrides)
    require_all(config)
    from vlm_tune.inspection.check import check
    from vlm_tune.model.encoder import build_encoder, joined

    config = joined(config)
    return check(config, build_encoder(config), own["out"], own["repeated_ids"], make_console())


def cache_verb(arguments: list[str]) -> int:
    """Encode the pictures of a run in advance."""
    config = load_config(arguments)
    require_all(config)
    from vlm_tune.training.run import fill_ahead

    fill_ahead(config, make_console())
    return 0


def inspect_verb(arguments: list[str]) -> int:
    """Show what the model sees of one row."""
    own, overrides = take_own("inspect", [each for each in arguments if each != "--text"])
    if not own["row"].isdecimal() and ":" not in own["row"]:
        raise ConfigError(
            f"row={own['row']}: give the number of a row, counted from 0, or its place as in train.jsonl:17"
        )
    config = load_config(overrides)
    require_all(config)
    from vlm_tune.inspection.inspect import inspect
    from vlm_tune.model.encoder import build_encoder, joined

    config = joined(config)
    inspect(config, build_encoder(config), own["row"], own["out"], "--text" in arguments, make_console())
    return 0


def plan_verb(arguments: list[str]) -> int:
    """Say what a run needs of a device; 1 where it does not fit."""
    own, overrides = take_own("plan", arguments)
    if own["fit"] not in ("true", "false"):
        raise ConfigError(f"fit={own['fit']}: give true or false")
    if own["gpus"]:
        overrides.append(f"trainer.devices={own['gpus']}")
    require_all(load_config(overrides))
    from vlm_tune.planning.verb import plan

    return plan(own, overrides, make_console())


def configs_verb(arguments: list[str]) -> int:
    """List what each configuration group offers, show a choice, or copy it."""
    action, *names = arguments or ["list"]
    if "=" in action and not names:
        raise ConfigError(f"{action}: configs has no keys. Its forms: configs list, show NAME, copy NAME [NEW]")
    if (action, len(names)) not in (("list", 0), ("show", 1), ("copy", 1), ("copy", 2)):
        raise ConfigError(f"{' '.join(arguments)}: no such form. There are: configs list, show NAME, copy NAME [NEW]")
    from vlm_tune.config import choices

    if action == "list":
        sys.stdout.write(choices.list_choices())
    elif action == "show":
        sys.stdout.write(choices.show(*names))
    else:
        sys.stdout.write(choices.copy(names[0], names[1] if names[1:] else ""))
    return 0


def watch_verb(arguments: list[str]) -> int:
    """Serve a live page of runs."""
    own, names = words_and_keys("watch", arguments)
    port = port_of(own)
    from vlm_tune.pages.recorded import open_run
    from vlm_tune.serve.watch import watch

    watch([open_run(name) for name in names], Path(own["runs"]), port, make_console())
    return 0


def compare_verb(arguments: list[str]) -> int:
    """Show runs side by side."""
    own, names = words_and_keys("compare", arguments)
    if len(names) < 2:
        raise ConfigError("compare: name two runs or more, as in compare runs/ONE runs/OTHER")
    from vlm_tune.model.ready import new_file
    from vlm_tune.pages.compare import compare_runs
    from vlm_tune.pages.recorded import open_run

    if own["out"]:
        new_file(own["out"])
    console = make_console()
    console.print(compare_runs([open_run(name) for name in names], own["out"]))
    if own["out"]:
        console.print(f"page: {own['out']}", soft_wrap=True)
    return 0


TAKE_WORDS = ("configs", "watch", "compare")
VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train_verb,
    "chat": chat_verb,
    "web": web_verb,
    "server": server_verb,
    "evaluate": evaluate_verb,
    "answer": answer_verb,
    "export": export_verb,
    "merge": merge_verb,
    "check": check_verb,
    "cache": cache_verb,
    "inspect": inspect_verb,
    "plan": plan_verb,
    "watch": watch_verb,
    "compare": compare_verb,
    "configs": configs_verb,
}


def quiet_libraries() -> None:
    """Silence the banners and warnings of other libraries; our own lines and all errors remain."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # threads spin briefly while waiting for the next product: data workers need the cores (benchmarks/README.md)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks Linux for large pages: fewer gaps, fewer faults
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes alone compiles, and that loads a compiler: 50 MB
    # torch keeps what it needed for each of the last 1,024 sizes of product: 0.3 MB each, and no time saved
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_TQDM", "1")
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|peft|bitsandbytes|timm|tensorboard).*")
    talkative = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "bitsandbytes")
    for name in (*talkative, "lightning.pytorch.trainer.connectors.checkpoint_connector", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
