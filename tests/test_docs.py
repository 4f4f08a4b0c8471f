"""What the documentation says is true of the code: commands, keys, files, error texts, links, and the notebooks."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from vlm_tune import __version__
from vlm_tune.cli import VERBS
from vlm_tune.config import parse
from vlm_tune.config.schema import Config
from vlm_tune.data.dialects.dialects import parse_record
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.evaluation.metrics import fold

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CHINESE = ROOT / "README_zh-CN.md"
DOCS = [
    *(ROOT / name for name in ("README.md", "README_zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
    *sorted(ROOT.glob("data_recipes/*/README.md")),
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GROUPS = ("model", "data", "stage", "trainer", "strategy", "logger")
EXAMPLE = re.compile(r"\bmine\b|NAME|MODEL|STAGE|\*")  # files that the reader is told to make


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def text_of(path: Path) -> str:
    """Read a page; the tree is tested on its own and quotes docstrings, so it is left out here."""
    return re.sub(r"<!-- TREE -->.*?<!-- /TREE -->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def block_lines(text: str) -> list[str]:
    """List the lines of fenced and of indented blocks."""
    fenced = [line for block in re.findall(r"```.*?\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return fenced + [line.strip() for line in text.splitlines() if line.startswith("    ")]


def fenced(kind: str, first: str = "") -> list[str]:
    """List the README's blocks of one language, indentation of a list taken off."""
    blocks = re.findall(rf"^( *)```{kind}\n(.*?)^ *```", text_of(README), re.DOTALL | re.MULTILINE)
    found = [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in blocks]
    return [body for body in found if first in body]


def commands(path: Path) -> list[str]:
    """List the trainer's commands of a page, without the remark behind them."""
    found = [*block_lines(text_of(path)), *inline_code(text_of(path))]
    found = [re.split(r"\s{2,}|\s#", line)[0].strip() for line in found]
    return sorted({line for line in found if re.match(r"(python -m vlm_tune|vlm-tune)\b", line)})


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defined_names(path: Path) -> set[str]:
    """Name what a module defines or imports at its top, and the methods of its classes."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


# ---------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def conf_with_examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy conf/ and add the README's own files to it, as its reader would."""
    folder = tmp_path_factory.mktemp("conf") / "conf"
    shutil.copytree(parse.CONF, folder)
    for block in fenced("yaml"):
        name = re.search(r"^# conf/(\S+\.yaml)$", block, re.MULTILINE)
        assert name, f"a block of YAML in the README without its file: {block}"
        (folder / name[1]).write_text(block, encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", DOCS, ids=short)
def test_commands_are_understood(path: Path, conf_with_examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "CONF", conf_with_examples)
    for command in commands(path):
        _, *words = shlex.split(command.replace("python -m vlm_tune", "vlm-tune"))
        if any(re.match(r"\.\.\.|\[|KEY=|key=", word) for word in words):
            continue  # the form of a command, not a command
        if "-m" in words:
            for line in parse.expand_sweep([word for word in words if word != "-m"]):
                parse.load_config(line)
        elif words and "=" not in words[0]:
            assert words[0] in (*VERBS, "help"), f"{short(path)}: {command}: no such verb"
        else:
            parse.load_config(words)  # raises ConfigError


def test_the_readme_has_commands() -> None:
    found = "\n".join(commands(README))
    assert all(f"stage={stage}" in found for stage in ("pretrain", "finetune"))
    assert all(f"vlm_tune {verb}" in found for verb in ("chat", "evaluate", "export", "configs"))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for path in DOCS:
        for line in [*block_lines(text_of(path)), *inline_code(text_of(path))]:
            if match := re.match(r"make((?: [a-z-]+)+)(?:\s*#.*)?$", line):
                missing = set(match[1].split()) - targets
                assert not missing, f"{short(path)}: make {missing}"


@pytest.mark.parametrize("path", DOCS, ids=short)
def test_keys_exist(path: Path) -> None:
    keys = set(parse.flatten(yaml.safe_load(parse.OmegaConf.to_yaml(parse.OmegaConf.structured(Config)))))
    groups = {".".join(key.split(".")[:depth]) for key in keys for depth in (1, 2)}
    for code in inline_code(text_of(path)):
        match = re.match(rf"((?:{'|'.join(GROUPS)})(?:\.[a-z_]+)+)(?=$|[= ])", code)
        if match and not match[1].endswith((".py", ".yaml", ".safetensors", ".gguf")):
            assert match[1] in keys | groups, f"{short(path)}: `{code}`: no such key"


def test_verbs_that_messages_name_exist() -> None:
    for where, text in message_texts():
        for verb in re.findall(r"python -m vlm_tune ([a-z]+)\b(?!=)", text):
            assert verb in VERBS, f"{where}: a message names the verb {verb}, which is not there"


# ------------------------------------------------------------------------------------------------------------- files


def test_tree_is_current() -> None:
    script, written = module_at(ROOT / "docs" / "write_tree.py"), README.read_text(encoding="utf-8")
    assert script.with_tree(written) == written, "run `make docs`"
    silent = [line for line in script.tree().splitlines() if len(line.split()) < 2]
    assert not silent, "files that do not say what they are for: begin them with a docstring or a comment"


def test_configuration_is_current() -> None:
    script = module_at(ROOT / "docs" / "write_configuration.py")
    expected = script.HEAD + "\n".join(script.rows(Config())) + "\n"
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == expected, "run `make docs`"
    silent = [line for line in expected.splitlines() if line.endswith((". |", "|  |"))]  # choices alone, or nothing
    assert not silent, "keys without a meaning: write it behind the field, on its line"


def test_tables_of_speed_are_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    speed, pairs = (importlib.import_module(name) for name in ("speed", "pairs_speed"))
    steps, answers = (json.loads(module.RESULTS.read_text(encoding="utf-8")) for module in (speed, pairs))
    written = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    tables = (
        (speed.table(steps), steps),
        (speed.packed_table(steps), [where for where in steps if "w3p" in steps[where]]),
    )
    for block, processors in (*tables, (pairs.table(answers), [answers["processor"]])):
        assert block in written, "a table is not what results/ holds"
        assert processors, "a table of nothing"
        assert all(name in block for name in processors), "a table without its processor"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=short)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{short(path)}: {target}"
        assert not anchor or anchor in anchors(file), f"{short(path)}: {target}: no such heading"


@pytest.mark.parametrize("path", DOCS, ids=short)
def test_files_that_are_named_exist(path: Path) -> None:
    for code in inline_code(text_of(path)):
        if re.fullmatch(r"(vlm_tune|conf|data_recipes|docs|notebooks|tests|benchmarks)/[\w./-]*", code):
            assert EXAMPLE.search(code) or (ROOT / code).exists(), f"{short(path)}: {code}"


@pytest.mark.parametrize("path", [*DOCS, *NOTEBOOKS], ids=short)
def test_no_place_of_one_machine(path: Path) -> None:
    found = re.findall(r"/(?:work|tmp|root|home)/\S+|pypi\.org|pythonhosted|npmjs", path.read_text(encoding="utf-8"))
    assert not found


# ------------------------------------------------------------------------------------------------------------ README


def test_the_way_of_one_sample() -> None:
    rows = re.findall(r"^\| (\d) \| `([^`]+)` \| (.+?) \|", text_of(README), re.MULTILINE)
    assert [number for number, *_ in rows] == list("123456")
    for number, file, functions in rows:
        elsewhere = re.search(r"\(`([^`]+)`\)", functions)
        names = defined_names(ROOT / "vlm_tune" / elsewhere[1] if elsewhere else ROOT / file)
        for name in re.findall(r"`([\w.]+)`", functions.partition("(")[0]):
            assert name in names, f"{file}: {name}"
        docstring = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
        assert docstring.startswith(f"({number})")


def test_legend_is_the_package_s() -> None:
    import vlm_tune

    letters = re.findall(r"\b([A-Z])\b(?= )", str(vlm_tune.__doc__).partition("docstring and trailing comment:")[2])
    legend = text_of(README).partition("**Shape legend**")[2].partition("\n\n")[0]
    assert set(letters) == set(re.findall(r"\*\*([A-Z])\*\*", legend))


PARTS = {
    "commands": r"(?:^    |`)((?:python -m vlm_tune|vlm-tune|make)\b[^`\n]*)",
    "blocks": r"(^ *```(?s:.*?)^ *```|^    .*$)",
    "headings": r"^(#+) ",
    "table rows": r"^\|(.*)\|$",
    "links": r"\]\(((?!README)[^)]+)\)",
}


def test_the_readme_names_every_experiment():
    table = text_of(README).partition("### Ready-made experiments")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert {path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")} == named


@pytest.mark.parametrize("part", PARTS)
def test_both_readmes_hold_the_same_in_the_same_order(part: str) -> None:
    english, chinese = (re.findall(PARTS[part], text_of(path), re.MULTILINE) for path in (README, CHINESE))
    if part == "table rows":
        english, chinese = ([re.findall(r"`[^`]+`|\d[\d.]*%?", row) for row in rows] for rows in (english, chinese))
    assert english == chinese


@pytest.mark.parametrize("what", [r"`([^`\n]+)`", r"\d+(?:\.\d+)?%?"], ids=["names", "figures"])
def test_the_prose_of_both_readmes_names_the_same(what: str) -> None:
    prose = (re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL) for path in (README, CHINESE))
    english, chinese = (sorted(re.findall(what, text)) for text in prose)
    assert english == chinese


def test_row_of_the_readme_is_read() -> None:
    (row,) = fenced("json")
    assert_one_picture(parse_record(json.loads(row), "auto", "my.jsonl:1", 0))


def test_format_of_the_readme_works(tmp_path: Path) -> None:
    (code,) = fenced("python", "# my_format.py")
    script = tmp_path / "my_format.py"
    script.write_text(code, encoding="utf-8")
    row = {"photo": "42.jpg", "question": "What is this?", "reply": "Mapo tofu."}
    assert_one_picture(parse_record(row, f"{script}:read", "mine.jsonl:1", 0))


def assert_one_picture(sample: Sample) -> None:
    question, answer = sample.messages
    assert isinstance(question.parts[0], Picture)
    assert (answer.text, answer.supervised) == ("Mapo tofu.", True)


@pytest.mark.parametrize("text", [" Grain  legumes.", "红烧肉。", "cafe\u0301", "“Stop”", "Yes .", "red?", "3.5", ""])
def test_the_task_of_lmms_eval_compares_texts_as_evaluate_does(text: str) -> None:
    assert module_at(ROOT / "docs" / "lmms_eval" / "own.py").fold(text) == fold(text)


def test_recipe_of_the_docs_compiles() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "recipes.md"), re.DOTALL)
    compile(code, "prepare.py", "exec")
    assert_imports_exist(ast.parse(code), "docs/recipes.md")


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[?(\d[\d.]*)", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == __version__


# --------------------------------------------------------------------------------------------------------- the faq


@cache
def message_texts() -> list[tuple[str, str]]:
    """List every text of the package, with … for each value that is filled in."""
    texts = []
    for path in sorted((ROOT / "vlm_tune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                pieces = [str(each.value) if isinstance(each, ast.Constant) else "…" for each in node.values]
                texts.append((short(path), "".join(pieces)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append((short(path), node.value))
    return texts


def test_faq_quotes_the_code() -> None:
    """Each text stands in the strings of one module; its sentences and what is between two values may be several."""
    modules: dict[str, str] = {}
    for where, text in message_texts():
        modules[where] = modules.get(where, "") + "\n" + text
    page = text_of(ROOT / "docs" / "faq.md").replace("\\`", "\x00")
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    quotes = [text.replace("\x00", "`") for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quotes) > 40
    invented = [
        quote
        for quote in quotes
        if not any(
            all(piece.strip() in texts for piece in re.split(r"…|(?<=[.:]) ", quote)) for texts in modules.values()
        )
    ]
    assert not invented, "no texts of the code"


# --------------------------------------------------------------------------------------------------------- notebooks


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def assert_imports_exist(tree: ast.AST, where: str) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vlm_tune"):
            stem = ROOT / str(node.module).replace(".", "/")
            file = stem.with_suffix(".py") if stem.with_suffix(".py").is_file() else stem / "__init__.py"
            for alias in node.names:
                assert not alias.name.startswith("_"), f"{where}: {alias.name} is not public"
                assert alias.name in defined_names(file), f"{where}: {node.module} has no {alias.name}"


def test_there_are_four_notebooks() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=short)
def test_notebook(path: Path) -> None:
    for number, cell in enumerate(code_cells(path), 1):
        where = f"{short(path)}, code cell {number}"
        assert cell["outputs"] == [], f"{where} has outputs: strip them"
        assert cell["execution_count"] is None, f"{where} has a number: strip it"
        tree = ast.parse("".join(cell["source"]))
        assert_imports_exist(tree, where)
        defined = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
        assert not defined, f"{where} defines a function: notebooks show the package's own"
