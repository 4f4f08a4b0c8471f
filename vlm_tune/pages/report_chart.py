"""Draw a run's loss curve, with the learning rates below it, as SVG: for the report's page and as its own file."""

import html
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

Point = tuple[float, float]  # (optimizer step, value)

MAX_DOTS = 40  # validation losses; more are drawn as a line alone
MAX_POINTS = 600  # of a drawn line: more than a screen's pixels would only make the file larger
LOG_FROM = 8.0  # largest loss / smallest: from here on a linear axis shows the first steps and nothing else
NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

SIZE = (880, 420)  # pixels
NARROW = 500  # pixels: a drawing below this width has fewer ticks, and its legends in a line of their own
LEFT, RIGHT, TOP, BOTTOM = 48.0, 14.0, 34.0, 42.0  # pixels around the panels
RATE_TOP, RATE_HEIGHT, LEGEND = 40.0, 56.0, 18.0


@dataclass(frozen=True)
class Axis:
    """Map the values low..high to the pixels start..end."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value; what lies beyond the axis is drawn at its end."""
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


def loss_svg(report: dict[str, Any], size: tuple[int, int] = SIZE) -> str:
    """Return the loss curve as one <svg> element; "" when no finite loss was logged.

    Training loss as logged (faint) and smoothed, validation losses as dots, the best one named; below it the
    learning rate of each part. The loss axis is logarithmic where the losses span more than LOG_FROM times. The text is
    12 pixels high at `size`: a page shows a narrow drawing on a phone rather than a wide one made small.
    """
    width, height = size
    train, val = curve(report, "loss_curve"), curve(report, "val_curve")
    if not train and not val:
        return ""
    rates = rate_curves(report)
    is_narrow = width < NARROW
    room = LEGEND if is_narrow else 0.0
    bottom = height - BOTTOM - (RATE_TOP + RATE_HEIGHT + room if rates else 0)
    smooth = smoothed(train)
    steps = Axis(0, max(step for step, _ in train + val) or 1, LEFT, width - RIGHT)
    losses = loss_axis(train, smooth, val, (bottom, TOP + room))
    parts = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{describe(train, smooth, val)}</title>",
        *frame(steps, losses, 6, number_text),
        line("raw", thinned(train), steps, losses) if len(train) > 2 else "",
        line("train", thinned(smooth), steps, losses),
        *validation(val, report.get("best"), steps, losses),
        legend("loss, log scale" if losses.is_log else "loss", loss_entries(train, val), 16, room),
    ]
    if rates:
        top = bottom + RATE_TOP + room
        highest = max(value for points in rates.values() for _, value in points)
        step = round_step(highest / 3)
        rate = Axis(0, step * math.ceil(highest / step - 1e-9), top + RATE_HEIGHT, top)
        parts += frame(steps, rate, 3, rate_text)
        parts += [line(f"part{index % 3}", thinned(points), steps, rate) for index, points in enumerate(rates.values())]
        entries = [(f"part{index % 3}", name) for index, name in enumerate(rates)]
        parts.append(legend("learning rate", entries, top - 16 - room, room))
    parts += step_labels(steps, height - BOTTOM, 4 if is_narrow else 8)
    return "\n".join(filter(None, parts)) + "\n</svg>"


def write_loss_svg(report: dict[str, Any], path: Path) -> bool:
    """Write the loss curve as an SVG file of its own; return False, writing nothing, when no loss was logged."""
    svg = loss_svg(report)
    if svg:
        margin, (width, height) = 20, SIZE
        box = f"{-margin} {-margin} {width + 2 * margin} {height + 2 * margin}"
        paper = f'<rect class="paper" x="{-margin}" y="{-margin}" width="100%" height="100%"/>'
        svg = svg.replace(f'viewBox="0 0 {width} {height}"', f'viewBox="{box}" width="{width}" height="{height}"', 1)
        svg = svg.replace("<title>", f"<style>\n{chart_css()}</style>\n{paper}\n<title>", 1)
        path.write_text(svg + "\n", encoding="utf-8")
    return bool(svg)


def chart_css() -> str:
    """Return the drawing's colours, for light and dark."""
    return resources.files("vlm_tune.pages").joinpath("report_chart.css").read_text(encoding="utf-8")


def curve(report: dict[str, Any], key: str) -> list[Point]:
    """Return the (step, loss) points whose loss is a finite number, in order; of a step logged twice, the later one."""
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
    """Average each loss with its neighbours, 1/25 of the run wide: a centred mean, which does not lag as a running one.

    Toward the start the window shrinks on both sides, so that a steep first fall stays where it is.
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
    """Choose the range and the kind of the loss axis; the rarest 1% of single steps may leave it."""
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


def frame(steps: Axis, values: Axis, num_ticks: int, text: Callable[[float], str]) -> Iterable[str]:
    """Draw a panel's grid lines with their values, and the axis at its foot."""
    for tick in values.ticks(num_ticks):
        y = values.place(tick)
        yield f'<line class="grid" x1="{steps.start:.0f}" x2="{steps.end:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{steps.start - 8:.0f}" y="{y + 4:.1f}" text-anchor="end">{text(tick)}</text>'
    yield f'<line class="axis" x1="{steps.start:.0f}" x2="{steps.end:.0f}" y1="{values.start}" y2="{values.start}"/>'


def step_labels(steps: Axis, top: float, num: int) -> Iterable[str]:
    """Write the optimizer steps below the lowest panel."""
    for tick in steps.ticks(num):
        if tick == int(tick):
            anchor = "end" if steps.place(tick) > steps.end - 12 else "middle"
            yield f'<text x="{steps.place(tick):.1f}" y="{top + 18:.0f}" text-anchor="{anchor}">{tick:,.0f}</text>'
    centre = (steps.start + steps.end) / 2
    yield f'<text x="{centre:.0f}" y="{top + 36:.0f}" text-anchor="middle">optimizer step</text>'


def line(name: str, points: list[Point], steps: Axis, values: Axis) -> str:
    """Draw one line, or a ring where there is but one point."""
    places = [(f"{steps.place(step):.1f}", f"{values.place(value):.1f}") for step, value in points]
    if len(places) == 1:
        return f'<circle class="{name} line" cx="{places[0][0]}" cy="{places[0][1]}" r="3"/>'
    return f'<polyline class="{name} line" points="{" ".join(map(",".join, places))}"/>' if places else ""


def validation(val: list[Point], best: dict[str, Any] | None, steps: Axis, losses: Axis) -> Iterable[str]:
    """Draw the validation losses, each with its value as a tooltip, and name the best."""
    yield line("val", thinned(val), steps, losses)
    for step, loss in val if len(val) <= MAX_DOTS else []:
        place = f'cx="{steps.place(step):.1f}" cy="{losses.place(loss):.1f}"'
        title = f"<title>step {step:,.0f}: validation {loss_text(loss)}</title>"
        yield f'<circle class="dot" {place} r="4">{title}</circle>'
    if best and math.isfinite(best["loss"]):
        x, y = steps.place(best["step"]), losses.place(best["loss"])
        share = (x - steps.start) / (steps.end - steps.start)
        anchor = "start" if share < 0.2 else "end" if share > 0.8 else "middle"
        above = y - 14 if y - 14 > losses.end else y + 24
        yield f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="8"/>'
        text = f"best {loss_text(best['loss'])} at step {best['step']:,.0f}"
        yield f'<text class="note" x="{x:.1f}" y="{above:.1f}" text-anchor="{anchor}">{text}</text>'


def loss_entries(train: list[Point], val: list[Point]) -> list[tuple[str, str]]:
    """Return (class, name) of the lines of the loss panel."""
    entries = [("raw", "as logged"), ("train", "smoothed")] if len(train) > 2 else [("train", "training")]
    return (entries if train else []) + ([("val", "validation")] if val else [])


def legend(title: str, entries: list[tuple[str, str]], y: float, below: float) -> str:
    """Write a panel's title and, after it or as many pixels below it, what each line is."""
    parts, x = [f'<text class="title" x="0" y="{y:.0f}">{title}</text>'], 7.0 * len(title) + 14
    if below:
        x, y = 0.0, y + below
    for name, label in entries:
        label = html.escape(NOT_XML.sub("", label))
        parts.append(f'<line class="{name} line" x1="{x:.0f}" x2="{x + 16:.0f}" y1="{y - 4:.0f}" y2="{y - 4:.0f}"/>')
        parts.append(f'<text x="{x + 21:.0f}" y="{y:.0f}">{label}</text>')
        x += 36 + 7.0 * len(label)
    return "\n".join(parts)


def describe(train: list[Point], smooth: list[Point], val: list[Point]) -> str:
    """Say the curve in words, for those who do not see it."""
    parts = []
    if train:
        first, last = loss_text(train[0][1]), loss_text(smooth[-1][1])
        parts.append(f"training loss from {first} to {last} in {train[-1][0]:,.0f} steps")
    if val:
        parts.append(f"validation loss from {loss_text(val[0][1])} to {loss_text(val[-1][1])}")
    return "; ".join(parts)


def loss_text(loss: float) -> str:
    """Write a loss with three digits that count: 0.164, 2.00, 12,345."""
    return f"{loss:#.3g}".rstrip(".") if abs(loss) < 999.5 else f"{loss:,.0f}"


def number_text(value: float) -> str:
    """Write a tick of the loss axis."""
    return f"{value:,.10g}" if 0.001 <= abs(value) < 1e5 else rate_text(value)


def rate_text(value: float) -> str:
    """Write a learning rate, or another small or large number, as people do: 2e-4, 1.5e-5, 0."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
