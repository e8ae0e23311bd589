"""
power.py - how many seeds a claim needs, asked before it is measured.

    python grpo.py --claim lengths --power         # a pilot on seeds that no result is made of

The pilot trains every arm on development seeds. Of each contrast it tells the spread of the paired
differences, apart: of seeds, of prompts and of samples (runs keep the values that a mean was made
of); and how many seeds show the smallest effect that would matter (Claim.smallest) nine times out
of ten. That number is written down, and `--claim lengths` without --seeds then takes it.
Map      1 Student's t   2 how many seeds   3 where the spread comes from   4 the pilot
"""
import functools
import json
import math
import statistics
from pathlib import Path

import torch

from data.run import UserError, commit, read_json, write_text

PILOT_SEED, POWER, LEVEL, MOST = 2000, 0.9, 0.05, 1000
# that an interval is above 0, for the verdict to be `holds`: the interval of an effect that is just
# the smallest lies below it, and is negligible, one time in forty
ABOVE = POWER + LEVEL / 2

# --- Student's t ----------------------------------------------------------------------------------


def tail(t, df, shift=0.0):
    """P(T > t) of Student's t with df degrees of freedom; with a shift of the noncentral one.

    T = (Z + shift) / sqrt(C / df),  C chi-square: the mean of P(Z > t sqrt(C / df) - shift) over C.
    """
    low, high = max(0.0, math.sqrt(df) - 8), math.sqrt(df) + 8
    x = low + (torch.arange(800, dtype=torch.float64) + 0.5) * (high - low) / 800    # sqrt(C)
    weight = ((df - 1) * x.log() - x.square() / 2).softmax(0)
    above = torch.special.erfc((t * x / math.sqrt(df) - shift) / math.sqrt(2)) / 2
    return float((weight * above).sum())


def solve(fn, low, high):
    """Where a falling function is 0, by halving."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fn(middle) > 0 else (low, middle)
    return (low + high) / 2


@functools.cache
def critical(df, level=LEVEL):
    """The t that |T| exceeds with probability `level`."""
    return solve(lambda t: tail(t, df) - level / 2, 0.0, 1e4)


def p_value(mean, sd, n):
    """Two-sided, that n paired differences have such a mean if there is no difference."""
    if n < 2 or sd == 0:
        return 0.0 if mean and n > 1 else 1.0
    return min(1.0, 2 * tail(abs(mean) / sd * math.sqrt(n), n - 1))


def holm(p):
    """Holm's adjusted p-values of {label: p}: the k-th smallest of m times m - k + 1, never
    falling (Holm 1979)."""
    out, worst = {}, 0.0
    for k, label in enumerate(sorted(p, key=p.get)):
        worst = max(worst, min(1.0, (len(p) - k) * p[label]))
        out[label] = worst
    return {label: out[label] for label in p}


# --- how many seeds -------------------------------------------------------------------------------


def power_of(effect, sd, n, level=LEVEL):
    """How often n seeds find a true difference of this size: their interval is above 0."""
    if n < 2:
        return 0.0
    if sd == 0:
        return 1.0
    return tail(critical(n - 1, level), n - 1, effect / sd * math.sqrt(n))


def seeds_for(effect, sd, level=LEVEL, power=POWER):
    """The least number of seeds with this power; None if `MOST` are too few."""
    normal = statistics.NormalDist()
    wide = normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)
    # the normal law's number, and what Student's t adds to it
    n = min(MOST, max(2, round((wide * sd / effect) ** 2 + normal.inv_cdf(1 - level / 2) ** 2 / 2)))
    while n < MOST and power_of(effect, sd, n, level) < power:
        n += 1
    while n > 2 and power_of(effect, sd, n - 1, level) >= power:
        n -= 1
    return n if power_of(effect, sd, n, level) >= power else None


def cautious(sd, n, sure=0.8):
    """The upper limit of a standard deviation that n values give: the true one is below it with
    probability `sure`. ours: a pilot's own spread would be too small every second time."""
    if n < 2:
        return math.inf
    df = torch.tensor((n - 1) / 2, dtype=torch.float64)
    low = solve(lambda x: 1 - sure - float(torch.special.gammainc(df, torch.tensor(x / 2))), 0.0,
                10.0 * n)
    return sd * math.sqrt((n - 1) / low)


# --- where the spread comes from ------------------------------------------------------------------


def parts_of(diffs, values):
    """The standard deviation of a seed's paired difference, by source.

    diffs: the difference of each seed;  values: for each seed {key: (weight, [P][S] values)} of the
    means that it is made of, or None where a run kept none.   -> {"seeds", "prompts", "samples"},
    each the part of one seed's difference; only the first if there are no values.
    """
    whole = statistics.variance(diffs)
    if any(v is None for v in values):
        return dict(seeds=math.sqrt(whole))
    of_prompts, of_samples = [], []
    for seed in values:
        weights, tables = zip(*seed.values())
        tables = [torch.tensor(x, dtype=torch.float64) for x in tables]
        tables = [x[:, None] if x.dim() == 1 else x for x in tables]                     # [P, S]
        prompts = len(tables[0])
        mean = sum(w * x.mean(1) for w, x in zip(weights, tables))                       # [P]
        of_prompts.append(float(mean.var() / prompts))
        of_samples.append(sum(w * w * float(x.var(1).mean()) / x.numel() if x.size(1) > 1 else 0.0
                              for w, x in zip(weights, tables)))
    prompts, samples = statistics.fmean(of_prompts), statistics.fmean(of_samples)
    parts = dict(seeds=whole - prompts, prompts=prompts - samples, samples=samples)
    return {k: math.sqrt(max(0.0, x)) for k, x in parts.items()}


def values_kept(folder, arm, metric):
    """What the metric of a run is the mean of, [P] or [P, S]; None if the run did not keep it."""
    path = Path(folder) / "values.json"
    kept = read_json(path) if path.exists() else {}
    return kept.get(f"{arm}|{metric}", kept.get(metric))


def kept_of(claim, weights, folders):
    """{key: (weight, values)} of one seed's contrast; None if one of its means kept none.

    folders: {arm: the folder of its run}. Metrics that say how a run began count as constants.
    """
    out = {}
    for key, weight in weights.items():
        arm, _, metric = key.partition("|")
        if arm:
            found = values_kept(folders[arm], arm, metric or claim.metric)
            if found is None:
                return None
            out[key] = weight, found
    return out if len({len(x) for _, x in out.values()}) == 1 else None


# --- the pilot ------------------------------------------------------------------------------------


def smallest_of(claim, weights):
    """The smallest effect that would matter in a contrast: of the metric that it is about; 0 if the
    claim does not say."""
    metrics = {key.partition("|")[2] or claim.metric for key in weights if key}
    return max((claim.smallest[m] for m in metrics if m in claim.smallest), default=0.0)


def plan(claim, diffs, kept):
    """The pilot's report: of each contrast its spread by source, and the seeds that it needs.

    diffs: {label: [difference of each seed]};  kept: {label: what kept_of() gives, of each seed}.
    """
    rows, level = [], LEVEL / max(1, len(diffs))               # Holm's first step
    for label, x in diffs.items():
        effect, sd = smallest_of(claim, claim.tests[label]), statistics.stdev(x)
        if not effect:
            raise UserError(f"--power: the claim does not say which effect would matter in "
                            f"{label!r}: add its metric to `smallest`")
        careful = cautious(sd, len(x))
        rows.append(dict(test=label, smallest=effect, sd=sd, parts=parts_of(x, kept[label]),
                         seeds=seeds_for(effect, careful, LEVEL, ABOVE),
                         seeds_holm=seeds_for(effect, careful, level, ABOVE)))
    needed = [row["seeds_holm"] for row in rows]
    return dict(seeds=None if None in needed else max(needed), power=POWER, why=claim.why,
                pilot=len(next(iter(diffs.values()))), contrasts=rows)


def told(found):
    """The plan as aligned text."""
    lines = [f"\n{'contrast':<40}{'matters':>9}{'sd':>9}{'seeds':>9}{'prompts':>9}{'samples':>9}"
             f"{'need':>7}{'Holm':>7}"]
    for row in found["contrasts"]:
        parts = "".join(f"{row['parts'][k]:>9.4f}" if k in row["parts"] else f"{'-':>9}"
                        for k in ("seeds", "prompts", "samples"))
        need = "".join(f"{x or f'>{MOST}':>7}" for x in (row["seeds"], row["seeds_holm"]))
        lines.append(f"{row['test'][:39]:<40}{row['smallest']:>9.4g}{row['sd']:>9.4f}{parts}{need}")
    lines.append(f"\nmatters: {found['why']}\nsd of a seed's paired difference over "
                 f"{found['pilot']} development seeds, and the parts of it; need: seeds that show "
                 f"the effect with {found['power']:.0%} power; Holm: with all contrasts judged "
                 "together")
    lines.append(f"the claim takes {found['seeds']} seeds: --claim without --seeds runs them"
                 if found["seeds"] else
                 f"more than {MOST} seeds: ask less of the contrast, or take more prompts")
    return "\n".join(lines)


def path_of(name, results="data/results"):
    """Where a claim's plan is kept."""
    return Path(results) / "plans" / f"{name}.json"


def write_plan(name, found, command, results="data/results"):
    """Keep the plan, and say it.   -> the plan"""
    path = path_of(name, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    found |= dict(command=command, commit=commit())
    write_text(path, json.dumps(found, indent=1))
    print(told(found), flush=True)
    return found


def planned(name, results="data/results"):
    """The plan of a claim, or {}."""
    path = path_of(name, results)
    return read_json(path) if path.exists() else {}
