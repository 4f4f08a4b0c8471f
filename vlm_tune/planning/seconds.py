"""How long operations take: on a GPU by its published rates, on this machine's CPU by running each kind once."""

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml

from vlm_tune.errors import ConfigError
from vlm_tune.model.find_batch import available_bytes
from vlm_tune.model.flops import GPUS
from vlm_tune.model.kernels.freed import keep_freed_memory
from vlm_tune.planning.ledger import Operation, Shape
from vlm_tune.planning.rehearsal import Needs

GIB = 2**30
PRODUCTS, BANDWIDTH = 0.6, 0.75  # what kernels reach of the published rates
LAUNCH = 6e-6  # seconds between two kernels
CONTEXT = 0.9  # GiB that a GPU's own library, its products and its allocator keep
LARGEST = 2**29  # bytes of an operation that is run to be timed
CACHES = 2**28  # bytes: more than a processor's caches keep; what a step reads has mostly gone from there
NEAR = 2**18  # bytes: so little is still in them
COPIES = 64  # of an operation's tensors, at most
REPEATS = 3
AROUND = 3e-5  # seconds that Python, autograd and autocast take for an operation in a step, beside it (measured)


@dataclass(frozen=True)
class Gpu:
    """A graphics card: what its maker says of it."""

    name: str
    gib: float
    tflops: float  # dense, bf16
    gb_per_s: float

    def seconds(self, operations: Counter[Operation]) -> float:
        """Take the longer of arithmetic and memory for each operation."""
        total = 0.0
        for each, count in operations.items():
            rate = self.tflops * 1e12 * PRODUCTS / (1 if each.is_half else 8)
            total += count * max(each.flops / rate, each.moved / (self.gb_per_s * 1e9 * BANDWIDTH), LAUNCH)
        return total


@dataclass
class Cpu:
    """This machine: each kind of operation is run on numbers of no meaning, once to warm up and then timed.

    What is too large to be run, or does not suit such numbers, takes the longer of arithmetic and memory, at the rates
    of those that were run.
    """

    name: str = "this CPU"
    clock: Callable[[], float] = time.perf_counter
    known: dict[Operation, float | None] = field(default_factory=dict)

    @property
    def gib(self) -> float:
        """Memory of this machine that nothing else uses."""
        return available_bytes() / GIB

    def seconds(self, operations: Counter[Operation]) -> float:
        """Add up the times of all, and what surrounds each of them in a step."""
        keep_freed_memory()
        for each in operations:
            if each not in self.known:
                self.known[each] = timed(each, self.clock) if each.moved < LARGEST else None
        total = sum(count * (AROUND + (self.known[each] or 0)) for each, count in operations.items())
        rest = {each: count for each, count in operations.items() if self.known[each] is None}
        if not rest:
            return total
        arithmetic, memory = self.rates()
        return total + sum(count * max(each.flops / arithmetic, each.moved / memory) for each, count in rest.items())

    def rates(self) -> tuple[float, float]:
        """Return operations a second of the products that were run, and bytes a second of a large copy."""
        products = [(each.flops, known) for each, known in self.known.items() if each.flops and known]
        arithmetic = sum(flops for flops, _ in products) / sum(known for _, known in products) if products else 1e11
        large = Shape((2**25,), (1,), torch.float32)
        copy = Operation(torch.ops.aten.clone.default, (large,), (), 0, 2**28, False)
        return arithmetic, copy.moved / (timed(copy, self.clock) or 1)


def timed(operation: Operation, clock: Callable[[], float]) -> float | None:
    """Run an operation on real tensors, not the same ones twice in a row: a step does not find them in its caches.

    None where numbers of no meaning do not suit it.
    """
    count = max(1, min(COPIES, CACHES // operation.moved)) if operation.moved > NEAR else 1
    try:
        copies = [
            (real(operation.arguments), {key: real(value) for key, value in operation.options}) for _ in range(count)
        ]
        with torch.no_grad():
            found = []
            for _ in range(REPEATS + 1):
                start = clock()
                for args, options in copies:
                    operation.call(*args, **options)
                found.append((clock() - start) / count)
        return sorted(found[1:])[REPEATS // 2]
    except (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError):
        return None


def real(value: Any) -> Any:
    """Make tensors of shapes: small numbers, and zeros for whole ones, which may be places."""
    if isinstance(value, Shape):
        made = torch.empty_strided(value.size, value.stride, dtype=value.dtype)
        return made.fill_(0.01 if value.dtype.is_floating_point else 0) if 0 not in value.stride else made.zero_()
    if isinstance(value, tuple):
        return [real(each) for each in value]
    return value


def step_seconds(needs: Needs, device: Gpu | Cpu) -> float:
    """Seconds of one optimizer step."""
    return needs.num_micro * device.seconds(needs.micro) + device.seconds(needs.update)


def find_gpu(wanted: str) -> Gpu:
    """Find a card by its name, or one of a size: `24GB`. Raise ConfigError for what is neither."""
    listed = yaml.safe_load(GPUS.read_text(encoding="utf-8"))
    cards = {name: Gpu(name, **facts) for name, facts in listed.items()}
    if wanted.lower() in cards:
        return cards[wanted.lower()]
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|GiB|G)?", wanted, re.IGNORECASE)
    if size is None or float(size[1]) <= 0:
        raise ConfigError(f"gpu={wanted}: no such card. Give its memory, as in gpu=24GB, or one of {', '.join(cards)}")
    gib = float(size[1])
    alike = next((card for card in cards.values() if card.gib >= gib), list(cards.values())[-1])
    return replace(alike, name=f"{gib:g} GB (time of {alike.name})", gib=gib)


def this_gpu() -> Gpu | None:
    """Describe the card of this machine; its time is that of the listed card of its name, or else of its size."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    gib = facts.total_memory / GIB
    name = re.sub(r"\W", "", facts.name.lower())
    listed = yaml.safe_load(GPUS.read_text(encoding="utf-8"))
    alike = next((card for card in sorted(listed, key=len, reverse=True) if card.split("_")[0] in name), None)
    return replace(find_gpu(alike or f"{gib:.0f}GB"), name=facts.name, gib=gib)
