"""The verb `configs`: list the choices of each group, show one as it is written, copy one to be changed."""

import re
from pathlib import Path

from vlm_tune.config.parse import GROUPS, find_choice, nearest_of, options, own_folder
from vlm_tune.errors import ConfigError

NAMED = ("model", "stage")  # whose name is the user's to choose; that of a strategy or of data says what it is


def list_choices() -> str:
    """Name what each group offers, the user's own among them."""
    return "".join(f"{group:11} {', '.join(options(group))}\n" for group in GROUPS)


def show(name: str) -> str:
    """Return a choice's YAML with its comments, below its path."""
    path = find_choice(*which(name))
    return f"# {path}\n{path.read_text(encoding='utf-8')}"


def copy(name: str, new: str) -> str:
    """Copy a choice to conf/GROUP/NEW.yaml of the current folder; return what was written, and how it is used.

    Raises ConfigError for a name that is taken: nothing is overwritten, and no choice hides another.
    """
    group, old = which(name)
    new = new or f"my_{old}"
    if not re.fullmatch(r"[A-Za-z_][\w-]*", new):
        raise ConfigError(f"{new}: not a name. Take letters, digits and _: configs copy {group}/{old} my_{old}")
    if new in options(group):
        raise ConfigError(f"{group}/{new}: there is one already, and nothing is overwritten. Take another name")
    path = own_folder() / group / f"{new}.yaml"
    text = find_choice(group, old).read_text(encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    if group in NAMED:
        named = re.sub(rf"^(\s*name: ){re.escape(old)}$", rf"\g<1>{new}", text, flags=re.MULTILINE)
    else:
        named = text
    path.write_text(named, encoding="utf-8")
    missing = "".join(f" {group}.{key}=FILE" for key in re.findall(r"^(\w+): \?\?\?", text, re.MULTILINE))
    said = f"written: {path}\nuse it:  python -m vlm_tune {group}={new}{missing}\n"
    tuned = [path.stem for path in sorted(find_choice("tuned", "").parent.glob("*.yaml")) if belongs(path, group, old)]
    return said + (f"note: {', '.join(tuned)} in conf/tuned/ are for {old} alone\n" if tuned else "")


def belongs(tuned: Path, group: str, name: str) -> bool:
    """Tell whether a file of tuned settings, MODEL_STAGE.yaml, is for this model or stage."""
    parts = [f"{model}_{stage}" for model in options("model") for stage in options("stage") if name in (model, stage)]
    return group in NAMED and tuned.stem in parts


def which(name: str) -> tuple[str, str]:
    """Find the group and the choice of `GROUP/NAME`, of `GROUP=NAME`, or of a NAME that only one group has."""
    group, sign, choice = re.sub("=", "/", name.removesuffix(".yaml"), count=1).partition("/")
    found = [(each, group) for each in GROUPS if group in options(each)] if not sign else []
    if sign and group in GROUPS and choice in options(group):
        found = [(group, choice)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{name}: several groups have one: {', '.join('/'.join(each) for each in found)}. Name one")
    known = [f"{each}/{option}" for each in GROUPS for option in options(each)]
    near = nearest_of(name, known if sign else [each.partition("/")[2] for each in known])
    hint = f"Did you mean {near}?" if near else "`python -m vlm_tune configs` lists them"
    raise ConfigError(f"{name}: no such choice. {hint}")
