"""
ppo.py - policy optimisation with a critic: PPO for language models done right, and Self-Rewarding PPO.

    python ppo.py                                  # Self-Rewarding PPO on real docstrings, from nothing, minutes on a laptop
    python ppo.py --config tiny                    # the same in 30 s: shows that everything turns
    python ppo.py --config gold                    # PPO against the task's own reward
    python ppo.py --reward out/reward/bt           # PPO against a reward model of yours
    python ppo.py --init sft_checkpoint --base Qwen2.5-0.5B --data prompts.jsonl
    python ppo.py --claim srppo --seeds 5          # the paper's claim against its baselines, with a verdict

Map      1 config   2 rewards   3 advantages   4 losses   5 roll out and decode   6 evaluate   7 train   8 claims
Letters  B completions (prompts x samples), T tokens.  Everything [B, T] is aligned: index t belongs to tokens[:, t]

preset      paper                idea
srppo       2510.21090           reward = log π_sft(y|x) - log π_base(y|x) at the last token: demonstrations are all it needs
ppo         1707.06347           the clipped surrogate with the details of 2403.17031, against the task's gold reward
likelihood  control of srppo     the same with log π_sft alone: does the base model matter?
raft        2304.06767           no critic: maximise the likelihood of the best of each prompt's 16 samples by the same reward
sft         baseline of srppo    no step at all: the SFT model, sampled
greedy      control of srppo     ... at temperature 0
half        control of srppo     ... at temperature 0.5
bon         control of srppo     ... best of 16 by the coherent reward
contrast    control of srppo     ... sampled from π_sft (π_sft / π_base)^alpha
toyif       world                the synthetic instruction-following world of data/prefs.py, gold reward known
docs        world                signatures -> docstrings of the standard library (the default)
tiny        size                 seconds on any CPU, its base model included
Watch    reward should rise while kl stays a few nats per response; ev (explained variance of the critic) leaves 0 within
         ten steps. A length that runs away means the reward pays per token. kl is k1, signed: it may dip below 0 on a batch.
"""
import copy
import time
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

import sft
from data import tasks
from data.run import Claim, Run, UserError, batch_indices, cli, launch, needs
from model import (ScalarModel, Transformer, autocast, generate, load, masked_mean, masked_whiten, save,
                   sequence_score, token_logprobs, token_values)
from optim import adamw, linear, set_lr

# --- config -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What every run has; what belongs to a reward, an advantage or a loss is an argument of its function."""
    config: str = ""             # presets and TOML files, left to right
    data: str = "signatures"     # a task, or a JSONL of prompts (and reference completions, for the quality measure)
    init: str = "base:sft"       # the SFT model: policy, critic and reference start from it (base:PRESETS makes it first)
    base: str = "base:pretrain"  # the pre-trained model that SFT started from: the coherent reward's denominator
    chat: bool = False           # wrap prompts in the checkpoint's chat template
    reward: str = "coherent"     # which row of REWARDS, or the folder of a reward model
    advantage: str = "gae"       # which row of ADVANTAGES
    surrogate: str = "clip"      # which row of SURROGATES
    eos: str = "replace"         # which row of EOS: what a completion that never ends is worth
    decode: str = "sample"       # which row of DECODERS: how evaluation samples
    steps: int = 40              # rollout-and-update iterations
    rollouts: int = 32           # prompts per iteration
    samples: int = 4             # completions per prompt
    epochs: int = 2              # passes over each rollout
    batch: int = 64              # completions per optimizer step
    micro: int = 64              # completions per forward pass: lower it when memory runs out, results do not change
    lr: float = 2e-4             # policy's learning rate, falling linearly to 0
    critic_lr: float = 5e-4      # critic's
    temperature: float = 1.0     # of sampling and, the same, of every log-prob
    max_new: int = 0             # longest completion in tokens (0: the task says)
    eval_every: int = 10         # iterations between evaluations on held-out prompts
    save_every: int = 20         # iterations between checkpoints
    keep: int = 2                # checkpoints to keep
    stop: int = 0                # pause after this iteration (0: no); --resume goes on
    out: str = ""                # run folder (default out/ppo/<presets>)
    seed: int = 0                # of SFT, prompts and sampling
    device: str = "auto"         # cpu or cuda
    dtype: str = "auto"          # of the matmuls: float32, or bfloat16 under autocast (default on CUDA)
    compile: bool = False        # torch.compile the policy's and the critic's training passes
    resume: bool = False         # go on from the newest checkpoint of the run folder


PRESETS = dict(
    # lr of srppo, likelihood and raft: each the best of a grid by val_gold on ToyIF, seeds 100 and 101
    srppo=dict(reward="coherent", beta=1.0, no_eos=-5.0),              # the defaults: ours, the paper's are not public
    ppo=dict(reward="gold", beta=0.05, no_eos=-1.0),                   # 2403.17031: beta, no_eos, eps, lam; lr, epochs ours
    likelihood=dict(reward="likelihood", no_eos=-50.0, lr=5e-4),       # log π_sft of a whole response is about -10
    raft=dict(advantage="best", surrogate="nll", rollouts=8, samples=16, lr=1e-5),     # samples and steps as srppo's
    sft=dict(steps=0),
    greedy=dict(steps=0, eval_temperature=0.0),
    half=dict(steps=0, eval_temperature=0.5),
    bon=dict(steps=0, decode="bon", n=16),
    contrast=dict(steps=0, decode="contrast"),
    cold=dict(eval_temperature=0.0),
    alpha05=dict(alpha=0.5),
    alpha2=dict(alpha=2.0),
    docs=dict(),                                                       # the defaults
    toyif=dict(data="toyif", init="base:toyif", base="base:toyif_base", rollouts=128, samples=1, steps=60,
               eval_every=20, save_every=1000, keep=1),
    n64=dict(init="base:toyif,n64"),                                   # SFT on 64 demonstrations instead of 512
    more=dict(init="base:toyif,more"),                                 # SFT for as many more gradient steps as PPO makes
    more64=dict(init="base:toyif,n64,more64"),
    tiny=dict(steps=4, rollouts=8, samples=2, batch=8, micro=8, eval_every=2, save_every=2, max_new=16),
)

CURVES = {"reward": ["reward", "val_reward", "ood_reward"], "KL, nats per response": ["kl", "k3"],
          "quality": ["val_rouge_l", "ood_rouge_l", "val_gold", "ood_gold", "val_accuracy", "ood_accuracy"],
          "length, tokens": ["length"], "critic": ["ev"]}

# --- rewards: a function's positional arguments name what it needs; only those models are loaded and run ----------


def coherent(sft_logp, base_logp, mask, *, per_token=False):
    """Self-Rewarding PPO (2510.21090):  r = log π_sft(y|x) - log π_base(y|x), EOS included.   [B, T] each -> [B]

    A sum over tokens, so where the mean ratio is positive longer is better; per_token divides by the length.
    """
    ratio = ((sft_logp - base_logp) * mask).sum(1)                                       # [B]
    return ratio / mask.sum(1).clamp(min=1) if per_token else ratio


def likelihood(sft_logp, mask):
    """The SFT model's own log-probability of the response: coherent() without the base model.   [B, T] -> [B]"""
    return (sft_logp * mask).sum(1)


def gold(quality):
    """The task's own measure of the text.   [B] -> [B]"""
    return quality


def learned(judged, *, clamp=0.0):
    """A reward model's score, centred so that SFT samples have mean 0; clamp > 0 bounds its size.   [B] -> [B]"""
    return judged.clamp(-clamp, clamp) if clamp else judged


REWARDS = dict(coherent=coherent, likelihood=likelihood, gold=gold, PATH=learned)


def eos_replace(score, finished, *, no_eos=-5.0):
    """A response without EOS scores no_eos, whatever the reward says (2403.17031, detail 'EOS trick').   [B] -> [B]"""
    return torch.where(finished, score, torch.full_like(score, no_eos))


def eos_subtract(score, finished, *, no_eos=1.0):
    """A response without EOS loses no_eos (TRL's missing_eos_penalty).   [B] -> [B]"""
    return score - no_eos * (~finished).float()


def eos_ignore(score, finished):
    """A response without EOS keeps its score.   [B] -> [B]"""
    return score


EOS = dict(replace=eos_replace, subtract=eos_subtract, ignore=eos_ignore)

# --- KL -----------------------------------------------------------------------------------------------


def k1(logp, ref_logp):
    """log-ratio: unbiased for KL(π||π_ref) under samples of π, signed.   [B, T]"""
    return logp - ref_logp


def k2(logp, ref_logp):
    """Half the squared log-ratio: as a loss, its gradient is that of KL(π||π_ref).   [B, T]"""
    return 0.5 * (logp - ref_logp) ** 2


def k3(logp, ref_logp):
    """exp(-d) - 1 + d >= 0, unbiased like k1; as a loss its gradient is that of KL(π_ref||π).   [B, T]"""
    return torch.expm1(ref_logp - logp) + logp - ref_logp


def next_beta(beta, kl, n, *, target=0.0, horizon=10000):
    """Adaptive KL coefficient (1909.08593 §2.2):  β (1 + clip(KL/target - 1, ±0.2) n/horizon);  fixed for target 0.

    kl in nats per response, n responses in this batch.
    """
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon) if target else beta


def token_rewards(score, logp, ref_logp, mask, coefficient, *, beta=1.0):
    """r_t = -β k1_t, and the response's score on its last token.   score [B], the rest [B, T] -> [B, T]

    coefficient: the controller's current factor on beta.
    """
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))                          # 1 on the last token
    return -beta * coefficient * k1(logp, ref_logp) * mask + score[:, None] * last


# --- advantages ---------------------------------------------------------------------------------------


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """GAE, 1506.02438 eq. 16:  δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γλ A_{t+1},   V = A = 0 past the end.

    rewards, values, mask [B, T] with one run of ones per row -> advantages, returns = A + V, both [B, T].
    """
    adv, after, last = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.size(1))):
        last = mask[:, t] * (rewards[:, t] + gamma * after - values[:, t] + gamma * lam * last)      # [B]
        after = values[:, t] * mask[:, t]
        adv[:, t] = last
    return adv, (adv + values) * mask


def whitened_gae(rewards, values, mask, *, gamma=1.0, lam=0.95, whiten_rewards=False):
    """GAE; advantages whitened over the whole rollout, returns never (2403.17031).   -> [B, T], [B, T]"""
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift=False)
    adv, returns = gae(rewards, values, mask, gamma, lam)
    return masked_whiten(adv, mask), returns


def best_of_group(score, mask, samples):
    """RAFT (2304.06767): 1 on the tokens of each prompt's best response, 0 on the others; no critic.   -> [B, T], None"""
    best = score.view(-1, samples).argmax(1, keepdim=True)                               # [P, 1]
    chosen = torch.zeros_like(score.view(-1, samples)).scatter(1, best, 1.0).view(-1, 1)
    return chosen * mask, None


ADVANTAGES = dict(gae=whitened_gae, best=best_of_group)

# --- losses: per token, [B, T]; the loop divides by the tokens of the whole minibatch -------------------------------


def ppo_clip(logp, old_logp, adv, *, eps=0.2, cap=20.0):
    """1707.06347 eq. 7:  max(-A ρ, -A clip(ρ, 1-ε, 1+ε)),  ρ = π/π_old; |log ρ| is capped against overflow."""
    ratio = (logp - old_logp).clamp(-cap, cap).exp()                                     # [B, T]
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + eps))


def weighted_nll(logp, old_logp, adv):
    """Maximum likelihood weighted by the advantage: RAFT's step on the winners.   [B, T]"""
    return -adv * logp


SURROGATES = dict(clip=ppo_clip, nll=weighted_nll)


def value_loss(values, old_values, returns, *, eps_v=0.2):
    """½ max((V - R)², (clip(V, V_old ± ε_v) - R)²): the clipped value loss of PPO's reference code; eps_v 0: no clip."""
    loss = (values - returns) ** 2                                                       # [B, T]
    if eps_v:
        loss = torch.maximum(loss, (old_values + (values - old_values).clamp(-eps_v, eps_v) - returns) ** 2)
    return 0.5 * loss


def regulariser(logp, ref_logp, entropy, *, kl_coef=0.0, kl_loss="k2", ent_coef=0.0):
    """KL in the loss (k2 or k3, never k1: its gradient is 0 in expectation) and an entropy bonus; both off by default."""
    estimators = dict(k2=k2, k3=k3)
    if kl_loss not in estimators:
        raise UserError(f"--kl_loss {kl_loss}: choose k2 (gradient of KL(π||ref)) or k3 (of KL(ref||π))")
    out = torch.zeros_like(logp)                                                         # what is off costs no backward
    if kl_coef:
        out = out + kl_coef * estimators[kl_loss](logp, ref_logp)
    return out - ent_coef * entropy if ent_coef else out                                 # [B, T]


MAX_RATIO = 10.0         # a minibatch whose mean ratio is beyond this is skipped: the step would be garbage (as in TRL)
MAX_NORM = 1.0           # gradient norm


# --- roll out and decode ------------------------------------------------------------------------------


def sample(model, base, prompts, max_new, generator, score, *, eval_temperature=1.0):
    """One completion a prompt at eval_temperature (0: greedy)."""
    return generate(model, prompts, max_new, temperature=eval_temperature, generator=generator)


def best_of_n(model, base, prompts, max_new, generator, score, *, n=16):
    """The best of n samples by the run's own reward; one that does not end only if none does."""
    roll = generate(model, prompts, max_new, samples=n, generator=generator)
    value = torch.where(roll.finished, score(roll), -torch.inf).view(-1, n)              # [P, n]
    pick = value.argmax(1) + torch.arange(len(value), device=value.device) * n           # [P]
    return type(roll)(*(x[pick] for x in roll))


def contrastive(model, base, prompts, max_new, generator, score, *, alpha=1.0):
    """Sample from π (π / π_base)^alpha, token by token: what srppo trains towards, without training."""
    return generate(model, prompts, max_new, generator=generator, contrast=(base, alpha))


DECODERS = dict(sample=sample, bon=best_of_n, contrast=contrastive)
AXES = dict(reward=REWARDS, advantage=ADVANTAGES, surrogate=SURROGATES, eos=EOS, decode=DECODERS,
            shaping=dict(shaping=token_rewards), controller=dict(controller=next_beta), value=dict(value=value_loss),
            regulariser=dict(regulariser=regulariser))


@torch.no_grad()
def logprobs(model, tokens, mask, c):
    """token_logprobs of a frozen or current model in micro-batches, under the run's temperature and precision. [B, T]"""
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


# --- evaluate -----------------------------------------------------------------------------------------


def evaluate(policy, models, sets, task, tok, c, f, max_new):
    """Held-out prompts, always the same and with the same draws: reward, the task's own quality, KL to SFT, length.

    reward is the run's own, without the EOS rule. kl is k1 of the policy's weights, summed per response (so 0 for an
    untrained policy, however it is decoded). Returns {split_key: mean}, and a few (prompt, text, reference) to look at.
    """
    out, look = {}, []
    for split, problems in sets.items():
        if not problems:
            continue
        prompts = [tok.prompt(p, c.chat) for p in problems]
        roll = f.decode(policy, models.get("base"), prompts, max_new, torch.Generator().manual_seed(c.seed + 1),
                        lambda r: f.reward(**models["score"](f.reward, r, quality(task, problems, r, tok))))
        gold_quality = quality(task, problems, roll, tok)                                # [P]
        provided = models["score"](f.reward, roll, gold_quality)
        logp, ref = (logprobs(m, roll.tokens, roll.mask, c) for m in (policy, models["ref"]))
        out |= {f"{split}_reward": f.reward(**provided).mean(), f"{split}_{task.metric}": gold_quality.mean(),
                f"{split}_kl": (logp - ref).sum(1).mean(), f"{split}_length": roll.mask.sum(1).mean(),
                f"{split}_truncated": 1 - roll.finished.float().mean()}
        look += [(p["prompt"], tok.decode(ids), task.demo(p)) for p, ids in list(zip(problems, roll.completions()))[:2]]
    return {k: float(v) for k, v in out.items()}, look


# --- train --------------------------------------------------------------------------------------------


def calibrate(policy, models, problems, task, tok, c, f, max_new, generator):
    """Mean and std of the run's score over the SFT model's own samples, and a reward model's bias (its mean there).

    All token rewards are divided by that std, and the score is centred first. Neither changes what is optimised (the KL
    term is scaled along); both matter to the critic, which starts at 0 and, clipped, moves eps_v per rollout: a critic
    that lags behind credits late tokens more than early ones, and the policy learns to stop early.
    """
    with autocast(c.device, c.dtype):
        roll = generate(policy, [tok.prompt(p, c.chat) for p in problems], max_new, temperature=c.temperature,
                        generator=generator)
    models["bias"] = 0.0
    provided = models["score"](f.reward, roll, quality(task, problems, roll, tok))
    if "judged" in provided:
        models["bias"] = provided["judged"].mean().item()
        provided["judged"] = provided["judged"] - models["bias"]
    score = f.eos(f.reward(**provided), roll.finished)                                   # [B]
    return dict(mean=score.mean().item(), std=std if (std := score.std().item()) > 1e-3 else 1.0, bias=models["bias"])


def needs_base(c, f):
    """Whether the run reads the pre-trained model: in its reward, or to decode."""
    return "base_logp" in needs(f.reward) or c.decode == "contrast"


def open_models(c, f, init, base, resume_from):
    """Policy, critic, and the frozen models that the reward and the KL penalty read -> (policy, critic, models, tok).

    models: ref (the SFT model), base, judge where needed, and score(fn, roll, quality), which computes what the
    function fn names among its positional arguments.
    """
    ref, tok = load(init, c.device)
    if not isinstance(ref, Transformer):
        raise UserError(f"--init {c.init} is a reward model; ppo.py needs a language model there")
    models = dict(ref=ref.requires_grad_(False))
    if needs_base(c, f):
        models["base"], other = load(base, c.device)
        if other.tokens != tok.tokens:
            raise UserError(f"--base {c.base} and --init {c.init} have different tokenizers: log-ratios need the same ids")
        models["base"].requires_grad_(False)
    if "judged" in needs(f.reward):
        models["judge"], other = load(c.reward, c.device)
        if not isinstance(models["judge"], ScalarModel):
            raise UserError(f"--reward {c.reward} is a language model; give a …ForSequenceClassification folder")
        if other.tokens != tok.tokens:
            raise UserError(f"--reward {c.reward} and --init {c.init} have different tokenizers")
        models["judge"].requires_grad_(False)

    def score(fn, roll, gold_quality):
        compute = dict(
            mask=lambda: roll.mask, quality=lambda: gold_quality.to(roll.mask.device),
            sft_logp=lambda: logprobs(models["ref"], roll.tokens, roll.mask, c),
            base_logp=lambda: logprobs(models["base"], roll.tokens, roll.mask, c),
            judged=lambda: sequence_score(models["judge"], roll.tokens, roll.prompt_len + roll.mask.sum(1).long())
            - models.get("bias", 0.0))
        with torch.no_grad():
            return {name: compute[name]() for name in needs(fn)}

    models["score"] = score
    if resume_from:
        policy, critic = load(resume_from, c.device)[0], load(resume_from / "critic", c.device)[0]
    else:
        policy = copy.deepcopy(ref).requires_grad_()
        critic = ScalarModel.from_lm(ref)      # ours: not from the reward model, whose units calibrate() has left
    return policy, critic, models, tok


def train(c, f):
    """One run: load, roll out, score, update, tell. Returns the last evaluation's numbers and the SFT model's (sft_…)."""
    if c.temperature <= 0:
        raise UserError(f"--temperature {c.temperature}: PPO samples, so it must be positive; for greedy decoding in the "
                        f"evaluation use --eval_temperature 0")
    init = sft.find(c.init, c.config, seed=c.seed, device=c.device)                      # made before the clock starts
    base = sft.find(c.base, c.config, device=c.device) if needs_base(c, f) else ""
    with Run(c, f, "ppo", CURVES) as run:
        policy, critic, models, tok = open_models(c, f, init, base, run.last)
        task = tasks.task(c.data)
        problems = task.problems("train", 4096, 1000 + c.seed)
        sets = {s: task.problems(s, 512 if c.data == "toyif" else 96, c.seed) for s in tasks.held_out(c.data)}
        longest = max(len(tok.prompt(p, c.chat)) for split in (problems, *sets.values()) for p in split)
        max_new = c.max_new or min(task.max_new, policy.config.max_position_embeddings - longest)
        if max_new < 1 or longest + max_new > policy.config.max_position_embeddings:
            raise UserError(f"the longest prompt has {longest} tokens: with {max(1, max_new)} new ones it exceeds the context "
                            f"of {policy.config.max_position_embeddings}; shorten it or lower --max_new")
        opt, critic_opt = adamw(policy, c.lr), adamw(critic, c.critic_lr)
        g, factor, scale, before = torch.Generator().manual_seed(c.seed), 1.0, {}, {}
        if run.state:
            opt.load_state_dict(run.state["opt"])
            critic_opt.load_state_dict(run.state["critic_opt"])
            g.set_state(run.state["rng"])
            factor, scale, before = run.state["factor"], run.state["scale"], run.state["before"]
            models["bias"] = scale["bias"]
        run.say(f"{run.folder}: policy and critic of {sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, "
                f"{len(problems)} prompts, {c.steps} steps of {c.rollouts} x {c.samples} completions, {c.device} {c.dtype}")
        if not run.state:
            scale = calibrate(policy, models, problems[:256], task, tok, c, f, max_new, g)
            before, look = evaluate(policy, models, sets, task, tok, c, f, max_new)
            run.log(0, **before, show=True)
        scores = before
        train_policy, train_critic = (torch.compile(m) if c.compile else m for m in (policy, critic))

        def write(folder):
            save(policy, tok, folder)
            save(critic, tok, folder / "critic")

        for step in run.steps(c.steps):
            # 1. roll out ------------------------------------------------------------------------------
            clock = time.perf_counter()
            picked = [problems[i] for i in batch_indices(len(problems), c.rollouts, step, c.seed).tolist()]
            with autocast(c.device, c.dtype):
                roll = generate(policy, [tok.prompt(p, c.chat) for p in picked], max_new, samples=c.samples,
                                temperature=c.temperature, generator=g)
            tokens, mask, old_logp = roll.tokens, roll.mask, roll.logp                   # [B, T]
            t_gen = time.perf_counter() - clock
            # 2. score ---------------------------------------------------------------------------------
            clock = time.perf_counter()
            gold_quality = quality(task, picked, roll, tok)                              # [B]
            raw = f.reward(**models["score"](f.reward, roll, gold_quality))              # [B]
            score = f.eos(raw, roll.finished)                                            # [B]
            ref_logp = logprobs(models["ref"], tokens, mask, c)                          # [B, T]
            old_values = read_values(critic, tokens, mask, c)                            # [B, T]
            unit = (score - scale["mean"]) / scale["std"]                                # [B]
            rewards = f.shaping(unit, old_logp, ref_logp, mask, factor / scale["std"])   # [B, T]
            have = dict(rewards=rewards, values=old_values, mask=mask, score=score, samples=c.samples)
            adv, returns = f.advantage(**{k: have[k] for k in needs(f.advantage)})       # [B, T] each
            t_score = time.perf_counter() - clock
            # 3. update --------------------------------------------------------------------------------
            clock, clipped, entropies, skipped, norm, losses = time.perf_counter(), [], [], 0, 0.0, []
            lr = linear(step, c.steps)
            set_lr(opt, c.lr * lr)
            set_lr(critic_opt, c.critic_lr * lr)
            for epoch in range(c.epochs):
                for rows in torch.randperm(len(tokens), generator=g).to(tokens.device).split(c.batch):
                    n, mean_ratio, loss = mask[rows].sum(), 0.0, 0.0
                    for part in rows.split(c.micro):
                        width = int((roll.prompt_len + mask.sum(1).long())[part].max())  # cut the common padding
                        t, m, old = tokens[part, :width], mask[part, :width], old_logp[part, :width]
                        with autocast(c.device, c.dtype):
                            logp, entropy = token_logprobs(train_policy, t, m, temperature=c.temperature, entropy=True)
                            per_token = f.surrogate(logp, old, adv[part, :width]) \
                                + f.regulariser(logp, ref_logp[part, :width], entropy)   # [b, T]
                        policy_loss = (per_token * m).sum() / n
                        policy_loss.backward()
                        ratio = ((logp - old) * m).detach().clamp(-20, 20).exp()         # [b, T]
                        if not epoch and not clipped:
                            check_first_ratio(ratio, m, c.dtype)
                        mean_ratio += float((ratio * m).sum() / n)
                        clipped.append(masked_mean(((ratio - 1).abs() > 0.2).float(), m))
                        entropies.append(masked_mean(entropy.detach(), m))
                        if returns is not None:
                            with autocast(c.device, c.dtype):
                                v = token_values(train_critic, t)                        # [b, T]
                            ((f.value(v, old_values[part, :width], returns[part, :width]) * m).sum() / n).backward()
                        loss += policy_loss.item()
                    losses.append(loss)
                    if mean_ratio > MAX_RATIO:
                        skipped += 1
                    else:
                        norm = clip_grad_norm_(policy.parameters(), MAX_NORM)
                        opt.step()
                        if returns is not None:
                            clip_grad_norm_(critic.parameters(), MAX_NORM)
                            critic_opt.step()
                    opt.zero_grad()
                    critic_opt.zero_grad()
            # 4. tell ----------------------------------------------------------------------------------
            kl = (k1(old_logp, ref_logp) * mask).sum(1).mean().item()                    # nats per response
            factor = f.controller(factor, kl, len(tokens))
            row = dict(reward=score.mean(), kl=kl, k3=(k3(old_logp, ref_logp) * mask).sum(1).mean(),
                       entropy=torch.stack(entropies).mean(), truncated=1 - roll.finished.float().mean(),
                       length=mask.sum(1).mean(), clipped=torch.stack(clipped).mean(), loss=sum(losses) / len(losses),
                       norm=norm, quality=gold_quality.mean(), skipped=skipped, beta_factor=factor,
                       t_gen=t_gen, t_score=t_score, t_update=time.perf_counter() - clock)
            if returns is not None:
                row["ev"] = explained_variance(old_values, returns, mask)
            if c.samples > 1:
                row["flat"] = (score.view(-1, c.samples).std(1) < 1e-6).float().mean()
            run.log(step + 1, **row)
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                scores, look = evaluate(policy, models, sets, task, tok, c, f, max_new)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                run.save(step + 1, write, opt=opt.state_dict(), critic_opt=critic_opt.state_dict(), rng=g.get_state(),
                         factor=factor, before=before, scale=scale)
        if c.stop and c.stop < c.steps:
            return scores
        if run.state and run.start >= c.steps:                   # resumed after its last step
            scores, look = evaluate(policy, models, sets, task, tok, c, f, max_new)
        report(run, before, scores, look)
        return run.finish(**scores, **{f"sft_{k}": v for k, v in before.items()})


def check_first_ratio(ratio, mask, dtype):
    """The first update after a rollout must find π = π_old. Raises UserError: then every later ratio is wrong too.

    Exact to 1e-3 in float32; in bfloat16 the two passes round differently, token by token, so the mean is held to 2 %.
    """
    off = (ratio - 1).abs() * mask
    worst = off.max().item() if dtype == "float32" else masked_mean(off, mask).item()
    if worst > (1e-3 if dtype == "float32" else 0.02):
        raise UserError(f"the first ratio after a rollout is off by {worst:.2g}: the sampler is not the policy "
                        f"(another temperature, dtype or weights?)")


def explained_variance(values, returns, mask):
    """1 - Var(R - V) / Var(R) over the mask: 0 for a constant critic, 1 for a perfect one."""
    def var(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return 1 - var(returns - values) / var(returns).clamp(min=1e-8)


def report(run, before, after, look):
    """The last words of a run: two samples a split, then SFT beside the trained policy on held-out prompts."""
    for prompt, text, reference in look:
        run.say(f"  prompt     {prompt!r}\n  policy     {text!r}\n  reference  {reference!r}")
    run.say(f"\n  held-out prompts    {'SFT':>10} {'now':>10}")
    for key in before:
        run.say(f"  {key:<18} {before[key]:>11.3f} {after[key]:>10.3f}")
    run.say(f"\n  {run.folder}: curve.png, log.jsonl, and the checkpoint {run.last or '(none: no step was made)'}")


# --- claims -------------------------------------------------------------------------------------------


def srppo_arms():
    """Every arm of the claim at both sizes of the demonstration set, 512 and 64."""
    arms = dict(srppo="srppo", srppo_greedy="srppo,cold", sft="sft", sft_more="sft,more", greedy="greedy", half="half", likelihood="likelihood",
                bon16="bon", raft="raft", contrast05="contrast,alpha05", contrast1="contrast", contrast2="contrast,alpha2")
    more = {512: "more", 64: "more64"}
    return {f"{name} {n}": f"toyif,{row.replace('more', more[n])}" + (",n64" if n == 64 and name != "sft_more" else "")
            for n in (512, 64) for name, row in arms.items()}


CONTROLS = ("greedy", "half", "likelihood", "contrast05", "contrast1", "contrast2")


def srppo_tests():
    """srppo (sampled) against every other arm at both sizes, greedy against greedy, and whether its gain over SFT is
    larger with fewer demonstrations."""
    others = [a.rsplit(" ", 1)[0] for a in srppo_arms() if a.endswith(" 64") and not a.startswith("srppo")]
    tests = {f"srppo - {other}, {n}": {f"srppo {n}": 1, f"{other} {n}": -1} for n in (512, 64) for other in others}
    tests |= {f"greedy: srppo - sft, {n}": {f"srppo_greedy {n}": 1, f"greedy {n}": -1} for n in (512, 64)}
    tests["gain at 64 - gain at 512"] = {"srppo 64": 1, "sft 64": -1, "srppo 512": -1, "sft 512": 1}
    return tests


def srppo_conclusion(v):
    """Per size: 'holds' if srppo beats sft, sft_more and every control that merely sharpens the SFT model; 'sharpening
    only' if it beats sft but a control beats it; 'undecided' otherwise. Then the scarcity claim on its own."""
    def at(n):
        gain, more = v[f"srppo - sft, {n}"], v[f"srppo - sft_more, {n}"]
        controls = {v[f"srppo - {x}, {n}"] for x in CONTROLS}
        if gain != "holds" or more == "does not hold":
            return gain if gain != "holds" else "does not hold"
        return "sharpening only" if "does not hold" in controls else "holds" if controls | {more} == {"holds"} else "undecided"
    return f"{at(512)} (512 demonstrations), {at(64)} (64); larger gain when scarce: {v['gain at 64 - gain at 512']}"


CLAIMS = dict(
    srppo=Claim("Self-Rewarding PPO beats SFT and longer SFT out of domain, most when demonstrations are scarce (ToyIF)",
                "2510.21090: about +2 to +4 points over SFT on averaged benchmarks (second-hand)",
                arms=srppo_arms(), metric="ood_gold", tests=srppo_tests(),
                also=("val_gold", "ood_length", "ood_truncated"), conclude=srppo_conclusion))

# --- main ---------------------------------------------------------------------------------------------


def main(argv=None):
    """python ppo.py …: see the docstring above, or --help."""
    return launch("ppo", Config, PRESETS, AXES, CLAIMS, __doc__, train, argv)


if __name__ == "__main__":
    cli(main)
