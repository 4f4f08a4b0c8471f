"""A `data.format` that is the user's own function: run where the command line names it, only recorded elsewhere.

A run folder may come from a stranger. Nothing in its configuration is therefore ever run: the function is stored
there by its name and its file's hash, in a form that no verb takes for a function.
"""

import hashlib
from pathlib import Path

from vlm_tune.errors import ConfigError

MARK = " sha256="  # "rows.py:read" is run, "rows.py:read sha256=..." is only remembered
UNKNOWN = "unknown"  # the hash in a configuration that does not record it


def remember(name: str) -> str:
    """Return a data.format as a run folder stores it: a function by name and hash, any other as it is."""
    if ":" not in name or MARK in name:
        return name
    path = Path(name.rpartition(":")[0])
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else UNKNOWN
    return f"{name}{MARK}{digest}"


def disarm(name: str) -> str:
    """Turn a data.format that a run folder names into one that is only remembered."""
    return f"{name}{MARK}{UNKNOWN}" if ":" in name and MARK not in name else name


def require_same(before: str, given: str) -> None:
    """Raise ConfigError where a function is given under its old name but its file has changed."""
    name, _, then = before.partition(MARK)
    now = remember(given).partition(MARK)[2]
    if name == given and now not in (then, UNKNOWN) and then != UNKNOWN:
        raise ConfigError(
            f"data.format={given}: the file is not the one that the run was trained with (sha256 {then[:12]} then, "
            f"{now[:12]} now). Put that one back, or give the changed one a name of its own"
        )


def require_given(name: str) -> None:
    """Raise ConfigError for a function that is only remembered."""
    if MARK in name:
        given, _, digest = name.partition(MARK)
        raise ConfigError(
            f"the rows of this run were read by a function, {given} (sha256 {digest[:12]}). A run folder may run no "
            f"code: look at that file and name it on this command line, data.format={given}"
        )
