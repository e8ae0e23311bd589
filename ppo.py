"""
ppo.py - policy optimisation with a critic: PPO for language models done right, and Self-Rewarding PPO.

    python ppo.py                                  # Self-Rewarding PPO on real docstrings: minutes
    python ppo.py --config tiny                    # the same in seconds: shows that everything turns
    python ppo.py --config ppo                     # PPO against the task's own reward
    python ppo.py --config ppo --reward FOLDER     # ... against a …ForSequenceClassification checkpoint
    python ppo.py --init sft_checkpoint --base Qwen2.5-0.5B --data demos.jsonl
    python ppo.py --claim srppo --seeds 5          # the paper's claim against its baselines, with a verdict

Map      1 config   2 rewards   3 KL   4 advantages   5 losses   6 decode   7 evaluate   8 train   9 claims
Letters  B completions (prompts x samples), T tokens; [B, T] is aligned: index t belongs to tokens[:, t]

preset      paper                idea
srppo       2510.21090           reward = log π_sft(y|x) - log π_base(y|x): demonstrations are all it needs
ppo         1707.06347           the clipped surrogate with the details of 2403.17031, on the gold reward
likelihood  control of srppo     the same with log π_sft alone: does the base model matter?
raft        2304.06767           likelihood of the best of each prompt's 16 samples by that reward
sft         baseline of srppo    no step at all: the SFT model, sampled
greedy      control of srppo     ... at temperature 0
half        control of srppo     ... at temperature 0.5
bon         control of srppo     ... best of 16 by the coherent reward
contrast    control of srppo     ... sampled from π_sft (π_sft / π_base)^alpha
toyif       world                the synthetic instruction-following world of data/prefs.py, gold reward known
ring        world                its second world, full of traps for a reward model (train one with reward.py)
docs        world                signatures -> docstrings of the standard library (the default)
tiny        size                 seconds on any CPU, its base model included
Watch    reward should rise while kl stays a few nats per response; ev (the critic's explained variance)
         leaves 0 within ten steps. A length that runs away means that the reward pays per token. kl is k1,
         signed: on a batch it may dip below 0. quality is the task's own measure: only gold sees it.
         reward is what is trained on, EOS rule included; val_reward and ood_reward are without that rule.
         work is the share of rows x longest completion that decoding computed: finished rows leave.
"""
import copy
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

import kernels
import sft
from data import tasks
from data.run import (Count, Positive, Run, Share, UserError, batch_indices,
                      check_first_ratio, cli, launch, needs, report)
from data.stats import spearman
from model import (ScalarModel, Transformer, autocast, generate, load, masked_mean, masked_whiten,
                   peek, save, sequence_score, token_logprobs, token_values)
from optim import linear, optimiser, set_lr

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a reward, an advantage or a loss is an argument of its
    function."""
    config: str = ""             # presets and TOML files, left to right
    data: str = "signatures"     # a task, or a JSONL of prompts and completions (for the quality)
    init: str = "base:sft"       # the SFT model, where policy, critic and reference start
    base: str = "base:pretrain"  # the pre-trained model before SFT: the coherent reward's divisor
    chat: bool = False           # wrap prompts in the checkpoint's chat template
    reward: str = "coherent"     # which row of REWARDS, or the folder of a reward model
    advantage: str = "gae"       # which row of ADVANTAGES
    surrogate: str = "clip"      # which row of SURROGATES
    eos: str = "replace"         # which row of EOS: what a completion that never ends is worth
    decode: str = "sample"       # which row of DECODERS: how evaluation samples
    steps: int = 40              # rollout-and-update iterations
    rollouts: Count = 32         # prompts per iteration
    samples: Count = 4           # completions per prompt
    epochs: Count = 2            # passes over each rollout
    batch: Count = 64            # completions per optimizer step
    micro: Count = 64            # completions per forward pass: lower it if memory runs out
    lr: Positive = 2e-4          # policy's learning rate, falling linearly to 0
    critic_lr: Positive = 5e-4   # critic's
    temperature: Positive = 1.0  # of sampling and, the same, of every log-prob
    max_new: int = 0             # longest completion in tokens (0: the task says)
    eval_every: Count = 10       # iterations between evaluations on held-out prompts
    eval_prompts: int = 0  # how many of each held-out split (0: 512 in a world, 256 otherwise)
    save_every: Count = 20       # iterations between checkpoints
    keep: Count = 2              # checkpoints to keep
    stop: int = 0                # pause after this iteration (0: no); --resume goes on
    out: str = ""                # run folder (default out/ppo/<presets>)
    seed: int = 0                # of SFT, prompts and sampling
    device: str = "auto"         # cpu or cuda
    dtype: str = "auto"  # of the matmuls: float32, or bfloat16 under autocast (default on CUDA)
    compile: bool = False        # torch.compile the policy's and the critic's training passes
    kernels: str = "auto"        # auto, or torch: the plain definition of every kernel
    resume: bool = False         # go on from the newest checkpoint of the run folder


PRESETS = dict(
    # lr of srppo, likelihood and raft: each the best of a grid by val_gold on ToyIF, seeds 100 and
    # 101
    srppo=dict(reward="coherent", beta=1.0, no_eos=-5.0),            # ours: the paper's are unknown
    ppo=dict(reward="gold", beta=0.05, no_eos=-1.0),                # 2403.17031; lr and epochs ours
    likelihood=dict(reward="likelihood", no_eos=-50.0,
                    lr=5e-4),                                  # log π_sft itself averages about -10
    raft=dict(advantage="best", surrogate="nll", rollouts=8, samples=16, lr=1e-5),  # srppo's budget
    sft=dict(steps=0),
    greedy=dict(steps=0, eval_temperature=0.0),
    half=dict(steps=0, eval_temperature=0.5),
    bon=dict(steps=0, decode="bon", n=16),
    contrast=dict(steps=0, decode="contrast"),
    cold=dict(eval_temperature=0.0),
    alpha05=dict(alpha=0.5),
    alpha2=dict(alpha=2.0),
    docs=dict(),                                                       # the defaults
    toyif=dict(data="toyif", init="base:toyif", base="base:toyif_base", rollouts=128, samples=1,
               steps=60,
               eval_every=20, save_every=1000, keep=1),
    ring=dict(data="ring", init="base:ring", base="base:ring", rollouts=96, samples=1, steps=100,
              eval_every=20),
    n64=dict(init="base:toyif,n64"),                             # SFT on 64 demonstrations, not 512
    more=dict(init="base:toyif,more"),                       # SFT for PPO's 240 gradient steps more
    more64=dict(init="base:toyif,n64,more64"),
    tiny=dict(steps=4, rollouts=8, samples=2, batch=8, micro=8, eval_every=2, eval_prompts=32,
              save_every=2,
              max_new=16),
)

CURVES = {"reward": ["reward", "val_reward", "ood_reward"], "KL, nats per response": ["kl", "k3"],
          "quality": ["val_rouge_l", "ood_rouge_l", "val_gold", "ood_gold", "val_accuracy",
                      "ood_accuracy"],
          "length, tokens": ["length"], "critic": ["ev"]}

# --- rewards: a function's positional arguments name what it needs, and only that is computed -----


def coherent(sft_logp, base_logp, mask, *, per_token=False):
    """Self-Rewarding PPO (2510.21090):  r = log π_sft(y|x) - log π_base(y|x), EOS included.   [B,
    T] -> [B]

    A sum over tokens, so where the mean ratio is positive longer is better; per_token divides by
    the length.
    """
    ratio = ((sft_logp - base_logp) * mask).sum(1)                                       # [B]
    return ratio / mask.sum(1).clamp(min=1) if per_token else ratio


def likelihood(sft_logp, mask):
    """The SFT model's own log-probability of the response: coherent() without the base.   [B, T] ->
    [B]"""
    return (sft_logp * mask).sum(1)


def gold(quality):
    """The task's own measure of the text.   [B] -> [B]"""
    return quality


def learned(judged, *, clamp=0.0):
    """A reward model's score, centred so that SFT samples have mean 0; clamp > 0 bounds it.   [B]
    -> [B]"""
    return judged.clamp(-clamp, clamp) if clamp else judged


REWARDS = dict(coherent=coherent, likelihood=likelihood, gold=gold, PATH=learned)


def eos_replace(score, finished, *, no_eos=-5.0):
    """A response without EOS scores no_eos, whatever the reward says (2403.17031).   [B] -> [B]"""
    return torch.where(finished, score, torch.full_like(score, no_eos))


def eos_subtract(score, finished, *, no_eos=1.0):
    """A response without EOS loses no_eos (TRL's missing_eos_penalty).   [B] -> [B]"""
    return score - no_eos * (~finished).float()


def eos_ignore(score, finished):
    """A response without EOS keeps its score.   [B] -> [B]"""
    return score


EOS = dict(replace=eos_replace, subtract=eos_subtract, ignore=eos_ignore)

# --- KL -------------------------------------------------------------------------------------------


def k1(logp, ref_logp):
    """log-ratio: unbiased for KL(π||π_ref) under samples of π, signed.   [B, T]"""
    return logp - ref_logp


def k2(logp, ref_logp):
    """Half the squared log-ratio: as a loss, its gradient is that of KL(π||π_ref).   [B, T]"""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp, ref_logp):
    """exp(-d) - 1 + d >= 0, unbiased like k1; as a loss its gradient is that of KL(π_ref||π).   [B,
    T]"""
    return torch.expm1(ref_logp - logp) + logp - ref_logp


def next_beta(beta, kl, n, *, target=0.0, horizon: Count = 10000):
    """Adaptive KL coefficient (1909.08593 §2.2):  β (1 + clip(KL/target - 1, ±0.2) n/horizon).

    kl in nats per response, n responses in this batch; target 0 keeps β as it is.
    """
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon) if target else beta


def token_rewards(score, logp, ref_logp, mask, coefficient, *, beta=1.0):
    """r_t = -β k1_t, and the response's score on its last token.   score [B], the rest [B, T] ->
    [B, T]

    coefficient: the controller's current factor on beta.
    """
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))                # 1 on the last token
    return -beta * coefficient * k1(logp, ref_logp) * mask + score[:, None] * last


# --- advantages -----------------------------------------------------------------------------------


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """GAE, 1506.02438 eq. 16:  δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γλ A_{t+1}.

    rewards, values, mask [B, T] with one run of ones per row -> advantages, returns = A + V, both
    [B, T]. V and A are 0 past the end.
    """
    adv, after, last = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.size(1))):
        last = mask[:, t] * (rewards[:, t] + gamma * after - values[:, t] + gamma * lam
                             * last)                                                           # [B]
        after = values[:, t] * mask[:, t]
        adv[:, t] = last
    return adv, (adv + values) * mask


def whitened_gae(rewards, values, mask, *, gamma: Share = 1.0, lam: Share = 0.95,
                 whiten_rewards=False):
    """GAE; advantages whitened over the whole rollout, returns never (2403.17031).   -> [B, T], [B,
    T]"""
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift=False)
    adv, returns = gae(rewards, values, mask, gamma, lam)
    return masked_whiten(adv, mask), returns


def best_of_group(score, mask, samples):
    """RAFT (2304.06767): 1 on the tokens of each prompt's best response, else 0.   -> [B, T],
    None"""
    best = score.view(-1, samples).argmax(1, keepdim=True)                               # [P, 1]
    chosen = torch.zeros_like(score.view(-1, samples)).scatter(1, best, 1.0).view(-1, 1)
    return chosen * mask, None


ADVANTAGES = dict(gae=whitened_gae, best=best_of_group)

# --- losses: per token, [B, T]; the loop divides by the tokens of the whole minibatch -------------


def ppo_clip(logp, old_logp, adv, *, eps: Positive = 0.2, cap: Positive = 20.0):
    """1707.06347 eq. 7:  max(-A ρ, -A clip(ρ, 1-ε, 1+ε)),  ρ = π/π_old;  |log ρ| capped against
    overflow."""
    ratio = (logp - old_logp).clamp(-cap, cap).exp()                                     # [B, T]
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + eps))


def weighted_nll(logp, old_logp, adv):
    """Maximum likelihood weighted by the advantage: RAFT's step on the winners.   [B, T]"""
    return -adv * logp


SURROGATES = dict(clip=ppo_clip, nll=weighted_nll)


def value_loss(values, old_values, returns, *, eps_v=0.2):
    """½ max((V - R)², (clip(V, V_old ± ε_v) - R)²), PPO's clipped value loss; eps_v 0: no clip."""
    loss = (values - returns) ** 2                                                       # [B, T]
    if eps_v:
        loss = torch.maximum(loss, (old_values + (values - old_values).clamp(-eps_v, eps_v)
                                    - returns) ** 2)
    return 0.5 * loss


def regulariser(logp, ref_logp, entropy, *, kl_coef=0.0,
                kl_loss: Literal["k2", "k3"] = "k2", ent_coef=0.0):
    """KL in the loss (k2 or k3; k1's gradient is 0 in expectation), an entropy bonus; both default
    off."""
    estimators = dict(k2=k2, k3=k3)
    if kl_loss not in estimators:
        raise UserError(f"--kl_loss {kl_loss}: choose k2 (gradient of KL(π||ref)) or k3 (of KL(ref||π))")
    out = torch.zeros_like(logp)                                                         # [B, T]
    if kl_coef:
        out = out + kl_coef * estimators[kl_loss](logp, ref_logp)
    return out - ent_coef * entropy if ent_coef else out                                 # [B, T]


MAX_RATIO = 10.0         # a minibatch whose mean ratio is beyond this is skipped, as in TRL
MAX_NORM = 1.0           # gradient norm


# --- roll out and decode --------------------------------------------------------------------------


def sample(model, base, prompts, max_new, generator, score, *, eval_temperature=1.0):
    """One completion a prompt at eval_temperature (0: greedy)."""
    return generate(model, prompts, max_new, temperature=eval_temperature, generator=generator)


def best_of_n(model, base, prompts, max_new, generator, score, *, n: Count = 16):
    """The best of n samples by the run's own reward; one that does not end only if none does."""
    roll = generate(model, prompts, max_new, samples=n, generator=generator)
    value = torch.where(roll.finished, score(roll), -torch.inf).view(-1, n)              # [P, n]
    pick = value.argmax(1) + torch.arange(len(value), device=value.device) * n           # [P]
    return type(roll)(*(x[pick] for x in roll[:-1]), roll.row_steps)


def contrastive(model, base, prompts, max_new, generator, score, *, alpha=1.0):
    """Sample from π (π / π_base)^alpha, token by token: what srppo trains towards, without
    training."""
    return generate(model, prompts, max_new, generator=generator, contrast=(base, alpha))


DECODERS = dict(sample=sample, bon=best_of_n, contrast=contrastive)
AXES = dict(reward=REWARDS, advantage=ADVANTAGES, surrogate=SURROGATES, eos=EOS, decode=DECODERS,
            shaping=dict(shaping=token_rewards), controller=dict(controller=next_beta),
            value=dict(value=value_loss), regulariser=dict(regulariser=regulariser),
            kernels=kernels.MODES)


@torch.no_grad()
def logprobs(model, tokens, mask, c):
    """token_logprobs in micro-batches, without gradient, at the run's temperature and
    precision.   [B, T]"""
    with autocast(c.device, c.dtype):
        return torch.cat([token_logprobs(model, t, m, temperature=c.temperature)
                          for t, m in zip(tokens.split(c.micro), mask.split(c.micro))])


@torch.no_grad()
def read_values(critic, tokens, mask, c):
    """token_values in micro-batches, 0 outside the mask.   [B, T]"""
    with autocast(c.device, c.dtype):
        return torch.cat([token_values(critic, t) for t in tokens.split(c.micro)]) * mask


def quality(task, problems, roll, tok):
    """The task's own reward of every completion's text.   [B]"""
    per = len(roll.tokens) // len(problems)
    texts = [tok.decode(ids) for ids in roll.completions()]
    return torch.tensor([task.reward(problems[i // per], x, done)
                         for i, (x, done) in enumerate(zip(texts, roll.finished.tolist()))])


# --- evaluate -------------------------------------------------------------------------------------


def evaluate(policy, models, sets, task, tok, c, f, max_new):
    """Held-out prompts, always the same and with the same draws: reward, quality, KL to SFT,
    length.

    reward is the run's own, without the EOS rule. kl is k1 of the policy's weights, summed per
    response (so 0 for an untrained policy, however it is decoded). -> {split_key: mean}, [(prompt,
    text, reference)].
    """
    out, look = {}, []
    for split, problems in sets.items():
        def score(roll, problems=problems):
            return f.reward(**models["score"](f.reward, roll,
                                              quality(task, problems, roll, tok)))             # [B]
        g = torch.Generator().manual_seed(c.seed + 1)
        prompts = [tok.prompt(p, c.chat) for p in problems]
        roll = f.decode(policy, models.get("base"), prompts, max_new, g, score)
        logp, ref = (logprobs(m, roll.tokens, roll.mask, c)
                     for m in (policy, models["ref"]))                                      # [B, T]
        out |= {f"{split}_reward": score(roll).mean(),
                f"{split}_{task.metric}": quality(task, problems, roll, tok).mean(),
                f"{split}_kl": (logp - ref).sum(1).mean(),
                f"{split}_length": roll.mask.sum(1).mean(),
                f"{split}_truncated": 1 - roll.finished.float().mean()}
        texts = [tok.decode(ids) for ids in roll.completions()[:2]]
        look += [(p["prompt"], text, task.demo(p)) for p, text in zip(problems, texts)]
    return {k: float(v) for k, v in out.items()}, look


def rank_correlation(a, b):
    """Spearman's correlation within each row, averaged over the rows where both vary.   a, b [P, G]

    Does the reward order a prompt's own samples as the quality does? 0: it says nothing about them.
    """
    rows = [spearman(x, y) for x, y in zip(a, b) if x.std() > 0 and y.std() > 0]
    return sum(rows) / max(1, len(rows))


def explained_variance(values, returns, mask):
    """1 - Var(R - V) / Var(R) over the mask: 0 for a constant critic, 1 for a perfect one."""
    def var(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return 1 - var(returns - values) / var(returns).clamp(min=1e-8)


# --- train ----------------------------------------------------------------------------------------


def needs_base(c, f):
    """Whether the run reads the pre-trained model: in its reward, or to decode."""
    return "base_logp" in needs(f.reward) or c.decode == "contrast"


def open_models(c, f, init, base, resume_from):
    """Policy, critic, and the frozen models that the reward and the KL penalty read.

    Returns (policy, critic, models, tokenizer). models: ref (the SFT model), base and judge where
    needed, and score(fn, roll, quality), which computes what the function fn names among its
    positional arguments.
    """
    def frozen(path, option, kind):
        model, other = load(path, c.device)
        if not isinstance(model, kind):
            raise UserError(f"--{option} {path}: need a {kind.__name__}, found a {type(model).__name__}")
        return model.requires_grad_(False), other

    models = {}
    models["ref"], tok = frozen(init, "init", Transformer)
    extra = [("base", base, Transformer)] if needs_base(c, f) else []
    extra += [("reward", c.reward, ScalarModel)] if "judged" in needs(f.reward) else []
    for option, path, kind in extra:
        models["judge" if option == "reward" else option], other = frozen(path, option, kind)
        if other.tokens != tok.tokens:
            raise UserError(f"--{option} {path} and --init {init} have different tokenizers: "
                            f"both must score the same ids")

    def score(fn, roll, truth):
        def judged():
            length = roll.prompt_len + roll.mask.sum(1).long()                           # [B]
            return sequence_score(models["judge"], roll.tokens, length) - models.get("bias", 0.0)
        compute = dict(mask=lambda: roll.mask, quality=lambda: truth.to(roll.mask.device), judged=judged,
                       sft_logp=lambda: logprobs(models["ref"], roll.tokens, roll.mask, c),
                       base_logp=lambda: logprobs(models["base"], roll.tokens, roll.mask, c))
        with torch.no_grad():
            return {name: compute[name]() for name in needs(fn)}

    models["score"] = score
    if resume_from:
        return load(resume_from, c.device)[0], load(resume_from / "critic",
                                                    c.device)[0], models, tok
    policy = copy.deepcopy(models["ref"]).requires_grad_()
    # ours: the critic starts from the SFT model, not from a reward model, whose units calibrate()
    # leaves
    return policy, ScalarModel.from_lm(models["ref"]), models, tok


def calibrate(policy, models, problems, task, tok, c, f, max_new, generator, samples=8):
    """What the run's reward says of the SFT model's own samples, before any training -> dict of
    floats.

    mean, std of the score: token rewards are divided by std, and the score is centred first.
    Neither changes what is optimised (the KL term is scaled along); both matter to the critic,
    which starts at 0 and moves at most eps_v a rollout: one that lags behind credits late tokens
    more than early ones, and the policy learns to stop early. bias: a reward model's mean raw
    score. agreement: rank_correlation with the quality. cut: the share of samples that did not end.
    """
    with autocast(c.device, c.dtype):
        roll = generate(policy, [tok.prompt(p, c.chat) for p in problems], max_new, samples=samples,
                        temperature=c.temperature, generator=generator)
    models["bias"], truth = 0.0, quality(task, problems, roll, tok)                      # [B]
    provided = models["score"](f.reward, roll, truth)
    if "judged" in provided:
        models["bias"] = provided["judged"].mean().item()
        provided["judged"] = provided["judged"] - models["bias"]
    raw = f.reward(**provided)                                                           # [B]
    score = f.eos(raw, roll.finished)                                                    # [B]
    return dict(mean=score.mean().item(), std=score.std().item() if score.std() > 1e-3 else 1.0,
                bias=models["bias"], cut=1 - roll.finished.float().mean().item(),
                agreement=rank_correlation(raw.cpu().view(-1, samples), truth.view(-1, samples)))


def backward(policy, critic, batch, rows, c, f):
    """Gradients of one minibatch, accumulated over its micro-batches -> what happened, as a dict of
    floats.

    batch: tokens, mask, old_logp, ref_logp, adv and, with a critic, old_values, returns [B, T];
    length [B]. Losses are sums over tokens divided by the tokens of the whole minibatch, so --micro
    changes nothing.
    """
    told = dict(loss=0.0, ratio=0.0, off=0.0, clipped=0.0, entropy=0.0, worst=0.0)
    n = batch["mask"][rows].sum()
    for part in rows.split(c.micro):
        width = int(batch["length"][part].max())                            # cut the common padding
        b = SimpleNamespace(**{k: x[part, :width] for k, x in batch.items() if x.dim() == 2})
        with autocast(c.device, c.dtype):
            logp, entropy = token_logprobs(policy, b.tokens, b.mask, temperature=c.temperature,
                                           entropy=True)
        per_token = f.surrogate(logp, b.old_logp, b.adv) + f.regulariser(logp, b.ref_logp,
                                                                         entropy)           # [b, T]
        loss = (per_token * b.mask).sum() / n
        loss.backward()
        if "returns" in batch:
            with autocast(c.device, c.dtype):
                values = token_values(critic, b.tokens)                                  # [b, T]
            ((f.value(values, b.old_values, b.returns) * b.mask).sum() / n).backward()
        ratio = (logp.detach() - b.old_logp).clamp(-20, 20).exp()                        # [b, T]
        off = (ratio - 1).abs() * b.mask
        told["loss"] += loss.item()
        told["worst"] = max(told["worst"], off.max().item())
        for key, x in dict(ratio=ratio, off=off, clipped=off > f.surrogate.keywords.get("eps", 0.2),
                           entropy=entropy.detach()).items():
            told[key] += ((x * b.mask).sum() / n).item()
    return told


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    fields = dict(base=(needs_base(c, f), "--reward coherent or --decode contrast"),
                  critic_lr=("values" in needs(f.advantage), "--advantage gae"))
    return fields


def check(c, f):
    """UserError for all that can be known before anything is made: files, folders, what does not
    combine."""
    tasks.check_data(c.data, is_text=False)
    if "samples" in needs(f.advantage) and c.samples < 2:
        raise UserError(f"--samples {c.samples}: --advantage {c.advantage} takes the best of at least two")
    most = sft.find(c.init, c.config, make=False)
    if c.max_new >= most:
        raise UserError(f"--max_new {c.max_new} does not fit the {most} tokens of {c.init}")
    if needs_base(c, f):
        sft.find(c.base, c.config, make=False, option="--base")
    if "judged" in needs(f.reward):
        peek(c.reward, scalar=True, option="--reward")


def train(c, f):
    """One run: load, roll out, score, update, tell. -> the last evaluation and the SFT model's
    (sft_…)."""
    check(c, f)
    init = sft.find(c.init, c.config, seed=c.seed,
                    device=c.device)                           # made before this run's clock starts
    base = sft.find(c.base, c.config, device=c.device) if needs_base(c, f) else ""
    kernels.use(c.kernels)
    with Run(c, f, "ppo", CURVES) as run:
        policy, critic, models, tok = open_models(c, f, init, base, run.last)
        task = tasks.task(c.data)
        problems = task.problems("train", 4096, 1000 + c.seed)
        size = c.eval_prompts or (512 if c.data in ("toyif", "ring") else 256)
        sets = {s: task.problems(s, size, c.seed) for s in tasks.held_out(c.data)}
        context = policy.config.max_position_embeddings
        max_new = tasks.room(c, tok, [p for s in (problems, *sets.values()) for p in s], task,
                             context)
        opt, critic_opt = optimiser(policy, lr=c.lr), optimiser(critic, lr=c.critic_lr)
        g, factor = torch.Generator().manual_seed(c.seed), 1.0
        size = sum(p.numel() for p in policy.parameters()) / 1e6
        run.say(f"{run.folder}: policy and critic of {size:.2f} M parameters, {len(problems)} prompts, "
                f"{c.steps} steps of {c.rollouts} x {c.samples} completions, {c.device} {c.dtype}")
        if run.state:
            opt.load_state_dict(run.state["opt"])
            critic_opt.load_state_dict(run.state["critic_opt"])
            g.set_state(run.state["rng"])
            factor, scale, before = run.state["factor"], run.state["scale"], run.state["before"]
            models["bias"] = scale["bias"]
        else:
            scale = calibrate(policy, models, problems[:64], task, tok, c, f, max_new, g)
            run.say(f"  reward of SFT samples: mean {scale['mean']:.2f}, std {scale['std']:.2f}; Spearman "
                    f"with {task.metric} within a prompt {scale['agreement']:.2f} (0: uninformative)")
            if scale["cut"] == 1:
                run.say(f"  WARNING: every SFT sample is cut off at {max_new} tokens: raise --max_new or use "
                        f"--eos ignore")
            before, look = evaluate(policy, models, sets, task, tok, c, f, max_new)
            run.log(0, **before, show=True)
        scores = before
        train_policy, train_critic = (torch.compile(m) if c.compile else m
                                      for m in (policy, critic))

        def write(folder):
            save(policy, tok, folder)
            save(critic, tok, folder / "critic")

        for step in run.steps(c.steps):
            # 1. roll out
            # ------------------------------------------------------------------------------
            clock = time.perf_counter()
            picked = [problems[i] for i in batch_indices(len(problems), c.rollouts, step,
                                                         c.seed).tolist()]
            with autocast(c.device, c.dtype):
                roll = generate(policy, [tok.prompt(p, c.chat) for p in picked], max_new,
                                samples=c.samples,
                                temperature=c.temperature, generator=g)
            mask, t_gen = roll.mask, time.perf_counter() - clock                         # [B, T]
            # 2. score
            # ---------------------------------------------------------------------------------
            clock = time.perf_counter()
            truth = quality(task, picked, roll, tok)                                     # [B]
            score = f.eos(f.reward(**models["score"](f.reward, roll, truth)), roll.finished)   # [B]
            ref_logp = logprobs(models["ref"], roll.tokens, mask, c)                     # [B, T]
            old_values = read_values(critic, roll.tokens, mask, c)                       # [B, T]
            unit = (score - scale["mean"]) / scale["std"]                                # [B]
            rewards = f.shaping(unit, roll.logp, ref_logp, mask, factor / scale["std"])  # [B, T]
            have = dict(rewards=rewards, values=old_values, mask=mask, score=score,
                        samples=c.samples)
            adv, returns = f.advantage(**{k: have[k] for k in needs(f.advantage)})     # [B, T] each
            batch = dict(tokens=roll.tokens, mask=mask, old_logp=roll.logp, ref_logp=ref_logp,
                         adv=adv,
                         length=roll.prompt_len + mask.sum(1).long())
            batch |= dict(old_values=old_values, returns=returns) if returns is not None else {}
            t_score = time.perf_counter() - clock
            # 3. update
            # --------------------------------------------------------------------------------
            clock, told, norm, skipped = time.perf_counter(), [], 0.0, 0
            set_lr(opt, c.lr * linear(step, c.steps))
            set_lr(critic_opt, c.critic_lr * linear(step, c.steps))
            for epoch in range(c.epochs):
                for rows in torch.randperm(len(mask), generator=g).to(mask.device).split(c.batch):
                    told.append(backward(train_policy, train_critic, batch, rows, c, f))
                    if len(told) == 1:
                        check_first_ratio(told[0], c.dtype)
                    if told[-1]["ratio"] > MAX_RATIO:
                        skipped += 1
                    else:
                        norm = clip_grad_norm_(policy.parameters(), MAX_NORM)
                        clip_grad_norm_(critic.parameters(), MAX_NORM)
                        opt.step()
                        critic_opt.step()
                    opt.zero_grad()
                    critic_opt.zero_grad()
            # 4. tell
            # ----------------------------------------------------------------------------------
            kl = (k1(roll.logp, ref_logp) * mask).sum(1).mean().item()           # nats per response
            row = dict(reward=score.mean(), kl=kl,
                       k3=(k3(roll.logp, ref_logp) * mask).sum(1).mean(),
                       entropy=told[0]["entropy"], truncated=1 - roll.finished.float().mean(),
                       length=mask.sum(1).mean(), quality=truth.mean(), norm=norm, skipped=skipped,
                       work=roll.row_steps / (len(mask) * max(1, int(mask.sum(1).max()) - 1)))
            row |= {k: sum(t[k] for t in told) / len(told) for k in ("loss", "clipped")}
            if returns is not None:
                row["ev"] = explained_variance(old_values, returns, mask)
            if c.samples > 1:
                row["flat"] = (score.view(-1, c.samples).std(1) < 1e-6).float().mean()
            factor = f.controller(factor, kl, len(mask))
            run.log(step + 1, **row, beta_factor=factor, t_gen=t_gen, t_score=t_score,
                    t_update=time.perf_counter() - clock)
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                run.check(step + 1, policy, critic)
                scores, look = evaluate(policy, models, sets, task, tok, c, f, max_new)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                run.save(step + 1, write, opt=opt.state_dict(), critic_opt=critic_opt.state_dict(),
                         rng=g.get_state(), factor=factor, before=before, scale=scale)
        if c.stop and c.stop < c.steps:
            return scores
        if run.state and run.start >= c.steps:                         # resumed after its last step
            scores, look = evaluate(policy, models, sets, task, tok, c, f, max_new)
        report(run, before, scores, look)
        sft_scores = {f"sft_{k}": v for k, v in before.items()}
        return run.finish(**scores, **sft_scores, agreement=scale["agreement"])


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    """python ppo.py …: see the docstring above, or --help."""
    return launch("ppo", Config, PRESETS, AXES, __doc__, train, argv, readers)


if __name__ == "__main__":
    cli(main)
