"""
shaping.py - what a response is worth to training, and how many of its tokens train: grpo.py's
reward side.

Pure functions of [P, G] tensors (P prompts, G responses each). An argument without a default names
what the loop knows of a group; keyword-only arguments are options of grpo.py. Metrics read
`correct` alone.

    score        the reward: the verifier's, another's, or noise        correct     the verifier's,
    0 or 1
    length       in tokens; cap: the longest allowed                    truncated   no EOS before
    the cap
    trained      how many of its tokens train, see TRIMS                stated      it ended with an
    answer
    best         the prompt's shortest correct response yet  [P, 1]     reflections second looks:
    wait, but, …
    answer       a number for each different answer, -1 for none        pattern     forms of
    reasoning, [0, 1]
    truth_prob   of the true answer after the response's reasoning      base_prob   … after none, at
    first answer_prob  of its own answer, under a slow copy of the policy

Map      1 noise   2 trims   3 length   4 other rewards
"""
import torch

from data.run import Count, Positive, Share

# --- noise ----------------------------------------------------------------------------------------


def flipped(score, stated, generator, rate, level="group"):
    """Noise (2505.22653): 1 - r with probability `rate`, drawn once a group or response; no answer
    stays."""
    draw = torch.rand(len(score), 1 if level == "group" else score.size(1), generator=generator)
    return torch.where((draw.to(score.device) < rate) & (stated > 0), 1 - score, score)


# --- trims: how many tokens of each response train, [P, G] ----------------------------------------


def whole(length):
    """All of them."""
    return length


def ended(length, truncated):
    """DAPO's overlong filtering (2503.14476): none of a response that ran out of room."""
    return length * ~truncated


def outliers(correct, length, *, spread: Positive = 1.5, least=2):
    """DOT (2601.03969): in a group all correct, ⌊mean + α std⌋ of what is `least` tokens longer
    than that.

    The paper's α = 3 can never be reached in a group of ten or fewer: z <= (G - 1) / √G.
    """
    limit = (length.mean(1, keepdim=True) + spread * length.std(1, keepdim=True)).floor()   # [P, 1]
    cut = (correct.min(1, keepdim=True).values > 0) & (length - limit >= least)
    return torch.where(cut, limit, length)


def targets(correct, length, target, easy):
    """DLER's longest response; `easy` (if not 0): that of prompts half solved within the target
    (DA-DLER)."""
    solved = (correct * (length <= target)).mean(1, keepdim=True) >= 0.5                 # [P, 1]
    return torch.where(solved, float(easy or target), float(target))


def to_target(correct, length, *, target: Count = 22, easy=0):
    """DLER (2510.15110): as if generation had stopped at the target."""
    return torch.minimum(length, targets(correct, length, target, easy))


TRIMS = dict(whole=whole, ended=ended, outliers=outliers, to_target=to_target)

# --- shapers: what a response is worth to training, [P, G] ----------------------------------------


def plain(score):
    """The reward as it is."""
    return score


def overlong(score, length, cap, *, buffer=16):
    """DAPO (2503.14476 eq. 13): ±1, and minus up to 1 within the last `buffer` tokens before the
    cap."""
    return 2 * score - 1 + ((cap - buffer - length) / buffer).clamp(-1, 0)


def truncate(score, correct, length, *, target: Count = 22, easy=0):
    """DLER (2510.15110): nothing for a response longer than the target (see targets)."""
    return score * (length <= targets(correct, length, target, easy))


def regraded(score, length, trained):
    """DOT (2601.03969): what was cut has no end, and so no reward."""
    return score * (trained >= length)


def linear_length(score, length, cap, *, price=0.1, correct_only=False):
    """R - a L/C for every response, or for what earned something (correct_only): a control, no
    paper."""
    return score - price * length / cap * (score if correct_only else 1)


def among_correct(x, correct, unbiased=False):
    """Mean and std of x over each group's correct responses, [P, 1] each; std 1 where fewer than
    two."""
    n = correct.sum(1, keepdim=True)                                                     # [P, 1]
    mean = (x * correct).sum(1, keepdim=True) / n.clamp(min=1)
    var = ((x - mean) ** 2 * correct).sum(1, keepdim=True) / (n - int(unbiased)).clamp(min=1)
    return mean, torch.where(n > 1, var.sqrt(), torch.ones_like(var))


def easiest(correct, length, *, share: Share = 0.2, alpha=0.6):
    """GRPO-λ (2505.18086): in the ⌈λP⌉ groups with most correct responses, c (1 - α σ((L - μ) /
    s)).

    μ, s: mean and population std of the correct responses' lengths. Ties: the earlier prompt first.
    """
    mean, std = among_correct(length, correct)
    penalised = correct * (1 - alpha
                           * torch.sigmoid((length - mean) / std.clamp(min=1e-4)))          # [P, G]
    k = min(len(correct), -int(-share * len(correct) // 1))                            # the ceiling
    picked = correct.mean(1).argsort(descending=True, stable=True)[:k]                   # [k]
    chosen = torch.zeros(len(correct), 1, dtype=torch.bool,
                         device=correct.device).index_fill(0, picked, True)
    return torch.where(chosen, penalised, correct)


def history(correct, length, best, *, weight=1.0, floor=-0.7, wrong_penalty=True):
    """HAPO (2505.11225): c + w f, f = cos(π/2 L/h) up to twice the prompt's record h, else -1; 0
    without one.

    best [P, 1]: h, inf for none. Correct: max(f, floor); wrong: min(f, 0), or 0 (wrong_penalty
    False).
    """
    f = torch.where(length < 2 * best, torch.cos(torch.pi / 2 * length / best),
                    -torch.ones_like(length))
    wrong = f.clamp(max=0) if wrong_penalty else torch.zeros_like(f)
    f = torch.where(correct > 0, f.clamp(min=floor), wrong)
    return correct + weight * torch.where(torch.isfinite(best), f, torch.zeros_like(f))


def reflective(correct, length, reflections, *, low=1, high=3):
    """ARLCP (2602.12113): c (1 - λ1 σ(z_K) - λ2 σ(z_L)), λ1 = .05, .10, .15 by the reflections K,
    λ1+λ2 = .2.

    z: against the group's correct responses. The paper's steps are 40 and 80 of its much longer
    responses.
    """
    def z(x):
        mean, std = among_correct(x, correct, unbiased=True)
        return torch.sigmoid((x - mean) / (std + 1e-6))
    first = 0.05 + 0.05 * (reflections > low) + 0.05 * (reflections > high)              # [P, G]
    return correct * (1 - first * z(reflections) - (0.2 - first) * z(length))


def verified(correct, truncated, *, scale=10.0):
    """Tülu 3's RLVR (2411.15124): scale if correct, 0 if not, -scale without EOS."""
    return torch.where(truncated, -scale * torch.ones_like(correct), scale * correct)


def consistent(score, answer_prob, *, bonus=0.5, margin=0.01, cap: Share = 0.95):
    """GRPO-CARE (2506.16141): a bonus for what makes the answer as likely as the group's good ones
    do.

    answer_prob [P, G]: exp of the answer tokens' mean log-prob under a slow copy of the policy.
    """
    q = answer_prob.clamp(max=cap)
    good = ((score > 0.1) & (score >= score.mean(1, keepdim=True))).to(q)                # [P, G]
    usual = (q * good).sum(1, keepdim=True) / good.sum(1, keepdim=True).clamp(min=1)     # [P, 1]
    return score + bonus * score * good * (q >= usual - margin)


def probable(truth_prob, base_prob, stated, *, share: Share = 0.9):
    """RLPR (2506.18254): share max(0, PR - PR_base) + (1 - share) · has an answer.

    truth_prob [P, G]: the mean probability of the true answer's tokens after the response's own
    reasoning; base_prob [P, 1]: the same of the first model without any.
    """
    return (share * (truth_prob - base_prob).clamp(min=0) + (1 - share) * stated).clamp(0, 1)


def agreed(answer, *, cross=True):
    """Co-Reward (2508.00410): 1 for the majority's answer to the same question in other words.

    Group i + P/2 is the paraphrase of i. Ties: the first seen. cross False: the own group's
    majority.
    """
    said = [[x for x in row if x >= 0] for row in answer.tolist()]
    top = torch.tensor([max(row, key=row.count) if row else -2 for row in said]).to(answer)    # [P]
    return (answer == (top.roll(len(top) // 2) if cross else top)[:, None]).float()


def calibrated(score, pattern, *, price=0.1, sure=0.5):
    """RPR calibration (2505.22653): min(1, r + price RPR) where the reward r is below `sure`."""
    return torch.where(score < sure, (score + price * pattern).clamp(max=1), score)


SHAPERS = dict(plain=plain, overlong=overlong, truncate=truncate, regraded=regraded,
               linear=linear_length,
               easiest=easiest, history=history, reflective=reflective, verified=verified,
               consistent=consistent, probable=probable, agreed=agreed, calibrated=calibrated)
