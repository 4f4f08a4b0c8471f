"""What a plan says in the terminal."""

from collections.abc import Iterable

from rich.console import Console

from vlm_tune.console import duration
from vlm_tune.planning.fit import Remedy
from vlm_tune.planning.longest import MOST
from vlm_tune.planning.rehearsal import KINDS, Needs
from vlm_tune.planning.seconds import CONTEXT, GIB, Cpu, Gpu

WIDTH = 36  # of the bars
MEANING = {
    "weights": "trained ones in float32",
    "gradients": "of what is trained",
    "optimizer": "two moments of each",
    "activations": "kept for the backward pass",
    "logits": "a chunk of supervised tokens",
    "workspace": "used in between",
    "gaps": "between blocks of the heap: an estimate",
    "checkpoint": "a copy of what is trained, while it is written",
    "device": "its library, its allocator",
}


def total_gib(needs: Needs, device: Gpu | Cpu) -> float:
    """Add what the device itself keeps to what the run needs, in GiB."""
    return needs.total / GIB + (CONTEXT if isinstance(device, Gpu) else 0)


def show_memory(console: Console, needs: Needs, device: Gpu | Cpu) -> None:
    """Print each share of the peak as a bar, and whether the sum fits."""
    sizes = {kind: needs.sizes[kind] / GIB for kind in KINDS}
    if isinstance(device, Gpu):
        del sizes["gaps"], sizes["checkpoint"]  # part of what the allocator keeps; in the host's memory
        sizes["device"] = CONTEXT
    total = total_gib(needs, device)
    console.print("\n[bold]memory[/] at the peak of a step, GiB on one device", markup=True)
    for kind, size in sizes.items():
        bar = "█" * round(WIDTH * size / total)
        console.print(f"  {kind:12}{size:8.2f}  [cyan]{bar:{WIDTH}}[/]  [dim]{MEANING[kind]}[/]", markup=True)
    verdict = "[green]fits[/]" if total <= device.gib else "[red]does not fit[/]"
    console.print(f"  [bold]{'sum':12}{total:8.2f}[/]  of {device.gib:.1f}: {verdict}", markup=True)


def show_time(console: Console, needs: Needs, seconds: float, steps: tuple[int | None, float]) -> None:
    """Print arithmetic and time; `steps` are those of the run, and the tokens of each."""
    num_steps, tokens = steps
    console.print("\n[bold]time[/]", markup=True)
    console.print(f"  arithmetic  {needs.flops / 1e12:,.2f} TFLOP a step of each device")
    console.print(f"  a step      {spoken(seconds)}, {tokens / seconds:,.0f} tokens a second")
    if num_steps is not None:
        said = f"{num_steps:,} steps, {spoken(num_steps * seconds)} without validation and reports"
        console.print(f"  the run     {said}")


def show_longest(console: Console, packs: Iterable[tuple[bool | str, int]]) -> None:
    """Print the longest pack that fits with each way, as each is found."""
    console.print("\n[bold]longest pack[/] that fits, full, with tiles in the settings' share", markup=True)
    for way, length in packs:
        said = "none" if not length else f"{length:,} tokens" if length < MOST else f"{MOST:,} tokens or more"
        console.print(f"  stage.gradient_checkpointing.llm={str(way).lower():8}{said:>26}")


def show_fit(console: Console, chosen: list[Remedy], gib: float) -> None:
    """Print the settings that make a run fit, each with what it costs and the peak that is left."""
    if not chosen:
        console.print("\nNo setting makes it smaller: take a smaller model or a larger device.")
        return
    fits = chosen[-1].gib <= gib
    head = "[bold]it fits with[/]" if fits else "[bold]it does not fit[/] even with"
    console.print(f"\n{head}, cheapest first", markup=True)
    width = max(len(" ".join(each.overrides)) for each in chosen)
    for each in chosen:
        settings = " ".join(each.overrides)
        console.print(f"  {settings:{width}}  -> {each.gib:6.2f} GiB  [dim]{each.cost}[/]", soft_wrap=True, markup=True)


def spoken(seconds: float) -> str:
    """Write a time, of a short one the hundredths too: 0.42 s, 12 s, 3 min 20 s, 5 h 10 min."""
    return f"{seconds:.2f} s" if seconds < 10 else duration(seconds)
