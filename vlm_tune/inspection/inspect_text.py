"""What the model sees of one row, in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_tune.inspection.inspect_row import CONTEXT, IMAGE, SUPERVISED, Pack, Seen, SeenPicture, Token, runs_of
from vlm_tune.words import counted

STYLES = {SUPERVISED: "bold green", CONTEXT: "", IMAGE: "magenta"}
BAR = 60  # characters of a whole pack


def print_text(seen: Seen, console: Console) -> None:
    """Print pictures, tokens and pack."""
    identity = f"row {seen.row} from 0"
    console.print(Text.assemble((f'{seen.sample.where} (id "{seen.sample.id}")', "bold"), f", {identity}"))
    for name, value in facts(seen).items():
        console.print(Text(f"  {name:11} {value}"), soft_wrap=True)
    for picture in seen.pictures:
        console.print(Text(f"\n{picture.name}: {describe(picture)}"), soft_wrap=True)
        for line in draw_grid(picture):
            console.print(Text(f"  {line}", STYLES[IMAGE]))
    console.print(token_table(seen.tokens, "tokens"))
    if seen.rejected:
        console.print(token_table(seen.rejected, "rejected answer"))
    if seen.pack is not None:
        console.print(Text(f"\n{pack_title(seen.pack)}"), soft_wrap=True)
        console.print(pack_table(seen.pack))


def facts(seen: Seen) -> dict[str, str]:
    """Describe the sizes of the row in words."""
    example, num_tiles = seen.example, sum(seen.example.num_tiles)
    told = {"tokens": f"{len(example.input_ids):,} of {seen.settings['limit']}"}
    told["supervised"] = f"{example.num_supervised:,}, {example.num_supervised / len(example.input_ids):.1%}"
    if num_tiles:
        told["tiles"] = f"{num_tiles:,} of {seen.settings['tokens_per_tile']} tokens each"
    if seen.markup:
        told["markup"] = ", ".join(f"{name} {count}" for name, count in seen.markup.items()) + ": one token each"
    if example.note:
        told["policy"] = example.note
    told["template"] = f"{seen.settings['template']} (model={seen.settings['model']})"
    return told


def describe(picture: SeenPicture) -> str:
    """Describe how a picture is cut."""
    width, height = picture.image.size
    columns, rows = picture.grid
    pad = ", padded" if max(picture.canvas[2] - width, picture.canvas[3] - height) > 0.5 else ""
    whole = " and the whole picture" if picture.overview is not None else ""
    return f"{width} x {height} pixels{pad}, cut {columns} x {rows}{whole}: {counted(len(picture.tiles), 'tile')}"


def grid_numbers(picture: SeenPicture) -> list[int]:
    """Number the tiles of the grid, row by row, in the order of the sequence."""
    return [picture.first + place for place in range(len(picture.tiles)) if place != picture.overview]


def draw_grid(picture: SeenPicture) -> list[str]:
    """Draw the grid with the numbers of its tiles."""
    columns, _ = picture.grid
    numbers = grid_numbers(picture)
    rows = [numbers[start : start + columns] for start in range(0, len(numbers), columns)]
    lines = [" ".join(f"[{number:^4}]" for number in row) for row in rows]
    if picture.overview is not None:
        lines.append(f"[{picture.first + picture.overview:^4}] whole picture")
    return lines


def token_table(tokens: list[Token], title: str) -> Table:
    """List the runs of tokens of one kind: position, kind and text."""
    table = Table("position", "tokens", "kind", "text", title=f"\n{title}", title_justify="left", box=None)
    table.columns[0].justify = table.columns[1].justify = "right"
    position = 0
    for kind, tile, run in runs_of(tokens):
        text = f"tile {tile}" if tile else "".join(token.text for token in run)
        shown = text if tile else text.replace("\n", "⏎\n").removesuffix("\n")
        table.add_row(str(position), str(len(run)), Text(kind, STYLES[kind]), Text(shown, STYLES[kind]))
        position += len(run)
    return table


def pack_title(pack: Pack) -> str:
    """Describe which forward pass it is and how full it is."""
    part = f"optimizer step {pack.step} of the first epoch" if pack.step else "validation"
    tokens, tiles = (sum(getattr(row, name) for row in pack.rows) for name in ("tokens", "tiles"))
    num = counted(len(pack.rows), "row")
    if not pack.is_packed:
        longest = max(row.tokens for row in pack.rows)
        return f"batch in {part}: {num}, {tokens:,} tokens, each padded to {longest:,}"
    fill = f"{tokens:,} of {pack.budget[0]:,} tokens ({tokens / pack.budget[0]:.0%})"
    title = f"pack in {part}: {num}, {fill}, {tiles:,} of {pack.budget[1]:,} tiles"
    return f"{title}; rows of one picture share the tokens that they begin with" if pack.is_shared else title


def pack_table(pack: Pack) -> Table:
    """List the rows of a pack in their order, with their shares of it."""
    table = Table("", "row", "tokens", "supervised", "tiles", *(["shared"] if pack.is_shared else []), "", box=None)
    for column in table.columns[2:-1]:
        column.justify = "right"
    whole = pack.budget[0] if pack.is_packed else max(row.tokens for row in pack.rows)
    for row in pack.rows:
        bar = "█" * max(1, round(BAR * row.tokens / whole))
        style = "bold" if row.is_this else ""
        cells = [f"{row.tokens:,}", f"{row.supervised:,}", f"{row.tiles:,}"]
        if pack.is_shared:
            cells.append(f"{row.shared:,}" if row.shared else "")
        table.add_row("->" if row.is_this else "", Text(row.where), *cells, bar, style=style)
    return table
