"""Write the tree of README.md: each file with the first line of its docstring, or its first comment or heading."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- TREE -->\n```text\n", "```\n<!-- /TREE -->"
COLUMN = 32  # where the purposes begin

# Folders of many like files have one line each, and so have files that cannot say what they are for.
PURPOSES = {
    "conf": "Hydra's groups; they ship inside the wheel",
    "conf/data": "rows to train on",
    "conf/experiment": "a stage, a model and more under one name",
    "conf/logger": "where metrics go beside metrics.csv",
    "conf/model": "weights, chat template, tiles, LoRA targets: one YAML a model",
    "conf/stage": "what is trained, at which learning rate: one YAML a stage",
    "conf/strategy": "how several devices share the work",
    "conf/trainer": "batch sizes and intervals",
    "conf/tuned": "settings of one model in one stage, where they differ from the stage's own",
    "data_recipes": "data and weights from the package registries: README.md and prepare.py each",
    "docs": "",
    "notebooks": "",
    "tests": "",
    "tests/golden": "recordings of the reference implementations, which the golden tests compare with",
    "benchmarks": "",
    "benchmarks/results": "what the benchmarks measured",
    "vlm_tune/py.typed": "Tells type checkers that the package has types.",
    "pyproject.toml": "The package, its dependencies, and the settings of the checks",
    "constraints.txt": "The exact versions that were tested",
}
LISTED = ("conf/",)  # groups: their choices stand in the line


def tree() -> str:
    """Draw the whole tree."""
    lines: list[str] = []
    for name in ("vlm_tune", "conf", "data_recipes", "notebooks", "tests", "benchmarks", "docs"):
        lines += folder_lines(ROOT / name, 0)
    for name in ("Makefile", ".ci/run", "pyproject.toml", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md"):
        lines.append(line(name, purpose(ROOT / name), 0))
    return "\n".join(lines) + "\n"


def folder_lines(folder: Path, depth: int) -> list[str]:
    """Draw a folder: itself, then its files, then its folders; as one line where its files are all alike."""
    name = folder.relative_to(ROOT).as_posix()
    lines = [line(f"{folder.name}/", purpose(folder), depth)]
    if name.startswith(LISTED):
        choices = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        return [line(f"{folder.name}/", f"{PURPOSES[name]} ({choices})" if len(choices) < 60 else PURPOSES[name], depth)]
    if name.startswith(("data_recipes/", "tests/", "benchmarks/")):
        return lines
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__"))]
    for path in entries:
        if path.is_file():
            lines.append(line(path.name, purpose(path), depth + 1))
    for path in entries:
        if path.is_dir() and any(path.rglob("*.*")):
            lines += folder_lines(path, depth + 1)
    return lines


def line(name: str, text: str, depth: int) -> str:
    """Write a name and its purpose in columns."""
    return f"{'  ' * depth}{name}".ljust(COLUMN - 1) + f" {text}".rstrip()


def purpose(path: Path) -> str:
    """Say what a file or folder is for, in its own words."""
    name = path.relative_to(ROOT).as_posix()
    if name in PURPOSES:
        return PURPOSES[name]
    if path.is_dir():
        parts = path.relative_to(ROOT).parts
        if parts[0] == "tests":
            return f"tests of {'/'.join(('vlm_tune', *parts[1:]) if parts[1] != 'data_recipes' else parts[1:])}"
        return purpose(path / ("prepare.py" if parts[0] == "data_recipes" else "__init__.py"))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    if path.suffix == ".ipynb":
        text = text.partition('"# ')[2].partition('"')[0].replace("\\n", "")
        return text
    comment = re.search(r"^(?:#(?!!)|/\*|<!--) *(.+?)(?: *(?:\*/|-->))?$", text, re.MULTILINE)
    return comment[1] if comment else ""


def with_tree(readme: str) -> str:
    """Put the tree between its marks."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    assert rest and after, "README.md has lost its marks <!-- TREE --> and <!-- /TREE -->"
    return f"{before}{START}{tree()}{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tree(path.read_text(encoding="utf-8")), encoding="utf-8")
