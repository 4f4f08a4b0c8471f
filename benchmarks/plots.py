"""Small charts as SVG: panels of one line each, and bars of shares."""

from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 280, 220, 56, 44, 30
STYLE = "<style>text{font:12px sans-serif;fill:#333}path{fill:none;stroke:#2a6;stroke-width:2}</style>"


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    """Write words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def page(width: float, height: float, body: list[str]) -> str:
    """Put the parts of a picture together, on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, STYLE, '<rect width="100%" height="100%" fill="#fff"/>', *body, "</svg>\n"])


def lines(panels: dict[str, list[tuple[float, float]]], unit: str) -> str:
    """Draw one panel beside the other: x by name, y from zero, of one unit and scale."""
    top = 1.15 * max(value for points in panels.values() for _, value in points)
    body = []
    for number, (name, points) in enumerate(panels.items()):
        left, right = LEFT + number * WIDTH, (number + 1) * WIDTH - 16
        low, high = points[0][0], points[-1][0]
        places = [
            (
                left + 12 + (x - low) / (high - low) * (right - left - 36),
                HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - TOP),
            )
            for x, y in points
        ]
        body.append(f'<path d="M{" L".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        body.append(f'<path d="M{left},{TOP} V{HEIGHT - BOTTOM} H{right}" style="stroke:#999;stroke-width:1"/>')
        for (x, y), (value, height) in zip(places, points, strict=True):
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#2a6"/>', text(x, y - 8, f"{height:,.0f}")]
            body.append(text(x, HEIGHT - BOTTOM + 16, f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k"))
        body.append(text((left + right) / 2, HEIGHT - 8, name))
    return page(len(panels) * WIDTH, HEIGHT, [text(8, 16, unit, "start"), *body])


def bars(shares: dict[str, float], title: str) -> str:
    """Draw shares of a whole, largest first."""
    whole, body = sum(shares.values()), [text(8, 16, title, "start")]
    for row, (name, value) in enumerate(sorted(shares.items(), key=lambda item: -item[1])):
        y = 32 + row * 28
        body.append(f'<rect x="190" y="{y}" width="{value / whole * 380:.1f}" height="18" fill="#2a6"/>')
        body += [
            text(182, y + 14, name, "end"),
            text(196 + value / whole * 380, y + 14, f"{value / whole:.0%}", "start"),
        ]
    return page(640, 40 + 28 * len(shares), body)
