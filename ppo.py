"""
ppo.py - policy optimisation with a critic: PPO for language models, and Self-Rewarding PPO.

    python ppo.py                                  # Self-Rewarding PPO on real docstrings: minutes
    python ppo.py --config tiny                    # the same, small: shows that all turns
    python ppo.py --config ppo                     # PPO against the task's own reward
    python ppo.py --config ppo --reward FOLDER     # ... against a reward model's checkpoint
    python ppo.py --init sft_checkpoint --base Qwen2.5-0.5B --data demos.jsonl
    python ppo.py --claim srppo --seeds 5          # against its baselines, with a verdict

Letters  B completions (prompts x samples), T tokens; [B, T] is aligned: index t belongs to
         tokens[:, t]
Worlds   docs (the default) signatures -> docstrings of the standard library; toyif and ring the
         synthetic ones of data/prefs.py, whose gold reward is known. srppo is the default reward.
Watch    reward should rise while kl stays a few nats per response; ev (the critic's explained
         variance) leaves 0 within ten steps. A length that runs away means that the reward pays per
         token. kl is k1, signed: on a batch it may dip below 0. quality is the task's own measure:
         only gold sees it. reward is what is trained on, EOS rule included; val_reward and
         ood_reward are without that rule. work is the share of rows x longest completion that
         decoding computed: finished rows leave.
"""
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import kernels
import sft
from data import tasks
from data.run import (Count, MeanOf, Positive, Run, Share, Training, UserError, batch_indices,
                      check_first_ratio, checkpoint, cli, launch, needs, report, start_ranks)
from data.stats import explained_variance, rank_correlation
from model import (ADAPTERS, PEFT, ScalarModel, Transformer, Work, adapter_readers, adapter_state,
                   autocast, check_adapters, clip_gradients, critic_values, foresee, generate, load,
                   load_frozen, logprobs, masked_whiten, open_trained, passes, peek, plain_model,
                   recomputing, reference, rows_of, save, save_trained, sequence_scores, shard,
                   summed, token_logprobs, token_values, with_peft)
from optim import linear, optimiser, set_lr, state_bytes

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Training):
    """What every run has; what belongs to a reward or a loss is an argument of its function."""
    data: str = "signatures"     # a task, or a JSONL of prompts and completions (for the quality)
    init: str = "base:sft"       # the SFT model, where policy, critic and reference start
    base: str = "base:pretrain"  # the model before SFT: the coherent reward's divisor
    reward: str = "coherent"     # which row of REWARDS, or the folder of a reward model
    advantage: str = "gae"       # which row of ADVANTAGES
    surrogate: str = "clip"      # which row of SURROGATES
    eos: str = "replace"         # which row of EOS: what a completion that never ends is worth
    controller: str = "fixed"    # which row of CONTROLLERS: how the KL's coefficient moves
    regulariser: str = "none"    # which row of REGULARISERS: KL in the loss
    decode: str = "sample"       # which row of DECODERS: how evaluation samples
    steps: int = 40              # rollout-and-update iterations
    rollouts: Count = 32         # prompts per iteration
    samples: Count = 4           # completions per prompt
    epochs: Count = 2            # passes over each rollout
    batch: Count = 64            # completions per optimizer step
    lr: Positive = 2e-4          # policy's learning rate, falling linearly to 0
    critic_lr: Positive = 5e-4   # critic's
    share_trunk: bool = True     # with --peft: the critic is adapters on the policy's frozen base
    entropy: float = 0.0         # coefficient of an entropy bonus
    temperature: Positive = 1.0  # of sampling and, the same, of every log-prob
    max_new: int = 0             # longest completion in tokens (0: the task says)
    eval_every: Count = 10       # iterations between evaluations on held-out prompts
    eval_prompts: int = 0        # of each held-out split (0: 512 in a world, 256 otherwise)
    save_every: Count = 20       # iterations between checkpoints


PRESETS = dict(
    # lr of srppo, likelihood, raft: each the best of a grid by val_gold on ToyIF, seeds 100 and 101
    srppo=dict(reward="coherent", beta=1.0, no_eos=-5.0),        # ours: the paper's are unknown
    docs=dict(),                                                 # the defaults
    toyif=dict(data="toyif", init="base:toyif", base="base:toyif_base", rollouts=128, samples=1,
               steps=60, eval_every=20, save_every=1000, keep=1),
    ring=dict(data="ring", init="base:ring", base="base:ring", rollouts=96, samples=1, steps=100,
              eval_every=20),
    tiny=dict(steps=4, rollouts=8, samples=2, batch=8, micro=8, eval_every=2, eval_prompts=32,
              save_every=2, max_new=16))

CURVES = {"reward": ["reward", "val_reward", "ood_reward"], "KL, nats per response": ["kl", "k3"],
          "quality": ["val_rouge_l", "ood_rouge_l", "val_gold", "ood_gold", "val_accuracy",
                      "ood_accuracy"],
          "length, tokens": ["length"], "critic": ["ev"]}

# --- the reward: positional arguments name what is computed of a rollout, see PROVIDE -------------


def coherent(sft_logp, base_logp, mask, *, per_token=False):
    """Self-Rewarding PPO (2510.21090):  r = log π_sft(y|x) - log π_base(y|x), EOS included.

    [B, T] -> [B]. A sum over tokens, so where the mean ratio is positive longer is better;
    per_token divides by the length.
    """
    ratio = ((sft_logp - base_logp) * mask).sum(1)                                       # [B]
    return ratio / mask.sum(1).clamp(min=1) if per_token else ratio


REWARDS = dict(coherent=coherent)


def eos_replace(score, finished, *, no_eos=-5.0):
    """A response without EOS scores no_eos, whatever the reward says (2403.17031).   [B] -> [B]"""
    return torch.where(finished, score, torch.full_like(score, no_eos))


EOS = dict(replace=eos_replace)

# --- KL -------------------------------------------------------------------------------------------


def k1(logp, ref_logp):
    """log-ratio: unbiased for KL(π||π_ref) under samples of π, signed.   [B, T]"""
    return logp - ref_logp


def k3(logp, ref_logp):
    """exp(-d) - 1 + d >= 0, unbiased like k1; as a loss its gradient is KL(π_ref||π)'s.   [B, T]"""
    return torch.expm1(ref_logp - logp) + logp - ref_logp


def fixed(beta):
    """The KL's coefficient as it is."""
    return beta


def token_rewards(score, logp, ref_logp, mask, coefficient, *, beta=1.0):
    """r_t = -β k1_t, and the response's score on its last token.   score [B], the rest [B, T]

    coefficient: the controller's current factor on beta.   -> [B, T]
    """
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))                # 1 on the last token
    return -beta * coefficient * k1(logp, ref_logp) * mask + score[:, None] * last


def no_regulariser(logp):
    """No KL in the loss: it is in the reward.   [B, T]"""
    return torch.zeros_like(logp)


CONTROLLERS = dict(fixed=fixed)
REGULARISERS = dict(none=no_regulariser)

# --- advantages -----------------------------------------------------------------------------------


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """GAE, 1506.02438 eq. 16:  δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γλ A_{t+1}.

    rewards, values, mask [B, T] with one run of ones per row -> advantages, returns = A + V, both
    [B, T]. V and A are 0 past the end.
    """
    adv, after, last = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * after - values[:, t]                             # [B]
        last = mask[:, t] * (delta + gamma * lam * last)
        after = values[:, t] * mask[:, t]
        adv[:, t] = last
    return adv, (adv + values) * mask


def whitened_gae(rewards, values, mask, *, gamma: Share = 1.0, lam: Share = 0.95,
                 whiten_rewards=False):
    """GAE; advantages whitened over the whole rollout, returns never (2403.17031).

    -> [B, T], [B, T]
    """
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift=False)
    adv, returns = gae(rewards, values, mask, gamma, lam)
    return masked_whiten(adv, mask), returns


ADVANTAGES = dict(gae=whitened_gae)

# --- losses: per token, [B, T]; the loop divides by the tokens of the whole minibatch -------------


def ppo_clip(logp, old_logp, adv, *, eps: Positive = 0.2, cap: Positive = 20.0):
    """1707.06347 eq. 7:  max(-A ρ, -A clip(ρ, 1-ε, 1+ε)),  ρ = π/π_old.   [B, T]

    |log ρ| is capped against overflow.
    """
    ratio = (logp - old_logp).clamp(-cap, cap).exp()                                     # [B, T]
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + eps))


def value_loss(values, old_values, returns, *, eps_v=0.2):
    """½ max((V - R)², (clip(V, V_old ± ε_v) - R)²), PPO's clipped value loss; eps_v 0: no clip."""
    loss = (values - returns) ** 2                                                       # [B, T]
    if eps_v:
        near = old_values + (values - old_values).clamp(-eps_v, eps_v)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return 0.5 * loss


SURROGATES = dict(clip=ppo_clip)
MAX_RATIO, MAX_NORM = 10.0, 1.0  # beyond it a minibatch is skipped (TRL's); gradient norm

# --- roll out and decode --------------------------------------------------------------------------


def sample(model, prompts, max_new, generator, slots, *, eval_temperature=1.0):
    """One completion a prompt at eval_temperature (0: greedy)."""
    return generate(model, prompts, max_new, temperature=eval_temperature, generator=generator,
                    slots=slots)


DECODERS = dict(sample=sample)
AXES = dict(reward=REWARDS, advantage=ADVANTAGES, surrogate=SURROGATES, eos=EOS, decode=DECODERS,
            controller=CONTROLLERS, regulariser=REGULARISERS,
            shaping=dict(shaping=token_rewards), value=dict(value=value_loss),
            peft=PEFT, kernels=kernels.MODES)


def quality(task, problems, roll, tok):
    """The task's own reward of every completion's text.   [B]"""
    per = len(roll.tokens) // len(problems)
    texts = [tok.decode(ids) for ids in roll.completions()]
    return torch.tensor([task.reward(problems[i // per], x, done)
                         for i, (x, done) in enumerate(zip(texts, roll.finished.tolist()))])


# --- the frozen models, and what a reward asks of them --------------------------------------------

# what a function asks for: the option that names the checkpoint which it takes, what that must be
MODELS = dict(base_logp=("base", Transformer), base=("base", Transformer))
# what a reward asks for: a function of (models, roll, quality [B], c)
PROVIDE = dict(
    mask=lambda models, roll, truth, c: roll.mask,
    sft_logp=lambda models, roll, truth, c: logprobs(models["ref"], roll.tokens, roll.mask, c),
    base_logp=lambda models, roll, truth, c: logprobs(models["base"], roll.tokens, roll.mask, c))


def wanted(f):
    """{option: what its checkpoint must be} of the models that the reward and the decoder take."""
    asked = {*needs(f.reward), *needs(f.decode)}
    return dict(MODELS[name] for name in MODELS if name in asked)


@torch.no_grad()
def scored(models, roll, truth, c, f):
    """The run's reward of a rollout, without the EOS rule. truth: the quality.   [B] -> [B]"""
    return f.reward(**{name: PROVIDE[name](models, roll, truth, c) for name in needs(f.reward)})


def score_of(models, task, problems, tok, c, f, roll):
    """scored(), of a rollout of these problems.   -> [B]"""
    return scored(models, roll, quality(task, problems, roll, tok), c, f)


def open_models(c, f, init, base, run):
    """Policy, critic, tokenizer, and {name: frozen model} that the reward and the KL penalty read.

    The critic starts from the SFT model, not from a reward model, whose units calibrate() leaves
    (ours).
    """
    adapter, own = ((run.state or {}).get(name, {}) for name in ("adapter", "critic"))
    policy, tok = open_trained(c, f.peft, init, run.last, adapter)
    ref = reference(policy, c, init)
    models = dict(ref=ref, bias=0.0)
    for option in wanted(f):
        path = base if option == "base" else getattr(c, option)
        models[option], other = load_frozen(path, c)
        if other.tokens != tok.tokens:
            raise UserError(f"--{option} {path} and --init {init} have different tokenizers: "
                            "both must score the same ids")
    return policy, open_critic(c, f, ref, run.last, own), tok, models


# --- evaluate -------------------------------------------------------------------------------------


def evaluate(policy, models, sets, task, tok, c, f, max_new):
    """Held-out prompts, always the same, with the same draws: reward, quality, KL to SFT, length.

    reward is without the EOS rule. kl is k1 of the policy's weights, summed per response, however
    it is decoded. -> {split_key: mean}, [(prompt, text, reference)].
    """
    out, shown = {}, []
    for split, problems in sets.items():
        score = partial(score_of, models, task, problems, tok, c, f)
        known = dict(model=policy, base=models.get("base"), score=score, max_new=max_new,
                     prompts=[tok.prompt(p, c.chat) for p in problems],
                     generator=torch.Generator().manual_seed(c.seed + 1), slots=c.slots)
        roll = f.decode(**{name: known[name] for name in needs(f.decode)})
        logp, ref = (logprobs(m, roll.tokens, roll.mask, c)
                     for m in (policy, models["ref"]))                                   # [B, T]
        out |= {f"{split}_reward": score(roll),
                f"{split}_{task.metric}": quality(task, problems, roll, tok),
                f"{split}_kl": (logp - ref).sum(1),
                f"{split}_length": roll.mask.sum(1),
                f"{split}_truncated": ~roll.finished}                                    # [B] each
        texts = [tok.decode(ids) for ids in roll.completions()[:2]]
        shown += [(tok.shown(p, c.chat), text, task.demo(p)) for p, text in zip(problems, texts)]
    return {k: MeanOf(v) for k, v in out.items()}, shown


# --- train ----------------------------------------------------------------------------------------


def backward(policy, critic, batch, rows, c, f):
    """Gradients of one minibatch, over its micro-batches -> {name: what happened}.

    batch: tokens, mask, old_logp, ref_logp, adv and, with a critic, old_values, returns [B, T];
    length [B]. Losses are sums over tokens divided by the tokens of the whole minibatch, so --micro
    changes nothing.
    """
    metrics = dict(loss=0.0, ratio=0.0, off=0.0, clipped=0.0, entropy=0.0, worst=0.0)
    n = batch["mask"][rows].sum()
    for part, weight in passes(rows, c.micro):
        width = int(batch["length"][part].max())                            # cut the common padding
        b = SimpleNamespace(**{k: x[part, :width] for k, x in batch.items() if x.dim() == 2})
        with autocast(c.device, c.dtype):
            logp, entropy = token_logprobs(policy, b.tokens, b.mask, temperature=c.temperature,
                                           entropy=True)
        known = dict(logp=logp, ref_logp=b.ref_logp)
        more = f.regulariser(**{name: known[name] for name in needs(f.regulariser)})     # [b, T]
        more = more - c.entropy * entropy if c.entropy else more
        loss = ((f.surrogate(logp, b.old_logp, b.adv) + more) * b.mask).sum() / n
        (loss * weight).backward()
        if "returns" in batch:
            with autocast(c.device, c.dtype):
                values = token_values(critic, b.tokens)                                  # [b, T]
            value = (f.value(values, b.old_values, b.returns) * b.mask).sum() / n
            (value * weight).backward()
        if not weight:
            continue
        ratio = (logp.detach() - b.old_logp).clamp(-20, 20).exp()                        # [b, T]
        off = (ratio - 1).abs() * b.mask
        metrics["loss"] += loss.item()
        metrics["worst"] = max(metrics["worst"], off.max().item())
        for key, x in dict(ratio=ratio, off=off, entropy=entropy.detach(),
                           clipped=off > f.surrogate.keywords.get("eps", 0.2)).items():
            metrics[key] += ((x * b.mask).sum() / n).item()
    return summed(metrics, largest=["worst"])


def train(c, f):
    """One run: load, roll out, score, update, tell. -> the last evaluation, and SFT's (sft_…)."""
    start_ranks(c.device)                                # alone without torchrun
    check(c, f)
    init = sft.find(c.init, c.config, seed=c.seed, device=c.device)  # made before the clock starts
    base = sft.find(c.base, c.config, device=c.device) if "base" in wanted(f) else ""
    kernels.use(c.kernels)
    with Run(c, f, "ppo", CURVES) as run:
        policy, critic, tok, models = open_models(c, f, init, base, run)
        whole, whole_critic = shard(policy, c.dtype), shard(critic, c.dtype)     # over the ranks
        for name in ("ref", *wanted(f)):
            shard(models[name], c.dtype)
        task = tasks.of_run(c)
        problems = task.problems("train", 4096, 1000 + c.seed)
        size = c.eval_prompts or (512 if c.data in ("toyif", "ring") else 256)
        sets = {s: task.problems(s, size, c.seed) for s in tasks.held_out(c.data)}
        max_new, problems, sets = tasks.fitting(c, tok, problems, sets, task.max_new,
                                                policy.config.max_position_embeddings)
        opt, critic_opt = optimiser(policy, lr=c.lr), optimiser(critic, lr=c.critic_lr)
        g, factor = torch.Generator().manual_seed(c.seed), 1.0
        run.say(f"{run.folder}: {tasks.out_of(problems, task)}")
        introduce(run, c, (policy, critic), models, (opt, critic_opt), problems, sets, max_new, tok)
        if run.state:
            opt.load_state_dict(run.state.pop("opt"))
            critic_opt.load_state_dict(run.state.pop("critic_opt"))
            g.set_state(run.state["rng"])
            factor, scale, before = (run.state[k] for k in ("factor", "scale", "before"))
            models["bias"] = scale["bias"]
        else:
            scale = calibrate(policy, models, problems[:64], task, tok, c, f, max_new, g)
            run.say(f"  reward of SFT samples: mean {scale['mean']:.2f}, std {scale['std']:.2f}; "
                    f"Spearman with {task.metric} within a prompt {scale['agreement']:.2f} (0: "
                    "uninformative)")
            if scale["cut"] == 1:
                run.say(f"  WARNING: every SFT sample is cut off at {max_new} tokens: raise "
                        "--max_new or use --eos ignore")
            before, shown = evaluate(policy, models, sets, task, tok, c, f, max_new)
            run.log(0, **before, show=True)
        scores = before
        train_policy, train_critic = (torch.compile(m) if c.compile else m
                                      for m in (policy, critic))

        for step in run.steps(c.steps):
            # 1. roll out --------------------------------------------------------------------------
            clock = time.perf_counter()
            where = batch_indices(len(problems), c.rollouts, step, c.seed).tolist()
            picked = [problems[i] for i in where]
            with autocast(c.device, c.dtype):
                roll = generate(policy, [tok.prompt(p, c.chat) for p in picked], max_new,
                                samples=c.samples, temperature=c.temperature, generator=g,
                                slots=c.slots)
            mask, t_gen = roll.mask, time.perf_counter() - clock                         # [B, T]
            # 2. score -----------------------------------------------------------------------------
            clock = time.perf_counter()
            truth = quality(task, picked, roll, tok)                                     # [B]
            score = f.eos(scored(models, roll, truth, c, f), roll.finished)              # [B]
            ref_logp = logprobs(models["ref"], roll.tokens, mask, c)                     # [B, T]
            old_values = critic_values(critic, roll.tokens, mask, c)                       # [B, T]
            unit = (score - scale["mean"]) / scale["std"]                                # [B]
            rewards = f.shaping(unit, roll.logp, ref_logp, mask, factor / scale["std"])  # [B, T]
            known = dict(rewards=rewards, values=old_values, mask=mask, score=score,
                         samples=c.samples)
            adv, returns = f.advantage(**{k: known[k] for k in needs(f.advantage)})      # [B, T]
            batch = dict(tokens=roll.tokens, mask=mask, old_logp=roll.logp, ref_logp=ref_logp,
                         adv=adv, length=roll.prompt_len + mask.sum(1).long())
            batch |= dict(old_values=old_values, returns=returns) if returns is not None else {}
            t_score = time.perf_counter() - clock
            # 3. update ----------------------------------------------------------------------------
            clock, done, norm, skipped = time.perf_counter(), [], 0.0, 0
            set_lr(opt, c.lr * linear(step, c.steps))
            set_lr(critic_opt, c.critic_lr * linear(step, c.steps))
            for epoch in range(c.epochs):
                for rows in torch.randperm(len(mask), generator=g).to(mask.device).split(c.batch):
                    done.append(backward(train_policy, train_critic, batch, rows, c, f))
                    if len(done) == 1:
                        check_first_ratio(done[0], c.dtype)
                    if done[-1]["ratio"] > MAX_RATIO:
                        skipped += 1
                    else:
                        norm = clip_gradients(policy, MAX_NORM)
                        clip_gradients(critic, MAX_NORM)
                        opt.step()
                        critic_opt.step()
                    opt.zero_grad()
                    critic_opt.zero_grad()
            # 4. tell ------------------------------------------------------------------------------
            kl = (k1(roll.logp, ref_logp) * mask).sum(1).mean().item()       # nats per response
            row = dict(reward=score.mean(), kl=kl, entropy=done[0]["entropy"],
                       k3=(k3(roll.logp, ref_logp) * mask).sum(1).mean(),
                       truncated=1 - roll.finished.float().mean(),
                       length=mask.sum(1).mean(), quality=truth.mean(), norm=norm, skipped=skipped,
                       work=roll.row_steps / (len(mask) * max(1, int(mask.sum(1).max()) - 1)))
            for key in ("loss", "clipped"):
                row[key] = sum(metrics[key] for metrics in done) / len(done)
            if returns is not None:
                row["ev"] = explained_variance(old_values, returns, mask)
            if c.samples > 1:
                row["flat"] = (score.view(-1, c.samples).std(1) < 1e-6).float().mean()
            known = dict(beta=factor, kl=kl, n=len(mask))
            factor = f.controller(**{k: known[k] for k in needs(f.controller)})
            run.log(step + 1, **row, beta_factor=factor, t_gen=t_gen, t_score=t_score,
                    t_update=time.perf_counter() - clock)
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                run.check(step + 1, policy, critic)
                scores, shown = evaluate(policy, models, sets, task, tok, c, f, max_new)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                nets = whole(), whole_critic()                   # every rank takes part
                run.save(step + 1, partial(write, c, *nets, tok, init), opt=opt.state_dict(),
                         critic_opt=critic_opt.state_dict(), adapter=adapter_state(nets[0]),
                         critic=adapter_state(nets[1]), rng=g.get_state(), factor=factor,
                         before=before, scale=scale)
        if c.stop and c.stop < c.steps:
            return scores
        if run.state and run.start >= c.steps:                     # resumed after its last step
            scores, shown = evaluate(policy, models, sets, task, tok, c, f, max_new)
        report(run, before, scores, shown)
        sft_scores = {f"sft_{k}": v for k, v in before.items()}
        return run.finish(**scores, **sft_scores, agreement=scale["agreement"])


def main(argv=None):
    """python ppo.py …: see the docstring above, or --help."""
    return launch("ppo", Config, PRESETS, AXES, __doc__, train, argv, readers, ranks=True)


# === refused: what a run reads, and what does not go together, told before anything is made =======


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    return dict(base=("base" in wanted(f), "--reward coherent or --decode contrast"),
                critic_lr=("values" in needs(f.advantage), "--advantage gae"),
                lr=(c.steps, "runs with --steps"),
                warmup=(False, "sft.py, grpo.py, dpo.py and specdec.py"),
                share_trunk=(c.peft in ADAPTERS, "--peft lora"), **adapter_readers(c),
                **tasks.file_readers(c))


def check(c, f):
    """UserError for all that can be known before anything is made: files, folders, what does not
    combine."""
    tasks.check_data(c.data, is_text=False, needs="answers", **tasks.reading(c))
    if "samples" in needs(f.advantage) and c.samples < 2:
        raise UserError(f"--samples {c.samples}: --advantage {c.advantage} takes the best of at "
                        "least two")
    most = sft.find(c.init, c.config, make=False)
    if c.max_new >= most:
        raise UserError(f"--max_new {c.max_new} does not fit the {most} tokens of {c.init}")
    check_adapters(c, c.init)
    for option, kind in wanted(f).items():
        if option == "base" and tasks.is_own(c):
            raise UserError(f"--init {c.init} with --data {c.data}: give --base FOLDER too, the "
                            f"model that it was tuned from; {c.base} is that of the examples")
        if option == "base":
            sft.find(c.base, c.config, make=False, option="--base")
        else:
            peek(getattr(c, option), scalar=kind is ScalarModel, option=f"--{option}")


# === lora: 2106.09685, adapters in the place of all weights; their base is the reference ==========

PRESETS["lora"] = dict(peft="lora", lr=8e-4)                 # ours: four times full training's

# === trunk: ours, where adapters are trained, a critic on the policy's frozen weights =============


def trunk_is_shared(c):
    """Whether the critic is adapters and a head on the tensors of the policy's base."""
    return c.share_trunk and c.peft in ADAPTERS


def open_critic(c, f, ref, last, adapter):
    """The critic: a copy of the SFT model with a head, or adapters and a head on its tensors; last,
    adapter: of a resumed run."""
    if trunk_is_shared(c):
        return with_peft(ScalarModel.from_lm(ref, share=True), c, f.peft, adapter, 1)
    critic = load(last / "critic", c.device)[0] if last else ScalarModel.from_lm(ref)
    return recomputing(critic, c.recompute)


def write(c, policy, critic, tok, init, folder):
    """A checkpoint's folders: the policy's, and in it the critic's, unless it is kept as
    adapters."""
    save_trained(policy, tok, folder, c, init)
    if c.merge or not trunk_is_shared(c):
        save(plain_model(critic, "cpu"), tok, folder / "critic")


# === held: ours, what a run is, and what it holds at its peak, said before step 0 =================


def introduce(run, c, trained, models, opts, problems, sets, max_new, tok):
    """Say what is trained, and what that holds: a micro-batch of the longest completions, and a
    rollout."""
    size = sum(p.numel() for p in trained[0].parameters()) / 1e6
    run.say(f"  policy and critic of {size:.2f} M parameters, {c.steps} steps of {c.rollouts} x "
            f"{c.samples} completions, {c.device} {c.dtype}")
    prompts = [tok.prompt(p, c.chat) for some in (problems, *sets.values()) for p in some]
    width = max(map(len, prompts)) + max_new
    sampled = max(c.rollouts * c.samples, 8 * len(problems[:64]), *map(len, sets.values()))
    work = Work(c.micro, width, c.batch, sampled=min(sampled, c.slots or sampled), slots=width,
                knob="--rollouts, --eval_prompts", recompute=c.recompute)
    frozen = [m for m in models.values() if isinstance(m, torch.nn.Module)]
    foresee(run, c, work, trained, frozen, sum(map(state_bytes, opts)))


# === calibrate: 2009.01325, the reward in units of how the SFT model's own samples differ =========


def calibrate(policy, models, problems, task, tok, c, f, max_new, generator, samples=8):
    """What the run's reward says of the SFT model's own samples, before any training -> {name: x}.

    mean, std of the score: token rewards are divided by std, and the score is centred first.
    Neither changes what is optimised (the KL term is scaled along); both matter to the critic,
    which starts at 0 and moves at most eps_v a rollout: one that lags behind credits late tokens
    more than early ones, and the policy learns to stop early. bias: the mean raw score of a reward
    that has no zero of its own. agreement: rank_correlation with the quality. cut: the share of
    samples that did not end.
    """
    with autocast(c.device, c.dtype):
        roll = generate(policy, [tok.prompt(p, c.chat) for p in problems], max_new, samples=samples,
                        temperature=c.temperature, generator=generator, slots=c.slots)
    truth = quality(task, problems, roll, tok)                                           # [B]
    if "judged" in needs(f.reward):
        models["bias"] = PROVIDE["judged"](models, roll, truth, c).mean().item()
    raw = scored(models, roll, truth, c, f)                                              # [B]
    score = f.eos(raw, roll.finished)                                                    # [B]
    return dict(mean=score.mean().item(), std=score.std().item() if score.std() > 1e-3 else 1.0,
                bias=models["bias"], cut=1 - roll.finished.float().mean().item(),
                agreement=rank_correlation(raw.cpu().view(-1, samples), truth.view(-1, samples)))


# === ppo: 1707.06347, with the details of 2403.17031, on the task's own reward ====================


def gold(quality):
    """The task's own measure of the text.   [B] -> [B]"""
    return quality


REWARDS["gold"] = gold
PROVIDE["quality"] = lambda models, roll, truth, c: truth.to(roll.mask.device)
PRESETS["ppo"] = dict(reward="gold", beta=0.05, no_eos=-1.0)     # 2403.17031; lr and epochs ours


# === a reward model: 2009.01325, its score centred so that SFT samples have mean 0 ================


def learned(judged, *, clamp=0.0):
    """A reward model's score, less its mean over SFT samples; clamp > 0 bounds it.   [B] -> [B]"""
    return judged.clamp(-clamp, clamp) if clamp else judged


def judged(models, roll, truth, c):
    """What the reward model says of a rollout's responses.   -> [B]"""
    for file, says in BESIDE.items():
        if (path := checkpoint(c.reward) / file).exists():
            return says(models, load_file(path, str(c.device)), roll, c) - models["bias"]
    length = roll.prompt_len + roll.mask.sum(1).long()                                   # [B]
    return sequence_scores(models["reward"], roll.tokens, length, c) - models["bias"]


def last_hidden(model, tokens, end):
    """The body's hidden state at the last token, in float32.   [B, T], [B] -> [B, D]"""
    hidden = model(tokens, states=True)                                               # [B, T, D]
    return hidden[torch.arange(len(tokens), device=tokens.device), end - 1].float()


def gated(models, own, roll, c):
    """ArmoRM (2406.12845): ratings of the response, weighed by a gate that reads the prompt. [B]"""
    x, h = (last_hidden(models["reward"], roll.tokens, end) for end in (
        roll.prompt_len, roll.prompt_len + roll.mask.sum(1).long()))                     # [B, D]
    layers = sorted(k for k in own if k.endswith("weight"))
    for k in layers:
        x = x @ own[k].T + own[k.replace("weight", "bias")]
        x = x if k == layers[-1] else x.relu()
    return (torch.softmax(x / 10, -1) * own["gate.scale"] * (h @ own["ratings"].T)).sum(1)


def against_sft(models, own, roll, c):
    """A model of pairs (2510.20369) as a reward:  s(y, y') = (g(y, y') - g(y', y)) / 2,  y' the SFT
    model's greedy response to the prompt. [B]

    ours: the paper's reward of y is its mean s against the other samples of a group, an advantage
    that sums to 0. A fixed y' differs by a constant of the prompt where s is a difference of
    rewards; it needs no group, and its 0 is the SFT model."""
    *marks, eos = own["marks"].tolist()
    ids = [row[:n] for row, n in zip(roll.tokens.tolist(), roll.prompt_len.tolist())]
    most = c.max_new or tasks.of_run(c).max_new
    theirs = generate(models["ref"], ids, most, temperature=0.0).completions()
    rows = []
    for x, y, other in zip(ids, roll.completions(), theirs):
        room = (models["reward"].config.max_position_embeddings - len(x) - 3) // 2
        for a, b in ((y, other), (other, y)):
            rows.append([*x, marks[0], *a[:room], marks[1], *b[:room], eos])
    g = []
    for i in range(0, len(rows), c.micro):
        part = [torch.tensor(row, device=c.device) for row in rows[i:i + c.micro]]
        end = torch.tensor([len(row) for row in part], device=c.device)
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)                 # [b, T]
        g.append(pair_logit(models["reward"], own, tokens, end))
    g = torch.cat(g).view(-1, 2)                 # the response first, then second       # [B, 2]
    return (g[:, 0] - g[:, 1]) / 2


def pair_logit(model, own, tokens, end):
    """The logit that a pair's first response is better, over its uncertainty u (SNGP).   -> [B]"""
    h = last_hidden(model, tokens, end)                                                  # [B, D]
    if "pool.weight" in own:                     # no larger than its spectral bound, 1
        W, u = own["pool.weight"], own["u"]
        norm = (W.T @ u).norm()                  # u is the left singular vector, of length 1
        h = h @ (W / norm.clamp(min=1.0)).T + own["pool.bias"]
    if not len(own["W"]):
        return h @ own["w"]
    phi = (2 / len(own["W"])) ** 0.5 * torch.cos(h @ own["W"].T + own["b"])              # [B, R]
    ridge, lam, _ = own["settings"].tolist()
    P = own["P"].double() + ridge * torch.eye(len(own["P"]), device=h.device)
    var = ridge * (phi.double() * torch.linalg.solve(P, phi.double().T).T).sum(1)        # [B]
    return phi @ own["w"] / (1 + lam * var).sqrt().float()


BESIDE = {"armo.safetensors": gated, "pair.safetensors": against_sft}    # what reward.py leaves
REWARDS["PATH"], PROVIDE["judged"], MODELS["judged"] = learned, judged, ("reward", ScalarModel)


# === likelihood: 2510.21090, a control of srppo: log π_sft alone. Does the base model matter? =====


def likelihood(sft_logp, mask):
    """The SFT model's log-probability of the response: coherent() without base.  [B, T] -> [B]"""
    return (sft_logp * mask).sum(1)


REWARDS["likelihood"] = likelihood
PRESETS["likelihood"] = dict(reward="likelihood", no_eos=-50.0, lr=5e-4)  # its mean is about -10


# === subtract, ignore: 2403.17031, two other rules for a response that does not end ===============


def eos_subtract(score, finished, *, no_eos=1.0):
    """A response without EOS loses no_eos (TRL's missing_eos_penalty).   [B] -> [B]"""
    return score - no_eos * (~finished).float()


def eos_ignore(score, finished):
    """A response without EOS keeps its score.   [B] -> [B]"""
    return score


EOS["subtract"], EOS["ignore"] = eos_subtract, eos_ignore


# === adaptive: 1909.08593, a KL coefficient that aims at a number of nats =========================


def adaptive(beta, kl, n, *, target: Positive = 6.0, horizon: Count = 10000):
    """Adaptive KL coefficient (1909.08593 §2.2):  β (1 + clip(KL/target - 1, ±0.2) n/horizon).

    kl in nats per response, n responses in this batch.
    """
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


CONTROLLERS["adaptive"] = adaptive


# === k2, k3: 2402.03300 (k3), KL in the loss beside that in the reward; kl_coef ours ============


def k2_loss(logp, ref_logp, *, kl_coef: Positive = 0.05):
    """Half the squared log-ratio: on-policy its gradient is that of KL(π||π_ref).   [B, T]"""
    return kl_coef * 0.5 * (logp - ref_logp) ** 2


def k3_loss(logp, ref_logp, *, kl_coef: Positive = 0.05):
    """k3 as a loss: its gradient is that of KL(π_ref||π); k1's is 0 in expectation.   [B, T]"""
    return kl_coef * k3(logp, ref_logp)


REGULARISERS["k2"], REGULARISERS["k3"] = k2_loss, k3_loss


# === raft: 2304.06767, likelihood of the best of each prompt's samples by the reward ==============


def best_of_group(score, mask, samples):
    """1 on the tokens of each prompt's best response, else 0.   [B], [B, T] -> [B, T], None"""
    groups = score.view(-1, samples)                                                     # [P, G]
    best = groups.argmax(1, keepdim=True)                                                # [P, 1]
    return torch.zeros_like(groups).scatter(1, best, 1.0).view(-1, 1) * mask, None


def weighted_nll(logp, old_logp, adv):
    """Maximum likelihood weighted by the advantage: RAFT's step on the winners.   [B, T]"""
    return -adv * logp


ADVANTAGES["best"], SURROGATES["nll"] = best_of_group, weighted_nll
PRESETS["raft"] = dict(advantage="best", surrogate="nll", rollouts=8, samples=16, lr=1e-5)


# === sft, greedy, half: 2510.21090, baselines of srppo: no step at all, sampled or sharpened ======

PRESETS["sft"] = dict(steps=0, eval_temperature=1.0)
PRESETS["greedy"] = dict(steps=0, eval_temperature=0.0)
PRESETS["half"] = dict(steps=0, eval_temperature=0.5)


# === bon: 2009.01325, a control of srppo: the best of n samples by the run's own reward ===========


def best_of_n(model, prompts, max_new, generator, slots, score, *, n: Count = 16):
    """The best of n samples by the run's own reward; one that does not end only if none does."""
    roll = generate(model, prompts, max_new, samples=n, generator=generator, slots=slots)
    value = torch.where(roll.finished, score(roll), -torch.inf).view(-1, n)              # [P, n]
    pick = value.argmax(1) + torch.arange(len(value), device=value.device) * n           # [P]
    return rows_of(roll, pick)


DECODERS["bon"] = best_of_n
PRESETS["bon"] = dict(steps=0, decode="bon", n=16)


# === contrast: 2210.15097, a control of srppo: sampled from π_sft (π_sft / π_base)^alpha ==========


def contrastive(model, base, prompts, max_new, generator, slots, *, alpha=1.0):
    """Sample from π (π / π_base)^alpha: what srppo trains towards, without training."""
    return generate(model, prompts, max_new, generator=generator, contrast=(base, alpha),
                    slots=slots)


DECODERS["contrast"] = contrastive
PRESETS["contrast"] = dict(steps=0, decode="contrast")


if __name__ == "__main__":
    cli(main)
