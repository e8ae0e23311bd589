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
import time
from dataclasses import dataclass
from functools import cache, partial

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import kernels
import sft
from data import prefs, tasks
from data.run import (Count, MeanOf, Positive, Range, Run, Share, Signed, Training, UserError, ask,
                      asked_by, batch_indices, call, check_first_ratio, checkpoint, cli, launch,
                      needs, refuse_alone, report, rows_used, start_ranks)
from data.stats import accuracy, explained_variance, rank_correlation
from model import (ADAPTERS, PEFT, ScalarModel, Transformer, Work, adapter_readers, adapter_state,
                   autocast, check_adapters, clip_gradients, collate, critic_values, foresee,
                   generate, joined, load, load_frozen, logprobs, masked_whiten, open_trained,
                   passes, peek, plain_model, recomputing, reference, rows_of, save, save_trained,
                   sequence_score, sequence_scores, shard, summed, token_logprobs, token_values,
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

MODELS = dict(base=("base", Transformer))    # frozen: the option that names it, what it must be
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
    out = dict(mean=score.mean().item(), std=score.std().item() if score.std() > 1e-3 else 1.0,
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
    law, step, last, change = torch.ones_like(u), 0.5, 0.0, 1.0
    while change > 1e-9 and step > 1e-3:
        F = (law.cumsum(0) - law / 2) / points
        slope = n * n * ((1 - u) * (1 - F) if worst else u * F) ** (n - 1)
        R = (slope.cumsum(0) - slope / 2) / points
        away = torch.softmax(R / beta, 0) * points - law
        last, change = change, away.abs().mean().item()
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


TRANSFORMS["infalign_best"], DECODERS["won"] = infalign_best, worst_of_n


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


def ends_of(roll):
    """The length of each row, prompt and response.   [B]"""
    return roll.prompt_len + roll.mask.sum(1).long()


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
        scores = torch.cat([sequence_scores(self.model, roll.tokens, ends_of(roll), c)
                            for roll in self.samples])
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
    score = sequence_scores(contest.model, roll.tokens, ends_of(roll), c)                # [B]
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


# === contrast: 2210.15097, a control of srppo: sampled from π_sft (π_sft / π_base)^alpha ==========


def contrastive(model, base, prompts, max_new, generator, slots, *, alpha=1.0):
    """Sample from π (π / π_base)^alpha: what srppo trains towards, without training."""
    return generate(model, prompts, max_new, generator=generator, contrast=(base, alpha),
                    slots=slots)


DECODERS["contrast"] = contrastive
PRESETS["contrast"] = dict(steps=0, decode="contrast")


if __name__ == "__main__":
    cli(main)
