"""Tools that a model may call in a chat: a calculator, a clock, and a search over a folder of texts."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

from vlm_tune.errors import ConfigError
from vlm_tune.serve.calculator import calculate

MOST_FILES, MOST_BYTES = 2000, 1 << 18  # that a search reads, and of each
PASSAGE, BEST = 300, 3  # characters of a passage, and how many are found
TEXTS = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Tool:
    """What a model is told about a tool, and what is called with its one argument."""

    description: str
    parameter: str
    meaning: str
    call: Callable[[str], str]

    def told(self) -> str:
        """Describe the tool as MSAgent's rows do after XTuner's rewriting."""
        return f"{self.description}\n输入参数: { ({self.parameter: self.meaning}) }"


def parse_tools(text: str) -> dict[str, Tool]:
    """Return the tools of `calculator,clock,search:FOLDER` by name; raise ConfigError for one that does not exist."""
    tools: dict[str, Tool] = {}
    for word in filter(None, text.split(",")):
        name, _, folder = word.partition(":")
        if name == "calculator" and not folder:
            tools[name] = Tool(
                "计算一个数学表达式。Computes a mathematical expression.", "expression", "2*(3+4)", calculate
            )
        elif name == "clock" and not folder:
            tools[name] = Tool("现在的日期和时间。The date and the time now.", "zone", "local", lambda _: now())
        elif name == "search" and folder:
            root = Path(folder).expanduser()
            if not root.is_dir():
                raise ConfigError(f"tools={word}: no such folder. Name one that holds texts ({', '.join(TEXTS)})")
            about = "在本地文本中搜索。Searches a folder of texts."
            tools[name] = Tool(about, "query", "words to look for", partial(search, root.resolve()))
        else:
            raise ConfigError(f"tools={word}: no such tool. There are: calculator, clock, search:FOLDER")
    return tools


def now() -> str:
    """Return this machine's date, weekday and time."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %A %H:%M:%S %Z")


def search(root: Path, query: str) -> str:
    """Return the passages of a folder's texts in which most words of the query stand, each with its file's name."""
    words = set(re.findall(r"[^\W\d_]{2,}|\d+", query[:PASSAGE].casefold()))
    words |= {
        pair for run in re.findall(r"[\u4e00-\u9fff]{2,}", query[:PASSAGE]) for pair in map("".join, pairwise(run))
    }
    found: list[tuple[int, str]] = []
    for path in _texts(root):
        with path.open("rb") as file:
            text = file.read(MOST_BYTES).decode("utf-8", "replace")
        for start in range(0, len(text), PASSAGE):
            passage = " ".join(text[start : start + PASSAGE].split())
            hits = sum(word in passage.casefold() for word in words)
            if hits:
                found.append((hits, f"{path.relative_to(root).as_posix()}: {passage}"))
    found.sort(key=lambda each: -each[0])
    return "\n".join(passage for _, passage in found[:BEST]) or "nothing found"


def _texts(root: Path) -> Iterator[Path]:
    """Yield the texts below a folder, by name; links and special files are passed over: none leads out of it."""
    number = 0
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix.lower() in TEXTS and path.is_file() and not path.is_symlink():
                number += 1
                if number > MOST_FILES:
                    return
                yield path
