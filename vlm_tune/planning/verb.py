"""The verb `plan`: ask the parts of this folder, and print what they say."""

import sys

from rich.console import Console

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import Config
from vlm_tune.errors import ConfigError
from vlm_tune.planning.fit import joined, make_fit
from vlm_tune.planning.longest import longest_packs
from vlm_tune.planning.plan import open_run
from vlm_tune.planning.seconds import Cpu, Gpu, find_gpu, step_seconds, this_gpu
from vlm_tune.planning.show import show_fit, show_longest, show_memory, show_time, total_gib


def plan(own: dict[str, str], overrides: list[str], console: Console) -> int:
    """Print what a run needs; with `fit` only the overrides that make it fit. Return 1 where it does not fit."""
    config = load_config(overrides)
    device = find_device(own["gpu"], config)
    if own["fit"] == "true":
        return print_overrides(config, device, overrides)
    many = config.trainer.devices * config.trainer.nodes
    where = f"{many} x {device.name}" if many > 1 else device.name
    console.print(f"[bold]{config.stage.name}[/] of [bold]{config.model.name}[/] on {where}", markup=True)
    with open_run(config, isinstance(device, Gpu)) as run:
        for note in (run.work.said, *run.notes):
            console.print(f"  {note}", soft_wrap=True)
        needs = run.needs()
        show_memory(console, needs, device)
        show_time(console, needs, step_seconds(needs, device), (run.work.num_steps, run.work.tokens_per_step))
        if config.stage.packing:
            show_longest(console, longest_packs(run, device.gib, lambda needs: total_gib(needs, device)))
    total = total_gib(needs, device)
    if total <= device.gib:
        return 0
    show_fit(console, make_fit(config, device.gib, lambda more: peak([*overrides, *more], device), total), device.gib)
    return 1


def print_overrides(config: Config, device: Gpu | Cpu, overrides: list[str]) -> int:
    """Print one line for a command line; raise ConfigError where nothing makes the run fit."""
    start = peak(overrides, device)
    chosen = make_fit(config, device.gib, lambda more: peak([*overrides, *more], device), start)
    least = chosen[-1].gib if chosen else start
    if least > device.gib:
        raise ConfigError(
            f"{config.stage.name} of {config.model.name} needs {least:.1f} GiB at least, and {device.name} has "
            f"{device.gib:.1f}: take a smaller model or a larger device"
        )
    sys.stdout.write(" ".join(joined(chosen)) + "\n")
    return 0


def peak(overrides: list[str], device: Gpu | Cpu) -> float:
    """Count the GiB of a run."""
    with open_run(load_config(overrides), isinstance(device, Gpu)) as run:
        return total_gib(run.needs(), device)


def find_device(wanted: str, config: Config) -> Gpu | Cpu:
    """Take the card that is asked for, else this machine's, else its CPU."""
    if wanted:
        return find_gpu(wanted)
    return (None if config.trainer.accelerator == "cpu" else this_gpu()) or Cpu()
