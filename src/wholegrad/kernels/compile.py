"""From LLVM's text to a function that Python can call, kept on disk by a hash of that text and of the processor.

The text and this file say everything that the machine code depends on, so a changed kernel never meets its old code.
Calls go through ctypes, which lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wholegrad.kernels.host import host

_lock = threading.Lock()
_loaded: dict[str, Callable[..., None]] = {}
_kept: list[Any] = []  # engines own the code that _loaded points into
_DIGEST = 32
_HERE = Path(__file__).read_bytes()


def cache_folder() -> Path:
    """Where compiled kernels are kept for this user."""
    if "WHOLEGRAD_CACHE" in os.environ:
        return Path(os.environ["WHOLEGRAD_CACHE"]) / "kernels"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "wholegrad" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wholegrad" / "kernels"


def function(text: str, name: str, pointers: int) -> Callable[..., None]:
    """Function ``name`` of the module ``text``, which takes so many pointers and returns nothing."""
    found = host()
    assert found is not None, "no kernels on this machine"
    key = hashlib.sha256(_HERE + f"{found.identity}\n{text}".encode()).hexdigest()
    with _lock:
        if key not in _loaded:
            code = _read(key)
            if code is None:
                code = _compiled(text)
                _write(key, code)
            _loaded[key] = _linked(code, name, pointers)
        return _loaded[key]


def addresses(text: str, names: Sequence[str]) -> list[int]:
    """Where functions of the module ``text`` lie, for callers that are not Python: their code is never freed."""
    with _lock:
        engine = _engine(_compiled(text))
        return [_address(engine, name) for name in names]


def _compiled(text: str) -> bytes:
    """Machine code, by LLVM's code generator alone: its passes reorder and merge what was blocked on purpose."""
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(text)
    module.verify()
    machine = _machine()
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    return bytes(machine.emit_object(module))


def _machine() -> Any:
    """LLVM's code generator for this machine."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3, codemodel="jitdefault", jit=True
    )


def _linked(code: bytes, name: str, pointers: int) -> Callable[..., None]:
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers)(_address(_engine(code), name))


def _engine(code: bytes) -> Any:
    """What holds machine code, linked and ready."""
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _kept.append(engine)
    return engine


def _address(engine: Any, name: str) -> int:
    address = engine.get_function_address(name)
    if not address:
        raise RuntimeError(f"{name} is missing from its machine code")
    return int(address)


def _read(key: str) -> bytes | None:
    """The machine code on disk; None if it is not there or not whole."""
    try:
        data = (cache_folder() / key).read_bytes()
    except (OSError, RuntimeError):
        return None
    return data[_DIGEST:] if _agrees(data) else None


def _agrees(data: bytes) -> bool:
    return hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]


def is_whole(path: Path) -> bool:
    """Whether a file of the cache folder is a kernel as it was written."""
    try:
        return _agrees(path.read_bytes())
    except OSError:
        return False


def _write(key: str, code: bytes) -> None:
    """Keep machine code for other processes, if the folder can be written; it appears whole or not at all."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(aside).replace(folder / key)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError):
        return
