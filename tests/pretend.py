"""A device that is none: its tensors are the host's, but PyTorch takes them for another device's.

It stands where a GPU would, so that what crosses between the two can be tested without one: an op that mixes both
raises, as it would on a GPU (stricter: even a number held in a tensor of the host may not join); every crossing is
counted; and so are the bytes that its tensors hold, each memory block once.

PyTorch lets a backend be written in Python under the name of ``PrivateUse1``. Its autograd engine counts devices once,
when it first runs, so :func:`install` must come before: the tests that use it call it when they are imported.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

from wholegrad.run.blocks import anonymous
from wholegrad.run.device import Device, Options, Room, T, register

aten = torch.ops.aten
NAME = "pretend"
TOTAL = 64 << 30  # bytes that it says it has


class MixedError(RuntimeError):
    """An op took tensors of both devices."""


class Ledger:
    """Bytes that the device's tensors hold, and what crossed.

    Attributes:
        now, peak: bytes.
        up, down: bytes that crossed towards the device and back; ``ups`` and ``downs`` count the crossings.
        staged, most_staged: bytes of the host's memory that what crosses takes, and the most of them.
        paging: the thread whose tensors lie in managed memory, while one has any; ``paged`` and ``most_paged`` are its
            bytes, ``strayed`` those that other threads made meanwhile, which lie elsewhere.
        doubles: whether the device knows float64.
        of_host: memory blocks of the host's that its ops reach; they are none of its bytes.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.alive: dict[int, tuple[int, int]] = {}  # of each memory block: tensors that look at it, bytes
        self.now = self.peak = self.up = self.down = self.ups = self.downs = self.staged = self.most_staged = 0
        self.doubles = True
        self.of_host: set[int] = set()
        self.paging: int | None = None
        self.blocks_paged: set[int] = set()
        self.paged = self.most_paged = self.strayed = 0

    def forget(self) -> None:
        """Count peak and crossings from now on."""
        with self.lock:
            self.peak, self.most_staged, self.most_paged = self.now, self.staged, self.paged
            self.up = self.down = self.ups = self.downs = self.strayed = 0

    def hold(self, raw: torch.Tensor, owner: torch.Tensor) -> None:
        block = raw.untyped_storage()
        with self.lock:
            if block._cdata in self.of_host:
                return
            count, size = self.alive.get(block._cdata, (0, block.nbytes()))
            self.alive[block._cdata] = count + 1, size
            self.now += 0 if count else size
            self.peak = max(self.peak, self.now)
            if not count and self.paging == threading.get_ident():
                self.blocks_paged.add(block._cdata)
                self.paged += size
                self.most_paged = max(self.most_paged, self.paged)
            elif not count and self.paging is not None:
                self.strayed += size
        weakref.finalize(owner, self._drop, block._cdata)

    def reach(self, nbytes: int) -> Pretend:
        """Memory of the host's as a tensor of the device."""
        raw = anonymous(nbytes)
        owner = raw.untyped_storage()
        with self.lock:
            self.of_host.add(owner._cdata)
        weakref.finalize(owner, self._left, owner._cdata)
        return Pretend(raw)

    def _left(self, block: int) -> None:
        with self.lock:
            self.of_host.discard(block)
        for watch in WATCHES:
            watch.gone(block)

    def stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a host tensor as staging memory for as long as its memory is looked at."""
        owner, size = tensor.untyped_storage(), tensor.nbytes
        with self.lock:
            self.staged += size
            self.most_staged = max(self.most_staged, self.staged)
        weakref.finalize(owner, self._unstage, size)
        return tensor

    def _unstage(self, size: int) -> None:
        with self.lock:
            self.staged -= size

    def _drop(self, block: int) -> None:
        with self.lock:
            count, size = self.alive.pop(block)
            if count > 1:
                self.alive[block] = count - 1, size
                return
            self.now -= size
            if block in self.blocks_paged:
                self.blocks_paged.discard(block)
                self.paged -= size
        for watch in WATCHES:
            watch.gone(block)

    def crossed(self, tensor: torch.Tensor, up: bool) -> None:
        with self.lock:
            if up:
                self.up, self.ups = self.up + tensor.nbytes, self.ups + 1
            else:
                self.down, self.downs = self.down + tensor.nbytes, self.downs + 1


LEDGER = Ledger()


class Watch:
    """Told of every op on the device's tensors, and of memory that nobody looks at any more; this one does not care."""

    def op(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        """Storages are those of the tensors that went in and came out."""

    def gone(self, block: int) -> None:
        """The memory of this storage is free."""


WATCHES: list[Watch] = []


class Pretend(torch.Tensor):
    """A tensor of the device; ``raw`` has its values."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Pretend:
        if raw.dtype == torch.float64 and not LEDGER.doubles:
            raise TypeError("this device has no float64")
        raw = raw.resolve_conj().resolve_neg()  # lazy ones are marked on the tensor that PyTorch sees
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.raw = raw.detach()
        LEDGER.hold(raw, made)
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **options: Any) -> str:
        return f"Pretend({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _run(func, args, dict(kwargs or {}))
        for watch in WATCHES:
            watch.op(func, args, kwargs or {}, found)
        return found


def _raw(value: torch.Tensor) -> torch.Tensor:
    return value.raw if isinstance(value, Pretend) else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is aten._to_copy.default:
        return _moved(args[0], kwargs)
    if func is aten.copy_.default:
        to, source = args[:2]
        if isinstance(to, Pretend) != isinstance(source, Pretend):
            LEDGER.crossed(source, up=isinstance(to, Pretend))
        _raw(to).copy_(_raw(source))
        return to
    if func is aten._local_scalar_dense.default:
        LEDGER.crossed(args[0], up=False)
        return func(args[0].raw)
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    if not all(isinstance(each, Pretend) for each in tensors):
        kinds = [(type(each).__name__, tuple(each.shape)) for each in tensors]
        raise MixedError(f"{func} takes tensors of the host and of the device: {kinds}")
    where = kwargs.pop("device", None)
    if where is not None and torch.device(where).type != NAME:
        raise MixedError(f"{func} makes a tensor on {where} from one of the device")
    kwargs.pop("pin_memory", None)
    raw_args, raw_kwargs = tree_map_only(Pretend, _raw, (args, kwargs))
    found = func(*raw_args, **raw_kwargs)
    known = {id(each.raw): each for each in _written(func, args, kwargs)}
    return tree_map_only(torch.Tensor, lambda each: known[id(each)] if id(each) in known else Pretend(each), found)


def _moved(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """``Tensor.to``: the one op that may cross."""
    to = kwargs.pop("device", None)
    for name in ("pin_memory", "non_blocking", "layout"):
        kwargs.pop(name, None)
    if to is not None and torch.device(to).type == "meta":
        return aten._to_copy.default(_raw(x), device="meta", **kwargs)  # type: ignore[no-any-return]
    here = isinstance(x, Pretend)
    there = here if to is None else torch.device(to).type == NAME
    found = aten._to_copy.default(_raw(x), **kwargs)
    if here != there:
        LEDGER.crossed(found, up=there)
    return Pretend(found) if there else found


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Pretend]:
    """The tensors that an op writes into, which it also returns."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (each for each in tree_leaves(value) if isinstance(each, Pretend))


class PretendDevice(Device):
    """What the executor sees of it.

    Attributes:
        reaches_host: whether its ops reach memory of the host's.
    """

    reaches_host = False

    def host_block(self, nbytes: int) -> torch.Tensor | None:
        return LEDGER.reach(nbytes) if self.reaches_host else None

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return LEDGER.stage(super().staging(shape, dtype))

    def fetched(self, tensor: torch.Tensor) -> torch.Tensor:
        return LEDGER.stage(super().fetched(tensor))

    def check_managed(self) -> None:
        """It is safe here."""

    def managed(self, work: Callable[[], T], out: Callable[[T], T]) -> T:
        LEDGER.paging = threading.get_ident()
        try:
            found = work()
        finally:
            LEDGER.paging = None
        return out(found)

    def room(self) -> Room:
        return Room(TOTAL, LEDGER.now, TOTAL - LEDGER.now)

    def peak(self) -> int:
        return LEDGER.peak

    def forget_peak(self) -> None:
        LEDGER.forget()


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """``torch.pretend``: to whoever asks PyTorch for devices, and for their random numbers, there is none."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0


_library: torch.library.Library | None = None


def install() -> None:
    """Make the device known to PyTorch and to the project; skips the module that asks where PyTorch cannot."""
    global _library
    if _library is not None:
        return
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch takes no backend written in Python", allow_module_level=True)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    register(NAME, lambda where, options: PretendDevice(torch.device(NAME, 0), options))


def device(reaches_host: bool = False, **options: Any) -> PretendDevice:
    """The device with these options."""
    made = PretendDevice(torch.device(NAME, 0), Options(**options))
    made.reaches_host = reaches_host  # type: ignore[misc]
    return made


@contextmanager
def without_doubles() -> Iterator[None]:
    """While open, the device has no float64, as Apple's has none."""
    from wholegrad.graph.rules import base

    LEDGER.doubles = False
    base.NO_DOUBLE.add(NAME)
    try:
        yield
    finally:
        LEDGER.doubles = True
        base.NO_DOUBLE.discard(NAME)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **where: Any) -> Pretend:
    return Pretend(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **where: Any) -> Pretend:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return _run(aten.copy_.default, (to, source), {})  # type: ignore[no-any-return]
