"""
structure.py - structural compression: a smaller model out of a trained one, then distillation.

    for student in slimmoe(model, teacher, batches, generator, share=0.125, stages=2):    # a
    generator cuts,
        distil(student, teacher, batch_of, steps)                                        # its
        caller distils

Map      1 slicing   2 distillation   3 SlimMoE   4 Minitron and PruneNet   5 Puzzle   6 SwiftKV and
MoH Letters  B rows, T tokens, D width, V vocabulary, f neurons of an MLP, G groups of heads, L
layers, E experts
row            paper         what is cut                                           chosen by
slimmoe        2506.18349    neurons of every expert, groups of heads, in stages   gradient of the
KD loss
fresh          -             everything: slimmoe's sizes with new weights          nothing
dense_active   -             everything: a dense model of its active size           nothing
drop_experts   2404.05089    whole experts and their router rows                   how often they
are used
minitron       2407.14679    neurons, once                                         their mean
activation
prunenet       2501.15296    neurons, once                                         a policy that
reads weights
puzzle         2411.19146    neurons, a width per layer, none at all included      exact search
under a budget
swiftkv        2410.03960    keys and values of late layers                        one early state
makes them
moh            2410.11842    heads of a token                                      a router
Watch    before distillation ways to choose differ by tenths of a nat, after it by hundredths:
report both.
"""
import dataclasses
import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.run import Count, Positive, Range, Share, UserError, needs

# --- 1 slicing ------------------------------------------------------------------------------------
# Models come in as they are: `config`, `layers` with `self_attn` and `mlp` (or None), Hugging
# Face's names.


def build(model, state, **changes):
    """A model of the same class with some config fields changed, holding the tensors of `state`."""
    with torch.device("meta"):
        new = type(model)(dataclasses.replace(model.config, **changes))
    new.load_state_dict({k: v.detach().clone() for k, v in state.items()}, assign=True)
    return new.requires_grad_()


def mlps(model):
    """{name: MLP} of every MLP, of every expert where there are experts:
    "layers.0.mlp.experts.3"."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "gate_proj")}


def top(score, count):
    """The `count` largest, ties by index, in their old order.   [n] -> [count]"""
    return score.argsort(descending=True, stable=True)[:count].sort().values


def rounded(width, multiple, most):
    """The multiple nearest to a width, at least one multiple, at most `most`."""
    return min(most, max(multiple, round(width / multiple) * multiple))


def slice_neurons(model, kept):
    """Keep some neurons of every MLP, as many in each: kept {name: indices}. -> a new model

    A neuron is a row of gate, one of up and a column of down, so the cut is exact."""
    state = dict(model.state_dict())
    for name, at in kept.items():
        for part in ("gate_proj", "up_proj"):
            state[f"{name}.{part}.weight"] = state[f"{name}.{part}.weight"][at]
        state[f"{name}.down_proj.weight"] = state[f"{name}.down_proj.weight"][:, at]
    return build(model, state, intermediate_size=len(next(iter(kept.values()))))


def slice_groups(model, kept):
    """Keep some groups of heads, a key head and the queries that share it: kept [L] indices. -> new
    model"""
    c, state = model.config, dict(model.state_dict())
    share = c.num_attention_heads // c.num_key_value_heads
    for i, at in enumerate(kept):
        rows = (at[:, None] * c.head_dim + torch.arange(c.head_dim).to(at)).flatten()      # of k, v
        wide = share * c.head_dim
        queries = (at[:, None] * wide + torch.arange(wide).to(at)).flatten()               # of q, o
        for part, index in (("q_proj", queries), ("k_proj", rows), ("v_proj", rows)):
            for kind in ("weight", "bias"):
                key = f"layers.{i}.self_attn.{part}.{kind}"
                state |= {key: state[key][index]} if key in state else {}
        key = f"layers.{i}.self_attn.o_proj.weight"
        state[key] = state[key][:, queries]
    return build(model, state, num_key_value_heads=len(kept[0]),
                 num_attention_heads=share * len(kept[0]))


def spread_outliers(model, factor, channels=2):
    """An exactly equivalent model with outliers: the first channels of every norm times factor, the
    columns that read them divided by it. In place."""
    for block in model.layers:
        for norm, readers in ((block.input_layernorm,
                               (block.self_attn.q_proj, block.self_attn.k_proj,
                                                       block.self_attn.v_proj)),
                              (block.post_attention_layernorm,
                               (block.mlp.gate_proj, block.mlp.up_proj))):
            with torch.no_grad():
                norm.weight[:channels] *= factor
                for layer in readers:
                    layer.weight[:, :channels] /= factor


# --- 2 distillation -------------------------------------------------------------------------------
# A loss is one number a token [N], its positional arguments name what it reads: logits s (student)
# and t (teacher) [N, V], final states hs, ht [N, D], inputs of the last block ms, mt [N, D], next
# ids y [N].


def kd_topk(s, t, *, k=8):
    """SlimMoE (2506.18349):  -Σ_{i in T} p_i log q_i,  T the teacher's k likeliest, q over all
    V.   [N]

    p is not renormalised over T (ours: the paper's choice is not known; it is a factor a token).
    The optimum has no mass outside T: where k tokens are not nearly all of p, forward_kl distils
    better."""
    p, at = t.softmax(-1).topk(min(k, t.size(-1)), -1)
    return -(p * s.log_softmax(-1).gather(-1, at)).sum(-1)


def forward_kl(s, t):
    """KL(p ‖ q), p the teacher's distribution.   [N]"""
    p = t.log_softmax(-1)
    return (p.exp() * (p - s.log_softmax(-1))).sum(-1)


def ce(s, y):
    """-log q of the next token: no teacher.   [N]"""
    return F.cross_entropy(s, y, reduction="none")


def cosine_kl(s, t, hs, ht):
    """Puzzle's global distillation (2411.19146):  1 - cos(h_s, h_t) + KL.  ours: of the final
    state.   [N]"""
    return 1 - F.cosine_similarity(hs, ht, dim=-1) + forward_kl(s, t)


def swift_kl(s, t, ms, mt, *, temperature=2.0):
    """SwiftKV (2410.03960):  τ² KL(p_τ ‖ q_τ) + MSE of the states that the last block
    reads.   [N]"""
    return (temperature ** 2 * forward_kl(s / temperature, t / temperature)
            + (wide(ms) - wide(mt)).square().mean(-1))


LOSSES = dict(kd_topk=kd_topk, forward_kl=forward_kl, ce=ce, cosine_kl=cosine_kl, swift_kl=swift_kl)


def wide(x):
    """x in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def states(model, tokens):
    """At all but the last token: logits [N, V], final state [N, D], input of the last block [N,
    D]."""
    seen = []
    hook = model.layers[-1].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    hidden = model(tokens)[:, :-1].flatten(0, 1)
    hook.remove()
    logits = F.linear(hidden, model.head)
    return wide(logits), hidden, seen[0][:, :-1].flatten(0, 1)


def token_losses(loss, student, teacher, tokens):
    """One of LOSSES on tokens [B, T]   -> [B (T-1)]"""
    have = dict(zip(("s", "hs", "ms"), states(student, tokens)), y=tokens[:, 1:].flatten())
    if needs(loss) != ["s", "y"]:
        with torch.no_grad():
            have |= dict(zip(("t", "ht", "mt"), states(teacher, tokens)))
    return loss(*(have[k] for k in needs(loss)))


@torch.no_grad()
def divergence(student, teacher, batches, loss=forward_kl):
    """Mean of a loss over batches [b, T] of tokens: by default KL(teacher ‖ student), in nats."""
    values = [token_losses(loss, student, teacher, x) for x in batches]
    return torch.cat(values).double().mean().item()


def forget(model):
    """Drop what the last forward kept for balance losses: it holds the graph, and cannot be
    copied."""
    for m in model.modules():
        for key in ("router_logits", "routing"):
            if hasattr(m, key):
                setattr(m, key, None)


def head_balance(model):
    """MoH's loss of the last forward (2410.11842):  R² mean_e(mean_t p_e · mean_t 1[e
    chosen]),  mean over layers: K when all of the R routed heads are used alike. 0 for a model
    without a router of heads."""
    found = [m.routing for m in model.modules() if hasattr(m, "routing")]
    means = [(p.flatten(0, 1).mean(0), chosen.flatten(0, 1).mean(0))
             for p, chosen in found]                                                      # [R] each
    return sum(len(p) * (p * chosen).sum() for p, chosen in means) / max(len(means), 1)


def distil(student, teacher, batch_of, steps, *, lr=1e-3, floor=0.1, warmup=0.05, decay=0.1,
           clip=1.0,
           loss="kd_topk", balance=0.01, log=None, name="distil"):
    """Train what requires a gradient, in place, on batch_of(step) -> tokens [b, T]. -> losses of
    all steps

    AdamW (0.9, 0.95), its state and schedule new in every call: linear warm-up over a share of the
    steps, then a cosine to floor * lr; decay on matrices. balance weighs head_balance. log(step,
    loss=, norm=). lr, warmup and the betas are ours.
    """
    if loss not in LOSSES:
        raise UserError(f"--loss {loss}: choose from {', '.join(LOSSES)}")
    train = [p for p in student.parameters() if p.requires_grad]
    if not train:
        raise UserError(f"{name}: no parameter of this student is trained")
    groups = [dict(params=[p for p in train if (p.dim() > 1) == wide], weight_decay=decay * wide)
              for wide in (True, False)]
    opt, history = torch.optim.AdamW([g for g in groups if g["params"]], lr, betas=(0.9, 0.95)), []
    warm = max(1, round(warmup * steps))
    bar = tqdm(range(steps), desc=name, disable=None, leave=False)
    for step in bar:
        turn = math.pi * max(0, step + 1 - warm) / max(1, steps - warm)
        for g in opt.param_groups:
            g["lr"] = lr * min((step + 1) / warm, floor + (1 - floor) * (1 + math.cos(turn)) / 2)
        value = token_losses(LOSSES[loss], student, teacher, batch_of(step)).mean()
        (value + balance * head_balance(student)).backward()
        norm = torch.nn.utils.clip_grad_norm_(train, clip)
        history.append(value.item())
        if not math.isfinite(history[-1] + norm.item()):
            raise UserError(f"the loss of {name} became {history[-1]}, its gradient {norm.item()} at step "
                            f"{step}: lower --lr {lr}")
        opt.step()
        opt.zero_grad()
        if log:
            log(step, loss=history[-1], norm=norm.item())
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {history[-1]:.4f}")
    forget(student)
    return history


# --- 3 SlimMoE (2506.18349) -----------------------------------------------------------------------


def taylor(mlp):
    """What deleting a neuron would change, to first order, from the gradients at hand,
    signed.   [f]

    <∂ℓ/∂W1_j, W1_j> + <∂ℓ/∂W3_j, W3_j> + <∂ℓ/∂W2_:j, W2_:j>;  W1, W3, W2 are gate, up, down."""
    w1, w3, w2 = (layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return (w1 * w1.grad).sum(1) + (w3 * w3.grad).sum(1) + (w2 * w2.grad).sum(0)


def taylor_groups(attention, groups):
    """The same for groups of heads: rows of q, k, v and columns of o.   [G]"""
    parts = [(layer.weight * layer.weight.grad).sum(1).view(groups, -1).sum(1)
             for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    out = attention.o_proj.weight
    return sum(parts) + (out * out.grad).sum(0).view(groups, -1).sum(1)


def sensitivity(model, teacher, batches, loss, power=1):
    """Σ over batches |Taylor term|^power of every neuron and group of heads. -> {name: [f]}, [L] of
    [G]

    Raises UserError where the gradient is rounding noise: at student = teacher the exact KL has
    none."""
    groups = model.config.num_key_value_heads
    neurons, heads = {name: 0.0 for name in mlps(model)}, [0.0] * len(model.layers)
    for tokens in tqdm(batches, desc="importance", disable=None, leave=False):
        model.zero_grad()
        token_losses(loss, model, teacher, tokens).mean().backward()
        with torch.no_grad():
            for name, m in mlps(model).items():
                neurons[name] = neurons[name] + taylor(m).abs() ** power
            for i, block in enumerate(model.layers):
                heads[i] = heads[i] + taylor_groups(block.self_attn, groups).abs() ** power
    model.zero_grad()
    forget(model)
    W = wide(next(iter(mlps(model).values())).down_proj.weight.detach())
    largest = (max(s.max().item() for s in neurons.values()) / len(batches)) ** (1 / power)
    if largest <= 1e3 * torch.finfo(W.dtype).eps * W.abs().mean().item():
        raise UserError(f"the largest importance is {largest:.2g}, rounding noise: at student = teacher this "
                        "loss has no gradient; take kd_topk, ce or fisher")
    return neurons, heads


def random_scores(model, generator):
    """Uniform numbers instead: the baseline. -> {name: [f]}, [L] of [G]"""
    draw = lambda n, like: torch.rand(n, generator=generator).to(like.device)
    return ({name: draw(len(m.gate_proj.weight), m.gate_proj.weight)
             for name, m in mlps(model).items()},
            [draw(model.config.num_key_value_heads, block.self_attn.o_proj.weight)
             for block in model.layers])


def mend_scores(model, neurons):
    """An expert that no token reached has scores 0: there the norm of a neuron's weights
    decides."""
    for name, m in mlps(model).items():
        if not neurons[name].any():
            w1, w3, w2 = (layer.weight.detach() for layer in (m.gate_proj, m.up_proj, m.down_proj))
            neurons[name] = (w1.square().sum(1) + w3.square().sum(1) + w2.square().sum(0)).sqrt()
    return neurons


def importance_of(kind, model, teacher, batches, generator):
    """Scores of neurons and groups by name: any loss of LOSSES, fisher or random."""
    if kind == "random":
        return random_scores(model, generator)
    if kind not in ("fisher", *LOSSES):
        raise UserError(f"--importance {kind}: choose from random, fisher, {', '.join(LOSSES)}")
    # fisher: Σ_b <g, θ>² of the likelihood's gradient (ours: the loss is not named)
    loss, power = (ce, 2) if kind == "fisher" else (LOSSES[kind], 1)
    neurons, heads = sensitivity(model, teacher, batches, loss, power)
    return mend_scores(model, neurons), heads


def path(size, share, stages, multiple):
    """Sizes on the way to share * size, by equal ratios, in multiples.   path(64, .125, 2, 8) ->
    [24, 8]"""
    if not 0 < share <= 1 or stages < 1:
        raise UserError(f"--share {share} --stages {stages}: a share in (0, 1], and at least one stage")
    return [rounded(size * share ** (s / stages), multiple, size) for s in range(1, stages + 1)]


def slimmoe(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.125,
            stages: Count = 2, importance: Literal["random", "fisher", *LOSSES] = "kd_topk",
            share_groups: Range("(0, 1]") = 1.0, multiple: Count = 8, at_once=False):
    """SlimMoE (2506.18349): all experts and the router stay, each expert keeps its most important
    neurons.

    Stages s = 1…S score the current student, cut to share^(s/S) of the width (and
    share_groups^(s/S) of the groups of heads), and are distilled from the first model. A dense MLP
    is one expert. ours: the geometric path, and scores summed over batches in absolute value;
    multiple is 64 at full size. at_once: the control that cuts everything in the first stage, so
    that the others only restart the distillation.
    """
    widths = path(model.config.intermediate_size, share, stages, multiple)
    groups = path(model.config.num_key_value_heads, share_groups, stages, 1)
    for s in range(stages):
        width, count = (widths[-1], groups[-1]) if at_once else (widths[s], groups[s])
        neurons, heads = importance_of(importance, model, teacher, batches, generator)
        model = slice_neurons(model, {name: top(s, width) for name, s in neurons.items()})
        model = slice_groups(model, [top(s, count) for s in heads])
        yield model


@torch.no_grad()
def renewed(model, generator):
    """The model with new weights, in place: std 0.02, on outputs 1/√(2L) of it (GPT-2)."""
    for name, p in model.named_parameters():
        out = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * len(model.layers) if out else 1)
        p.copy_(torch.full(p.shape, 0.0 if name.endswith("bias") else 1.0) if p.dim() == 1
                else torch.randn(p.shape, generator=generator) * std)
    return model


def fresh(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.125,
          share_groups: Range("(0, 1]") = 1.0, multiple: Count = 8):
    """The baseline of slimmoe's last sizes and new weights."""
    width = path(model.config.intermediate_size, share, 1, multiple)[0]
    count = path(model.config.num_key_value_heads, share_groups, 1, 1)[0]
    model = slice_neurons(model, {name: torch.arange(width) for name in mlps(model)})
    model = slice_groups(model, [torch.arange(count)] * len(model.layers))
    yield renewed(model, generator)


def dense_active(model, teacher, batches, generator, *,
                 share: Range("(0, 1]") = 0.125, multiple: Count = 8):
    """A dense model with new weights, as wide as the experts that a token of slimmoe's model
    passes."""
    c = model.config
    if not c.moe:
        raise UserError("dense_active needs a model with experts")
    width = path(c.intermediate_size, share, 1, multiple)[0] * c.num_experts_per_tok
    state = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    for i in range(len(model.layers)):
        wide, down = model.head.new_zeros(width,
                                          c.hidden_size), model.head.new_zeros(c.hidden_size, width)
        state |= {f"layers.{i}.mlp.{part}_proj.weight": w
                  for part, w in (("gate", wide), ("up", wide), ("down", down))}
    dense = dict(qwen3_moe="qwen3", mixtral="llama")[c.model_type]
    yield renewed(build(model, state, model_type=dense, num_experts=0, intermediate_size=width),
                  generator)


@torch.no_grad()
def usage(model, batches):
    """How many tokens choose every expert of every layer.   [L, E]"""
    c, counts = model.config, 0
    for tokens in batches:
        model(tokens)
        chosen = torch.stack([b.mlp.router_logits
                              for b in model.layers]).topk(c.num_experts_per_tok).indices
        counts = counts + F.one_hot(chosen, c.num_experts).sum((1, 2))
    forget(model)
    return counts


def drop_experts(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.125):
    """Expert dropping, as in SEER-MoE (2404.05089) but by layer (ours): the most used experts stay,
    and their router rows. Fewer experts than a token's choices: it gets all of them."""
    c = model.config
    if not c.moe:
        raise UserError("drop_experts needs a model with experts")
    count = path(c.num_experts, share, 1, 1)[0]
    state = dict(model.state_dict())
    for i, score in enumerate(usage(model, batches)):
        kept, where = top(score, count), f"layers.{i}.mlp"
        old = {k: state.pop(k) for k in list(state) if k.startswith(f"{where}.experts.")}
        for new, e in enumerate(kept.tolist()):
            start = f"{where}.experts.{e}."
            state |= {f"{where}.experts.{new}.{k.removeprefix(start)}": v
                      for k, v in old.items() if k.startswith(start)}
        state[f"{where}.gate.weight"] = state[f"{where}.gate.weight"][kept]
    yield build(model, state, num_experts=count,
                num_experts_per_tok=min(count, c.num_experts_per_tok))


# --- 4 Minitron and PruneNet ----------------------------------------------------------------------


@torch.no_grad()
def activity(model, batches):
    """Minitron's score (2407.14679):  sqrt Σ_samples (mean over tokens of |a_j|)²,  a what
    down_proj reads.

    An expert's tokens of one batch are one sample (ours: rows are no longer apart there). -> {name:
    [f]}"""
    scores = {name: 0.0 for name in mlps(model)}

    def note(name):
        def hook(layer, args):
            mean = args[0].float().abs().mean(-2).nan_to_num()                       # [B, f] or [f]
            scores[name] = scores[name] + mean.view(-1, mean.size(-1)).square().sum(0)
        return hook
    hooks = [m.down_proj.register_forward_pre_hook(note(name)) for name, m in mlps(model).items()]
    for tokens in batches:
        model(tokens)
    for hook in hooks:
        hook.remove()
    return mend_scores(model, {name: s.sqrt() for name, s in scores.items()})


def minitron(model, teacher, batches, generator, *,
             share: Range("(0, 1]") = 0.5, multiple: Count = 8):
    """Minitron (2407.14679), its width part for MLPs: one cut by activity, then forward_kl
    alone."""
    width = path(model.config.intermediate_size, share, 1, multiple)[0]
    yield slice_neurons(model,
                        {name: top(s, width) for name, s in activity(model, batches).items()})


def ks_distance(a, b):
    """Kolmogorov-Smirnov: the largest distance between the distribution functions of two lists of
    numbers."""
    x = torch.cat([a, b])
    below = [torch.searchsorted(values.sort().values, x, right=True) / len(values)
             for values in (a, b)]
    return (below[0] - below[1]).abs().max().item()


def spectrum_reward(W, kept):
    """PruneNet's reward:  1 / KS(singular values of W, of its kept rows), 99999 for equal ones."""
    distance = ks_distance(*(torch.linalg.svdvals(x.float()) for x in (W, W[kept])))
    return 1 / distance if distance else 99999.0


def relaxed(alpha, generator, eps=1e-6):
    """Relaxed Bernoulli:  σ(logit(e) + logit(α)),  e ~ U(0, 1), both held off 0 and 1.   [f]"""
    e = torch.rand(alpha.shape, generator=generator).to(alpha).clamp(eps, 1 - eps)
    return (e.logit() + alpha.clamp(eps, 1 - eps).logit()).sigmoid()


def learn_policy(weights, width, generator, *, episodes=20, lr=1e-3, discount=0.99):
    """PruneNet's policy (2501.15296), shared by all layers:  α = σ((W1 Aᵀ + c) v).   -> function W1
    -> α [f]

    weights: [f, D] of every layer. An episode samples `width` rows of each in proportion to
    relaxed(α), and steps AdamW on -γ^i r_i Σ_kept log relaxed(α), noise drawn anew. The policy of
    the largest Σ r stays.
    """
    f, D = weights[0].shape
    bound = 1 / math.sqrt(D)                     # torch's own start of a linear layer
    draw = lambda *shape: torch.rand(shape, generator=generator).to(weights[0])
    A, c, v = (2 * draw(f, D) - 1) * bound, (2 * draw(f) - 1) * bound, draw(f)
    x = [p.requires_grad_() for p in (A, c, v)]
    alpha = lambda W, A, c, v: ((W @ A.T + c) @ v).sigmoid()                             # [f]
    opt, best, most = torch.optim.AdamW(x, lr), None, -math.inf
    for _ in tqdm(range(episodes), desc="policy", disable=None, leave=False):
        total, loss, now = 0.0, 0.0, [p.detach().clone() for p in x]
        for i, W in enumerate(weights):
            a = alpha(W, *x)
            chance = relaxed(a.detach(), generator).cpu()
            kept = torch.multinomial(chance, width, generator=generator).to(W.device)
            reward = discount ** i * spectrum_reward(W, kept)
            total += reward
            loss = loss - reward * relaxed(a, generator)[kept].clamp(min=1e-6).log().sum()
        if total > most:
            best, most = now, total
        opt.zero_grad()
        loss.backward()
        opt.step()
    return lambda W: alpha(W, *best)


def prunenet(model, teacher, batches, generator, *,
             share: Range("(0, 1]") = 0.7, multiple: Count = 8, episodes: Count = 20, sampled=True):
    """PruneNet (2501.15296), without data: the policy samples rows once, as released, or takes its
    top α."""
    width = path(model.config.intermediate_size, share, 1, multiple)[0]
    weights = {name: m.gate_proj.weight.detach() for name, m in mlps(model).items()}
    policy, kept = learn_policy(list(weights.values()), width, generator, episodes=episodes), {}
    for name, W in weights.items():
        if sampled:
            chance = relaxed(policy(W), generator).cpu()
            kept[name] = torch.multinomial(chance, width,
                                           generator=generator).sort().values.to(W.device)
        else:
            kept[name] = top(policy(W), width)
    yield slice_neurons(model, kept)


# --- 5 Puzzle (2411.19146) ------------------------------------------------------------------------


def normalised_mse(made, wanted):
    """MSE(made, wanted) / MSE(wanted, 0): 1 for an output of zeros."""
    return (made - wanted).square().mean() / wanted.square().mean()


def block_library(model, batches, shares, multiple):
    """A model for every share of the width, each MLP cut by activity; None for width 0. -> {width:
    model}"""
    full, scores = model.config.intermediate_size, activity(model, batches)
    widths = [rounded(share * full, multiple, full) if share else 0 for share in shares]
    return {w: slice_neurons(model, {name: top(s, w) for name, s in scores.items()}) if w else None
            for w in sorted(set(widths), reverse=True)}


def distil_blocks(teacher, library, batches, steps, lr):
    """Train every MLP of the library alone, on the teacher's input and output of its place. In
    place.

    Losses are independent and Adam shares no state, so one optimiser serves all. -> {width: losses
    [L]}"""
    full, seen, last = teacher.config.intermediate_size, {}, {}
    hooks = [block.mlp.register_forward_hook(lambda m, args, out, i=i: seen.__setitem__(i, (args[0], out)))
             for i, block in enumerate(teacher.layers)]
    some = {w: m for w, m in library.items() if m is not None and w < full}
    train = [p for m in some.values() for block in m.layers for p in block.mlp.parameters()]
    opt = torch.optim.Adam(train, lr) if train else None
    for step in tqdm(range(steps if train else 0), desc="blocks", disable=None, leave=False):
        with torch.no_grad():
            teacher(batches[step % len(batches)])
        losses = {w: [normalised_mse(block.mlp(seen[i][0]), seen[i][1])
                      for i, block in enumerate(m.layers)]
                  for w, m in some.items()}
        opt.zero_grad()
        sum(itertools.chain(*losses.values())).backward()
        for g in opt.param_groups:
            g["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        opt.step()
        last = {w: [x.item() for x in row] for w, row in losses.items()}
    for hook in hooks:
        hook.remove()
    return last


def replace_one(teacher, library, batches):
    """KL(teacher ‖ teacher with one MLP replaced) of every layer and width; the library's
    order.   [L, J]"""
    scores = torch.zeros(len(teacher.layers), len(library), dtype=torch.float64)
    full = teacher.config.intermediate_size
    work = build(teacher, teacher.state_dict())
    for (i, block), (j, (w, m)) in itertools.product(enumerate(work.layers),
                                                     enumerate(library.items())):
        if w < full:
            own, block.mlp = block.mlp, m and m.layers[i].mlp
            scores[i, j] = divergence(work, teacher, batches)
            block.mlp = own
    return scores


def choose_dp(scores, costs, budget, generator):
    """min Σ score[i, j_i]  s.t.  Σ cost[j_i] <= budget,  exact: dynamic programming over costs. ->
    [L]"""
    best = {0: (0.0, [])}                        # cost so far: (score, choices)
    for row in scores.tolist():
        now = {}
        for (spent, (value, picks)), (j, cost) in itertools.product(best.items(), enumerate(costs)):
            if spent + cost <= budget and value + row[j] < now.get(spent + cost, (math.inf,))[0]:
                now[spent + cost] = value + row[j], [*picks, j]
        best = now
    if not best:
        raise UserError(f"no choice of blocks costs {budget} or less: a larger --share")
    return min(best.values(), key=lambda x: x[0])[1]


def choose_uniform(scores, costs, budget, generator):
    """The widest block that fits, in every layer. -> [L]"""
    fit = [j for j, cost in enumerate(costs) if cost * len(scores) <= budget]
    if not fit:
        raise UserError(f"no equal choice of blocks costs {budget} or less: a larger --share")
    return [max(fit, key=lambda j: costs[j])] * len(scores)


def choose_random(scores, costs, budget, generator):
    """A random order of layers, each the random block that leaves room for the cheapest behind it.
    -> [L]

    Drawn again while the budget still has room for a step (ours), so that it spends about what dp
    may."""
    low, L = min(costs), len(scores)
    step = min((abs(a - b) for a, b in itertools.combinations(costs, 2) if a != b), default=1)
    for _ in range(1000):
        picks, left = [0] * L, budget
        for n, i in enumerate(torch.randperm(L, generator=generator).tolist()):
            fit = [j for j, cost in enumerate(costs) if cost + low * (L - n - 1) <= left]
            if not fit:
                raise UserError(f"no choice of blocks costs {budget} or less: a larger --share")
            picks[i] = fit[torch.randint(len(fit), (1,), generator=generator).item()]
            left -= costs[picks[i]]
        if left < step:
            break
    return picks


CHOICES = dict(dp=choose_dp, uniform=choose_uniform, random=choose_random)


def assemble(model, library, widths):
    """A model whose layer i has the MLP of width widths[i] of the library; a plain one if all are
    alike."""
    state = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    for i, w in enumerate(widths):
        start = f"layers.{i}.mlp."
        state |= {k: v for k, v in library[w].state_dict().items()
                  if k.startswith(start)} if w else {}
        if not w:
            del state[f"layers.{i}.post_attention_layernorm.weight"]
    alike = len(set(widths)) == 1 and widths[0] > 0
    return build(model, state, **(dict(intermediate_size=widths[0]) if alike
                                  else dict(layer_widths=tuple(widths))))


def puzzle(model, teacher, batches, generator, *, share: Range("(0, 1]") = 0.5,
           shares="100,75,50,25,0",
           choice: Literal["dp", "uniform", "random"] = "dp", local_steps=100,
           local_lr: Positive = 1e-3, multiple: Count = 8):
    """Puzzle (2411.19146), its FFN half: a library of widths a layer, each distilled alone, then
    scored alone in the teacher; the best choice whose widths sum to share * L * f at most. Then
    cosine_kl.

    choice dp, uniform or random; local_steps and local_lr are ours. Attention variants are left
    out.
    """
    if choice not in CHOICES or not 0 < share <= 1:
        raise UserError(f"--choice {choice} --share {share}: choose from {', '.join(CHOICES)}, and a share "
                        "of (0, 1]")
    try:
        percent = [float(x) / 100 for x in shares.split(",")]
    except ValueError:
        raise UserError(f"--shares {shares}: numbers with commas between, like 100,50,0") from None
    library = block_library(model, batches, percent, multiple)
    distil_blocks(teacher, library, batches, local_steps, local_lr)
    scores, widths = replace_one(teacher, library, batches), list(library)
    budget = int(share * len(model.layers) * model.config.intermediate_size)
    picks = CHOICES[choice](scores, widths, budget, generator)
    yield assemble(model, library, [widths[j] for j in picks])


# --- 6 SwiftKV and MoH ----------------------------------------------------------------------------


def swiftkv(model, teacher, batches, generator, *, layer=0):
    """SwiftKV (2410.03960), SingleInputKV: from `layer` on, all layers' keys and values are made of
    the state that enters it, through norm_swiftkv (a copy of that layer's own). 0: half of the
    layers.

    Only norm_swiftkv and those layers' q, k, v are trained. Then swift_kl. No AcrossKV; no layer is
    skipped.
    """
    L = model.config.num_hidden_layers
    layer = layer or L // 2
    if not 0 < layer <= L:
        raise UserError(f"--layer {layer}: a layer from 1 to {L}")
    state = model.state_dict()
    source = state[f"layers.{min(layer, L - 1)}.input_layernorm.weight"]
    student = build(model, state | {"norm_swiftkv.weight": source},
                    swift_layer=layer).requires_grad_(False)
    student.norm_swiftkv.requires_grad_(layer < L)
    for block in student.layers[layer:]:
        for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            part.requires_grad_()
    yield student


def moh(model, teacher, batches, generator, *, shared: Share = 0.5, active: Range("(0, 1]") = 0.75,
        router: Literal["norm", "learned"] = "norm"):
    """MoH (2410.11842): of H heads the first `shared` H always count, of the others a token's
    likeliest, `active` H in all. router norm: by the queries' norms, no parameter, for a trained
    model (one with a norm on every query head has none to tell them apart: there take learned);
    learned: new ones (std 0.02)."""
    H = model.config.num_attention_heads
    S, K = round(shared * H), round(active * H) - round(shared * H)
    if router not in ("norm", "learned") or not (S >= 1 and H - S >= 2 and 1 <= K <= H - S):
        raise UserError(f"--shared {shared} --active {active} --router {router}: of {H} heads at least 1 "
                        "shared, 2 routed and 1 of those active; router norm or learned")
    state, D = dict(model.state_dict()), model.config.hidden_size
    for i in range(len(model.layers) if router == "learned" else 0):
        for part, rows in (("shared", S), ("groups", 2), ("routed", H - S)):
            weight = 0.02 * torch.randn(rows, D, generator=generator)
            state[f"layers.{i}.self_attn.heads.{part}.weight"] = weight.to(model.head)
    yield build(model, state, shared_heads=S, routed_heads=K, head_router=router)


STRUCTURES = dict(slimmoe=slimmoe, fresh=fresh, dense_active=dense_active,
                  drop_experts=drop_experts,
                  minitron=minitron, prunenet=prunenet, puzzle=puzzle, swiftkv=swiftkv, moh=moh)
