"""Draw a run's loss curve, with the learning rates below it, as SVG: for the report's page and as its own file."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_tune import words
from vlm_tune.pages.page import render

Point = tuple[float, float]  # (optimizer step, value)

MAX_DOTS = 40  # validation losses; more are drawn as a line without dots
MAX_POINTS = 600  # of a drawn line: more than a screen's pixels would only make the file larger
LOG_FROM = 8.0  # largest loss / smallest: from here on a linear axis shows the first steps and nothing else
NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

SIZE, NARROW_SIZE = (880, 420), (330, 400)  # pixels; text is 12 pixels high, so a phone gets a drawing of its own
NARROW = 500  # pixels: a drawing below this width has fewer ticks, and its legends in a line of their own
LEFT, RIGHT, TOP, BOTTOM = 48.0, 14.0, 34.0, 42.0  # pixels around the panels
RATES = "learning rate"
PAIR_PANELS = {  # of runs on pairs: title -> column and name of each line
    "chosen above rejected": (("pairs/accuracy", "training"), ("val/accuracy", "validation")),
    "reward": (("pairs/reward_chosen", "chosen"), ("pairs/reward_rejected", "rejected")),
}
RATE_TOP, RATE_HEIGHT, LEGEND = 40.0, 56.0, 18.0
MARGIN = 20  # pixels around the drawing in a file of its own


@dataclass(frozen=True)
class Axis:
    """Map the values low..high to the pixels start..end."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value; values beyond the axis are drawn at its end."""
        scale = math.log if self.is_log else float
        value = min(max(value, self.low), self.high)
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, num: int) -> list[float]:
        """Return about `num` round values along the axis: 1, 2 or 5 times a power of ten."""
        if not self.is_log:
            step = round_step((self.high - self.low) / num)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [index * step for index in range(first, last + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for multiples in ((1, 2, 5), (1, 3), (1,)):
            values = [multiple * 10.0**power for power in powers for multiple in multiples]
            found = [value for value in values if self.low <= value <= self.high]
            if len(found) <= num + 2:
                return found
        return found[:: math.ceil(len(found) / num)]


def chart(report: dict[str, Any], size: tuple[int, int] = SIZE) -> dict[str, Any] | None:
    """Lay out the loss curve for its template; None when no finite loss was logged.

    Training loss as logged (faint) and smoothed, validation losses as dots, the best one labelled; below it the
    learning rate of each part, and what became of pairs. The loss axis is logarithmic if the largest is over LOG_FROM
    times the smallest.
    """
    width, height = size
    train, val = curve(report, "loss_curve"), curve(report, "val_curve")
    if not train and not val:
        return None
    smooth, best, is_narrow = smoothed(train), report.get("best"), width < NARROW
    room = LEGEND if is_narrow else 0.0
    below, block = lower_panels(report), RATE_TOP + RATE_HEIGHT + room
    bottom = height - BOTTOM - (block if below else 0)
    steps = Axis(0, max(step for step, _ in train + val) or 1, LEFT, width - RIGHT)
    losses = loss_axis(train, smooth, val, (bottom, TOP + room))
    lines = [("raw", "as logged", thinned(train))] if len(train) > 2 else []
    lines += [("train", "smoothed" if lines else "training", thinned(smooth)), ("val", "validation", thinned(val))]
    title = "loss, log scale" if losses.is_log else "loss"
    panels = [panel(title, lines, losses, [(tick, number_text(tick)) for tick in losses.ticks(6)])]
    for number, (title, curves) in enumerate(below.items()):
        top = bottom + RATE_TOP + room + number * block
        axis = small_axis(curves, (top + RATE_HEIGHT, top))
        lines = [(f"part{index % 3}", name, thinned(points)) for index, (name, points) in enumerate(curves.items())]
        told = words.rate if title == RATES else number_text
        panels.append(panel(title, lines, axis, [(tick, told(tick)) for tick in axis.ticks(3)]))
    return {
        "width": width,
        "height": height + round(max(0, len(below) - 1) * block),
        "about": describe(train, smooth, val),
        "steps": steps,
        "step_ticks": [tick for tick in steps.ticks(4 if is_narrow else 8) if tick == int(tick)],
        "panels": panels,
        "room": room,  # between a panel's title and what its lines are; 0: all in one line
        "dots": val if len(val) <= MAX_DOTS else [],
        "best": best if best and math.isfinite(best["loss"]) else None,
    }


def lower_panels(report: dict[str, Any]) -> dict[str, dict[str, list[Point]]]:
    """Return what is drawn below the losses: title -> name of a line -> its points."""
    drawn, pairs = {RATES: rate_curves(report)}, report.get("pairs") or {}
    for title, names in PAIR_PANELS.items():
        drawn[title] = {
            name: smoothed([(step, value) for step, value in pairs[key]]) for key, name in names if key in pairs
        }
    return {title: curves for title, curves in drawn.items() if curves}


def small_axis(curves: dict[str, list[Point]], pixels: tuple[float, float]) -> Axis:
    """Choose the range of a small panel: from 0, or as far below it as its values go, in round steps."""
    values = [value for points in curves.values() for _, value in points]
    low, high = min(0.0, *values), max(0.0, *values)
    step = round_step((high - low) / 3 or 1.0)
    return Axis(step * math.floor(low / step + 1e-9), step * max(1, math.ceil(high / step - 1e-9)), *pixels)


def panel(
    title: str, lines: list[tuple[str, str, list[Point]]], axis: Axis, ticks: list[tuple[float, str]]
) -> dict[str, Any]:
    """Lay out one panel: its lines (class, name, points) over an axis of values, without those that have no points."""
    named = [(kind, NOT_XML.sub("", name), points) for kind, name, points in lines if points]
    return {"title": title, "lines": named, "axis": axis, "ticks": ticks}


def loss_svg(report: dict[str, Any], size: tuple[int, int] = SIZE) -> str:
    """Return the loss curve as one <svg> element; "" when no finite loss was logged."""
    drawing = chart(report, size)
    return render("report_chart.svg", chart=drawing, margin=0) if drawing else ""


def write_loss_svg(report: dict[str, Any], path: Path) -> bool:
    """Write the loss curve as an SVG file of its own; return False, writing nothing, when no loss was logged."""
    drawing = chart(report)
    if drawing:
        path.write_text(render("report_chart.svg", chart=drawing, margin=MARGIN), encoding="utf-8")
    return drawing is not None


def curve(report: dict[str, Any], key: str) -> list[Point]:
    """Return the (step, loss) points whose loss is finite, in order; for a step logged twice, the later one."""
    found = {float(entry["step"]): entry.get("loss") for entry in report.get(key) or []}
    return [(step, float(loss)) for step, loss in sorted(found.items()) if loss is not None and math.isfinite(loss)]


def rate_curves(report: dict[str, Any]) -> dict[str, list[Point]]:
    """Return the learning rate by step of each part that is trained."""
    rates: dict[str, list[Point]] = {}
    for entry in report.get("loss_curve") or []:
        for name, value in (entry.get("lr") or {}).items():
            rates.setdefault(name, []).append((float(entry["step"]), float(value)))
    return {name: points for name, points in rates.items() if any(value > 0 for _, value in points)}


def smoothed(points: list[Point]) -> list[Point]:
    """Average each loss with its neighbours, 1/25 of the run wide: a centred mean, which does not lag.

    Toward the start the window shrinks on both sides, so that a steep initial drop stays where it is.
    """
    reach = len(points) // 50
    result = []
    for index, (step, _) in enumerate(points):
        before = min(index, reach)
        near = points[index - before : index + before + 1]
        result.append((step, sum(loss for _, loss in near) / len(near)))
    return result


def thinned(points: list[Point]) -> list[Point]:
    """Keep the lowest and the highest point of each stretch, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    size = 2 * math.ceil(len(points) / MAX_POINTS)
    kept: list[Point] = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return [*kept, points[-1]]


def loss_axis(train: list[Point], smooth: list[Point], val: list[Point], pixels: tuple[float, float]) -> Axis:
    """Choose the range and the kind of the loss axis; the most extreme 1% of single steps may lie outside."""
    single = sorted(loss for _, loss in train)
    cut = len(single) // 100
    shown = [loss for _, loss in smooth + val] + single[cut : len(single) - cut]
    low, high = min(shown), max(shown)
    if low > 0 and high / low > LOG_FROM:
        return Axis(low / 1.15, high * 1.15, *pixels, is_log=True)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    room = 0.06 * (high - low)
    is_near_zero = 0 <= low < 0.5 * high
    return Axis(0.0 if is_near_zero else low - room, high + room, *pixels)


def round_step(step: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten at or above a step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= step * (1 - 1e-9))


def describe(train: list[Point], smooth: list[Point], val: list[Point]) -> str:
    """Describe the curve in words, for readers who cannot see it."""
    parts = []
    if train:
        first, last = words.loss(train[0][1]), words.loss(smooth[-1][1])
        parts.append(f"training loss from {first} to {last} in {train[-1][0]:,.0f} steps")
    if val:
        parts.append(f"validation loss from {words.loss(val[0][1])} to {words.loss(val[-1][1])}")
    return "; ".join(parts)


def number_text(value: float) -> str:
    """Format a tick of the loss axis."""
    return f"{value:,.10g}" if 0.001 <= abs(value) < 1e5 else words.rate(value)
