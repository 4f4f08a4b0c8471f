"""Compose the YAML groups and the command line with Hydra, check everything, and hand out plain dataclasses."""

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlm_tune.config.checks import as_query, find_problems
from vlm_tune.config.hints import choice_hint, our_name
from vlm_tune.config.own_function import disarm, remember, require_same
from vlm_tune.config.schema import Config, flatten
from vlm_tune.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
ConfigStore.instance().store("schema", Config)  # the base of conf/config.yaml: makes every setting a known key
OmegaConf.register_new_resolver("query", as_query, replace=True)  # path: recipe:NAME?${query:${data.recipe}}/FILE
GROUPS = ("stage", "model", "data", "trainer", "strategy", "logger", "experiment")


def own_folder() -> Path:
    """Return the folder of the user's own choices: conf/ of the current folder, in a checkout the project's."""
    return Path("conf").absolute()


def options(group: str) -> list[str]:
    """List the choices of one configuration group, the user's own among them."""
    return sorted({path.stem for folder in (CONF, own_folder()) for path in (folder / group).glob("*.yaml")})


def find_choice(group: str, name: str) -> Path:
    """Return the file of a choice; the project's own come first, so that no file elsewhere takes the place of one."""
    path = CONF / group / f"{name}.yaml"
    return path if path.is_file() or not (own := own_folder() / group / path.name).is_file() else own


def load_config(overrides: list[str]) -> Config:
    """Compose conf/ with the command line's `key=value` overrides into a checked configuration.

    Raises ConfigError: Hydra and OmegaConf stop at their first fault; contradictions are listed together.
    """
    try:
        refuse_values_for_groups(overrides)
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="vlm_tune"):
            raw = compose("config", [*own_search_path(), *with_own_test(overrides)])
        keys = [override.partition("=")[0] for override in overrides]
        if "data.path" in keys and not any(key.startswith("data.recipe.") for key in keys):
            raw.data.recipe = {}  # those of an experiment belong to its own rows
        return to_config(raw)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(explain(error, overrides)) from error


def expand_sweep(overrides: list[str]) -> list[list[str]]:
    """Return the command line of each run of a sweep: `a=1,2 b=3` -> [[a=1, b=3], [a=2, b=3]], all combinations.

    Values are Hydra's: lists as in a=1,2 and a=choice(1,2), and ranges as in a=range(1,4).
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(explain(error, overrides)) from error
    choices = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [str(each.input_line)]
        for each in parsed
    ]
    return [list(chosen) for chosen in product(*choices)]


def own_search_path() -> list[str]:
    """Let Hydra look into the user's own folder too, behind the project's."""
    own = own_folder()
    return [f"hydra.searchpath=['file://{own}']"] if own.is_dir() and own.resolve() != CONF.resolve() else []


def refuse_values_for_groups(overrides: list[str]) -> None:
    """Raise ConfigError for `trainer=8`: a group takes the name of a choice, and Hydra does not explain that."""
    for group, sign, value in (override.partition("=") for override in overrides):
        if sign and group in GROUPS and isinstance(yaml.safe_load(value or "null"), int | float):
            raise ConfigError(f"{group}={value}: no such {group}. There are: {', '.join(options(group))}")


def with_own_test(overrides: list[str]) -> list[str]:
    """Evaluate a file that replaces a data group's rows on its own test file, not on that group's."""
    given = {override.partition("=")[0] for override in overrides}
    return [*overrides, "data.test=auto"] if "data.path" in given and "data.test" not in given else overrides


def to_config(raw: DictConfig | dict[str, Any]) -> Config:
    """Check raw values against the schema: unknown keys, wrong types and contradictions are errors."""
    try:
        # through a plain dict, since a key that was forced in with "+key=" survives a merge of typed nodes
        plain = OmegaConf.to_container(raw, resolve=True, enum_to_str=True) if isinstance(raw, DictConfig) else raw
        config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    if problems := find_problems(config):
        raise ConfigError.from_problems(problems)
    return config


def read_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read the resolved configuration of a run and apply `key=value` overrides to it."""
    try:
        raw = load_plain(path)
        if overrides:
            raw = OmegaConf.merge(raw, OmegaConf.from_dotlist(overrides))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file. Name a run folder, for example ckpt=runs/latest") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    try:
        config = to_config(raw)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(str(error) if overrides else f"{path}: {error}") from error
    written = OmegaConf.select(OmegaConf.from_dotlist(overrides or []), "data.format")
    if written is None:
        return replace(config, data=replace(config.data, format=disarm(config.data.format)))
    require_same(remembered_format(path), config.data.format)
    return config


LISTS = 2000  # in the settings of a run; a parser's time grows with the square of their depth


def load_plain(path: Path) -> Any:
    """Read a run's settings, which may come from a stranger; YAML aliases, which can expand endlessly, are refused."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > LISTS:
            raise ConfigError(f"{path}: more than {LISTS} lists: no settings of a run. Take another run folder")
        anchors = [event for event in yaml.parse(text) if getattr(event, "anchor", None)]
        if anchors:
            raise ConfigError(f"{path}: YAML anchors and aliases are no settings of a run. Write each value out")
        return OmegaConf.load(path)
    except (RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no settings of a run ({type(error).__name__}). Take another run folder") from error


def remembered_format(path: Path) -> str:
    """Return the data.format that a run recorded."""
    try:
        return disarm(str(OmegaConf.select(load_plain(path), "data.format")))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {explain(error)}") from error


def write_config(config: Config, path: Path) -> None:
    """Write every resolved value, so that a run can be read and repeated from its folder alone."""
    kept = replace(config, data=replace(config.data, format=remember(config.data.format)))
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(kept)), encoding="utf-8")


def describe_sources(overrides: list[str], config: Config) -> str:
    """Describe where a run's settings come from: the command line, its model's and stage's own file, others."""
    names = f"{config.model.name}_{config.stage.name}"
    path, lines = CONF / "tuned" / f"{names}.yaml", []
    if overrides:
        lines.append(f"settings of the command line: {' '.join(overrides)}")
    if path.is_file() and not any(override.startswith("~tuned") for override in overrides):
        now = flatten(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))  # type: ignore[arg-type]
        tuned = flatten(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
        kept = [f"{key}={value}" for key, value in tuned.items() if now.get(key) == value]
        lines.append(f"settings of conf/tuned/{names}.yaml (~tuned leaves them out): {' '.join(kept)}")
    given = next((each.partition("=")[2] for each in overrides if each.startswith("experiment=")), "")
    chosen = {"experiment": given, "stage": config.stage.name, "model": config.model.name}
    files = "".join(f"conf/{group}/{name}.yaml, " for group, name in chosen.items() if name in options(group))
    lines.append(f"all others: {files}and defaults")
    return "\n".join(lines) + "\n"


def explain(error: Exception, given: Sequence[str] = ()) -> str:
    """Reword a Hydra or OmegaConf error about the `given` arguments in this project's form: what, where, what to do."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value. Quote a value with special characters: key='\"a, b\"'"
    text = str(error).strip()
    cause = str(error.__cause__).strip() if error.__cause__ is not None else ""
    full = f"{text}\n{cause}"
    if match := re.search(r"Key '([^']+)' (?:is not in struct|not in '(\w+)')", full):
        key = re.search(r"full_key: (\S+)", full)
        name = key[1] if key else match[1]
        value = next((each.partition("=")[2] for each in given if each.lstrip("+~").startswith(f"{name}=")), "")
        return f"{name}: no such key.{nearest(name, value)}"
    if match := re.search(r"Could not find '(\w+)/([^']+)'", full):
        known = ", ".join(options(match[1]))
        hint = choice_hint(match[1], match[2])
        return f"{match[1]}={match[2]}: no such {match[1]}. There are: {known}" + (f". Here, {hint}" if hint else "")
    if key := re.search(r"full_key: (\S+)", full):
        if "missing mandatory value" in full:
            return f"{key[1]} is not set. Give it on the command line: {key[1]}=VALUE"
        if below := keys_below(key[1]):
            return f"{key[1]} holds keys of its own. Set one of them: {', '.join(f'{each}=VALUE' for each in below)}"
        reason = next(
            (line for line in full.splitlines() if line.startswith(("Value", "Invalid"))), text.splitlines()[0]
        )
        return f"{key[1]}: {reason.rstrip('.')}. Give a value of the right kind (docs/configuration.md lists all keys)"
    lines = [line for line in full.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return f"{' '.join(lines[:2])}. Keys are written key=value (docs/configuration.md lists all)"


def nearest(key: str, value: str) -> str:
    """Return the correct line for another trainer's key, else the known key that looks most like `key`."""
    if key.startswith("data.recipe."):
        return " Each recipe has its own: `configs show experiment/NAME` lists those of an experiment"
    if line := our_name(key, value):
        return f" Write {line}"
    close = nearest_of(key, known_keys())
    return f" Did you mean {close}?" if close else " docs/configuration.md lists all keys"


def nearest_of(word: str, known: list[str]) -> str:
    """Return the known word that looks most like `word`; "" where none does."""
    return next(iter(get_close_matches(word, known, n=1, cutoff=0.5)), "")


def known_keys() -> list[str]:
    """List every key of a run, dotted."""
    return list(flatten(OmegaConf.to_container(OmegaConf.structured(Config))))  # type: ignore[arg-type]


def short_names() -> dict[str, str]:
    """Map each name that may be written as a flag to its key: groups, keys of the root, and whole keys."""
    return {key: key for key in (*GROUPS, *known_keys())}


def keys_below(key: str) -> list[str]:
    """List the keys that a part of the configuration holds; none for a key that holds a value."""
    return [known for known in known_keys() if known.startswith(f"{key}.")]
