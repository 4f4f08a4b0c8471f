"""Write a run's report as one HTML page: no scripts, nothing from the network, all text of the data escaped."""

import base64
import html
import io
import math
import os
from collections.abc import Iterable
from datetime import datetime
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from vlm_tune import __version__
from vlm_tune.config.schema import ImageConfig
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Picture
from vlm_tune.errors import DataError
from vlm_tune.evaluation.metrics import is_match
from vlm_tune.pages.report_chart import chart_css, curve, loss_svg, loss_text, rate_text, smoothed

MAX_PICTURES = 60  # the page stays small enough to send; report.json has all answers
MAX_ANSWER = 600  # characters of one shown text
THUMBNAIL = (560, 380)  # pixels, twice the size on the page, for dense screens

SCORES = ("after", "before", "blind", "majority")
SCORE_NOTES = {
    "before": "<b>before</b>: the model as this run found it.",
    "blind": "<b>blind</b>: the trained model with its image features set to zero.",
    "majority": "<b>majority</b>: always the most frequent answer.",
}
RIVALS = {"blind": "the same model without the picture", "majority": "always the most frequent answer"}
DATA_NAMES = {
    "path": "file",
    "rows": "training rows",
    "val_rows": "validation rows",
    "skipped": "rows left out",
    "shortened": "rows shortened",
    "supervised_share": "supervised tokens",
    "pack_fill": "packs filled",
    "tokens": "tokens a row",
    "tiles": "tiles a row",
}
SHARES = ("supervised_share", "pack_fill")


def write_html(report: dict[str, Any], path: Path) -> None:
    """Write the page of a report (the contents of report.json); a block that is missing or empty is left out.

    `run.samples` and `run.tokens` over `run.seconds` is the speed shown, so these three describe the same stretch.
    """
    run = report.get("run") or {}
    heading = " · ".join(escape(run[key]) for key in ("model", "stage") if run.get(key)) or "training run"
    template = resources.files("vlm_tune.pages").joinpath("report.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=f"{heading} · {escape(run.get('name', 'vlm_tune'))}",
        heading=heading,
        chart_css=chart_css(),
        facts=facts(run),
        headline=headline(report),
        accuracy=accuracy(report.get("evaluation") or {}) + cautions(report.get("evaluation") or {}),
        loss=loss(report),
        gallery=gallery(report.get("answers") or [], ImageConfig(**report.get("image") or {})),
        parts=trained_parts(report.get("parts") or []),
        data=data_summary(report.get("data") or {}),
        details=details(report),
        footer=f"Written by vlm_tune {__version__}. The same numbers for programs: report.json beside this page.",
    )
    path.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair of the data has no UTF-8


def escape(value: Any) -> str:
    """Make text of the data or of the machine harmless in HTML, in attributes too."""
    return html.escape(str(value), quote=True)


def facts(run: dict[str, Any]) -> str:
    """Say below the title when, where and from what the model was trained."""
    items = [date_text(run["started"])] if run.get("started") else []
    items += [str(run[key]) for key in ("device", "precision") if run.get(key)]
    items += [f"{run[key]:,} {key}" for key in ("steps", "samples", "tokens") if run.get(key)]
    lines = ['<ul class="facts">' + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"]
    for name, key in (("Command", "command"), ("Started from", "init_from"), ("Run", "name")):
        if run.get(key):
            lines.append(f'<p class="quiet">{name}: <code>{escape(run[key])}</code></p>')
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    """Show the numbers that one asks for first, as tiles."""
    run = report.get("run") or {}
    tiles = list(score_tiles(report.get("evaluation") or {}))
    train, best = smoothed(curve(report, "loss_curve")), report.get("best")
    if train:
        note = f"{loss_text(train[0][1])} at the first step"
        if best:
            note = f"best validation {loss_text(best['loss'])}, at step {best['step']:,.0f}"
        tiles.append(tile("training loss at the end", loss_text(train[-1][1]), note))
    seconds, total = run.get("seconds") or 0, report.get("train_seconds") or 0
    if seconds or total:
        earlier = f"{duration(total)} with the stages before" if seconds and total - seconds > 1 else ""
        tiles.append(tile("training time", duration(seconds or total), earlier))
    if seconds and run.get("samples"):
        note = f"{run['tokens'] / seconds:,.0f} tokens a second" if run.get("tokens") else ""
        tiles.append(tile("samples a second", f"{run['samples'] / seconds:,.3g}", note))
    if report.get("peak_rss_mb"):
        tiles.append(tile("most memory held", f"{report['peak_rss_mb'] / 1024:.1f} GiB", "of the main process"))
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


def score_tiles(evaluation: dict[str, Any]) -> Iterable[str]:
    """Show the accuracy of up to two tasks, or the mean of more, against the best guess without the picture."""
    scores = {kind: dict(evaluation.get(kind) or {}) for kind in SCORES}
    tasks = list(scores["after"])
    if len(tasks) > 2:
        scores = {kind: {"": sum(values.values()) / len(values)} if values else {} for kind, values in scores.items()}
    for task, after in scores["after"].items():
        name = f"{readable(task)}, right answers" if task else f"right answers, mean of {len(tasks)} tasks"
        guesses = [(scores[kind][task], rival) for kind, rival in RIVALS.items() if task in scores[kind]]
        note = ""
        if guesses:
            guess, rival = max(guesses)
            note = f"{100 * abs(after - guess):.1f} points {'above' if after >= guess else 'below'} {rival}"
        yield tile(name, percent(after), note, "tile main")


def tile(label: str, value: str, note: str = "", kind: str = "tile") -> str:
    """Return one headline number."""
    below = f'<dd class="note">{escape(note)}</dd>' if note else ""
    return f'<dl class="{kind}"><dt>{escape(label)}</dt><dd>{escape(value)}</dd>{below}</dl>'


def accuracy(evaluation: dict[str, Any]) -> str:
    """Compare, by task, the answers after training with those before, blind, and with the most frequent one."""
    kinds = [kind for kind in SCORES if evaluation.get(kind)]
    tasks = dict.fromkeys(task for kind in kinds for task in evaluation[kind])
    if not tasks:
        return ""
    asked = evaluation.get("num_questions") or {}
    pictures, rows = [], []
    for task in tasks:
        shares = {kind: evaluation[kind].get(task) for kind in kinds}
        bars = "".join(bar(kind, share) for kind, share in shares.items() if share is not None)
        pictures.append(f"<div><h3>{escape(readable(task))}</h3>{bars}</div>")
        numbers = [*map(percent, shares.values())]
        if asked:
            count = asked.get(task, 0)
            numbers += [f"± {100 * margin(shares[kinds[0]] or 0.0, count):.1f}", f"{count:,}"] if count else ["–", "–"]
        rows.append(f"<tr><th>{escape(readable(task))}</th>{number_cells(numbers)}</tr>")
    head = number_cells([*kinds, *(["95% margin", "questions"] if asked else [])], "th")
    notes = [SCORE_NOTES[kind] for kind in kinds if kind in SCORE_NOTES]
    if asked:
        notes.append(f"<b>95% margin</b>: of “{kinds[0]}”, in points, from the number of questions alone.")
    return (
        f'<section><h2>Right answers</h2><div class="panel"><div class="scores">{"".join(pictures)}</div>'
        f'<div class="wide-scroll"><table class="accuracy"><thead><tr><th>task</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></div>"
        f'<p class="quiet below">Exact match, case and closing full stop aside. {" ".join(notes)}</p></section>'
    )


def cautions(evaluation: dict[str, Any]) -> str:
    """Say in words where a score is not clearly above a guess."""
    return "".join(f"<p>{escape(verdict)}.</p>" for verdict in evaluation.get("verdicts") or [])


def number_cells(values: list[str], kind: str = "td") -> str:
    """Return cells of a table that are aligned as numbers."""
    return "".join(f'<{kind} class="number">{value}</{kind}>' for value in values)


def bar(kind: str, value: float) -> str:
    """Return one bar of the accuracy picture, its number beside it."""
    width = 100 * min(max(value, 0.0), 1.0)
    picture = f'<span class="track"><i style="width:{width:.1f}%"></i></span>'
    return f'<div class="bar {kind}"><span>{kind}</span>{picture}<span>{percent(value)}</span></div>'


def margin(share: float, count: int) -> float:
    """Return half of the 95% interval of a share, after Agresti and Coull (1998): not 0 where all or none are right."""
    adjusted = (share * count + 2) / (count + 4)
    return 1.96 * math.sqrt(adjusted * (1 - adjusted) / (count + 4))


def loss(report: dict[str, Any]) -> str:
    """Draw the loss curve, and say so where a loss was not a number."""
    wide, narrow = loss_svg(report), loss_svg(report, (330, 400))
    entries = report.get("loss_curve") or []
    lost = sum(entry.get("loss") is None or not math.isfinite(entry["loss"]) for entry in entries)
    warning = f'<p class="warn">{lost:,} of {len(entries):,} logged losses are not finite numbers.</p>' if lost else ""
    if not wide and not lost:
        return ""
    drawing = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    return f'<section><h2>Loss</h2><div class="panel">{warning}{drawing}</div></section>'


def gallery(answers: list[dict[str, Any]], look: ImageConfig) -> str:
    """Show the test pictures as training saw them, each once, with its questions and the answers before and after."""
    groups: dict[tuple[str | None, int], list[dict[str, Any]]] = {}
    for index, answer in enumerate(answers):
        picture = answer.get("picture")
        groups.setdefault((picture, -1) if picture else (None, index), []).append(answer)  # text: a card for each
    if not groups:
        return ""
    shown = list(groups.items())[:MAX_PICTURES]
    cards = "".join(card(picture, asked, look) for (picture, _), asked in shown)
    after, before = (sum(is_right(answer, key) for answer in answers) for key in ("after", "before"))
    summary = f"{after:,} of {len(answers):,} right after training (marked ✓), {before:,} before."
    if not after + before:
        summary = f"Word for word, none of the {len(answers):,} is the expected answer."
    if len(shown) < len(groups):
        summary += f" The first {len(shown):,} of {len(groups):,} are shown; report.json has all answers."
    title = "Answers about test pictures" if any(picture for picture, _ in groups) else "Answers"
    return f'<section><h2>{title}</h2><p class="quiet">{summary}</p><div class="gallery">{cards}</div></section>'


def card(picture: str | None, asked: list[dict[str, Any]], look: ImageConfig) -> str:
    """Return one picture with what was asked about it."""
    questions = []
    for answer in asked:
        lines = [answer_line(answer, key) for key in ("expected", "before", "after") if answer.get(key) is not None]
        question = escape(shorten(str(answer.get("question") or "").replace("<image>", "").strip()))
        questions.append(f'<div class="question"><p dir="auto">{question}</p><dl>{"".join(lines)}</dl></div>')
    image = thumbnail(picture, look) if picture else ""
    return f'<article class="card">{image}{"".join(questions)}</article>'


def answer_line(answer: dict[str, Any], key: str) -> str:
    """Return one answer, marked when it is the expected one."""
    text = escape(shorten(str(answer[key]).strip())) or '<span class="empty">nothing</span>'
    if not is_right(answer, key):
        return f'<div><dt>{key}</dt><dd dir="auto">{text}</dd></div>'
    text += '&nbsp;<span role="img" aria-label="right">✓</span>'
    return f'<div class="right"><dt>{key}</dt><dd dir="auto">{text}</dd></div>'


def is_right(answer: dict[str, Any], key: str) -> bool:
    """Tell whether the answer before or after training is the expected one."""
    given, expected = answer.get(key), answer.get("expected")
    return key != "expected" and bool(given) and bool(expected) and is_match(str(given), str(expected))


def thumbnail(picture: str, look: ImageConfig) -> str:
    """Return a picture made small and put into the page; a placeholder where the file cannot be read."""
    name = escape(os.path.basename(picture))
    try:
        image = ImageReader(look, Path("/")).open_picture(Picture(os.path.abspath(picture)))
    except DataError:
        return f'<div class="missing">no picture: {name} cannot be read</div>'
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82, optimize=True)
    content = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{content}" width="{image.width}" height="{image.height}" alt="{name}">'


def trained_parts(parts: list[dict[str, Any]]) -> str:
    """Show which part is trained, how, and at which learning rate."""
    if not parts:
        return ""
    rows = []
    for part in parts:
        is_trained = part["num_trained"] > 0
        how = f'<span class="pill{" trained" * is_trained}">{escape(part["how"])}</span>'
        cells = number_cells([*counts(part), rate_text(part["learning_rate"]) if is_trained else "–"])
        rows.append(f"<tr><th>{escape(part['name'])}</th><td>{how}</td>{cells}</tr>")
    total = {key: sum(part[key] for part in parts) for key in ("num_trained", "num_total")}
    head = number_cells(["trained", "parameters", "share", "learning rate"], "th")
    return (
        '<section><h2>What was trained</h2><div class="panel wide-scroll"><table>'
        f"<thead><tr><th>part</th><th>how</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f"<tfoot><tr><th>all</th><td></td>{number_cells([*counts(total), ''])}</tr></tfoot></table></div></section>"
    )


def counts(part: dict[str, Any]) -> list[str]:
    """Return how many parameters are trained, how many there are, and the share, with its small bar."""
    trained, total = part["num_trained"], part["num_total"]
    share = trained / total if total else 0.0
    picture = f'<span class="share"><i style="width:{100 * share:.1f}%"></i></span>'
    return [f"{trained:,}", f"{total:,}", f"{picture}<b>{percent(share, 2)}</b>"]


def data_summary(data: dict[str, Any]) -> str:
    """Show what the model was trained on."""
    items = []
    for key, value in data.items():
        if value is not None:
            kind = "long" if key == "path" else "warn" if key == "skipped" and value else ""
            name = DATA_NAMES.get(key, readable(key))
            items.append(f'<div class="{kind}"><dt>{escape(name)}</dt><dd>{escape(data_text(key, value))}</dd></div>')
    return (
        f'<section><h2>Data</h2><div class="panel"><dl class="data">{"".join(items)}</dl></div></section>'
        if items
        else ""
    )


def data_text(key: str, value: Any) -> str:
    """Write one fact about the data: 2,000 / 97.0% / median 60, at most 120."""
    if isinstance(value, dict):
        names = {"p50": "median", "max": "at most"}
        return ", ".join(f"{names.get(name, name)} {data_text('', number)}" for name, number in value.items())
    if key in SHARES and isinstance(value, float):
        return percent(value)
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def pairs(rows: list[tuple[str, str]]) -> str:
    """Return a table of names and values."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="pairs"><tbody>{body}</tbody></table>'


def details(report: dict[str, Any]) -> str:
    """Fold away what is needed to repeat the run."""
    config, environment = report.get("config"), report.get("environment")
    blocks = []
    if config:
        blocks.append(
            f"<details><summary>Configuration, resolved</summary><pre>{escape(config).strip()}</pre></details>"
        )
    if environment:
        table = pairs([(str(name), str(value)) for name, value in environment.items()])
        blocks.append(f'<details><summary>Environment</summary><div class="wide-scroll">{table}</div></details>')
    return f"<section><h2>To repeat the run</h2>{''.join(blocks)}</section>" if blocks else ""


def readable(name: str) -> str:
    """Write a key for people: food_group -> food group."""
    return name.replace("_", " ")


def shorten(text: str) -> str:
    """Cut a very long text; report.json keeps it whole."""
    return text if len(text) <= MAX_ANSWER else text[:MAX_ANSWER].rstrip() + " …"


def percent(share: float | None, digits: int = 1) -> str:
    """Write a fraction as a percentage; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def duration(seconds: float) -> str:
    """Write a time: 42 s, 5.2 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes // 60:,.0f} h {minutes % 60:.0f} min"


def date_text(started: str) -> str:
    """Write an ISO time as people do: 21 November 2026, 23:19."""
    try:
        moment = datetime.fromisoformat(started)
    except ValueError:
        return started
    return f"{moment.day} {moment:%B %Y, %H:%M}"
