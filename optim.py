"""
optim.py - how a parameter gets updated: optimisers, learning-rate schedules, adapters.

    opt = adamw(model, lr=3e-4, weight_decay=0.1)
    set_lr(opt, lr * cosine(step, steps, warmup))            # before every opt.step()

Map      1 parameter groups   2 optimisers   3 schedules   4 adapters          D width in, F width out, R rank
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from data.run import UserError
from kernels import PackedLinear

# --- parameter groups ---------------------------------------------------------------------------------


def param_groups(model, weight_decay):
    """The trainable parameters in two groups: matrices (decayed), and norms, biases, other vectors (not)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("the model has no trainable parameter")
    kinds = {type(m) for m in model.modules()}
    if PackedLinear in kinds and LoRA not in kinds:
        raise UserError("packed layers cannot be trained: put adapters on them (--lora 8), or start from the "
                        "checkpoint that was compressed")
    return [dict(params=[p for p in trained if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0)]


# --- optimisers ---------------------------------------------------------------------------------------


def adamw(model, lr, weight_decay=0.0, *, b1=0.9, b2=0.95, eps=1e-8):
    """AdamW (1711.05101), PyTorch's own, fused. b2 0.95 is the language modeller's custom."""
    return torch.optim.AdamW(param_groups(model, weight_decay), lr=lr, betas=(b1, b2), eps=eps, fused=True)


OPTIMISERS = dict(adamw=adamw)


def set_lr(optimiser, lr):
    """Set every group's learning rate, scaled by the group's own `scale` where it has one."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


# --- schedules: (step, steps, warmup) -> factor on the peak learning rate -----------------------------


def warm(step, warmup):
    """The linear warm-up that every schedule starts with: 1/warmup at step 0, 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def constant(step, steps, warmup=0):
    """1 after the warm-up."""
    return warm(step, warmup)


def linear(step, steps, warmup=0):
    """Linear from 1 at the end of the warm-up to 0 at `steps`."""
    return warm(step, warmup) * min(1.0, (steps - step) / max(1, steps - warmup))


def cosine(step, steps, warmup=0, *, floor=0.05):
    """Half a cosine (1608.03983) from 1 to `floor`."""
    done = max(0, step - warmup) / max(1, steps - warmup)
    return warm(step, warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def wsd(step, steps, warmup=0, *, cooldown=0.2):
    """Warm-up, stable, decay (MiniCPM, 2404.06395): 1, then linear to 0 over the last `cooldown` of steps."""
    return warm(step, warmup) * min(1.0, (steps - step) / max(1, cooldown * steps))


SCHEDULES = dict(constant=constant, linear=linear, cosine=cosine, wsd=wsd)

# --- adapters -----------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer plus a low-rank update (LoRA, 2106.09685 eq. 3):  y = W x + (alpha / R) B A x.

    A [R, D] is Kaiming-uniform and B [F, R] zero, so that training starts from the layer as it was. The layer
    may be packed (QLoRA, 2305.14314).
    """

    def __init__(self, linear, rank, alpha, generator=None):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        D, width, packed = linear.in_features, linear.out_features, isinstance(linear, PackedLinear)
        like = dict(device=next(iter(linear.state_dict().values())).device,
                    dtype=torch.float32 if packed else linear.weight.dtype)
        self.A = nn.Parameter(torch.empty(rank, D, **like))
        self.B = nn.Parameter(torch.zeros(width, rank, **like))
        bound = 1 / math.sqrt(D)                 # kaiming_uniform_ with a = sqrt(5), LoRA's own choice
        with torch.no_grad():
            noise = torch.rand(self.A.shape, generator=generator)
            self.A.copy_((2 * noise - 1) * bound)

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    def merged(self):
        """The plain linear layer that computes the same; a packed one is unpacked."""
        W = self.linear.dequantize() if isinstance(self.linear, PackedLinear) else self.linear.weight
        out = nn.Linear(self.linear.in_features, self.linear.out_features, self.linear.bias is not None,
                        device="meta")
        out.weight = nn.Parameter(W + self.scale * self.B @ self.A)
        out.bias = self.linear.bias
        return out


def add_lora(model, rank, alpha=0.0, generator=None):
    """Freeze the model and put a LoRA of `rank` on every linear layer inside its blocks (QLoRA, 2305.14314
    §4, found all layers to matter). alpha 0 means 2 * rank. In place; returns the model."""
    if rank < 1:
        raise UserError(f"--lora {rank}: the rank must be at least 1")
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Linear, PackedLinear)) and name.endswith("_proj"):
                setattr(parent, name, LoRA(child, rank, alpha or 2 * rank, generator))
    return model


def adapter_state(model):
    """{name: tensor} of the trainable adapter weights only: what a resume needs on top of the frozen base."""
    return {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}


def merge_lora(model):
    """A plain copy of the model with every LoRA folded into its layer; the original is left as it is."""
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRA):
                setattr(parent, name, child.merged())
    return plain.requires_grad_()
