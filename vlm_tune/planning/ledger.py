"""Write down what a piece of work allocates, frees and computes, operation by operation, on fake tensors."""

import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry, register_flop_formula

FAKED = 2**18  # elements from which a new tensor is made without numbers; smaller ones may be asked for their values
VIEWS = ("_unsafe_view", "_reshape_alias")  # whose schema does not say so
RESHAPING = ("resize", "set_", "t_", "transpose", "squeeze", "unsqueeze", "swap", "as_strided", "copy_")
CPU = torch.device("cpu")
GROUPED = torch.ops.aten._grouped_mm
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Shape(NamedTuple):
    """A tensor without its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Operation(NamedTuple):
    """An operation and the shapes that it is called with: what decides how long it takes."""

    call: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    flops: int
    moved: int  # bytes read and written
    is_half: bool  # in 16 bit


@dataclass
class Ledger(TorchDispatchMode):
    """Account for every storage while this mode is active.

    events      (storage, bytes): bytes below 0 where it is freed
    kinds       what a storage holds, where that is known: weights, gradients, optimizer, activations, logits
    operations  how often each one was run
    """

    fakes: FakeTensorMode
    vocabulary: int = 0  # tensors whose last dimension this is are logits
    events: list[tuple[int, int]] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)
    operations: Counter[Operation] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}  # live storage -> its number
        self.counted = 0
        self.results: dict[Any, Any] = {}  # what operations made, by the shapes that they were given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet.__name__ in INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        given = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        is_view = _is_view(func)
        shapes: tuple[Any, ...] = ()
        if not is_view:
            shapes = (_shapes(args), tuple((key, _shapes(value)) for key, value in kwargs.items()))
        made = self._run(func, args, kwargs, given, shapes)
        if is_view:
            return made
        found = [each for each in tree_iter(made) if isinstance(each, Tensor)]
        for tensor in found:
            self.hold(tensor)
        if (given or found) and func.namespace != "prim":  # which only asks where a tensor is
            flops = int(flop_registry[packet](*args, **kwargs, out_val=made)) if packet in flop_registry else 0
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *found))
            is_half = bool(found) and found[0].dtype.itemsize == 2
            self.operations[Operation(func, shapes[0], shapes[1], flops, moved, is_half)] += 1
        return made

    def _run(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], shapes: Any) -> Any:
        """Run an operation on fake tensors: by what it made of the same shapes before, where it makes new tensors."""
        if not given:
            with self.fakes if _is_large(args) else nullcontext():
                return func(*args, **kwargs)
        if not all(isinstance(each, FakeTensor) for each in given):
            return func(*args, **kwargs)
        if not shapes:
            with in_kernel_invocation_manager(self.fakes):
                made = func(*args, **kwargs)
            return tree_map_only(Tensor, lambda each: FakeTensor(self.fakes, each, CPU), made)
        if func._overloadpacket is GROUPED:
            left, right, offsets = args[0], args[1], kwargs["offs"] if "offs" in kwargs else args[2]
            rows = (left.shape[0],) if right.ndim == 3 else (offsets.shape[0], left.shape[0])
            return left.new_empty(*rows, right.shape[-1])  # torch's own rule for shapes knows 16 bit alone
        if func._schema.is_mutable:
            written = _written(func, args, kwargs)
            return func(*args, **kwargs) if written is None else written
        key = (func, *shapes)
        if key not in self.results:
            made = func(*args, **kwargs)
            self.results[key] = tree_map_only(Tensor, _shapes, made)
            return made
        return tree_map_only(Shape, self._like, self.results[key], is_leaf=lambda each: isinstance(each, Shape))

    def _like(self, shape: Shape) -> Tensor:
        return FakeTensor(
            self.fakes, torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta"), CPU
        )

    def hold(self, tensor: Tensor, kind: str = "") -> None:
        """Note a tensor's storage, unless it is noted already, and what it holds."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.numbers:
            number = self.numbers[key] = self.counted
            self.counted += 1
            self.events.append((number, storage.nbytes()))
            weakref.finalize(storage, self._free, key, number, storage.nbytes()).atexit = False
            if self.vocabulary and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
                self.kinds[number] = "logits"
        if kind:
            self.kinds[self.numbers[key]] = kind

    def hold_all(self, kind: str) -> None:
        """Say what everything holds that is there and was not named yet."""
        for number in self.numbers.values():
            self.kinds.setdefault(number, kind)

    def _free(self, key: int, number: int, size: int) -> None:
        self.events.append((number, -size))
        del self.numbers[key]

    def peak(self, start: int = 0) -> dict[str, int]:
        """Return the bytes of each kind at the moment after event `start` when the sum is largest."""
        live, most, when = 0, 0, start
        for place, (_, size) in enumerate(self.events):
            live += size
            if place >= start and live > most:
                most, when = live, place
        sizes: Counter[str] = Counter()
        for number, size in self.events[: when + 1]:
            sizes[self.kinds.get(number, "workspace")] += size
        return dict(sizes)


def _products_by_group(left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Count the products of rows (S, I) with weights (E, I, O), one of them each, or of (I, S) with (S, O)."""
    return 2 * int(torch.Size(left).numel()) * int(right[-1])


if GROUPED not in flop_registry:  # torch 2.14 does not count it
    register_flop_formula(GROUPED)(_products_by_group)


@cache
def _is_view(func: Any) -> bool:
    """Tell whether what an operation returns shares the memory of what it is given, and nothing is written."""
    aliases = any(each.alias_info is not None for each in func._schema.returns)
    return (aliases or func._overloadpacket.__name__ in VIEWS) and not func._schema.is_mutable


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what an operation writes into, where that is plain: nothing is computed, so nothing has to be run."""
    if "out" in kwargs:
        return kwargs["out"]
    name = func._overloadpacket.__name__
    return args[0] if name.endswith("_") and name[0] != "_" and not name.startswith(RESHAPING) else None


def _is_large(args: Any) -> bool:
    sizes = [each for each in args if isinstance(each, list | tuple)]
    return bool(sizes) and all(isinstance(each, int) for each in sizes[0]) and torch.Size(sizes[0]).numel() > FAKED


def _places(indices: list[Any]) -> list[Any]:
    """Replace masks, whose values are known, by the places that they name: a fake tensor does not look at values."""
    found: list[Any] = []
    for each in indices:
        is_mask = each is not None and each.dtype is torch.bool and not isinstance(each, FakeTensor)
        found += each.nonzero().unbind(1) if is_mask else [each]
    return found


def _shapes(value: Any) -> Any:
    """Replace tensors by their shapes, and lists by tuples, which can be counted."""
    if isinstance(value, Tensor):
        return Shape(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_shapes(each) for each in value)
    return value
