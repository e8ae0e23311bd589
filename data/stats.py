"""
stats.py - statistics that several scripts report: rank correlation, AUROC, accuracy of pairs, what
best of n samples is worth, pass@k, how well a critic explains returns.
"""
import math
import statistics

import torch


def accuracy(chosen, rejected):
    """mean of 1[r_c > r_r] + ½ 1[r_c = r_r]"""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


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


def log_choose(a, b):
    """log of the number of ways to choose b of a."""
    return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)


def best_of_n(proxy, value, n):
    """Unbiased value of the best of n by proxy, from N samples a prompt (2210.10760,
    2310.02743).   [P, N], [P, N] -> [P]

    E = Σ_{i>=n} C(i-1, n-1)/C(N, n) value_(i), samples sorted by proxy, worst first; n = 1 is the
    mean."""
    i = torch.arange(1, proxy.size(1) + 1, dtype=torch.float64)
    n = torch.tensor(float(n), dtype=torch.float64)
    log_w = log_choose((i - 1).clamp(min=n - 1), n - 1) - log_choose(i[-1], n)
    w = torch.where(i >= n, log_w.exp(), 0.0)
    return (value.gather(1, proxy.argsort(1)).double() * w).sum(1)


def bon_kl(n):
    """KL of best-of-n to its base, at most:  log n - (n-1)/n  nats (2210.10760; exact without
    ties)."""
    return math.log(n) - (n - 1) / n


def rank_correlation(a, b):
    """Spearman's correlation within each row, averaged over the rows where both vary.   a, b [P, G]

    Does one score order a prompt's own samples as the other does? 0: it says nothing about them.
    """
    rows = [spearman(x, y) for x, y in zip(a, b) if x.std() > 0 and y.std() > 0]
    return sum(rows) / max(1, len(rows))


def explained_variance(values, returns, mask):
    """1 - Var(R - V) / Var(R) over the mask: 0 for a constant critic, 1 for a perfect one.

    values, returns, mask [B, T]; of a critic with several heads [B, T, K] their means.
    """
    values, returns = (x.mean(-1) if x.dim() > mask.dim() else x for x in (values, returns))

    def mean(x):
        return (x * mask).sum() / mask.sum().clamp(min=1)

    def var(x):
        return mean((x - mean(x)) ** 2)
    return 1 - var(returns - values) / var(returns).clamp(min=1e-8)


def pass_at_k(n, correct, k):
    """1 - C(n-c, k) / C(n, k): that one of k samples is right, from c of n (2107.03374 eq. 1)."""
    out = 1.0
    for i in range(n - correct + 1, n + 1):
        out *= 1 - k / i
    return 1 - out


def of_samples(right, answers):
    """{"pass@2", "pass@4", … up to G; "maj@G"} of right [P, G] and what each response stated.

    maj@G: the share of prompts whose most frequent answer is right ("" is none; ties: the first).
    """
    G, out = right.size(1), {}
    counts, rows = right.sum(1).tolist(), right.tolist()
    for k in sorted({min(2 ** i, G) for i in range(1, 12)} if G > 1 else ()):
        out[f"pass@{k}"] = statistics.fmean(pass_at_k(G, n, k) for n in counts)
    wins = 0
    for i, row in enumerate(rows):
        mine = answers[i * G:(i + 1) * G]
        votes = [x for x in mine if x]
        winner = max(votes, key=votes.count) if votes else None
        wins += any(ok for ok, x in zip(row, mine) if x == winner)
    return out | {f"maj@{G}": wins / len(rows)}
