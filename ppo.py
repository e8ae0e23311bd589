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
import copy
import math
import re
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import kernels
import sft
from data import prefs, tasks
from data.run import (Count, MeanOf, NonNegative, Positive, Range, Run, Share, Signed, Training,
                      UserError, ask, asked_by, batch_indices, call, cast, check_first_ratio,
                      checkpoint, cli, configure, entries, launch, needs, parse, pyplot, ranks,
                      read_json, read_log, refuse_alone, report, rows_used, start_ranks, steps_of)
from data.stats import accuracy, bon_kl, explained_variance, rank_correlation
from model import (ADAPTERS, PEFT, ScalarModel, Transformer, Work, adapter_readers, adapter_state,
                   autocast, check_adapters, clip_gradients, collate, critic_values, foresee,
                   generate, joined, last_hidden, load, load_frozen, logprobs, masked_whiten,
                   open_trained, passes, peek, plain_model, recomputing, reference, rows_of, save,
                   save_trained, sequence_score, sequence_scores, shard, snapshot, spread, summed,
                   token_logprobs, token_values, use, with_peft)
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
    """GAE; advantages whitened over the rollout, returns never (2403.17031).   [B, T] each"""
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
    """1707.06347 eq. 7:  max(-A ρ, -A clip(ρ, 1-ε, 1+ε)),  ρ = π/π_old, capped.   [B, T]"""
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

MODELS = dict(base=("base", Transformer))    # frozen: the option that names it, what it must be
FACTS = dict(                    # of a rollout, before its score
    sft_logp=lambda ref, roll, c: logprobs(ref, roll.tokens, roll.mask, c),
    base_logp=lambda base, roll, c: logprobs(base, roll.tokens, roll.mask, c))
BATCH = {}                       # of the batch, once it is scored
MINIBATCH = {}                   # of a minibatch, before its gradient
MEMORIES = {}                    # classes: tell() before a step, note(…) after, state(), load()
TOGETHER = {}                    # surrogates that compare: how many rows in a row stay together
LAWS = {}                        # rollouts whose tokens have another law than own_law
RELATIVE = {}                    # rewards that compare the responses of a prompt: by what

# --- score and evaluate ---------------------------------------------------------------------------


def rolled(known, problems, roll, trained=None, valued=None):
    """What is known of a rollout, by name. trained, valued: the policy's tokens, the critic's."""
    truth = quality(known["task"], problems, roll, known["tok"]).to(roll.mask.device)    # [B]
    return known | dict(problems=problems, roll=roll, mask=roll.mask, finished=roll.finished,
                        samples=len(roll.tokens) // len(problems), quality=truth, common=known,
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
            found.append({"reward": scored(here, f), task.metric: here["quality"],
                          "kl": (logp - ref).sum(1), "length": roll.mask.sum(1),
                          "truncated": ~roll.finished} | measured(here))                 # [B] each
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
    """Gradients of one minibatch of the batch's tensors -> {name: what happened}. Losses are parts
    of the whole minibatch's, so --micro changes nothing."""
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
                values = token_values(critic, b["tokens"], b["valued"])                  # [b, T]
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
                  coefficient=factor / scale["std"], spread=scale["std"], **log_probs(batch),
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
    use(c)
    with Run(c, f, "ppo", CURVES) as run:
        policy, critic, tok, models = open_models(c, f, folders, init, run)
        whole, whole_critic = (shard(m, c.dtype) for m in (policy, critic))      # over the ranks
        task, pool, sets, max_new = questions(c, tok, policy.config.max_position_embeddings)
        opt, critic_opt = optimiser(policy, lr=c.lr), optimiser(critic, lr=c.critic_lr)
        g, saved = torch.Generator().manual_seed(c.seed), run.state or {}
        known = models | dict(c=c, f=f, run=run, task=task, tok=tok, policy=policy, pool=pool,
                              max_new=max_new, generator=g, training=False, bias=0.0)
        memories = {k: call(MEMORIES[k], known) for k in sorted(asked & MEMORIES.keys())}
        introduce(known, (policy, critic), models, (opt, critic_opt), sets)
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
            run.phase("gen")
            known |= recalled(memories)
            found = call(f.rollout, known | dict(step=step))
            batch = rolled(known | dict(training=True), **found)
            mask = batch["mask"]                                                         # [B, T]
            # 2. score -----------------------------------------------------------------------------
            run.phase("score")
            batch = credited(batch, critic, scale, factor, asked, f)
            tensors = {k: x for k, x in batch.items() if is_of(x, mask)}
            # 3. update ----------------------------------------------------------------------------
            run.phase("update")
            done, norm, skipped = [], 0.0, 0
            set_lr(opt, c.lr * linear(step, c.steps))
            set_lr(critic_opt, c.critic_lr * linear(step, c.steps))
            for epoch in range(c.epochs):
                for rows in shuffled(mask, TOGETHER.get(c.surrogate, 1), g).split(c.batch):
                    done.append(backward(train_policy, train_critic, tensors, rows, known, f))
                    if len(done) == 1:
                        check_first_ratio(done[0], "bfloat16" if c.rollout in LAWS else c.dtype)
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
            run.log(step + 1, **row, beta_factor=factor)
            if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
                run.check(step + 1, policy, critic)
                known |= recalled(memories)
                scores, shown = evaluate(policy, known, sets, f)
                run.log(step + 1, **scores, show=True)
            if (step + 1) % c.save_every == 0 or step + 1 in (c.steps, c.stop):
                nets = whole(), whole_critic()                   # every rank takes part
                run.save(step + 1, partial(write, c, f, *nets, tok, init), opt=opt.state_dict(),
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
                          agreement=scale["agreement"], **frontier(read_log(run.folder)))


def main(argv=None):
    """python ppo.py …: see the docstring above, or --help."""
    return launch("ppo", Config, PRESETS, AXES, __doc__, train, argv, readers, True, INSTEAD)


# === refused: what a run reads, and what does not go together, told before anything is made =======


def readers(c, f):
    """{field: (whether this run reads it, what does)} of the fields that not every run reads."""
    asked = asked_for(f)
    critic = has_critic(f), "--advantage gae"
    rewards = "rewards" in asked, "advantages made of token rewards"
    return dict(base=("base" in asked, "--reward coherent or --decode contrast"),
                critic_lr=critic, critic=critic, value=critic, controller=rewards,
                shaping=(rewards[0] or "log_p" in asked
                         and f.advantage.keywords["aim"] == "reward", rewards[1]),
                lr=(c.steps, "runs with --steps"),
                warmup=(False, "sft.py, grpo.py, dpo.py and specdec.py"),
                share_trunk=(c.peft in ADAPTERS, "--peft lora"), **adapter_readers(c),
                **tasks.file_readers(c))


def asked_for(f):
    """The names that a run's functions ask for, and those that what answers them asks for."""
    axes = AXES.keys() - {"kernels", "peft", "value", "critic"}       # the critic's ask for nothing
    return asked_by([getattr(f, axis) for axis in axes], [FACTS, BATCH, MINIBATCH, MEMORIES])


def has_critic(f):
    """Whether a run's advantages read values."""
    return "values" in asked_for(f)


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
    if c.samples % beside or c.batch % beside:
        raise UserError(f"--samples {c.samples} and --batch {c.batch}: --surrogate {c.surrogate} "
                        f"compares {beside} responses of a prompt: give multiples of {beside}")
    for row in dict.fromkeys(rows_used(c, AXES).values()):
        if row in CHECKS and (wrong := call(CHECKS[row], dict(c=c, f=f))):
            raise UserError(wrong)
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
    """The critic: a copy of the SFT model with a head, or adapters and a head on its tensors, or
    the head alone where nobody asks for values; last, adapter: of a resumed run."""
    if not has_critic(f):
        return ScalarModel.from_lm(ref, share=True)
    if trunk_is_shared(c):
        return with_peft(f.critic(ref, True), c, f.peft, adapter, 1)
    critic = load(last / "critic", c.device)[0] if last and not adapter else f.critic(ref, False)
    critic.load_state_dict(dict(adapter), strict=False)
    return recomputing(critic, c.recompute)


def write(c, f, policy, critic, tok, init, folder):
    """A checkpoint's folders: the policy's, and in it the critic's if there is one, unless it is
    kept as adapters or has heads of its own, which a folder does not hold."""
    save_trained(policy, tok, folder, c, init)
    whole = type(critic.score) is torch.nn.Linear and (c.merge or not trunk_is_shared(c))
    if has_critic(f) and whole:
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
    models["anchor"] = call(f.reference, models | dict(c=c, run=run, tok=tok))
    critic = open_critic(c, f, models["ref"], run.last, other)    # a copy of ref while it is whole
    for model in {id(m): m for m in models.values()}.values():
        shard(model, c.dtype)                                      # over torchrun's ranks
    return policy, critic, tok, models


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
            f"{c.samples} completions, {c.computes}")
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
    logp, ref_logp = batch["logp"], batch["ref_logp"]
    kl = (k1(logp, ref_logp) * mask).sum(1).mean().item()                    # nats per response
    row = dict(reward=score.mean(), kl=kl, entropy=done[0]["entropy"],
               k3=(k3(logp, ref_logp) * mask).sum(1).mean(),
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

    mean, std of the score: token rewards are divided by std, and the score is centred first, but
    for one that compares the responses of a prompt (RELATIVE): its 0 means as good as the others.
    Neither changes what is optimised (the KL term is scaled along); both matter to the critic,
    which starts at 0 and moves at most eps_v a rollout: one that lags behind credits late tokens
    more than early ones, and the policy learns to stop early. bias: the mean raw score of a reward
    that has no zero of its own. agreement: rank_correlation with the quality. cut: the share of
    samples that did not end.
    """
    c, tok, rolls = known["c"], known["tok"], []
    for some in pieces(known["pool"][:c.calibrate], c, "calibrate", samples):
        with autocast(c.device, c.dtype):
            rolls.append(generate(known["policy"], [tok.prompt(p, c.chat) for p in some],
                                  known["max_new"], samples=samples, temperature=c.temperature,
                                  generator=known["generator"], slots=c.slots))
    found = rolled(known, known["pool"][:c.calibrate], joined(rolls, tok.pad or 0))
    if "judged" in needs(f.reward):
        with torch.no_grad():
            ask({"judged"}, FACTS, found)
        known["bias"] = found["judged"].mean().item()
        found["judged"] = found["judged"] - known["bias"]
    (raw, score), truth = worth(found, f), found["quality"]                              # [B]
    mean = 0.0 if c.reward in RELATIVE else score.mean().item()
    if c.surrogate in TOGETHER:                            # only what tells its responses apart
        score = (score.view(-1, samples) - score.view(-1, samples).mean(1, keepdim=True)).flatten()
    out = dict(mean=mean, std=score.std().item() if score.std() > 1e-3 else 1.0,
               bias=known["bias"], cut=1 - found["finished"].float().mean().item(),
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
    return scores_of(judge, roll, c) - bias


def scores_of(model, roll, c):
    """A reward model's scores of a rollout's responses.   [B]"""
    return sequence_scores(model, roll.tokens, ends_of(roll), c, roll.prompt_len)


def ends_of(roll):
    """The length of each row, prompt and response.   [B]"""
    return roll.prompt_len + roll.mask.sum(1).long()


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


# === measured: ours, what else held-out samples are measured by ===================================

MEASURES = {}                    # a row of REWARDS, or a task: {name: a function of facts -> [B]}


def measured(known):
    """The run's own measures of a rollout, by name.   [B] each"""
    rows = MEASURES.get(known["c"].reward, {}) | MEASURES.get(known["task"].name, {})
    found = {name: call(fn, known) for name, fn in rows.items()}
    return {name: x for name, x in found.items() if x is not None}             # of another world


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


def of_several(c):
    """Words against a group of one, which has no mean to be above."""
    return f"--samples {c.samples}: --transform group compares at least 2" * (c.samples < 2)


ADVANTAGES["to_go"], TRANSFORMS["group"], CHECKS["group"] = to_go, group_norm, of_several


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
    """Pairwise scores as a number a response within ±10: its advantage, or its score against the
    SFT model's greedy one in a group of one.   [P, K, K] -> [B]"""
    return (S[:, 0, 1] if samples == 1 else pairwise_rloo(S).flatten()).clamp(-10, 10)


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
RELATIVE["routed"] = "pairwise scores"
MODELS["pair_model"] = "pair_model", ScalarModel
# 2510.20369, RLOO, β .01, judge ±2: the released code's; budget, samples, epochs, lr: ours. A
# response that does not end is one of which the judge said that it lost to all others.
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
        self.calls, self.seen, self.silent = 0, {}, False

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

    def note(self, run):
        if self.seen.get("no_verdict") == 1 and not self.silent:
            self.silent = True
            run.say("  WARNING: the judge gave no verdict in a whole step: was it made for this "
                    "task, and does --judge_tokens leave it room?")
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
RELATIVE["routed_model"] = "pairwise scores"


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


def duels(panel, groups, generator, training, *, both_orders, votes):
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
        out.append(judge_matrix(says, G, length if votes == "length" else None))
    return torch.stack(out)


def by_verdicts(panel, groups, generator, training, samples, c, *, judge="", both_orders=False,
                points=False, votes: Literal["one", "length"] = "one",
                judge_temperature: NonNegative = 0.6, judge_tokens=0):
    """The advantage of a response by a reasoning judge's verdicts on its group's pairs.   [B]

    judge: a language model's folder, as reward.py --config thinkrm leaves it; both_orders: each
    pair is judged twice, A and B exchanged; votes length: the sign over the judgement's length
    (ours: over the step's mean, so that eps stays small); points: a response's mean verdict, for
    --transform group to compare. In evaluation a greedy verdict."""
    D = duels(panel, groups, generator, training, both_orders=both_orders, votes=votes)
    D = D.to(c.device)                                                                # [P, G, G]
    if samples == 1:
        return D[:, 0, 1]
    return (D.sum(-1) / (samples - 1) if points else pairwise_grpo(D)).flatten()


def dual_clip(logp, old_logp, adv, *, eps: Positive = 0.2, dual: Positive = 3.0):
    """PPO's clipped loss, and where A < 0 at most -A dual, however large the ratio.   [b, T]"""
    loss = ppo_clip(logp, old_logp, adv, eps=eps)
    return torch.where(adv < 0, torch.minimum(loss, -adv * dual), loss)


def exact(quality):
    """1 where all bits are right.   [B]"""
    return (quality == 1).float()


REWARDS["verdicts"], SURROGATES["dual"] = by_verdicts, dual_clip
CHECKS["verdicts"], MEASURES["parity"] = in_groups, dict(exact=exact)
RELATIVE["verdicts"] = "pairwise verdicts"
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


def in_pairs(f):
    """Words against half of P3O: gaps without its loss, or its loss of anything else."""
    names = p3o.__name__, p3o_joint.__name__
    return goes_with(f, advantage=pair_gap) if f.surrogate.func.__name__ in names else (
        f"--advantage pair: the rest of this method needs --surrogate {' or '.join(names)}")


ADVANTAGES["pair"], TRANSFORMS["shifted"] = pair_gap, shifted
CHECKS["pair"] = CHECKS["p3o"] = CHECKS["p3o_joint"] = in_pairs
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


# === several: ours, reward models, each in units of how the SFT model's own samples differ ========


def reward_folders(rewards):
    """The folders of --rewards a,b,c (or a+b+c, where a comma parts options). A run that left a
    model for each group of a mixture stands for those of its last round."""
    out, rewards = [], rewards if Path(rewards).exists() else rewards.replace("+", ",")
    for folder in filter(None, rewards.split(",")):
        groups = sorted(Path(folder).glob("round-*-group-*"))
        rounds = [int(x.name.split("-")[1]) for x in groups]
        out += [str(x) for x, r in zip(groups, rounds) if r == max(rounds)] or [folder]
    return out


class Several:
    """The reward models of --rewards, and the mean and std [2, K] of what each says of samples of
    the SFT model for a fixed set of prompts, measured before the first step and frozen."""

    def __init__(self, c, f, tok, ref, pool, max_new):
        self.known, self.problems = dict(c=c, tok=tok, ref=ref, max_new=max_new), pool[:c.calibrate]
        self.models, self.unit = {}, None
        for folder in reward_folders(f.reward.keywords["rewards"]):
            self.models[folder], other = load_frozen(folder, c)
            if other.tokens != tok.tokens:
                raise UserError(f"--rewards {folder} and --init {c.init} have different "
                                "tokenizers: both must score the same ids")
            shard(self.models[folder], c.dtype)

    def raw(self, roll):
        """What each model says of a rollout's responses, in its own unit.   [B, K]"""
        out = []
        for folder, model in self.models.items():
            c = replace(self.known["c"], reward=folder)
            own = self.known | dict(c=c, judge=model, roll=roll, bias=0.0)
            out.append(finite(call(judged, own), c))
        return torch.stack(out, 1)

    @torch.no_grad()
    def tell(self, samples=8):
        """Itself, once it knows its unit."""
        c, tok, ref, max_new = (self.known[k] for k in ("c", "tok", "ref", "max_new"))
        raw, g = [], torch.Generator().manual_seed(c.seed + 3)
        for some in pieces(self.problems, c, "rewards", samples) if self.unit is None else ():
            with autocast(c.device, c.dtype):
                roll = generate(ref, [tok.prompt(p, c.chat) for p in some], max_new, generator=g,
                                samples=samples, temperature=c.temperature, slots=c.slots)
            raw.append(self.raw(roll))
        if raw:
            self.unit = torch.stack([torch.cat(raw).mean(0), torch.cat(raw).std(0)])
        for folder, std in zip(self.models, self.unit[1].tolist()):
            if std < 1e-6:
                raise UserError(f"--rewards {folder} says the same of all samples of {c.init}: "
                                "leave it out")
        return self

    def note(self, components, finished, f):
        """A rollout's means under the EOS rule, numbered as --rewards names the models."""
        means = ended(components, finished, f).mean(0).tolist()
        return {f"reward_{k + 1}": x for k, x in enumerate(means)}

    def state(self):
        return self.unit

    def load(self, state):
        self.unit = state


def components(several, roll):
    """Each reward model's score of each response, SFT samples having mean 0 and std 1.   [B, K]"""
    mean, std = several.unit.to(roll.mask)
    return (several.raw(roll) - mean) / std


MEMORIES["several"], FACTS["components"] = Several, components


# === weighted, rluf: 2505.14946, a weighted sum of rewards, one of them what users will love ======


def numbers_of(text, n, option, usual=()):
    """The n numbers of an option "0.5,2"; `usual` if it is empty."""
    try:
        out = [float(x) for x in text.split(",")] if text else list(usual)
    except ValueError:
        out = []
    if len(out) != n or not all(map(math.isfinite, out)):
        raise UserError(f"{option} {text or '(empty)'}: give {n} numbers, one for each reward "
                        f"model, for example {','.join(['0.5'] * n)}")
    return out


def weighted(components, *, rewards="", weights=""):
    """Σ_k w_k r_k of the reward models of --rewards, without --weights their mean. [B, K] -> [B]"""
    K = components.size(1)
    return components @ components.new_tensor(numbers_of(weights, K, "--weights", [1 / K] * K))


def rewards_are_there(c, f):
    """Words against reward models that are not named; UserError for numbers that do not fit."""
    given = f.reward.keywords
    folders = reward_folders(given["rewards"])
    for folder in folders:
        peek(folder, scalar=True, option="--rewards")
        if folders.count(folder) > 1:
            raise UserError(f"--rewards names {folder} twice: leave one out")
    for option in sorted({"weights", "risks"} & given.keys()) if folders else ():
        numbers_of(given[option], len(folders), f"--{option}", [1.0] * len(folders))
    return f"--reward {c.reward}: name its reward models, --rewards FOLDER,FOLDER" * (not folders)


def flattery(task, tok, roll):
    """How many of Ring's flattering tokens are in each response: what a model of rare reactions
    likes, and an optimiser finds (2505.14946: closing phrases).   [B]"""
    if task.name != "ring":
        return None
    return torch.tensor([float(tok.decode(ids).count(prefs.FLAT)) for ids in roll.completions()])


def other_gold(task, tok, problems, roll):
    """Ring's gold reward of group B, whose annotators are few.   [B]"""
    if task.name != "ring":
        return None
    per, done = len(roll.tokens) // len(problems), roll.finished.tolist()
    texts = [tok.decode(ids) for ids in roll.completions()]
    return torch.tensor([task.judge(problems[i // per]["prompt"], x, done[i], group="B")["gold"]
                         for i, x in enumerate(texts)])


REWARDS["weighted"], CHECKS["weighted"] = weighted, rewards_are_there
IN_RING = dict(gold_b=other_gold, flattery=flattery)
MEASURES["weighted"] = IN_RING
# ours: --weights 0.6,0.3,0.1 of help, safety and love; the paper's are unknown, 0 to 0.3 for love
PRESETS["rluf"] = dict(reward="weighted", beta=0.05, eos="subtract", no_eos=1.0)


# === heads: ours, a critic with several values a token, one for each part of the reward ===========


class Heads(torch.nn.Module):
    """K linear heads, 0 at first."""
    merged = None        # adapter_state() keeps all that trains of such a critic: see write()

    def __init__(self, width, heads, device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(heads, width, device=device))

    def forward(self, hidden):
        """States [..., D] -> [..., K], a sum, so never in bfloat16."""
        return (hidden.float()[..., None, :] * self.weight.float()).sum(-1)


def with_heads(ref, share, heads):
    """A critic on the SFT model's body, or on its very tensors, with these heads."""
    critic = ScalarModel.from_lm(ref, share=share)
    critic.score = heads
    return critic


def ended(components, finished, f):
    """Each reward model's scores under the EOS rule.   [B, K]"""
    return torch.stack([f.eos(x, finished) for x in components.unbind(1)], 1)


def on_last(score, mask):
    """A response's scores on its last token.   [B, K], [B, T] -> [B, T, K]"""
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))                          # [B, T]
    return last[..., None] * score[:, None]


def gae_each(rewards, values, mask, gamma, lam):
    """GAE of every head apart, not whitened.   [B, T, K] three times -> advantages, returns"""
    parts = [gae(rewards[..., k], values[..., k], mask, gamma, lam)
             for k in range(rewards.size(-1))]
    return tuple(torch.stack(x, -1) for x in zip(*parts))


def goes_with(f, **functions):
    """Words where one of the axes named has another function: what needs each other is together."""
    for axis, fn in functions.items():
        if getattr(f, axis).func.__name__ != fn.__name__:
            rows = [row for row, other in AXES[axis].items() if other is fn]
            return f"--{axis}: the rest of this method needs --{axis} {' or '.join(rows)}"
    return ""


BATCH["ended"] = ended


# === mu_ppo, xi_ppo, all_ppo: 2310.04373, each reward model held where it still tells the truth ===


def mixture(u, kind):
    """Weights of the advantages of -KL and of N reward models, by their multipliers u [N].

    mu, v_i >= θ_i: (N - Σ g, g_1 … g_N), g = σ(u).   xi, v_i = θ_i: g = tanh(u), which can push
    back.   all, max Σ v_i under v_i <= θ_i: (0, 1 - σ(u_1) …), no KL.   -> [N + 1]"""
    g = torch.tanh(u) if kind == "xi" else torch.sigmoid(u)
    first = 0 * g.sum() if kind == "all" else len(g) - g.sum()
    return torch.cat([first[None], 1 - g if kind == "all" else g])


def multiplier_step(u, velocity, away, kind, lr=0.1, momentum=0.1, most=0.5):
    """SGD on Σ g(u_i) away_i, away = v - θ (all: θ - v): what misses its point gains weight.

    most: the largest norm of the gradient (the authors' code).   [N] -> u, velocity
    """
    g = torch.tanh(u) if kind == "xi" else torch.sigmoid(u)
    grad = (1 - g * g if kind == "xi" else g * (1 - g)) * away
    velocity = momentum * velocity + grad * min(1.0, most / max(grad.norm().item(), 1e-12))
    return u - lr * velocity, velocity


class Multipliers:
    """u [N], a step for each of the policy's, up to a cap (ours), of which it tells."""

    def __init__(self, c, f, run, policy):
        self.points, g = Points(c, f, policy), torch.Generator().manual_seed(c.seed + 4)
        self.u = 0.01 * torch.randn(len(self.points.theta), generator=g)
        self.c, self.run, self.given = c, run, f.advantage.keywords
        self.velocity, self.capped = torch.zeros_like(self.u), []

    def tell(self):
        return mixture(self.u, self.c.advantage)

    def note(self, ended, quality, done):
        value, kind, cap = ended.mean(0).cpu(), self.c.advantage, self.given["cap"]      # [N]
        points = self.points.theta
        away = points - value if kind == "all" else value - points
        for _ in range(self.c.epochs * -(-len(ended) // self.c.batch)):
            self.u, self.velocity = multiplier_step(self.u, self.velocity, away, kind,
                                                    self.given["multiplier_lr"])
        self.u = self.u.clamp(-cap, cap)
        for i, u in enumerate(self.u.tolist()):
            if i not in self.capped and (u >= cap or u <= -cap and kind == "xi"):
                self.capped.append(i)
                self.run.say(f"  WARNING: step {done}: reward model {i + 1} is at {value[i]:.2f}, "
                             f"its threshold {points[i]:.2f}, its multiplier at --cap {cap:g}: "
                             "this constraint cannot be met, choose another of --thresholds")
        shown = dict(weight=self.tell()[1:], threshold=points, violation=value - points)
        self.points.note(quality, done)
        return {f"{k}_{i + 1}": y for k, x in shown.items() for i, y in enumerate(x.tolist())}

    def state(self):
        own = {k: getattr(self, k) for k in ("u", "velocity", "capped")}
        return own | dict(points=self.points.state())

    def load(self, state):
        self.points.load(state["points"])
        vars(self).update({k: x for k, x in state.items() if k != "points"})


def lagrangian(rewards, values, mask, mixture, *, thresholds="", segment=0, edge: Positive = 0.5,
               gamma: Share = 0.99, lam: Share = 0.95, multiplier_lr: Positive = 0.1,
               cap: Positive = 2.0):
    """GAE of every head, whitened apart, then mixed.   [B, T, N + 1] -> [B, T], [B, T, N + 1]"""
    adv, returns = gae_each(rewards, values, mask, gamma, lam)
    white = torch.stack([masked_whiten(x, mask) for x in adv.unbind(-1)], -1)
    return white @ mixture.to(white), returns


ADVANTAGES["mu"] = ADVANTAGES["xi"] = ADVANTAGES["all"] = lagrangian
MEMORIES["mixture"] = Multipliers
# lr .1, momentum .1, gamma .99, value coefficients .5 and .2: the authors' code; thresholds: yours
CONSTRAINED = dict(reward="weighted", eos="subtract", no_eos=1.0, shaping="constraints",
                   critic="constraints", value="constraints")
PRESETS["mu_ppo"] = dict(advantage="mu", **CONSTRAINED)
PRESETS["xi_ppo"] = dict(advantage="xi", **CONSTRAINED)
PRESETS["all_ppo"] = dict(advantage="all", **CONSTRAINED)


# === ppo_sat, constraints: 2310.04373, rewards that want a certain value; what the others stand on


def head_and_kl(ref, share, *, rewards=""):
    """A head for -KL, and one for each reward model."""
    K = len(reward_folders(rewards)) + 1
    return with_heads(ref, share, Heads(ref.config.hidden_size, K, ref.head.device))


def minus_kl_first(ended, logp, ref_logp, mask):
    """-k1 of each token first, then each reward model's score on the last.   [B, T, N + 1]

    Where both are one model k1 is rounding, of which whitening would make much: there it is 0.
    """
    kl = k1(logp, ref_logp) * mask                                                       # [B, T]
    kl = torch.where(kl.abs() < 1e-5, 0.0, kl)
    return torch.cat([-kl[..., None], on_last(ended, mask)], -1)


def squared_each(values, returns):
    """½ Σ_i (V_i - R_i)² + ⅕ (V_0 - R_0)², without a clip (the authors').   [b, T, K] -> [b, T]"""
    error = (values - returns) ** 2
    return 0.2 * error[..., 0] + 0.5 * error[..., 1:].sum(-1)


def proxy_points(rows, n, window=5):
    """What each of n reward models says where gold peaks in a run's log, the most that is still a
    proxy: of one model alone, or of several whose sum was optimised (2310.04373 §4).   -> [n]

    window: iterations of a moving mean (ours: the paper fits a curve).
    """
    keys = ["quality", *(f"reward_{k + 1}" for k in range(n))]
    seen = torch.tensor([list(map(row.get, keys)) for row in rows if keys[-1] in row])
    if not len(seen):
        return []
    mean = seen.unfold(0, min(window, len(seen)), 1).mean(-1)                        # [i, n + 1]
    return mean[mean[:, 0].argmax(), 1:].tolist()


def points_of(c, f):
    """--thresholds 1.5,0.8, or a run's folder whose log says them.   -> [N]"""
    where = {**f.reward.keywords, **f.advantage.keywords}["thresholds"]
    n = len(reward_folders(f.reward.keywords["rewards"]))
    if not where or not Path(where).is_dir():
        return torch.tensor(numbers_of(where, n, "--thresholds"))
    if not (found := proxy_points(read_log(where), n)):
        raise UserError(f"--thresholds {where}: its log says nothing of {n} reward models; give a "
                        "run of --reward weighted with the same --rewards, or numbers")
    return torch.tensor(found)


def satisfying(components, c, f, *, rewards="", thresholds=""):
    """PPO-SAT:  -Σ (r_i - θ_i)², no multipliers.   [B, N] -> [B]"""
    return -((components - points_of(c, f).to(components)) ** 2).sum(1)


def has_points(c, f):
    """Words against reward models that are not there; UserError for thresholds that do not fit."""
    wrong = rewards_are_there(c, f)
    if not wrong:
        points_of(c, f)
    return wrong


def is_constrained(c, f):
    """Words against constraints that are not whole."""
    wrong = goes_with(f, reward=weighted, advantage=lagrangian, shaping=minus_kl_first,
                      critic=head_and_kl, value=squared_each)
    if not wrong and f.advantage.keywords["segment"] and ranks() > 1:
        wrong = "--segment keeps the best policy of a search on one rank: leave torchrun out"
    return wrong or has_points(c, f)


SHAPINGS["constraints"], CRITICS["constraints"] = minus_kl_first, head_and_kl
VALUES["constraints"], REWARDS["satisfying"] = squared_each, satisfying
CHECKS["mu"] = CHECKS["xi"] = CHECKS["all"] = CHECKS["constraints"] = is_constrained
CHECKS["satisfying"] = has_points
MEASURES["satisfying"] = IN_RING
PRESETS["ppo_sat"] = dict(reward="satisfying", beta=0.2, eos="subtract", no_eos=1.0)


# === nm_ppo: 2310.04373, thresholds that Nelder and Mead's simplex finds within a run =============


def nelder_mead_step(simplex, scores, tried, *, alpha=1.0, gamma=2.0, rho=0.5, sigma=0.5):
    """Nelder and Mead's next point, to maximise; α reflects, γ expands, ρ contracts, σ shrinks.

    simplex [n + 1, n] and scores [n + 1]; tried: the scores of the points of this step so far.
    -> (the next point to try, or None: the step is done), simplex, scores, best first
    """
    order = scores.argsort(descending=True, stable=True)
    x, y, n = simplex[order], scores[order], len(tried)
    center, (best, second, worst) = x[:-1].mean(0), (y[0], y[-2], y[-1])
    far = center + alpha * (center - x[-1])
    if n == 0:
        return far, x, y

    def put(point, score):
        return None, torch.cat([x[:-1], point[None]]), torch.cat([y[:-1], y.new_tensor([score])])
    if tried[0] > best:
        further = center + gamma * (far - center)
        if n == 1:
            return further, x, y
        return put(further, tried[1]) if tried[1] > tried[0] else put(far, tried[0])
    if tried[0] > second:
        return put(far, tried[0])
    near = center + rho * (x[-1] - center)
    if n == 1:
        return near, x, y
    if n == 2 and tried[1] > worst:
        return put(near, tried[1])
    small = x[0] + sigma * (x - x[0])
    if n < len(x) + 1:
        return small[n - 1], x, y
    return None, small, torch.cat([y[:1], y.new_tensor(tried[2:])])


class Points:
    """The thresholds θ [N]. With --segment they are vertices of a search, each trained towards for
    so many steps from the policy that was best by gold, which is asked once a vertex, of its last
    rollout. (The authors' code goes on from the last policy.) It ends with the run (ours)."""

    def __init__(self, c, f, policy):
        self.theta, given = points_of(c, f), f.advantage.keywords
        self.every, around = given["segment"], given["edge"] * torch.eye(len(self.theta))
        self.simplex = torch.cat([self.theta[None], self.theta + around])         # [N + 1, N]
        self.scores, self.tried, self.best, self.weights = torch.zeros(0), [], -math.inf, []
        self.trained = [p for p in policy.parameters() if p.requires_grad]

    @torch.no_grad()
    def note(self, quality, done):
        if not self.every or done % self.every:
            return
        score = quality.mean().item()
        if score > self.best:
            self.best, self.weights = score, [p.clone() for p in self.trained]
        for p, best in zip(self.trained, self.weights):
            p.copy_(best)
        self.tried = [*self.tried, score]
        if not len(self.scores) and len(self.tried) < len(self.simplex):
            self.theta = self.simplex[len(self.tried)]
            return
        if not len(self.scores):
            self.scores, self.tried = torch.tensor(self.tried), []
        point = None
        while point is None:
            point, self.simplex, self.scores = nelder_mead_step(self.simplex, self.scores,
                                                                self.tried)
            self.tried = self.tried if point is not None else []
        self.theta = point

    def state(self):
        return {k: x for k, x in vars(self).items() if k != "trained"}

    def load(self, state):
        vars(self).update(state)


PRESETS["nm_ppo"] = PRESETS["xi_ppo"] | dict(segment=10)         # a tenth of a run, as the authors'


# === maxmin: 2402.08925, the policy that serves the worst served group best =======================


def worst_served(utility, softness=0.0):
    """Weights of the groups: all on argmin F_u, or softmax(-F / softness).   [U] -> [U]"""
    if softness:
        return torch.softmax(-utility / softness, 0)
    return torch.zeros_like(utility).scatter(0, utility.argmin(0, keepdim=True), 1.0)


def served(components, finished, training, f):
    """Each group's weight in this batch; β KL is the same for all, so it is not in F_u. All the
    same where nothing is trained: an evaluation, in pieces, tells the groups' mean.   [U]"""
    if not training:
        return components.new_full((components.size(1),), 1 / components.size(1))
    return worst_served(ended(components, finished, f).mean(0), f.reward.keywords["softness"])


def egalitarian(components, served, *, rewards="", softness=0.0):
    """Each response's reward by the group that the batch serves worst.   [B, U] -> [B]"""
    return components @ served


def a_group_each(ended, logp, ref_logp, mask, coefficient, spread, *, beta=0.05):
    """PPO's token rewards by every group, as token_rewards() in units of the score that mixes them,
    whose standard deviation is `spread`.   [B, T, U]"""
    kl = beta * coefficient * k1(logp, ref_logp) * mask                                  # [B, T]
    return on_last(ended / spread, mask) - kl[..., None]


def head_a_group(ref, share, *, rewards=""):
    """A head for each group: the one that is served changes, what each head predicts does not."""
    U = len(reward_folders(rewards))
    return with_heads(ref, share, Heads(ref.config.hidden_size, U, ref.head.device))


def gae_served(rewards, values, mask, served, *, gamma: Share = 1.0, lam: Share = 0.95):
    """GAE of the group that is served, or of a mean of groups, whitened.   -> [B, T], [B, T, U]"""
    adv, returns = gae_each(rewards, values, mask, gamma, lam)
    return masked_whiten(adv @ served, mask), returns


def clipped_each(values, old_values, returns, *, eps_v=0.2):
    """PPO's value loss, the mean of all heads.   [b, T, U] -> [b, T]"""
    return value_loss(values, old_values, returns, eps_v=eps_v).mean(-1)


def serves_groups(c, f):
    """Words against rows that do not go together, or no reward models."""
    return goes_with(f, reward=egalitarian, shaping=a_group_each, critic=head_a_group,
                     advantage=gae_served, value=clipped_each) or rewards_are_there(c, f)


FACTS["served"], REWARDS["egalitarian"] = served, egalitarian
SHAPINGS["groups"], CRITICS["groups"] = a_group_each, head_a_group
ADVANTAGES["groups"], VALUES["groups"] = gae_served, clipped_each
CHECKS["egalitarian"] = CHECKS["groups"] = serves_groups
MEASURES["egalitarian"] = IN_RING
# rewards: the groups of reward.py --recipe maxmin, --rewards out/reward/maxmin
PRESETS["maxmin"] = dict(reward="egalitarian", shaping="groups", critic="groups",
                         advantage="groups", value="groups", eos="subtract", no_eos=1.0)


# === quark: 2602.11661, rewards on one frozen scale, weighed by weakness, risk and redundancy =====


def has_risks(c, f):
    """Words against reward models that are not there, or risks that are no weights."""
    wrong, given = rewards_are_there(c, f), f.reward.keywords
    if not wrong and given["risks"]:
        risks = numbers_of(given["risks"], len(reward_folders(given["rewards"])), "--risks")
        if min(risks) < 0 or max(risks) == 0:
            wrong = f"--risks {given['risks']}: weights, at least 0 and not all of them"
    return wrong


def tri_factor(mean, risk, corr):
    """w_k = K weak_k risk_k red_k / Σ_j …:  weak = σ(-m / .5),  red = 1 / (1 + Σ_{j≠k} corr+_kj).

    ours: the paper's forms of the three factors are unknown.   [K], [K], [K, K] -> [K]"""
    weak = torch.sigmoid(-mean / 0.5)
    shared = corr.clamp(min=0).fill_diagonal_(0).sum(1)                                  # [K]
    w = weak * risk / (1 + shared)
    return len(w) * w / w.sum()


class TriWeights:
    """Each reward's moving mean, and how the last 1024 scores correlate, up to the batch before
    (ours: weights that do not depend on what they weigh)."""

    def __init__(self, f):
        n = len(reward_folders(f.reward.keywords["rewards"]))
        self.risk = torch.tensor(numbers_of(f.reward.keywords["risks"], n, "--risks", [1.0] * n))
        self.mean, self.last = torch.zeros(n), torch.zeros(0, n)

    def tell(self):
        n = len(self.mean)
        corr = torch.corrcoef(self.last.T).view(n, n) if len(self.last) > 1 else torch.eye(n)
        return tri_factor(self.mean, self.risk, corr.nan_to_num())

    def note(self, components, f):
        scores = components.clamp(-f.reward.keywords["bound"], f.reward.keywords["bound"]).cpu()
        self.mean = 0.9 * self.mean + 0.1 * scores.mean(0)
        self.last = torch.cat([self.last, scores])[-1024:]
        return {f"weight_{k + 1}": x for k, x in enumerate(self.tell().tolist())}

    def state(self):
        return dict(mean=self.mean, last=self.last)

    def load(self, state):
        vars(self).update(state)


def tri_weighted(components, tri_weights, *, rewards="", risks="", bound: Positive = 5.0):
    """Σ_k w_k r_k, each r_k within ±bound.   [B, K] -> [B]"""
    return components.clamp(-bound, bound) @ tri_weights.to(components)


MEMORIES["tri_weights"], REWARDS["tri"] = TriWeights, tri_weighted
CHECKS["tri"], MEASURES["tri"] = has_risks, IN_RING
PRESETS["quark"] = dict(reward="tri", beta=0.05, eos="subtract", no_eos=1.0)        # beta is ours


# === twin: 2602.04651, SAFE's critic: two small networks, of which the lower counts more ==========


class TwinHeads(torch.nn.Module):
    """Two small networks on the normalised state; their last layers are 0 at first (ours)."""
    merged = None                                                              # see Heads

    def __init__(self, width, device):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nn, inner = torch.nn, width // 4
            self.norm = nn.LayerNorm(width)
            self.heads = nn.ModuleList(nn.Sequential(nn.Linear(width, inner), nn.GELU(),
                                                     nn.Linear(inner, 1)) for _ in range(2))
        for p in (p for head in self.heads for p in head[2].parameters()):
            nn.init.zeros_(p)
        self.to(device)

    def forward(self, hidden):
        """States [..., D] -> [..., 2], in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = self.norm(hidden.float())
            return torch.cat([head(x) for head in self.heads], -1)


def twin(ref, share):
    """A critic with two heads, on a network of its own (the authors' reads the policy's)."""
    return with_heads(ref, share, TwinHeads(ref.config.hidden_size, ref.head.device))


def soft_min(values, alpha=0.3):
    """-α (log Σ_i exp(-v_i / α) - log K): the minimum (α -> 0) to the mean.   [..., K] -> [...]"""
    return -alpha * (torch.logsumexp(-values / alpha, -1) - math.log(values.size(-1)))


def gae_pessimistic(rewards, values, mask, *, pessimism: Positive = 0.3, gamma: Share = 1.0,
                    lam: Share = 0.95):
    """GAE on the soft minimum. ours: the authors' code has one value a response, read after it.

    values [B, T, 2] -> [B, T], [B, T]"""
    return whitened_gae(rewards, soft_min(values, pessimism), mask, gamma=gamma, lam=lam)


def huber_pair(values, old_values, returns, *, pessimism: Positive = 0.3, eps_v=0.2):
    """½ (huber(V, R) + huber(V_old + clip(V - V_old), R)), δ ½: a sum, not a max.   -> [b, T]"""
    v, old = soft_min(values, pessimism), soft_min(old_values, pessimism)
    huber = torch.nn.functional.huber_loss
    near = old + (v - old).clamp(-eps_v, eps_v)
    return 0.5 * sum(huber(x, returns, reduction="none", delta=0.5) for x in (v, near))


def is_pessimistic(f):
    """Words against a critic with two heads whose advantages or loss are for one."""
    return goes_with(f, critic=twin, advantage=gae_pessimistic, value=huber_pair)


CRITICS["safe"], ADVANTAGES["safe"], VALUES["safe"] = twin, gae_pessimistic, huber_pair
CHECKS["safe"] = is_pessimistic


# === control: 2602.04651, SAFE's KL threshold, which the reward, its phase and entropy move =======


def safe_pid(state, reward):
    """A controller of the reward's velocity, which should be .001 an update.   -> state, adjustment

    state: moving mean of the reward, sum of errors, last error; () at first."""
    if not state:
        return (reward, 0.0, 0.0), 0.0
    ema, total, before = state
    error = 0.05 * (reward - ema) - 0.001
    total = max(-1.0, min(1.0, total + error))
    return (0.95 * ema + 0.05 * reward, total, error), (
        0.3 * error + 0.01 * total + 0.05 * (error - before))


def phase_of(rewards):
    """The threshold's factor by how the last 50 of the rewards compare with the 50 before."""
    if len(rewards) < 50:
        return 1.5                                                             # warming up
    now = torch.tensor(rewards[-50:])
    past = torch.tensor(rewards[-100:-50]) if len(rewards) >= 100 else now
    if now.mean() > past.mean() + 0.01:
        return 1.2                                                             # climbing
    steady = now.std(correction=0) < 0.02 and now.mean() > 0.7
    return 1.0 if steady else 0.8                                              # converged; plateau


def safe_gate(kl, threshold, entropy, floor=2.0):
    """Penalty .1 g (kl - thr)²₊ and its slope in kl, g = max(.5, floor / (entropy + .1)): what is
    sure of itself pays more.   -> penalty, slope"""
    over, g = max(0.0, kl - threshold), max(0.5, floor / (entropy + 0.1))
    return 0.1 * g * over ** 2, 0.2 * g * over


class Safe:
    """SAFE's controller, asked before every update: KL and entropy in nats a token, reward in
    [0, 1]."""

    def __init__(self):
        self.kl, self.pid, self.rewards, self.shown = 0.0, (), [], {}

    def step(self, kl, entropy, reward, floor):
        """-> penalty, slope"""
        self.kl = 0.9 * self.kl + 0.1 * kl
        self.rewards = [*self.rewards, reward][-100:]
        self.pid, adjustment = safe_pid(self.pid, reward)
        threshold = max(0.1, min(0.6, (0.3 + adjustment) * phase_of(self.rewards)))
        out = safe_gate(self.kl, threshold, entropy, floor)
        self.shown = dict(kl_short=self.kl, kl_threshold=threshold, kl_penalty=out[0])
        return out

    def tell(self):
        return self

    def note(self):
        return self.shown

    def state(self):
        return dict(kl=self.kl, pid=self.pid, rewards=self.rewards)

    def load(self, state):
        vars(self).update(state)


# === safe, safe_literal: 2602.04651, a KL above the threshold costs; as released it has no gradient


def drift(policy, tokens, mask, trained, ref_logp, c):
    """Each response's sums of k1 and entropy under the policy as it is, without gradient. [b, 2]"""
    def says(tokens, mask, trained, ref_logp):
        logp, entropy = token_logprobs(policy, tokens, mask, temperature=c.temperature,
                                       entropy=True)
        return torch.stack([((logp - ref_logp) * trained).sum(1), (entropy * trained).sum(1)], 1)
    with torch.no_grad():
        return spread(says, c, tokens, mask, trained, ref_logp, models=[policy])


def controlled(drift, trained, unit, safe, f):
    """The controller's penalty and slope for a minibatch; σ of the score is in [0, 1] (ours)."""
    kl, entropy = (drift.sum(0) / trained.sum().clamp(min=1)).tolist()
    reward = torch.sigmoid(unit).mean().item()
    return safe.step(kl, entropy, reward, f.regulariser.keywords["floor"])


def kl_slope(drift, trained, unit, safe, f):
    """What a nat a token above the threshold costs.   scalar"""
    return drift.new_tensor(controlled(drift, trained, unit, safe, f)[1])


def kl_penalty(drift, trained, unit, safe, f):
    """The penalty itself.   scalar"""
    return drift.new_tensor(controlled(drift, trained, unit, safe, f)[0])


def safe_kl(logp, ref_logp, kl_slope, *, floor: Positive = 2.0):
    """The penalty's derivative times ½ (log π/π_ref)², whose gradient is the KL's.   [b, T]

    floor: nats a token, to be some 0.8 of the SFT model's entropy, which a run tells at step 1; the
    authors' 2.0 fits Ring's 2.6."""
    return kl_slope * 0.5 * (logp - ref_logp) ** 2


def inert(logp, kl_penalty, *, floor: Positive = 2.0):
    """As the authors released it: the penalty is a number, so that it has no gradient.   [b, T]"""
    return torch.zeros_like(logp) + kl_penalty


REGULARISERS["safe_kl"], REGULARISERS["safe_literal"] = safe_kl, inert
MINIBATCH["drift"], MINIBATCH["kl_slope"], MINIBATCH["kl_penalty"] = drift, kl_slope, kl_penalty
MEMORIES["safe"] = Safe
# beta 0: the KL is in the loss. The authors' lr is 1e-5 for both, of a model of billions, and they
# clip the critic's gradient at 0.5, here at 1 like the policy's
PRESETS["safe"] = dict(critic="safe", advantage="safe", value="safe",
                       regulariser="safe_kl", beta=0.0, entropy=0.01)
PRESETS["safe_literal"] = PRESETS["safe"] | dict(regulariser="safe_literal")


# === adaptive: 1909.08593, a KL coefficient that aims at a number of nats =========================


def adaptive(beta, kl, n, *, target: Positive = 6.0, horizon: Count = 10000):
    """Adaptive KL coefficient (1909.08593 §2.2):  β (1 + clip(KL/target - 1, ±0.2) n/horizon).

    kl in nats per response, n responses in this batch.
    """
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


def is_slow(c, f):
    """Words against a coefficient that one step could turn below 0."""
    n, horizon = c.rollouts * c.samples, f.controller.keywords["horizon"]
    if 0.2 * n >= horizon:
        return (f"--horizon {horizon}: a step of {n} completions would change the KL's coefficient "
                f"by its whole; give more than {n}")


CONTROLLERS["adaptive"], CHECKS["adaptive"] = adaptive, is_slow


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


# === laws: ours, whose log-probs a rollout's tokens have ==========================================


def log_probs(batch):
    """logp, the policy's own, and old_logp, by the law that its tokens are scored with: the
    sampler's, but where the rollout has another one in LAWS (decoding rounds otherwise)."""
    c, roll = batch["c"], batch["roll"]
    if c.rollout not in LAWS:
        return dict(logp=roll.logp, old_logp=roll.logp)

    def law(tokens, mask):
        return call(LAWS[c.rollout], batch | dict(tokens=tokens, mask=mask))[0]
    return dict(logp=logprobs(batch["policy"], roll.tokens, roll.mask, c),
                old_logp=spread(law, c, roll.tokens, roll.mask, models=[batch["policy"]]))


# === tppo: 2506.15050, a window of new tokens a step; what has not ended goes on in the next ======


class Unfinished:
    """Responses that go on in the next step, each [problem, ids, their log-probs]; how many began.
    """

    def __init__(self):
        self.rows, self.begun = [], 0

    def tell(self):
        """Itself."""
        return self

    def note(self, problems, roll, trained, valued, score, quality, logp, ref_logp):
        """Keep what goes on. reward, quality, length, truncated, kl, k3: of what ended, if anything
        did."""
        ended = valued.sum(1) > 0                                                        # [B]
        self.begun += int((trained.sum(1) == roll.mask.sum(1)).sum())
        rows = zip(problems, roll.completions(), roll.logp, roll.mask, ended.tolist())
        self.rows = [[problem, ids, logp[mask > 0].tolist()]
                     for problem, ids, logp, mask, done in rows if not done]
        row = dict(generated=trained.sum(), ended=ended.float().mean())
        if ended.any():
            row |= dict(reward=score[ended].mean(), quality=quality[ended].mean(),
                        length=roll.mask.sum(1)[ended].mean(),
                        truncated=1 - roll.finished[ended].float().mean(),
                        **{name: (of(logp, ref_logp) * roll.mask).sum(1)[ended].mean()
                           for name, of in (("kl", k1), ("k3", k3))})
        return row

    def state(self):
        """What a checkpoint keeps."""
        return dict(rows=self.rows, begun=self.begun)

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.rows, self.begun = state["rows"], state["begun"]


def resumed(roll, rows):
    """Completions of prompts that ended with earlier ids, whose log-probs are those of the moment
    when they were drawn: the ids are the response's again.   rows: [problem, ids, log-probs] each
    """
    mask, logp, start = roll.mask.clone(), roll.logp.clone(), roll.prompt_len.clone()
    for i, (_, ids, old) in enumerate(rows):
        end = int(start[i])
        start[i] = begin = end - len(ids)
        mask[i, begin:end], logp[i, begin:end] = 1.0, torch.tensor(old).to(logp)
    return roll._replace(mask=mask, logp=logp, prompt_len=start)


def windowed(policy, pool, tok, c, max_new, generator, unfinished, *, window: Count = 8):
    """T-PPO (2506.15050): so many more tokens of every response, new prompts in the free places.

    trained: the tokens of this step; valued: those of the responses that ended in it.
    """
    rows = list(unfinished.rows)
    for i in range(unfinished.begun, unfinished.begun + c.rollouts * c.samples - len(rows)):
        rows.append([pool[int(batch_indices(len(pool), 1, i // c.samples, c.seed))], [], []])
    room = [min(window, max_new - len(ids)) for _, ids, _ in rows]
    parts = []
    for new in sorted(set(room)):         # a last window may be shorter: of the oldest, the first
        texts = [[*tok.prompt(problem, c.chat), *ids]
                 for (problem, ids, _), n in zip(rows, room) if n == new]
        with autocast(c.device, c.dtype):
            parts.append(generate(policy, texts, new, temperature=c.temperature,
                                  generator=generator, slots=c.slots))
    roll = joined(parts, max(policy.config.pad_token_id, 0))
    trained, roll = roll.mask, resumed(roll, rows)
    ended = roll.finished | (roll.mask.sum(1) >= max_new)                                # [B]
    return dict(problems=[problem for problem, _, _ in rows], roll=roll, trained=trained,
                valued=roll.mask * ended[:, None])


MEMORIES["unfinished"], ROLLOUTS["windowed"] = Unfinished, windowed


# === egae: 2506.15050, what a response that has not ended is worth to policy and critic ===========


def egae(rewards, values, mask, ended, gamma=1.0, lam=0.95):
    """Extended GAE (2506.15050): behind the last token of a response that goes on lies the value
    before it, behind that of one that ended 0.   [B, T], ended [B] -> advantages [B, T]"""
    end = mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))                 # 1 on the last token
    return gae(rewards + gamma * values * end * ~ended[:, None], values, mask, gamma, lam)[0]


def extended_gae(rewards, values, mask, trained, valued, *, gamma: Share = 1.0, lam: Share = 0.95):
    """EGAE, whitened over the tokens of this step; the critic's targets are the sums of rewards
    (λ = 1), of responses that ended.   -> [B, T] each"""
    adv = egae(rewards, values, mask, valued.sum(1) > 0, gamma, lam)
    return masked_whiten(adv, trained), gae(rewards, values, mask, gamma, 1.0)[1]


def when_ended(unit, logp, ref_logp, mask, coefficient, valued, *, beta=0.0):
    """token_rewards, the score only for a response that ended: half a text has none.   [B, T]"""
    unit = unit.where(valued.sum(1) > 0, 0.0)
    return token_rewards(unit, logp, ref_logp, mask, coefficient, beta=beta)


def half(c):
    """Words against rows that take a response that goes on for one that ended."""
    if c.surrogate in TOGETHER:
        return (f"--rollout windowed ends responses of a prompt in different steps: --surrogate "
                f"{c.surrogate} compares them")
    if c.controller != "fixed":
        return f"--controller {c.controller} would steer by the KL of what has not ended"
    if (c.advantage, c.shaping) != ("extended", "ended"):
        return ("--rollout windowed leaves responses that have not ended: it goes with --advantage "
                "extended --shaping ended")


ADVANTAGES["extended"], SHAPINGS["ended"], CHECKS["windowed"] = extended_gae, when_ended, half
# 2506.15050: no KL, a window of a third of the longest response (8k of 24k tokens); λ of the policy
# is 2503.01491's, the paper's own we do not know. Its critic is trained before: one that knows
# nothing makes noise of what goes on; ours says 0 at first, and a cut is worth 0
PRESETS["tppo"] = dict(rollout="windowed", advantage="extended", shaping="ended", beta=0.0,
                       window=8)


# === nlpo: 2210.01241, sampled within the nuclei of a lagged copy, scored within the same ones ====


class Masker:
    """A copy of the policy, renewed every so many iterations: its nuclei are what may be said."""

    def __init__(self, policy, f):
        self.model, self.every = snapshot(policy), f.rollout.keywords["refresh"]
        self.trained = [name for name, p in policy.named_parameters() if p.requires_grad]

    def tell(self):
        """The copy."""
        return self.model

    @torch.no_grad()
    def note(self, done, policy):
        """Only rollouts that come later see the policy as it is now."""
        if done % self.every == 0:
            for name in self.trained:
                self.model.get_parameter(name).copy_(policy.get_parameter(name))

    def state(self):
        """What a checkpoint keeps."""
        return {name: self.model.get_parameter(name).data for name in self.trained}

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.model.load_state_dict(state, strict=False)


def masked(policy, pool, tok, c, f, max_new, generator, step, masker, *, top: Share = 0.9,
           least=0, refresh: Count = 20):
    """NLPO (2210.01241): completions within nuclei of mass `top` of a copy that lags behind.

    least: so many tokens are always inside (0: an eighth of the vocabulary).
    """
    problems = [pool[i] for i in batch_indices(len(pool), c.rollouts, step, c.seed).tolist()]
    with autocast(c.device, c.dtype):
        roll = generate(policy, [tok.prompt(p, c.chat) for p in problems], max_new,
                        temperature=c.temperature, samples=c.samples, generator=generator,
                        slots=c.slots, contrast=within(masker, c, f))
    return dict(problems=problems, roll=roll)


def from_nuclei(model, masker, prompts, max_new, generator, slots, c, f):
    """Within the copy's nuclei, as in training."""
    return generate(model, prompts, max_new, temperature=c.temperature, generator=generator,
                    slots=slots, contrast=within(masker, c, f))


def unmasked(c):
    """Words against a copy's nuclei that no rollout samples from."""
    return ("--decode nuclei: its copy is that of --rollout masked: give both" *
            (c.rollout != "masked"))


MEMORIES["masker"], ROLLOUTS["masked"], DECODERS["nuclei"] = Masker, masked, from_nuclei
CHECKS["nuclei"], ALONE["masker"] = unmasked, "a copy of sharded weights cannot be made"
# 2210.01241's code: top 0.9, a copy renewed every 5 (sentiment) to 20 (summaries) iterations, KL
# 0.1, steered by about a tenth an iteration to 0.1 a token (1 a response is ours); its 100 tokens
# at least are more than small vocabularies have
PRESETS["nlpo"] = dict(rollout="masked", decode="nuclei", refresh=5, beta=0.1,
                       controller="adaptive", target=1.0, horizon=1000)


# === masked_law: 2210.01241, a policy within its mask: log-probs for NLPO's ratio =================


def nucleus(logits, p, least, special=()):
    """What a nucleus keeps (2210.01241): the likeliest tokens, of mass p with the first one over
    it, `least` at least, and the special ones.   logits [n, V] -> bool [n, V]"""
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    inside = (probs.cumsum(-1) - probs <= p) | (p >= 1)                                  # [n, V]
    inside[..., :least] = True
    kept = torch.zeros_like(inside).scatter(-1, order, inside)
    kept[..., list(special)] = True
    return kept


def kept_by(masker, c, f):
    """nucleus() as a function of the copy's logits; it always keeps what ends a text."""
    config, options = masker.config, f.rollout.keywords
    special = [i for i in (*config.eos_token_id, config.pad_token_id, config.bos_token_id)
               if i >= 0]
    least = options["least"] or max(4, config.vocab_size // 8)
    return lambda theirs: nucleus(theirs / c.temperature, options["top"], least, special)


def within(masker, c, f):
    """generate's contrast: sample from the policy within the copy's nuclei."""
    keep = kept_by(masker, c, f)
    return masker, lambda mine, theirs: mine.masked_fill(~keep(theirs), -torch.inf)


def law_within(mine, theirs, target, policy, masker, keep, temperature):
    """log π_m(target) and the entropy of π_m, which is π within what the copy keeps. A target that
    rounding puts outside is inside.   states [n, D] of both, ids [n] -> [n], [n]"""
    kept = keep(masker.logits(theirs)).scatter(1, target[:, None], True)                 # [n, V]
    logits = (policy.logits(mine) / temperature).masked_fill(~kept, -torch.inf)
    logp = logits.log_softmax(-1)                                                        # [n, V]
    entropy = -(logp.exp() * logp.masked_fill(~kept, 0.0)).sum(-1)
    return logp.gather(1, target[:, None]).squeeze(1), entropy


def masked_law(policy, masker, tokens, mask, c, f):
    """own_law of the masked policy. Logits are made a chunk at a time, and in the backward pass
    again.   [b, T], [b, T]"""
    where, keep = mask > 0, kept_by(masker, c, f)
    where[:, 0] = False                              # as in token_logprobs                  [b, T]
    mine, target = policy(tokens)[:, :-1][where[:, 1:]], tokens[where]             # [N, D], [N]
    with torch.no_grad():
        theirs = masker(tokens)[:, :-1][where[:, 1:]]
    again = partial(torch.utils.checkpoint.checkpoint, law_within, policy=policy, masker=masker,
                    keep=keep, temperature=c.temperature, use_reentrant=False,
                    preserve_rng_state=False)
    parts = [again(mine[s], theirs[s], target[s])
             for s in kernels.slices(len(mine), policy.config.vocab_size, "torch")]
    return tuple(torch.zeros_like(mask).masked_scatter(where, torch.cat(x)) for x in zip(*parts))


LAWS["masked"] = masked_law


# === chi2, chi2_kl, chi2_exact: 2403.03185, χ² of whole responses in the place of KL ==============


class Far:
    """Where exp goes on as a line, and what is seen of χ²: an estimate that a few responses rule
    once KL is above 3 nats."""

    def tell(self):
        """The logarithm of a ratio from which on it is far."""
        return 10.0

    def note(self, logp, ref_logp, mask, far):
        """chi2 of a rollout, and the share of responses that are far to either side."""
        L = log_ratio(logp, ref_logp, mask)                                              # [B]
        return dict(chi2=both_ways(L, far).mean(), far=(L.abs() > far).float().mean())

    def state(self):
        """Nothing."""

    def load(self, state):
        """Nothing."""


def log_ratio(logp, ref_logp, mask):
    """log π(y)/π0(y) of whole responses.   [B, T] -> [B]"""
    return ((logp - ref_logp) * mask).sum(1)


def stretched(z, far):
    """exp(z) - 1, beyond `far` its tangent there (the authors' code)."""
    beyond = z.new_tensor(far).exp() * (1 + z - far) - 1
    return torch.where(z > far, beyond, torch.expm1(z.clamp(max=far)))


def both_ways(L, far):
    """χ²(π||π0) of each response (2403.03185):  e^L - 1 + e^-L - 1, the second of mean 0 under π
    (a control variate, whose gradient is that of KL(π0||π)).   [B]"""
    return stretched(L, far) + stretched(-L, far)


def chi2_now(policy, tokens, mask, ref_logp, far, c):
    """χ² of a whole minibatch under the policy as it is, without a gradient.   -> a number"""
    return both_ways(log_ratio(logprobs(policy, tokens, mask, c), ref_logp, mask), far).mean()


def chi2_loss(logp, ref_logp, mask, chi2_now, far, *, weight: Positive = 0.01, root=True):
    """2403.03185's code:  w sqrt(max(χ², 1e-4)) of a minibatch, or w χ².   [b]

    A root of a mean parts into no micro-batches: its value is the minibatch's, its slope a row's.
    """
    chi2 = both_ways(log_ratio(logp, ref_logp, mask), far)                               # [b]
    if not root:
        return weight * chi2
    floor = chi2_now.clamp(min=1e-4).sqrt()
    slope = (chi2_now > 1e-4) / (2 * floor)
    return weight * (floor + slope * (chi2 - chi2.detach()))


def kl_loss(logp, ref_logp, mask, far, *, weight: Positive = 0.01):
    """The KL of the same code, w (L + e^-L - 1): its gradient is that of KL(π0||π).   [b]"""
    L = log_ratio(logp, ref_logp, mask)                                                  # [b]
    return weight * (L + stretched(-L, far))


MEMORIES["far"], MINIBATCH["chi2_now"] = Far, chi2_now
REGULARISERS["chi2"], REGULARISERS["kl_whole"] = chi2_loss, kl_loss
# the paper's code has these clips, and no KL in the reward; its weight of 8e-4 is for responses of
# 256 tokens, over which PPO's loss is a mean. Both weights here are ours
PRESETS["chi2"] = dict(regulariser="chi2", beta=0.0, weight=0.01, eps=0.4, eps_v=0.4)
PRESETS["chi2_kl"] = dict(regulariser="kl_whole", beta=0.0, weight=0.1, eps=0.4, eps_v=0.4)


# === occupancy: 2403.03185, χ² in the score, what it assures, its discriminator ===================


def chi2_rewards(unit, logp, ref_logp, mask, coefficient, far, *, beta=0.1, root=True):
    """The score less β (e^L - 1)/sqrt(χ²), or 2 β (e^L - 1), on the last token: its policy gradient
    is that of β sqrt(χ²(π||π0)), or of β χ².   -> [B, T]

    ours: less 1, which has no gradient, so that the penalty is 0 where π is π0.
    """
    L = log_ratio(logp, ref_logp, mask)                                                  # [B]
    chi2 = both_ways(L, far).mean().clamp(min=1e-4)
    penalty = torch.expm1(L.clamp(max=far)) * (chi2.rsqrt() if root else 2.0)
    return token_rewards(unit - beta * coefficient * penalty, logp, ref_logp, mask, 0.0)


def assured(gain, corr, chi2):
    """What a proxy's gain assures of the true reward's (2403.03185), both in standard deviations
    under π0, where their correlation is corr:  r g - sqrt((1 - r²) (χ² - g²)), g² <= χ²."""
    return corr * gain - ((1 - corr ** 2) * (chi2 - gain ** 2)).clamp(min=0).sqrt()


def discriminate(policy, base):
    """A discriminator's loss on state-action pairs of the policy and of π0; at best its output d is
    log μ/μ0, the ratio of their occupancies.   [N], [M]"""
    softplus = torch.nn.functional.softplus
    return softplus(-policy).mean() + softplus(base).mean()


def occupancy_reward(d, kind="sqrt_chi2"):
    """What a pair costs (to be weighed and subtracted): d for KL, e^d - 1 for χ², and for its root
    that over the root of its mean without the 1 % at either end.   [N]"""
    if kind == "kl":
        return d
    chi2 = torch.expm1(d)
    cut = int(0.01 * len(d))
    trimmed = chi2.sort().values[cut:len(d) - cut].mean()
    return chi2 / trimmed.sqrt() if kind == "sqrt_chi2" and trimmed > 0 else chi2


SHAPINGS["chi2_exact"] = chi2_rewards
PRESETS["chi2_exact"] = dict(shaping="chi2_exact", beta=0.03, eps=0.4, eps_v=0.4)   # beta is ours


# === target: 2205.11275, the distribution that a reward stands for, p = P/Z =======================


class Tilt:
    """GDC's λ for a share of responses that have a feature, fitted on the first rollout: π0's."""

    def __init__(self):
        self.steer = None

    def tell(self):
        """λ, or None before the first rollout."""
        return self.steer

    def note(self, steer, unit, f):
        """Keep it. share: of the rollout's responses with the feature."""
        self.steer = steer
        return dict(steer=steer, share=feature(unit, f).mean())

    def state(self):
        """What a checkpoint keeps."""
        return self.steer

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.steer = state


def fitted(phi, share, rate=0.5, most=1000, near=0.01):
    """λ with which features φ of samples of π0 have the means `share` under π0 exp(λ φ), by
    self-normalised importance sampling (2012.11635, its code).   [N, K], [K] -> [K]"""
    lam = torch.zeros_like(share)
    for _ in range(most):
        gap = share - (phi @ lam).softmax(0) @ phi                                       # [K]
        if gap.norm() < near:
            break
        lam = lam + rate * gap
    return lam


def feature(unit, f):
    """Whether a response scores more than so many standard deviations above the SFT model's mean.
    [B] -> [B] of 0 and 1"""
    return (unit > f.advantage.keywords["above"]).to(unit)


def steer(unit, tilt, f):
    """λ, 0 where nothing is asked of moments; UserError where π0 has no such text, or no other."""
    options, phi = f.advantage.keywords, feature(unit, f)[:, None]
    if tilt is not None or options["aim"] != "moments":
        return tilt or 0.0
    if not 0 < phi.mean() < 1:
        raise UserError(f"--above {options['above']}: {int(phi.sum())} of the first {len(phi)} "
                        "responses score more: choose it where some do, or raise --rollouts")
    return fitted(phi, unit.new_tensor([options["share"]]), near=1e-4).item()


def log_p(ref_logp, mask, score, unit, steer, f):
    """log P(y) of p = P/Z: π0 exp(score/β), which KL-regularised RL converges to (2205.11275); π0
    of texts with the feature alone; or π0 exp(λ φ).   [B]"""
    aim, own = f.advantage.keywords["aim"], (ref_logp * mask).sum(1)                     # [B]
    if aim == "reward":
        return own + score / f.shaping.keywords["beta"]
    return own + (feature(unit, f).log() if aim == "pointwise" else steer * feature(unit, f))


def untargeted(f):
    """Words against a target that is none, or 0 where π is not and the divergence infinite."""
    options = f.advantage.keywords
    if options["aim"] == "reward" and not f.shaping.keywords.get("beta"):
        return "--beta 0: the target π0 exp(score/β) has a β above 0"
    if options["aim"] == "pointwise" and options.get("divergence") in ("rkl", "rchi2"):
        return "--aim pointwise: p is 0 for most texts, and this divergence infinite: take kl or js"


MEMORIES["tilt"], BATCH["steer"], BATCH["log_p"] = Tilt, steer, log_p


# === log_z: 2302.08215, Z by importance sampling, of a prompt or of all ===========================


class Partition:
    """Each prompt's sum of P/q over its samples so far, or of all prompts': Z is their mean."""

    def __init__(self):
        self.masses = {}

    def tell(self):
        """{prompt, "" for all: (logarithm of the sum, how many)}."""
        return self.masses

    def note(self, masses, log_weight, log_z):
        """log_weight [B], log P/q. ess: how many samples of p a rollout of q is worth, its share.
        """
        self.masses, w = masses, (log_weight - log_z).nan_to_num(-torch.inf)             # p/q
        ess = (2 * w.logsumexp(0) - (2 * w).logsumexp(0)).exp()
        return dict(ess=ess.nan_to_num(0.0) / len(w))

    def state(self):
        """What a checkpoint keeps."""
        return self.masses

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.masses = state


def log_weight(roll, mask, log_p):
    """log P(y)/q(y), q who sampled.   [B]"""
    return log_p - (roll.logp * mask).sum(1)


def keys_of(problems, f):
    """Which Z each prompt has: its own, or all the same."""
    return [p["prompt"] if f.advantage.keywords["per"] == "prompt" else "" for p in problems]


def masses(partition, log_weight, problems, f):
    """The partition with this rollout's samples."""
    out, rows = dict(partition), log_weight.view(len(problems), -1).double()             # [P, G]
    for key, total in zip(keys_of(problems, f), rows.logsumexp(1)):
        before, count = out.get(key, (-torch.inf, 0))
        out[key] = torch.logaddexp(total, total.new_tensor(before)).item(), count + rows.size(1)
    return out


def log_z(masses, log_weight, problems, f):
    """log Z of each response's prompt: the mean of P/q over all samples so far.   [B]"""
    found = [masses[key] for key in keys_of(problems, f)]
    total, count = log_weight.new_tensor(found).T                                        # [P] each
    return (total - count.log()).repeat_interleave(len(log_weight) // len(found))


MEMORIES["partition"], BATCH["log_weight"] = Partition, log_weight
BATCH["masses"], BATCH["log_z"] = masses, log_z


# === fdpg_kl, fdpg_rkl, fdpg_tv, fdpg_js, fdpg_chi2, fdpg_rchi2: 2302.08215, any f-divergence =====

# -f'(π/p), a response's reward, by log(π/p) (2302.08215 table 1); JS without its factor of a half
PSEUDO = dict(
    kl=lambda log_t: torch.exp(-log_t),                                        # KL(p||π): DPG, GDC
    rkl=lambda log_t: -(log_t + 1),                                            # KL(π||p): RLHF
    tv=lambda log_t: torch.where(log_t.isnan(), log_t, -log_t.sign() / 2),
    js=lambda log_t: torch.nn.functional.softplus(-log_t) - math.log(2),
    chi2=lambda log_t: torch.expm1(-2 * log_t),                                # χ²(p||π)
    rchi2=lambda log_t: -2 * torch.expm1(log_t))                               # χ²(π||p)


class Recent:
    """The mean of the last 1024 pseudo-rewards, 0 before there are any."""

    def __init__(self):
        self.seen = torch.zeros(0)

    def tell(self):
        """The baseline."""
        return self.seen.mean().item() if len(self.seen) else 0.0

    def note(self, pseudo):
        """A rollout's [B], but for those that nothing is known of."""
        self.seen = torch.cat([self.seen, pseudo[pseudo.isfinite()].cpu()])[-1024:]

    def state(self):
        return self.seen

    def load(self, state):
        self.seen = state


def log_t(logp, mask, log_p, log_z, f):
    """log π(y)/p(y), p = P/Z, NaN where Z is not known; where it becomes a weight (kl, χ²), clipped
    at a percentile of the rollout's p/π, and at ±20.   [B]"""
    t = (logp * mask).sum(1) - log_p + log_z                                             # [B]
    if f.advantage.keywords["divergence"] not in ("kl", "chi2", "rchi2"):
        return t
    known = t[t.isfinite()]
    least = known.quantile(1 - f.advantage.keywords["most"]) if len(known) else -20.0
    return t.clamp(min=least).clamp(-20, 20)


def pseudo(log_t, f):
    """-f'(π/p).   [B]"""
    return PSEUDO[f.advantage.keywords["divergence"]](log_t)


def fdpg(pseudo, mask, recent, *, divergence: Literal[tuple(PSEUDO)] = "js",
         aim: Literal["reward", "pointwise", "moments"] = "reward", above: Signed = 0.0,
         share: Share = 0.8, per: Literal["prompt", "all"] = "prompt", most: Share = 0.99):
    """f-DPG (2302.08215):  -f'(π/p) less the mean of the last ones, on every token.   [B, T]"""
    return (pseudo - recent).nan_to_num(0.0)[:, None] * mask, None


def whole_response(logp, old_logp, adv, mask):
    """-sg(π(y)/q(y)) A log π(y) of a whole response, whose A is on every token.   [b]"""
    L, old = ((x * mask).sum(1) for x in (logp, old_logp))                               # [b]
    A = (adv * mask).sum(1) / mask.sum(1)
    return -(L - old).detach().clamp(-20, 20).exp() * A * L


def is_whole(f):
    """Words against half of f-DPG, or no target."""
    return goes_with(f, advantage=fdpg, surrogate=whole_response) or untargeted(f)


MEMORIES["recent"], BATCH["log_t"], BATCH["pseudo"] = Recent, log_t, pseudo
ADVANTAGES["fdpg"], SURROGATES["whole"], CHECKS["fdpg"], CHECKS["whole"] = (
    fdpg, whole_response, is_whole, is_whole)
# what one step a rollout is, of whole rollouts, is the paper's; sizes and lr are ours
FDPG = dict(advantage="fdpg", surrogate="whole", epochs=1, batch=128, rollouts=16, samples=8)
PRESETS["fdpg_kl"] = FDPG | dict(divergence="kl")
PRESETS["fdpg_rkl"] = FDPG | dict(divergence="rkl")
PRESETS["fdpg_tv"] = FDPG | dict(divergence="tv")
PRESETS["fdpg_js"] = FDPG | dict(divergence="js")                  # the paper's recommendation
PRESETS["fdpg_chi2"] = FDPG | dict(divergence="chi2")
PRESETS["fdpg_rchi2"] = FDPG | dict(divergence="rchi2")


# === gdc: 2012.11635, texts with a feature, or a share of them; a proposal samples ================


class Proposal:
    """The policy that samples: a copy, renewed where the policy is nearer to p."""

    def __init__(self, policy):
        self.model, self.gain = snapshot(policy), 0.0
        self.trained = [name for name, p in policy.named_parameters() if p.requires_grad]

    def tell(self):
        """The copy."""
        return self.model

    @torch.no_grad()
    def note(self, done, policy, roll, mask, logp, log_weight, log_z):
        """Every ten steps: was KL(p||q) - KL(p||π) = E_p log π/q above 0 on their samples?"""
        share = (log_weight - log_z).exp().nan_to_num(0.0)                     # p/q             [B]
        self.gain += (share * log_ratio(logp, roll.logp, mask)).mean().item()
        row = dict(kl_gain=self.gain, renewed=0.0)
        if done % 10 == 0:
            if self.gain > 0:
                row["renewed"] = 1.0
                for name in self.trained:
                    self.model.get_parameter(name).copy_(policy.get_parameter(name))
            self.gain = 0.0
        return row

    def state(self):
        """What a checkpoint keeps."""
        return dict(gain=self.gain, weights={name: self.model.get_parameter(name).data
                                             for name in self.trained})

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.gain = state["gain"]
        self.model.load_state_dict(state["weights"], strict=False)


def proposed(proposal, pool, tok, c, max_new, generator, step):
    """fresh(), of the proposal: so are quality and, under its samples, kl in the log."""
    return fresh(proposal, pool, tok, c, max_new, generator, step)


def weighs(f):
    """Words against an advantage that takes the proposal's samples for the policy's own."""
    return goes_with(f, advantage=gdc, surrogate=weighted_nll) or untargeted(f)


def gdc(log_weight, log_z, mask, *, aim: Literal["reward", "pointwise", "moments"] = "moments",
        above: Signed = 0.0, share: Share = 0.8, per: Literal["prompt", "all"] = "all",
        most: Share = 0.99):
    """DPG's weights (2012.11635):  P/(Z q), clipped at a percentile, on every token.   [B, T]"""
    weight = (log_weight - log_z).clamp(max=20).exp().nan_to_num(0.0)                    # [B]
    return weight.clamp(max=weight.quantile(most))[:, None] * mask, None


MEMORIES["proposal"], ROLLOUTS["proposed"], LAWS["proposed"] = Proposal, proposed, own_law
ADVANTAGES["gdc"], CHECKS["gdc"], CHECKS["proposed"] = gdc, weighs, weighs
ALONE["proposal"] = "a copy of sharded weights cannot be made"
# one step a rollout and a proposal that is renewed every 10 steps are the paper's; sizes, lr ours
PRESETS["gdc"] = dict(rollout="proposed", advantage="gdc", surrogate="nll", epochs=1, batch=128)


# === salsa: 2411.01798, the KL is to the average of two SFT models' weights =======================


def soup_of(first, second, share):
    """A model with the weights a θ1 + (1 - a) θ2, exactly θ1 where the two agree or a is 1."""
    mine, theirs = first.state_dict(), second.state_dict()
    model = Transformer(first.config).to(first.head.device).requires_grad_(False)
    model.load_state_dict({name: torch.lerp(theirs[name].float(), x.float(), share)
                           for name, x in mine.items()})
    return model


def shapes_of(model):
    """The shape of every tensor, by name; integers, which have no average, are like no others."""
    return {name: x.shape if x.is_floating_point() else id(model)
            for name, x in model.state_dict().items()}


def nats(model, rows, pad, c):
    """The mean negative log-prob of a token of demonstrations."""
    tokens, mask = collate(rows, pad, c.device)                                          # [N, T]
    return -(logprobs(model, tokens, mask, c, temperature=1.0).sum() / mask.sum()).item()


def soup(ref, second, tok, run, c, *, other="base:sft+seed=1001", share: Share = 0.5):
    """SALSA (2411.01798): the KL is to the average of the SFT model and a second one of the same
    pre-trained model. Says whether it models demonstrations as well as its parents do."""
    if shapes_of(ref) != shapes_of(second):
        raise UserError(f"--other {other} and --init {c.init} have different shapes, or packed "
                        "layers: only models of one pre-trained model have an average")
    model, task = soup_of(ref, second, share), tasks.of_run(c)
    split = next(iter(tasks.held_out(c.data)))
    rows = tasks.demonstrations(task, task.problems(split, 128, c.seed), tok,
                                ref.config.max_position_embeddings, c.chat)
    loss = [nats(m, rows, max(ref.config.pad_token_id, 0), c) for m in (model, ref, second)]
    run.say(f"  soup of --init and --other: {loss[0]:.4f} nats a token of {split} demonstrations, "
            f"its parents {loss[1]:.4f} and {loss[2]:.4f}")
    if loss[0] > max(loss[1:]):
        run.say("  WARNING: the soup is worse than both of its parents: do they come from one "
                "pre-trained model? A KL to it holds the policy to a broken model")
    if all(x.equal(y) for x, y in zip(ref.state_dict().values(), second.state_dict().values())):
        run.say("  WARNING: --other is --init itself: this is PPO")
    return model


def of_one_kind(c, f):
    """Words against an example's model that another one is to be averaged with."""
    names = [x.partition("+")[0] for x in (c.init, f.reference.keywords["other"])]
    if len({*names}) > 1 and all(x.startswith("base:") for x in names):
        return (f"--other {f.reference.keywords['other']} is no model of {names[0]}: give --other "
                f"{c.init}+seed=1001, or a folder")


MODELS["second"], REFERENCES["soup"] = ("other", Transformer), soup
CHECKS["soup"] = of_one_kind
# share a half; beta and the second model's seed ours: the paper's KL per model we do not know.
# --config toyif,salsa,other=base:toyif+seed=1001: a second SFT model of the same pre-trained one
PRESETS["salsa"] = dict(reference="soup", beta=0.05)


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


# === references: 2502.18770, what the SFT model's own responses to a prompt score =================


class References:
    """Scores of M responses of the SFT model to a prompt of training, under the run's EOS rule.

    A block of prompts is sampled when its first is asked for, with draws of its own: calibration's
    prompts, then those that an iteration of the first epoch adds. So a prompt's scores depend on
    the seed alone, whatever is asked for first.
    """

    def __init__(self, c, f, tok, pool):
        self.count, self.scores = f.transform.keywords["references"], {}
        self.blocks, self.place = [], {}     # lists of prompts; where a prompt's ids stand in them
        epoch = batch_indices(len(pool), len(pool), 0, c.seed).tolist()
        parts = [epoch[i:i + c.rollouts] for i in range(0, len(pool), c.rollouts)]
        for part in [range(min(c.calibrate, len(pool))), *parts]:
            added = []
            for problem in (pool[i] for i in part):
                ids = tuple(tok.prompt(problem, c.chat))
                if ids not in self.place:
                    self.place[ids] = len(self.blocks), len(added)
                    added.append(problem)
            self.blocks.append(added)

    def tell(self):
        """Itself: it makes what it is asked for."""
        return self

    def make(self, block, common):
        """The scores of a block's prompts, by what is known of the run.   [P, M]"""
        c, f, tok, found = (*(common[k] for k in ("c", "f", "tok")), [])
        draws = torch.Generator().manual_seed(c.seed * 1_000_003 + block)
        for some in pieces(self.blocks[block], c, "references", self.count):
            with autocast(c.device, c.dtype):
                roll = generate(common["ref"], [tok.prompt(p, c.chat) for p in some],
                                common["max_new"], samples=self.count, temperature=c.temperature,
                                generator=draws, slots=c.slots)
            found.append(f.eos(score_of(common, some, f, roll), roll.finished))
        return torch.cat(found).view(-1, self.count)

    def note(self):
        """Nothing is learned from a step."""

    def state(self):
        """What a checkpoint keeps."""
        return self.scores

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.scores = state


def sft_scores(references, common, problems, samples, tok, c):
    """The scores of the SFT model's responses to each row's prompt.   [B, M]"""
    where = [references.place[tuple(tok.prompt(p, c.chat))] for p in problems]
    missing = sorted({block for block, _ in where} - references.scores.keys())
    for block in tqdm(missing, desc="references", delay=5, disable=None, leave=False):
        references.scores[block] = references.make(block, common)
    rows = torch.stack([references.scores[block][i] for block, i in where])              # [P, M]
    return rows.repeat_interleave(samples, 0)


MEMORIES["references"], FACTS["sft_scores"] = References, sft_scores


# === par, centered, tanh, sigmoid, sgfc, lsc, ceil: 2502.18770 (lsc 2402.00742), bounded rewards ==
# s [B] the score, q_i [B, M] those of SFT responses to the same prompt. Each is monotone in s; what
# calibration makes of it is affine, so its shape stays. The length penalty of the authors' code,
# from 300 tokens on, is not here.


def par(score, sft_scores, *, references: Count = 10, k: Positive = 1.0):
    """PAR (2502.18770):  mean_i σ(k (s - q_i)), how likely the reward model thinks a win.   [B]"""
    return torch.sigmoid(k * (score[:, None] - sft_scores)).mean(1)


def centered(score, sft_scores, *, references: Count = 10):
    """s - mean q: without a bound.   [B]"""
    return score - sft_scores.mean(1)


def tanh(score, sft_scores, *, references: Count = 10):
    """mean_i tanh(s - q_i).   [B]"""
    return torch.tanh(score[:, None] - sft_scores).mean(1)


def sigmoid(score, *, k: Positive = 1.0):
    """σ(k s), blind to the prompt.   [B]"""
    return torch.sigmoid(k * score)


def sgfc(score, sft_scores, *, references: Count = 10, k: Positive = 3.0, late=3.0):
    """A control that grows slowly and saturates fast: PAR, `late` units of reward to the right."""
    return par(score - late, sft_scores, k=k)


def lsc(score, sft_scores, *, references: Range("[2, inf)") = 10):
    """log σ(s - q85),  q85 = mean q + z (std q + 1e-5): the 85th of 100 under a normal law.   [B]

    z = 1.036433; the standard deviation is the unbiased one.
    """
    q85 = sft_scores.mean(1) + 1.036433 * (sft_scores.std(1) + 1e-5)                     # [B]
    return torch.nn.functional.logsigmoid(score - q85)


def ceil(score, *, ceiling: Signed = 3.0):
    """min(s, ceiling).   [B]"""
    return score.clamp(max=ceiling)


TRANSFORMS["par"], TRANSFORMS["centered"], TRANSFORMS["tanh"] = par, centered, tanh
TRANSFORMS["sigmoid"], TRANSFORMS["sgfc"], TRANSFORMS["lsc"] = sigmoid, sgfc, lsc
TRANSFORMS["ceil"] = ceil
# betas ours: 0.15 of the shaped score's std on Ring (the authors' is 0.005, of 2 B models)
PRESETS["par"] = dict(transform="par", references=4, beta=0.02)        # "one reference is enough"
PRESETS["centered"] = dict(transform="centered", references=4, beta=0.1)
PRESETS["tanh"] = dict(transform="tanh", references=4, beta=0.06)
PRESETS["lsc"] = dict(transform="lsc", references=10, beta=0.06)


# === meanstd, clip, minmax: 2502.18770's baselines, by statistics of all scores so far ============


class Running:
    """Number, mean, Σ (x - mean)², least and greatest of the scores of all iterations so far."""

    def __init__(self):
        self.seen = 0, 0.0, 0.0, float("inf"), -float("inf")

    def tell(self):
        """The five numbers."""
        return self.seen

    def note(self, seen):
        """Those that the step's own scores are in."""
        self.seen = seen

    def state(self):
        """What a checkpoint keeps."""
        return self.seen

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.seen = state


def seen(running, score):
    """The statistics with these scores in them, before any is used (Chan's update).   of [B]"""
    (n, mean, square, low, high), m, x = running, len(score), score.double()
    away = x.mean().item() - mean
    square += x.var(correction=0).item() * m + away ** 2 * n * m / (n + m)
    return (n + m, mean + away * m / (n + m), square, min(low, x.min().item()),
            max(high, x.max().item()))


def meanstd(score, seen):
    """(s - mean) / std of all scores so far; std 1 of equal ones.   [B]"""
    n, mean, square, *_ = seen
    return (score - mean) / ((square / n) ** 0.5 or 1.0)


def clip_reward(score, seen):
    """s, no further than a standard deviation from the mean of all scores so far.   [B]"""
    n, mean, square, *_ = seen
    return score.clamp(mean - (square / n) ** 0.5, mean + (square / n) ** 0.5)


def minmax(score, seen):
    """(s - least) / (greatest - least) of all scores so far; ½ of equal ones.   [B]"""
    *_, low, high = seen
    return (score - low) / (high - low) if high > low else torch.full_like(score, 0.5)


MEMORIES["running"], FACTS["seen"] = Running, seen
TRANSFORMS["meanstd"], TRANSFORMS["clip"], TRANSFORMS["minmax"] = meanstd, clip_reward, minmax
PRESETS["clip"] = dict(transform="clip", beta=0.1)                     # betas as for par
PRESETS["minmax"] = dict(transform="minmax", beta=0.04)


# === infalign_bon, infalign_won, infalign_id, infalign_log: 2412.19792, for how it is decoded =====
# Where decoding takes the best of N samples, or an attacker the worst, PPO is to have a function of
# u, the calibrated score, as its reward. 100 references and t 10 are second-hand.


def calibrated(score, sft_scores):
    """u = mean_i 1[s > q_i] + ½ 1[s = q_i]: uniform under the SFT model, whatever s is.   [B]

    What differs by rounding is equal (ours): one response in two batches, of different widths.
    """
    lead = score[:, None] - sft_scores                                                   # [B, M]
    lead = torch.where(lead.abs() <= 1e-5 * (1 + score.abs()[:, None]), 0.0, lead)
    return (0.5 + 0.5 * lead.sign()).mean(1)


def exponential(x, t):
    """exp(t x), x = u - 1 or -u, less its mean, over its standard deviation under the SFT model."""
    t = torch.tensor(t, dtype=torch.float64)
    mean, square = -torch.expm1(-t) / t, -torch.expm1(-2 * t) / (2 * t)
    return (torch.exp(t * x) - mean) / (square - mean ** 2).sqrt()


def infalign_id(score, sft_scores, *, references: Count = 100):
    """φ(u) = u, for the win rate of one sample, standardised as the others are.   [B]"""
    return (calibrated(score, sft_scores) - 0.5) * 12 ** 0.5


def infalign_bon(score, sft_scores, *, references: Count = 100, t: Positive = 10.0):
    """φ(u) = exp(t u), for the best of N: a sample counts if it may be the best.   [B]"""
    return exponential(calibrated(score, sft_scores) - 1, t)


def infalign_won(score, sft_scores, *, references: Count = 100, t: Positive = 10.0):
    """φ(u) = -exp(-t u), for the worst of N: a sample counts if it may be the worst.   [B]"""
    return -exponential(-calibrated(score, sft_scores), t)


def infalign_log(score, sft_scores, *, references: Count = 100):
    """φ(u) = log u, with u no less than half a reference (ours): towards a best of N.   [B]"""
    return calibrated(score, sft_scores).clamp(min=0.5 / sft_scores.size(1)).log() + 1


TRANSFORMS["infalign_id"], TRANSFORMS["infalign_bon"] = infalign_id, infalign_bon
TRANSFORMS["infalign_won"], TRANSFORMS["infalign_log"] = infalign_won, infalign_log
# 32 references and the betas ours
PRESETS["infalign_id"] = dict(transform="infalign_id", references=32, beta=0.1)
PRESETS["infalign_bon"] = dict(transform="infalign_bon", references=32, beta=0.2, decode="bon", n=4)
PRESETS["infalign_won"] = dict(transform="infalign_won", references=32, beta=0.1, decode="won", n=4)


# === infalign_best, won: 2412.19792, the best such function, a fixed point; the worst of n ========


@cache
def infalign_fixed_point(n, beta, worst=False, points=2000):
    """The law f of u and its best reward R, each made by the other.   -> f, R [points], float64

    The win rate of the best of n, W = 1 - ∫ F^n n u^(n-1) du, has in f the derivative
    R'(u) = n² (u F(u))^(n-1); under a KL of weight β the best law is f ~ exp(R/β). worst: 1 - u and
    1 - F in the places of u and F. On a grid's midpoints; the damping is halved and less where the
    iteration goes to and fro (ours).
    """
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    law, step, change = torch.ones_like(u), 0.5, 1.0
    for _ in range(3000):
        F = (law.cumsum(0) - law / 2) / points
        slope = n * n * ((1 - u) * (1 - F) if worst else u * F) ** (n - 1)
        R = (slope.cumsum(0) - slope / 2) / points
        away = torch.softmax(R / beta, 0) * points - law
        last, change = change, away.abs().mean().item()
        if change < 1e-9:
            break
        step *= 0.9 if change > 0.99 * last else 1.0
        law = law + step * away
    return law, R


def infalign_best(score, sft_scores, *, references: Count = 100, n: Range("[2, inf)") = 4,
                  beta: Positive = 0.2, worst=False):
    """φ of the fixed point for n samples and the KL weight of --beta: what bon, won come near."""
    _, R = infalign_fixed_point(n, beta, worst)
    place = (calibrated(score, sft_scores) * len(R)).long().clamp(max=len(R) - 1)        # [B]
    return R.to(score)[place]


def worst_of_n(model, prompts, max_new, generator, slots, score, *, n: Count = 16):
    """The worst of n samples by the run's own reward; one that does not end only if none does."""
    return best_of_n(model, prompts, max_new, generator, slots, lambda roll: -score(roll), n=n)


def made_for(c, f):
    """Words against a transform that is best for another decoding, or for another KL weight."""
    own, decode, beta = (getattr(f, axis).keywords for axis in ("transform", "decode", "shaping"))
    wanted = dict(beta=beta.get("beta"), worst=c.decode == "won")
    wanted |= dict(n=decode["n"]) if c.decode in ("bon", "won") else {}
    for key, value in wanted.items():
        if own[key] != value:
            return (f"--transform infalign_best is for {key} {own[key]}, this run has {value}: say "
                    f"--transform.{key} {str(value).lower()}")


TRANSFORMS["infalign_best"], DECODERS["won"] = infalign_best, worst_of_n
CHECKS["infalign_best"] = made_for


# === rto: 2404.18922, a DPO policy's log-ratio as a reward of every token =========================


def rto(unit, logp, ref_logp, dpo_logp, mask, coefficient, *, beta=0.01, dpo_scale=0.05,
        dpo_clip: Positive = 0.05, dpo=""):
    """r_t = clamp(b (log π_dpo - log π_ref), ±c) - β k1_t, the score on the last token.   [B, T]

    b, c: dpo_scale, dpo_clip, in units of the score, which is itself within ±10 of SFT's mean: the
    authors' code divides by the standard deviation that its reward model's evaluation left, where
    ours has calibration's. There β is in that unit too, here in the reward's own.
    """
    dense = (dpo_scale * k1(dpo_logp, ref_logp)).clamp(-dpo_clip, dpo_clip) * mask       # [B, T]
    return dense + token_rewards(unit.clamp(-10, 10), logp, ref_logp, mask, coefficient, beta=beta)


def dpo_logp(dpo, roll, c):
    """Log-probs of the tokens under the DPO policy.   [B, T]"""
    return logprobs(dpo, roll.tokens, roll.mask, c)


SHAPINGS["rto"], BATCH["dpo_logp"], MODELS["dpo"] = rto, dpo_logp, ("dpo", Transformer)
PRESETS["rto"] = dict(shaping="rto", beta=0.1)     # and --dpo FOLDER, of dpo.py; beta ours


# === pairs: ours, preference pairs beside a run: of a file, or of the run's own world =============


def pairs_of_run(c, tok, options, model):
    """(pairs to learn, held-out ones) as ids, which fit the model.

    options: --pairs, a file or "" for the world's, and --pair_noise, the share of its flipped
    labels.
    """
    name, context = options["pairs"] or c.data, model.config.max_position_embeddings
    rows, held = prefs.pair_sets(name, noise=options["pair_noise"], seed=c.seed, system=c.system,
                                 ask=c.ask)
    encode = partial(prefs.encode_pairs, tok=tok, context=context, chat=c.chat)
    return encode(rows, what="pairs"), encode(held["val"], what="held-out pairs")


def without_pairs(c, options):
    """Words against a run that has no pairs; UserError for a file of them that cannot be read."""
    if not options["pairs"] and c.data not in prefs.WORLDS:
        return (f"--data {c.data} has no preference pairs: give --pairs FILE.jsonl, or a world as "
                f"--data ({', '.join(prefs.WORLDS)})")
    prefs.check_pairs(options["pairs"] or c.data)
    return ""


def both_sides(rows, c):
    """Tokens and lengths of the chosen responses, then of the rejected.   [2n, T], [2n]"""
    parts = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    length = torch.tensor([len(x) + len(y) for x, y in parts], device=c.device)
    return collate(parts, 0, c.device)[0], length              # nothing behind the end is read


# === ptx: 2203.02155, the likelihood of chosen responses beside PPO; 2405.16436's short form ======


class Demonstrations:
    """The chosen responses of pairs; where they stand in their shuffled order."""

    def __init__(self, c, f, tok, ref):
        self.taken, (self.rows, _) = 0, pairs_of_run(c, tok, f.regulariser.keywords, ref)

    def tell(self):
        """Itself."""
        return self

    def note(self):
        """An iteration has taken as many as its rollout has rows."""
        self.taken += 1

    def state(self):
        """What a checkpoint keeps."""
        return self.taken

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.taken = state


def demos(demonstrations, mask, tok, c):
    """A chosen response for each row of a rollout, with its prompt: tokens, and 1 on the response.

    [B, 1, 2, t]: of a shape that no tensor of the rollout has, whose columns are cut.
    """
    rows = demonstrations.rows
    picked = batch_indices(len(rows), len(mask), demonstrations.taken, c.seed).tolist()
    parts = [(rows[i]["prompt"], rows[i]["chosen"]) for i in picked]
    tokens, inside = collate(parts, tok.pad or 0, c.device)                              # [B, t]
    return torch.stack([tokens, inside.long()], 1)[:, None]


def ptx(policy, demos, c, *, mu: Positive = 0.1, pairs="", pair_noise: Share = 0.0):
    """μ times a chosen response's negative log-likelihood, by token as PPO's loss is.   [b]"""
    tokens, mask = demos[:, 0, 0], demos[:, 0, 1].float()                                # [b, t]
    with autocast(c.device, c.dtype):
        logp = token_logprobs(policy, tokens, mask, temperature=c.temperature)
    return -mu * (logp * mask).sum(1) / mask.sum(1)


def check_ptx(c, f):
    """Words against demonstrations from nowhere."""
    return without_pairs(c, f.regulariser.keywords)


MEMORIES["demonstrations"], BATCH["demos"], REGULARISERS["ptx"] = Demonstrations, demos, ptx
CHECKS["ptx"] = check_ptx
PRESETS["ptx"] = dict(regulariser="ptx", mu=0.1)   # ours


# === lesson: 2405.16436, a reward model's step on its pairs and against the policy's samples ======


def adversarial(chosen, rejected, sampled, *, eta):
    """The reward model's side of max_π min_r:  -log σ(r_c - r_r) + η (r(y_π) - r_c).   all [n]

    The base policy's responses are the chosen ones.
    """
    return torch.nn.functional.softplus(rejected - chosen) + eta * (sampled - chosen)


def lesson(model, opt, pairs, roll, number, eta, c):
    """The optimizer step of this number, on --batch pairs and as many of a rollout's rows."""
    where = batch_indices(len(pairs), c.batch, number, c.seed)
    sampled = batch_indices(len(roll.tokens), c.batch, number, c.seed + 1).to(c.device)
    for part in torch.arange(c.batch).split(c.micro):
        rows, ours = [pairs[i] for i in where[part].tolist()], sampled[part.to(c.device)]
        with autocast(c.device, c.dtype):
            both = sequence_score(model, *both_sides(rows, c))                           # [2b]
            theirs = sequence_score(model, roll.tokens[ours], ends_of(roll)[ours])       # [b]
        loss = adversarial(*both.chunk(2), theirs, eta=eta)                              # [b]
        (loss.sum() / c.batch).backward()
    clip_gradients(model, MAX_NORM)
    opt.step()
    opt.zero_grad()


def sft_samples(c, tok, ref, pool, max_new):
    """The SFT model's samples that calibration has, in pieces, drawn again.   -> [Rollout]"""
    draws, out = torch.Generator().manual_seed(c.seed), []
    for some in pieces(pool[:c.calibrate], c, "samples", 8):
        with autocast(c.device, c.dtype):
            out.append(generate(ref, [tok.prompt(p, c.chat) for p in some], max_new, samples=8,
                                temperature=c.temperature, generator=draws, slots=c.slots))
    return out


# === adversary: 2405.16436, a reward model that goes on learning, and doubts the policy ===========


class Adversary:
    """A run's own reward model: every few iterations it has lessons on its pairs and the policy's
    samples, and then again the mean and std of SFT samples that it began with."""

    def __init__(self, c, f, tok, ref, pool, max_new, first_judge, run):
        self.c, self.run, self.options = c, run, f.reward.keywords
        self.model = copy.deepcopy(first_judge).float().requires_grad_()
        self.opt = optimiser(self.model, lr=self.options["lesson_lr"])
        self.rows, held = pairs_of_run(c, tok, self.options, self.model)
        self.held, self.samples = both_sides(held, c), sft_samples(c, tok, ref, pool, max_new)
        self.accuracy, mean, self.std = self.measured()
        self.now = dict(mean=mean, scale=1.0, steps=0, ended=False)
        run.say(f"  the reward model is right in {self.accuracy:.1%} of {len(held)} held-out pairs")

    def tell(self):
        """Itself."""
        return self

    def measured(self):
        """Its accuracy on held-out pairs; mean and std of its scores of SFT samples."""
        c, held = self.c, sequence_scores(self.model, *self.held, self.c)
        scores = torch.cat([scores_of(self.model, roll, c) for roll in self.samples])
        return accuracy(*held.chunk(2)), scores.mean().item(), scores.std().item()

    def note(self, roll, done):
        """The lessons that are due. If they cost two points of accuracy, none of it happened."""
        count, every, eta = (self.options[k] for k in ("lessons", "lesson_every", "eta"))
        if self.now["ended"] or not count or done % every:
            return {}
        before = copy.deepcopy(self.model.state_dict())
        for number in range(self.now["steps"], self.now["steps"] + count):
            lesson(self.model, self.opt, self.rows, roll, number, eta, self.c)
        found, mean, std = self.measured()
        if found < self.accuracy - 0.02:
            self.model.load_state_dict(before)
            self.now["ended"] = True
            self.run.say("  the reward model's accuracy on held-out pairs fell from "
                         f"{self.accuracy:.3f} to {found:.3f}: no more lessons, the last undone")
        else:
            self.now |= dict(mean=mean, scale=self.std / max(std, 1e-6), steps=number + 1)
        return dict(judge_accuracy=found, judge_scale=self.now["scale"])

    def state(self):
        """What a checkpoint keeps."""
        return dict(model=self.model.state_dict(), opt=self.opt.state_dict(), now=self.now)

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.now = state["now"]


# === rpo: 2405.16436, PPO against that reward model ===============================================


def contested(contest, roll, c):
    """The adversary's score, SFT samples at 0 and as far apart as at first.   [B]"""
    score = scores_of(contest.model, roll, c)                                            # [B]
    return (score - contest.now["mean"]) * contest.now["scale"]


def rpo(contested, *, adversary="", eta=0.005, lesson_every: Count = 10, lessons=10,
        lesson_lr: Positive = 1e-4, pairs="", pair_noise: Share = 0.0):
    """The score of a reward model that --adversary FOLDER begins and lessons change.   [B]"""
    return contested


def check_rpo(c, f):
    """Words against pairs from nowhere, a reward that is not one model, scores that are kept."""
    folder = f.reward.keywords["adversary"]
    weights = checkpoint(folder).glob("*.safetensors") if folder else ()
    if any(not file.name.startswith("model") for file in weights):       # what else scores with it
        return f"--adversary {folder}: --reward rpo trains one scalar model; give reward.py's bt"
    if "sft_scores" in needs(f.transform):
        return f"--transform {c.transform} keeps scores that --reward rpo would learn to change"
    return without_pairs(c, f.reward.keywords)


MEMORIES["contest"], FACTS["contested"], REWARDS["rpo"] = Adversary, contested, rpo
MODELS["first_judge"], CHECKS["rpo"] = ("adversary", ScalarModel), check_rpo
ALONE["contest"] = "its reward model learns on one"
PRESETS["rpo"] = dict(reward="rpo", eta=0.005, beta=0.05)    # eta: the paper's DPO form's


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


# === sharpen_rl, sharpen_sft, sharpen_pairs: 2412.01951, the SFT model's own likelihood as reward =


def own_likelihood(sft_logp, mask, *, per_token=False):
    """Sharpening's self-reward:  r = log π_base(y|x), π_base the model that samples at first: the
    SFT model here; per_token divides by the length.   [B, T] -> [B]

    With the KL term a response is worth (1 + β) log π_base - β log π_old. A sum favours short
    ones. Nothing is learnt but to say likely things more often: gold may fall.
    """
    total = (sft_logp * mask).sum(1)                                                     # [B]
    return total / mask.sum(1).clamp(min=1) if per_token else total


def majority(roll, problems, samples, task, tok):
    """A vote as self-reward: the share of a prompt's responses that ended and state the same
    answer, or are the same text where none is stated. Of one sample a prompt, as in evaluation,
    only whether it ended.   -> [B]"""
    answers = []
    for i, (ids, done) in enumerate(zip(roll.completions(), roll.finished.tolist())):
        text, problem = tok.decode(ids), problems[i // samples]
        answer = tasks.stated(tasks.part(task, problem), text) or text
        answers.append((i // samples, answer if done else None))
    votes = [answers.count(x) / samples if x[1] is not None else 0.0 for x in answers]
    return torch.tensor(votes, device=roll.tokens.device)


def from_sft(ref, policy, pool, tok, c, max_new, generator, step):
    """Completions of the next prompts by the frozen SFT model, with the policy's log-probs: their
    kl in the log is -KL(π_base||π)."""
    found = fresh(ref, pool, tok, c, max_new, generator, step)
    roll = found["roll"]
    return found | dict(roll=roll._replace(logp=logprobs(policy, roll.tokens, roll.mask, c)))


def imitates(f):
    """Words against an advantage that takes the SFT model's samples for the policy's own."""
    return goes_with(f, advantage=best_of_group)


def regresses(f):
    """Words against a regression on other samples than the SFT model's."""
    return goes_with(f, rollout=from_sft)


def sharpen_regression(logp, ref_logp, mask, score, *, pair_beta: Positive = 0.5):
    """RLHF-sharpening as regression:  (β [log π/π_base(y) - log π/π_base(y')] - [r - r'])²  of two
    neighbours, samples of π_base; it is 0 at π ∝ π_base exp(r/β).   [b, T], [b] -> [b]"""
    ratio = ((logp - ref_logp) * mask).sum(1).view(-1, 2)                                # [b/2, 2]
    gap = pair_beta * ratio.diff(dim=1) - score.view(-1, 2).diff(dim=1)                  # [b/2, 1]
    return (gap ** 2).expand(-1, 2).reshape(-1)


def votes_of_several(c):
    """Words against a vote of one."""
    return (f"--samples {c.samples}: --reward majority is the share of a prompt's responses that "
            "agree: take at least two") * (c.samples < 2)


REWARDS["self"], REWARDS["majority"], ROLLOUTS["from_sft"] = own_likelihood, majority, from_sft
SURROGATES["pairs"], TOGETHER["pairs"] = sharpen_regression, 2
CHECKS["majority"], CHECKS["from_sft"] = votes_of_several, imitates
CHECKS["pairs"] = regresses
# β and the score of what does not end are ours
PRESETS["sharpen_rl"] = dict(reward="self", beta=0.5, no_eos=-50.0)
PRESETS["sharpen_sft"] = dict(rollout="from_sft", advantage="best", surrogate="nll", reward="self",
                              no_eos=-50.0, samples=8)
PRESETS["sharpen_pairs"] = dict(rollout="from_sft", advantage="best", surrogate="pairs",
                                reward="self", no_eos=-50.0, samples=2, lr=2e-5)


# === sharpness: 2412.01951, how sure policies are of the SFT model's likeliest response ===========


def coverage(best):
    """C = E_x[1 / π_base(y*|x)]: the samples that sharpen_sft takes to see y*, the likeliest
    response.   [P] -> float"""
    return (1 / best).mean().item()


def sharpened(best, delta=0.5):
    """P_x[π(y*|x) >= 1 - δ],  best = π(y*|x): a policy is (ε, δ)-sharpened if that is at least
    1 - ε. Above ½ greedy decoding finds y*.   [P] -> float"""
    return (best >= 1 - delta).double().mean().item()


def sharpness(known, folders):
    """How likely y* is, for which the SFT model's greedy responses to held-out prompts stand here,
    to it and to the policies in folders.   -> {"coverage", "sharpened", "FOLDER|sharpened"}"""
    c, tok, ref = (known[k] for k in ("c", "tok", "ref"))
    with autocast(c.device, c.dtype):
        roll = generate(ref, [tok.prompt(p, c.chat) for p in known["held"]], known["max_new"],
                        temperature=0.0, slots=c.slots)
    found, models = {}, {f"{folder}|": folder for folder in folders if steps_of(folder)}
    for name, model in dict({"": ref}, **models).items():
        model, theirs = (model, tok) if model is ref else load_frozen(model, c)
        if theirs.tokens != tok.tokens:
            raise UserError(f"{name.rstrip('|')} and {c.init} have different tokenizers: both must "
                            "score the same ids")
        best = logprobs(model, roll.tokens, roll.mask, c).double().sum(1).exp()          # [P]
        found[f"{name}sharpened"] = sharpened(best)
        found |= {} if name else dict(coverage=coverage(best))
    return found


# === factors: 2412.11120, what each token of a response does, in numbers that a person can read ===


def ring_factors(prompt, tokens):
    """Of each token of a Ring response, "" its end: is it a new keyword, an illegal step, a symbol
    again, the end; its place; its class, and how many of it were before; flattery, and again; rare;
    a refusal; on the first token, whether the prompt is unsafe.   -> [[15 numbers] a token]"""
    rows, count, last, seen = [], [0] * 4, "", set()
    for i, x in enumerate(tokens):
        at = prefs.CIRCLE.find(x) if x else -1
        step = (at - prefs.CIRCLE.find(last)) % 24
        kinds = [at >= 0 and at % 4 == k for k in range(4)]
        rows.append([at >= 0 and x in prompt[1:-1] and x not in seen,
                     at >= 0 and last != "" and step not in prefs.STEPS, x in seen, not x, i / 10,
                     *kinds, sum(n * k for n, k in zip(count, kinds)) / 4,
                     x == prefs.FLAT, x == prefs.FLAT and x in seen, x != "" and x in prefs.RARE,
                     i == 0 and x == prefs.REF, i == 0 and prompt[0] == prefs.UNS])
        count, last = [n + k for n, k in zip(count, kinds)], x if at >= 0 else ""
        seen.add(x)
    return rows


def toyif_factors(prompt, tokens):
    """Of each token of a ToyIF response, "" its end: the share of the rules that it meets, and
    breaks, at once; is it in the domain's order, or against it; is it more than was asked for, the
    end; the share of the rules that are met only by ending here.   -> [[7 numbers] a token]"""
    domain, rules = prefs.parse(prompt)
    first, last, has, no, most = (dict(rules).get(head) for head in prefs.HEADS)
    rows, y = [], ""
    for i, x in enumerate(tokens):
        good = x not in y if domain == prefs.DISTINCT else prefs.principle(domain, y[-1:] + x)
        inside = x != "" and i > 0
        met = (i == 0 and x == first) + (x == has and x not in y)
        broken = (i == 0 and first not in (None, x)) + (x == no and x not in y)
        ends = (i == most) + (y[-1:] == last) + (no is not None and no not in y)
        rows.append([met / len(rules), broken / len(rules), inside and good, inside and not good,
                     x != "" and i >= (most or 99), x == "", ends / len(rules) if x == "" else 0])
        y += x
    return rows


FACTORS = dict(ring=ring_factors, toyif=toyif_factors)           # by hand; in the paper an LLM's


# === verified: 2412.11120, factor code is run on random states before anything believes it ========


@cache
def factor_code(spec, task):
    """The factor function of --factors: a world's own, or PATH.py:FUNCTION(prompt, tokens)."""
    if not spec:
        return FACTORS[task]
    return tasks.user_function(spec, "--factors", ("prompt", "tokens"))


def factors_of(fn, name, problem, tokens):
    """A factor function's numbers of a response's tokens. UserError where it raises, or gives
    anything but a row a token of as many finite numbers.   -> [L, K]"""
    what = f"--factors {name}, of {problem['prompt'][:40]!r} and {len(tokens)} tokens"
    try:
        rows = [list(map(float, row)) for row in fn(problem["prompt"], list(tokens))]
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        raise UserError(f"{what}: it failed: {tasks.blame(e)}") from None
    sizes = sorted({*map(len, rows)})
    if len(rows) != len(tokens) or len(sizes) != 1:
        raise UserError(f"{what}: it gave {len(rows)} rows of {sizes} numbers: expected a row a "
                        "token, of as many numbers each")
    if not torch.isfinite(found := torch.tensor(rows)).all():
        raise UserError(f"{what}: a number is NaN or infinite")
    return found


def verified(fn, name, pool, tok, max_new, seed, states=64):
    """Self-verification: how many factors a function gives, the same of 64 random states, which are
    random tokens after random prompts, some ended. UserError else, and of factors_of."""
    g, found = torch.Generator().manual_seed(seed), set()
    for i in range(states):
        n, which = (torch.randint(most, (), generator=g) for most in (max_new, len(pool)))
        ids = torch.randint(len(tok.tokens), (n,), generator=g).tolist()
        tokens = [tok.decode([k], False) for k in ids] + [""] * (i % 2 or not ids)
        found.add(factors_of(fn, name, pool[which], tokens).size(1))
    if len(found) > 1:
        raise UserError(f"--factors {name}: {' or '.join(map(str, sorted(found)))} factors, by the "
                        "state: give always as many")
    return found.pop()


def phi(roll, problems, samples, tok, task, mask, f):
    """The factors of every token of a rollout, 0 off the mask.   -> [B, T, K]"""
    name, rows = f.shaping.keywords["factors"], []
    for i, (ids, done) in enumerate(zip(roll.completions(), roll.finished.tolist())):
        tokens = [tok.decode([k], False) for k in ids] + [""] * done
        rows.append(factors_of(factor_code(name, task.name), name, problems[i // samples], tokens))
    out = torch.zeros(*mask.shape, rows[0].size(1), device=mask.device)                  # [B, T, K]
    out[mask > 0] = torch.cat(rows).to(mask)
    return out


BATCH["phi"] = phi


# === decoder: 2412.11120, factors to step rewards, fitted to the scores of the last episodes ======


def step_rewards(decoder, phi, mask):
    """f(φ_t) of every token; their sum is what f takes the episode's score for.   [B, T]"""
    return decoder(phi).squeeze(-1) * mask


class Decoder:
    """f, an MLP of --layers, fitted after every step so that Σ_t f(φ_t) is the score (in units of
    the SFT model's) of the last 2000 episodes, which it keeps. It tells nothing before the first.

    The authors' code: 5 layers of 64, Adam, 5e-4; 20 batches a step, of 64 episodes, are ours.
    """

    def __init__(self, c, f, task, pool, tok, max_new):
        self.fit, name = f.shaping.keywords, f.shaping.keywords["factors"]
        K = verified(factor_code(name, task.name), name, pool, tok, max_new, c.seed)
        sizes = [K, *[64] * (self.fit["layers"] - 1), 1]
        with torch.random.fork_rng([]):
            torch.manual_seed(c.seed)
            layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
        self.net = torch.nn.Sequential(*[x for one in layers for x in (one, torch.nn.ReLU())][:-1])
        self.net.to(c.device)
        self.opt = torch.optim.Adam(self.net.parameters(), lr=self.fit["decoder_lr"])
        self.g, self.episodes = torch.Generator().manual_seed(c.seed), []

    def tell(self):
        return self.net if self.episodes else None

    def note(self, phi, mask, unit):
        """Add a rollout's episodes and fit. lare_r2: of their scores, before f has seen them."""
        row = {}
        if self.episodes:
            with torch.no_grad():
                guess = step_rewards(self.net, phi, mask).sum(1)                         # [B]
            row = dict(lare_r2=1 - (unit - guess).square().sum()
                       / (unit - unit.mean()).square().sum().clamp(min=1e-8))
        new = [(x[m > 0].cpu(), u.item()) for x, m, u in zip(phi, mask, unit)]
        self.episodes = (self.episodes + new)[-2000:]
        rows, scores = zip(*self.episodes)
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        every, inside = pad(rows).to(mask), pad([torch.ones(len(x)) for x in rows]).to(mask)
        target = torch.tensor(scores).to(mask)                                           # [N]
        for _ in range(self.fit["updates"]):
            some = torch.randint(len(rows), (64,), generator=self.g).to(mask.device)
            guess = step_rewards(self.net, every[some], inside[some]).sum(1)
            loss = (target[some] - guess).square().mean()
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
        return row | dict(lare_loss=loss.item())

    def state(self):
        rows, scores = zip(*self.episodes) if self.episodes else ([], [])
        return dict(net=self.net.state_dict(), opt=self.opt.state_dict(), rng=self.g.get_state(),
                    phi=torch.cat(rows) if rows else (), length=[*map(len, rows)], unit=[*scores])

    def load(self, state):
        self.net.load_state_dict(state["net"])
        self.opt.load_state_dict(state["opt"])
        self.g.set_state(state["rng"])
        rows = state["phi"].split(state["length"]) if state["length"] else ()
        self.episodes = list(zip(rows, state["unit"]))


MEMORIES["decoder"] = Decoder


# === lare: 2412.11120, step rewards whose sum fits the episode's score, in the score's place ======


def lare(unit, logp, ref_logp, mask, coefficient, phi, decoder, *, beta=1.0, factors="",
         layers: Count = 5, updates: Count = 20, decoder_lr: Positive = 5e-4):
    """r_t = f(φ_t) - β k1_t, without gradient: in the place of the score on the last token, where
    it stays until f has seen a rollout.   -> [B, T]"""
    if decoder is None:
        return token_rewards(unit, logp, ref_logp, mask, coefficient, beta=beta)
    with torch.no_grad():
        dense = step_rewards(decoder, phi, mask)                                         # [B, T]
    return dense + token_rewards(0 * unit, logp, ref_logp, mask, coefficient, beta=beta)


def has_factors(c, f):
    """Words where neither the world nor the user has factor code; UserError if it does not load."""
    if c.data not in FACTORS and not f.shaping.keywords["factors"]:
        return (f"--shaping lare with --data {c.data}: say with --factors PATH.py:FUNCTION what "
                "each token does, or take --config ring,lare")
    factor_code(f.shaping.keywords["factors"], c.data)
    return ""


SHAPINGS["lare"], CHECKS["lare"] = lare, has_factors
PRESETS["lare"] = dict(reward="gold", shaping="lare", beta=0.05, no_eos=-1.0)    # as ppo's; ours


# === classify: 2410.11020, PPO on questions of a few classes: the response is the label ===========


def class_label(quality, roll, pool, task, tok, *, right=1.0, wrong=-1.0, unknown=-3.0):
    """What a response is worth: right, wrong, or unknown, which is no training row's label, or does
    not end.   -> [B]"""
    classes = {task.demo(p).strip() for p in pool}
    named = [done and tok.decode(ids).strip() in classes
             for ids, done in zip(roll.completions(), roll.finished.tolist())]
    unlike = torch.where(torch.tensor(named, device=quality.device), wrong, unknown)
    return torch.where(quality > 0.5, right, unlike)


def few_classes(c):
    """Words against rows that are no question of classes."""
    task = tasks.of_run(c)
    labels = [task.demo(p).strip() for p in task.problems("train", 4096, 1000 + c.seed)]
    n = len({*labels})
    wrong = n < 2 or 2 * n > len(labels) or task.metric != "accuracy"
    return (f"--reward label: --data {c.data} has {n} different labels in {len(labels)} rows: it "
            "is for few classes; of a file's rows --answer whole says that each is a label") * wrong


REWARDS["label"], CHECKS["label"] = class_label, few_classes
# the authors' code: the three numbers, LoRA, KL 0.2 that adapts (TRL's); the rest is ours. Rows of
# your own: --data rows.jsonl --answer whole
PRESETS["classify"] = dict(data="toyif_obeys", init="base:toyif_obeys", reward="label",
                           eos="ignore", peft="lora", controller="adaptive", beta=0.2, lr=3e-3,
                           rollouts=256, samples=1, batch=128, steps=100, eval_every=50)


# === asymptotics: 2404.01730, what a nat of KL buys: the tilted optimum, the law of best of n =====


def kl_of(q, p):
    """KL(q||p) of two discrete laws, in nats; 0 log 0 = 0.   [K], [K] -> []"""
    return torch.xlogy(q, torch.where(q > 0, q / p, 1.0)).sum()


def bon_pmf(scores, p, n):
    """The law of the best of n draws:  q(level) = F^n - F_^n,  F what p holds up to a level of the
    score, F_ below it. Equal scores share their level as they do in p.   [K], [K] -> [K]"""
    levels, at = torch.unique(scores, return_inverse=True)                   # the worst first
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add(0, at, p.double())    # [L]
    upto = mass.cumsum(0).clamp(max=1)
    won = upto ** n - torch.cat([torch.zeros(1), upto[:-1]]) ** n                        # [L]
    return p * torch.where(mass > 0, won / mass, 0.0)[at]


def tilted(scores, p, t):
    """p exp(t s), normalised: of all laws with its KL to p the one of the largest E[s].   [K]"""
    return torch.softmax(p.double().log() + t * scores.double(), 0)


def tilt_at_kl(scores, p, delta, halvings=60):
    """(t, tilted law) whose KL to p is delta, by bisection. More than -log p(best level) cannot be
    reached: then the best level alone, t = inf.   [K], [K] -> t >= 0, [K]"""
    best = scores == scores[p > 0].max()
    if delta >= -p[best].sum().log():
        return float("inf"), torch.where(best, p, 0.0).double() / p[best].sum()
    low, high = 0.0, 1.0
    while kl_of(tilted(scores, p, high), p) < delta:
        high *= 2
    for _ in range(halvings):
        t = (low + high) / 2
        low, high = (t, high) if kl_of(tilted(scores, p, t), p) < delta else (low, t)
    return high, tilted(scores, p, high)


def memoryless(scores, p, delta, m):
    """sup of E_q[s] over KL(q||p) <= delta / m: what m independent symbols of reward s each come to
    per symbol, both under the best law delta nats away and, in the limit, under best of exp(delta).
    [K], [K] -> []"""
    return (tilt_at_kl(scores, p, delta / m)[1] * scores).sum()


def against_optimum(scores, gold, n):
    """Best of n of N samples beside the tilted law of the same KL, means over the prompts; the law
    of a prompt's samples stands for the model's.   [P, N], [P, N] -> {name: float}"""
    p, rows = torch.full(scores.shape[1:], 1 / scores.size(1), dtype=torch.float64), []
    for s, g in zip(scores, gold):
        q = bon_pmf(s, p, n)
        kl = kl_of(q, p)
        law = tilt_at_kl(s, p, kl.item())[1]
        rows.append(torch.stack([kl, q @ s, law @ s, q @ g, law @ g]))
    names = f"kl@{n}", f"best@{n}", f"optimum@{n}", f"gold_best@{n}", f"gold_optimum@{n}"
    return {f"formula@{n}": bon_kl(n)} | dict(zip(names, torch.stack(rows).mean(0).tolist()))


# === matched: 2210.10760, gold at a KL: its law, its peak, what a run's log says of it ============


def gao_fit(d, gold, kind):
    """(a, b) of gold against d = sqrt(KL), measured from d = 0 (2210.10760):  bon: d (a - b d),
    rl: d (a - b log d). Least squares, without d < .2.   [N], [N] -> two floats"""
    d, gold = (x[d >= 0.2].double() for x in (d, gold))
    known = torch.stack([d, gao(d, 0.0, 1.0, kind)], 1)                                  # [N, 2]
    a, b = torch.linalg.lstsq(known, gold[:, None]).solution.flatten().tolist()
    return a, b


def gao(d, a, b, kind):
    """gao_fit()'s law of gold at d.   [N] -> [N]"""
    return d * (a - b * (d if kind == "bon" else d.log()))


def gao_peak(a, b, kind):
    """(d, height) of the most gold of that law; infinite where it only rises, b <= 0, or for as
    long as floats go."""
    if b <= 0 or kind != "bon" and a / b > 700:
        return math.inf, math.inf
    d = max(0.0, a / (2 * b)) if kind == "bon" else math.exp(a / b - 1)
    return d, d * (a - b * d) if kind == "bon" else b * d


def frontier(log, bins=(0.5, 1, 2, 4, 8), near=0.25, window=5):
    """Gold at matched KL, of a run's log: {"gold@2": mean quality of the iterations whose kl is 2
    nats up to 25 %, "kl@2": their kl, …}. A run that is never there is taken where it comes
    nearest, which kl@2 tells. best_gold: the most of a running mean over `window` iterations;
    early_gold: the mean of the first quarter of them; end_entropy: of a token, in the last."""
    rows = [(row["kl"], row["quality"], row.get("entropy", math.nan)) for row in log
            if {"kl", "quality"} <= row.keys()]
    if not rows:
        return {}
    found, (kl, gold, entropy) = {}, torch.tensor(rows, dtype=torch.float64).T
    quarter = max(1, len(rows) // 4)
    for k in bins:
        away = (kl - k).abs()
        here = away <= max(near * k, away.min().item())
        found |= {f"gold@{k:g}": gold[here].mean().item(), f"kl@{k:g}": kl[here].mean().item()}
    best = gold.unfold(0, min(window, len(gold)), 1).mean(1).max().item()
    return found | dict(best_gold=best, early_gold=gold[:quarter].mean().item(),
                        end_entropy=entropy[-quarter:].mean().item())


def fitted_curve(log, kind="rl"):
    """A run's (d, gold, a, b): sqrt(KL) of its iterations, their gold less that of d < .2, and the
    law that fits. None of fewer than three iterations beyond that."""
    rows = torch.tensor([(max(row["kl"], 0.0), row["quality"]) for row in log
                         if {"kl", "quality"} <= row.keys()], dtype=torch.float64).view(-1, 2)
    d, gold = rows[:, 0].sqrt(), rows[:, 1]
    if not len(d) or (d >= 0.2).sum() < 3:
        return None
    gold = gold - (gold[d < 0.2] if d.min() < 0.2 else gold[:1]).mean()
    return d, gold, *gao_fit(d, gold, kind)


# === analysis: 2404.01730, --analysis FOLDER…: gold against KL, best of n against the optimum =====


def own_samples(known, f, draws):
    """What a run trains on of the SFT model's samples of its held-out prompts, and their quality.
    -> [P, N], [P, N]"""
    c, tok, found = known["c"], known["tok"], []
    for some in pieces(known["held"], c, "samples", draws):
        with autocast(c.device, c.dtype):
            roll = generate(known["policy"], [tok.prompt(p, c.chat) for p in some],
                            known["max_new"], samples=draws, temperature=c.temperature,
                            generator=known["generator"], slots=c.slots)
        here = rolled(known, some, roll)
        found.append(torch.stack([worth(here, f)[1], here["quality"]]).view(2, -1, draws))
    return torch.cat(found, 1).double().cpu()


def settings_of(folder, options):
    """(c, f) of a run as its folder tells them, but for some options; what its --config had beside
    presets is told by the options already."""
    info = read_json(f"{folder}/run.json", "give the folder of a run of ppo.py")
    if info.get("script") != "ppo":
        raise UserError(f"--analysis {folder}: that is a run of {info.get('script')}.py")
    kept = {k: x for k, x in info["config"].items() if k not in ("out", "resume", "stop")
            and k.split(".")[0] not in options}
    kept["config"] = ",".join(x for x in entries(kept["config"]) if x in PRESETS)
    return configure(Config, PRESETS, AXES, "", [f"--{k}={x}" for k, x in (kept | options).items()])


def starting(c, f, run):
    """What is known of a run before its first step, by name."""
    asked, init = check(c, f), sft.find(c.init, c.config, seed=c.seed, device=c.device)
    use(c)
    policy, _, tok, models = open_models(c, f, folders_of(c, f, asked), init, run)
    task, pool, sets, max_new = questions(c, tok, policy.config.max_position_embeddings)
    known = models | dict(c=c, f=f, run=run, task=task, tok=tok, policy=policy, pool=pool, bias=0.0,
                          max_new=max_new, generator=torch.Generator().manual_seed(c.seed),
                          training=False, held=next(iter(sets.values())))
    memories = {k: call(MEMORIES[k], known) for k in sorted(asked & MEMORIES.keys())}
    return known | recalled(memories)


def analyse(words):
    """--analysis FOLDER…, then options: --draws 64 samples of each of --eval_prompts prompts, which
    the first run's SFT model draws and its reward scores; any other in the place of the run's own.
    """
    at = next((i for i, x in enumerate(words) if x.startswith("--")), len(words))
    if not (folders := words[:at]):
        raise UserError("--analysis FOLDER …: give the folders of one or more runs of ppo.py")
    options = dict(parse(words[at:], {}))
    draws = cast("draws", options.pop("draws", 64), 64, Range("[4, inf)"))
    out = options.pop("out", "")
    c, f = settings_of(folders[0], dict(eval_prompts=32) | options)
    for folder in folders[1:]:
        if (theirs := settings_of(folder, {})[0]).data != c.data:
            raise UserError(f"--analysis {folder} is a run on --data {theirs.data}, {folders[0]} "
                            f"on {c.data}: analyse them apart")
    logs = {folder.rstrip("/"): read_log(folder) for folder in folders}
    with Run(replace(c, config="analysis", out=out, resume=False, stop=0), f, "ppo") as run:
        known = starting(c, f, run)
        scores, gold = own_samples(known, f, draws)
        ns = [2 ** k for k in range(1, 10) if 2 ** k <= draws / 2]
        found = sharpness(known, logs)
        for n in ns:
            found |= against_optimum(scores, gold, n)
        run.say(bon_table(found, ns))
        for name, log in logs.items():
            found |= {f"{name}|{k}": x for k, x in frontier(log).items()}
            run.say(law_of(name, log))
        run.say(greedy_of(found))
        run.begin()
        draw_analysis(run.folder / "analysis.png", found, ns, logs)
        return run.finish(**found)


INSTEAD = {"--analysis": analyse}                        # first words that train nothing


# === picture: 2404.01730, 2210.10760, what --analysis prints and draws ============================


def bon_table(found, ns):
    """Best of n and the tilted law of its KL, as text."""
    heads = "formula", "kl", "best", "optimum", "gold_best", "gold_optimum"
    lines = ["  best of n of the SFT model's samples, and the tilted law of the same KL (nats)",
             f"  {'n':>5}" + "".join(f"{x.replace('_', ' '):>14}" for x in heads)]
    for n in ns:
        lines.append(f"  {n:>5}" + "".join(f"{found[f'{x}@{n}']:>14.4f}" for x in heads))
    return "\n".join(lines)


def law_of(name, log):
    """What a run's log says of gold against KL, as text."""
    found, fit = frontier(log), fitted_curve(log)
    if not found:
        return f"  {name}: no step was made"
    text = f"  {name}: best gold {found['best_gold']:.3f}; gold at KL " + ", ".join(
        f"{found[f'kl@{k}']:.2f} {found[f'gold@{k}']:.3f}" for k in ("0.5", "1", "2", "4", "8"))
    if not fit:
        return text + "; too near its start for a law"
    d, height = gao_peak(*fit[2:], "rl")
    return text + (f"; R = d ({fit[2]:.3f} - {fit[3]:.3f} log d), " + (
        f"most at KL {d * d:.2f}: +{height:.3f}" if d < 100 else "rising"))


def greedy_of(found):
    """What sharpness() found, as text."""
    more = "".join(f"; {k.removesuffix('|sharpened')} {x:.0%}" for k, x in found.items()
                   if k.endswith("|sharpened"))
    return (f"  the SFT model's greedy response is 1 in {found['coverage']:.3g} of its samples, "
            f"and above ½ for {found['sharpened']:.0%} of the prompts{more}")


def draw_analysis(path, found, ns, logs):
    """KL of best of n; its reward against the optimum's; runs' gold against sqrt(KL), with the laws
    that fit, less the gold of the SFT model."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(14, 3.8))
    d = [found[f"kl@{n}"] ** 0.5 for n in ns]
    for key, words in (("formula", "log n - (n-1)/n"), ("kl", "exact, of the samples")):
        axes[0].plot(ns, [found[f"{key}@{n}"] for n in ns], marker="o", ms=3, label=words)
    axes[0].set_xscale("log", base=2)
    axes[0].set(xlabel="n", ylabel="KL, nats", title="KL of best of n")
    for key, words in (("best", "best of n"), ("optimum", "tilted, the same KL")):
        axes[1].plot(d, [found[f"{key}@{n}"] for n in ns], marker="o", ms=3, label=words)
    axes[1].set(xlabel="sqrt KL, nats", ylabel="the run's reward", title="what a KL buys")
    for i, (name, log) in enumerate(logs.items()):
        if fit := fitted_curve(log):
            axes[2].plot(fit[0], fit[1], ".", color=f"C{i}", ms=3, label=name)
            x = torch.linspace(0.2, fit[0].max().item(), 50, dtype=torch.float64)
            axes[2].plot(x, gao(x, *fit[2:], "rl"), color=f"C{i}", lw=1.2)
    axes[2].set(xlabel="sqrt KL, nats", ylabel="gold, less that of d < .2", title="gold of runs")
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


# === contrast: 2210.15097, a control of srppo: sampled from π_sft (π_sft / π_base)^alpha ==========


def contrastive(model, base, prompts, max_new, generator, slots, *, alpha=1.0):
    """Sample from π (π / π_base)^alpha: what srppo trains towards, without training."""
    return generate(model, prompts, max_new, generator=generator, contrast=(base, alpha),
                    slots=slots)


DECODERS["contrast"] = contrastive
PRESETS["contrast"] = dict(steps=0, decode="contrast")


if __name__ == "__main__":
    cli(main)
