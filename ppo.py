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
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import kernels
import sft
from data import prefs, tasks
from data.run import (Count, MeanOf, Positive, Run, Share, Training, UserError, ask, asked_by,
                      batch_indices, call, check_first_ratio, checkpoint, cli, launch, needs,
                      ranks, read_log, refuse_alone, report, rows_used, start_ranks)
from data.stats import explained_variance, rank_correlation
from model import (ADAPTERS, PEFT, ScalarModel, Transformer, Work, adapter_readers, adapter_state,
                   autocast, check_adapters, clip_gradients, critic_values, foresee, generate, load,
                   load_frozen, logprobs, masked_whiten, open_trained, passes, peek, plain_model,
                   recomputing, reference, rows_of, save, save_trained, sequence_scores, shard,
                   spread, summed, token_logprobs, token_values, with_peft)
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
    critic = load(last / "critic", c.device)[0] if last and not adapter else f.critic(ref, False)
    critic.load_state_dict(dict(adapter), strict=False)
    return recomputing(critic, c.recompute)


def write(c, policy, critic, tok, init, folder):
    """A checkpoint's folders: the policy's, and in it the critic's, unless it is kept as adapters
    or has heads of its own, which a folder does not hold."""
    save_trained(policy, tok, folder, c, init)
    if type(critic.score) is torch.nn.Linear and (c.merge or not trunk_is_shared(c)):
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


def against_sft(judge, own, roll, c, ref, max_new):
    """A model of pairs (2510.20369) as a reward:  s(y, y') = (g(y, y') - g(y', y)) / 2,  y' the SFT
    model's greedy response to the prompt. [B]

    ours: the paper's reward of y is its mean s against the other samples of a group, an advantage
    that sums to 0. A fixed y' differs by a constant of the prompt where s is a difference of
    rewards; it needs no group, and its 0 is the SFT model."""
    *marks, eos = own["marks"].tolist()
    ids = [row[:n] for row, n in zip(roll.tokens.tolist(), roll.prompt_len.tolist())]
    theirs = generate(ref, ids, max_new, temperature=0.0).completions()
    rows = []
    for x, y, other in zip(ids, roll.completions(), theirs):
        room = (judge.config.max_position_embeddings - len(x) - 3) // 2
        for a, b in ((y, other), (other, y)):
            rows.append([*x, marks[0], *a[:room], marks[1], *b[:room], eos])
    g = []
    for i in range(0, len(rows), c.micro):
        part = [torch.tensor(row, device=c.device) for row in rows[i:i + c.micro]]
        end = torch.tensor([len(row) for row in part], device=c.device)
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)                 # [b, T]
        g.append(pair_logit(judge, own, tokens, end))
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
REWARDS["PATH"], FACTS["judged"], MODELS["judge"] = learned, judged, ("reward", ScalarModel)


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


# === measured: ours, what else held-out samples are measured by, as a reward's chapter asks =======


MEASURES = {}                    # row of REWARDS: {name: function of a rollout's facts -> [B]}


def measured(known):
    """The run's own measures of a rollout, by name.   [B] each"""
    c = known["c"]
    found = {name: call(fn, known) for name, fn in MEASURES.get(c.reward, {}).items()}
    return {name: x for name, x in found.items() if x is not None}             # of another world


# === panel: ours, several reward models, each in units of how the SFT model's own samples differ ==


def reward_folders(rewards):
    """The folders of --rewards a,b,c (or a+b+c, where a comma parts options). A run that left a
    model for each group of a mixture stands for those of its last round."""
    out, rewards = [], rewards if Path(rewards).exists() else rewards.replace("+", ",")
    for folder in filter(None, rewards.split(",")):
        groups = sorted(Path(folder).glob("round-*-group-*"))
        rounds = [int(x.name.split("-")[1]) for x in groups]
        out += [str(x) for x, r in zip(groups, rounds) if r == max(rounds)] or [folder]
    return out


class Panel:
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


def components(panel, roll):
    """Each reward model's score of each response, SFT samples having mean 0 and std 1.   [B, K]"""
    mean, std = panel.unit.to(roll.mask)
    return (panel.raw(roll) - mean) / std


MEMORIES["panel"], FACTS["components"] = Panel, components


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


def panel_is_there(c, f):
    """Words against reward models that are not named; UserError for numbers that do not fit."""
    given = f.reward.keywords
    folders = reward_folders(given["rewards"])
    for folder in folders:
        peek(folder, scalar=True, option="--rewards")
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


REWARDS["weighted"], CHECKS["weighted"] = weighted, panel_is_there
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
    """-k1 of each token first, then each reward model's score on the last.   [B, T, N + 1]"""
    return torch.cat([-(k1(logp, ref_logp) * mask)[..., None], on_last(ended, mask)], -1)


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
    wrong = panel_is_there(c, f)
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
    rollout. (The authors' code goes on from the last policy.)"""

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


def served(components, f):
    """Each group's weight in this batch; β KL is the same for all, so it is not in F_u.   [U]"""
    return worst_served(components.mean(0), f.reward.keywords["softness"])


def egalitarian(components, served, *, rewards="", softness=0.0):
    """Each response's reward by the group that the batch serves worst.   [B, U] -> [B]"""
    return components @ served


def a_group_each(ended, logp, ref_logp, mask, coefficient, *, beta=0.05):
    """PPO's token rewards by every group.   [B, T, U]"""
    kl = beta * coefficient * k1(logp, ref_logp) * mask                                  # [B, T]
    return on_last(ended, mask) - kl[..., None]


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
                     advantage=gae_served, value=clipped_each) or panel_is_there(c, f)


FACTS["served"], REWARDS["egalitarian"] = served, egalitarian
SHAPINGS["groups"], CRITICS["groups"] = a_group_each, head_a_group
ADVANTAGES["groups"], VALUES["groups"] = gae_served, clipped_each
CHECKS["egalitarian"] = CHECKS["groups"] = serves_groups
MEASURES["egalitarian"] = IN_RING
# rewards: the groups of reward.py --recipe maxmin, --rewards out/reward/maxmin
PRESETS["maxmin"] = dict(reward="egalitarian", shaping="groups", critic="groups",
                         advantage="groups", value="groups", eos="subtract", no_eos=1.0)


# === quark: 2602.11661, rewards on one frozen scale, weighed by weakness, risk and redundancy =====


def tri_factor(mean, risk, corr):
    """w_k = K weak_k risk_k red_k / Σ_j …:  weak = σ(-m / .5),  red = 1 / (1 + Σ_{j≠k} corr+_kj).

    ours: the paper's forms of the three factors are unknown.   [K], [K], [K, K] -> [K]"""
    weak = torch.sigmoid(-mean / 0.5)
    shared = corr.clamp(min=0).fill_diagonal_(0).sum(1)                                  # [K]
    w = weak * risk / (1 + shared)
    return len(w) * w / w.sum()


class TriWeights:
    """Each reward's moving mean, and how the last 1024 scores correlate."""

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
CHECKS["tri"], MEASURES["tri"] = panel_is_there, IN_RING
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
    """The penalty's derivative times ½ (log π/π_ref)², whose gradient is the KL's.   [b, T]"""
    return kl_slope * 0.5 * (logp - ref_logp) ** 2


def inert(logp, kl_penalty, *, floor: Positive = 2.0):
    """As the authors released it: the penalty is a number, so that it has no gradient.   [b, T]"""
    return torch.zeros_like(logp) + kl_penalty


REGULARISERS["safe_kl"], REGULARISERS["safe_literal"] = safe_kl, inert
MINIBATCH["drift"], MINIBATCH["kl_slope"], MINIBATCH["kl_penalty"] = drift, kl_slope, kl_penalty
MEMORIES["safe"] = Safe
# beta 0: the KL is in the loss. The authors' lr is 1e-5 for both, of a model of billions
PRESETS["safe"] = dict(critic="safe", advantage="safe", value="safe",
                       regulariser="safe_kl", beta=0.0, entropy=0.01)
PRESETS["safe_literal"] = PRESETS["safe"] | dict(regulariser="safe_literal")


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
