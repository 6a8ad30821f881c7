"""Compile the Triton kernels for a GPU on a machine that has none: what the ops launch is recorded, compiled and looked at, not run."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One launched kernel as PTX."""

    name: str
    ptx: str
    shared_bytes: int
    registers: int
    spilled_bytes: int

    def has(self, pattern: str) -> bool:
        return re.search(pattern, self.ptx) is not None


def compile_launch(
    capability: int, kernel: Any, programs: int, *arguments: Any, warps: int = 4, exact: bool = False, **constants: Any
) -> Compiled:
    """What `launch` would have compiled, for a GPU of this compute capability (90: H100)."""
    signature: dict[str, str] = {}
    fixed: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    given = dict(zip(kernel.arg_names, arguments)) | constants
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + NAMES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif value is None or name in constants or (isinstance(value, int) and value == 1):
            signature[name], fixed[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in fixed.items()}, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "enable_fp_fusion": not exact})
    assert made.asm["cubin"]
    registers, spilled = _registers(made.asm["ptx"], capability, exact)
    return Compiled(kernel.__name__, made.asm["ptx"], made.metadata.shared, registers, spilled)


def _registers(ptx: str, capability: int, exact: bool) -> tuple[int, int]:
    """(registers of a thread, bytes spilled) as the assembler that comes with Triton counts them."""
    name = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", "-o", "/dev/null", "/dev/stdin"]
    command += ["--fmad=false"] if exact else []
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    used, stored = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert used and stored, said
    return int(used[1]), int(stored[1])


def compile_call(monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: Callable[[], object], capability: int = 90) -> list[Compiled]:
    """Every kernel that `call`, an op of this `triton_gpu` module, would launch."""
    made: list[Compiled] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "launch", lambda *arguments, **options: made.append(compile_launch(capability, *arguments, **options)))
        call()
    return made
