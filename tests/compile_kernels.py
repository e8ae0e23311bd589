"""
compile_kernels.py - compile every Triton launch for an H100 on any machine, and hold it to the hardware's limits.

    python tests/compile_kernels.py            # needs Triton, no GPU: nothing is launched

The interpreter checks what a kernel computes, this that the compiler takes it: register spills, too much shared
memory or a matrix product off the tensor cores show here first. One line a kernel: registers a thread, bytes of
spills, bytes of shared memory, and whether the products run on wgmma.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import kernels

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
         torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1"}
SHARED = 227 * 1024                            # bytes of shared memory that one block may have on sm_90
compiled = {}


def compile_instead(self, *args, grid, warmup=False, num_warps=4, num_stages=3, **kwargs):
    """Stands in for JITFunction.run: the launch's own types and constants, compiled once each."""
    values = dict(zip(self.arg_names, args)) | kwargs
    signature, constants, attrs = {}, {}, {}
    for i, p in enumerate(self.params):
        value = values.get(p.name, p.default)
        if p.is_constexpr or value is None:
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name], attrs[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    key = self.__name__, *signature.values(), *constants.values(), num_warps
    if key in compiled:
        return
    options = dict(num_warps=num_warps, num_stages=num_stages)
    binary = triton.compile(ASTSource(self, signature, constants, attrs), GPUTarget("cuda", 90, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, spilled = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "LOCAL"))
    compiled[key] = dict(shared=binary.metadata.shared, spilled=spilled)
    kind = "wgmma" if "wgmma" in binary.asm["ptx"] else "mma" if "mma.sync" in binary.asm["ptx"] else "-"
    types = {t for t in signature.values() if t.startswith("*")} & {"*bf16", "*fp16", "*fp32"}
    print(f"{self.__name__:<24}{'bf16' if '*bf16' in types else 'fp32':<6}{registers:>4} registers{spilled:>6} spilled"
          f"{binary.metadata.shared:>8} shared  {kind}", flush=True)
    assert spilled == 0 and binary.metadata.shared <= SHARED, f"{self.__name__} {constants} does not fit sm_90"


def heads(dtype, N=512, D=2048, V=50304):
    """linear_logprob and linear_distill, forward and backward."""
    h, W = torch.empty(N, D, dtype=dtype, requires_grad=True), torch.empty(V, D, requires_grad=True)
    logp, entropy = kernels.linear_logprob(h, W, torch.zeros(N, dtype=torch.long), entropy=True)
    (logp.sum() + entropy.sum()).backward()
    for divergence in kernels.DIVERGENCES:
        kernels.linear_distill(h, W, h.detach(), W.detach(), divergence).sum().backward()


CALLS = dict(heads=heads)


def main():
    """Compile what every row of CALLS launches, in both dtypes."""
    JITFunction.run = compile_instead
    kernels.use("triton")
    for call in CALLS.values():
        for dtype in (torch.bfloat16, torch.float32):
            call(dtype)
    print(f"{len(compiled)} kernels compiled for sm_90")


if __name__ == "__main__":
    main()
