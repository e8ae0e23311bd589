"""
judging.py - what verdicts on pairs become: scores, routes, votes, advantages; numbers that grade
the judge.

    S, U = pair_scores(F, U)                     # both orders of all pairs -> antisymmetric scores
    S, calls = route(S, U, judge, threshold=1.45)  # ask the dear judge where the cheap one is
    unsure
    pairwise_rloo(S)                             # advantages of a prompt's K responses
    parse_verdict("… <answer>-2</answer>")       # -2: A is better, strength 2

Map      1 pairs of responses   2 advantages   3 ratings, annotators   4 written verdicts   5
statistics
         6 the evaluation of a reward: table, best of n, attacks, picture   7 a judge that knows
         what it has not seen
Pure functions of tensors and text, for reward.py, and for policies that learn from judges.
"""
import json
import math
import random
import re
import statistics
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from data.prefs import subsets
from data.run import pyplot

# --- pairs of responses: whom to ask, and what the answers are worth (2510.20369, 2505.16265) -----


def pair_scores(F12, U):
    """Both orders of all pairs -> antisymmetric scores and symmetric uncertainty.   [K, K] each

    s_ij = (f(i,j) - f(j,i)) / 2,  u_ij = (u(i,j) + u(j,i)) / 2, diagonals 0."""
    off = 1 - torch.eye(len(F12), dtype=F12.dtype)
    return (F12 - F12.T) / 2 * off, (U + U.T) / 2 * off


def by_uncertainty(s, u, wrong):
    """Ask about the pairs of highest uncertainty.   -> priority [N], higher is asked first"""
    return u


def by_margin(s, u, wrong):
    """Ask where the logit is smallest: the cheap control that needs no Gaussian process."""
    return -s.abs()


def by_both(s, u, wrong):
    """Ask where the calibrated logit |s u| is smallest (the released evaluation's "min")."""
    return -(s * u).abs()


def by_oracle(s, u, wrong):
    """Ask about the errors: the ceiling of every router."""
    return wrong.float()


ROUTERS = dict(uncertainty=by_uncertainty, margin=by_margin, both=by_both, oracle=by_oracle)


def route(S, U, judge, threshold=0.0, budget=None, logit=2.0):
    """Ask the judge about pairs i < j with u_ij > threshold, at most `budget` of them, most
    uncertain first.

    judge(i, j) -> 1, 2, 0 (tie) or None (failed: the score stays). S, U [K, K] -> S with ±logit or
    0 in the routed places, antisymmetric, and the number of calls."""
    pairs = [(i, j) for i in range(len(S)) for j in range(i + 1, len(S)) if U[i, j] > threshold]
    pairs = sorted(pairs, key=lambda p: -U[p].item())[:budget]
    S = S.clone()
    for i, j in pairs:
        said = judge(i, j)
        if said is not None:
            S[i, j] = {1: logit, 2: -logit, 0: 0.0}[said]
            S[j, i] = -S[i, j]
    return S, len(pairs)


def pairwise_rloo(S, scale=1.0):
    """A_i = scale/(K-1) Σ_j s_ij: RLOO when s_ij = r_i - r_j (2510.20369).   [.., K, K] -> [..,
    K]"""
    return scale * S.sum(-1) / max(1, S.size(-1) - 1)


def pairwise_grpo(D, eps=1e-6):
    """Think-RM's pairwise advantage (2505.16265): GRPO when d_ij = r_i - r_j.   [.., G, G] -> [..,
    G]

    A_i = (1/G) Σ_j d_ij / sqrt(Σ d²/(2G(G-1)) + eps), eps inside the root as in the released
    code"""
    G = D.size(-1)
    return D.mean(-1) / ((D ** 2).sum((-1, -2))[..., None] / (2 * G * (G - 1)) + eps).sqrt()


def rloo(r):
    """RLOO (2402.14740):  A_i = (G r_i - Σ r) / (G - 1).   [P, G] -> [P, G]"""
    return (r.size(1) * r - r.sum(1, keepdim=True)) / max(1, r.size(1) - 1)


def group_norm(r, *, eps=1e-6):
    """GRPO (2402.03300):  A = (r - mean) / (std + eps), unbiased std.   [P, G] -> [P, G]"""
    return (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)


# --- ratings and annotators -----------------------------------------------------------------------


def ranknet(s, ranks):
    """mean over pairs with rank_i < rank_j of log(1 + exp(s_j - s_i)) / (rank_i + rank_j).   [B, K]
    -> [B]"""
    above = (ranks[:, :, None] < ranks[:, None, :]).float()                    # [B, K, K] i above j
    loss = F.softplus(s[:, None, :] - s[:, :, None]) / (ranks[:, :, None] + ranks[:, None, :])
    return (above * loss).sum((1, 2)) / above.sum((1, 2)).clamp(min=1)


def ridge(X, Y, alpha):
    """argmin_W Σ (X W - Y)² + α|W|² over the labelled rows of each column.   X [N, D], Y [N, K] ->
    [K, D]"""
    rows = [(X[k], y[k]) for y in Y.T for k in [y.isfinite()]]
    eye = torch.eye(X.size(1), dtype=X.dtype)
    return torch.stack([torch.linalg.solve(x.T @ x + alpha * eye, x.T @ y) for x, y in rows])


PENALTIES = (0, .01, .025, .05, .075, .1, .125, *(i / 20 for i in range(3, 20)))


def verbosity_penalties(R, v, threshold=0.03):
    """ArmoRM (2406.12845): the smallest λ_k of PENALTIES with Spearman(r_k - λ_k r_v, r_v) <=
    threshold.

    R [N, K] ratings of a reference set, v the verbosity column -> [K]; 1 where none passes, and for
    v."""
    out = [next((x for x in PENALTIES if spearman(R[:, k] - x * R[:, v], R[:, v]) <= threshold),
                1.0)
           for k in range(R.size(1))]
    return torch.tensor([1.0 if k == v else x for k, x in enumerate(out)])


def assign(margins, annotator):
    """E-step of MaxMin-RLHF's mixture (2402.08925): each annotator goes to the model that likes
    their pairs
    best.   margins [U, N] of each model on the labelled pairs, annotator [N] ids -> [annotators] in
    0..U-1"""
    total = torch.zeros(int(annotator.max()) + 1, len(margins))                          # [A, U]
    return total.index_add(0, annotator, F.logsigmoid(margins).T).argmax(1)


# --- generative judges: verdicts, rule rewards, votes ---------------------------------------------


def parse_verdict(text):
    """Think-RM's score (2505.16265): the last of ±1..±3 in the last <answer> block; negative: A is
    better.

    None if there is no such block or number. The world ParityJudge has its own:
    tasks.ParityJudge.parse."""
    blocks = re.findall(r"<answer>(.*?)</answer>", text, re.S)
    hits = re.findall(r"(?<!\d)(?<!\d\.)-?[123](?!\d|\.\d)", blocks[-1]) if blocks else []
    return int(hits[-1]) if hits else None


def graded(said, label):
    """Think-RM's multiclass rule reward: 1 for the very score, 0.5 for its sign, else 0 (also for
    None)."""
    return 0.0 if said is None else 1.0 if said == label else 0.5 if said * label > 0 else 0.0


def right_sign(said, label):
    """Think-RM's binary rule reward: 1 if the preferred response is right, else 0."""
    return float(said is not None and said * label > 0)


RULE_REWARDS = dict(graded=graded, sign=right_sign)            # of a judge's score, given gold's


def tagged(text, label, window=80):
    """RM-R1's rule reward (2505.02387): +1 if the last 80 characters hold [[A]] or [[B]] as
    labelled and not the other tag, else -1. label "A" or "B"."""
    right, wrong = ("[[A]]", "[[B]]") if label == "A" else ("[[B]]", "[[A]]")
    return 1.0 if right in text[-window:] and wrong not in text[-window:] else -1.0


def majority(votes):
    """The sign of the sum of ±1 votes as 1.0, 0.0, or 0.5 for a tie or no vote at all; None casts
    no vote."""
    total = sum(1 if v > 0 else -1 for v in votes if v)
    return 0.5 if total == 0 else float(total > 0)


def verdict_rates(samples, greedy, labels):
    """Means over pairs: of one sample's verdict, of a _vote of all, _greedy, and _graded (see
    graded).

    samples [P][votes] and greedy [P]: scores, or None for no verdict, which counts ½ among samples
    and 0 where greedy or graded;  labels [P]: gold's, never 0."""
    signs = [[x and (1 if x * y > 0 else -1) for x in said] for said, y in zip(samples, labels)]
    each = {"": [majority(v[:1]) for v in signs], "_vote": map(majority, signs),
            "_greedy": map(right_sign, greedy, labels),
            "_graded": map(graded, [v[0] for v in samples], labels)}
    return {k: statistics.fmean(v) for k, v in each.items()}


def judge_matrix(says, G, length=None):
    """Verdicts s_ij (negative: i is better) of pairs i < j -> d [G, G] with d_ij = -s_ij, d_ji =
    s_ij.

    None counts as 0; length {pair: tokens of the judgement}: binary verdicts weigh 1/length
    (2505.16265)."""
    D = torch.zeros(G, G)
    for (i, j), s in says.items():
        D[i, j] = -(s or 0) if not length else -((s or 0) > 0) / length[i, j] + ((s or 0)
                                                                                 < 0) / length[i, j]
        D[j, i] = -D[i, j]
    return D


def expected_score(logits, values):
    """A judge's score as E[digit] under its verdict token (2506.05748).   [B, K] logits, [K] values
    -> [B]"""
    return torch.softmax(logits.float(), -1) @ values


def json_rubric(criteria, weights):
    """The one-line rubric of 2506.05748: {"criteria": […], "weights": […], "output": {"score":
    "1-10"}}."""
    return json.dumps(dict(criteria=criteria, weights=weights, output=dict(score="1-10")))


def self_label(s1, s2):
    """Would restarting be no better (2410.02725)? 1 if the first of two samples wins, 0.5 a tie,
    else 0."""
    return (s1 > s2).float() + 0.5 * (s1 == s2).float()


# --- evaluation: numbers of labelled pairs and of scored samples ----------------------------------


def accuracy(chosen, rejected):
    """mean of 1[r_c > r_r] + ½ 1[r_c = r_r]"""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


def ece(conf, correct, bins=5):
    """Expected calibration error over equal bins on (0.5, 1]: Σ n_b/n |mean confidence - share
    correct|."""
    which = ((conf - 0.5) * 2 * bins).ceil().clamp(1, bins)
    gaps = [(conf[which == b].mean() - correct[which == b].mean()).abs()
            * (which == b).float().mean() for b in range(1, bins + 1) if (which == b).any()]
    return float(sum(gaps))


def ranks(x):
    """Ranks from 0, ties share their mean.   [.., N]"""
    return ((x[..., None, :] < x[..., :, None]).sum(-1)
            + 0.5 * (x[..., None, :] == x[..., :, None]).sum(-1) - 0.5)


def auroc(score, positive):
    """P(s+ > s-) + ½ P(equal); 0.5 where one class is missing.   score [N], positive [N] bool"""
    n, m = positive.sum().item(), (~positive).sum().item()
    return float((ranks(score)[positive].sum() - n * (n - 1) / 2) / (n * m)) if n * m else 0.5


def spearman(a, b):
    """Rank correlation, 0 where one does not vary.   [N], [N]"""
    a, b = (x - x.mean() for x in (ranks(a), ranks(b)))
    norm = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def best_of_n(proxy, value, n):
    """Unbiased value of the best of n by proxy, from N samples a prompt (2210.10760,
    2310.02743).   -> [P]

    E = Σ_{i>=n} C(i-1, n-1)/C(N, n) value_(i), samples sorted by proxy, worst first; n = 1 is the
    mean."""
    N = proxy.size(1)
    i = torch.arange(1, N + 1, dtype=torch.float64)

    def log_choose(a, b):
        return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)
    n = torch.tensor(float(n), dtype=torch.float64)
    w = torch.where(i >= n, (log_choose((i - 1).clamp(min=n - 1), n - 1)
                             - log_choose(i[-1], n)).exp(), 0.0)
    return (value.gather(1, proxy.argsort(1)).double() * w).sum(1)


def bon_kl(n):
    """KL of best-of-n to its base, at most:  log n - (n-1)/n  nats (2210.10760; exact without
    ties)."""
    return math.log(n) - (n - 1) / n


def gao_fit(d, gold, kind):
    """Least squares of 2210.10760's forms, d = sqrt(KL) >= 0.2, gold from its value at 0 -> (α, β).

    bon: d (α - β d), peak at α/2β;   rl: d (α - β log d), peak at exp(α/β - 1)"""
    d, gold = d[d >= 0.2].double(), gold[d >= 0.2].double()
    X = torch.stack([d, -d * d if kind == "bon" else -d * d.log()], 1)
    return tuple(torch.linalg.lstsq(X, gold[:, None]).solution[:, 0].tolist())


def pushed(rows, window=5):
    """How a policy fared under a reward, from rl()'s rows: gold smoothed over `window` steps ->
    dict.

    peak and final gold; collapse: steps until gold is 10 % below its running maximum (all of them
    if never); gold@k: gold when the KL first reaches k nats a response (the last value if it never
    does)."""
    def smooth(key):
        x = [r[key] for r in rows]
        return [statistics.fmean(x[max(0, i - window + 1):i + 1]) for i in range(len(x))]
    gold, kl = smooth("gold"), smooth("kl")
    top = list(accumulate(gold, max))
    fell = [i for i, (g, m) in enumerate(zip(gold, top)) if g < m - 0.1 * abs(m)]
    return dict(peak=top[-1], final=gold[-1], collapse=fell[0] if fell else len(rows),
                kl_end=kl[-1]) | {
        f"gold@{k}": next((g for g, x in zip(gold, kl) if x >= k), gold[-1])
        for k in (0.5, 1, 2, 4, 8)}


def routing_curve(priority, right, judged, shares=(0, 0.1, 0.25, 0.4, 0.6, 0.8, 1)):
    """Accuracy once the judge has answered the share of highest priority -> {"accuracy@0.1": …,
    "area"}.

    right, judged [N]: credit of model and judge, 1, 0 or 0.5; area: the mean over 0.1, 0.25,
    0.4."""
    order, out = priority.argsort(descending=True), {}
    for q in shares:
        asked = order[:round(q * len(order))]
        out[f"accuracy@{q}"] = ((right.sum() - right[asked].sum() + judged[asked].sum())
                                / len(order)).item()
    return out | dict(area=sum(out[f"accuracy@{q}"] for q in (0.1, 0.25, 0.4)) / 3)


def routing_table(curves):
    """{name: routing_curve's result} as lines to read: accuracy by the share that the judge
    answers."""
    shares = [k for k in next(iter(curves.values())) if k.startswith("accuracy@")]
    lines = [" " * 14 + "".join(f"{k.partition('@')[2]:>8}" for k in shares)] + [
        f"{name:<14}" + "".join(f"{row[k]:>8.3f}" for k in shares) for name, row in curves.items()]
    return "\n  ".join(["\n  accuracy of the stream after the judge has answered a share of it",
                        *lines])


# --- the evaluation of a reward -------------------------------------------------------------------
# score([(prompt ids, response ids)]) -> [N];  sample(problems, n, seed) -> (n responses each,
# finished)


def grade(win, lose):
    """Accuracy, ECE, Brier score of labelled pairs, σ(r_c - r_r) as a probability -> (dict, conf,
    right)."""
    p = torch.sigmoid(win - lose)
    conf, right = torch.maximum(p, 1 - p), (p > 0.5).float()
    return dict(n=len(p), accuracy=accuracy(win, lose), ece=ece(conf, right),
                brier=((1 - p) ** 2).mean().item()), conf, right


def study(score, sample, world, tok, split, seed, prompts=48, n=64):
    """What a reward makes of samples of the policy that it will steer -> (numbers, best-of-n
    curve).

    Spearman with gold within a prompt, and with length over all; gold of best-of-n and its KL
    bound."""
    problems = world.problems(split, prompts, seed)
    ys, done = sample(problems, n, seed + 1)
    ends = [[*y, tok.eos] if d else y for y, d in zip(ys, done)]
    proxy = score([(tok.prompt(problems[i // n]), y) for i, y in enumerate(ends)]).view(prompts, n)
    gold = torch.tensor([world.reward(problems[i // n], tok.decode(y), d)
                         for i, (y, d) in enumerate(zip(ys, done))]).view(prompts, n)
    proxy = (proxy - proxy.mean()) / proxy.std().clamp(min=1e-8)
    curve = [dict(n=k, kl=bon_kl(k), proxy=best_of_n(proxy, proxy, k).mean().item(),
                  gold=best_of_n(proxy, gold, k).mean().item()) for k in (1, 2, 4, 8, 16, 32)]
    return dict(spearman=statistics.fmean(map(spearman, proxy, gold)),
                length_spearman=spearman(proxy.flatten(),
                                         torch.tensor([float(len(y)) for y in ends])),
                sft_gold=gold.mean().item(), bon8_gold=curve[3]["gold"],
                bon32_gold=curve[5]["gold"]), curve


def null_attack(score, ids, seed=0, iterations=300, longest=16):
    """The constant response that a reward likes best (2410.07137): random edits, kept while
    score(ids) rises.

    score: list of ids -> float, its mean over the search prompts; ids: the alphabet -> list of
    ids."""
    g = random.Random(seed)
    best = [g.choice(ids) for _ in range(4)]
    top = score(best)
    for _ in range(iterations):
        new, at, edit = list(best), g.randrange(len(best)), g.choice(("swap", "add", "cut"))
        if edit == "cut" and len(best) > 1:
            del new[at]
        elif edit == "add" and len(best) < longest:
            new.insert(at, g.choice(ids))
        else:
            new[at] = g.choice(ids)
        if (now := score(new)) > top:
            best, top = new, now
    return best


def attacks(score, sample, world, tok, seed, search=64, test=128, extra=4):
    """Two cheap attacks -> (numbers, the null model's text).

    null_wins: how often the constant response that null_attack found on 64 prompts beats samples of
    others; padding_wins: how often saying a sample's last token `extra` more times raises its
    score; also by gold."""
    problems = world.problems("val", search + test, seed + 7)
    prompts, held = [tok.prompt(p) for p in problems], problems[search:]
    null = null_attack(lambda y: score([(x, [*y, tok.eos])
                                        for x in prompts[:search]]).mean().item(),
                       [i for i in range(tok.vocab_size) if i not in tok.hidden], seed)
    ys, done = sample(held, 1, seed + 8)
    ends = [[*y, tok.eos] if d else y for y, d in zip(ys, done)]

    def gold(responses, finished):
        return torch.tensor([world.reward(p, tok.decode(y), d)
                             for p, y, d in zip(held, responses, finished)])
    out = dict(null_wins=accuracy(score([(x, [*null, tok.eos]) for x in prompts[search:]]),
                                  score(list(zip(prompts[search:], ends)))),
               null_wins_gold=accuracy(gold([null] * test, [True] * test), gold(ys, done)))
    keep = torch.tensor([bool(y) and d for y, d in zip(ys, done)])
    long = [[*y, *y[-1:] * extra] for y in ys]
    return out | dict(padding_wins=accuracy(*(score(list(zip(prompts[search:], rows)))[keep]
                                              for rows in (
        [[*y, tok.eos] for y in long], ends))),
        padding_wins_gold=accuracy(gold(long, done)[keep], gold(ys, done)[keep])), tok.decode(null)


def evaluate(score, sample, world, tok, sets, seed, say, path):
    """The evaluation of a reward, said and drawn -> dict of floats.

    sets {name: encoded pairs}; world None: no gold, so pairs alone. Attacks and best-of-n in a
    world."""
    table, points, curves, out = [], [], {}, {}
    say(f"\n  {'pairs':<26}{'n':>6}{'accuracy':>10}{'ECE':>8}{'Brier':>8}   (chance: accuracy 0.5)")
    for name, rows in sets.items():
        r = {id(row): x for row, x in zip(rows, torch.stack(
            [score([(row["prompt"], row[side]) for row in rows])
             for side in ("chosen", "rejected")], 1))}
        for part, members in subsets(name, rows).items():
            row, *point = grade(*torch.stack([r[id(m)] for m in members]).T)
            table.append(dict(subset=part) | row)
            points += [point] if part == name else []
            out |= {name: row["accuracy"]} if part == name else {}
            say(f"  {part:<26}{row['n']:>6}{row['accuracy']:>10.3f}{row['ece']:>8.3f}{row['brier']:>8.3f}")
    out |= dict(accuracy=statistics.fmean(out.values())) | {
        f"{row['subset'].replace(' ', '_')}_{k}": row[k] for row in table
        for k in ("accuracy", "ece")}
    if world:
        for split in ("val", "ood"):
            numbers, curves[split] = study(score, sample, world, tok, split, seed)
            out |= {f"{split}_{k}": v for k, v in numbers.items()}
        hacks, text = attacks(score, sample, world, tok, seed)
        out |= hacks
        say(f"\n  samples of the SFT model: Spearman with gold within a prompt {out['val_spearman']:.2f} "
            f"(ood {out['ood_spearman']:.2f}), with length {out['val_length_spearman']:.2f}\n"
            f"  null model: the constant {text!r} beats {hacks['null_wins']:.0%} of SFT samples by this "
            f"reward, {hacks['null_wins_gold']:.0%} by gold\n  padding raises this reward in "
            f"{hacks['padding_wins']:.0%} of samples, gold in {hacks['padding_wins_gold']:.0%}\n\n"
            + "  best of n " + "".join(f"{p['n']:>8}" for p in curves["val"]))
        for split, curve in curves.items():
            for what in ("proxy", "gold"):
                say(f"  {split + ' ' + what:<10}" + "".join(f"{p[what]:>8.2f}" for p in curve))
    bars = [(row["subset"], row["accuracy"]) for row in table]
    draw_evaluation(path, *map(torch.cat, zip(*points)), bars, curves)
    return out


def draw_evaluation(path, conf, correct, table, curves):
    """A reward model's picture: reliability, accuracy by subset [(name, accuracy)], and best-of-n
    curves {split: [dict(kl, proxy, gold)]}, where there are any."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3 if curves else 2, figsize=(14 if curves else 9.4, 3.8))
    edges = torch.linspace(0.5, 1, 11)
    inside = [(conf > a) & (conf <= b) for a, b in zip(edges, edges[1:])]
    axes[0].plot([0.5, 1], [0.5, 1], color="gray", lw=1, ls=":")
    axes[0].plot(*zip(*[(conf[k].mean(), correct[k].mean()) for k in inside if k.any()]),
                 marker="o", ms=3)
    axes[0].set(xlabel="confidence", ylabel="share correct", title="reliability, held-out pairs")
    axes[1].barh(*zip(*table))
    axes[1].axvline(0.5, color="gray", lw=1, ls=":")
    axes[1].set(xlabel="accuracy (chance 0.5)", xlim=(0, 1))
    axes[1].invert_yaxis()
    for i, (split, curve) in enumerate(curves.items()):
        for what, style in (("proxy", "--"), ("gold", "-")):
            axes[2].plot([p["kl"] ** 0.5 for p in curve], [p[what] for p in curve], style,
                         color=f"C{i}",
                         label=f"{split} {what}", marker="o", ms=3)
    if curves:
        axes[2].set(xlabel="sqrt KL of best of n, nats", title="best of n by this reward")
        axes[2].legend()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


# --- a judge that knows what it has not seen ------------------------------------------------------


class PairModel(nn.Module):
    """Pairwise preference classifier with a Gaussian process as last layer (SNGP, as in
    2510.20369).

    tokens of "prompt, first, second" [B, T], end [B] -> logit [B], > 0 if the first is better.
        h' = W_sn h + b, h the last hidden state;  φ = random_features(h');  g = wᵀ φ
    W, b of φ are drawn once, never trained. P = Σ φ φᵀ of the training set (add() after the last
    step) tells how far an input is from it. features 0: a plain linear head; sn False: h' = h, as
    in the released code.
    """

    def __init__(self, body, features=1024, sigma=0.05, sn=True, generator=None):
        super().__init__()
        D = body.config.hidden_size
        self.body, self.features, self.config = body, features, body.config
        self.pool = nn.Linear(D, D) if sn and features else nn.Identity()
        self.w = nn.Parameter(0.05 * torch.randn(features or D, generator=generator))
        for name, x in dict(W=torch.randn(features, D, generator=generator) * sigma,
                            b=torch.rand(features, generator=generator) * 2 * math.pi,
                            u=F.normalize(torch.randn(D, generator=generator), dim=0),
                            P=torch.zeros(features, features)).items():
            self.register_buffer(name, x)
        if sn and features:
            nn.init.orthogonal_(self.pool.weight, generator=generator)
            nn.init.zeros_(self.pool.bias)

    def phi(self, tokens, end):
        """The features that the last layer reads [B, R], in float32."""
        h = self.body(tokens)[torch.arange(len(tokens), device=tokens.device),
                              end - 1].float()                                              # [B, D]
        if not self.features:
            return h
        with torch.autocast(h.device.type, enabled=False):       # the kernel needs every bit
            if isinstance(self.pool, nn.Linear):  # one power iteration a training forward
                W = spectrally_bounded(self.pool.weight, self.u, int(torch.is_grad_enabled()))
                h = h @ W.T + self.pool.bias
            return random_features(h, self.W, self.b)

    def forward(self, tokens, end):
        return (self.phi(tokens, end) * self.w).sum(-1)                        # sum: never bfloat16

    @torch.no_grad()
    def add(self, tokens, end):
        """Count training rows in P; run over the whole training set, in both orders, after the last
        step."""
        phi = self.phi(tokens, end)
        with torch.autocast(phi.device.type, enabled=False):
            self.P += phi.T @ phi

    @torch.no_grad()
    def calibrated(self, tokens, end, ridge=30.0, lam=10.0):
        """(mean-field calibrated logit g / u, uncertainty u >= 1), both [B]."""
        phi = self.phi(tokens, end)
        u = (1 + lam * gp_variance(phi, self.P,
                                   ridge)).sqrt() if self.features else phi.new_ones(len(phi))
        return (phi * self.w).sum(-1) / u, u


def random_features(h, W, b):
    """φ(h) = sqrt(2/R) cos(W h + b), for W ~ N(0, σ²): φ(h)·φ(h') -> exp(-σ² |h - h'|² / 2).   ->
    [N, R]"""
    return math.sqrt(2 / len(W)) * torch.cos(h @ W.T + b)


def spectrally_bounded(W, u, steps=0, bound=1.0):
    """W min(1, c / σ(W)): a bound, no division. σ from u by power iteration, `steps` of it kept in
    u."""
    with torch.no_grad():
        for _ in range(steps):
            u.copy_(F.normalize(W @ F.normalize(W.T @ u, dim=0), dim=0))
        v = F.normalize(W.T @ u, dim=0)
    return W * (bound / (u @ W @ v)).clamp(max=1.0)


def gp_variance(phi, P, ridge):
    """ridge φᵀ (sym(P) + ridge I)⁻¹ φ, in (0, |φ|²]: large where training saw nothing; solved in
    float64.

    phi [N, R], P [R, R] -> [N]."""
    L = torch.linalg.cholesky((P + P.T).double() / 2 + ridge
                              * torch.eye(len(P), device=P.device).double())
    phi = phi.double()
    return (ridge * (phi * torch.cholesky_solve(phi.T, L).T).sum(1)).float()
