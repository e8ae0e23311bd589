"""
judging.py - judges of preference for dpo.py, P[i, j] = the probability that response i is preferred
to j; and what specdec.py learns to predict of two samples.
"""
import torch

from data.run import Positive, UserError

# --- judges of preference: P[i, j], the probability that response i is preferred to j -------------


def gold(score, *, sharp: Positive = 1.0):
    """Bradley-Terry on a world's gold reward:  P = σ(sharp (s_i - s_j)).   [K] -> [K, K]"""
    return torch.sigmoid(sharp * (score[:, None] - score[None]))


def duel(world, prompt, texts, *, cycle=2.0):
    """Ring's intransitive annotators: Bradley-Terry plus a cycle of dominant classes.   [(text,
    finished)]"""
    if not hasattr(world, "duel"):
        raise UserError("--judge duel: only Ring has intransitive annotators; take --data ring")
    return torch.tensor([[0.5 if i == j else world.duel(prompt, a[0], b[0], cycle, a[1], b[1])
                          for j, b in enumerate(texts)] for i, a in enumerate(texts)],
                        dtype=torch.float64)


def learned(judged, *, sharp: Positive = 1.0):
    """A reward model's scores as Bradley-Terry.   [K] -> [K, K]"""
    return gold(judged, sharp=sharp)


def cdr(density, *, strong="", weak="", sharp: Positive = 1.0):
    """CDR, 2411.02481: scores are mean log π_strong/π_weak; nothing is trained. Both are
    checkpoints."""
    return gold(density, sharp=sharp)


JUDGES = dict(gold=gold, duel=duel, cdr=cdr, PATH=learned)


def rewards_of(P):
    """Scores behind P: mean log-odds over the others; exact up to a constant for
    Bradley-Terry.   -> [K]"""
    return torch.logit(P, eps=1e-9).mean(1)


def self_label(s1, s2):
    """Would restarting be no better (2410.02725)? 1 if the first of two samples wins, 0.5 a tie,
    else 0."""
    return (s1 > s2).float() + 0.5 * (s1 == s2).float()
