"""The findings of `check` as numbers (check.json), and as tables for the terminal."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_tune import __version__
from vlm_tune.config.schema import Config
from vlm_tune.data.fit import EncoderSettings
from vlm_tune.data.sets.paths import num_put_aside
from vlm_tune.data.text.positions import NAME
from vlm_tune.inspection.check_pictures import alpha_fact, turned_fact
from vlm_tune.inspection.check_rows import Findings
from vlm_tune.words import counted

SHOWN = 20  # bad rows in the terminal; check.json has all
NUM_BINS = 12  # of a histogram
BAR = 36  # characters of the longest bar in the terminal


def summarise(found: Findings, config: Config, settings: EncoderSettings) -> dict[str, Any]:
    """Turn findings into the contents of check.json."""
    data, trained, ranges = config.data, found.trained, bins(list(found.by_rule.values()))
    distinct = np.unique(np.concatenate([*found.pictures, np.zeros(0, np.uint64)])).size
    return {
        "path": data.path,
        "rows": found.num_rows,
        "errors": len(found.faults),
        "num_bad_rows": len({(fault.where, fault.row) for fault in found.faults}),
        "faults": dict(Counter(fault.kind for fault in found.faults).most_common()),
        "dialects": dict(found.dialects.most_common()),
        "images": {name: found.images[name] for name in ("found", "missing", "broken")} | {"distinct": int(distinct)},
        "turned": found.images["turned"],
        "transparency": {name: found.images[name] for name in ("alpha", "decoded", "transparent")},
        "trained": {name: trained[name] for name in ("rows", "tokens", "supervised")},
        "pair_share": trained["shared"] / trained["tokens"] if trained["shared"] else None,
        "supervised_share": trained["supervised"] / trained["tokens"] if trained["tokens"] else None,
        "tokens": spread(found.tokens, bins([found.tokens])),
        "tiles": spread(found.tiles, bins([found.tiles])),
        "tokens_by_rule": {rule: spread(counts, ranges) for rule, counts in found.by_rule.items()},
        "long_rows": [place(long.where) | asdict(long) for long in found.long_rows],
        "stretched_rows": [place(long.where) | asdict(long) for long in found.stretched_rows],
        "same_id": [place(where) | {"where": where, "first": first} for where, first in found.same_id],
        "same_content": [place(where) | {"where": where, "first": first} for where, first in found.same_content],
        "markup": dict(found.markup.most_common()),
        "answers": found.answers.summary(),
        "bad_rows": [place(fault.where) | asdict(fault) for fault in found.faults],
        "settings": {
            "model": config.model.name,
            "template": config.model.template,
            "tiles": asdict(config.model.tiles) | {"rule": config.model.tiles.rule.value},
            "tokens_per_tile": settings.tokens_per_tile,
            "newline": settings.newline,
            "max_length": data.max_length,
            "positions": asdict(settings.positions),
            "limit": settings.limit.name,
            "on_too_long": data.on_too_long.value,
            "format": data.format,
            "exif": data.image.exif,
            "alpha": data.image.alpha,
            "val_share": data.val_share if data.val == "auto" else 0.0,
            "num_put_aside": num_put_aside(trained["rows"], config),
        },
        "version": __version__,
    }


def place(where: str) -> dict[str, Any]:
    """Split "train.jsonl:17" into file and line; a row of a tar file has a name instead of a line."""
    found = re.fullmatch(r"(.+):(\d+)( row \d+)?", where, re.DOTALL)
    if found is None or ".tar" in found[1] or found[1].endswith(".tgz"):
        return {"file": where.rpartition(":")[0] or where, "line": None}
    return {"file": found[1], "line": int(found[2])}


def spread(counts: Counter[int], ranges: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """Describe how a number is distributed over the rows: quantiles, and a histogram [first, last, rows]."""
    if not counts:
        return None
    total = sum(counts.values())
    return {
        "min": min(counts),
        "median": quantile(counts, 0.5),
        "mean": round(sum(value * rows for value, rows in counts.items()) / total, 2),
        "p95": quantile(counts, 0.95),
        "max": max(counts),
        "sum": sum(value * rows for value, rows in counts.items()),
        "histogram": [
            [first, last, sum(rows for value, rows in counts.items() if first <= value <= last)]
            for first, last in ranges
        ],
    }


def quantile(counts: Counter[int], share: float) -> int:
    """Return the smallest value that at least `share` of the rows do not exceed."""
    rows, needed = 0, share * sum(counts.values())
    for value in sorted(counts):
        rows += counts[value]
        if rows >= needed:
            break
    return value


def bins(counters: Sequence[Counter[int]]) -> list[tuple[int, int]]:
    """Choose some NUM_BINS ranges (first, last) of a round width; the last one takes the long tail."""
    filled = [counter for counter in counters if counter]
    if not filled:
        return []
    low, high = min(map(min, filled)), max(map(max, filled))
    top = max(quantile(counter, 0.99) for counter in filled)
    widths = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    width = next(width for width in widths if (top - low) // width < NUM_BINS)
    starts = range(low // width * width, top + 1, width)
    ranges = [(start, start + width - 1) for start in starts]
    return [*ranges[:-1], (ranges[-1][0], max(high, ranges[-1][1]))]


def verdict(report: dict[str, Any]) -> str:
    """Return one line on whether the data can be trained on."""
    rows = counted(report["rows"], "row")
    if not report["errors"]:
        return f"{rows}, no errors"
    if not report["rows"]:
        return "the file cannot be read"
    bad, errors = report["num_bad_rows"], report["errors"]
    return f"{rows}, {bad:,} bad" + (f" ({errors:,} errors)" if errors != bad else "")


def facts(report: dict[str, Any]) -> dict[str, str]:
    """Describe the counts in words: name -> value."""
    images, trained, tokens, tiles = (report[name] for name in ("images", "trained", "tokens", "tiles"))
    settings = report["settings"]
    told = {"rows": ", ".join(f"{count:,} {name}" for name, count in report["dialects"].items()) or "none"}
    told |= picture_facts(report)
    if tokens:
        told["tokens a row"] = f"{in_words(tokens)}, of {settings['limit']}"
    if tiles and tiles["max"]:
        about = "about " * settings["newline"]
        told["tiles a row"] = f"{in_words(tiles)}, of {about}{settings['tokens_per_tile']} tokens each"
    if trained["rows"]:
        told["trained on"] = trained_in_words(report)
    if report["markup"]:
        told["markup"] = ", ".join(f"{name} {count:,}" for name, count in report["markup"].items()) + ": one token each"
    policy = settings["on_too_long"]
    told["too long"] = f"{len(report['long_rows']):,}, data.on_too_long={policy}" if report["long_rows"] else "none"
    if report["stretched_rows"]:
        end = f"{NAME}={settings['positions']['named']:,}"
        told["stretched"] = f"{len(report['stretched_rows']):,} of more than {end}, by rope scaling"
    same = {"id": report["same_id"], "whole conversation": report["same_content"]}
    told["repeated"] = ", ".join(counted(len(rows), name) for name, rows in same.items() if rows) or "none"
    if report["answers"]["short"]:
        told["short answers"] = answers_in_words(report["answers"])
    told |= {Path(held["path"]).name: shared_in_words(held) for held in report["shared"]}
    if settings["val_share"] and all(held["part"] != "val" for held in report["shared"]):
        share, rows = f"{settings['val_share']:.0%}", trained["rows"]
        others = "" if images["distinct"] == images["found"] else ", and other rows show the same pictures"
        told["validation"] = (
            f"no file for it: {share} of the rows are put aside{others}"
            if settings["num_put_aside"]
            else f"none: no file for it, and {share} of {counted(rows, 'row')} is less than one"
        )
    return told


def picture_facts(report: dict[str, Any]) -> dict[str, str]:
    """Describe the pictures: how many there are, and what a setting decides of their look."""
    images, settings, told = report["images"], report["settings"], {}
    if sum(images.values()):
        told["images"] = ", ".join(f"{images[name]:,} {name}" for name in ("found", "missing", "broken"))
        told["images"] += f"; {images['distinct']:,} different ones"
    if report["turned"]:
        told["orientation"] = turned_fact(report["turned"], settings["exif"])
    if report["transparency"]["alpha"]:
        told["transparency"] = alpha_fact(report["transparency"], settings["alpha"])
    return told


def trained_in_words(report: dict[str, Any]) -> str:
    """Describe what is trained on: '80 rows, 12.0% of 9,000 tokens supervised', and what the answers of pairs share."""
    trained = report["trained"]
    share = f"{report['supervised_share']:.1%} of {trained['tokens']:,} tokens supervised"
    told = f"{counted(trained['rows'], 'row')}, {share}"
    if report["pair_share"] is None:
        return told
    return f"{told}; pairs: {report['pair_share']:.1%} of the tokens are read for both answers at once"


def answers_in_words(answers: dict[str, Any]) -> str:
    """Describe how many short answers there are, and the most frequent: '300, 12 longer; "yes" 71.0%, "no" 29.0%'."""
    longer = f" and {answers['long']:,} longer ones" if answers["long"] else ""
    return f"{answers['short']:,}{longer}; {shares(answers['most'][:3], answers['short'])}"


def shares(answers: list[list[Any]], total: int) -> str:
    """Describe how often each answer occurs: '"yes" 71.0%, "no" 29.0%'."""
    return ", ".join(f"{quoted(text)} {times / total:.1%}" for text, times in answers)


def quoted(text: str) -> str:
    """Quote text from the data, on one line."""
    return json.dumps(text, ensure_ascii=False)


def shared_in_words(held: dict[str, Any]) -> str:
    """Describe what the training rows share with a held-out file."""
    if held["error"]:
        return f"cannot be compared: {held['error']}"
    parts = []
    if held["shared_pictures"]:
        showing = counted(held["rows_showing_them"], "row")
        parts.append(f"{counted(held['shared_pictures'], 'picture')} (in {showing} here)")
    if held["shared_rows"]:
        parts.append(counted(held["shared_rows"], "whole row"))
    first = "the first " * held["is_cut"]
    told = f"shares {' and '.join(parts) or 'nothing'}; {first}{counted(held['rows'], 'row')} compared"
    bad = f", {held['bad_rows']:,} of them cannot be read: check that file too" if held["bad_rows"] else ""
    return told + bad


def in_words(numbers: dict[str, Any]) -> str:
    """Describe how a number is distributed: 'median 40, 95% up to 52, at most 71'."""
    return f"median {numbers['median']:,}, 95% up to {numbers['p95']:,}, at most {numbers['max']:,}"


def print_report(report: dict[str, Any], console: Console, folder: Path) -> None:
    """Print the tables, the first bad rows, and where the full report is."""
    style = "bold red" if report["errors"] else "bold green"
    console.print(Text.assemble((f"{report['path']}: {verdict(report)}", style)))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in facts(report).items():
        table.add_row(name, Text(value))
    console.print(table)
    for title, series in histograms(report).items():
        console.print(histogram_table(title, series))
    if report["answers"]["questions"]:
        console.print(question_table(report["answers"]["questions"][:5]))
    for line in shared_lines(report["shared"]):
        console.print(Text(line), soft_wrap=True)
    if report["errors"]:
        print_faults(report, console)
    console.print(f"\nreport: {folder / 'check.html'}, {folder / 'check.json'}", soft_wrap=True)


def question_table(questions: list[dict[str, Any]]) -> Table:
    """List the most frequent questions, with the shares of their answers."""
    table = Table(
        "question", "times", "answers", title="\nmost asked", title_justify="left", title_style="bold", box=None
    )
    table.columns[1].justify = "right"
    for asked in questions:
        told = shares(asked["answers"][:3], asked["times"]) + ", ..." * (len(asked["answers"]) > 3)
        table.add_row(Text(quoted(asked["question"])), f"{asked['times']:,}", Text(told))
    return table


def shared_lines(files: list[dict[str, Any]], limit: int = 3) -> Iterator[str]:
    """Name the first pictures and rows that are shared with each held-out file, a blank line before them."""
    if any(held["first_pictures"] or held["first_rows"] for held in files):
        yield ""
    for held in files:
        for each in held["first_pictures"][:limit]:
            yield f"{each['where']} shows {each['picture']}: {each['held_where']} shows it too ({each['held_picture']})"
        for each in held["first_rows"][:limit]:
            yield f"{each['where']} is the row {each['held_where']} too"


def print_faults(report: dict[str, Any], console: Console) -> None:
    """Print how many faults of each kind there are, and the first bad rows, formatted like all errors."""
    table = Table("fault", "rows", title="\nfaults", title_justify="left", title_style="bold", box=None)
    table.columns[1].justify = "right"
    for kind, count in report["faults"].items():
        table.add_row(kind, f"{count:,}")
    console.print(table)
    console.print()
    shown = first_of_each(report["bad_rows"], max(3, SHOWN // len(report["faults"])))[:SHOWN]
    for fault in shown:
        identity = f' (id "{fault["id"]}")' if fault["id"] is not None else ""
        console.print(Text.assemble((f"{fault['where']}{identity}", "bold"), f": {fault['reason']}"), soft_wrap=True)
    if len(shown) < len(report["bad_rows"]):
        console.print(f"... and {len(report['bad_rows']) - len(shown):,} more, all in the report")


def first_of_each(bad_rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Keep up to `limit` faults of each kind, so that a very frequent kind does not hide the others."""
    seen: Counter[str] = Counter()
    kept = []
    for fault in bad_rows:
        seen[fault["kind"]] += 1
        kept += [fault] if seen[fault["kind"]] <= limit else []
    return kept


def histograms(report: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Choose what is drawn: title -> name -> numbers. The two tile rules are drawn side by side where they differ."""
    drawn: dict[str, dict[str, dict[str, Any]]] = {}
    rules = report["tokens_by_rule"]
    if len(rules) > 1 and len({str(numbers) for numbers in rules.values()}) > 1:
        drawn["tokens a row"] = {f"rule={rule}": numbers for rule, numbers in rules.items()}
    elif report["tokens"]:
        drawn["tokens a row"] = {"rows": report["tokens"]}
    if report["tiles"] and report["tiles"]["max"] > 1:
        drawn["tiles a row"] = {"rows": report["tiles"]}
    return drawn


def rule_note(report: dict[str, Any]) -> str:
    """Compare the tokens of all rows under the two tile rules."""
    sums = {rule: numbers["sum"] for rule, numbers in report["tokens_by_rule"].items() if numbers}
    if len(set(sums.values())) < 2:
        return ""
    told = " and ".join(f"{tokens:,} tokens with model.tiles.rule={rule}" for rule, tokens in sums.items())
    return f"All rows together, before data.on_too_long: {told}."


def setting_texts(settings: dict[str, Any]) -> dict[str, str]:
    """Format the settings that affect the findings as the command line takes them."""
    return {
        "model": str(settings["model"]),
        "model.template": str(settings["template"]),
        "model.tiles": ", ".join(f"{name}={value}" for name, value in settings["tiles"].items()),
        "tokens a tile": str(settings["tokens_per_tile"]),
        "data.format": str(settings["format"]),
        "data.max_length": f"{settings['max_length']:,}",
        "limit of a row": str(settings["limit"]),
        "data.on_too_long": str(settings["on_too_long"]),
    }


def histogram_table(title: str, series: dict[str, dict[str, Any]]) -> Table:
    """Draw histograms over the same bins side by side."""
    table = Table(title.partition(" ")[0], title=f"\n{title}", title_justify="left", title_style="bold", box=None)
    table.columns[0].justify = "right"
    for name in series:
        table.add_column(name, justify="right")
        table.add_column("")
    longest = max(rows for numbers in series.values() for _, _, rows in numbers["histogram"])
    width = BAR // len(series)
    for first, last, _ in next(iter(series.values()))["histogram"]:
        cells = []
        for numbers in series.values():
            rows = next(rows for start, _, rows in numbers["histogram"] if start == first)
            cells += [f"{rows:,}", "█" * -(-rows * width // longest)]
        table.add_row(range_text(first, last), *cells)
    return table


def range_text(first: int, last: int) -> str:
    """Format the range of a bin."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
