"""Read the arguments of a verb: which of them are its own keys, which are names, which are keys of a run."""

from pathlib import Path

from vlm_tune.config.hints import bare_hint, flag_hint, our_name
from vlm_tune.config.parse import GROUPS, nearest_of, options, short_names
from vlm_tune.config.usage import USAGE
from vlm_tune.errors import ConfigError


def is_word(argument: str) -> bool:
    """Return whether an argument is a bare word, which may be a verb, and not a key=value or a flag."""
    return "=" not in argument and not argument.startswith(("-", "+", "~"))


def choices_of_groups() -> dict[str, list[str]]:
    """Map each configuration group to its choices."""
    return {group: options(group) for group in GROUPS}


def keys_only(verb: str, arguments: list[str]) -> list[str]:
    """Return the arguments unchanged; raise ConfigError, with the correct line, for a flag or a bare word."""
    for number, argument in enumerate(arguments):
        following = arguments[number + 1] if number + 1 < len(arguments) else ""
        if argument.startswith("-") and (verb, argument) not in (("inspect", "--text"), ("train", "-m")):
            raise ConfigError(flag_hint(verb, argument, following, short_names()))
        if is_word(argument):
            own = ", ".join(USAGE[verb].keys) or "the keys of a run"
            hint = bare_hint(verb, argument, choices_of_groups())
            raise ConfigError(f"{argument}: keys are written key=value. This verb has: {own}. {hint}")
    return arguments


def words_and_keys(verb: str, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the keys of a verb that names runs from those names; raise ConfigError for any other key or flag."""
    own, given = take_own(verb, arguments)
    for argument in given:
        if not is_word(argument) and not Path(argument).exists():
            raise ConfigError(f"{argument}: no such key. This verb has: {', '.join(own)}, and names of runs")
    return own, given


def split_own(verb: str, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separate a verb's own keys from overrides of the run's configuration."""
    own, overrides = USAGE[verb].defaults, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        elif "." in key or key == "seed":
            overrides.append(argument)
        else:
            hint = our_name(key, value)
            near = nearest_of(key, list(own))
            said = (
                f". Did you mean {near}?" if near else f". Write {hint}" if hint and "." in hint.split("=")[0] else ""
            )
            raise ConfigError(
                f"{key}: no such key. This verb has: {', '.join(own)}, and keys of the run (data.test=...){said}"
            )
    return own, overrides


def take_own(verb: str, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the keys of a verb that reads the whole configuration, as `train` does, from the overrides."""
    defaults = USAGE[verb].defaults
    own = {key: value for key, _, value in (each.partition("=") for each in arguments) if key in defaults}
    return defaults | own, [each for each in arguments if each.partition("=")[0] not in defaults]


def number_of(key: str, own: dict[str, str], most: float) -> float:
    """Return a verb's number; raise ConfigError for anything else, and for one out of its bounds."""
    try:
        value = float(own[key]) if key != "seed" else int(own[key])
    except ValueError:
        value = -1
    if not (key != "top_p" or value > 0) or not 0 <= value <= most:
        raise ConfigError(f"{key}={own[key]}: give a number from 0 to {most:g}")
    return value


def port_of(own: dict[str, str]) -> int:
    """Return the port of a verb; raise ConfigError for what is none."""
    if not own["port"].isdecimal() or int(own["port"]) > 65535:
        raise ConfigError(f"port={own['port']}: give a number from 0 to 65535; 0 takes any that is free")
    return int(own["port"])
