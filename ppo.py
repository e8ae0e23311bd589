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
import re
import time
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import kernels
import sft
from data import prefs, tasks
from data.run import (Count, MeanOf, NonNegative, Positive, Run, Share, Training, UserError, ask,
                      asked_by, batch_indices, call, check_first_ratio, checkpoint, cli, launch,
                      needs, refuse_alone, report, rows_used, start_ranks)
from data.stats import explained_variance, rank_correlation
from model import (ADAPTERS, PEFT, ScalarModel, Transformer, Work, adapter_readers, adapter_state,
                   autocast, check_adapters, clip_gradients, collate, critic_values, foresee,
                   generate, load, load_frozen, logprobs, masked_whiten, open_trained, passes, peek,
                   plain_model, recomputing, reference, rows_of, save, save_trained,
                   sequence_scores, shard, summed, token_logprobs, token_values, with_peft)
from optim import linear, optimiser, set_lr, state_bytes

# --- config ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(Training):
    """What every run has; what belongs to a reward or a loss is an argument of its function."""
    data: str = "signatures"     # a task, or a JSONL of prompts and completions (for the quality)
    init: str = "base:sft"       # the SFT model, where policy, critic and reference start
    base: str = "base:pretrain"  # the model before SFT: the coherent reward's divisor
    rollout: str = "fresh"       # which row of ROLLOUTS: whose completions, and which tokens train
    reward: str = "coherent"     # which row of REWARDS, or the folder of a reward model
    eos: str = "replace"         # which row of EOS: what a completion that never ends is worth
    transform: str = "plain"     # which row of TRANSFORMS: what becomes of that number
    reference: str = "own"       # which row of REFERENCES: the model that the KL is to
    shaping: str = "ends"        # which row of SHAPINGS: the reward of each token
    critic: str = "scalar"       # which row of CRITICS
    advantage: str = "gae"       # which row of ADVANTAGES
    value: str = "clipped"       # which row of VALUES: the critic's loss
    surrogate: str = "clip"      # which row of SURROGATES
    regulariser: str = "none"    # which row of REGULARISERS: KL in the loss
    controller: str = "fixed"    # which row of CONTROLLERS: how the KL's coefficient moves
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
    calibrate: Count = 64        # prompts whose SFT samples give the reward its unit
    eval_prompts: int = 0        # of each held-out split (0: 512 in a world, 256 otherwise)
    save_every: Count = 20       # iterations between checkpoints


PRESETS = dict(
    # lr of srppo, likelihood, raft: each the best of a grid by val_gold on ToyIF, seeds 100 and 101
    srppo=dict(reward="coherent", beta=1.0, no_eos=-5.0),        # ours: the paper's are unknown
    docs=dict(),                                                 # the defaults
    tiny=dict(steps=4, rollouts=8, samples=2, batch=8, micro=8, eval_every=2, eval_prompts=32,
              save_every=2, max_new=16))

CURVES = {"reward": ["reward", "val_reward", "ood_reward"], "KL, nats per response": ["kl", "k3"],
          "quality": ["val_rouge_l", "ood_rouge_l", "val_gold", "ood_gold", "val_accuracy",
                      "ood_accuracy"],
          "length, tokens": ["length"], "critic": ["ev"]}

# --- PPO: the plain row of every axis; positional arguments name what a function is given ---------


def fresh(policy, pool, tok, c, max_new, generator, step):
    """Completions of the next prompts by the policy as it is; every token trains."""
    where = batch_indices(len(pool), c.rollouts, step, c.seed).tolist()
    problems = [pool[i] for i in where]
    with autocast(c.device, c.dtype):
        roll = generate(policy, [tok.prompt(p, c.chat) for p in problems], max_new,
                        samples=c.samples, temperature=c.temperature, generator=generator,
                        slots=c.slots)
    return dict(problems=problems, roll=roll)


def coherent(sft_logp, base_logp, mask, *, per_token=False):
    """Self-Rewarding PPO (2510.21090):  r = log π_sft(y|x) - log π_base(y|x), EOS included.

    [B, T] -> [B]. A sum over tokens, so where the mean ratio is positive longer is better;
    per_token divides by the length.
    """
    ratio = ((sft_logp - base_logp) * mask).sum(1)                                       # [B]
    return ratio / mask.sum(1).clamp(min=1) if per_token else ratio


def eos_replace(score, finished, *, no_eos=-5.0):
    """A response without EOS scores no_eos, whatever the reward says (2403.17031).   [B] -> [B]"""
    return torch.where(finished, score, torch.full_like(score, no_eos))


def plain(score):
    """The score as it is.   [B]"""
    return score


def own(ref):
    """The KL is to the SFT model."""
    return ref


def k1(logp, ref_logp):
    """log-ratio: unbiased for KL(π||π_ref) under samples of π, signed.   [B, T]"""
    return logp - ref_logp


def token_rewards(unit, logp, ref_logp, mask, coefficient, *, beta=1.0):
    """r_t = -β k1_t, and the response's score on its last token.   -> [B, T]

    unit [B]: the score in units of the SFT model's; coefficient: the controller's factor on beta.
    """
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))                # 1 on the last token
    return -beta * coefficient * k1(logp, ref_logp) * mask + unit[:, None] * last


def scalar(ref, share):
    """A linear head on the SFT model's body, or on its very tensors; it says 0 at first."""
    return ScalarModel.from_lm(ref, share=share)


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
    """GAE; advantages whitened over the whole rollout, returns never (2403.17031).   [B, T] each
    """
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift=False)
    adv, returns = gae(rewards, values, mask, gamma, lam)
    return masked_whiten(adv, mask), returns


def value_loss(values, old_values, returns, *, eps_v=0.2):
    """½ max((V - R)², (clip(V, V_old ± ε_v) - R)²), PPO's clipped value loss; eps_v 0: no clip."""
    loss = (values - returns) ** 2                                                       # [B, T]
    if eps_v:
        near = old_values + (values - old_values).clamp(-eps_v, eps_v)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return 0.5 * loss


def ppo_clip(logp, old_logp, adv, *, eps: Positive = 0.2, cap: Positive = 20.0):
    """1707.06347 eq. 7:  max(-A ρ, -A clip(ρ, 1-ε, 1+ε)),  ρ = π/π_old.   [B, T]

    |log ρ| is capped against overflow.
    """
    ratio = (logp - old_logp).clamp(-cap, cap).exp()                                     # [B, T]
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + eps))


def no_regulariser(logp):
    """No KL in the loss: it is in the reward.   [B, T]"""
    return torch.zeros_like(logp)


def fixed(beta):
    """The KL's coefficient as it is."""
    return beta


def sample(model, prompts, max_new, generator, slots, *, eval_temperature=1.0):
    """One completion a prompt at eval_temperature (0: greedy)."""
    return generate(model, prompts, max_new, temperature=eval_temperature, generator=generator,
                    slots=slots)


ROLLOUTS = dict(fresh=fresh)
REWARDS = dict(coherent=coherent)
EOS = dict(replace=eos_replace)
TRANSFORMS = dict(plain=plain)
REFERENCES = dict(own=own)
SHAPINGS = dict(ends=token_rewards)
CRITICS = dict(scalar=scalar)
ADVANTAGES = dict(gae=whitened_gae)
VALUES = dict(clipped=value_loss)
SURROGATES = dict(clip=ppo_clip)
REGULARISERS = dict(none=no_regulariser)
CONTROLLERS = dict(fixed=fixed)
DECODERS = dict(sample=sample)
AXES = dict(rollout=ROLLOUTS, reward=REWARDS, eos=EOS, transform=TRANSFORMS, reference=REFERENCES,
            shaping=SHAPINGS, critic=CRITICS, advantage=ADVANTAGES, value=VALUES,
            surrogate=SURROGATES, regulariser=REGULARISERS, controller=CONTROLLERS,
            decode=DECODERS, peft=PEFT, kernels=kernels.MODES)
MAX_RATIO, MAX_NORM = 10.0, 1.0  # beyond it a minibatch is skipped (TRL's); gradient norm

# --- what functions ask for by name ---------------------------------------------------------------

# frozen checkpoints: the option that names it, what it must be
MODELS = dict(base=("base", Transformer))
FACTS = dict(                    # of a rollout, before its score
    sft_logp=lambda ref, roll, c: logprobs(ref, roll.tokens, roll.mask, c),
    base_logp=lambda base, roll, c: logprobs(base, roll.tokens, roll.mask, c))
BATCH = {}                       # of the batch, once it is scored
MINIBATCH = {}                   # of a minibatch, before its gradient
MEMORIES = {}                    # classes: tell() before a step, note(…) after, state(), load()
TOGETHER = {}                    # surrogates that compare: how many rows in a row stay together
LAWS = {}                        # rollouts whose tokens have another law than own_law

# --- score and evaluate ---------------------------------------------------------------------------


def rolled(known, problems, roll, trained=None, valued=None):
    """What is known of a rollout, by name. trained, valued: the tokens that train policy and
    critic, if not all."""
    truth = quality(known["task"], problems, roll, known["tok"]).to(roll.mask.device)    # [B]
    return known | dict(problems=problems, roll=roll, mask=roll.mask, finished=roll.finished,
                        samples=len(roll.tokens) // len(problems), quality=truth,
                        trained=roll.mask if trained is None else trained,
                        valued=roll.mask if valued is None else valued)


@torch.no_grad()
def scored(known, f):
    """The run's reward of a rollout, without the EOS rule.   -> [B]"""
    ask(set(needs(f.reward)), FACTS, known)
    return finite(call(f.reward, known), known["c"])


@torch.no_grad()
def worth(known, f):
    """A rollout's reward; and under the EOS rule, transformed: what is trained on.  -> [B], [B]"""
    raw = scored(known, f)
    known["score"] = f.eos(raw, known["finished"])
    ask(set(needs(f.transform)), FACTS, known)
    return raw, call(f.transform, known)


def evaluate(policy, known, sets, f):
    """Held-out prompts, always the same, with the same draws: reward, quality, KL to SFT, length.

    reward is without the EOS rule. kl is k1 of the policy's weights, summed per response, however
    it is decoded. -> {split_key: mean}, [(prompt, text, reference)].
    """
    out, shown, c, task, tok = {}, [], known["c"], known["task"], known["tok"]
    for split, problems in sets.items():
        g, found = torch.Generator().manual_seed(c.seed + 1), []
        for some in pieces(problems, c, split):
            roll = call(f.decode, known | dict(
                model=policy, prompts=[tok.prompt(p, c.chat) for p in some], slots=c.slots,
                generator=g, score=partial(score_of, known, some, f)))
            logp, ref = (logprobs(m, roll.tokens, roll.mask, c)
                         for m in (policy, known["ref"]))                                # [B, T]
            here = rolled(known, some, roll)
            found.append({"reward": scored(here, f), **measured(task, here["quality"]),
                          "kl": (logp - ref).sum(1), "length": roll.mask.sum(1),
                          "truncated": ~roll.finished})                                  # [B] each
            if len(found) == 1:
                shown += examples(task, tok, some, roll, c)
        for key in found[0]:
            out[f"{split}_{key}"] = MeanOf(torch.cat([x[key] for x in found]))
    return out, shown


# --- train ----------------------------------------------------------------------------------------


def own_law(policy, tokens, mask, c):
    """The policy's log-probs of the tokens, and its entropy there.   [b, T], [b, T]"""
    return token_logprobs(policy, tokens, mask, temperature=c.temperature, entropy=True)


def mean_of(loss, mask, tokens, rows):
    """A part of a minibatch's mean: of a loss [b, T] over its tokens, of one [b] over its rows."""
    return (loss * mask).sum() / tokens if loss.dim() == 2 else loss.sum() / rows


def some_rows(mini, part):
    """A minibatch's tensors of some of its rows, cut to the longest of them."""
    aligned, width = mini["mask"].shape, int(mini["ends"][part].max())
    return {k: x[part][:, :width] if x.shape[:2] == aligned else x[part] for k, x in mini.items()}


def backward(policy, critic, batch, rows, known, f):
    """Gradients of one minibatch, over its micro-batches -> {name: what happened}.

    batch: tensors of the rollout's rows, by name. Losses are divided by the tokens of the whole
    minibatch, so --micro changes nothing.
    """
    c, mini = known["c"], {k: x[rows] for k, x in batch.items()}
    asked = known | mini | dict(policy=policy)
    ask({*needs(f.surrogate), *needs(f.regulariser)}, MINIBATCH, asked)
    known = known | {k: asked[k] for k in MINIBATCH if k in asked}
    mini |= {k: x for k, x in known.items() if k in MINIBATCH and x.dim()}
    law, beside = LAWS.get(c.rollout, own_law), TOGETHER.get(c.surrogate, 1)
    n, n_valued = (mini[k].sum().clamp(min=1) for k in ("trained", "valued"))
    metrics = dict(loss=0.0, ratio=0.0, off=0.0, clipped=0.0, entropy=0.0, worst=0.0)
    order = torch.arange(len(rows), device=rows.device).view(-1, beside)
    for part, weight in passes(order, max(1, c.micro // beside)):
        b = known | some_rows(mini, part.flatten()) | dict(policy=policy)
        mask = b["trained"]
        with autocast(c.device, c.dtype):
            logp, entropy = call(law, b)
        loss = sum(mean_of(call(fn, b | dict(logp=logp)), mask, n, len(rows))
                   for fn in (f.surrogate, f.regulariser))
        if c.entropy:
            loss = loss - c.entropy * mean_of(entropy, mask, n, len(rows))
        (loss * weight).backward()
        if "returns" in b:
            with autocast(c.device, c.dtype):
                values = token_values(critic, b["tokens"])                               # [b, T]
            value = call(f.value, b | dict(values=values))
            (mean_of(value, b["valued"], n_valued, len(rows)) * weight).backward()
        if not weight:
            continue
        ratio = (logp.detach() - b["old_logp"]).clamp(-20, 20).exp()                     # [b, T]
        off = (ratio - 1).abs() * mask
        metrics["loss"] += loss.item()
        metrics["worst"] = max(metrics["worst"], off.max().item())
        for key, x in dict(ratio=ratio, off=off, entropy=entropy.detach(),
                           clipped=off > f.surrogate.keywords.get("eps", 0.2)).items():
            metrics[key] += ((x * mask).sum() / n).item()
    return summed(metrics, largest=["worst"])


def credited(batch, critic, scale, factor, asked, f):
    """A scored rollout's batch: adds what its tokens are worth to policy and critic."""
    c, roll, mask = batch["c"], batch["roll"], batch["mask"]
    _, score = worth(batch, f)                                                           # [B]
    batch |= dict(score=score, unit=(score - scale["mean"]) / scale["std"], tokens=roll.tokens,
                  coefficient=factor / scale["std"], logp=roll.logp, old_logp=roll.logp,
                  ref_logp=logprobs(batch["anchor"], roll.tokens, mask, c),              # [B, T]
                  ends=roll.prompt_len + mask.sum(1).long())                             # [B]
    if "values" in asked:
        batch["values"] = batch["old_values"] = critic_values(critic, roll.tokens, mask, c)
    ask(asked, BATCH, batch)
    batch["rewards"] = call(f.shaping, batch)                                            # [B, T]
    batch["adv"], returns = call(f.advantage, batch)                                     # [B, T]
    return batch | (dict(returns=returns) if returns is not None else {})


def train(c, f):
    """One run: load, roll out, score, update, tell. -> the last evaluation, and SFT's (sft_…)."""
    start_ranks(c.device)                                # alone without torchrun
    asked = check(c, f)
    init = sft.find(c.init, c.config, seed=c.seed, device=c.device)  # made before the clock starts
    folders = folders_of(c, f, asked)
    kernels.use(c.kernels)
    with Run(c, f, "ppo", CURVES) as run:
        policy, critic, tok, models = open_models(c, f, folders, init, run)
        whole, whole_critic = (shard(m, c.dtype) for m in (policy, critic))      # over the ranks
        task, pool, sets, max_new = questions(c, tok, policy.config.max_position_embeddings)
        opt, critic_opt = optimiser(policy, lr=c.lr), optimiser(critic, lr=c.critic_lr)
        g, saved = torch.Generator().manual_seed(c.seed), run.state or {}
        known = models | dict(c=c, f=f, run=run, task=task, tok=tok, policy=policy, pool=pool,
                              max_new=max_new, generator=g, training=False, bias=0.0)
        introduce(known, (policy, critic), models, (opt, critic_opt), sets)
        memories = {k: call(MEMORIES[k], known) for k in sorted(asked & MEMORIES.keys())}
        if saved:
            opt.load_state_dict(saved.pop("opt"))
            critic_opt.load_state_dict(saved.pop("critic_opt"))
            g.set_state(saved["rng"])
            for name, memory in memories.items():
                memory.load(saved["memories"][name])
        known |= recalled(memories)
        factor, scale = saved.get("factor", 1.0), saved.get("scale") or calibrate(known, f)
        known["bias"] = scale["bias"]
        if not saved:
            scores, shown = evaluate(policy, known, sets, f)
            run.log(0, **scores, show=True)
        before = scores = saved.get("before") or scores
        train_policy, train_critic = (torch.compile(m) if c.compile else m
                                      for m in (policy, critic))

        for step in run.steps(c.steps):
            # 1. roll out --------------------------------------------------------------------------
            clock = time.perf_counter()
            known |= recalled(memories)
            found = call(f.rollout, known | dict(step=step))
            batch = rolled(known | dict(training=True), **found)
            mask, t_gen = batch["mask"], time.perf_counter() - clock                      # [B, T]
            # 2. score -----------------------------------------------------------------------------
            clock = time.perf_counter()
            batch = credited(batch, critic, scale, factor, asked, f)
            tensors = {k: x for k, x in batch.items() if is_of(x, mask)}
            t_score = time.perf_counter() - clock
            # 3. update ----------------------------------------------------------------------------
            clock, done, norm, skipped = time.perf_counter(), [], 0.0, 0
            set_lr(opt, c.lr * linear(step, c.steps))
            set_lr(critic_opt, c.critic_lr * linear(step, c.steps))
            for epoch in range(c.epochs):
                for rows in shuffled(mask, TOGETHER.get(c.surrogate, 1), g).split(c.batch):
                    done.append(backward(train_policy, train_critic, tensors, rows, known, f))
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
            row = numbers(batch, done) | dict(norm=norm, skipped=skipped)
            factor = call(f.controller, batch | dict(beta=factor, kl=row["kl"], n=len(mask)))
            for memory in memories.values():
                row |= call(memory.note, batch | dict(done=step + 1)) or {}
            run.log(step + 1, **row, beta_factor=factor, t_gen=t_gen, t_score=t_score,
                    t_update=time.perf_counter() - clock)
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                run.check(step + 1, policy, critic)
                known |= recalled(memories)
                scores, shown = evaluate(policy, known, sets, f)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                nets = whole(), whole_critic()                   # every rank takes part
                run.save(step + 1, partial(write, c, *nets, tok, init), opt=opt.state_dict(),
                         critic_opt=critic_opt.state_dict(), adapter=adapter_state(nets[0]),
                         critic=adapter_state(nets[1]), rng=g.get_state(), factor=factor,
                         before=before, scale=scale,
                         memories={name: memory.state() for name, memory in memories.items()})
        if c.stop and c.stop < c.steps:
            return scores
        if saved and run.start >= c.steps:                         # resumed after its last step
            scores, shown = evaluate(policy, known, sets, f)
        report(run, before, scores, shown)
        return run.finish(**scores, **{f"sft_{k}": v for k, v in before.items()},
                          agreement=scale["agreement"])


def main(argv=None):
    """python ppo.py …: see the docstring above, or --help."""
    return launch("ppo", Config, PRESETS, AXES, __doc__, train, argv, readers, ranks=True)


# === refused: what a run reads, and what does not go together, told before anything is made =======


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    asked = asked_for(f)
    critic = "values" in needs(f.advantage), "--advantage gae"
    return dict(base=("base" in asked, "--reward coherent or --decode contrast"),
                critic_lr=critic, critic=critic, value=critic,
                lr=(c.steps, "runs with --steps"),
                warmup=(False, "sft.py, grpo.py, dpo.py and specdec.py"),
                share_trunk=(c.peft in ADAPTERS, "--peft lora"), **adapter_readers(c),
                **tasks.file_readers(c))


def asked_for(f):
    """The names that a run's functions ask for, and those that what answers them asks for."""
    axes = AXES.keys() - {"kernels", "peft", "value", "critic"}       # the critic's ask for nothing
    return asked_by([getattr(f, axis) for axis in axes], [FACTS, BATCH, MINIBATCH, MEMORIES])


def paths_of(c, f, asked):
    """{name: (option, its value, what it must be)} of the frozen checkpoints that a run opens."""
    values = vars(c) | {k: x for axis in AXES for k, x in getattr(f, axis).keywords.items()}
    return {name: (option, values[option], kind) for name, (option, kind) in MODELS.items()
            if name in asked}


def folders_of(c, f, asked):
    """{name: folder} of those checkpoints; what base:… stands for is made."""
    return {name: path if kind is ScalarModel else sft.find(path, c.config, device=c.device,
                                                            option=f"--{option}")
            for name, (option, path, kind) in paths_of(c, f, asked).items()}


def compares(c):
    """Words against groups in which nothing can be compared."""
    return f"--samples {c.samples}: --advantage {c.advantage} takes the best of at least two" * (
        c.samples < 2)


CHECKS = {}                      # of rows of the axes: what is wrong, in words, or ""
ALONE = {}                       # what is asked for and torchrun cannot spread: why


def check(c, f):
    """The names that a run asks for; UserError for all that can be known before anything is made:
    files, folders, what does not combine."""
    tasks.check_data(c.data, is_text=False, needs="answers", **tasks.reading(c))
    asked, beside = asked_for(f), TOGETHER.get(c.surrogate, 1)
    for row in dict.fromkeys(rows_used(c, AXES).values()):
        if row in CHECKS and (wrong := call(CHECKS[row], dict(c=c, f=f))):
            raise UserError(wrong)
    if c.samples % beside or c.batch % beside:
        raise UserError(f"--samples {c.samples} and --batch {c.batch}: --surrogate {c.surrogate} "
                        f"compares {beside} responses of a prompt: give multiples of {beside}")
    most = sft.find(c.init, c.config, make=False)
    if c.max_new >= most:
        raise UserError(f"--max_new {c.max_new} does not fit the {most} tokens of {c.init}")
    refuse_alone(c, asked, ALONE)
    check_adapters(c, c.init)
    for option, value, kind in paths_of(c, f, asked).values():
        if option == "base" and tasks.is_own(c):
            raise UserError(f"--init {c.init} with --data {c.data}: give --base FOLDER too, the "
                            f"model that it was tuned from; {c.base} is that of the examples")
        if not value:
            raise UserError(f"--{option} FOLDER is missing: this run reads a checkpoint there")
        if kind is ScalarModel:
            peek(value, scalar=True, option=f"--{option}")
        else:
            sft.find(value, c.config, make=False, option=f"--{option}")
    return asked


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
        return with_peft(f.critic(ref, True), c, f.peft, adapter, 1)
    critic = load(last / "critic", c.device)[0] if last else f.critic(ref, False)
    return recomputing(critic, c.recompute)


def write(c, policy, critic, tok, init, folder):
    """A checkpoint's folders: the policy's, and in it the critic's, unless it is kept as
    adapters."""
    save_trained(policy, tok, folder, c, init)
    if c.merge or not trunk_is_shared(c):
        save(plain_model(critic, "cpu"), tok, folder / "critic")


# === opened: ours, the models of a run, its questions, and what it holds, said before step 0 ======


def open_models(c, f, folders, init, run):
    """Policy, critic, tokenizer, and {name: frozen model} that a run's functions ask for.

    The critic starts from the SFT model, not from a reward model, whose units calibrate() leaves
    (ours).
    """
    adapter, other = ((run.state or {}).get(name, {}) for name in ("adapter", "critic"))
    policy, tok = open_trained(c, f.peft, init, run.last, adapter)
    opened = {init: reference(policy, c, init)}                    # each folder is opened once
    models = dict(ref=opened[init])
    for name, folder in folders.items():
        if folder not in opened:
            opened[folder], theirs = load_frozen(folder, c)
            if theirs.tokens != tok.tokens:
                raise UserError(f"--{MODELS[name][0]} {folder} and --init {init} have different "
                                "tokenizers: both must score the same ids")
        models[name] = opened[folder]
    models["anchor"] = call(f.reference, models | dict(c=c))
    for model in {id(m): m for m in models.values()}.values():
        shard(model, c.dtype)                                      # over torchrun's ranks
    return policy, open_critic(c, f, models["ref"], run.last, other), tok, models


def questions(c, tok, context):
    """The task, its prompts to train on, {split: held-out ones}, and how many tokens an answer has
    room for."""
    task = tasks.of_run(c)
    pool = task.problems("train", 4096, 1000 + c.seed)
    size = c.eval_prompts or (512 if c.data in ("toyif", "ring") else 256)
    sets = {s: task.problems(s, size, c.seed) for s in tasks.held_out(c.data)}
    max_new, pool, sets = tasks.fitting(c, tok, pool, sets, task.max_new, context)
    return task, pool, sets, max_new


def introduce(known, trained, models, opts, sets):
    """Say what is trained, and what that holds: a micro-batch of the longest completions, and a
    rollout."""
    run, c, tok, pool, max_new = (known[k] for k in ("run", "c", "tok", "pool", "max_new"))
    size = sum(p.numel() for p in trained[0].parameters()) / 1e6
    run.say(f"{run.folder}: {tasks.out_of(pool, known['task'])}\n"
            f"  policy and critic of {size:.2f} M parameters, {c.steps} steps of {c.rollouts} x "
            f"{c.samples} completions, {c.device} {c.dtype}")
    prompts = [tok.prompt(p, c.chat) for some in (pool, *sets.values()) for p in some]
    width, most = max(map(len, prompts)) + max_new, rows_at_once(c)
    work = Work(c.micro, width, c.batch, sampled=min(most, c.slots or most), slots=width,
                knob="--micro, --rollouts", recompute=c.recompute)
    foresee(run, c, work, trained, [*{id(m): m for m in models.values()}.values()],
            sum(map(state_bytes, opts)))


# === told: ours, a run's rollouts in pieces, its numbers and its examples =========================


def rows_at_once(c):
    """How many completions are sampled at once: a step's, or --micro."""
    return max(c.micro, c.rollouts * c.samples)


def pieces(problems, c, name, samples=1):
    """Problems, as many at a time as are sampled at once; with a bar where there are many."""
    size = max(1, rows_at_once(c) // samples)
    parts = [problems[i:i + size] for i in range(0, len(problems), size)]
    return tqdm(parts, desc=name, delay=5, disable=None, leave=False)


def quality(task, problems, roll, tok):
    """The task's own reward of every completion's text.   [B]"""
    per = len(roll.tokens) // len(problems)
    texts = [tok.decode(ids) for ids in roll.completions()]
    return torch.tensor([task.reward(problems[i // per], x, done)
                         for i, (x, done) in enumerate(zip(texts, roll.finished.tolist()))])


def score_of(known, problems, f, roll):
    """scored(), of a rollout of these problems.   -> [B]"""
    return scored(rolled(known, problems, roll), f)


def finite(score, c):
    """The scores as they are; UserError for one that is no number.   [B]"""
    if torch.isfinite(score).all():
        return score
    n = int((~torch.isfinite(score)).sum())
    raise UserError(f"--reward {c.reward}: {n} of {len(score)} scores are NaN or infinite: look at "
                    "that model (python reward.py --eval); the last checkpoint is good")


def is_of(x, mask):
    """Whether it is a tensor of a rollout's rows."""
    return torch.is_tensor(x) and x.dim() > 0 and len(x) == len(mask)


def shuffled(mask, beside, generator):
    """A rollout's rows in a random order, of which every `beside` neighbours stay together.  [B]"""
    order = torch.randperm(len(mask) // beside, generator=generator)
    return (order[:, None] * beside + torch.arange(beside)).flatten().to(mask.device)


def recalled(memories):
    """What each memory says now, by name."""
    return {name: memory.tell() for name, memory in memories.items()}


def numbers(batch, done):
    """What an iteration's log says of its rollout and its minibatches."""
    roll, mask, score, per = (batch[k] for k in ("roll", "mask", "score", "samples"))
    kl = (k1(roll.logp, batch["ref_logp"]) * mask).sum(1).mean().item()      # nats per response
    row = dict(reward=score.mean(), kl=kl, entropy=done[0]["entropy"],
               k3=(k3(roll.logp, batch["ref_logp"]) * mask).sum(1).mean(),
               truncated=1 - roll.finished.float().mean(), length=mask.sum(1).mean(),
               quality=batch["quality"].mean(),
               work=roll.row_steps / (len(mask) * max(1, int(mask.sum(1).max()) - 1)))
    for key in ("loss", "clipped"):
        row[key] = sum(metrics[key] for metrics in done) / len(done)
    if "returns" in batch:
        row["ev"] = explained_variance(batch["values"], batch["returns"], batch["valued"])
    if per > 1:
        row["flat"] = (score.view(-1, per).std(1) < 1e-6).float().mean()
    return row


def examples(task, tok, problems, roll, c):
    """[(prompt, text, reference)] of the first two rows."""
    texts = [tok.decode(ids) for ids in roll.completions()[:2]]
    return [(tok.shown(p, c.chat), text, task.demo(p)) for p, text in zip(problems, texts)]


# === toyif, ring: ours, synthetic worlds whose gold reward is known (data/prefs.py) ===============

PRESETS["toyif"] = dict(data="toyif", init="base:toyif", base="base:toyif_base", rollouts=128,
                        samples=1, steps=60, eval_every=20, save_every=1000, keep=1)
PRESETS["ring"] = dict(data="ring", init="base:ring", base="base:ring", rollouts=96, samples=1,
                       steps=100, eval_every=20)


# === calibrate: 2009.01325, the reward in units of how the SFT model's own samples differ =========


def calibrate(known, f, samples=8):
    """What the run's reward says of the SFT model's own samples, before any training -> {name: x}.

    mean, std of the score: token rewards are divided by std, and the score is centred first.
    Neither changes what is optimised (the KL term is scaled along); both matter to the critic,
    which starts at 0 and moves at most eps_v a rollout: one that lags behind credits late tokens
    more than early ones, and the policy learns to stop early. bias: the mean raw score of a reward
    that has no zero of its own. agreement: rank_correlation with the quality. cut: the share of
    samples that did not end.
    """
    c, tok, found = known["c"], known["tok"], []
    for some in pieces(known["pool"][:c.calibrate], c, "calibrate", samples):
        with autocast(c.device, c.dtype):
            roll = generate(known["policy"], [tok.prompt(p, c.chat) for p in some],
                            known["max_new"], samples=samples, temperature=c.temperature,
                            generator=known["generator"], slots=c.slots)
        found.append(rolled(known, some, roll))
    bias = 0.0
    if "judged" in needs(f.reward):
        with torch.no_grad():
            for x in found:
                ask({"judged"}, FACTS, x)
        bias = torch.cat([x["judged"] for x in found]).mean().item()
        for x in found:
            x["judged"] = x["judged"] - bias
    raw, score = map(torch.cat, zip(*[worth(x, f) for x in found]))                      # [B], [B]
    truth = torch.cat([x["quality"] for x in found])                                     # [B]
    done = torch.cat([x["finished"] for x in found])                                     # [B]
    out = dict(mean=score.mean().item(), std=score.std().item() if score.std() > 1e-3 else 1.0,
               bias=bias, cut=1 - done.float().mean().item(),
               agreement=rank_correlation(raw.cpu().view(-1, samples),
                                          truth.cpu().view(-1, samples)))
    known["run"].say(f"  reward of SFT samples: mean {out['mean']:.2f}, std {out['std']:.2f}; "
                     f"Spearman with {known['task'].metric} within a prompt "
                     f"{out['agreement']:.2f} (0: uninformative)")
    if out["cut"] == 1:
        known["run"].say(f"  WARNING: every SFT sample is cut off at {known['max_new']} tokens: "
                         "raise --max_new or use --eos ignore")
    return out


# === ppo: 1707.06347, with the details of 2403.17031, on the task's own reward ====================


def gold(quality):
    """The task's own measure of the text.   [B] -> [B]"""
    return quality


REWARDS["gold"] = gold
PRESETS["ppo"] = dict(reward="gold", beta=0.05, no_eos=-1.0)     # 2403.17031; lr and epochs ours


# === a reward model: 2009.01325, its score centred so that SFT samples have mean 0 ================


def learned(judged, *, clamp=0.0):
    """A reward model's score, less its mean over SFT samples; clamp > 0 bounds it.   [B] -> [B]"""
    return judged.clamp(-clamp, clamp) if clamp else judged


def judged(judge, roll, c, ref, max_new, bias):
    """What the reward model says of a rollout's responses.   -> [B]"""
    for file, says in BESIDE.items():
        if (path := checkpoint(c.reward) / file).exists():
            return says(judge, load_file(path, str(c.device)), roll, c, ref, max_new) - bias
    length = roll.prompt_len + roll.mask.sum(1).long()                                   # [B]
    return sequence_scores(judge, roll.tokens, length, c) - bias


def last_hidden(model, tokens, end):
    """The body's hidden state at the last token, in float32.   [B, T], [B] -> [B, D]"""
    hidden = model(tokens, states=True)                                               # [B, T, D]
    return hidden[torch.arange(len(tokens), device=tokens.device), end - 1].float()


def gated(judge, own, roll, c, ref, max_new):
    """ArmoRM (2406.12845): ratings of the response, weighed by a gate that reads the prompt. [B]"""
    x, h = (last_hidden(judge, roll.tokens, end) for end in (
        roll.prompt_len, roll.prompt_len + roll.mask.sum(1).long()))                     # [B, D]
    layers = sorted(k for k in own if k.endswith("weight"))
    for k in layers:
        x = x @ own[k].T + own[k.replace("weight", "bias")]
        x = x if k == layers[-1] else x.relu()
    return (torch.softmax(x / 10, -1) * own["gate.scale"] * (h @ own["ratings"].T)).sum(1)


REWARDS["PATH"], FACTS["judged"], MODELS["judge"] = learned, judged, ("reward", ScalarModel)


# === measured: ours, what a task's quality also tells =============================================

MEASURES = {}                    # of tasks: {a metric: a function of the quality [B]}


def measured(task, truth):
    """A task's quality under its name, and what else is measured by it.   {name: [B]}"""
    more = MEASURES.get(task.name, {})
    return {task.metric: truth} | {name: fn(truth) for name, fn in more.items()}


# === rivals: ours, what the responses of a prompt are compared with ===============================


@dataclass
class Group:
    """The K responses to a prompt."""
    ids: list        # of the prompt
    ys: list         # the responses' ids
    problem: dict
    texts: list      # the responses'
    done: list       # whether each has ended


def rivals(problems, roll, samples, tok, ref, max_new):
    """A rollout's groups. One of a single response gets the SFT model's greedy one for a rival."""
    prompts = [row[:n] for row, n in zip(roll.tokens.tolist(), roll.prompt_len.tolist())][::samples]
    ys, done = roll.completions(), roll.finished.tolist()
    if samples == 1:
        theirs = generate(ref, prompts, max_new, temperature=0.0)
        ys = [y for pair in zip(ys, theirs.completions()) for y in pair]
        done = [x for pair in zip(done, theirs.finished.tolist()) for x in pair]
    K = len(ys) // len(prompts)
    out = []
    for k, (problem, ids) in enumerate(zip(problems, prompts)):
        own = slice(k * K, (k + 1) * K)
        texts = [tok.decode(y) for y in ys[own]]
        out.append(Group(ids, ys[own], problem, texts, done[own]))
    return out


def ordered_pairs(K):
    """(0, 1), (0, 2), …, (1, 0), …: all pairs of K, in both orders."""
    return [(i, j) for i in range(K) for j in range(K) if i != j]


def in_groups(c):
    """Words against groups of one, in which a response has no other to be compared with."""
    return "" if c.samples > 1 else (f"--samples {c.samples}: --reward {c.reward} compares the "
                                     "responses of a prompt with each other: give at least 2")


FACTS["groups"] = rivals


# === to_go, group: 2402.14740, 2402.03300, without a critic: rewards to go, and a group as baseline


def to_go(rewards, mask):
    """A_t = Σ_{s >= t} r_s, GAE without a critic at γ = λ = 1: a score at the end, already an
    advantage, reaches every token whole.   [B, T] -> [B, T], None"""
    return (rewards * mask).flip(1).cumsum(1).flip(1) * mask, None


def group_norm(score, samples, *, group_eps=1e-6):
    """GRPO (2402.03300):  (R - mean) / (std + eps) of a prompt's responses, unbiased std.   [B]"""
    if samples == 1:
        return score
    R = score.view(-1, samples)                                                          # [P, G]
    centred = R - R[:, :1] - (R - R[:, :1]).mean(1, keepdim=True)        # equals: exactly 0
    return (centred / (R.std(1, keepdim=True) + group_eps)).flatten()


ADVANTAGES["to_go"], TRANSFORMS["group"] = to_go, group_norm


# === pair: 2510.20369, a model of pairs and its uncertainty; alone, against the SFT model =========


def factored(own):
    """What a model of pairs has beside its body, with the Cholesky factor L of what it has seen."""
    if not len(own["W"]):
        return own
    ridge, *_ = own["settings"].tolist()
    P = (own["P"] + own["P"].T).double() / 2
    return own | dict(L=torch.linalg.cholesky(P + ridge * torch.eye(len(P), device=P.device)))


def pair_logits(h, own):
    """The logit that a pair's first response is better, over its uncertainty u >= 1 (SNGP), and u.

    h [B, D], the body's state after the pair -> [B], [B]"""
    if "pool.weight" in own:                     # no larger than its spectral bound, 1
        W, u = own["pool.weight"], own["u"]
        norm = (W.T @ u).norm()                  # u is the left singular vector, of length 1
        h = h @ (W / norm.clamp(min=1.0)).T + own["pool.bias"]
    if not len(own["W"]):                        # a plain head knows no uncertainty
        return h @ own["w"], torch.ones_like(h[:, 0])
    phi = (2 / len(own["W"])) ** 0.5 * torch.cos(h @ own["W"].T + own["b"])              # [B, R]
    ridge, lam, _ = own["settings"].tolist()
    solved = torch.cholesky_solve(phi.double().T, own["L"]).T                            # [B, R]
    u = (1 + lam * ridge * (phi.double() * solved).sum(1)).sqrt().float()                # [B]
    return phi @ own["w"] / u, u


def pair_scores(F12, U):
    """Both orders of all pairs -> antisymmetric scores and symmetric uncertainty.   [.., K, K] each

    s_ij = (f(i,j) - f(j,i)) / 2,  u_ij = (u(i,j) + u(j,i)) / 2, diagonals 0."""
    off = 1 - torch.eye(F12.size(-1), dtype=F12.dtype, device=F12.device)
    return (F12 - F12.mT) / 2 * off, (U + U.mT) / 2 * off


def believed(model, own, groups, c):
    """What a model of pairs says of all pairs of each group, in both orders.

    -> S, U [P, K, K]: s_ij > 0 if i is better than j, and how uncertain that is"""
    (*marks, eos), K = own["marks"].tolist(), len(groups[0].ys)
    orders, rows, found = ordered_pairs(K), [], []
    for group in groups:
        room = (model.config.max_position_embeddings - len(group.ids) - 3) // 2
        for i, j in orders:
            a, b = group.ys[i][:room], group.ys[j][:room]
            rows.append([*group.ids, marks[0], *a, marks[1], *b, eos])
    for k in range(0, len(rows), c.micro):
        tokens, mask = collate([((), row) for row in rows[k:k + c.micro]], 0, c.device)  # [b, T]
        with autocast(c.device, c.dtype):
            h = last_hidden(model, tokens, mask.sum(1).long())                           # [b, D]
        found.append(torch.stack(pair_logits(h, own)))                                   # [2, b]
    i, j = zip(*orders)
    F12, U = torch.zeros(2, len(groups), K, K, device=c.device)
    F12[:, i, j], U[:, i, j] = torch.cat(found, 1).view(2, len(groups), -1)
    return pair_scores(F12, U)


def against_sft(judge, own, roll, c, ref, max_new):
    """A model of pairs as a reward: s(y, y'), y' the SFT model's greedy response to the prompt. [B]

    ours: the paper's reward of y is its mean s against the other samples of a group (chapter
    route), an advantage that sums to 0. A fixed y' differs by a constant of the prompt where s is a
    difference of rewards; it needs no group, and its 0 is the SFT model."""
    prompts = [row[:n] for row, n in zip(roll.tokens.tolist(), roll.prompt_len.tolist())]
    theirs = generate(ref, prompts, max_new, temperature=0.0).completions()
    groups = [Group(x, ys, {}, [], []) for x, *ys in zip(prompts, roll.completions(), theirs)]
    return believed(judge, factored(own), groups, c)[0][:, 0, 1]


BESIDE = {"armo.safetensors": gated, "pair.safetensors": against_sft}    # what reward.py leaves


# === oracle: ours, the strong judge of a world whose gold reward is known =========================


class Oracle:
    """The judge of a toy world, dear and right nine times in ten: it knows gold, and counts."""

    def __init__(self, task, f):
        self.judge, self.seen = prefs.StrongJudge(task, f.reward.keywords["judge_error"]), {}

    def tell(self):
        return self

    def verdicts(self, groups, where, generator):
        """1, 2 or 0 (a tie) for each (group, i, j)."""
        out = []
        for p, i, j in where:
            g = groups[p]
            out.append(self.judge.judge(g.problem["prompt"], g.texts[i], g.texts[j], g.done[i],
                                        g.done[j]))
        return out

    def note(self):
        return self.seen | dict(judge_calls=self.judge.calls)

    def state(self):
        return self.judge.calls

    def load(self, state):
        self.judge.calls = state


MEMORIES["oracle"] = Oracle


# === route: 2510.20369, online RLHF whose uncertain pairs a dear judge decides ====================


def by_uncertainty(score, u, generator):
    """The most uncertain pairs first.   -> priority [N]"""
    return u


def by_margin(score, u, generator):
    """Those of the smallest |s| first: a control that needs no Gaussian process."""
    return -score.abs()


def at_random(score, u, generator):
    """Any: the control of as many calls."""
    return torch.rand(len(u), generator=generator).to(u.device)


ROUTERS = dict(uncertainty=by_uncertainty, margin=by_margin, random=at_random)


def route(S, U, priority, referee, *, budget=1.0, threshold=0.0, logit=2.0):
    """Ask the judge about pairs i < j of all groups: as many as have u_ij > threshold, at most the
    share `budget` of all, by priority(s [N], u [N]).

    referee([(p, i, j)]) -> a verdict each: 1, 2, 0 (a tie) or None (failed: the score stays). S, U
    [P, K, K] -> S with ±logit or 0 in the routed places, antisymmetric; where; the verdicts
    """
    K, S = S.size(-1), S.clone()
    i, j = torch.triu_indices(K, K, 1).tolist()
    s, u = S[:, i, j].flatten(), U[:, i, j].flatten()                                    # [N]
    n = min(round(budget * len(s)), int((u > threshold).sum()))
    first = priority(s, u).argsort(descending=True, stable=True)[:n].tolist()
    where = [(k // len(i), i[k % len(i)], j[k % len(i)]) for k in first]
    verdicts = referee(where) if where else []
    for (p, a, b), verdict in zip(where, verdicts):
        if verdict is not None:
            S[p, a, b] = {1: logit, 2: -logit, 0: 0.0}[verdict]
            S[p, b, a] = -S[p, a, b]
    return S, where, verdicts


def pairwise_rloo(S, scale=1.0):
    """A_i = scale/(K-1) Σ_j s_ij: RLOO when s_ij = r_i - r_j (2510.20369).

    [.., K, K] -> [.., K]"""
    return scale * S.sum(-1) / max(1, S.size(-1) - 1)


def of_routing(S, mixed, where, answers):
    """What is worth knowing of a step's routing: the share of pairs asked, how often judge and
    model agree, and how far scores spread where the judge spoke and where the model did (a
    confident model's are larger)."""
    K, asked = S.size(-1), torch.zeros_like(S, dtype=torch.bool)
    for p, a, b in where:
        asked[p, a, b] = asked[p, b, a] = True
    off = ~torch.eye(K, dtype=torch.bool, device=S.device)
    out = dict(asked=len(where) / (len(S) * K * (K - 1) / 2))
    for name, some in dict(routed=asked, unrouted=off & ~asked).items():
        out |= {f"std_{name}": mixed[some].std(correction=0).item()} if some.any() else {}
    agree = [(S[w] > 0).item() == (v == 1) for w, v in zip(where, answers) if v]
    return out | (dict(agreement=sum(agree) / len(agree)) if agree else {})


@cache
def seen_by(folder, device):
    """What the model of pairs of a folder has seen: read once."""
    return factored(load_file(folder / "pair.safetensors", device))


def beliefs(pair_model, groups, c, f):
    """What the model of pairs says of all pairs.   -> S, U [P, K, K]"""
    own = seen_by(checkpoint(f.reward.keywords["pair_model"]).resolve(), str(c.device))
    S, U = believed(pair_model, own, groups, c)
    return finite(S, c), U


def mixed(beliefs, referee, groups, generator, router, **limits):
    """The pair model's scores, those that are routed replaced by the judge's.   -> [P, K, K]"""
    (S, U), clock, referee.seen = beliefs, time.perf_counter(), {}
    out, where, verdicts = route(S, U, partial(ROUTERS[router], generator=generator),
                                 lambda where: referee.verdicts(groups, where, generator), **limits)
    referee.seen |= of_routing(S, out, where, verdicts)
    referee.seen |= dict(t_pair=(time.perf_counter() - clock) / len(where)) if where else {}
    return out


def routed(beliefs, oracle, groups, generator, training, samples, *, pair_model="",
           router: Literal[*ROUTERS] = "uncertainty", budget: Share = 0.25,
           threshold: NonNegative = 0.0, logit: Positive = 2.0, judge_error: Share = 0.1):
    """RLOO's advantage of a response in its group, by pairwise scores: the pair model's; where it
    was asked the judge's, ± logit. In evaluation the model alone.   [B]

    pair_model: the folder pm that reward.py --config router leaves; budget: the share of a step's
    pairs; threshold: below which u none is asked; judge_error: the share of wrong verdicts."""
    if not training:
        return spoken(beliefs[0], samples)
    limits = dict(budget=budget, threshold=threshold, logit=logit)
    return spoken(mixed(beliefs, oracle, groups, generator, router, **limits), samples)


def spoken(S, samples):
    """Pairwise scores as a number a response: its advantage, or its score against the SFT model's
    greedy one in a group of one.   [P, K, K] -> [B]"""
    return S[:, 0, 1] if samples == 1 else pairwise_rloo(S).flatten()


def check_routed(c, f):
    """What is wrong with a run that routes, or ""."""
    folder, reward = f.reward.keywords["pair_model"], c.reward
    if folder and not (checkpoint(folder) / "pair.safetensors").exists():
        return (f"--pair_model {folder} has no pair.safetensors: give the folder pm that "
                "python reward.py --config router leaves")
    if reward == "routed" and c.data not in prefs.WORLDS:
        return (f"--reward routed asks a judge that knows gold: {' or '.join(prefs.WORLDS)}, not "
                f"of --data {c.data}: give --reward routed_model --judge FOLDER")
    return in_groups(c)


FACTS["beliefs"] = beliefs
REWARDS["routed"], CHECKS["routed"] = routed, check_routed
MODELS["pair_model"] = "pair_model", ScalarModel
# 2510.20369, RLOO, β .01, judge ±2: the released code's; budget, samples, epochs, lr: ours. A
# response that does not end is one that lost to all others.
PRESETS["route"] = dict(reward="routed", advantage="to_go", eos="replace", no_eos=-2.0, beta=0.01,
                        samples=4, rollouts=32, epochs=1)


# === judge: 2505.16265, a language model that reads two responses, reasons and gives a verdict ====

QUESTION = """Which response to the prompt is better, A or B? Reason first. Then answer with one
number from -3 (A is much better) to 3 (B is much better), not 0, as <answer>-1</answer>.

Prompt:
{}

Response A:
{}

Response B:
{}
"""


def in_words(problem, a, b):
    """What a judge of texts reads; of a conversation not the words that wait for an answer."""
    return QUESTION.format(problem["prompt"].removesuffix("\nassistant: "), a, b)


def parse_verdict(text):
    """Think-RM's score (2505.16265): the last of ±1..±3 in the last <answer> block, negative if A
    is better; None if there is no such block or number."""
    blocks = re.findall(r"<answer>(.*?)</answer>", text, re.S)
    hits = re.findall(r"(?<!\d)(?<!\d\.)-?[123](?!\d|\.\d)", blocks[-1]) if blocks else []
    return int(hits[-1]) if hits else None


def bit_by_bit(problem, a, b):
    """What ParityJudge's judges read; a response that is too long is cut, one that is too short
    ends in what is no bit."""
    x = problem["prompt"][:-1]
    a, b = (y[:len(x)].ljust(len(x), tasks.NEUTRAL) for y in (a, b))
    return tasks.judging(x, a, b)["prompt"]


def symbols(problem, a, b):
    """What ToyIF's judges read, without a rubric."""
    return prefs.question(dict(prompt=problem["prompt"], chosen=a, rejected=b), "")


def winner(text):
    """The winner that ToyIF's judges name, as a score."""
    return dict(A=-1, B=1).get(prefs.parse_winner(text))


# how a judge of a task is asked, how it is read, how much it writes at most; else as of texts
IN_WORDS = in_words, parse_verdict, 2048                       # 2505.16265
ASKED = dict(parity=(bit_by_bit, tasks.ParityJudge.parse, 25), toyif=(symbols, winner, 24))


# === panel: ours, a judge's checkpoint at work: its texts, its verdicts, its calls ================


class Panel:
    """A judge that writes, and how often it was asked."""

    def __init__(self, writer, task, tok, c, f):
        self.writer, self.tok, self.c, self.options = writer, tok, c, f.reward.keywords
        self.ask, self.parse, most = ASKED.get(task.name, IN_WORDS)
        self.most = self.options["judge_tokens"] or most
        self.calls, self.seen = 0, {}

    def tell(self):
        return self

    def scores(self, groups, where, generator, training=True):
        """Of each (group, i, j) the score, negative if i is better, None for no verdict; and the
        judgement's length in characters. In training sampled, and counted; else greedy."""
        room, out = self.writer.config.max_position_embeddings - self.most, {}
        prompts = [self.tok.prompt(self.ask(groups[p].problem, groups[p].texts[i],
                                            groups[p].texts[j]), self.c.chat) for p, i, j in where]
        fits = [k for k, prompt in enumerate(prompts) if len(prompt) <= room]
        if not fits:
            raise UserError(f"--judge: no pair of {min(map(len, prompts))} tokens and more leaves "
                            f"room for {self.most} of judgement in its context: --judge_tokens N")
        for n in range(0, len(fits), 4 * self.c.micro):
            some = fits[n:n + 4 * self.c.micro]
            heat = self.options["judge_temperature"] if training else 0.0
            with autocast(self.c.device, self.c.dtype):
                roll = generate(self.writer, [prompts[k] for k in some], self.most,
                                temperature=heat, generator=generator, slots=self.c.slots)
            for k, y, done in zip(some, roll.completions(), roll.finished.tolist()):
                text = self.tok.decode(y)
                out[k] = (self.parse(text) if done else None), len(text)
        found = [out.get(k, (None, 0)) for k in range(len(where))]
        self.calls += len(where) * training
        self.seen = dict(no_verdict=sum(s is None for s, _ in found) / len(where),
                         judge_length=sum(n for _, n in found) / len(where))
        return found

    def verdicts(self, groups, where, generator):
        """1 or 2, the better of each (group, i, j); None for no verdict."""
        found = self.scores(groups, where, generator)
        return [s and (1 if s < 0 else 2) for s, _ in found]

    def note(self):
        return self.seen | dict(judge_calls=self.calls)

    def state(self):
        return self.calls

    def load(self, state):
        self.calls = state


def routed_model(beliefs, panel, groups, generator, training, samples, *, pair_model="", judge="",
                 router: Literal[*ROUTERS] = "uncertainty", budget: Share = 0.25,
                 threshold: NonNegative = 0.0, logit: Positive = 2.0,
                 judge_temperature: NonNegative = 0.6, judge_tokens=0):
    """routed(), whose judge is a checkpoint, a folder --judge, that writes.   [B]"""
    if not training:
        return spoken(beliefs[0], samples)
    limits = dict(budget=budget, threshold=threshold, logit=logit)
    return spoken(mixed(beliefs, panel, groups, generator, router, **limits), samples)


MODELS["writer"], MEMORIES["panel"] = ("judge", Transformer), Panel
REWARDS["routed_model"], CHECKS["routed_model"] = routed_model, check_routed


# === thinkrm, parity: 2505.16265, RLHF from a reasoning judge's verdicts on pairs, never on points


def judge_matrix(says, G, length=None):
    """Verdicts s_ij (negative: i is better) -> d [G, G] with d_ij = -s_ij, d_ji = s_ij.

    Of a pair judged in both orders the mean counts. None counts as 0; length {pair: how long the
    judgement is}: binary verdicts weigh 1/length.
    """
    D, n = torch.zeros(2, G, G)
    for (i, j), score in says.items():
        score = score or 0
        d = -score if not length else ((score < 0) - (score > 0)) / length[i, j]
        D[i, j], D[j, i] = D[i, j] + d, D[j, i] - d
        n[i, j], n[j, i] = n[i, j] + 1, n[j, i] + 1
    return D / n.clamp(min=1)


def pairwise_grpo(D, eps=1e-6):
    """Think-RM's pairwise advantage (2505.16265): GRPO when d_ij = r_i - r_j.

    A_i = (1/G) Σ_j d_ij / sqrt(Σ d²/(2G(G-1)) + eps), eps as in the released code.
    [.., G, G] -> [.., G]"""
    G = D.size(-1)
    return D.mean(-1) / ((D ** 2).sum((-1, -2))[..., None] / (2 * G * (G - 1)) + eps).sqrt()


def duels(panel, groups, generator, training, *, both_orders, weight):
    """A judge's verdicts on all pairs of each group, i < j, or both orders, as d_ij > 0 if i is
    better.   -> [P, G, G]"""
    G = len(groups[0].ys)
    pairs = [(i, j) for i, j in ordered_pairs(G) if both_orders or i < j]
    where = [(p, i, j) for p in range(len(groups)) for i, j in pairs]
    found = panel.scores(groups, where, generator, training)
    mean = max(1, sum(n for _, n in found)) / len(found)
    out = []
    for k in range(0, len(where), len(pairs)):
        mine = dict(zip(pairs, found[k:k + len(pairs)]))
        length = {pair: max(1, n) / mean for pair, (_, n) in mine.items()}
        says = {pair: score for pair, (score, _) in mine.items()}
        out.append(judge_matrix(says, G, length if weight == "length" else None))
    return torch.stack(out)


def by_verdicts(panel, groups, generator, training, samples, c, *, judge="", both_orders=False,
                points=False, weight: Literal["one", "length"] = "one",
                judge_temperature: NonNegative = 0.6, judge_tokens=0):
    """The advantage of a response by a reasoning judge's verdicts on its group's pairs.   [B]

    judge: a language model's folder, as reward.py --config thinkrm leaves it; both_orders: each
    pair is judged twice, A and B exchanged; weight length: the sign over the judgement's length
    (ours: over the step's mean, so that eps stays small); points: a response's mean verdict, for
    --transform group to compare. In evaluation a greedy verdict."""
    D = duels(panel, groups, generator, training, both_orders=both_orders, weight=weight)
    D = D.to(c.device)                                                                # [P, G, G]
    if samples == 1:
        return D[:, 0, 1]
    return (D.sum(-1) / (samples - 1) if points else pairwise_grpo(D)).flatten()


def dual_clip(logp, old_logp, adv, *, eps: Positive = 0.2, dual: Positive = 3.0):
    """PPO's clipped loss, and where A < 0 at most -A dual, however large the ratio.   [b, T]"""
    loss = ppo_clip(logp, old_logp, adv, eps=eps)
    return torch.where(adv < 0, torch.minimum(loss, -adv * dual), loss)


def exact(truth):
    """1 where all bits are right.   [B]"""
    return (truth == 1).float()


REWARDS["verdicts"], SURROGATES["dual"] = by_verdicts, dual_clip
CHECKS["verdicts"], MEASURES["parity"] = in_groups, dict(exact=exact)
PRESETS["parity"] = dict(data="parity", init="base:parity", base="base:parity", rollouts=32,
                         steps=60, eval_every=20, save_every=1000, keep=1)
# 2505.16265, G 4, dual clip 3, k3 in the loss, judge at .6, one sample: the released code's; its
# kl_coef 1e-4; lr, sizes: ours. A response that does not end is worse than all others.
PRESETS["thinkrm"] = dict(reward="verdicts", advantage="to_go", surrogate="dual", regulariser="k3",
                          kl_coef=1e-3, beta=0.0, no_eos=-3.0, samples=4, epochs=1, lr=1e-3)


# === p3o, p3o_joint: 2310.00212, pairwise PPO: only the difference of two responses' rewards ======


def partner(x):
    """The number of the other response of the pair: rows 0 and 1, 2 and 3, ….   [B] -> [B]"""
    return x.view(-1, 2).flip(1).flatten()


def pair_gap(rewards, mask):
    """w = s - s', s = Σ_t r_t the reward of a whole response, its KL within, s' that of the other:
    on every token of the response, since an advantage is.   [B, T] -> [B, T], None"""
    s = (rewards * mask).sum(1)                                                          # [B]
    return (s - partner(s))[:, None] * mask, None


def gaps_and_ratios(logp, old_logp, adv, mask):
    """Of whole responses the gap w and log ρ, which is capped against overflow.   [b], [b]"""
    return (adv * mask).sum(1) / mask.sum(1), ((logp - old_logp) * mask).sum(1).clamp(-10, 10)


def p3o(logp, old_logp, adv, mask, *, eps: Positive = 0.2):
    """P3O V1, each ratio clipped:  -min(w ρ' ρ, w ρ' clip(ρ, 1±ε)),  ρ' the other's, a constant.

    -> [b]: the mean over rows is -½ Σ over a pair's two. Unclipped its gradient is E[s]'s,
    w ∇(log π(y) - log π(y'))/2 under ρ ρ'. ours: the paper's printed form was not at hand."""
    w, d = gaps_and_ratios(logp, old_logp, adv, mask)
    w, ratio = w * partner(d).exp().detach(), d.exp()
    return -torch.minimum(w * ratio, w * ratio.clamp(1 - eps, 1 + eps))


def p3o_joint(logp, old_logp, adv, mask, *, eps: Positive = 0.2):
    """P3O V2, the pair clipped:  -½ min(W D, W clip(D, ±ε)),  D = log ρ - log ρ',  W = w ρ ρ' a
    constant.   -> [b], the same for both of a pair"""
    w, d = gaps_and_ratios(logp, old_logp, adv, mask)
    W, D = w * (d + partner(d)).exp().detach(), d - partner(d)
    return -0.5 * torch.minimum(W * D, W * D.clamp(-eps, eps))


def shifted(score, problems, samples, *, shift: Positive = 10.0):
    """A control: δ(x) in [-shift, shift), a number of the prompt alone, added to its responses'
    scores: no preference changes, nor what P3O learns.   [B]"""
    numbers = [int.from_bytes(p["prompt"].encode(), "big") % 1009 for p in problems]
    delta = torch.tensor(numbers).to(score).repeat_interleave(samples) / 1009            # [B]
    return score + shift * (2 * delta - 1)


ADVANTAGES["pair"], TRANSFORMS["shifted"] = pair_gap, shifted
SURROGATES["p3o"], SURROGATES["p3o_joint"] = p3o, p3o_joint
TOGETHER["p3o"] = TOGETHER["p3o_joint"] = 2
PRESETS["p3o"] = dict(advantage="pair", surrogate="p3o", samples=2, epochs=1, beta=0.05)
PRESETS["p3o_joint"] = PRESETS["p3o"] | dict(surrogate="p3o_joint")     # one epoch: the paper's


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


def k3(logp, ref_logp):
    """exp(-d) - 1 + d >= 0, unbiased like k1; as a loss its gradient is KL(π_ref||π)'s.   [B, T]"""
    return torch.expm1(ref_logp - logp) + logp - ref_logp


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


ADVANTAGES["best"], CHECKS["best"], SURROGATES["nll"] = best_of_group, compares, weighted_nll
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
