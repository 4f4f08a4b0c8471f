"""What the model sees of one row, as one HTML page."""

from pathlib import Path

from PIL import Image

from vlm_tune.inspection.inspect_row import CONTEXT, IMAGE, SUPERVISED, Pack, Seen, SeenPicture, Token, runs_of
from vlm_tune.inspection.inspect_text import describe, grid_numbers, pack_title
from vlm_tune.pages.page import escape, fact_list, panel, picture_url, section, table, tile, tiles, write_page

MAX_SIDE = 1200  # pixels of a picture in the page
TILE_SIDE = 224  # pixels of a tile in the page, for dense screens
MAX_TILES = 64  # of one row in the page
MAX_TOKENS = 3000  # lines of the table of all tokens; image tokens are one line a tile

LEGEND = {
    SUPERVISED: "supervised: the model is trained to say this",
    CONTEXT: "context: it reads this",
    IMAGE: "image: features of a tile take these places",
}


def write_html(seen: Seen, path: Path) -> None:
    """Write the page of a row."""
    told = [seen.sample.where, f"row {seen.row:,}, counted from 0"]
    told += [f"{name} {seen.settings[name]}" for name in ("model", "template")]
    pack = seen.pack
    main = [
        tiles(headline(seen)),
        section("Pictures", "".join(panel(picture_html(picture), "picture") for picture in seen.pictures)),
        section("Tokens", panel(legend() + sequence(seen.tokens))),
        section("In the pack", panel(pack_html(pack)) if pack else "", pack_title(pack) + "." if pack else ""),
        token_list(seen),
    ]
    blocks = {"heading": seen.sample.id, "facts": fact_list(told), "main": "\n".join(main)}
    write_page(path, "inspect", blocks | {"footer": "The same in the terminal: --text."})


def headline(seen: Seen) -> list[str]:
    """Show the sizes of the row."""
    example = seen.example
    num_tokens, num_tiles = len(example.input_ids), sum(example.num_tiles)
    found = [tile("tokens", f"{num_tokens:,}", f"of at most {int(seen.settings['max_tokens']):,}")]
    share = f"{example.num_supervised / num_tokens:.1%} of the tokens"
    found.append(tile("supervised", f"{example.num_supervised:,}", share, "good"))
    if num_tiles:
        of = f"of {len(seen.pictures):,} picture{'s' * (len(seen.pictures) > 1)}"
        found.append(tile("tiles", f"{num_tiles:,}", f"{of}, {seen.settings['tokens_per_tile']} tokens each"))
    if example.note:
        policy, _, what = example.note.partition(": ")
        found.append(tile("too long", policy, what, "bad"))
    return found


def picture_html(picture: SeenPicture) -> str:
    """Show a picture with the borders of its tiles, and each tile as it is cut."""
    shown = range(min(len(picture.tiles), max(0, MAX_TILES - picture.first + 1)))
    cut = "".join(
        f'<figure><img src="{picture_url(Image.fromarray(picture.tiles[place]), TILE_SIDE)}" alt=""><figcaption>'
        f"{picture.first + place}{' whole' * (place == picture.overview)}</figcaption></figure>"
        for place in shown
    )
    more = len(picture.tiles) - len(shown)
    note = f'<p class="quiet">{more:,} more tiles are left out of this page.</p>' if more else ""
    title = f'<h3>{escape(picture.name)}</h3><p class="quiet">{escape(describe(picture))}</p>'
    return f'{title}<div class="both"><div>{placed(picture)}</div><div class="cut">{cut}</div></div>{note}'


def placed(picture: SeenPicture) -> str:
    """Draw the picture with the grid over it, in pixels of the picture; around it where it is padded."""
    left, top, wide, high = picture.canvas
    width, height = picture.image.size
    columns, rows = picture.grid
    lines, labels, size = [], [], min(wide / columns, high / rows)
    for place, number in enumerate(grid_numbers(picture)):
        x, y = left + place % columns * wide / columns, top + place // columns * high / rows
        lines.append(f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide / columns:.2f}" height="{high / rows:.2f}"/>')
        labels.append(f'<text x="{x + size * 0.06:.2f}" y="{y + size * 0.2:.2f}">{number}</text>')
    return (
        f'<svg viewBox="{left:.2f} {top:.2f} {wide:.2f} {high:.2f}" role="img" font-size="{size * 0.15:.2f}">'
        f"<title>{escape(describe(picture))}</title>"
        f'<image href="{picture_url(picture.image, MAX_SIDE)}" x="0" y="0" width="{width}" height="{height}"/>'
        f"<g>{''.join(lines)}</g>{''.join(labels)}</svg>"
    )


def legend() -> str:
    """Explain the colours."""
    entries = "".join(f'<li><i class="{kind}"></i>{escape(meaning)}</li>' for kind, meaning in LEGEND.items())
    return f'<ul class="legend">{entries}</ul>'


def sequence(tokens: list[Token]) -> str:
    """Colour the sequence: one box a token, one a tile."""
    boxes, position = [], 0
    for kind, number, run in runs_of(tokens):
        if number:
            hint = f"positions {position:,} to {position + len(run) - 1:,}"
            boxes.append(f'<span class="{kind} whole" title="{hint}">tile {number} × {len(run):,}</span>')
        else:
            boxes += [token_box(token, position + place) for place, token in enumerate(run)]
        position += len(run)
    return f'<div class="sequence">{"".join(boxes)}</div>'


def token_box(token: Token, position: int) -> str:
    """Show one token; a line end is seen and ends the line."""
    text = escape(token.text).replace("\n", '<b class="end">⏎</b>\n') or "⋯"
    return f'<span class="{token.kind}" title="{escape(f"{position}: id {token.id}, {token.kind}")}">{text}</span>'


def pack_html(pack: Pack) -> str:
    """Draw a pack to scale, and list its rows."""
    whole = pack.budget[0] if pack.is_packed else max(row.tokens for row in pack.rows)
    lines = [
        [
            f'<div class="place">{escape(row.where)}{"<span>this row</span>" if row.is_this else ""}</div>',
            f"{row.tokens:,}",
            f"{row.supervised:,}",
            f"{row.tiles:,}",
        ]
        for row in pack.rows
    ]
    listed = table(["row", "tokens", "supervised", "tiles"], lines, (1, 2, 3))
    bars = [
        f'<i class="{"this" if row.is_this else ""}" style="width:{100 * row.tokens / whole:.3f}%"'
        f' title="{escape(row.where)}: {row.tokens:,} tokens"></i>'
        for row in pack.rows
    ]
    if pack.is_packed:
        return f'<div class="pack">{"".join(bars)}</div>{listed}'
    return "".join(f'<div class="pack">{bar}</div>' for bar in bars) + listed


def token_list(seen: Seen) -> str:
    """Fold away the table of all tokens with their ids and labels."""
    rows, position = [], 0
    for kind, number, run in runs_of(seen.tokens):
        if number:
            last = position + len(run) - 1
            rows.append([f"{position}–{last}", str(run[0].id), "–", kind, f"tile {number}"])
        else:
            for place, token in enumerate(run, position):
                label = str(token.id) if kind == SUPERVISED else "–"
                rows.append([str(place), str(token.id), label, kind, f"<code>{escape(repr(token.text)[1:-1])}</code>"])
        position += len(run)
    more = f'<p class="quiet">The first {MAX_TOKENS:,} of {len(rows):,} lines.</p>' if len(rows) > MAX_TOKENS else ""
    listed = table(["position", "id", "label", "kind", "text"], rows[:MAX_TOKENS], (0, 1, 2))
    return f"<details><summary>All tokens with ids and labels</summary><div>{listed}{more}</div></details>"
