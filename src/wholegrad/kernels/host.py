"""What the processor offers to kernels: how wide its vectors are, how many it holds, and who it is."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Host(NamedTuple):
    """A processor that kernels are written for.

    Attributes:
        width: bytes of a vector.
        registers: vectors that it holds.
        identity: processor and feature names; machine code for one is not for another.
    """

    width: int
    registers: int
    identity: str

    def lanes(self, real: str) -> int:
        """Elements of a vector of ``float`` or ``double``."""
        return self.width // (4 if real == "float" else 8)


@cache
def host() -> Host | None:
    """This machine; None where kernels cannot be compiled or would have no fused multiply-add."""
    try:
        import llvmlite.binding as llvm

        triple, features = llvm.get_process_triple(), llvm.get_host_cpu_features()
        identity = f"{triple} {llvm.get_host_cpu_name()} {features.flatten()} llvm {llvm.llvm_version_info}"
        if llvm.llvm_version_info < (17,):
            return None
    except (ImportError, AttributeError, RuntimeError):
        return None
    machine = triple.split("-")[0]
    if machine in ("x86_64", "amd64"):
        if features.get("avx512f") and features.get("avx512dq") and features.get("avx512vl"):
            return Host(64, 32, identity)
        return Host(32, 16, identity) if features.get("avx2") and features.get("fma") else None
    return Host(16, 32, identity) if machine in ("aarch64", "arm64") else None
