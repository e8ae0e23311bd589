"""
compile_kernels.py - compile every Triton launch for an H100, on any machine; hold it to its limits.

    python tests/compile_kernels.py            # needs Triton, no GPU: nothing is launched
    python tests/compile_kernels.py bfloat16   # only this dtype

The interpreter checks what a kernel computes, this that the compiler takes it: register spills, too
much shared memory or a matrix product off the tensor cores show here first. One line a kernel:
registers a thread, bytes of spills, bytes of shared memory, and whether the products run on wgmma.
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

try:
    import triton
except ImportError:
    sys.exit("compile_kernels.py needs Triton, which is for Linux: pip install triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import kernels

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
         torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1"}
SHARED = 227 * 1024  # bytes of shared memory that one block may have on sm_90
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
    binary = triton.compile(ASTSource(self, signature, constants, attrs),
                            GPUTarget("cuda", 90, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name],
                               capture_output=True, text=True).stdout
    registers, *spills = (int(re.search(rf"{word}:(\d+)", usage)[1])
                          for word in ("REG", "LOCAL", "STACK"))
    spilled = sum(spills)
    compiled[key] = dict(shared=binary.metadata.shared, spilled=spilled)
    ptx = binary.asm["ptx"]
    kind = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "-"
    types = {t for t in signature.values() if t.startswith("*")} & {"*bf16", "*fp16", "*fp32"}
    print(f"{self.__name__:<24}{'bf16' if '*bf16' in types else 'fp32':<6}{registers:>4} registers"
          f"{spilled:>6} spilled{binary.metadata.shared:>8} shared  {kind}", flush=True)
    fits = spilled == 0 and binary.metadata.shared <= SHARED
    assert fits, f"{self.__name__} {constants} does not fit sm_90"


def heads(dtype, N=256, D=512, V=1024):
    """linear_logprob and linear_distill, forward and backward. Sizes only count by their
    divisibility, and the backward's products between the launches do run: some CPUs multiply
    bfloat16 at 1 GFLOP/s."""
    h, W = torch.empty(N, D, dtype=dtype, requires_grad=True), torch.empty(V, D, requires_grad=True)
    logp, entropy = kernels.linear_logprob(h, W, torch.zeros(N, dtype=torch.long), entropy=True)
    (logp.sum() + entropy.sum()).backward()
    for divergence in kernels.DIVERGENCES:
        kernels.linear_distill(h, W, h.detach(), W.detach(), divergence).sum().backward()


def blocks(dtype, B=4, T=512, H=32, hd=128, D=4096, F=11008):
    """RMSNorm of the stream and of heads, rotation, gate, both ways; one step of decoding."""
    x, head = (torch.empty(B, T, n, dtype=dtype, requires_grad=True) for n in (D, H * hd))
    q = head.view(B, T, H, hd)
    kernels.rms_norm(x, torch.ones(D), 1e-6).sum().backward()
    kernels.rms_norm(q, torch.ones(hd), 1e-6).sum().backward()
    kernels.rope(q.transpose(1, 2), *torch.empty(2, T, hd // 2)).sum().backward()
    gate, up = (torch.empty(B, T, F, dtype=dtype, requires_grad=True) for _ in range(2))
    kernels.swiglu(gate, up).sum().backward()
    for rows in (1, 256):                      # with and without splits of the cache
        k = torch.empty(rows, 8, 2048, hd, dtype=dtype)
        for window in (0, 512):
            kernels.decode_attention(torch.empty(rows, H, hd, dtype=dtype), k, k,
                                     torch.ones(rows).long(), window)


def orthogonalise(dtype):
    """X Xᵀ and the polynomial of Newton-Schulz."""
    X = torch.empty(4, 768, 3072, dtype=dtype)
    kernels.xxt(kernels.xxt(X), 2.0, X[:, :, :768], -4.8)


def packed(dtype, out=4096, inputs=4096):
    """One row, and a batch, through every packed format."""
    specs = [dict(kind="int", bits=b, group=128, symmetric=s) for b in (2, 3, 4, 8)
             for s in (False, True)]
    specs += [dict(kind="nm24"), dict(kind="armor", block_out=128, block_in=128)]
    specs += [dict(kind="vq", bits=12, dim=6), dict(kind="vq", bits=8, dim=4)]
    for spec in specs:
        layer = kernels.PackedLinear(inputs, out, **spec)
        for rows in (1, 64):
            layer(torch.empty(rows, inputs, dtype=dtype))


CALLS = dict(heads=heads, blocks=blocks, orthogonalise=orthogonalise, packed=packed)


def main(names):
    """Compile what every row of CALLS launches, in the named dtypes."""
    if set(names) - {"bfloat16", "float32"}:
        sys.exit(f"no dtype {' '.join(names)}: choose bfloat16 or float32, or neither for both")
    JITFunction.run = compile_instead
    kernels.use("triton")
    for call in CALLS.values():
        for name in names or ("bfloat16", "float32"):
            call(getattr(torch, name))
    print(f"{len(compiled)} kernels compiled for sm_90")


if __name__ == "__main__":
    main(sys.argv[1:])
