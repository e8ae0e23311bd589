"""
optim.py - how a parameter gets updated: optimisers, learning-rate schedules, over one rank or many.

    opt = optimiser(model, normuon, lr=3e-3, weight_decay=0.1)   # blocks: NorMuon; the rest: AdamW
    set_lr(opt, 3e-3 * cosine(step, steps, warmup))
    opt.step()

An optimiser is a rule (gradient, state) -> direction of a few lines; one class, Optimiser, walks
the parameters, decays and steps for all of them. A rule sees the stack g [K, m, n] of all matrices
of one shape, and what else its positional arguments name (ARGUMENTS). The spine is AdamW, whole;
every other rule is a chapter, and says how many numbers its state of a matrix takes.

Letters  K matrices of a stack, m x n (out, in) of one, a >= b its sides, r rank
Watch    the loss against AdamW's, each rule at a learning rate of its own: they differ a
         hundredfold (sft.py's presets have them). memory_report(opt): the bytes that state takes.
"""
import hashlib
import math
import time
from functools import partial
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw as torch_adamw

from data.run import Count, Fraction, Positive, Range, Share, UserError, hyper, nearest, needs
from kernels import PackedLinear, newton_schulz, pack_bits, unpack_bits

# --- 1 rules: (g, s, …) -> direction d;  the walker then does  W <- (1 - lr λ) W - lr d -----------
#   g [K, m, n] gradients, s the stack's state, all with a leading K but for s["t"], which counts
#   steps from 1. A rule names what else it needs: a key of ARGUMENTS.


def kept(s, key, like):
    """The state s[key], zeros in the shape of `like` at first."""
    if key not in s:
        s[key] = torch.zeros_like(like)
    return s[key]


def ema(s, key, x, beta):
    """s[key] <- beta s[key] + (1 - beta) x, in place; the state itself is returned."""
    return kept(s, key, x).lerp_(x, 1 - beta)


def adam(g, s, t, b1, b2, eps):
    """Adam's direction  m̂ / (√v̂ + eps)  with bias-corrected moments after t steps."""
    m, v = ema(s, "m", g, b1), ema(s, "v", g * g, b2)
    return m / (1 - b1 ** t) / ((v / (1 - b2 ** t)).sqrt() + eps)


def adamw(g, s, *, b1: Fraction = 0.9, b2: Fraction = 0.95, eps=1e-8):
    """AdamW, 1711.05101 alg. 2.   m̂ / (√v̂ + eps).   b2 0.95 is the language modeller's custom.

    State 2mn: momentum and second moment.
    """
    return adam(g, s, s["t"], b1, b2, eps)


def fused_adamw(stack, grads, *, b1, b2, eps):
    """The rule adamw and its step by PyTorch's fused kernel: one pass over memory."""
    s, group = stack.state, stack.group
    weights = [stack.ranks.local(u.p.detach()) for u in stack.units]
    if "m" not in s:
        zeros = [torch.zeros_like(stack.ranks.pad(w)) for w in weights]
        s["m"], s["v"] = torch.stack(zeros), torch.stack(zeros)
    m = [x[:len(w)] for x, w in zip(s["m"], weights)]
    v = [x[:len(w)] for x, w in zip(s["v"], weights)]
    t = list(torch.full((len(weights),), s["t"] - 1.0, device=weights[0].device).unbind(0))
    torch_adamw(weights, grads, m, v, [], t, fused=True, amsgrad=False, beta1=b1, beta2=b2,
                lr=group["lr"], weight_decay=group["weight_decay"], eps=eps, maximize=False)


def signsgd(g, s):
    """Sign-SGD, 1802.04434.   sign(g): no state. The control that sign-like rules must beat."""
    return g.sign()


def name_of(rule):
    """A rule's name, of the function itself or with arguments bound."""
    return getattr(rule, "func", rule).__name__


RULES = dict(adamw=adamw, signsgd=signsgd)
ELEMENTWISE = dict(adamw=adamw, signsgd=signsgd)  # entry by entry: vectors too, and a rank's rows
CHECKS = {}    # rule -> check(unit, **hyper): UserError for what the rule cannot update
FEEDBACK = {}  # rule -> feed(errors, s, lr, shrink, peak, **hyper): what rounding took from W
ARGUMENTS = dict(                     # what a rule may name after g and s: (Optimiser, stack) -> it
    W=lambda opt, stack: stack.gather([u.read() for u in stack.units]),        # weights [K, m, n]
    lr=lambda opt, stack: stack.group["lr"],
    ranks=lambda opt, stack: stack.ranks,                  # see Ranks: the rule gets a rank's rows
    seeds=lambda opt, stack: stack.ranks.own(opt.seeds(stack)))              # one int a matrix

# --- 2 parameter groups ---------------------------------------------------------------------------

DECAYS = dict(                    # (lr, λ, peak lr) -> factors on W before and after the step
    decoupled=lambda lr, wd, peak: (1 - lr * wd, 1.0),           # PyTorch's AdamW
    last=lambda lr, wd, peak: (1.0, 1 - lr * wd),                # GaLore's, APOLLO's, SOAP's code
    independent=lambda lr, wd, peak: (1 - wd * lr / peak, 1.0))  # λ means the same as lr is tuned
STORED = {}  # name -> class of layers whose weights do not lie in .weight: they read() and write()


def param_groups(model, rule=adamw, lr=1e-3, weight_decay=0.0, aux_lr=0.0, aux_decay=-1.0,
                 decay_embed=True):
    """The trainable parameters in groups, first match wins, each parameter in exactly one.

    Embeddings and output heads go to AdamW (decayed unless decay_embed is false), norms, biases and
    other vectors to AdamW without decay, the matrices of the blocks to `rule`. aux_lr, aux_decay:
    that AdamW's (0 and -1: lr and weight_decay, one dial). With adamw as the rule all matrices are
    one group. UserError: nothing to train, packed layers, a matrix that belongs nowhere.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError("the model has no trainable parameter")
    if any(isinstance(m, PackedLinear) and not n.endswith(".linear")
           for n, m in model.named_modules()):
        raise UserError("packed layers cannot be trained: put adapters on them (--peft lora), or "
                        "start from the checkpoint that was compressed")
    aux = partial(adamw, **(hyper(rule) if name_of(rule) == "adamw" else {}))
    hidden, outer, vectors = {}, {}, {}
    for name, p in trained.items():
        if p.dim() < 2:
            vectors[name] = p
        elif any(word in name for word in ("embed", "lm_head", "score.", "ratings.", "pool.")):
            outer[name] = p
        elif "layers." in name:
            hidden[name] = p
        else:
            raise UserError(f"parameter {name} of shape {list(p.shape)} is in no block and is no "
                            "embedding or head: pass Optimiser your own groups")
    aux_decay = weight_decay if aux_decay < 0 else aux_decay
    if name_of(rule) == "adamw" and decay_embed and not aux_lr and aux_decay == weight_decay:
        hidden, outer = {n: p for n, p in trained.items() if p.dim() >= 2}, {}
    head = model.config.head_dim
    block = {n: head if n.endswith(("q_proj.weight", "k_proj.weight")) else 1 for n in hidden}
    dial = (aux_lr or lr) / (lr or 1.0)
    rows = [(hidden, rule, weight_decay, 1.0), (outer, aux, aux_decay * decay_embed, dial),
            (vectors, aux, 0.0, dial)]
    return [dict(params=list(ps.values()), names=list(ps), rule=r, lr=lr * scale, weight_decay=wd,
                 scale=scale, block=block) for ps, r, wd, scale in rows if ps]


def optimiser(model, rule=adamw, lr=1e-3, weight_decay=0.0, seed=0, *, aux_lr=0.0, aux_decay=-1.0,
              decay: Literal[*DECAYS] = "decoupled", decay_embed=True):
    """The Optimiser of a model's trainable parameters, in param_groups' groups (which explains
    aux_lr, aux_decay, decay_embed); decay: a row of DECAYS. Build it after sharding."""
    if lr < 0 or aux_lr < 0:
        raise UserError(f"--lr {lr} --aux_lr {aux_lr}: a learning rate is not negative")
    stored = {m.weight: m for m in model.modules() if isinstance(m, tuple(STORED.values()))}
    groups = param_groups(model, rule, lr, weight_decay, aux_lr, aux_decay, decay_embed)
    return Optimiser(groups, decay=decay, seed=seed, stored=stored)


def set_lr(optimiser, lr):
    """Set every group's learning rate, scaled by the group's own `scale` where it has one."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


# --- 3 the walker ---------------------------------------------------------------------------------

STACK = 1 << 26  # elements in a stack at most: gradients are copied once to batch a rule


def round_bf16(x, generators=None):
    """float32 -> the nearest bfloat16 values, still as float32; with generators, one a matrix, one
    of the two neighbours: a uniform 16-bit integer is added to the bits and the low half cut.

    Unbiased, exact for what is representable; infinities and NaN pass.
    """
    if not generators:
        return x.bfloat16().float()
    noise = torch.stack([torch.randint(0, 1 << 16, x.shape[1:], generator=g, dtype=torch.int32)
                         for g in generators]).to(x.device)
    cut = ((x.float().contiguous().view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), cut, x)


class Ranks:
    """How matrices of one shape lie: here whole, on one rank, so that every method hands through
    what it is given. mine: a matrix's rows on this rank; seconds: what a rule clocks of its work.

    local    a parameter or gradient -> this rank's rows of it
    pad      a rank's rows -> with zeros added, so that all ranks have as many
    whole    every rank's rows of K matrices [K, rows, n] -> this rank's own matrices, whole
    rows     the way back, for K matrices -> this rank's rows of all
    own      a list with an entry for each of K matrices -> the entries of this rank's own
    sum      -> the sum of every rank's tensor
    collect  a state tensor, of K matrices, lying by rows or by owner -> whole on rank 0, else None
    share    the way back: a whole state tensor -> this rank's share
    """

    def __init__(self, shape, unit=None):
        self.shape, self.size, self.mine, self.group = tuple(shape), 1, shape[0], None
        self.seconds = 0.0

    def through(self, x, *_):
        """Nothing to send."""
        return x

    local = pad = whole = rows = own = sum = collect = share = through

    @staticmethod
    def holds(p):
        """Whether this is how a parameter lies."""
        return True


RANKS = dict(one=Ranks)      # of those that hold a parameter, the last


class Unit:
    """A parameter that a rule updates: `ranks` says where it lies, `stored` is the layer of STORED
    that keeps it, if one does."""

    def __init__(self, name, p, stored):
        self.name, self.p, self.stored, self.shape = name, p, stored, tuple(p.shape)
        self.ranks = [x for x in RANKS.values() if x.holds(p)][-1](self.shape, self)

    def read(self):
        """The weights, in float32 or wider."""
        if self.stored:
            return self.stored.read()
        W = self.ranks.local(self.p.detach())
        return W if W.dtype == torch.float64 else W.float()

    def write(self, W, generator):
        """Keep W, rounded as the layer does it; in a bfloat16 parameter stochastically."""
        if self.stored:
            return self.stored.write(W, generator)
        p = self.ranks.local(self.p.detach())
        p.copy_(round_bf16(W[None], [generator])[0] if p.dtype == torch.bfloat16 else W)


class Stack(SimpleNamespace):
    """Units of one shape that take their steps together: group, units, state."""

    @property
    def ranks(self):
        """Where its matrices lie."""
        return self.units[0].ranks

    @property
    def name(self):
        """Its rule's."""
        return name_of(self.group["rule"])

    @property
    def by_rows(self):
        """Whether its rule runs on a rank's rows; the others run on the whole matrices it owns."""
        return self.name in ELEMENTWISE or "ranks" in needs(self.group["rule"])

    def gather(self, parts):
        """A tensor of this rank's rows for each unit -> what the rule gets, [K, m, n]."""
        x = torch.stack([self.ranks.pad(part) for part in parts])
        return x if self.by_rows else self.ranks.whole(x)

    def only(self, keep):
        """The stack of some of its units, with their share of the state."""
        size = self.ranks.size         # place: a rule that draws among all of them
        if "place" in needs(self.group["rule"]) or size > 1 and not self.by_rows:
            raise UserError(f"{self.name} needs a gradient for every matrix at every step"
                            + f" over {size} ranks" * (size > 1))
        at = torch.tensor(keep, device=self.units[0].p.device)
        state = {k: v[at] if torch.is_tensor(v) else v for k, v in self.state.items()}
        return Stack(group=self.group, units=[self.units[i] for i in keep], state=state)

    def save(self):
        """Its state of whole matrices on rank 0 (a collective call), and whose it is."""
        K = len(self.units)
        state = {k: self.ranks.collect(v, K, self.by_rows) if torch.is_tensor(v) else v
                 for k, v in self.state.items()}
        return dict(rule=self.name, names=[u.name for u in self.units], shape=self.ranks.shape,
                    state=state)

    def load(self, state):
        """Take this rank's share of what save wrote."""
        for key, x in state.items():
            if torch.is_tensor(x):         # cloned: the fused kernel walks memory, not strides
                x = self.ranks.share(x, self.by_rows)
                x = x.clone(memory_format=torch.contiguous_format).to(self.units[0].p.device)
            self.state[key] = x
        return self


class Optimiser(torch.optim.Optimizer):
    """Walks the parameters for every rule: stack gradients of one shape, get a direction, step.

    groups: dicts of params, names, rule, lr, weight_decay; if wanted block {name: rows of a head},
    scale (of the learning rate, see set_lr). decay: a row of DECAYS. A parameter without gradient
    is left alone. AdamW on float32 runs as PyTorch's fused kernel, bit for bit. UserError: a matrix
    rule on a vector, what a rule's check finds, an unknown decay.
    """

    def __init__(self, groups, *, decay="decoupled", seed=0, stored=None):
        if decay not in DECAYS:
            raise UserError(f"--decay {decay}{nearest(decay, DECAYS)}")
        super().__init__([dict(weight_decay=0.0) | g for g in groups], {})
        self.decay, self.seed, self.stacks = decay, seed, []
        for g, group in enumerate(self.param_groups):
            group["peak"] = group["lr"]
            group.setdefault("names", [f"{g}.{i}" for i in range(len(group["params"]))])
            units = [Unit(name, p, (stored or {}).get(p))
                     for name, p in zip(group["names"], group["params"])]
            group["number"] = {u.name: i for i, u in enumerate(units)}
            self.stacks += self.arrange(group, units)
        names = [u.name for x in self.stacks for u in x.units]
        if len(set(names)) < len(names):
            twin = max(names, key=names.count)
            raise UserError(f"two parameters are called {twin}: name them apart")

    def arrange(self, group, units):
        """Units into stacks of one shape, dtype and block, none larger than STACK elements."""
        rule, kinds = group["rule"], {}
        name = name_of(rule)
        for u in units:
            if name not in ELEMENTWISE and len(u.shape) != 2:
                raise UserError(f"{name} updates matrices, and {u.name} has shape {list(u.shape)}: "
                                "put it in a group with adamw")
            if name in CHECKS:
                CHECKS[name](u, **hyper(rule))
            block = group.get("block", {}).get(u.name, 1) if "block" in needs(rule) else 1
            kind = u.shape, u.p.dtype, u.ranks.group, block, bool(u.stored)
            kinds.setdefault(kind, []).append(u)
        out = []
        for (shape, *_), same in kinds.items():
            most = max(1, STACK // max(1, math.prod(shape)))
            out += [Stack(group=group, units=same[i:i + most], state=dict(t=0))
                    for i in range(0, len(same), most)]
        return out

    def seeds(self, stack):
        """A seed for each unit, from the run's and its name: whoever shares the stack."""
        texts = [f"{self.seed} {u.name}".encode() for u in stack.units]
        return [int.from_bytes(hashlib.sha256(text).digest()[:6]) for text in texts]

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient."""
        if closure is not None:
            raise UserError("Optimiser.step takes no closure: run forward and backward before it")
        for stack in list(self.stacks):
            has = [u.p.grad is not None for u in stack.units]
            if any(has):
                stack = stack if all(has) else self.part(stack, has)
                stack.state["t"] += 1
                self.move(stack, [stack.ranks.local(u.p.grad) for u in stack.units])

    def part(self, stack, has):
        """From now on the units with a gradient, which are returned, and those without count their
        steps apart."""
        i = next(i for i, x in enumerate(self.stacks) if x is stack)
        moving = stack.only([k for k, x in enumerate(has) if x])
        resting = stack.only([k for k, x in enumerate(has) if not x])
        self.stacks[i:i + 1] = [moving, resting]
        return moving

    def move(self, stack, grads):
        """Direction and step of one stack."""
        group, units, rule = stack.group, stack.units, stack.group["rule"]
        plain = all(not u.stored and u.p.dtype in (torch.float32, torch.float64) for u in units)
        if stack.name == "adamw" and plain and self.decay == "decoupled":
            return fused_adamw(stack, grads, **hyper(rule))
        g = stack.gather([x if x.dtype == torch.float64 else x.float() for x in grads])
        named = {k: ARGUMENTS[k](self, stack) for k in needs(rule)[2:]}
        d = rule(g, stack.state, **named)                                                # [K, m, n]
        d = d if stack.by_rows else stack.ranks.rows(d, len(units))
        before, after = DECAYS[self.decay](group["lr"], group["weight_decay"], group["peak"])
        if not plain:
            return self.rounded(stack, d, before, after)
        weights = [stack.ranks.local(u.p.detach()) for u in units]
        steps = [x[:len(w)].to(w.dtype) for x, w in zip(d.unbind(0), weights)]
        if before != 1.0:
            torch._foreach_mul_(weights, before)
        torch._foreach_add_(weights, steps, alpha=-group["lr"])
        if after != 1.0:
            torch._foreach_mul_(weights, after)

    def rounded(self, stack, d, before, after):
        """Decay and step of stored or bfloat16 weights, which are rounded; a rule in FEEDBACK hears
        of what that took."""
        group, s, errors = stack.group, stack.state, []
        for u, x, seed in zip(stack.units, d, self.seeds(stack)):
            W = u.read()
            wanted = (W * before - group["lr"] * x[:len(W)]) * after
            u.write(wanted, torch.Generator().manual_seed(seed + s["t"]))
            if stack.name in FEEDBACK:
                errors.append(stack.ranks.pad(wanted - u.read()))
        if errors:
            FEEDBACK[stack.name](torch.stack(errors), s, group["lr"], before, group["peak"],
                                 **hyper(group["rule"]))

    def state_dict(self):
        """Tensors and numbers, of whole matrices, on rank 0 (a collective call): for any ranks."""
        return dict(stacks=[x.save() for x in self.stacks])

    def load_state_dict(self, state):
        """Continue from state_dict(). UserError for the state of another optimiser or model."""
        if "stacks" not in state:
            raise UserError("this is the state of another kind of optimiser: start without "
                            "--resume")
        units = {u.name: (u, x.group) for x in self.stacks for u in x.units}
        saved = {n: x["rule"] for x in state["stacks"] for n in x["names"]}
        for n in sorted(saved.keys() | units.keys()):
            now = name_of(units[n][1]["rule"]) if n in units else "absent"
            if saved.get(n, "absent") != now:
                raise UserError(f"cannot resume with another optimiser: {n} was updated by "
                                f"{saved.get(n, 'nothing')} and is now {now}; use the run's own "
                                "settings")
        for x in state["stacks"]:
            if {units[n][0].shape for n in x["names"]} != {tuple(x["shape"])}:
                raise UserError(f"cannot resume: {x['names'][0]} had shape {list(x['shape'])} when "
                                "this state was saved: it belongs to another model")
        self.stacks = []
        for x in state["stacks"]:
            group = units[x["names"][0]][1]
            stack = Stack(group=group, units=[units[n][0] for n in x["names"]], state={})
            self.stacks.append(stack.load(x["state"]))


def memory_report(opt):
    """{rule: {"parameters": n, "bytes": n, "elements": {state: n}}} of this rank's state."""
    out = {}
    for stack in opt.stacks:
        row = out.setdefault(stack.name, dict(parameters=0, bytes=0, elements={}))
        row["parameters"] += sum(math.prod(u.shape) for u in stack.units)
        for key, x in stack.state.items():
            if torch.is_tensor(x):
                row["bytes"] += x.nbytes
                row["elements"][key] = row["elements"].get(key, 0) + x.numel()
    return out


# --- 4 schedules: (step, steps, warmup, …) -> factor on the peak learning rate --------------------


def warm(step, warmup):
    """Every schedule's linear warm-up: 1/warmup at step 0, 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def constant(step, steps, warmup=0):
    """1 after the warm-up."""
    return warm(step, warmup)


def linear(step, steps, warmup=0):
    """Linear from 1 at the end of the warm-up to 0 at `steps`."""
    return warm(step, warmup) * min(1.0, (steps - step) / max(1, steps - warmup))


def cosine(step, steps, warmup=0, *, floor: Share = 0.05):
    """Half a cosine (1608.03983) from 1 to `floor`."""
    done = max(0, step - warmup) / max(1, steps - warmup)
    wave = 1 + math.cos(math.pi * min(1.0, done))
    return warm(step, warmup) * (floor + (1 - floor) * 0.5 * wave)


SCHEDULES = dict(constant=constant, linear=linear, cosine=cosine)


# === state: ours, how large an optimiser's state will be, told before its first step ==============


def state_bytes(opt):
    """Bytes of the state that this rank will keep: each rule is asked for two directions of
    gradients without numbers; one that must see them counts as adamw."""
    total = 0
    for stack in getattr(opt, "stacks", ()):                         # torch's SGD keeps nothing
        g = torch.empty(len(stack.units), *stack.units[0].shape, device="meta")
        state, rule = {}, stack.group["rule"]
        numbers = {k: g if k == "W" else ARGUMENTS[k](opt, stack) for k in needs(rule)[2:]}
        try:
            for state["t"] in (1, 2):
                rule(g, state, **numbers)
            kept = sum(x.nbytes for x in state.values() if torch.is_tensor(x))
            total += kept // stack.ranks.size
        except (NotImplementedError, RuntimeError):
            total += 2 * g.nbytes // stack.ranks.size
    return total


# === muon: 2502.16982, the momentum's polar factor, for matrices inside the blocks only ===========


def need_matrix(g):
    """UserError for what is no matrix: norms, biases and other vectors belong to AdamW."""
    if g.dim() < 2:
        raise UserError(f"this rule updates matrices, and got a tensor of shape {list(g.shape)}: "
                        "leave norms, biases and other vectors to adamw")
    return g


SCALES = dict(
    rms=lambda m, n: 0.2 * max(m, n) ** 0.5,
    original=lambda m, n: max(1, m / n) ** 0.5,
    spectral=lambda m, n: (m / n) ** 0.5)


def scale_of(name, m, n):
    """The factor that gives orthogonalised m x n updates one learning-rate dial (m outputs).

    rms       0.2 √max(m, n): RMS 0.2 as AdamW's, whose lr and decay then transfer (2502.16982)
    original  √max(1, m/n): learning rates near 0.02 (Jordan et al.)
    spectral  √(m/n): as Dion's code has it
    """
    if name not in SCALES:
        raise UserError(f"--scale {name}{nearest(name, SCALES)}")
    return SCALES[name](m, n)


def orthogonalise(U, ranks, steps=5):
    """newton_schulz of K matrices spread by rows, each rank its own; sent in bfloat16 on CUDA, and
    clocked on the CPU."""
    sent = U.bfloat16() if U.is_cuda and ranks.size > 1 else U
    whole, start = ranks.whole(sent), time.perf_counter()
    O = newton_schulz(whole, steps)
    ranks.seconds += 0.0 if U.is_cuda else time.perf_counter() - start
    return ranks.rows(O, len(U)).to(U.dtype)


def muon(g, s, ranks, *, momentum: Fraction = 0.95, nesterov=True, ns_steps=5,
         scale: Literal[*SCALES] = "rms"):
    """Muon, Jordan et al. 2024; 2502.16982.   scale · NS(M),  M the momentum, looking ahead.

    ns_steps 0: normalised momentum SGD of the same RMS, the control. State mn.
    """
    m, n = ranks.shape
    M = ema(s, "m", need_matrix(g), momentum)
    U = g.lerp(M, momentum) if nesterov else M                                           # [K, m, n]
    same_rms = 1.0 if ns_steps else math.sqrt(min(m, n))
    return scale_of(scale, m, n) * same_rms * orthogonalise(U, ranks, ns_steps)


RULES["muon"] = muon


# === normuon: 2510.05491, Muon with every neuron's row normalised by its own past =================


def norm(x, dims=(-2, -1)):
    """Root of the sum of squares, dimensions kept."""
    return x.square().sum(dims, keepdim=True).sqrt()


def normuon(g, s, ranks, *, b1: Fraction = 0.95, b2: Fraction = 0.95, eps=1e-8, nesterov=True,
            ns_steps=5, scale: Literal[*SCALES] = "rms",
            axis: Literal["row", "short"] = "row", local_norm=False, row_floor=0.0):
    """NorMuon, 2510.05491.   O = NS(M),  v_i <- b2 v_i + (1 - b2) mean_j O_ij²,  N = O / (√v +
    eps), direction 0.2 √(mn) N / |N|_F:  RMS 0.2 as AdamW's (scale original, spectral: |N|_F =
    |O|_F, times it).

    v needs no bias correction, the rescaling cancels it. A row that is nearly dead steps as far as
    the others; row_floor 1e-4 (ours) keeps v at that part of its mean or above. nesterov as in the
    authors' code (the paper's algorithm has none). axis "short" (not the paper's): columns of wide
    matrices. Over several ranks M and v stay with the rows, one sum of scalars makes |N|_F exact;
    local_norm leaves it out (each shard its own norm, as in Dion's code). State mn + m.
    """
    if axis not in ("row", "short"):
        raise UserError(f"--axis {axis}: choose row or short")
    m, n = ranks.shape
    short = axis == "short" and m < n
    if short and ranks.size > 1:
        raise UserError("--axis short needs whole columns: run it on one rank")
    total = (lambda x: x) if local_norm else ranks.sum
    M = ema(s, "m", need_matrix(g), b1)
    U = g.lerp(M, b1) if nesterov else M
    O = orthogonalise(U, ranks, ns_steps)                                                # [K, m, n]
    v = ema(s, "v", O.square().mean(-2 if short else -1, keepdim=True), b2)              # [K, m, 1]
    if row_floor:
        mean = ranks.sum(v.sum((-2, -1), keepdim=True)) / (n if short else m)            # [K, 1, 1]
        v = torch.maximum(v, row_floor * mean)                          # the state keeps what it is
    N = O / (v.sqrt() + eps)
    size = total(norm(N).square()).sqrt().clamp(min=1e-12)                               # |N|_F
    if scale == "rms":
        rows = ranks.mine if local_norm else m
        return 0.2 * math.sqrt(rows * n) / size * N
    return scale_of(scale, m, n) * total(norm(O).square()).sqrt() / size * N


RULES["normuon"] = normuon


# === lion, lionk: 2302.06675, 2310.05898, the sign, or any norm's gradient, of two momenta ========


def lion(g, s, *, b1: Fraction = 0.9, b2: Fraction = 0.99):
    """Lion, 2302.06675 alg. 2.   sign(b1 m + (1 - b1) g);  then  m <- b2 m + (1 - b2) g.

    With decay λ it minimises the loss subject to |W|_inf <= 1/λ (2310.05898). State mn.
    """
    m = kept(s, "m", g)
    d = torch.lerp(g, m, b1).sign()  # before m moves: two different interpolations
    m.lerp_(g, 1 - b2)
    return d


def power_norm(c, p):
    """The gradient of |c|_p over a matrix:  sign(c) |c|^(p-1) / |c|_p^(p-1)."""
    size = c.abs().pow(p).sum((-2, -1), keepdim=True).pow((p - 1) / p)
    return c.sign() * c.abs().pow(p - 1) / size.clamp(min=1e-30)


KAPPAS = {"l1": torch.sign, "l1.5": partial(power_norm, p=1.5), "l2": partial(power_norm, p=2.0),
          "nuclear": newton_schulz}


def lionk(g, s, *, b1: Fraction = 0.9, b2: Fraction = 0.99,
          kappa: Literal[*KAPPAS] = "l2", rms_match=True):
    """Lion-κ, 2310.05898.   ∇κ(b1 m + (1 - b1) g),  κ a convex norm: l1 is Lion.

    Constraint: κ*'s unit ball / λ, so that l2 has |W|_F <= 1/λ, nuclear (Muon's polar factor)
    σ_max(W) <= 1/λ. rms_match: RMS 1 as the sign has, for every κ (ours); the radii grow along, of
    l2 to √(mn)/λ, of nuclear to √max(m, n)/λ. State mn.
    """
    if kappa not in KAPPAS:
        raise UserError(f"--kappa {kappa}{nearest(kappa, KAPPAS)}")
    m = kept(s, "m", need_matrix(g))
    d = KAPPAS[kappa](torch.lerp(g, m, b1))
    m.lerp_(g, 1 - b2)
    match = rms_match and kappa != "l1"
    return d * math.sqrt(g[0].numel()) / norm(d).clamp(min=1e-30) if match else d


RULES["lion"] = ELEMENTWISE["lion"] = lion
RULES["lionk"] = lionk


# === shampoo: 1802.09568, inverse fourth roots of both sides' covariances =========================


def cycles(unit, *, every, **_):
    """UserError for a cycle of no steps."""
    if every < 1:
        raise UserError(f"--every {every}: it counts steps, from 1")


def inverse_root(S, eps):
    """S^(-1/4) of symmetric S [K, m, m], eps · its mean eigenvalue added to each eigenvalue: after
    eigh and a clamp at 0, because rounding leaves negative ones that are larger than that."""
    w, Q = torch.linalg.eigh(S)
    floor = eps * S.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)                    # [K, 1]
    return Q * (w.clamp(min=0) + floor).clamp(min=1e-30).pow(-0.25)[:, None] @ Q.mT


def shampoo(g, s, *, b1: Fraction = 0.9, b2: Fraction = 0.95, every: Count = 10, eps=1e-6,
            graft=True):
    """Shampoo, 1802.09568 alg. 1 (averages for sums).   L^(-1/4) M R^(-1/4),  L of G Gᵀ, R of Gᵀ G,
    roots renewed every `every` steps. graft: to RMS 0.2, the usual size of Adam's step (ours:
    without its state).

    Its first step without momentum is G's polar factor: Muon is a Shampoo without memory.
    State mn + 2m² + 2n².
    """
    M = ema(s, "m", need_matrix(g), b1) if b1 else g
    L, R = ema(s, "L", g @ g.mT, b2), ema(s, "R", g.mT @ g, b2)
    if (s["t"] - 1) % every == 0:
        fix = 1 - b2 ** s["t"]
        s["L_root"], s["R_root"] = inverse_root(L / fix, eps), inverse_root(R / fix, eps)
    d = s["L_root"] @ M @ s["R_root"]
    return 0.2 * math.sqrt(g[0].numel()) / norm(d).clamp(min=1e-30) * d if graft else d


RULES["shampoo"], CHECKS["shampoo"] = shampoo, cycles


# === soap: 2409.11321, Adam in Shampoo's eigenbasis ===============================================


def adam_hf(g, s, b1, b2, eps, key=""):
    """m / (√v + eps): Adam as the low-rank papers' code has it, the bias correction left to
    `correction`, so that eps weighs 1/√(1 - b2ᵗ) more in the first steps than in `adam`."""
    m, v = ema(s, "m" + key, g, b1), ema(s, "v" + key, g * g, b2)
    return m / (v.sqrt() + eps)


def correction(t, b1, b2):
    """√(1 - b2ᵗ) / (1 - b1ᵗ): what those papers multiply into the learning rate."""
    return math.sqrt(1 - b2 ** t) / (1 - b1 ** t)


def soap(g, s, *, b1: Fraction = 0.95, b2: Fraction = 0.95, eps=1e-8, every: Count = 10):
    """SOAP, 2409.11321 alg. 3.   Q_L N Q_Rᵀ,  N Adam's direction of Q_Lᵀ G Q_R,  Q the eigenvectors
    of the averages of G Gᵀ and Gᵀ G, refreshed every `every` steps by one power iteration and a QR.

    As in the authors' code the first call only sets up the basis (W decays there, unlike in
    theirs), the basis follows the step, m is rotated into a new basis and v only permuted along.
    All sides are preconditioned: theirs leaves those above 10,000 alone. State 2mn + 2m² + 2n².
    """
    sides = [("L", "Q_L", need_matrix(g) @ g.mT), ("R", "Q_R", g.mT @ g)]
    if "Q_L" not in s:
        for S, Q, new in sides:
            s[S] = (1 - b2) * new
            s[Q] = torch.linalg.eigh(s[S])[1].flip(-1)                         # falling eigenvalues
        return torch.zeros_like(g)
    N = adam_hf(s["Q_L"].mT @ g @ s["Q_R"], s, b1, b2, eps)
    d = correction(s["t"] - 1, b1, b2) * s["Q_L"] @ N @ s["Q_R"].mT
    for S, Q, new in sides:
        ema(s, S, new, b2)
    if (s["t"] - 1) % every == 0:
        refresh_sides(s, sides)
    return d


def refresh_sides(s, sides):
    """One power iteration and a QR for the eigenvectors Q of both sides; m and v follow.

    Q's columns are sorted by diag(Qᵀ S Q) first.
    """
    m = s["Q_L"] @ s["m"] @ s["Q_R"].mT
    for S, Q, _ in sides:
        old = s[Q]
        order = (old * (s[S] @ old)).sum(-2).argsort(-1, descending=True)                # [K, side]
        along, side = (order[:, :, None], -2) if S == "L" else (order[:, None], -1)
        s["v"] = s["v"].take_along_dim(along, side)
        s[Q] = torch.linalg.qr(s[S] @ old.take_along_dim(order[:, None], -1))[0]
    s["m"] = s["Q_L"].mT @ m @ s["Q_R"]


RULES["soap"], CHECKS["soap"] = soap, cycles


# === adam_mini: 2406.16793, one second moment a row, or a head of q and k =========================


def rows_of_a_head(opt, stack):
    """How many rows of a matrix of q and k are a head's; 1 for other matrices."""
    return stack.group.get("block", {}).get(stack.units[0].name, 1)


def adam_mini(g, s, block, *, b1: Fraction = 0.9, b2: Fraction = 0.95, eps=1e-8):
    """Adam-mini, 2406.16793 alg. 1.   v_b <- b2 v_b + (1 - b2) mean_b(g²):  AdamW with one second
    moment for each block of rows, a head's (`block`) in q and k, else a single row.

    State mn + m, of q and k mn + heads.
    """
    square = need_matrix(g).square().mean(-1, keepdim=True)                              # [K, m, 1]
    square = square.unflatten(1, (-1, block)).mean(2)                              # [K, m/block, 1]
    m, v = ema(s, "m", g, b1), ema(s, "v", square, b2)
    root = ((v / (1 - b2 ** s["t"])).sqrt() + eps).repeat_interleave(block, 1)
    return m / (1 - b1 ** s["t"]) / root


RULES["adam_mini"], ARGUMENTS["block"] = adam_mini, rows_of_a_head


# === dion: 2504.05295, rank-r orthogonalised momentum with error feedback =========================


def rank_of(rank, shape):
    """--rank, or a quarter of the shorter side if it is 0; UserError if it exceeds that side."""
    short = min(shape[-2:])
    if rank > short or rank < 0:
        raise UserError(f"--rank {rank} does not fit a {shape[-2]}x{shape[-1]} matrix: choose 1 to "
                        f"{short}, or 0 for a quarter of the shorter side")
    return rank or max(1, short // 4)


def fits(unit, *, rank, **_):
    """UserError for a rank above the matrix's."""
    rank_of(rank, unit.shape)


def gauss(seeds, refresh, shape, like):
    """A normal [K, *shape], each matrix from its own seed and refresh count, whoever is in its
    stack."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s + refresh))
                        for s in seeds]).to(like)


def dion(g, s, seeds, *, rank=0, momentum: Fraction = 0.95, eps=1e-8,
         scale: Literal[*SCALES] = "spectral"):
    """Dion, 2504.05295.   M += G;  P = qr(M Q);  R = Mᵀ P;  M -= (1 - μ) P Rᵀ;  Q = R's columns
    over their norms;  direction scale · P Qᵀ.

    What P missed stays in M: error feedback. State mn + nr.
    """
    m, n = need_matrix(g).shape[-2:]
    if "Q" not in s:
        s["m"], s["Q"] = torch.zeros_like(g), gauss(seeds, 0, (n, rank_of(rank, g.shape)), g)
    M = s["m"].add_(g)
    alive = norm(M) > 0  # a matrix without gradient so far keeps its Q
    P = torch.linalg.qr(M @ s["Q"])[0] * alive                                           # [K, m, r]
    R = M.mT @ P                                                                         # [K, n, r]
    M.sub_((1 - momentum) * P @ R.mT)
    s["Q"] = torch.where(alive, R / (norm(R, -2) + eps), s["Q"])
    return scale_of(scale, m, n) * P @ s["Q"].mT


RULES["dion"], CHECKS["dion"] = dion, fits


# === galore: 2403.03507, Adam in the top singular directions of the gradient ======================


def turn(g):
    """A stack as it is if m >= n, else transposed: low-rank rules see the two as mirror images."""
    return g.mT if need_matrix(g).size(-2) < g.size(-1) else g


def turn_back(x, g):
    """x, made from turn(g), in g's own orientation."""
    return x.mT if g.size(-2) < g.size(-1) else x


def top_rows(G, r):
    """The top r right singular vectors of tall G [..., a, b], as rows [..., r, b]; at least
    float32."""
    wide = G if G.dtype == torch.float64 else G.float()
    return torch.linalg.svd(wide, full_matrices=False)[2][..., :r, :].to(G.dtype).contiguous()


def low_rank(unit, *, rank, every, **_):
    """UserError for a rank above the matrix's, or a cycle of no steps."""
    fits(unit, rank=rank)
    cycles(unit, every=every)


def galore(g, s, seeds, *, rank=0, every: Count = 200, scale: Positive = 0.25, b1: Fraction = 0.9,
           b2: Fraction = 0.999, eps=1e-6, basis: Literal["svd", "random"] = "svd"):
    """GaLore, 2403.03507 alg. 2.   scale · Adam(G Pᵀ) P,  P the top r right singular vectors of
    tall G (left ones of wide), renewed every `every` steps while Adam's moments stay.

    basis random: the control. A matrix whose gradient is 0 when P is renewed (LoRA's A at first)
    has an arbitrary P until the next time. State rb + 2ra.
    """
    if basis not in ("svd", "random"):
        raise UserError(f"--basis {basis}: choose svd or random")
    G = turn(g)                                                                          # [K, a, b]
    if (s["t"] - 1) % every == 0:
        r = rank_of(rank, G.shape)
        s["P"] = (top_rows(G, r) if basis == "svd" else
                  torch.linalg.qr(gauss(seeds, s["t"], (G.size(-1), r), G))[0].mT.contiguous())
    N = adam_hf(G @ s["P"].mT, s, b1, b2, eps)                                           # [K, a, r]
    return turn_back(scale * correction(s["t"], b1, b2) * N @ s["P"], g)


RULES["galore"], CHECKS["galore"] = galore, low_rank


# === fira: 2410.01623, GaLore plus the scaled rest of the gradient ================================


def limit_growth(S, s, growth):
    """Fira's norm-growth limiter (2410.01623): |S| may rise by the factor `growth` a step; 0: no
    limit.

    After a quiet phase a large gradient is throttled for many steps: about 70 to double at 1.01. A
    size of 0 (LoRA's A at first) sets no limit; in the authors' code it all but stops the matrix.
    """
    if not growth:
        return S
    size, prev = norm(S), kept(s, "prev", S[:, :1, :1])                                  # [K, 1, 1]
    over = torch.where(prev > 0, (size / (prev + 1e-8)).clamp(min=growth) / growth, 1.0)
    s["prev"] = torch.where(size > 0, size / over, prev)
    return S / over


def fira(g, s, *, rank=0, every: Count = 200, alpha=0.25, growth=1.01, b1: Fraction = 0.9,
         b2: Fraction = 0.999, eps=1e-6):
    """Fira, 2410.01623.   alpha · N P + φ_i (G - alpha R P)_i, the second part growth-limited:
    GaLore, and the rest of the gradient scaled row by row as Adam scaled its projection, φ_i =
    |N_i| / |R_i|.

    alpha inside the rest is the authors' code: for alpha < 1 it keeps a share of the subspace's
    gradient. State rb + 2ra + 1.
    """
    G = turn(g)
    if (s["t"] - 1) % every == 0:
        s["P"] = top_rows(G, rank_of(rank, G.shape))
    R = G @ s["P"].mT                                                                    # [K, a, r]
    N = adam_hf(R, s, b1, b2, eps)
    rest = norm(N, -1) / (norm(R, -1) + 1e-8) * (G - alpha * R @ s["P"])
    d = alpha * N @ s["P"] + limit_growth(rest, s, growth)
    return turn_back(correction(s["t"], b1, b2) * d, g)


RULES["fira"], CHECKS["fira"] = fira, low_rank


# === gradnormlorp: 2412.19616, GaLore on the rows' directions, Adam on their norms ================


def gradnormlorp(g, s, W, lr, *, rank=0, every: Count = 250, scale: Positive = 0.25,
                 b1: Fraction = 0.9, b2: Fraction = 0.999, eps=1e-6, exact=False):
    """GradNormLoRP, 2412.19616.   W = ρ V with unit rows V;  g_ρ = Σ_j V G  goes to Adam,
    g_V = G - V g_ρ  to GaLore;  W <- ρ' V'/|V'|.

    exact keeps the chain rule's factor ρ in g_V, which the code drops. The public code computes
    both updates but never rebuilds W; this is the paper's method, V and ρ recomputed from W.
    State rb + 2ra + 2m.
    """
    rho = norm(W, -1) + 1e-12                                                            # [K, m, 1]
    V = W / rho
    g_rho = (V * g).sum(-1, keepdim=True)
    G = turn((rho if exact else 1.0) * (g - V * g_rho))
    if (s["t"] - 1) % every == 0:
        s["P"] = top_rows(G, rank_of(rank, G.shape))
    fix = correction(s["t"], b1, b2)
    N = adam_hf(G @ s["P"].mT, s, b1, b2, eps)
    V = V - lr * scale * fix * turn_back(N @ s["P"], g)
    rho = rho - lr * fix * adam_hf(g_rho, s, b1, b2, eps, "_rho")
    return (W - rho * V / (norm(V, -1) + 1e-12)) / max(lr, 1e-12)


RULES["gradnormlorp"], CHECKS["gradnormlorp"] = gradnormlorp, low_rank


# === apollo, apollo_mini: 2412.05270, row or matrix step sizes from Adam on a random sketch =======


def apollo(g, s, seeds, *, rank=0, every: Count = 200, scale: Positive = 1.0, growth=1.01,
           front=False, tensor=False, b1: Fraction = 0.9, b2: Fraction = 0.999, eps=1e-6):
    """APOLLO, 2412.05270 alg. 1.   √scale · φ_i G_i,  φ_i = |N_i| / |R_i|,  N Adam's direction of
    the sketch R = G Pᵀ,  P normal / √r from the matrix's seed, redrawn every `every` steps and
    never stored.

    i: rows of a tall, columns of a wide matrix; with tensor, the whole. front: √scale before the
    growth limiter. A sketch shrinks φ by about √(r/n): scale n/r undoes that. State 2ra + 1.
    """
    G = turn(g)
    r = rank_of(rank, G.shape)
    P = gauss(seeds, (s["t"] - 1) // every, (r, G.size(-1)), G) / math.sqrt(r)           # [K, r, b]
    R = G @ P.mT                                                                         # [K, a, r]
    N = adam_hf(R, s, b1, b2, eps)
    dims = (-2, -1) if tensor else -1
    S = norm(N, dims) / (norm(R, dims) + 1e-8) * G
    first, then = (math.sqrt(scale), 1.0) if front else (1.0, math.sqrt(scale))
    S = then * limit_growth(first * S, s, growth)
    return turn_back(correction(s["t"], b1, b2) * S, g)


def apollo_mini(g, s, seeds, *, rank: Count = 1, every: Count = 200, scale: Positive = 128.0,
                growth=1.01, front=False, b1: Fraction = 0.9, b2: Fraction = 0.999, eps=1e-6):
    """APOLLO-Mini, 2412.05270.   One step size a matrix, of a rank-1 sketch; scale n/r at n 128.

    State 2a + 1.
    """
    return apollo(g, s, seeds, rank=rank, every=every, scale=scale, growth=growth, front=front,
                  tensor=True, b1=b1, b2=b2, eps=eps)


RULES["apollo"], CHECKS["apollo"] = apollo, low_rank
RULES["apollo_mini"], CHECKS["apollo_mini"] = apollo_mini, low_rank


# === frugal, frugal_columns: 2411.07837, Adam on some matrices or columns, sign-SGD on the rest ===


def density_fits(unit, *, density, every, **_):
    """UserError for a cycle of no steps, or a density that is no share."""
    cycles(unit, every=every)
    if not 0 <= density <= 1:
        raise UserError(f"--density {density}: it is a share from 0 to 1")


def on_one_rank(unit, *, density, every, **_):
    """UserError for a matrix over several ranks, too: they are drawn whole."""
    density_fits(unit, density=density, every=every)
    if unit.ranks.group:
        raise UserError("frugal draws whole matrices, on one rank: use frugal_columns over several")


def place(opt, stack):
    """What frugal draws from: the numbers of a stack's matrices, how many there are, a seed."""
    number = stack.group["number"]
    return [number[u.name] for u in stack.units], len(number), opt.seed


def frugal(g, s, place, *, density: Share = 0.25, every: Count = 200, kappa=1.0, b1: Fraction = 0.9,
           b2: Fraction = 0.999, eps=1e-8):
    """FRUGAL, 2411.07837, blocks.   Adam on round(density · count) whole matrices drawn anew every
    `every` steps, their moments from 0;  kappa · sign(g) on the others. kappa 0.1 for
    fine-tuning.

    State 2mn of the drawn. place: the stack's matrices' numbers among all, their count, a seed.
    """
    number, count, seed = place
    if (s["t"] - 1) % every == 0:
        generator = torch.Generator().manual_seed(seed + s["t"])
        active = set(torch.randperm(count, generator=generator).tolist()[:round(density * count)])
        on = [k for k, i in enumerate(number) if i in active]
        s["on"] = torch.tensor(on, device=g.device).long()
        s["m"], s["v"] = torch.zeros(2, len(s["on"]), *g.shape[1:]).to(g).unbind(0)
    d = kappa * g.sign()
    d[s["on"]] = adam(g[s["on"]], s, (s["t"] - 1) % every + 1, b1, b2, eps)
    return d


def frugal_columns(g, s, seeds, *, density: Share = 0.25, every: Count = 200, kappa=1.0,
                   b1: Fraction = 0.9, b2: Fraction = 0.999, eps=1e-8):
    """FRUGAL, 2411.07837, columns.   Adam on ⌊density · n⌋ columns of every matrix, drawn anew (by
    its seed, not stored) every `every` steps, moments from 0;  kappa · sign(g) elsewhere.

    State 2mn density.
    """
    n, period = need_matrix(g).size(-1), (s["t"] - 1) // every
    drawn = [torch.randperm(n, generator=torch.Generator().manual_seed(x + period)) for x in seeds]
    J = torch.stack(drawn)[:, None, :int(density * n)].to(g.device)                      # [K, 1, c]
    J = J.expand(-1, g.size(-2), -1)
    if (s["t"] - 1) % every == 0:
        s["m"], s["v"] = torch.zeros(2, *J.shape).to(g).unbind(0)
    step = adam(g.gather(-1, J), s, (s["t"] - 1) % every + 1, b1, b2, eps)
    return (kappa * g.sign()).scatter(-1, J, step)


RULES["frugal"], CHECKS["frugal"], ARGUMENTS["place"] = frugal, on_one_rank, place
RULES["frugal_columns"], CHECKS["frugal_columns"] = frugal_columns, density_fits


# === codes: 2110.02861, 2407.08296, states in 8 bits, weights in groups of few bits ===============


# States lie in blocks of 256 values, each over its largest, as indices into a table whose steps are
# finer near 0, so that a second moment's small entries survive.

BLOCK = 256


def code_table(signed):
    """256 sorted values in [-1, 1] or [0, 1]: seven decades, each twice as fine as that below."""
    values = [0.0, 1.0]
    for decade in range(7):
        cells = 2 ** decade * (1 if signed else 2)
        edges = torch.linspace(0.1, 1.0, cells + 1, dtype=torch.float64)
        centres = (10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
        values += centres + ([-x for x in centres] if signed else [])
    return torch.tensor(sorted(values))


TABLES = {"m": code_table(True), "v": code_table(False)}


def put8(s, key, x):
    """Store x [K, …] under key as 8-bit codes, and a float32 scale for each block of 256 (m is
    signed, v not)."""
    flat = F.pad(x.flatten(1).float(), (0, -x[0].numel() % BLOCK))
    flat = flat.unflatten(1, (-1, BLOCK))                                              # [K, B, 256]
    scale = flat.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    table = TABLES[key].to(x.device)
    middle = (table[1:] + table[:-1]) / 2
    s[key + "8"], s[key + "_scale"] = torch.bucketize(flat / scale, middle).to(torch.uint8), scale


def get8(s, key, like):
    """What put8 stored, in the shape of `like`; zeros if nothing is there yet."""
    if key + "8" not in s:
        return torch.zeros_like(like)
    flat = TABLES[key].to(like.device)[s[key + "8"].long()] * s[key + "_scale"]
    return flat.flatten(1)[:, :like[0].numel()].reshape(like.shape).to(like.dtype)


def quantize_groups(w, bits, group=256, generators=None, spare=False):
    """Asymmetric codes of groups of consecutive entries (Q-GaLore, 2407.08296).   w [K, N], N a
    multiple of group -> codes [K, N/g, g], scale, zero [K, N/g, 1];  w ≈ (codes - zero) scale.

    scale = (max - min) / (2ᵇ - 1) of the group *with 0*, so that the zero point is always a code:
    the public code clamps it instead, and breaks groups on one side of 0. generators, one a matrix:
    stochastic rounding instead of rounding to nearest. spare leaves one code unused, so that
    stochastic rounding clips at no end and is unbiased; a store must round to one grid always.
    """
    w, top = w.unflatten(1, (-1, group)).float(), 2 ** bits - 1
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-5) / (top - spare)
    zero = -low / scale
    zero = (zero - 1e-3).ceil() if spare else zero.round()            # 1e-3: float32's own error
    x = w / scale
    if generators:
        u = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]).to(x)
        x = x.floor() + (u < x - x.floor())
    return (x.round() + zero).clamp(0, top), scale, zero


# === stored: 2407.08296, linear layers whose only copy of W is rounded to 16, 8 or 4 bits =========


class StoredLinear(nn.Module):
    """A trainable linear layer that keeps W in `kind`: bfloat16, int8 or int4 (codes of `group`
    consecutive entries, a float32 scale and zero each). No float copy outlives a forward and
    backward.

    `weight` only stands for W: one zero, expanded to W's shape, so that autograd hands the
    optimiser W's gradient. rounding: stochastic (unbiased) or nearest (steps under half a grid step
    are lost).
    """

    def __init__(self, linear, kind, group=256, rounding="stochastic"):
        super().__init__()
        W = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.kind, self.size, self.stochastic = kind, group, rounding == "stochastic"
        self.weight = nn.Parameter(torch.zeros(1, device=W.device).expand(W.shape))
        if kind == "bfloat16":
            self.register_buffer("stored", W.bfloat16())
        else:
            for key, x in zip(("stored", "scale", "zero"), self.encode(W, None)):
                self.register_buffer(key, x)

    def encode(self, W, generator):
        """W -> codes (two a byte for int4), scale, zero."""
        bits, flat = int(self.kind[3:]), W.flatten()[None].float()
        flat = F.pad(flat, (0, -flat.size(1) % self.size))
        codes, scale, zero = quantize_groups(flat, bits, self.size, generator and [generator],
                                             self.stochastic)
        codes = pack_bits(codes[0], bits) if bits < 8 else codes[0].to(torch.uint8)
        return codes, scale[0], zero[0]

    def read(self):
        """W in float32 [out, in]."""
        if self.kind == "bfloat16":
            return self.stored.float()
        codes = unpack_bits(self.stored, 4, self.size) if self.kind == "int4" else self.stored
        W = ((codes - self.zero) * self.scale).flatten()
        return W[:self.in_features * self.out_features].view(self.out_features, self.in_features)

    @torch.no_grad()
    def write(self, W, generator):
        """Round W into the store; groups that did not change keep their codes: rounding them again
        would add noise."""
        generator = generator if self.stochastic else None
        if self.kind == "bfloat16":
            return self.stored.copy_(round_bf16(W[None], generator and [generator])[0])
        moved = F.pad((W != self.read()).flatten(), (0, -W.numel() % self.size))
        moved = moved.view(-1, self.size).any(1, keepdim=True)
        for old, new in zip((self.stored, self.scale, self.zero), self.encode(W, generator)):
            old.copy_(torch.where(moved, new, old))

    def forward(self, x):
        return F.linear(x, self.weight + self.read().to(self.weight.dtype), self.bias)

    def merged(self):
        """The plain linear layer with these weights."""
        out = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        out.weight, out.bias = nn.Parameter(self.read()), self.bias
        return out


STORED["linear"] = StoredLinear


# === float32, bfloat16, int8, int4: 2407.08296, 2601.22101, how the blocks' matrices are kept =====


def store(model, kind, group, rounding):
    """Put every block matrix of the model into StoredLinear, in place; UserError for a wrong
    rounding, groups of no weight, or packed layers."""
    if rounding not in ("stochastic", "nearest"):
        raise UserError(f"--rounding {rounding}: choose stochastic or nearest")
    if kind != "bfloat16" and group < 1:
        raise UserError(f"--group {group}: a group holds at least 1 weight")
    if any(isinstance(m, PackedLinear) for m in model.modules()):
        raise UserError(f"--store {kind}: this checkpoint's packed layers are stored already and "
                        "frozen; start from the one that it was compressed from")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("_proj"):
                setattr(parent, name, StoredLinear(child, kind, group, rounding))
    return model


def store_float32(model):
    """Float32 weights: the usual."""
    return model


def store_bfloat16(model, *, rounding: Literal["stochastic", "nearest"] = "stochastic"):
    """Block matrices in bfloat16 only, without a float32 master copy."""
    return store(model, "bfloat16", 0, rounding)


def store_int8(model, *, group: Count = 256,
               rounding: Literal["stochastic", "nearest"] = "stochastic"):
    """Block matrices in 8-bit codes only (Q-GaLore, 2407.08296): 1.03 bytes a weight."""
    return store(model, "int8", group, rounding)


def store_int4(model, *, group: Count = 32,
               rounding: Literal["stochastic", "nearest"] = "stochastic"):
    """Block matrices in 4-bit codes only (ECO's hard case, 2601.22101): 0.75 bytes a weight."""
    return store(model, "int4", group, rounding)


STORES = dict(float32=store_float32, bfloat16=store_bfloat16, int8=store_int8, int4=store_int4)


# === qgalore: 2407.08296, GaLore with a 4-bit basis, 8-bit Adam and lazy refreshes ================


def unpack_basis(s, k, r, b):
    """The bases of matrices k from 4 bits, [k, r, b]."""
    codes = unpack_bits(s["P4"][k], 4, s["P4"].size(1) * 2).unflatten(1, (-1, BLOCK))
    return ((codes - s["P_zero"][k]) * s["P_scale"][k]).flatten(1)[:, :r * b].view(-1, r, b)


def renew_basis(s, G, r, threshold):
    """The basis of every matrix of G [K, a, b] whose turn it is; T doubles where it stays put."""
    b, due = G.size(-1), (s["next"] == s["t"]).nonzero()[:, 0]
    if not len(due):
        return
    P = top_rows(G[due], r)                                                            # [due, r, b]
    old = unpack_basis(s, due, r, b).to(G.dtype)
    cos = F.cosine_similarity(old[:, 0], P[:, 0], dim=-1).abs().float()
    seen = s["svds"][due] > 0
    s["cos"][due[seen]] = torch.cat([s["cos"][due[seen], 1:], cos[seen, None]], 1)
    calm = due[(s["cos"][due].amin(1) >= 0) & (s["cos"][due].mean(1) >= threshold)]
    s["T"][calm] *= 2
    s["next"][due] += s["T"][due]
    s["svds"][due] += 1
    codes, scales, zeros = quantize_groups(F.pad(P.flatten(1), (0, -r * b % BLOCK)), 4, BLOCK)
    s["P4"][due] = pack_bits(codes.flatten(1), 4)
    s["P_scale"][due], s["P_zero"][due] = scales, zeros


def qgalore(g, s, *, rank=0, every: Count = 200, scale: Positive = 0.25, b1: Fraction = 0.9,
            b2: Fraction = 0.999, eps=1e-6, threshold=0.4, lazy: Count = 5):
    """Q-GaLore, 2407.08296.   GaLore with P in 4 bits, Adam's moments in 8, and for each matrix a
    refresh every T steps: T doubles when the top singular vector's |cos| to its (4-bit)
    predecessor, averaged over the last `lazy` refreshes, is at least `threshold` (the public code
    forgets the sign's ambiguity).

    The paper stores the weights in 8 bits too: --store int8. State ~ rb/2 + 2ra bytes.
    """
    G = turn(g)
    K, r, b = len(G), rank_of(rank, G.shape), G.size(-1)
    if "T" not in s:
        s["T"], s["next"], s["svds"] = (torch.full((K,), x, device=g.device) for x in (every, 1, 0))
        s["cos"] = torch.full((K, lazy), -1.0, dtype=torch.float32, device=g.device)
        groups = -(-r * b // BLOCK)
        s["P4"] = torch.zeros(K, groups * BLOCK // 2, dtype=torch.uint8, device=g.device)
        s["P_scale"], s["P_zero"] = torch.ones(2, K, groups, 1, dtype=torch.float32,
                                               device=g.device)
    renew_basis(s, G, r, threshold)
    P = unpack_basis(s, slice(None), r, b).to(G.dtype)                                   # [K, r, b]
    R = G @ P.mT                                                                         # [K, a, r]
    m, v = get8(s, "m", R).lerp_(R, 1 - b1), get8(s, "v", R).lerp_(R * R, 1 - b2)
    put8(s, "m", m)
    put8(s, "v", v)
    return turn_back(scale * correction(s["t"], b1, b2) * (m / (v.sqrt() + eps)) @ P, g)


RULES["qgalore"], CHECKS["qgalore"] = qgalore, low_rank


# === eco, eco_sgd: 2601.22101, rounding errors of stored weights go into the momentum =============


def pays_back(unit, *, b1=1.0, momentum=1.0, **_):
    """UserError for too little momentum."""
    if min(b1, momentum) < 0.5:
        raise UserError("eco pays rounding errors back through its momentum: give it 0.5 or more")


def eco(g, s, *, b1: Fraction = 0.9, b2: Fraction = 0.999, eps=1e-8):
    """ECO on Adam, 2601.22101.   AdamW's direction; after the weights are rounded to their grid
    (--store), `feed_adam` gives the error to m, which pays it back: no float master copy is kept.

    State 2mn, and no master.
    """
    return adam(g, s, s["t"], b1, b2, eps)


def feed_adam(e, s, lr, shrink, peak, *, b1, b2, eps):
    """m += (1 - b1ᵗ)/lr · (1 - 1/b1) · (√v̂ + eps) · e,  e what rounding took from W;  shrink: 1 -
    lr λ. Not below a thousandth of the peak lr, where 1/lr would blow the errors up."""
    if lr <= 1e-3 * peak:
        return
    t = s["t"]
    root = (s["v"] / (1 - b2 ** t)).sqrt() + eps
    s["m"] += shrink * (1 - b1 ** t) / lr * (1 - 1 / b1) * root * e


def eco_sgd(g, s, *, momentum: Fraction = 0.9):
    """ECO on momentum SGD, 2601.22101.   m <- μ m + (1 - μ) g.   W - lr μ/(1-μ) m moves exactly by
    -lr g.

    State mn, and no master.
    """
    return ema(s, "m", g, momentum)


def feed_sgd(e, s, lr, shrink, peak, *, momentum):
    """m += (1 - 1/μ)/lr · e:  the sign is that of μ < 1, so what was rounded away is pushed
    again; lr as in feed_adam."""
    if lr > 1e-3 * peak:
        s["m"] += shrink * (1 - 1 / momentum) / lr * e


RULES["eco"] = ELEMENTWISE["eco"] = eco
RULES["eco_sgd"] = ELEMENTWISE["eco_sgd"] = eco_sgd
CHECKS["eco"] = CHECKS["eco_sgd"] = pays_back
FEEDBACK["eco"], FEEDBACK["eco_sgd"] = feed_adam, feed_sgd


# === classp: 2405.09637, AdaGrad with a threshold, which protects earlier tasks ===================


def classp(g, s, *, threshold=0.5, eps=1e-5, p: Positive = 1.0, suppress=True):
    """CLASSP, 2405.09637.   where g² > threshold:  h += |g|^p,  g / (eps + h)^(1/p);  elsewhere 0.

    suppress false: the first task, h only gathers. Use no decay: it would touch what is masked.
    p 2 and threshold 0 are AdaGrad. The paper's equation; the author's code gates whole tensors and
    discards p. State mn.
    """
    h = kept(s, "h", g)
    on = g.square() > threshold
    h += on * g.abs().pow(p)
    return on * (g / (eps + h).pow(1 / p) if suppress else g)


RULES["classp"] = ELEMENTWISE["classp"] = classp


# === ranks: the rows of every matrix spread over several processes, as FSDP2 does it ==============


class Shards:
    """As Ranks, which explains the methods, but P ranks hold ⌈m/P⌉ rows each: FSDP2's Shard(0).

    Matrix k belongs to rank k mod P, which alone does the work that needs all of it. Rules that
    name `ranks` and those of ELEMENTWISE take each rank's rows and send only what they must, the
    others get whole matrices. height: rows of a rank with the zeros that are added.
    """

    def __init__(self, shape, unit):
        p = unit.p
        if unit.stored or [str(x) for x in p.placements] != ["S(0)"]:
            raise UserError(f"{unit.name}: over ranks it must be float and sharded by rows")
        self.shape, self.group, self.seconds = shape, p.device_mesh.get_group(), 0.0
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.height = -(-shape[0] // self.size)
        self.mine = max(0, min(self.height, shape[0] - self.rank * self.height))

    @staticmethod
    def holds(p):
        """Whether p is spread over ranks."""
        if not dist.is_initialized():
            return False
        from torch.distributed.tensor import DTensor         # here: it takes a second to import
        return isinstance(p, DTensor)

    def local(self, x):
        return x.to_local()

    def pad(self, x):
        missing = self.height - x.size(0)
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x

    def exchange(self, x):
        """x [P, …]: part p goes to rank p; -> what all ranks sent here, [P, …]."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=self.group)
        return out

    def whole(self, x):
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, -x.size(0) % self.size))
        parts = self.exchange(x.unflatten(0, (-1, self.size)).transpose(0, 1))
        return parts.transpose(0, 1).flatten(1, 2)[:, :self.shape[0]].contiguous()   # [K/P, m, n]

    def rows(self, x, K):
        x = F.pad(x, (0, 0, 0, self.height * self.size - x.size(1)))
        parts = self.exchange(x.unflatten(1, (self.size, -1)).transpose(0, 1))
        return parts.transpose(0, 1).flatten(0, 1)[:K]                            # [K, height, n]

    def own(self, values):
        mine = values[self.rank::self.size]
        return mine + [0] * (-(-len(values) // self.size) - len(mine))

    def sum(self, x):
        dist.all_reduce(x := x.contiguous(), group=self.group)
        return x

    def collect(self, x, K, by_rows):
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        if self.rank:
            return None
        if by_rows:
            x = torch.cat(parts, 1)[:, :self.shape[0]]
        else:
            x = torch.stack(parts, 1).flatten(0, 1)[:K]
        return x.cpu().contiguous()

    def share(self, x, by_rows):
        if not by_rows:
            x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, -x.size(0) % self.size))
            return x[self.rank::self.size]
        missing = self.height * self.size - x.size(1)
        x = F.pad(x.transpose(0, 1), (0, 0) * (x.dim() - 1) + (0, missing)).transpose(0, 1)
        return x[:, self.rank * self.height:(self.rank + 1) * self.height]


RANKS["rows"] = Shards


# === wsd: 2404.06395, warm-up, stable, decay: runs of any length share their stable part ==========


COOLDOWNS = dict(
    linear=lambda x: 1 - x,
    exp=lambda x: 0.5 ** (5 * x),
    sqrt=lambda x: 1 - math.sqrt(x))


def wsd(step, steps, warmup=0, *, cooldown: Share = 0.2, shape: Literal[*COOLDOWNS] = "linear"):
    """Warm-up, stable, decay (MiniCPM, 2404.06395): 1, then down over the last `cooldown` of the
    steps: linear to 0, exp (MiniCPM's, five half-lives: to 1/32), or sqrt (1 - √)."""
    if shape not in COOLDOWNS:
        raise UserError(f"--shape {shape}{nearest(shape, COOLDOWNS)}")
    length = cooldown * steps
    done = (step - (steps - length)) / max(1, length)
    return warm(step, warmup) * (COOLDOWNS[shape](min(1.0, done)) if done > 0 else 1.0)


SCHEDULES["wsd"] = wsd


# === power: 2408.13359, a rate of the batch and of the tokens seen, not of the run's length =======


def power(step, steps, warmup, lr, batch, tokens, *, a: Positive = 4.0, b: Range("[-9, 9]") = -0.51,
          cooldown: Share = 0.1):
    """Power scheduler, 2408.13359.   min(lr, batch · a nᵇ) / lr  at n tokens seen, lr its ceiling
    (0.02 there): it does not depend on `steps`, but for a linear end over the last `cooldown` of
    them."""
    n = (step + 1) * tokens
    return min(1.0, batch * a * n ** b / lr) * wsd(step, steps, warmup, cooldown=cooldown)


SCHEDULES["power"] = power


# === weighted: of several objectives, whose gradients G [M, D] become one [D], the weighted sum ===


def shares(weights, M):
    """"0.8,0.2" as M numbers that sum to 1; "" is equal shares."""
    try:
        w = [float(x) for x in weights.split(",")] if weights else [1.0] * M
    except ValueError:
        w = []
    if len(w) != M or min(w) < 0 or sum(w) == 0:
        raise UserError(f"--weights {weights}: give {M} numbers, one for each objective, like "
                        "0.8,0.2")
    return torch.tensor(w, dtype=torch.float64) / sum(w)


def weighted(G, *, weights=""):
    """Linear scalarisation:  Σ_i w_i g_i."""
    return shares(weights, len(G)).to(G) @ G


COMBINE = dict(weighted=weighted)


# === cagrad: 2602.02495, a step that no objective pays for ========================================


def golden_section(value, high, tolerance=1e-7):
    """The argmin of a convex function between 0 and `high`."""
    golden, low = (math.sqrt(5) - 1) / 2, 0.0
    while high - low > tolerance:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if value(a) < value(b) else (a, high)
    return (low + high) / 2


def moved(p, i, j, x):
    """p with the mass of i and j divided anew: x to i, the rest to j."""
    q = p.clone()
    q[i], q[j] = x, (p[i] + p[j]).item() - x
    return q


def worst_direction(K, w, c, sweeps=100):
    """argmin_p over the simplex of ⟨G_p, g_0⟩ + c ‖g_0‖ ‖G_p‖, from the Gram matrix K [M, M] alone
    -> p [M].

    A convex function, so mass moves between two objectives at a time, each time by a golden
    section.
    """
    norm = (w @ K @ w).clamp(min=0).sqrt()

    def value(p):
        return (p @ K @ w + c * norm * (p @ K @ p).clamp(min=0).sqrt()).item()

    p = w.clone()
    pairs = [(i, j) for i in range(len(p)) for j in range(i)]
    for _ in range(sweeps):
        before = value(p)
        for i, j in pairs:
            both = (p[i] + p[j]).item()
            best = golden_section(lambda x: value(moved(p, i, j, x)), both)
            p = min((moved(p, i, j, x) for x in (0.0, best, both)), key=value)
        if before - value(p) < 1e-12:
            break
    return p


def cagrad(G, *, weights="", c=0.4, clipped=True):
    """RACO, 2602.02495: conflict-averse gradient, its mixture clipped by the user's weights.

    g_0 = Σ w_i g_i;  p = worst_direction;  p_i <- min(p_i, w_i) if clipped;  g_0 + c ‖g_0‖
    G_p/‖G_p‖. Clipping changes nothing where p is one-hot, since G_p is normalised. [M, D] -> [D]
    """
    w = shares(weights, len(G))
    p = worst_direction((G @ G.T).double().cpu(), w, c)
    mix = (torch.minimum(p, w) if clipped else p).to(G) @ G                              # [D]
    g0 = w.to(G) @ G
    return g0 + c * g0.norm() * mix / mix.norm() if mix.norm() > 0 else g0


COMBINE["cagrad"] = cagrad


# === maxmin: 2402.08925, only the objective that is worst off =====================================


def maxmin(G, losses):
    """Max-min DPO (after 2402.08925): the gradient of the objective whose loss is largest."""
    return G[losses.argmax()]


COMBINE["maxmin"] = maxmin
