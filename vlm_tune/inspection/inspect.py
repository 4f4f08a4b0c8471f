"""`python -m vlm_tune inspect data.path=FILE row=17`: see one row as the model does."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vlm_tune.config.schema import Config
from vlm_tune.data.encode import Encoder
from vlm_tune.data.sets.paths import find_file
from vlm_tune.errors import ConfigError
from vlm_tune.inspection.inspect_html import write_html
from vlm_tune.inspection.inspect_row import look
from vlm_tune.inspection.inspect_text import print_text
from vlm_tune.pages.page import data_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def inspect(
    config: Config,
    read_by: "tuple[Encoder, PreTrainedTokenizerBase]",
    row: str,
    out: str,
    as_text: bool,
    console: Console,
) -> None:
    """Show one row of data.path as a page, or with `as_text` in the terminal (and as a page at `out`).

    `row` is its number, counted from 0, or its location as messages name it: "train.jsonl:17".

    Raise ConfigError for a row that is not there, DataError for one that is faulty.
    """
    if out and not out.endswith(".html") and not Path(out).is_dir():
        raise ConfigError(f"out={out}: a page is written, over an older one. Name it so: out=row.html")
    seen = look(config, *read_by, int(row) if row.isdecimal() else row)
    if as_text:
        print_text(seen, console)
    if out or not as_text:
        name = f"inspect_{data_name(find_file(config.data.path))}_{seen.row}.html"
        path = Path(out) if out else Path(config.runs) / name
        try:
            write_html(seen, path)
        except OSError as error:
            raise ConfigError(f"out={path}: {error.strerror}. Name a file that can be written: out=row.html") from error
        console.print(f"{seen.sample.where} (row {seen.row}, counted from 0): {path}", soft_wrap=True)
