"""
curricula.py - what group-relative RL trains on and is measured by: prompts, hints, tasks, pass@k.

    solvable([0, 3, 8, 1])                       # which prompts teach: RIF
    sufficient(3, accuracy)                      # which hints, of 0, 1, 2, suffice: KnowRL
    reweighted([losses of a, losses of b])       # the weights of objectives: RECAP
    pass_at_k(8, 2, 4)                           # .785714: one of 4 is right, where 2 of 8 were

Pure functions of numbers and text, for grpo.py.
"""
import itertools
import statistics
from bisect import bisect_left

import torch


def solvable(counts):
    """RIF (2507.05386): keep the prompts with a correct response among K, also those with nothing
    else."""
    return [n > 0 for n in counts]


def sufficient(m, accuracy, margin=0.0):
    """KnowRL's constrained subset search (2604.12627): the hints of 0 … m-1 that reach most with
    fewest.

    accuracy(frozenset of hints) -> float. H: those whose removal does not hurt; N, of H: those
    whose removal is best, removed outright; of the others in H every subset is tried. Of all within
    the margin of the best, a standard error of accuracy, the fewest hints.
    """
    full = frozenset(range(m))
    without = {i: accuracy(full - {i}) for i in full}
    most = max(accuracy(full), accuracy(frozenset()))
    H = {i for i in full if without[i] >= most - margin}
    N = {i for i in H if without[i] >= max(without.values())}
    C = sorted(H - N)
    tried = [full - N - set(x) for n in range(len(C) + 1) for x in itertools.combinations(C, n)]
    tried = [frozenset(), full, *tried]
    best = max(map(accuracy, tried))
    return min((x for x in tried if accuracy(x) >= best - margin),
               key=lambda x: (len(x), -accuracy(x)))


def reweighted(histories, *, window=10, temperature=5.0):
    """RECAP (2510.21978): the weights of K objectives from their losses, K softmax((c + i) / T).

    c = mean(last W) / mean(the W before): stalled is near 1, improving below; i = std(last W) / the
    sum of the two means: unstable. 1 each until all have 2 W values. The weights sum to K.
    """
    if min(map(len, histories)) < 2 * window:
        return [1.0] * len(histories)
    s = []
    for h in histories:
        last, before = statistics.fmean(h[-window:]), statistics.fmean(h[-2 * window:-window])
        s.append(last / max(before, 0.01) + statistics.pstdev(h[-window:])
                 / max(last + before, 0.01))
    return (len(s) * torch.softmax(torch.tensor(s, dtype=torch.float64) / temperature, 0)).tolist()


def spelled(ids, tok, chars):
    """How many of the ids spell the first `chars` characters."""
    return bisect_left(range(len(ids) + 1), chars, key=lambda i: len(tok.decode(ids[:i])))


def pass_at_k(n, correct, k):
    """1 - C(n-c, k) / C(n, k): the chance that one of k samples is right, from c of n (2107.03374
    eq. 1)."""
    out = 1.0
    for i in range(n - correct + 1, n + 1):
        out *= 1 - k / i
    return 1 - out


def of_samples(right, answers):
    """{"pass@2", "pass@4", … up to G; "maj@G"} of right [P, G] and what each response stated ("":
    nothing).

    maj@G: the share of prompts whose most frequent answer is right; ties: the first seen.
    """
    G, out = right.size(1), {}
    counts, rows = right.sum(1).tolist(), right.tolist()
    for k in sorted({min(2 ** i, G) for i in range(1, 12)} if G > 1 else ()):
        out[f"pass@{k}"] = statistics.fmean(pass_at_k(G, c, k) for c in counts)
    wins = 0
    for i, row in enumerate(rows):
        mine = answers[i * G:(i + 1) * G]
        said = [x for x in mine if x]
        top = max(said, key=said.count) if said else None
        wins += any(ok for ok, x in zip(row, mine) if x == top)
    return out | {f"maj@{G}": wins / len(rows)}


def crossing(rising, target, low=0.05, high=20.0):
    """x in [low, high] where an increasing function is the target, by bisection; None if it never
    is."""
    if rising(low) > target or rising(high) < target:
        return None
    while high / low > 1 + 1e-5:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return low
