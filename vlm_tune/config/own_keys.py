"""Read the keys that a verb has beside those of a run."""

from vlm_tune.config.hints import our_name
from vlm_tune.config.parse import nearest_of
from vlm_tune.config.usage import USAGE
from vlm_tune.errors import ConfigError


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
