"""The shape of the code is a tested promise: layers point down, no cycles, small files, and nothing that runs data."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlm_tune"
LAYERS = {  # a layer may import itself and what is lower; layers of one number do not know one another
    "errors": 0,
    "console": 0,
    "words": 0,
    "config": 1,
    "recipes": 2,
    "data": 3,
    "model": 4,
    "evaluation": 5,
    "pages": 6,
    "training": 7,
    "planning": 7,
    "export": 7,
    "serve": 7,
    "inspection": 7,
    "cli": 8,
    "__main__": 9,
}
FLOORS = {  # of data/, in the same way
    "sample": 0,
    "progress": 0,
    "rows": 1,
    "pictures": 1,
    "text": 1,
    "dialects": 2,
    "tiles": 2,
    "example": 2,
    "fit": 2,
    "encode": 2,
    "sizes": 3,
    "batch": 3,
    "packing": 3,
    "stream": 4,
    "sets": 5,
    "datamodule": 6,
}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_MODEL_YAML, MAX_FOLDER = 400, 60, 6, 20, 12
FILES = sorted(PACKAGE.rglob("*.py"))
PYTHON = sorted(path for folder in ("vlm_tune", "data_recipes", "tests") for path in (ROOT / folder).rglob("*.py"))
YAMLS = sorted((ROOT / "conf").rglob("*.yaml"))
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "print", "breakpoint"}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "importlib.machinery"}
VOICE = "console.py"  # where a console of rich is made
DOOR = "model/layouts/pretrained.py"  # where transformers reads folders
HYDRA_READERS = {"config/parse.py", "cli.py"}  # everything else sees plain dataclasses


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MODULES = {module_name(path) for path in FILES}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Name everything that is imported, at any depth: a lazy import is an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


GRAPH = {
    module_name(path): {name for name in imported_names(tree) if name in MODULES and name != PACKAGE.name}
    for path, tree in TREES.items()
}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def called(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


by_path = pytest.mark.parametrize("path", FILES, ids=short)


def test_there_are_no_import_cycles():
    TopologicalSorter({name: found - {name} for name, found in GRAPH.items()}).prepare()  # CycleError names the cycle


@pytest.mark.parametrize("name", sorted(MODULES - {PACKAGE.name}))
def test_a_module_has_a_layer(name):
    assert name.split(".")[1] in LAYERS, f"{name}: give its layer a place in LAYERS"


@pytest.mark.parametrize("name", sorted(MODULES - {PACKAGE.name}))
def test_imports_point_down(name):
    own = name.split(".")[1]
    wrong = [
        found for found in sorted(GRAPH[name]) if (other := found.split(".")[1]) != own and LAYERS[other] >= LAYERS[own]
    ]
    assert not wrong, f"{name} imports {wrong}: a layer knows only lower ones ({LAYERS})"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("vlm_tune.data.")))
def test_imports_inside_data_point_down(name):
    own = name.split(".")[2]
    floors = {found: found.split(".")[2] for found in GRAPH[name] if found.startswith("vlm_tune.data.")}
    wrong = [found for found, other in floors.items() if other != own and FLOORS[other] > FLOORS[own]]
    assert not wrong, f"{name} imports {sorted(wrong)}: a floor knows only lower ones ({FLOORS})"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=short)
def test_a_folder_is_seen_at_a_glance(folder):
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MAX_FOLDER, f"{short(folder)} holds {len(files)} files: make a room of some"


@by_path
def test_hydra_stays_in_the_parser(path):
    wrong = [name for name in imported_names(TREES[path]) if name.split(".")[0] in ("hydra", "omegaconf")]
    assert not wrong or path.relative_to(PACKAGE).as_posix() in HYDRA_READERS


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").rglob("*.py")), ids=short)
def test_data_knows_no_models(path):
    heavy = ("transformers.models", "transformers.AutoModel", "timm", "peft", "torch.nn.Module")
    assert not [name for name in imported_names(TREES[path]) if name.startswith(heavy)]


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_a_file_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{short(path)} has {lines} lines: split it"


@by_path
def test_functions_are_short(path):
    long = {
        function.name: length
        for function in functions(TREES[path])
        if (length := function.end_lineno - function.lineno + 1) > MAX_FUNCTION
    }
    assert not long


@by_path
def test_functions_take_few_parameters(path):
    many = {
        function.name: names
        for function in functions(TREES[path])
        if len(names := parameters(function)) > MAX_PARAMETERS
    }
    assert not many, "pass a dataclass"


@by_path
def test_imports_are_absolute_and_name_what_they_take(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write vlm_tune..."
            assert node.names[0].name != "*", f"line {node.lineno}: a star hides where names come from"


@by_path
def test_no_text_is_run_and_nothing_is_printed_aside(path):
    wrong = [
        (call.func.id, call.lineno)
        for call in called(TREES[path])
        if isinstance(call.func, ast.Name) and call.func.id in FORBIDDEN_CALLS
    ]
    assert not wrong


@by_path
def test_a_console_is_made_in_one_place(path):
    made = [call.lineno for call in called(TREES[path]) if ast.unparse(call.func).split(".")[-1] == "Console"]
    assert not made or path.relative_to(PACKAGE).as_posix() == VOICE, f"take the one handed down ({VOICE}): line {made}"


@pytest.mark.parametrize("path", [*(PACKAGE / "data").rglob("*.py"), *(PACKAGE / "model").rglob("*.py")], ids=short)
def test_data_and_model_return_findings_and_print_nothing(path):
    speaking = [name for name in imported_names(TREES[path]) if name.startswith(("rich", "vlm_tune.console"))]
    assert not speaking, "return what was found; a verb says it"


@by_path
def test_no_library_that_unpickles(path):
    assert not FORBIDDEN_IMPORTS & set(imported_names(TREES[path]))


@by_path
def test_weights_are_loaded_as_weights_only(path):
    for call in called(TREES[path]):
        if ast.unparse(call.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert options.get("weights_only") == "True", f"line {call.lineno}"


@by_path
def test_folders_of_others_come_in_by_one_door(path):
    taken = [(node.attr, node.lineno) for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)]
    wrong = [each for each in taken if each[0] in ("from_pretrained", "from_config")]
    assert not wrong or path.relative_to(PACKAGE).as_posix() == DOOR, f"call vlm_tune/{DOOR}: {wrong}"


@by_path
def test_no_code_comes_out_of_a_checkpoint(path):
    options = [keyword for call in called(TREES[path]) for keyword in call.keywords]
    given = {ast.unparse(keyword.value) for keyword in options if keyword.arg == "trust_remote_code"}
    assert given == ({"False"} if path.relative_to(PACKAGE).as_posix() == DOOR else set())


def test_the_door_says_of_each_folder_that_its_code_is_not_run():
    tree = TREES[PACKAGE / DOOR]
    calls = [call for call in called(tree) if ast.unparse(call.func) in ("kind.from_pretrained", "kind.from_config")]
    open_calls = [call for call in calls if ast.unparse(call.args[0]) != "None"]  # None: no folder, weights in memory
    assert len(open_calls) >= 3
    for call in open_calls:
        assert "trust_remote_code" in {keyword.arg for keyword in call.keywords}, f"line {call.lineno}"


@pytest.mark.parametrize("path", YAMLS, ids=short)
def test_no_yaml_asks_for_code_of_a_checkpoint(path):
    assert "trust_remote_code" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", YAMLS, ids=short)
def test_no_yaml_names_code(path):
    assert "_target_" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "model").glob("*.yaml")), ids=short)
def test_a_model_is_a_short_yaml(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODEL_YAML


@by_path
def test_a_file_name_says_what_is_in_it(path):
    assert path.stem not in VAGUE


@by_path
def test_a_file_begins_by_saying_what_it_is(path):
    assert ast.get_docstring(TREES[path]), f"{short(path)} has no first line"


def test_the_command_line_starts_without_torch():
    # torch, lightning and transformers take seconds to import: help and a typing error must not wait for them
    code = "import sys, vlm_tune.cli; sys.exit(bool({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
