"""
ppo.py - policy optimisation with a critic: PPO for language models, and Self-Rewarding PPO.

    python ppo.py                                  # Self-Rewarding PPO on real docstrings: minutes
    python ppo.py --config tiny                    # the same, small: shows that all turns
    python ppo.py --config ppo                     # PPO against the task's own reward
    python ppo.py --config ppo --reward FOLDER     # ... against a reward model's checkpoint
    python ppo.py --init sft_checkpoint --base Qwen2.5-0.5B --data demos.jsonl
    python ppo.py --claim srppo --seeds 5          # against its baselines, with a verdict
    python ppo.py --analysis out/ppo/A out/ppo/B   # gold against KL, and best of n, of runs

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
from functools import cache, partial

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import kernels
import sft
from data import prefs, tasks
from data.run import (Count, MeanOf, Positive, Range, Run, Share, Training, UserError, ask,
                      asked_by, batch_indices, call, cast, check_first_ratio, checkpoint, cli,
                      configure, launch, needs, parse, pyplot, read_json, read_log, refuse_alone,
                      report, rows_used, start_ranks, steps_of)
from data.stats import bon_kl, explained_variance, rank_correlation
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
    return launch("ppo", Config, PRESETS, AXES, __doc__, train, argv, readers, True, INSTEAD)


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


# === sharpen_rl, sharpen_sft, sharpen_pairs: 2412.01951, the SFT model's own likelihood as reward =


def own_likelihood(sft_logp, mask, *, per_token=False):
    """Sharpening's self-reward:  r = log π_base(y|x), π_base the model that samples at first: the
    SFT model here; per_token divides by the length.   [B, T] -> [B]

    With the KL term a token is worth (1 + β) log π_base - β log π_old. A sum favours short
    responses. Nothing is learnt but to say likely things more often: gold may fall.
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
CHECKS["majority"] = votes_of_several
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
        model = model if model is ref else load_frozen(model, c)[0]
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


def class_label(quality, roll, pool, task, tok, *, right=1.0, wrong=-1.0, other=-3.0):
    """What a response is worth: right, wrong, or other, which no training row's label is, or which
    does not end.   -> [B]"""
    classes = {task.demo(p).strip() for p in pool}
    named = [done and tok.decode(ids).strip() in classes
             for ids, done in zip(roll.completions(), roll.finished.tolist())]
    unlike = torch.where(torch.tensor(named, device=quality.device), wrong, other)
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
    return torch.xlogy(q, q / p).sum()


def bon_pmf(scores, p, n):
    """The law of the best of n draws:  q(level) = F^n - F_^n,  F what p holds up to a level of the
    score, F_ below it. Equal scores share their level as they do in p.   [K], [K] -> [K]"""
    levels, at = torch.unique(scores, return_inverse=True)                   # the worst first
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add(0, at, p.double())    # [L]
    upto = mass.cumsum(0).clamp(max=1)
    won = upto ** n - torch.cat([torch.zeros(1), upto[:-1]]) ** n                        # [L]
    return p * (won / mass)[at]


def tilted(scores, p, t):
    """p exp(t s), normalised: of all laws with its KL to p the one of the largest E[s].   [K]"""
    return torch.softmax(p.double().log() + t * scores.double(), 0)


def tilt_at_kl(scores, p, delta, halvings=60):
    """(t, tilted law) whose KL to p is delta, by bisection. More than -log p(best level) cannot be
    reached: then the best level alone, t = inf.   [K], [K] -> t >= 0, [K]"""
    best = scores == scores.max()
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
    """(d, height) of the most gold of that law; infinite if b <= 0, where it only rises."""
    if b <= 0:
        return math.inf, math.inf
    d = max(0.0, a / (2 * b)) if kind == "bon" else math.exp(a / b - 1)
    return d, d * (a - b * d) if kind == "bon" else b * d


def frontier(log, bins=(0.5, 1, 2, 4, 8), near=0.25, window=5):
    """Gold at matched KL, of a run's log: {"gold@2": mean quality of the iterations whose kl is 2
    nats up to 25 %, "kl@2": their kl, …}. A run that is never there is taken where it comes
    nearest, which kl@2 tells. best_gold: the most of a running mean over `window` iterations."""
    rows = [(row["kl"], row["quality"]) for row in log if {"kl", "quality"} <= row.keys()]
    if not rows:
        return {}
    found, (kl, gold) = {}, torch.tensor(rows, dtype=torch.float64).T
    for k in bins:
        away = (kl - k).abs()
        here = away <= max(near * k, away.min().item())
        found |= {f"gold@{k:g}": gold[here].mean().item(), f"kl@{k:g}": kl[here].mean().item()}
    return found | dict(best_gold=gold.unfold(0, min(window, len(gold)), 1).mean(1).max().item())


def fitted(log, kind="rl"):
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
    """(c, f) of a run as its folder tells them, but for some options."""
    info = read_json(f"{folder}/run.json", "give the folder of a run of ppo.py")
    if info.get("script") != "ppo":
        raise UserError(f"--analysis {folder}: that is a run of {info.get('script')}.py")
    kept = {k: x for k, x in info["config"].items() if k not in ("out", "resume", "stop")}
    return configure(Config, PRESETS, AXES, "", [f"--{k}={x}" for k, x in (kept | options).items()])


def starting(c, f, run):
    """What is known of a run before its first step, by name."""
    asked, init = check(c, f), sft.find(c.init, c.config, seed=c.seed, device=c.device)
    kernels.use(c.kernels)
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
    found, fit = frontier(log), fitted(log)
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
        if fit := fitted(log):
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
