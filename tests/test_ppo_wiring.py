"""ppo.py's own runs: what reaches every row of every axis, the gradients, the weights and the
logged numbers, each compared with the same quantity computed apart: from the checkpoints, the ids
and the task, by the definitions."""
import copy
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import merged
from wiring import catch

import model as models
import ppo
import sft
from data import tasks
from data.prefs import ToyIF
from data.prefs import tokenizer as toyif_tokenizer
from data.run import batch_indices, checkpoint, configure, needs, read_log
from data.stats import rank_correlation
from data.tokenizer import Tokenizer
from model import ScalarModel, load, preset, save

# of the spine and of these chapters; others have a file of their own
METHODS = ["srppo", "ppo", "likelihood", "raft", "sft", "greedy", "half", "bon", "contrast"]
SEED = 3
TINY = ["--steps", "2", "--rollouts", "8", "--batch", "8", "--micro", "5", "--eval_every", "2",
        "--save_every", "99", "--max_new", "6", "--eval_prompts", "8", "--seed", str(SEED)]


def near(a, b, tol=1e-4):
    """Two tensors or numbers of one shape, to float32's rounding of a sum."""
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol=tol, atol=tol)


# --- the definitions ------------------------------------------------------------------------------


def law(net, tokens, temperature):
    """The log-law of each token given those before it: whole logits, one shift.   [B, T-1, V]"""
    return ((net(tokens) @ net.head.T).float() / temperature).log_softmax(-1)[:, :-1]


def logp_of(net, tokens, mask, temperature):
    """log p(token t | before), 0 off the mask.   [B, T]"""
    picked = law(net, tokens, temperature).gather(2, tokens[:, 1:, None]).squeeze(2)
    return F.pad(picked, (1, 0)) * mask


def entropy_of(net, tokens, temperature):
    """The entropy of the law that token t is drawn from.   [B, T]"""
    logp = law(net, tokens, temperature)
    return F.pad(-(logp.exp() * logp).sum(-1), (1, 0))


def scores_of(scalar, tokens):
    """A scalar model's number after each token.   [B, T]"""
    return scalar.model(tokens) @ scalar.score.weight[0]


def gae_of(rewards, values, mask, gamma, lam):
    """Advantage and return of each token of each row, in plain numbers."""
    adv = torch.zeros_like(rewards)
    for b in range(len(mask)):
        last = after = 0.0
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            last = rewards[b, t] + gamma * after - values[b, t] + gamma * lam * last
            adv[b, t], after = last, values[b, t]
    return adv, (adv + values) * mask


def white(x, mask):
    """x with mean 0 and variance 1 over the mask."""
    inside = x[mask > 0]
    return (x - inside.mean()) / inside.std(unbiased=False) * mask


SCORE = dict(coherent=lambda s: (s.sft - s.base).sum(1), likelihood=lambda s: s.sft.sum(1),
             gold=lambda s: s.truth, PATH=lambda s: s.judged - s.w.bias)
ENDED = dict(replace=lambda raw, done, x: torch.where(done, raw, torch.tensor(x)),
             subtract=lambda raw, done, x: torch.where(done, raw, raw - x),
             ignore=lambda raw, done, x: raw)
KL_LOSS = dict(none=lambda d: 0 * d, k2=lambda d: 0.05 * d ** 2 / 2,
               k3=lambda d: 0.05 * ((-d).exp() - 1 + d))


def clipped(logp, old, adv):
    """The pessimistic of the ratio and the clipped ratio."""
    ratio = (logp - old).exp()
    return -torch.minimum(adv * ratio, adv * ratio.clamp(0.8, 1.2))


SURROGATE = dict(clip=clipped, nll=lambda logp, old, adv: -adv * logp)


# --- a run, followed ------------------------------------------------------------------------------


class Rolled:
    """What a rollout is worth, from its ids: each quantity by its definition."""

    def __init__(self, world, problems, samples, roll, policy, critic=None):
        self.w, self.roll, self.policy, self.critic = world, roll, policy, critic
        self.tokens = roll.tokens
        self.problems = [p for p in problems for _ in range(samples)]
        self.mask = torch.zeros(self.tokens.shape)
        self.truth, self.finished = torch.zeros(len(self.tokens)), []
        for b, problem in enumerate(self.problems):
            prompt = world.tok.prompt(problem["prompt"], world.c.chat)
            row, n = self.tokens[b].tolist(), len(prompt)
            assert row[:n] == prompt
            ids = row[n:n + world.max_new]
            done = world.tok.eos in ids
            ids = ids[:ids.index(world.tok.eos)] if done else ids
            self.finished.append(done)
            self.mask[b, n:n + len(ids) + done] = 1
            self.truth[b] = world.task.reward(problem, world.tok.decode(ids), done)
        self.finished = torch.tensor(self.finished)
        self.length = self.mask.sum(1)
        assert 0 < self.finished.sum() < len(self.finished) or len(self.finished) < 9

    def by(self, net):
        return logp_of(net, self.tokens, self.mask, self.w.temperature)

    sft = cached_property(lambda self: self.by(self.w.ref))
    base = cached_property(lambda self: self.by(self.w.base))
    logp = cached_property(lambda self: self.by(self.policy))

    @cached_property
    def judged(self):
        scored = self.mask * (self.tokens != self.w.judge.config.pad_token_id)
        last = torch.tensor([int(m.nonzero().max()) for m in scored])       # a pad may be sampled
        return scores_of(self.w.judge, self.tokens)[torch.arange(len(last)), last]

    @cached_property
    def values(self):
        return F.pad(scores_of(self.critic, self.tokens)[:, :-1], (1, 0)) * self.mask

    @cached_property
    def raw(self):
        return SCORE[self.w.axes["reward"]](self)

    @cached_property
    def ended(self):
        return ENDED[self.w.axes["eos"]](self.raw, self.finished, self.w.no_eos)

    @cached_property
    def rewards(self):
        """The KL with the reference on every token, the score in its unit on the last."""
        rate = self.w.beta * self.w.factor / self.w.std
        out = -rate * (self.logp - self.sft)
        for b, m in enumerate(self.mask):
            out[b, int(m.nonzero().max())] += (self.ended[b] - self.w.mean) / self.w.std
        return out * self.mask

    @cached_property
    def adv(self):
        """Advantages and returns, or 1 on the best of each prompt's."""
        if self.w.axes["advantage"] == "gae":
            adv, returns = gae_of(self.rewards, self.values, self.mask, 1.0, 0.95)
            return white(adv, self.mask), returns
        groups, n = self.ended.tolist(), self.w.samples
        best = {max(range(i, i + n), key=lambda j: groups[j]) for i in range(0, len(groups), n)}
        return torch.stack([m * (b in best) for b, m in enumerate(self.mask)]), None


# what each row's argument is, by axis; `part`: the rows of a micro-batch, cut to their width
ORACLE = dict(
    reward=dict(sft_logp=lambda s: s.sft, base_logp=lambda s: s.base, mask=lambda s: s.mask,
                quality=lambda s: s.truth, judged=lambda s: s.judged - s.w.bias),
    eos=dict(score=lambda s: s.raw, finished=lambda s: s.finished),
    rollout=dict(step=lambda s: len(s.w.steps) - 1),
    transform=dict(score=lambda s: s.ended),
    shaping=dict(unit=lambda s: (s.ended - s.w.mean) / s.w.std, logp=lambda s: s.logp,
                 ref_logp=lambda s: s.sft, mask=lambda s: s.mask,
                 coefficient=lambda s: s.w.factor / s.w.std),
    advantage=dict(rewards=lambda s: s.rewards, values=lambda s: s.values, mask=lambda s: s.mask,
                   score=lambda s: s.ended, samples=lambda s: s.w.samples),
    controller=dict(beta=lambda s: s.w.factor, kl=lambda s: (s.logp - s.sft).sum(1).mean(),
                    n=lambda s: len(s.mask)),
    decode={},
    regulariser=dict(logp=lambda s: s.part(s.new), ref_logp=lambda s: s.part(s.sft)),
    surrogate=dict(logp=lambda s: s.part(s.new), old_logp=lambda s: s.part(s.logp),
                   adv=lambda s: s.part(s.adv[0])),
    value=dict(values=lambda s: s.part(s.now), old_values=lambda s: s.part(s.values),
               returns=lambda s: s.part(s.adv[1])))
AXIS = {name: axis for axis, table in ppo.AXES.items() if axis not in ("kernels", "peft")
        for name in table}


def test_every_argument_of_every_row_is_a_quantity_that_is_computed_apart():
    """a decoder's are those that check_evaluation draws with again; what a rollout is drawn with,
    and the models, are looked at where they are used"""
    seen = {"policy", "pool", "tok", "c", "max_new", "generator", "ref", "share"}
    for config in (*METHODS, *MORE):
        _, f = configure(ppo.Config, ppo.PRESETS, ppo.AXES, "", ["--config", config])
        for axis in ppo.AXES.keys() - {"kernels", "peft", "decode"}:
            assert set(needs(getattr(f, axis))) - seen <= ORACLE.get(axis, {}).keys()


def followed(monkeypatch, argv, init, base):
    """Run ppo.py; -> its result, and all that happened, in order: [(name, call)]. Models are copies
    of what they were at that moment; an "update" has a minibatch's gradients too."""
    events, found, plain = [], [], ppo.backward
    monkeypatch.setattr(ppo, "rows_at_once", lambda c: 512)          # pieces have their own test

    def see(name, call):
        for key, x in vars(call).items():
            if isinstance(x, torch.nn.Module):
                setattr(call, key, copy.deepcopy(x))
        events.append((name, call))

    def update(policy, critic, batch, rows, known, f):
        nets = copy.deepcopy((policy, critic))
        call = SimpleNamespace(nets=nets, batch=batch, rows=rows)
        events.append(("update", call))
        call.out = plain(policy, critic, batch, rows, known, f)
        call.grads = [[None if p.grad is None else p.grad.clone() for p in net.parameters()]
                      for net in (policy, critic)]
        return call.out

    def find(path, like, make=True, option="--init", **changes):
        found.append((option, make, changes.get("seed")))
        folder = base if path.endswith("_base") or option == "--base" else init
        return folder if make else load(folder)[0].config.max_position_embeddings

    monkeypatch.setattr(ppo, "backward", update)
    monkeypatch.setattr(sft, "find", find)
    catch(monkeypatch, ppo, see=see)
    catch(monkeypatch, ppo, "generate", "calibrate", "evaluate", "critic_values", see=see)
    out = ppo.main(argv)
    seeds = [seed for _, make, seed in found if make]
    assert seeds[0] == SEED and set(seeds[1:]) <= {None}          # the base is one for all seeds
    return out, events


def world_of(argv, init, base, judge):
    """The checkpoints, the task and the settings of a run, read apart from it."""
    c, f = configure(ppo.Config, ppo.PRESETS, ppo.AXES, "", argv)
    ref, tok = load(init)
    names = {axis: "PATH" if axis == "reward" and judge else getattr(c, axis)
             for axis in ("reward", "eos", "advantage", "surrogate", "regulariser", "decode")}
    task = tasks.task(c.data)
    return SimpleNamespace(
        c=c, f=f, ref=ref, tok=tok, base=load(base)[0], judge=load(judge)[0] if judge else None,
        task=task, axes=names, temperature=c.temperature, samples=c.samples, max_new=6,
        beta=f.shaping.keywords["beta"], no_eos=f.eos.keywords.get("no_eos"), bias=0.0, factor=1.0,
        train=task.problems("train", 4096, 1000 + SEED), steps=[])


def scenes(events):
    """The run's rollouts, each with all that was made of it."""
    out, kind, decode, rollout = [], "", None, None
    for name, call in events:
        if AXIS.get(name) in ("reference", "critic"):
            continue
        if AXIS.get(name) == "rollout":
            rollout = call
        elif AXIS.get(name) == "decode":
            kind, decode = "evaluate", call
        elif name == "calibrate":
            kind = name
        elif name == "generate":
            out.append(SimpleNamespace(kind=kind or "train", gen=call, decode=decode, rows=[],
                                       rollout=rollout))
            kind, decode, rollout = "", None, None
        elif name != "evaluate":
            out[-1].rows.append((name, call))
    return out


def compare(axis, call, s, mask=1.0):
    """Every argument of a call, against the oracle."""
    for name, quantity in ORACLE[axis].items():
        if hasattr(call, name):
            mine, wanted = getattr(call, name), quantity(s)
            mine = mine * mask if torch.is_tensor(mine) and torch.is_tensor(mask) else mine
            assert near(mine, wanted), f"{axis}: {name}"


def compare_rewards(scene, candidates):
    """The reward and the EOS rule, asked of one of the candidates: the one of so many rows."""
    for name, call in scene.rows:
        if (axis := AXIS.get(name)) in ("reward", "eos"):
            n = len(call.score if axis == "eos" else call.out)
            compare(axis, call, next(s for s in candidates if len(s.mask) == n))


# --- what must be true of each kind of rollout ----------------------------------------------------


def check_calibration(w, scene, out):
    """64 prompts of training, eight SFT samples each, the run's first draws."""
    gen = scene.gen
    s = Rolled(w, w.train[:64], 8, gen.out, w.ref)
    assert near(gen.out.logp, s.logp)
    again = models.generate(w.ref, gen.prompts, w.max_new, samples=8, temperature=w.temperature,
                            generator=torch.Generator().manual_seed(SEED))
    assert torch.equal(again.tokens, gen.out.tokens)
    w.bias = s.judged.mean() if w.judge else 0.0
    compare_rewards(scene, [s])
    w.mean, w.std = s.ended.mean(), s.ended.std()
    raw = next(call.out for name, call in scene.rows          # near s.raw; its ties are the run's
               if AXIS.get(name) == "reward" and len(call.out) == len(s.raw))
    assert near(raw, s.raw)
    assert near(out["agreement"], rank_correlation(raw.view(64, 8), s.truth.view(64, 8)))
    for key, x in dict(mean=w.mean, std=w.std, bias=w.bias,
                       cut=1 - s.finished.float().mean()).items():
        assert near(out[key], x), key


def decoded(w, net, s):
    """The log-probs that a decoder's draws must have under the law that its row names."""
    if w.axes["decode"] == "contrast":
        a = w.f.decode.keywords["alpha"]
        logits = (1 + a) * net(s.tokens) @ net.head.T - a * w.base(s.tokens) @ w.base.head.T
        logp = logits.log_softmax(-1)[:, :-1].gather(2, s.tokens[:, 1:, None]).squeeze(2)
        return F.pad(logp, (1, 0)) * s.mask
    cold = w.f.decode.keywords.get("eval_temperature", 1.0)
    if cold == 0:
        best = (law(net, s.tokens, 1.0).argmax(-1) == s.tokens[:, 1:]) | (s.mask[:, 1:] == 0)
        assert best.all()
    return logp_of(net, s.tokens, s.mask, cold or 1.0)


def check_evaluation(w, scene, problems, split, net, out, shown):
    """The draws are always the same and those of the decoder's law; the metrics are its means."""
    gen = scene.gen
    again = models.generate(net, gen.prompts, w.max_new, samples=gen.samples,
                            temperature=gen.temperature, contrast=gen.contrast,
                            generator=torch.Generator().manual_seed(SEED + 1))
    assert torch.equal(again.tokens, gen.out.tokens)
    s = Rolled(w, problems, 1, scene.decode.out, net)
    drawn = Rolled(w, problems, gen.samples, gen.out, net)
    compare_rewards(scene, [s, drawn])
    assert near(scene.decode.out.logp, decoded(w, net, s))
    for i in range(0, len(drawn.mask), gen.samples):                   # bon; else the one sample
        group = range(i, i + gen.samples)
        best = max(group, key=lambda j: drawn.raw[j].item() if drawn.finished[j] else -1e9)
        assert torch.equal(drawn.tokens[best], s.tokens[i // gen.samples])
    for key, x in {"reward": s.raw, w.task.metric: s.truth, "kl": (s.logp - s.sft).sum(1),
                   "length": s.length, "truncated": 1 - s.finished.float()}.items():
        assert near(out[f"{split}_{key}"], x.mean()), key
    for (prompt, text, demo), problem, row, m in zip(shown, problems, s.tokens, s.mask):
        ids = [x for x in row[m > 0].tolist() if x != w.tok.eos]
        seen = w.tok.decode(w.tok.prompt(problem, w.c.chat), skip_specials=False)
        assert (prompt, text, demo) == (seen, w.tok.decode(ids), w.task.demo(problem))


def check_update(w, s, update, calls):
    """What reaches the losses of each micro-batch; the gradients are those of the loss by its
    definition.   -> the loss, and the share of tokens whose ratio is clipped"""
    (policy, critic), rows = update.nets, update.rows
    s.new = logp_of(policy, s.tokens, s.mask, w.temperature)
    s.now = F.pad(scores_of(critic, s.tokens)[:, :-1], (1, 0)) * s.mask if s.critic else None
    parts = list(rows.split(w.c.micro))
    seen = {axis: [call for name, call in calls if AXIS[name] == axis]
            for axis in ("surrogate", "regulariser", "value")}
    for i, part in enumerate(parts):
        width = int((s.mask[part].sum(0) > 0).nonzero().max()) + 1
        s.part = lambda x: (x * s.mask)[part][:, :width]
        for axis, found in seen.items():
            if found:
                compare(axis, found[i], s, s.part(torch.ones(())))
                assert {"logp", "values"} & vars(found[i]).keys() == found[i].grad
    mask, n = s.mask[rows], s.mask[rows].sum()
    entropy = entropy_of(policy, s.tokens, w.temperature)[rows]
    token = SURROGATE[w.axes["surrogate"]](s.new, s.logp.detach(), s.adv[0])[rows]
    token = token + KL_LOSS[w.axes["regulariser"]](s.new - s.sft)[rows] - w.c.entropy * entropy
    loss = (token * mask).sum() / n
    check_gradients(policy, loss, update.grads[0])
    if s.adv[1] is not None:
        far = s.now - s.values
        error = torch.maximum((s.now - s.adv[1]) ** 2,
                              (s.values + far.clamp(-0.2, 0.2) - s.adv[1]) ** 2) / 2
        check_gradients(critic, (error * s.mask)[rows].sum() / n, update.grads[1])
    ratio = (s.new - s.logp).exp()[rows].detach()
    wanted = dict(loss=loss, ratio=(ratio * mask).sum() / n, entropy=(entropy * mask).sum() / n,
                  off=((ratio - 1).abs() * mask).sum() / n, worst=((ratio - 1).abs() * mask).max(),
                  clipped=(((ratio - 1).abs() > 0.2) * mask).sum() / n)
    assert wanted.keys() == update.out.keys()
    assert all(near(update.out[key], x, 1e-3) for key, x in wanted.items())
    return wanted


def check_gradients(net, loss, found):
    """d loss / d parameters, as they were found."""
    mine = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    for a, b in zip(mine, found, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def check_step(w, scene, row):
    """One iteration: rollout, rewards, advantages, updates, the controller, the logged row."""
    i, gen = len(w.steps), scene.gen
    problems = [w.train[j] for j in batch_indices(len(w.train), w.c.rollouts, i, SEED)]
    critics = [call.critic for name, call in scene.rows if name == "critic_values"]
    critic = critics[0] if critics else None
    s = Rolled(w, problems, w.samples, gen.out, gen.model, critic)
    w.steps.append(s)
    assert near(gen.out.logp, s.logp) and (i == 0) == near(s.logp, s.sft)
    assert scene.rollout.step == i and scene.rollout.pool == w.train
    assert scene.rollout.out["problems"] == problems
    assert len(critics) == ("values" in needs(w.f.advantage))
    assert critic is None or (i == 0) == near(s.values, 0 * s.values)
    compare_rewards(scene, [s])
    order = [call.rows for name, call in scene.rows if name == "update"]
    assert {len(rows) for rows in order} == {w.c.batch}
    half = len(order) // w.c.epochs                        # each epoch has every row once, anew
    passes = [torch.cat(order[k:k + half]) for k in range(0, len(order), half)]
    assert len(passes) == w.c.epochs and not torch.equal(*passes)
    assert all(x.sort().values.tolist() == list(range(len(s.mask))) for x in passes)
    told = []
    for k, (name, call) in enumerate(scene.rows):
        if AXIS.get(name) in ("shaping", "advantage", "controller"):
            compare(AXIS[name], call, s)
        elif name == "update":
            inside = []
            for after, later in scene.rows[k + 1:]:
                if AXIS.get(after) not in ("surrogate", "regulariser", "value"):
                    break
                inside.append((after, later))
            told.append(check_update(w, s, call, inside))
    check_row(w, s, scene, told, row)


def check_row(w, s, scene, told, row):
    """The numbers that the log tells of an iteration."""
    kl = (s.logp - s.sft).sum(1).mean()
    away = s.sft - s.logp
    if w.c.controller == "adaptive":
        target, horizon = (w.f.controller.keywords[key] for key in ("target", "horizon"))
        w.factor = w.factor * (1 + (kl / target - 1).clamp(-0.2, 0.2).item() * 16 / horizon)
    updates = [call for name, call in scene.rows if name == "update"]
    grads = [g for g in updates[-1].grads[0] if g is not None]
    wanted = dict(
        reward=s.ended.mean(), kl=kl, k3=(away.exp() - 1 - away).sum(1).mean(),
        truncated=1 - s.finished.float().mean(), length=s.length.mean(), quality=s.truth.mean(),
        entropy=told[0]["entropy"], norm=torch.cat([g.flatten() for g in grads]).norm(), skipped=0,
        work=(s.length.sum() - len(s.mask)) / (len(s.mask) * (s.length.max() - 1)),
        loss=sum(x["loss"] for x in told) / len(told), beta_factor=w.factor,
        clipped=sum(x["clipped"] for x in told) / len(told),
        flat=(s.ended.view(-1, w.samples).std(1) < 1e-6).float().mean())
    if s.adv[1] is not None:
        inside = s.mask > 0
        wanted["ev"] = (1 - (s.adv[1] - s.values)[inside].var(unbiased=False)
                        / s.adv[1][inside].var(unbiased=False))
    assert wanted.keys() | {"step", "time", "t_gen", "t_score", "t_update"} == row.keys()
    assert all(near(row[key], x, 2e-3) for key, x in wanted.items()), (row, wanted)


def check_weights(w, found, out):
    """PyTorch's own AdamW, on the gradients that were found, makes the weights that were saved."""
    assert same_weights(found[0].nets[0], w.ref, 0)
    assert same_weights(found[0].nets[1].model, ScalarModel.from_lm(w.ref).model, 0)
    for k, (folder, lr) in enumerate(((out, w.c.lr), (checkpoint(out) / "critic", w.c.critic_lr))):
        if k and not ppo.has_critic(w.f):                              # a head that nobody asks
            assert not folder.exists() and all(g is None for u in found for g in u.grads[1])
            return
        net = copy.deepcopy(found[0].nets[k])
        opt = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        for i, update in enumerate(found):
            assert same_weights(net, update.nets[k], lr / 20)
            opt.param_groups[0]["lr"] = lr * (1 - i // (len(found) // 2) / 2)
            for p, g in zip(net.parameters(), update.grads[k]):
                p.grad = None if g is None else g.clone()
            if any(g is not None for g in update.grads[k]):
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
        assert same_weights(net, load(folder)[0], lr / 20)


def same_weights(a, b, tol):
    """Two models of one shape."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, rtol=0, atol=tol) for x, y in pairs)


FAST = ["--lr", "2e-3", "--critic_lr", "1e-2"]
MORE = {          # rows that no preset has, and what else changes what a row gets
    "srppo,eval_temperature=0": FAST,
    "contrast,alpha=2": [],
    "docs,entropy=0.1": [*FAST, "--regulariser", "k2", "--controller", "adaptive", "--target", "1",
                          "--horizon", "100", "--eos", "subtract", "--temperature", "0.7",
                          "--chat"],
    "ppo,beta=0.2": [*FAST, "--reward", "judge", "--regulariser", "k3", "--eos", "ignore"]}


@pytest.fixture(scope="session")
def two_models(tmp_path_factory):
    """A random model of the toy world that ends its texts now and then, and one not far from it."""
    tok = toyif_tokenizer()
    net, g = models.init(preset("1x64", tok, 64)), torch.Generator().manual_seed(0)
    folders = [str(tmp_path_factory.mktemp(x)) for x in ("base", "init")]
    with torch.no_grad():
        for folder, scale in zip(folders, (0.1, 0.03)):
            for p in net.parameters():
                p.add_(scale * torch.randn(p.shape, generator=g))
            if scale == 0.1:
                usual = net(torch.arange(64)[None]).mean((0, 1))                         # [D]
                net.embed_tokens.weight[tok.eos] = usual / usual.norm()
            save(net, tok, folder)
    return folders


def pretend(monkeypatch):
    """A chat template, and a reward that tells whose text it is, which, and whether it ended:
    random texts earn nothing by the world's own."""
    plain = Tokenizer.prompt
    monkeypatch.setattr(Tokenizer, "prompt", lambda self, problem, chat=False:
                        plain(self, problem) + self.encode("=") * chat)
    monkeypatch.setattr(Tokenizer, "use_chat", lambda self: None)
    monkeypatch.setattr(ToyIF, "reward", lambda self, problem, text, finished=True:
                        (sum(map(ord, problem["prompt"])) % 11 + len(text) + 5 * finished) / 7)


@pytest.mark.parametrize("config", [*METHODS, *MORE])
def test_every_row_of_every_preset_gets_what_it_names(config, two_models, workdir, monkeypatch,
                                                      capsys):
    method = config.split(",")[0]
    base, init = two_models
    steps = ppo.PRESETS[method].get("steps", 2)
    extra = MORE.get(config, FAST[:2 if method == "raft" else 4] if steps else [])
    argv = merged("--config", f"toyif,{config},tiny", *TINY, *extra, "--steps", str(steps), "--out",
                  "run")
    judge = "judge" if "judge" in argv else ""
    if judge:
        net, tok = load(base)
        torch.manual_seed(0)                                                # of the head
        save(ScalarModel.from_lm(net, std=0.3), tok, judge)
    pretend(monkeypatch)
    w = world_of(argv, init, base, judge)
    capsys.readouterr()
    out, events = followed(monkeypatch, argv, init, base)
    evaluations = [call for name, call in events if name == "evaluate"]
    told = [call.out[0] for call in evaluations]
    found, log = scenes(events), read_log("run")
    check_calibration(w, found.pop(0), next(call.out for name, call in events
                                            if name == "calibrate"))
    splits = {x: w.task.problems(x, 8, SEED) for x in ("val", "ood")}
    rows, evaluated = iter(r for r in log if "loss" in r), iter(evaluations)
    while found:
        if found[0].kind == "train":
            check_step(w, found.pop(0), next(rows))
        else:
            one = next(evaluated)
            for k, (split, problems) in enumerate(splits.items()):
                check_evaluation(w, found.pop(0), problems, split, one.policy, one.out[0],
                                 one.out[1][2 * k:2 * k + 2])
    assert len(w.steps) == steps
    said = capsys.readouterr().out
    assert f"std {w.std:.2f}; Spearman with gold" in said
    assert f"mean {w.mean:.2f}," in said or abs(w.mean) < 1e-3
    assert all(f"  {k:<18} {told[0][k]:>11.3f} {told[-1][k]:>10.3f}" in said for k in told[0])
    assert out == {**told[-1], **{f"sft_{k}": x for k, x in told[0].items()},
                   "agreement": out["agreement"], **ppo.frontier(log)}
    told_log = [r for r in log if "val_kl" in r]
    assert [{k: r[k] for k in told[0]} for r in told_log] == told
    assert [r["step"] for r in told_log] == ([0, 2] if steps else [0])
    known = evaluations[0].known
    frozen = [known[name] for name in ("ref", "anchor", "base", "judge") if name in known]
    assert same_weights(known["anchor"], w.ref, 0) and "base" not in known or same_weights(
        known["base"], w.base, 0)
    assert not any(p.requires_grad for net in frozen for p in net.parameters())
    updates = [call for name, call in events if name == "update"]
    if updates:
        check_weights(w, updates, "run")
