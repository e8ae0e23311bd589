"""sft.py's own lines: what each preset's run hands to its loss, its optimiser and its log, against
the same quantity computed apart, from checkpoints, texts and formulas that are written here."""
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close, merged

import model as llm
import sft
from data import prefs, tasks, text
from data.run import batch_indices, checkpoint, configure, needs, read_log
from data.tokenizer import bytes_tokenizer, train_bpe
from wiring import catch

# --- a small world: random checkpoints whose laws are far from uniform, a text of few pages -------

ALPHABETS = dict(toyif=prefs.tokenizer, ring=prefs.ring_tokenizer, chain=tasks.chain_tokenizer,
                 bpe=bytes_tokenizer, bytes=bytes_tokenizer)
HERE = Path(__file__).parent
PAGES = dict(zip(("train", "val", "ood"), ([(HERE / f"{name}.py").read_text()[:3000], "a b c d"]
                                           for name in ("conftest", "test_house", "test_run"))))
ORIGINS = dict(init=1, teacher=2, other=3)               # the folder's name: its seed


def save_random(folder, words, seed):
    """A checkpoint of random weights that reads these words."""
    g, tok = torch.Generator().manual_seed(seed), ALPHABETS[words]()
    net = llm.init(llm.preset("2x64", tok, 512), seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    llm.save(net, tok, folder)


def words_of(c):
    """The tokenizer at the root of a chain of bases."""
    while c.init:
        c = sft.configured(c.init.removeprefix("base:"), "tiny")[2][0]
    return c.tokenizer


@pytest.fixture
def small_world(workdir, monkeypatch):
    """An empty working directory; stdlib is a few pages."""
    def documents(name, split="train", val=""):
        return PAGES[split]
    monkeypatch.setattr(tasks, "documents", documents)
    monkeypatch.setattr(text, "documents", documents)


# --- a feedback's rows: (prompt, completion, which of it counts, numbers) -------------------------


def row(prompt, completion, counts=None, **numbers):
    return SimpleNamespace(prompt=list(prompt), completion=list(completion), numbers=numbers,
                           counts=counts or [1.0] * len(completion))


def windows(c, tok, split="train"):
    """A text's, BOS and EOS round each page: all but the first token of each counts."""
    ids = [i for page in PAGES[split] for i in [tok.bos, *page.encode(), tok.eos]]
    if tok.tokens[:256] != bytes_tokenizer().tokens[:256] or len(tok.tokens) > 261:
        ids = [i for page in PAGES[split] for i in [tok.bos, *tok.encode(page), tok.eos]]
    return [row(ids[i:i + 1], ids[i + 1:i + c.context]) for i in range(0, len(ids) - 1, c.context)]


def demonstrations(c, tok, split="train", n=0):
    """A task's, with their EOS, that fit."""
    if text.is_corpus(c.data):
        return windows(c, tok, split)
    task = tasks.task(c.data)
    problems = task.problems(split, n or c.rows, c.seed)
    found = [row(tok.prompt(p), [*tok.encode(task.demo(p)), tok.eos],
                 reward=task.reward(p, task.demo(p), True)) for p in problems]
    return [x for x in found if len(x.prompt + x.completion) <= c.context]


def scored(c, tok, net):
    found = demonstrations(c, tok)
    best = sorted(range(len(found)), key=lambda j: -found[j].numbers["reward"])[:len(found) // 2]
    value = torch.tensor([x.numbers["reward"] for x in found]).double()
    for j, x in enumerate(found):
        x.numbers |= dict(good=float(j in best), score=(value[j] - value.mean()) / value.std())
    return found


def filtered(c, tok, net):
    return [x for x in scored(c, tok, net) if x.numbers["good"]]


def conditional(c, tok, net):
    found, drawn = scored(c, tok, net), torch.rand(c.rows, generator=seeded(c)).tolist()
    for x, u in zip(found, drawn):
        if u >= 0.01:
            x.prompt += tok.encode("." if x.numbers["good"] else ",")
    return found


def pairs(c, tok):
    """(prompt, better, worse) of the training pairs."""
    return [(tok.prompt(r["prompt"]), *([*tok.encode(r[side]), tok.eos]
                                        for side in ("chosen", "rejected")))
            for r in prefs.pair_sets(c.data, c.rows, seed=c.seed)[0]]


def hindsight(c, tok, net):
    out, g, (good,), (bad,) = [], seeded(c), tok.encode("."), tok.encode(",")
    for prompt, better, worse in pairs(c, tok):
        mode = ("p", "n", "pn", "np")[torch.randint(4, (1,), generator=g).item()]
        first, second = (better, worse) if mode[0] == "p" else (worse, better)
        one, two = (good, bad) if mode[0] == "p" else (bad, good)
        both = first if len(mode) == 1 else [*first, two, *second]
        counts = [1.0] * len(both)
        if len(mode) == 2:
            counts[len(first)] = 0.0
        out.append(row([*prompt, one], both, counts))
    return [x for x in out if len(x.prompt + x.completion) <= c.context]


def both(c, tok, net):
    return [x for prompt, better, worse in pairs(c, tok)
            for x in (row(prompt, better, good=1.0), row(prompt, worse, good=0.0))]


def chosen(c, tok, net):
    return [row(prompt, better, good=1.0) for prompt, better, _ in pairs(c, tok)]


def sampled(c, tok, net):
    found = chosen(c, tok, net)
    prompts = [x.prompt for x in found]
    room = min(tasks.task(c.data).max_new, c.context - max(map(len, prompts)))
    roll = llm.generate(net, prompts, room, generator=seeded(c))
    ends = [[tok.eos] * int(done) for done in roll.finished]
    return found + [row(p, ids + end, good=0.0)
                    for p, ids, end in zip(prompts, roll.completions(), ends)]


ROWS = dict(none=lambda c, tok, net: demonstrations(c, tok), scored=scored, filtered=filtered,
            conditional=conditional, hindsight=hindsight, both=both, chosen=chosen, sampled=sampled)


def seeded(c):
    return torch.Generator().manual_seed(c.seed)


# --- the losses' formulas, of whole distributions: x has each argument by its name ----------------


def glow(x):
    """Rows whose mean loss fell since the last visit count less."""
    fell = x.before - x.now
    weight = torch.where(fell.isnan(), 1.0, (2 * torch.sigmoid(-10 * fell)).clamp(0.5, 5))
    return weight[:, None] * -x.logp


def adpa(x):
    gain = (x.law.exp() * (x.teacher - x.other)).sum(-1)
    return torch.where(x.good[:, None] > 0, -x.logp, -aligned(gain) * x.mask)


def dckd(x):
    kl = (x.teacher.exp() * (x.teacher - x.law)).sum(-1)
    return torch.where(x.good[:, None] > 0, -x.logp, 0) + aligned(kl) * x.mask


def aligndistil(x):
    w = 10 * (x.teacher.exp() - x.other.exp()).abs().sum(-1) + 1e-3
    beyond = torch.log_softmax(x.teacher + w[..., None] * (x.teacher - x.other), -1)
    kl = (x.law.exp() * (x.law - beyond)).sum(-1)
    return (aligned(0.1 / w * kl) * x.mask).sum(1) / x.mask.sum(1)


def implicit(x):
    z = 0.1 * (x.logp - x.ref_logp).sum(1)
    return -(z - z ** 2 / 4)


FORMULAS = dict(
    nll=lambda x: -x.logp, glow=glow, adpa=adpa, dckd=dckd, aligndistil=aligndistil,
    implicit=implicit, rwr=lambda x: -x.logp * (2 * x.score).exp()[:, None],
    unlikelihood=lambda x: -torch.where(x.good[:, None] > 0, x.logp,
                                        (1 - x.logp.exp()).clamp(min=1e-20).log()) * x.mask,
    reweighted=lambda x: x.weight * -x.logp.sum(1) / x.mask.sum(1))


def aligned(x):
    """[B, T-1] of what follows -> [B, T], 0 in front."""
    return torch.cat([torch.zeros_like(x[:, :1]), x], 1)


def laws(net, tokens):
    """Each next token's log-probabilities.   [B, T-1, V]"""
    return torch.log_softmax(net.logits(net(tokens)), -1)[:, :-1]


def logp_of(law, tokens, mask):
    return aligned(law.gather(-1, tokens[:, 1:, None])[..., 0]) * mask


def collated(rows, tok):
    """Their tokens, what counts of them, and what is no padding.   [B, T] each"""
    width = max(len(x.prompt + x.completion) for x in rows)
    tokens, mask, real = [], [], []
    for x in rows:
        size = len(x.prompt + x.completion)
        tokens.append([*x.prompt, *x.completion, *[tok.pad or 0] * (width - size)])
        mask.append([*[0.0] * len(x.prompt), *x.counts, *[0.0] * (width - size)])
        real.append([True] * size + [False] * (width - size))
    return torch.tensor(tokens), torch.tensor(mask), torch.tensor(real)


# --- a run that is watched ------------------------------------------------------------------------


class Watch:
    """A run, watched at every gradient: what the loss was given, and what it should have been."""

    def __init__(self, monkeypatch, argv):
        self.c, self.f = configure(sft.Config, sft.PRESETS, sft.AXES, "", argv)
        names = "LOSSES", "FEEDBACK", "SCHEDULES", "provide", "clip_gradients", "set_lr"
        self.calls = catch(monkeypatch, sft, *names, "generate", "evaluate", see=self.see)
        updates = SimpleNamespace(update=sft.AXES["update"])
        self.calls |= dict(update=catch(monkeypatch, updates, "update")["optimiser"])
        self.steps, self.before = [], {}
        origin = {key: key for key in ORIGINS if Path(key).exists()}
        self.nets = {key: llm.load(path)[0].requires_grad_(False) for key, path in origin.items()}
        self.result = sft.main(argv)

    def see(self, name, call):
        """Called before the functions that are caught."""
        if name == "provide":
            self.net = call.model
            self.flags = [m.rounding for m in call.model.modules() if hasattr(m, "rounding")]
            if len(self.calls["provide"]) % self.chunks == 0:
                self.weights = {n: p.detach().clone() for n, p in call.model.named_parameters()}
        elif name == "clip_gradients":
            self.check_step(len(self.steps))
        elif name == "set_lr":
            self.check_clipped(call)

    @property
    def chunks(self):
        """Forward passes a step."""
        return -(-self.c.batch // self.c.micro)

    def begin(self):
        """The rows, once their tokenizer is known."""
        self.tok = self.calls[self.c.feedback][0].tok
        if "init" in self.nets:
            assert self.tok.tokens == llm.load("init")[1].tokens
        self.rows = ROWS[self.c.feedback](self.c, self.tok, self.nets.get("init"))

    def check_step(self, step):
        """Of one step: rows, arguments of the loss, gradients."""
        if not step:
            self.begin()
        c, net = self.c, self.net
        picked = batch_indices(len(self.rows), c.batch, step, c.seed).tolist()
        parts = [picked[i:i + c.micro] for i in range(0, c.batch, c.micro)]
        calls = [self.calls[x][-len(parts):] for x in ("provide", c.loss)]
        for m in net.modules():
            if isinstance(m, sft.QuartetLinear):
                m.begin(step)                                            # the same draws again
        xs = [self.expected(part) for part in parts]
        self.of_the_step(xs, picked)
        for given, call, x in zip(*calls, xs):
            assert torch.equal(given.tokens, x.tokens) and torch.equal(given.mask, x.mask)
            assert set(given.own[0]) >= set(x.numbers) - {"reward"}
            for key in needs(sft.LOSSES[c.loss]):
                assert ARGUMENTS[key](getattr(call, key), x), (c.loss, key, step)
            assert call.grad <= {"logp"} and ("logp" in call.grad) == hasattr(call, "logp")
        count = sum(x.mask.sum() for x in xs)
        losses = [FORMULAS[c.loss](x) for x in xs]
        loss = sum(y.sum() / (count if y.dim() == 2 else c.batch) for y in losses)
        aux = sum(x.balance * len(x.tokens) / c.batch for x in xs)
        whole = loss + net.config.router_aux_loss_coef * aux
        params = {n: p for n, p in net.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(whole, list(params.values()), allow_unused=True)
        grads = {n: g if g is not None else torch.zeros_like(p)
                 for (n, p), g in zip(params.items(), found)}
        if c.prune != "none":                             # what is cut is no parameter any more
            grads = {n: g * (params[n] != 0) if n.endswith("_proj.weight") else g
                     for n, g in grads.items()}
        self.tolerance = 0.02 if c.linear in ("halo", "quartet") else 2e-3
        for n, p in params.items():
            assert off(grads[n], p.grad) < self.tolerance, (n, step)
        assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
        norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
        self.steps.append(SimpleNamespace(
            loss=loss.item(), aux=aux.item(), tokens=count.item(), norm=norm, grads=grads,
            weights=self.weights, flags=self.flags, picked=picked, xs=xs))

    def expected(self, part):
        """What a loss may read, of these rows."""
        some = [self.rows[j] for j in part]
        tokens, mask, real = collated(some, self.tok)
        x = SimpleNamespace(rows=part, tokens=tokens, mask=mask, numbers=some[0].numbers)
        x.law = laws(self.net, tokens)
        x.balance = llm.load_balance_loss(self.net, real)
        x.logp = logp_of(x.law, tokens, mask)
        x.now = -x.logp.detach().sum(1) / mask.sum(1)
        for key in x.numbers:
            setattr(x, key, torch.tensor([float(r.numbers[key]) for r in some]))
        for key, net in self.nets.items():
            setattr(x, key, laws(net, tokens))
        if "init" in self.nets:
            x.ref_logp = logp_of(x.init, tokens, mask)
        return x

    def of_the_step(self, xs, picked):
        """What depends on other rows of the step, or on earlier ones: before, weight."""
        now = torch.cat([x.now for x in xs])
        low, high = now.min(), now.max()
        weight = torch.softmax((2 * (now - low) / (high - low)).clamp(max=1), 0) * len(now)
        weight = dict(zip(picked, weight.tolist()))
        for x in xs:
            x.weight = torch.tensor([weight[j] for j in x.rows])
            x.before = torch.tensor([self.before.get(j, math.nan) for j in x.rows])
        for x in xs:
            self.before |= zip(x.rows, x.now.tolist())

    def check_clipped(self, call):
        """Gradients as the optimiser finds them, and the learning rate."""
        step = self.steps[-1]
        shrink = min(1.0, self.c.clip / step.norm)
        for n, p in self.net.named_parameters():
            if p.requires_grad:
                assert off(step.grads[n] * shrink, p.grad) < self.tolerance
        rate = self.calls[self.c.schedule][-1]
        assert rate.step == len(self.steps) - 1 and call.lr == self.c.lr * rate.out


def off(want, got):
    """The relative distance of two gradients."""
    if got is None:
        return want.norm().item()
    return ((want - got).norm() / (want.norm() + 1e-7)).item()


def same(a, b, tol=2e-4):
    return close(a.detach(), b.detach(), tol)


def same_laws(found, want, mask):
    """Whether a head and its inputs say what whole distributions say, of the scored tokens."""
    hidden, head = found
    return same(torch.log_softmax(hidden @ head.T, -1), want[mask[:, 1:] > 0])


# an argument of a loss: (what it was given, what is expected) -> whether they agree
ARGUMENTS = dict(
    {key: lambda found, x, key=key: same(found, getattr(x, key))
     for key in ("logp", "ref_logp", "mask", "good", "score", "weight")},
    before=lambda found, x: torch.equal(found.isnan(), x.before.isnan())
    and same(found.nan_to_num(), x.before.nan_to_num()),
    student=lambda found, x: same_laws(found, x.law, x.mask),
    teacher=lambda found, x: same_laws(found, x.teacher, x.mask),
    other=lambda found, x: same_laws(found, x.other, x.mask))


def test_every_row_has_a_formula_here_and_every_argument_an_oracle():
    assert sft.LOSSES.keys() == FORMULAS.keys() and sft.FEEDBACK.keys() == ROWS.keys()
    assert {key for loss in sft.LOSSES.values() for key in needs(loss)} == ARGUMENTS.keys()


AXES_HERE = "loss", "linear", "prune", "schedule", "peft", "store"
LONE = {name for axis in AXES_HERE for name in sft.AXES[axis]
        if sum(name in rows for rows in sft.AXES.values()) == 1}   # unlikelihood: preset unlikely
MORE = {"target_docs": ["--context", "420"], "bone": ["--peft.rank", "32"],
        "bat": ["--peft.rank", "32"], "loram": ["--peft.rank", "4"],
        "journey": ["--begin", "0", "--end", "0.5"], "qat": ["--bits", "3"],
        "halo": ["--level", "1", "--format", "fp8"],
        "quartet": ["--exponent", "quest_floor", "--backward", "nearest"],
        "lost": ["--gamma", "0.6", "--phi", "identity", "--linear.start", "random"]}


def argv_of(name):
    """A run of two steps of a preset or row, from a random checkpoint where it starts from one; two
    forward passes a step, and rows that come back in the second."""
    names = ["--config", name if name == "tiny" else f"{name},tiny"]
    changes = dict(sft.PRESETS.get(name, {}))
    argv = [*names, "--steps", "2", "--batch", "12", "--micro", "8", "--save_every", "1", "--keep",
            "3", "--eval_every", "2", "--warmup", "3", "--out", "run", "--device", "cpu"]
    if "data" not in changes:
        argv += ["--data", "toyif"]
    c, f = configure(sft.Config, sft.PRESETS, sft.AXES, "", [*names, *argv[2:]])
    if not text.is_corpus(c.data):
        argv += ["--rows", "20"]
    if c.init:
        argv += ["--init", "init"]
        save_random("init", "toyif" if c.data.startswith("toyif") else words_of(c), ORIGINS["init"])
    for key in needs(f.loss):
        if key in ("teacher", "other"):
            save_random(key, words_of(c), ORIGINS[key])
            argv += [f"--{key}", key]
    return merged(*argv, *MORE.get(name, []))


@pytest.mark.parametrize("name", sorted({*sft.PRESETS, *LONE} - {*sft.RULES, "unlikelihood"}))
def test_every_preset_reads_and_trains_what_it_says(name, small_world, monkeypatch, capsys):
    """with the size preset tiny, on the data that it names"""
    w = Watch(monkeypatch, argv_of(name))
    assert len(w.steps) == 2 and checkpoint("run").name == "step-000002"
    check_told(w, capsys.readouterr().out)
    check_start(w)
    check_log(w)
    check_update(w)
    check_evaluation(w)
    check_samples(w)
    check_saved(w)


def good_tag(w):
    """What a good answer's prompt ends in."""
    return w.tok.encode(".") if w.c.feedback in ("conditional", "hindsight") else []


def check_start(w):
    """The weights of the first step are the checkpoint's, or those of a new model of the size,
    words and family that are asked for; the optimiser got it with this run's numbers."""
    c, opt = w.c, w.calls["update"][0]
    if c.init:
        start = w.nets["init"]
    else:
        tok = (train_bpe(PAGES["train"] if c.data == "stdlib" else [], c.vocab)
               if c.tokenizer == "bpe" else ALPHABETS[c.tokenizer]())
        assert w.tok.tokens == tok.tokens
        start = llm.init(llm.preset(c.model, tok, 2 * c.context, c.family), c.seed)
        assert w.net.config == start.config
    if c.peft in ("full", "hft") and c.linear != "lost" and c.store == "float32":
        first = w.steps[0].weights
        assert all(torch.equal(first[n], p) for n, p in start.named_parameters())
    trained = {n.split(".")[-1] for n, p in w.net.named_parameters() if p.requires_grad}
    parts = dict(lora={"A", "B"}, loram={"A", "B"}, bone={"M"}, bat={"M"})
    assert trained == parts.get(c.peft, trained) and (
        c.peft != "full" or all(p.requires_grad for p in w.net.parameters()))
    given = w.f.linear.keywords
    for m in w.net.modules():
        if isinstance(m, sft.HaloLinear):
            assert m.product.keywords == given
        elif isinstance(m, sft.QuartetLinear):
            assert m.how == given
        elif isinstance(m, sft.LostLinear):
            assert m.how == dict(gamma=0.6, phi="identity")
        elif isinstance(m, sft.QATLinear):
            assert m.bits == given["bits"] == 3
    assert opt.model is w.net and opt.rule.func is sft.RULES[c.optimiser]
    assert (opt.lr, opt.weight_decay, opt.seed) == (c.lr, c.weight_decay, c.seed)


def check_log(w):
    """loss, norm, tokens, aux and lr of each step."""
    log, grads = [row for row in read_log("run") if "loss" in row], w.tolerance
    for i, (step, logged) in enumerate(zip(w.steps, log, strict=True)):
        assert logged["step"] == i + 1 and logged["tokens"] == step.tokens
        assert logged["loss"] == pytest.approx(step.loss, rel=1e-4, abs=1e-6)
        assert logged["norm"] == pytest.approx(step.norm, rel=grads)
        assert logged.get("aux", 0.0) == pytest.approx(step.aux, rel=1e-4)
        assert logged["lr"] == w.calls["set_lr"][i].lr
        rate = w.calls[w.c.schedule][i]
        assert (rate.step, rate.steps, rate.warmup) == (i, 2, w.c.warmup)
        if w.c.schedule == "power":
            tokens = w.c.batch * sum(len(x.completion) for x in w.rows) / len(w.rows)
            assert (rate.lr, rate.batch, rate.tokens) == (w.c.lr, w.c.batch, tokens)


def check_told(w, out):
    """What the terminal says: sizes, the first row, the share of clipped steps, samples."""
    size = sum(p.numel() for p in w.net.parameters()) / 1e6
    trained = sum(p.numel() for p in w.net.parameters() if p.requires_grad) / 1e6
    assert (f"run: {size:.2f} M parameters ({trained:.2f} M trained), {len(w.rows)} rows, "
            "2 steps of 12, cpu float32") in out
    first = [w.tok.decode(ids, False) for ids in (w.rows[0].prompt, w.rows[0].completion)]
    assert f"not scored {first[0][-160:]!r}\n  scored     {first[1][:160]!r}" in out
    for group in w.calls["update"][0].out.param_groups:
        decay = group["peak"] * group["weight_decay"]
        assert (f"{len(group['params'])} tensors, lr {group['peak']:.3g}, "
                + (f"decay time {1 / decay:.0f} steps" if decay else "no decay")) in out
    assert "adamw 8.00 bytes a parameter" in out
    clipped = sum(step.norm > w.c.clip for step in w.steps) / 2
    assert f"clipped steps: {clipped:.0%}" in out
    if not text.is_corpus(w.c.data):
        task, roll = tasks.task(w.c.data), w.calls["generate"][-1].out.completions()
        for p, ids in zip(task.problems("val", 3, w.c.seed), roll):
            seen = w.tok.decode([*w.tok.prompt(p), *good_tag(w)], skip_specials=False)
            assert (f"prompt     {seen!r}\n  model      {w.tok.decode(ids)!r}\n"
                    f"  reference  {task.demo(p)!r}") in out


def check_update(w):
    """AdamW's first step: the clipped gradient's sign, nearly, behind the decay of the matrices."""
    c, (one, two) = w.c, w.steps
    if c.optimiser != "adamw" or c.store != "float32" or c.prune != "none":
        return
    shrink = min(1.0, c.clip / one.norm)
    for group in w.calls["update"][0].out.param_groups:
        lr = w.calls["set_lr"][0].lr * group["scale"]
        for n in group["names"]:
            g, W = one.grads[n] * shrink, one.weights[n]
            want = W * (1 - lr * group["weight_decay"]) - lr * g / (g.abs() + 1e-8)
            far = ((two.weights[n] - want).abs() > 0.02 * lr) & (g.abs() > 1e-6)
            assert far.float().mean() < 0.01, n


def check_evaluation(w):
    """Nats a scored token and bits a byte, of each split's rows."""
    c, tok, logged, tag = w.c, w.tok, read_log("run")[-1], good_tag(w)
    splits = {split: demonstrations(c, tok, split, 256) for split in tasks.held_out(c.data)}
    if c.watch:
        splits["watch"] = windows(c, tok, "val")
    assert {k.split("_")[0] for k in logged if k.endswith("_bpb")} == splits.keys()
    special = {*tok.specials.values(), tok.bos, tok.eos, tok.pad}
    for split, rows in splits.items():
        nats = count = size = 0.0
        for x in rows if split != "watch" else ():
            x.prompt += tag
        for i in range(0, min(256, len(rows)), 64):
            tokens, mask, _ = collated(rows[i:min(256, i + 64)], tok)
            with torch.no_grad():
                nats -= logp_of(laws(w.net, tokens), tokens, mask).sum().item()
            count += mask.sum().item()
            size += sum(len(tok.tokens[t]) for t in tokens[mask > 0].tolist() if t not in special)
        rel = 0.02 if c.linear in ("halo", "quartet") else 1e-4
        assert logged[f"{split}_loss"] == pytest.approx(nats / count, rel=rel)
        assert logged[f"{split}_bpb"] == pytest.approx(nats / math.log(2) / size, rel=rel)
        assert w.result[f"{split}_loss"] == logged[f"{split}_loss"]
    if "saved_loss" in w.result:
        net = w.calls["generate"][-1].model                          # as it was saved
        with torch.no_grad():
            tokens, mask, _ = collated(demonstrations(c, tok, "val", 256), tok)
            nats = -logp_of(laws(net, tokens), tokens, mask).sum() / mask.sum()
        assert w.result["saved_loss"] == pytest.approx(nats.item(), rel=1e-4)


def check_samples(w):
    """The task's metric: of the samples that held-out prompts got."""
    c, tok, calls = w.c, w.tok, w.calls["generate"]
    if text.is_corpus(c.data):
        assert not calls
        return
    task, (call,) = tasks.task(c.data), calls[c.feedback == "sampled":]
    problems = task.problems("val", 64, c.seed)
    assert call.prompts == [tok.prompt(p) + good_tag(w) for p in problems]
    room = call.model.config.max_position_embeddings - max(map(len, call.prompts))
    assert call.max_new_tokens == min(task.max_new, room) and call.temperature == 1.0
    rewards = [task.reward(p, tok.decode(ids), done) for p, ids, done in
               zip(problems, call.out.completions(), call.out.finished.tolist())]
    assert w.result[f"val_{task.metric}"] == pytest.approx(sum(rewards) / 64)


def test_the_metric_is_that_of_each_prompt_s_own_answer(monkeypatch, capsys):
    """of answers that are right, in part, and some of them unfinished"""
    task, tok, asked = tasks.task("toyif"), prefs.tokenizer(), []
    problems = task.problems("val", 6, 0)
    done = torch.tensor([True, True, False, True, True, False])
    answers = [tok.encode(task.demo(p)) for p in problems]

    def generate(net, prompts, new, generator):
        asked.append((prompts, new))
        return SimpleNamespace(completions=lambda: answers, finished=done)
    monkeypatch.setattr(sft, "generate", generate)
    c = sft.Config(data="toyif")
    net = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=20))
    got = sft.show(net, tok, problems, c, SimpleNamespace(say=print), [7])
    rewards = [task.reward(p, task.demo(p), ok) for p, ok in zip(problems, done.tolist())]
    assert got == {task.metric: pytest.approx(sum(rewards) / 6)} and len(set(rewards)) > 2
    (prompts, new), = asked
    assert prompts == [[*tok.prompt(p), 7] for p in problems]
    assert new == min(task.max_new, 20 - max(map(len, prompts)))
    assert capsys.readouterr().out.count("prompt ") == 3


def test_as_many_prompts_are_answered_as_are_asked_for(monkeypatch):
    """none: nothing is sampled at the end of a run"""
    seen = []
    monkeypatch.setattr(sft, "show", lambda net, tok, problems, *_: seen.append(problems) or {})
    task = tasks.task("toyif")
    for n in (0, 3):
        c = sft.Config(data="toyif", eval_prompts=n, seed=7)
        known = dict(run=SimpleNamespace(say=print), net=1, tok=prefs.tokenizer())
        f = SimpleNamespace(loss=sft.nll, feedback=SimpleNamespace(keywords={}))
        sft.conclude(c, f, {}, {}, known)
    assert seen == [task.problems("val", 3, 7)]


def check_saved(w):
    """The last checkpoint is the model that was trained, whole and plain; memories are there."""
    c, state = w.c, torch.load("run/step-000002/state.pt", weights_only=True)
    if c.linear not in ("lost", "qat") and c.peft != "loram":
        saved, tokens = llm.load("run")[0], w.steps[0].xs[0].tokens
        assert llm.load("run")[1].tokens == w.tok.tokens
        if c.peft in ("full", "hft") and c.store == "float32":
            parts = dict(w.net.named_parameters())
            assert all(torch.equal(p, parts[n]) for n, p in saved.named_parameters())
        if c.linear == "plain":
            with torch.no_grad():
                assert (laws(saved, tokens) - laws(w.net, tokens)).abs().mean() < 1e-3
    if c.loss == "glow":
        assert state["memories"]["before"].keys() == w.before.keys()
        assert all(abs(x - w.before[j]) < 1e-4 for j, x in state["memories"]["before"].items())
    if c.linear == "qat":
        assert not any(w.steps[0].flags) and all(w.steps[1].flags) and w.steps[1].flags
