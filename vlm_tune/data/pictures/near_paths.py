"""Hints for a missing file: which one may be meant."""

import difflib
import json
import os
import re
import unicodedata
from functools import lru_cache
from itertools import islice


def near(root: str, path: str) -> str:
    """Return an ending for "X is not there": the file below `root` that may be meant, its path written as in JSON.

    That is a path that differs only in case, Unicode form or slashes; failing that, a similar name in the same folder,
    preferably one that differs only in its suffix.
    """
    if os.path.islink(os.path.join(root, path)):
        return f": it is a link to {os.readlink(os.path.join(root, path))}, which is not there."
    twin = _twin(root, path)
    if twin is not None:
        real, differences = twin
        return f"; did you mean {json.dumps(real)}? It differs only {' and '.join(differences)}: write it so."
    folder, name = os.path.split(os.path.join(root, path))
    names = {other.lower(): other for other in _list_folder(folder)}
    same_stem = [other for other in names if os.path.splitext(other)[0] == os.path.splitext(name.lower())[0]]
    # Comparing names is slow, so not every name of a large folder is compared.
    close = difflib.get_close_matches(
        name.lower(), same_stem or list(names)[:500], n=1, cutoff=0.0 if same_stem else 0.8
    )
    if close:
        return f'; did you mean "{names[close[0]]}" of the same folder?'
    return "." if names else f", and {folder} is no folder with files."


def _twin(root: str, path: str) -> tuple[str, list[str]] | None:
    """Find a file whose path is the same but for its spelling; return that path and how the two differ."""
    real = root
    differences: dict[str, None] = {}
    if "\\" in path and not os.path.lexists(os.path.join(root, path)):
        differences["by / in place of \\"] = None
        path = path.replace("\\", "/")
    for part in re.split("/+", os.path.relpath(os.path.join(root, path), root)):
        if not os.path.lexists(os.path.join(real, part)):
            names = _list_folder(real)
            same = [name for name in names if _one_form(name) == _one_form(part)]
            if same:
                differences[f"in its Unicode form ({_form(part)} in the row, {_form(same[0])} on disk)"] = None
            else:
                same = [name for name in names if _one_form(name).casefold() == _one_form(part).casefold()]
                differences["in the case of letters"] = None
            if not same:
                return None
            part = same[0]
        real = os.path.join(real, part)
    return os.path.relpath(real, root), list(differences)


def _one_form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _form(name: str) -> str:
    forms = [form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, name)]
    return forms[0] if forms else "neither NFC nor NFD"


@lru_cache(maxsize=64)
def _list_folder(folder: str) -> tuple[str, ...]:
    """Return up to 10,000 names in a folder; cached, since the next missing picture is probably in the same one."""
    try:
        with os.scandir(folder) as entries:
            return tuple(entry.name for entry in islice(entries, 10_000))
    except OSError:
        return ()
