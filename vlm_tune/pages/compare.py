"""Compare runs: a table of what differs in their settings and of what came out, and a page of their curves."""

import base64
import hashlib
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.table import Table

from vlm_tune import words
from vlm_tune.config.schema import ImageConfig
from vlm_tune.pages.page import FOLDER, picture_url, write_page
from vlm_tune.pages.recorded import LOOK, describe, differing
from vlm_tune.pages.report_html import QUALITY, small_picture

MANY = 4  # settings that differ: more of them stand below one another, and the runs side by side


def compare_runs(runs: list[Path], out: str) -> Table:
    """Return the table of runs; draw them on a page too where `out` names a file."""
    described = [describe(run) for run in runs]
    keys = [key for key in differing(described) if key != "runs"]
    if out:
        write_comparison(described, keys, Path(out))
    lines = [("run", *(run["name"] for run in described))]
    lines += [(key, *(shown(run["settings"].get(key)) for run in described)) for key in keys]
    results = [outcome(run) for run in described]
    names = dict.fromkeys(name for result in results for name in result)
    lines += [(name, *(result.get(name, "–") for result in results)) for name in names]
    rows = lines if len(keys) > MANY else list(zip_longest(*lines))
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    return table


def shown(value: Any) -> str:
    """Write a setting's value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def outcome(run: dict[str, Any]) -> dict[str, str]:
    """Describe what came out of a run, as far as it has come: name -> value."""
    last, best = run["last"], run["best"]
    state = "finished" if run["is_finished"] else "not finished"
    found = {"state": state, "steps": f"{run['step']:,}" + (f" of {run['max_steps']:,}" if run["max_steps"] else "")}
    if "train/loss" in last:
        found["last loss"] = words.loss(last["train/loss"])
    if best:
        found["validation loss"] = words.loss(run["curves"]["val/loss"][-1][1])
        found["best"] = f"{words.loss(best[1])} at step {best[0]:,}"
    found |= {name.replace("_", " "): words.percent(score) for name, score in run["scores"].items()}
    if "speed/seconds" in last:
        found["time"] = words.duration(last["speed/seconds"])
    if "speed/tokens" in last:
        found["tokens/s"] = f"{last['speed/tokens']:,.0f}"
    if "speed/memory_mb" in last:
        found["memory"] = f"{last['speed/memory_mb'] / 1024:.1f} GiB"
    return found


def write_comparison(runs: list[dict[str, Any]], keys: list[str], out: Path) -> None:
    """Write the runs' curves and answers as one page, drawn by the script of the live one."""
    for run in runs:
        settings = run["settings"]
        look = ImageConfig(**{key.removeprefix(LOOK): value for key, value in settings.items() if key.startswith(LOOK)})
        for answer in run["answers"]:
            image = small_picture(answer["picture"], look) if answer["picture"] else None
            answer |= {"picture": image is not None, "url": picture_url(image, QUALITY) if image else ""}
        run["differs"] = {key: settings.get(key) for key in keys}
        run |= {"version": "", "age": 0, "state": "finished" if run["is_finished"] else "not finished"}
    script = (FOLDER / "watch.js").read_text(encoding="utf-8").rstrip("\n")
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    data = {"runs": [{key: value for key, value in run.items() if key != "settings"} for run in runs]}
    write_page(out, "watch.html", heading="Runs compared", data=data, script_hash=allowed)
