"""
drafting.py - what a speculative run counts and predicts, and the drafter that needs no model.

    tally = Tally();  tally.note(kept, count, sure);  tally.efficiency, tally.predicted(cost)
    speculate(target, Lookup(), prompts, …)                # as with any drafter of specdec.py

Map      1 predictions   2 counts   3 prompt lookup
Letters  α the chance that a drafted token is kept, γ drafted tokens, G those of a round, B rows
"""
import math
from collections import Counter

import numpy as np
import torch

# --- 1 predictions: 2211.17192 --------------------------------------------------------------------


def block_efficiency(alpha, gamma):
    """Tokens a round where each of γ drafts is kept with probability α:  (1 - α^(γ+1)) / (1 -
    α)."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(alpha, gamma, c, v=1.0):
    """Over plain decoding:  E / (γ c + v).  The papers take v = 1."""
    return block_efficiency(alpha, gamma) / (gamma * c + v)


# --- 2 counts -------------------------------------------------------------------------------------

BINS = 10                # of the draft's confidence, in Tally.chance


class Tally:
    """What was counted: the numbers of a speculative run, and what draft lengths are chosen by.

    rounds: target passes, summed over rows; tokens that they gave, stop tokens included; proposed:
    drafted ones; passes {G: target passes of the whole batch}; tested, kept: by place in the draft;
    tries, hits: by the draft's confidence.
    """

    def __init__(self):
        self.rounds = self.tokens = self.proposed = 0
        self.passes, self.tested, self.kept = Counter(), Counter(), Counter()
        self.tries, self.hits = [0] * BINS, [0] * BINS

    def note(self, kept, count, sure):
        """One round: kept, count [B], sure [B, G]. Only tested tokens count: up to the first not
        kept."""
        self.passes[sure.size(1)] += 1
        for k, n, row in zip(kept.tolist(), count.tolist(), sure.tolist()):
            self.rounds, self.proposed = self.rounds + 1, self.proposed + n
            for j in range(min(k + 1, n)):
                place = min(BINS - 1, int(row[j] * BINS))
                self.tested[j] += 1
                self.kept[j] += j < k
                self.tries[place] += 1
                self.hits[place] += j < k

    def chance(self, sure):
        """How often tokens of this confidence [B, k] were kept, and at the end the mean.   -> [B,
        k+1]

        Counts start as if two tokens of each confidence had been tested, and kept as often as it
        says."""
        table = [(h + (2 * i + 1) / BINS) / (t + 2)
                 for i, (h, t) in enumerate(zip(self.hits, self.tries))]
        mean = (sum(self.hits) + 1.4) / (sum(self.tries) + 2)
        known = [[table[min(BINS - 1, int(x * BINS))] for x in row] for row in sure.tolist()]
        return torch.tensor([[*row, mean] for row in known], device=sure.device)

    @property
    def acceptance(self):
        """Kept of tested tokens."""
        return self.kept.total() / max(1, self.tested.total())

    @property
    def efficiency(self):
        """E, tokens a target pass and row."""
        return self.tokens / max(1, self.rounds)

    def predicted(self, cost):
        """The speedup that E and the measured costs of single passes give."""
        spent = sum(n * (G * cost.c + cost.v[G]) for G, n in self.passes.items())
        return self.efficiency * sum(self.passes.values()) / max(spent, 1e-9)

    def independent(self):
        """E if every drafted token were kept with the mean probability, whatever came before it."""
        return sum(n * block_efficiency(self.acceptance, G) for G, n in self.passes.items()) / max(
            1, sum(self.passes.values()))

    def numbers(self, cost, seconds, rows, plain):
        """A row of the table: `rows` prompts took `seconds`; plain: tokens a second without
        drafts."""
        drafts = sum(G * n for G, n in self.passes.items()) / max(1, self.passes.total())
        rate = (self.tokens + rows) / seconds  # the prefill gives each row its first token
        return dict(tokens_per_second=rate, speedup=rate / plain, predicted=self.predicted(cost),
                    acceptance=self.acceptance,
                    kept_of_drafted=self.kept.total() / max(1, self.proposed),
                    efficiency=self.efficiency, independent=self.independent(), drafts=drafts,
                    cost=cost.c,
                    verify_cost=float(np.interp(drafts, range(len(cost.v)), cost.v)))


COLUMNS = (f"  {'':<12}{'tokens/s':>9}{'speedup':>9}{'predicted':>10}{'acceptance':>11}{'kept/drafted':>13}"
           f"{'E':>7}{'E, i.i.d.':>10}{'drafts':>8}{'c':>7}{'v':>6}")


def line(name, row):
    """One line under COLUMNS."""
    shown = "".join(f"{row[k]:>{w}.{n}f}" for k, w, n in (
        ("tokens_per_second", 9, 1), ("speedup", 9, 2), ("predicted", 10, 2), ("acceptance", 11, 3),
        ("kept_of_drafted", 13, 3), ("efficiency", 7, 2), ("independent", 10, 2), ("drafts", 8, 2),
        ("cost", 7, 3), ("verify_cost", 6, 2)))
    return f"  {name:<12}{shown}"


def first_difference(target, a, b, prompt):
    """The target's gap between its two likeliest tokens, in nats, where two greedy completions
    part."""
    i = next(i for i, (x, y) in enumerate(zip([*a, -1], [*b, -1])) if x != y)
    with torch.no_grad():
        logits = target.logits(target(torch.tensor([[*prompt, *a[:i]]],
                                                   device=target.head.device))[:, -1])
    best = logits[0].topk(2).values
    return (best[0] - best[1]).item()


# --- 3 prompt lookup ------------------------------------------------------------------------------


class Lookup:
    """Prompt lookup: what followed the last n = 3, 2, 1 tokens where they stood last, in the row's
    own text.

    A point mass, so sampling keeps x with probability p(x). ours: the latest place, not the first.
    """
    model, context = None, math.inf

    def __init__(self, n=3):
        self.n = n

    def start(self, prompts, length, rows, new):
        self.seen = [[] for _ in rows]           # the tokens that `last` knows of, of each row
        self.last = [{} for _ in rows]           # (n tokens) -> where what followed them stands

    def keep(self, order):
        self.seen, self.last = ([x[i] for i in order.tolist()] for x in (self.seen, self.last))

    def read(self, seen, last, tokens):
        """Note where each n-gram was last followed by something."""
        for token in tokens:
            for n in range(1, min(self.n, len(seen)) + 1):
                last[tuple(seen[-n:])] = len(seen)
            seen.append(token)

    def propose(self, text, length, u, more):
        found = []
        for b, (seen, last) in enumerate(zip(self.seen, self.last)):
            self.read(seen, last, text[b, len(seen):length[b]].tolist())
            at = next((last[k] for n in range(self.n, 0, -1) if (k := tuple(seen[-n:])) in last),
                      len(seen))
            found.append(seen[at:])
        k, want = 0, torch.tensor([len(x) for x in found], device=text.device)           # [B]
        count, sure = torch.zeros_like(want), torch.ones_like(u[:, :, 0])
        while (alive := (want > k) & more(k, sure[:, :k])).any():
            k, count = k + 1, count + alive
        drafted = torch.zeros(len(text), k, dtype=torch.long, device=text.device)        # [B, G]
        for b, x in enumerate(found):
            drafted[b, :min(k, len(x))] = torch.tensor(x[:k], device=text.device)
        return drafted, None, count, sure[:, :k]
