"""Execute shape comments: run code under a trace and compare every `name = ...  # (B, L, D)` with the real tensor."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any, Self

COMMENT = re.compile(r"#\s*\(([^()]*)\)\s*$")
SIZE = re.compile(r"_|\w+(\s*\*\s*\w+)*")  # one letter, name or number, or a product of them: no other arithmetic


@dataclass(frozen=True)
class Statement:
    """One assignment that ends in a shape comment."""

    first: int
    last: int
    names: tuple[str, ...]  # of (a, b = ...) each has the shape
    sizes: tuple[str, ...]


def read_statements(path: Path) -> list[Statement]:
    """Find the assignments of a file whose last line ends in a shape."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) or node.value is None:
            continue
        match = COMMENT.search(lines[node.end_lineno - 1])
        names = tuple(assigned(node))
        if match and names and (sizes := parse_sizes(match[1])):
            found.append(Statement(node.lineno, node.end_lineno, names, sizes))
    return found


def assigned(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> Iterator[str]:
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        for each in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(each, ast.Name):
                yield each.id


def parse_sizes(text: str) -> tuple[str, ...]:
    """Split 'T, S, r*r*C'; empty for a comment that is words."""
    sizes = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(sizes) if all(SIZE.fullmatch(size) for size in sizes) else ()


@dataclass
class Names:
    """What the letters stand for in one call: the legend's, then the call's own variables, then what a line binds."""

    legend: dict[str, int]
    bound: dict[str, tuple[int, int]] = field(default_factory=dict)  # letter -> (size, line that bound it)

    def forget(self, line: int) -> None:
        """Let a line that runs again, in a loop, bind its letters anew."""
        self.bound = {name: entry for name, entry in self.bound.items() if entry[1] != line}

    def look_up(self, factor: str, frame: FrameType) -> int | None:
        """Return the size of one factor, None where nothing has said it yet."""
        if factor.isdecimal():
            return int(factor)
        if factor in self.legend:
            return self.legend[factor]
        value = frame.f_locals.get(factor)
        if isinstance(value, int):
            return value
        return self.bound[factor][0] if factor in self.bound else None

    def expect(self, size: str, real: int, line: int, frame: FrameType) -> int | None:
        """Return what a size must be; a single unknown factor is bound by the tensor at hand."""
        if size == "_":
            return real
        factors = [factor.strip() for factor in size.split("*")]
        found = [self.look_up(factor, frame) for factor in factors]
        unknown = [factor for factor, value in zip(factors, found, strict=True) if value is None]
        if not unknown:
            return prod(value for value in found if value is not None)
        if len(factors) == 1:
            self.bound[factors[0]] = (real, line)
            return real
        return None


class ShapeComments:
    """Check the shape comments of some files while the block runs; `errors` and `unreached` say what was found."""

    def __init__(self, paths: list[Path], legend: dict[str, int] | None = None) -> None:
        self.table = {str(path.resolve()): read_statements(path) for path in paths}
        self.legend = legend or {}
        self.checked: set[tuple[str, int]] = set()
        self.errors: list[str] = []

    def __enter__(self) -> Self:
        self.outer = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.outer)

    @property
    def unreached(self) -> list[str]:
        """Name the comments that no call came by."""
        every = {(path, statement.first) for path, found in self.table.items() for statement in found}
        return sorted(f"{Path(path).name}:{line}" for path, line in every - self.checked)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        statements = self.table.get(frame.f_code.co_filename)
        if not statements or (frame.f_code.co_name.startswith("<") and frame.f_code.co_name != "<module>"):
            return None  # another file, or a comprehension, whose variables are its own
        names, pending = Names(self.legend), [None]

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            statement = pending[0]
            if statement and not (event == "line" and statement.first <= frame.f_lineno <= statement.last):
                pending[0] = None
                if event != "exception":  # what raised has assigned nothing
                    self._check(frame, names, statement)
            if event == "line":
                here = (each for each in statements if each.first <= frame.f_lineno <= each.last)
                pending[0] = next(here, None)
            return local

        return local

    def _check(self, frame: FrameType, names: Names, statement: Statement) -> None:
        path = frame.f_code.co_filename
        self.checked.add((path, statement.first))
        names.forget(statement.first)
        for name in statement.names:
            where = f"{Path(path).name}:{statement.first} {name}"
            shape = getattr(frame.f_locals.get(name), "shape", None)
            if shape is None:
                self.errors.append(f"{where} has no shape")
            elif len(shape) != len(statement.sizes):
                self.errors.append(
                    f"{where}: the comment has {len(statement.sizes)} sizes, the shape is {tuple(shape)}"
                )
            else:
                for size, real in zip(statement.sizes, shape, strict=True):
                    wanted = names.expect(size, real, statement.first, frame)
                    if wanted is not None and wanted != real:
                        self.errors.append(f"{where}: {size} is {wanted}, the shape is {tuple(shape)}")
