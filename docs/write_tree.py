"""Write the tree of README.md: each file with the first line of its docstring, or its first comment."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- TREE -->\n```text\n", "```\n<!-- /TREE -->"
COLUMN = 36  # where the purposes begin
FOLDERS = ("vlm_tune", "conf", "data_recipes", "notebooks", "tests", "benchmarks", "docs")
FILES = ("Makefile", ".ci/run", "pyproject.toml", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md")
IN_ONE_LINE = ("conf/", "data_recipes/", "tests/", "benchmarks/")  # their folders hold files that are alike

# What cannot say by itself what it is for.
PURPOSES = {
    "benchmarks": "Speed, memory and accuracy, measured; the figures are in its README.",
    "benchmarks/README.md": "What was measured, how, and on which machine.",
    "benchmarks/figures": "The plots of its README.",
    "benchmarks/peers_dpo": "Run scripts of the other trainers that pairs_speed.py compares with.",
    "benchmarks/results": "The figures as JSON.",
    "CHANGELOG.md": "What changed, by version.",
    "conf": "Hydra's groups; they ship inside the wheel.",
    "conf/data": "Rows to train on.",
    "conf/experiment": "A stage, a model and more under one name.",
    "conf/logger": "Where metrics go beside metrics.csv.",
    "conf/model": "Weights, chat template, tiles, LoRA targets: one YAML a model.",
    "conf/stage": "What is trained, at which learning rate: one YAML a stage.",
    "conf/strategy": "How several devices share the work.",
    "conf/trainer": "Batch sizes and intervals.",
    "conf/tuned": "Settings of one model in one stage, where they differ from the stage's own.",
    "constraints.txt": "The exact versions that were tested.",
    "CONTRIBUTING.md": "Set-up, rules of code and messages, the proof rule.",
    "data_recipes": "Data and weights from the package registries; each folder has a README.md and a prepare.py.",
    "docs": "Pages to read.",
    "docs/architecture.md": "Layers, the six files, decisions and why.",
    "docs/configuration.md": "Every key, its default and meaning (written by make docs).",
    "docs/data_format.md": "Files, dialects, and every fault of a row.",
    "docs/faq.md": "Error texts, their causes and remedies.",
    "docs/lmms_eval": "A task of lmms-eval over a file of your own.",
    "docs/recipes.md": "The data recipes, and how to write one.",
    "docs/scaling.md": "Devices and strategies; what was not measured.",
    "notebooks": "Each runs in a minute on a CPU, with the demo's data and model.",
    "pyproject.toml": "The package, its dependencies, and the settings of the checks.",
    "tests": "The folders mirror the package.",
    "tests/golden": "Recordings of the reference implementations, which the golden tests compare with.",
    "vlm_tune/pages/check.html": "The page of `check`.",
    "vlm_tune/pages/inspect.html": "The page of `inspect`.",
    "vlm_tune/pages/macros.html": "What pages have in common: tiles, sections, tables, bars.",
    "vlm_tune/pages/page.css": "The look of every page, light, dark, narrow and printed.",
    "vlm_tune/pages/page.html": "The frame of every page.",
    "vlm_tune/pages/report.html": "The page of a run.",
    "vlm_tune/pages/watch.css": "The look of the live page and of a comparison.",
    "vlm_tune/pages/watch.html": "The live page, and the page of a comparison.",
    "vlm_tune/pages/watch.js": "Draw the curves and answers of runs, and ask for new ones.",
    "vlm_tune/pages/report_chart.css": "The colours of the loss curve.",
    "vlm_tune/pages/report_chart.svg": "The loss curve, placed by its axes.",
    "vlm_tune/pages/worst.html": "The page of the worst answers of an evaluation.",
    "vlm_tune/py.typed": "Tells type checkers that the package has types.",
}


def tree() -> str:
    """Draw the whole tree."""
    lines = [line for name in FOLDERS for line in folder_lines(ROOT / name, 0)]
    lines += [entry(name, purpose(ROOT / name), 0) for name in FILES]
    return "\n".join(lines) + "\n"


def folder_lines(folder: Path, depth: int) -> list[str]:
    """Draw a folder: itself, its files, then its folders."""
    lines = [entry(f"{folder.name}/", purpose(folder), depth)]
    if short(folder).startswith(IN_ONE_LINE):
        return lines
    paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__"))]
    lines += [entry(path.name, purpose(path), depth + 1) for path in paths if path.is_file()]
    for path in paths:
        if path.is_dir() and any(file.is_file() and "__pycache__" not in file.parts for file in path.rglob("*")):
            lines += folder_lines(path, depth + 1)
    return lines


def entry(name: str, text: str, depth: int) -> str:
    """Write a name and its purpose in columns."""
    return f"{'  ' * depth}{name}".ljust(COLUMN - 1) + f" {text}".rstrip()


def short(path: Path) -> str:
    """Name a path as seen from the repository's root."""
    return path.relative_to(ROOT).as_posix()


def purpose(path: Path) -> str:
    """Say what a file or folder is for, in its own words."""
    name = short(path)
    if name in PURPOSES:
        return PURPOSES[name]
    if name.startswith("tests/") and path.is_dir():
        tested = name.removeprefix("tests/")
        return f"Tests of {tested if (ROOT / tested).is_dir() else f'vlm_tune/{tested}'}."
    if path.is_dir():
        return purpose(path / ("prepare.py" if name.startswith("data_recipes/") else "__init__.py"))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    if path.suffix == ".ipynb":
        return re.sub(r"\W+$", "", text.partition('"# ')[2].partition("\\n")[0]) + "."
    comment = re.search(r"^# *(\w.+)$", text, re.MULTILINE)
    return comment[1] if comment else ""


def with_tree(readme: str) -> str:
    """Put the tree between its marks."""
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    assert end, "README.md has lost its marks <!-- TREE --> and <!-- /TREE -->"
    return f"{before}{START}{tree()}{END}{after}"


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(with_tree(page.read_text(encoding="utf-8")), encoding="utf-8")
