"""The findings of `check` as one HTML page."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_tune.inspection.check_answers import SHORT
from vlm_tune.inspection.check_report import facts, histograms, quoted, range_text, shared_in_words, shares
from vlm_tune.inspection.check_samples import MAX_SIDE, Look
from vlm_tune.pages.page import escape, fact_list, pairs, panel, picture_url, section, table, tile, tiles, write_page

LONG = ["where", "tokens", "what happens"]
MAX_OPEN = 20  # of them that are seen at once
MOST = 10  # answers that are shown
FEW, ONE_SIDED = 20, 0.8  # answers that are worth a share, and the share that is marked
MAX_LISTED = 500  # lines of one table; check.json has all


def write_html(report: dict[str, Any], looks: list[Look], path: Path) -> None:
    """Write the page of a report (the contents of check.json), and of a few rows as the model sees them."""
    settings = report["settings"]
    told = [f"model {settings['model']}", f"template {settings['template']}"]
    told += [f"{report['rows']:,} rows checked in {report['seconds']:,.1f} s"]
    main = [
        tiles(headline(report)),
        section("Faults", panel(kinds(report), "kinds")),
        section("Bad rows", *listed(report["bad_rows"], ["where", "what is wrong"], bad_row)),
        section("What the rows hold", panel(pairs(facts(report)))),
        section("Some rows as the model sees them", *samples(looks)),
        section("Short answers", *answers(report["answers"])),
        section("In the validation and test files too", "".join(map(shared, report["shared"]))),
        section("How long the rows are", panel("".join(charts(report)), "charts"), rule_note(report)),
        section("Too long", *listed(report["long_rows"], LONG, long_row, (1,))),
        section(
            "Longer than the language model was trained for", *listed(report["stretched_rows"], LONG, long_row, (1,))
        ),
        section("Repeated ids", *listed(report["same_id"], ["where", "first at"], repeat)),
        section("Repeated conversations", *listed(report["same_content"], ["where", "first at"], repeat)),
        section("Settings", panel(pairs(setting_texts(settings)))),
    ]
    blocks = {"heading": Path(report["path"]).name, "facts": fact_list(told), "main": "\n".join(main)}
    write_page(path, "check", blocks | {"footer": "The same for programs: check.json beside this page."})


def headline(report: dict[str, Any]) -> list[str]:
    """Show the verdict and the numbers that one asks for first."""
    found = [tile("errors", "none", f"in {report['rows']:,} rows", "good")]
    if report["errors"]:
        note = f"of {report['rows']:,}; training stops at them" if report["rows"] else "the file cannot be read"
        found = [tile("bad rows", f"{report['num_bad_rows']:,}", note, "bad")]
    images, tokens = report["images"], report["tokens"]
    if total := images["found"] + images["missing"] + images["broken"]:
        note = f"of {total:,}; {images['distinct']:,} different ones"
        found.append(tile("images found", f"{images['found']:,}", note))
    if tokens:
        found.append(tile("tokens a row", f"{tokens['median']:,}", f"median; at most {tokens['max']:,}"))
    if report["supervised_share"] is not None:
        note = f"of {report['trained']['tokens']:,} tokens"
        found.append(tile("supervised", f"{report['supervised_share']:.1%}", note))
    most = report["answers"]["most"]
    if report["answers"]["short"] >= FEW:
        share = most[0][1] / report["answers"]["short"]
        kind = "bad" if share >= ONE_SIDED else ""
        note = f"{quoted(most[0][0])}, of {report['answers']['short']:,} short ones"
        found.append(tile("most frequent answer", f"{share:.0%}", note, kind))
    for held in report["shared"]:
        if number := held["shared_pictures"] or held["shared_rows"]:
            what = "pictures" if held["shared_pictures"] else "whole rows"
            found.append(
                tile(
                    f"shared with {held['part']}",
                    f"{number:,}",
                    f"{what} that {Path(held['path']).name} has too",
                    "bad",
                )
            )
    return found


def samples(looks: list[Look]) -> tuple[str, str]:
    """Show rows, each with its pictures small and its text by kind."""
    panels = []
    for look in looks:
        shots = "".join(
            f'<figure><img src="{picture_url(image, MAX_SIDE)}" alt=""><figcaption>{escape(told)}</figcaption></figure>'
            for told, image in look.pictures
        )
        more = look.num_pictures - len(look.pictures)
        shots += f'<p class="quiet">and {more:,} more</p>' if more else ""
        text = "".join(f'<span class="{kind}">{seen_text(text)}</span>' for kind, text in look.runs)
        told = f"row={look.row}, {look.tokens:,} tokens, {look.supervised:,} supervised"
        head = f"<h3>{escape(look.where)} <span>{escape(look.id)} · {told}</span></h3>"
        shown = f'<div class="shots">{shots}</div>' if shots else ""
        panels.append(panel(f'{head}<div class="sample">{shown}<div class="sequence">{text}</div></div>'))
    note = "Green is what the model is trained to say. python -m vlm_tune inspect row=NUMBER shows a row in full."
    return "".join(panels), note


def seen_text(text: str) -> str:
    """Show text with its line ends."""
    return escape(text).replace("\n", '<b class="end">⏎</b>\n')


def answers(found: dict[str, Any]) -> tuple[str, str]:
    """Show how often the most frequent short answers occur, over all and to the questions that are asked most."""
    if not found["short"]:
        return "", ""
    rows = [
        [escape(text), f"{times:,}", share_bar(times / found["short"])]
        for text, times in found["most"][:MOST]
        if times > 1
    ]
    content = panel(table(["answer", "times", "share"], rows, (1,)), "shares") if rows else ""
    asked = [
        [
            escape(each["question"]),
            f"{each['times']:,}",
            escape(shares(each["answers"][:4], each["times"])),
            share_bar(each["answers"][0][1] / each["times"]),
        ]
        for each in found["questions"]
    ]
    if asked:
        content += panel(table(["question", "times", "answers", "largest share"], asked, (1,)), "shares")
    longer = f", {found['long']:,} longer ones left out" if found["long"] else ""
    return content, f"{found['short']:,} answers of up to {SHORT} characters{longer}."


def share_bar(share: float) -> str:
    """Draw a share, with its number; one that leaves little else to say is marked."""
    kind = "much" if share >= ONE_SIDED else ""
    return f'<span class="track {kind}"><i style="width:{100 * share:.1f}%"></i></span>{share:.1%}'


def shared(held: dict[str, Any]) -> str:
    """Show what the rows share with one held-out file."""
    name = Path(held["path"]).name
    content = f"<p>{escape(f'{name}: {shared_in_words(held)}')}</p>"
    pictures = [
        [placed(each["where"], each["picture"]), placed(each["held_where"], each["held_picture"])]
        for each in held["first_pictures"][:MAX_OPEN]
    ]
    rows = [[placed(each["where"]), placed(each["held_where"])] for each in held["first_rows"][:MAX_OPEN]]
    content += table(["picture here", "picture there"], pictures) if pictures else ""
    content += table(["row here", "row there"], rows) if rows else ""
    return panel(content)


def kinds(report: dict[str, Any]) -> str:
    """Show how many faults of each kind there are."""
    if not report["faults"]:
        return ""
    most = max(report["faults"].values())
    rows = []
    for kind, count in report["faults"].items():
        bar = f'<span class="track"><i style="width:{100 * count / most:.1f}%"></i></span>'
        rows.append([escape(kind), f"{count:,}", bar])
    return table(["fault", "times", ""], rows, (1,))


def listed(
    entries: list[dict[str, Any]],
    head: list[str],
    cells: Callable[[dict[str, Any]], list[str]],
    numbers: tuple[int, ...] = (),
) -> tuple[str, str]:
    """Return a table of the first entries with more of them folded away, and the note that the rest is elsewhere."""
    if not entries:
        return "", ""
    rows = [cells(entry) for entry in entries[:MAX_LISTED]]
    content = panel(table(head, rows[:MAX_OPEN], numbers))
    if rows[MAX_OPEN:]:
        more = f"{len(rows) - MAX_OPEN:,} more"
        content += f"<details><summary>{more}</summary><div>{table(head, rows[MAX_OPEN:], numbers)}</div></details>"
    note = f"The first {MAX_LISTED:,} of {len(entries):,}; check.json has all." if len(entries) > MAX_LISTED else ""
    return content, note


def bad_row(fault: dict[str, Any]) -> list[str]:
    """Return the cells of one fault."""
    kind = f'<span class="pill bad">{escape(fault["kind"])}</span>'
    return [placed(fault["where"], fault["id"]), f"{kind} {escape(fault['reason'])}"]


def long_row(long: dict[str, Any]) -> list[str]:
    """Return the cells of one row that is too long."""
    return [placed(long["where"], long["id"]), f"{long['tokens']:,}", escape(long["outcome"])]


def repeat(same: dict[str, Any]) -> list[str]:
    """Return the cells of one row that repeats another."""
    return [placed(same["where"]), escape(same["first"])]


def placed(where: str, sample_id: str | None = None) -> str:
    """Show a row's place and its id."""
    below = f"<span>{escape(sample_id)}</span>" if sample_id is not None else ""
    return f'<div class="place">{escape(where)}{below}</div>'


def charts(report: dict[str, Any]) -> list[str]:
    """Draw the histograms."""
    drawn = []
    for title, series in histograms(report).items():
        legend = ""
        if len(series) > 1:
            kinds = [("", name) if index == 0 else ("other", name) for index, name in enumerate(series)]
            legend = "".join(f'<li class="{kind}"><i></i>{escape(name)}</li>' for kind, name in kinds)
        drawn.append(f'<div><h3>{escape(title)}</h3><ul class="legend">{legend}</ul>{chart(series)}</div>')
    return drawn


def chart(series: dict[str, dict[str, Any]]) -> str:
    """Draw one histogram; of two names, their bars stand in pairs."""
    most = max(rows for numbers in series.values() for _, _, rows in numbers["histogram"])
    columns = []
    for number, (first, last, _) in enumerate(next(iter(series.values()))["histogram"]):
        bars, told = "", []
        for index, (name, numbers) in enumerate(series.items()):
            rows = numbers["histogram"][number][2]
            height = max(100 * rows / most, 1 if rows else 0)
            bars += f'<i class="{"other" * (index > 0)}" style="height:{height:.1f}%"><b>{rows:,}</b></i>'
            told.append(f"{rows:,} {name}")
        hint = escape(f"{range_text(first, last)}: {', '.join(told)}")
        range_end = f"–{last:,}" if last > first else ""
        label = f"<span>{first:,}<em>{range_end}</em></span>"
        columns.append(f'<div title="{hint}"><div class="bars">{bars}</div>{label}</div>')
    return f'<div class="hist {"two" * (len(series) > 1)}">{"".join(columns)}</div>'


def rule_note(report: dict[str, Any]) -> str:
    """Compare the tokens of all rows under the two tile rules."""
    sums = {rule: numbers["sum"] for rule, numbers in report["tokens_by_rule"].items() if numbers}
    if len(set(sums.values())) < 2:
        return ""
    told = " and ".join(f"{tokens:,} tokens with model.tiles.rule={rule}" for rule, tokens in sums.items())
    return f"All rows together, before data.on_too_long: {told}."


def setting_texts(settings: dict[str, Any]) -> dict[str, str]:
    """Write the settings that decide what was found as the command line takes them."""
    own = settings["tiles"]
    return {
        "model": str(settings["model"]),
        "model.template": str(settings["template"]),
        "model.tiles": ", ".join(f"{name}={value}" for name, value in own.items()),
        "tokens a tile": str(settings["tokens_per_tile"]),
        "data.format": str(settings["format"]),
        "data.max_length": f"{settings['max_length']:,}",
        "limit of a row": str(settings["limit"]),
        "data.on_too_long": str(settings["on_too_long"]),
    }
