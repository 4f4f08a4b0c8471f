"""Words for a file that is not there: which one may be meant."""

import difflib
import json
import os
import re
import unicodedata
from functools import lru_cache
from itertools import islice


def near(root: str, path: str) -> str:
    """End the sentence "X is not there" with the file below `root` that may be meant, as JSON writes its path.

    A path that differs in the case of letters, the Unicode form or the strokes between folders is told to; else a name
    of the same folder with another suffix or spelling is.
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
    # Comparing letter by letter is slow, hence not with every name of a large folder.
    close = difflib.get_close_matches(
        name.lower(), same_stem or list(names)[:500], n=1, cutoff=0.0 if same_stem else 0.8
    )
    if close:
        return f'; did you mean "{names[close[0]]}" of the same folder?'
    return "." if names else f", and {folder} is no folder with files."


def _twin(root: str, path: str) -> tuple[str, list[str]] | None:
    """Find the file whose path says the same in another way; return its path and in what the two differ."""
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
    """Return up to 10,000 names of a folder, kept because the next missing picture is likely to be sought there."""
    try:
        with os.scandir(folder) as entries:
            return tuple(entry.name for entry in islice(entries, 10_000))
    except OSError:
        return ()
