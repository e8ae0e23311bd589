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
from typing import Literal

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import kernels
import sft
from data import tasks
from data.run import (Count, MeanOf, Positive, Run, Share, Signed, Training, UserError, ask,
                      asked_by, batch_indices, call, check_first_ratio, checkpoint, cli, launch,
                      needs, refuse_alone, report, rows_used, start_ranks)
from data.stats import explained_variance, rank_correlation
from model import (ADAPTERS, PEFT, ScalarModel, Transformer, Work, adapter_readers, adapter_state,
                   autocast, check_adapters, clip_gradients, collate, critic_values, foresee,
                   generate, joined, load, load_frozen, logprobs, masked_whiten, open_trained,
                   passes, peek, plain_model, recomputing, reference, rows_of, save, save_trained,
                   sequence_scores, shard, snapshot, spread, summed, token_logprobs, token_values,
                   with_peft)
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
                  coefficient=factor / scale["std"], **log_probs(batch),
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
    models["anchor"] = call(f.reference, models | dict(c=c, run=run, tok=tok))
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

    def note(self, problems, roll, trained, valued, score, quality):
        """Keep what goes on. reward, quality, length, truncated: of what ended, if anything did."""
        ended = valued.sum(1) > 0                                                        # [B]
        self.begun += int((trained.sum(1) == roll.mask.sum(1)).sum())
        rows = zip(problems, roll.completions(), roll.logp, roll.mask, ended.tolist())
        self.rows = [[problem, ids, logp[mask > 0].tolist()]
                     for problem, ids, logp, mask, done in rows if not done]
        row = dict(generated=trained.sum(), ended=ended.float().mean())
        if ended.any():
            row |= dict(reward=score[ended].mean(), quality=quality[ended].mean(),
                        length=roll.mask.sum(1)[ended].mean(),
                        truncated=1 - roll.finished[ended].float().mean())
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
# 0.1, steered by a tenth an iteration to 0.1 a token (1 a response is ours); its 100 tokens at
# least are more than small vocabularies have
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


# === chi2_exact, occupancy: 2403.03185, χ² in the score, what it assures, its discriminator =======


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
PRESETS["chi2_exact"] = dict(shaping="chi2_exact", beta=0.1)               # beta is ours


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

    def note(self, masses, log_weight):
        """log_weight [B], log P/q. ess: how many samples of p a rollout of q is worth, its share.
        """
        self.masses = masses
        ess = (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp()
        return dict(ess=ess.nan_to_num(0.0) / len(log_weight))

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
    tv=lambda log_t: -log_t.sign() / 2,
    js=lambda log_t: torch.log((1 + torch.exp(-log_t)) / 2),
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
        """What a checkpoint keeps."""
        return self.seen

    def load(self, state):
        """Go on from what a checkpoint kept."""
        self.seen = state


def log_t(logp, mask, log_p, log_z, f):
    """log π(y)/p(y), p = P/Z; weights p/π are clipped at a percentile of the rollout, NaN where Z
    is not known.   [B]"""
    t = (logp * mask).sum(1) - log_p + log_z                                             # [B]
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


MEMORIES["recent"], BATCH["log_t"], BATCH["pseudo"] = Recent, log_t, pseudo
ADVANTAGES["fdpg"], SURROGATES["whole"], CHECKS["fdpg"] = fdpg, whole_response, untargeted
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
    """fresh(), of the proposal."""
    return fresh(proposal, pool, tok, c, max_new, generator, step)


def gdc(log_weight, log_z, mask, *, aim: Literal["reward", "pointwise", "moments"] = "moments",
        above: Signed = 0.0, share: Share = 0.8, per: Literal["prompt", "all"] = "all",
        most: Share = 0.99):
    """DPG's weights (2012.11635):  P/(Z q), clipped at a percentile, on every token.   [B, T]"""
    weight = (log_weight - log_z).clamp(max=20).exp().nan_to_num(0.0)                    # [B]
    return weight.clamp(max=weight.quantile(most))[:, None] * mask, None


MEMORIES["proposal"], ROLLOUTS["proposed"], LAWS["proposed"] = Proposal, proposed, own_law
ADVANTAGES["gdc"], CHECKS["gdc"] = gdc, untargeted
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
    return -(logprobs(model, tokens, mask, c).sum() / mask.sum()).item()


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


MODELS["second"], REFERENCES["soup"] = ("other", Transformer), soup
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
