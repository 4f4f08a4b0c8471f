"""Write docs/configuration.md: every key with its default and the comment beside it in the schema."""

import re
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from vlm_tune.config import schema
from vlm_tune.config.schema import Config

HEAD = """# Configuration

Every key of a run, as `python -m vlm_tune KEY=VALUE ...` takes it. Written by `make docs` from
`vlm_tune/config/schema.py`; the defaults are the schema's, and `conf/` sets others for each stage and model
(`python -m vlm_tune configs` lists them). A list is written `key=[a,b]`, "nothing" is written `null`.

| key | default | meaning |
|---|---|---|
"""


def rows(config: Any, prefix: str = "") -> list[str]:
    """List one table row a key, at every depth."""
    lines = []
    source = Path(str(schema.__file__)).read_text(encoding="utf-8")
    body = source.split(f"class {type(config).__name__}:\n", 1)[1].split("\n@dataclass", 1)[0].split("\nclass ", 1)[0]
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            lines += rows(value, f"{prefix}{field.name}.")
            continue
        comment = re.search(rf"^    {field.name}: .*?(?:  # (.*))?$", body, re.MULTILINE)
        text = (comment[1] if comment and comment[1] else "").replace("|", "\\|")
        if isinstance(value, Enum):
            choices = " \\| ".join(member.value for member in type(value))
            text = f"{choices}. {text}".strip()
        lines.append(f"| `{prefix}{field.name}` | `{show(value)}` | {text} |")
    return lines


def show(value: Any) -> str:
    """Write a default as the command line would take it."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(HEAD + "\n".join(rows(Config())) + "\n", encoding="utf-8")
