"""
claims - a paper's claim as an experiment: arms over seeds, paired differences, a verdict from the
intervals alone.

    python grpo.py --claim lengths --power         # a pilot: how many seeds are needed
    python grpo.py --claim lengths                 # data/results/lengths.json and .png

claims/<script>.py holds the claims of a script, as CLAIMS, and what the tables say of them, as
HEADLINES.
"""
import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import statistics
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from claims import power
from data.run import (UserError, cast, commit, entries, layer, nearest, pyplot, read_json,
                      read_log, set_aside, settings, source, write_text)

T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131]


def critical_t(n):
    """Student's t that the mean of n values is within, in standard errors, 95 times of 100."""
    return T975[n - 2] if n - 2 < len(T975) else 1.96 + 2.5 / (n - 1)


def interval(values):
    """(mean, half width of the 95 % interval) by Student's t over the values; the width is inf for
    one."""
    n = len(values)
    if n < 2:
        return values[0], math.inf
    return statistics.fmean(values), critical_t(n) * statistics.stdev(values) / math.sqrt(n)


def verdict(diffs, better="higher", smallest=0.0):
    """From the 95 % interval of the paired differences alone: 'negligible' if it lies within ±
    smallest, the least effect that would matter, else 'holds', 'does not hold' or 'undecided'."""
    mean, half = interval(diffs)
    mean = mean if better == "higher" else -mean
    if abs(mean) + half < smallest:
        return "negligible"
    return "holds" if mean - half > 0 else "does not hold" if mean + half < 0 else "undecided"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's claim as an experiment: arms (name -> --config string), a metric, and what must
    exceed 0.

    tests: {label: {arm: weight}}, each a contrast of arms paired by seed; {"ours": 1, "theirs": -1}
    says that ours is better; the arm "" is the constant 1, "ours|accuracy" another metric than the
    claim's. conclude({label: verdict}) may give the claim's own word; by default every test must
    hold. Arms of the same config share one run, whose result names them: {"ours|gold": …,
    "theirs|gold": …}. smallest: for each metric of a test the least difference that would matter,
    and `why`: the published one translated, or what a user would notice. models: checkpoints that
    arms read, {name: (script, its --config)}, each made once for every seed; "{name}" in an arm, or
    in a later model, is its folder. home: claims of one home share the runs of arms of one name.
    """
    text: str
    paper: str
    arms: dict
    metric: str
    tests: dict
    better: str = "higher"
    smallest: dict = dataclasses.field(default_factory=dict)
    why: str = ""
    also: tuple = ()                 # further metrics to tabulate
    conclude: object = None
    tune: tuple = ()                 # (key, ratio, metric): tune the key first, see tune_arms
    models: dict = dataclasses.field(default_factory=dict)
    home: str = ""
    curve: str = ""  # a key of the log to draw against steps and seconds of training
    sweep: tuple = ()  # (x's name, metrics): draw each arm's results "metric@x" against x


def versus(ours, *others, on="", tag=""):
    """Tests 'ours > other' on the claim's metric, or on another: {label: contrast}."""
    return {f"{tag}{ours} > {x}": {f"{ours}|{on}": 1, f"{x}|{on}": -1} for x in others}


def conclude_all(verdicts):
    """'holds' if every test does, 'does not hold' if any fails, else 'undecided' if any is, else
    'negligible'."""
    words = set(verdicts.values())
    if words == {"holds"}:
        return "holds"
    return next((x for x in ("does not hold", "undecided", "negligible") if x in words),
                "undecided")


def in_parts(*parts):
    """A claim of several parts in one line: each part, and what the tests with its name in the
    label say."""
    return lambda verdicts: "; ".join(
        f"{x}: {conclude_all({k: v for k, v in verdicts.items() if x in k})}" for x in parts)


def gated(what, *parts):
    """in_parts, and before it "what (gate: …: not met)" if a test whose label begins with gate is
    not met."""
    def conclude(verdicts):
        gates = [k for k, v in verdicts.items() if k.startswith("gate") and v != "holds"]
        told = in_parts(*parts)({k: v for k, v in verdicts.items() if not k.startswith("gate")})
        return f"{what} ({'; '.join(gates)}: not met), {told}" if gates else told
    return conclude


def run_arm(job):
    """One arm, one seed, in its own process: the run's result, from its folder if it is there
    already."""
    configure_arm, train, argv, folder, threads = job
    c, f = configure_arm([*argv, "--out", folder])
    path = Path(folder, "run.json")
    old = read_json(path) if path.exists() else {}
    if "result" in old and old["config"] == settings(c, f) and old["source"] == source():
        return old["result"]
    torch.set_num_threads(threads)
    with open(f"{folder}.txt", "w") as out, contextlib.redirect_stdout(out):
        if Path(folder).exists():  # by other code or settings, or unfinished
            set_aside(folder)
        return train(c, f)


def model_folder(claim, name, seed):
    """Where a claim's model stands: of one code and one configuration."""
    script, config = claim.models[name]
    config = with_models(config, claim, seed)
    mark = hashlib.sha256(f"{script} {config} {source()}".encode()).hexdigest()[:8]
    return Path("out/claims/models", f"{name}-{script}-{mark}-s{seed}")


def make_model(job):
    """One model of a claim, one seed, in its own process, if it is not there already."""
    script, config, seed, folder, threads = job
    if "result" in (read_json(folder / "run.json") if (folder / "run.json").exists() else {}):
        return
    torch.set_num_threads(threads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        set_aside(folder)
    with open(f"{folder}.txt", "w") as out, contextlib.redirect_stdout(out):
        argv = ["--config", config, "--seed", str(seed), "--out", str(folder)]
        importlib.import_module(script).main(argv)


def with_models(config, claim, seed=None):
    """A --config, of an arm or of another model, with the folders of the models that it names, of a
    seed; without one, for a look at its options, with any folder that there is."""
    for name in claim.models:
        if seed is None:
            config = re.sub(rf"{{{name}}}[^,+]*", ".", config)
        elif f"{{{name}}}" in config:
            config = config.replace(f"{{{name}}}", str(model_folder(claim, name, seed)))
    return config


TUNING_SEED = 1000  # of data order and initialisation while tuning: never one that is reported


def try_arm(job):
    """run_arm, or {} for a run that diverged: the grid goes on without it."""
    try:
        return run_arm(job)
    except UserError as e:
        if "became" not in str(e):
            raise
        return {}


def tune_arms(claim, configure_arm, job, pool, widest=6):
    """Each arm's best value of claim.tune's key: {arm: {"value": x, "edge": bool, "grid": {x:
    metric}}}.

    Every arm starts from its preset's value, half and twice it (for ratio 2), all on TUNING_SEED;
    while the best is at an end, the grid grows there, at most `widest` times: then edge says so.
    Lower is better.
    """
    key, ratio, metric = claim.tune
    centre = {arm: vars(configure_arm(["--config", with_models(config, claim)])[0])[key]
              for arm, config in claim.arms.items()}
    grids = {arm: {} for arm in claim.arms}
    todo = [(arm, i) for arm in grids for i in (-1, 0, 1)]

    def value(arm, i):
        return float(f"{centre[arm] * ratio ** i:.3g}")

    for _ in range(widest + 1):
        jobs = [job(arm, TUNING_SEED, [f"--{key}={value(arm, i)}"], f"-{key}{value(arm, i)}")
                for arm, i in todo]
        with tqdm(total=len(jobs), desc=f"tuning {key}", dynamic_ncols=True) as bar:
            for (arm, i), out in zip(todo, pool.map(try_arm, jobs)):
                grids[arm][i] = out.get(metric, math.inf)
                bar.set_postfix_str(f"{arm} {value(arm, i)}: {grids[arm][i]:.4g}")
                bar.update()
        best = {arm: min(grid, key=grid.get) for arm, grid in grids.items()}
        todo = [(arm, best[arm] + side) for arm, grid in grids.items() for side in (-1, 1)
                if best[arm] + side not in grid]
        if not todo:
            break
    return {arm: dict(value=value(arm, best[arm]), edge=any(t[0] == arm for t in todo),
                      grid={value(arm, i): x for i, x in sorted(grid.items())})
            for arm, grid in grids.items()}


def measure(name, claim, configure_arm, train, seeds, *, jobs=0, extra=(), config="", tag=""):
    """Train every arm on every seed, `jobs` at once, finished ones reused.

    configure_arm(argv) -> (c, f); `extra` goes to each arm's command line, `config` to its presets.
    -> {(arm, seed): result}, {(arm, seed): the run's folder}, what tuning found.
    """
    home = claim.home or name
    Path("out/claims", home).mkdir(parents=True, exist_ok=True)
    jobs = jobs or max(1, min(4, os.cpu_count() or 1))
    threads = 1 if jobs > 1 else torch.get_num_threads()

    def job(arm, seed, changes, tag=tag):
        presets = ",".join(filter(None, (with_models(claim.arms[arm], claim, seed), config)))
        return (configure_arm, train, ["--config", presets, "--seed", str(seed), *changes, *extra],
                f"out/claims/{home}/{re.sub(r'[^A-Za-z0-9._-]+', '_', arm)}-s{seed}{tag}", threads)

    runs = who_runs(claim)
    todo = [(arm, seed) for seed in seeds for arm in claim.arms if runs[arm] == arm]
    print(claim.text, claim.paper, f"{len(claim.arms)} arms x {len(seeds)} seeds, {jobs} at a time",
          sep="\n", flush=True)
    got, tuned = [], {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for model, (script, options) in claim.models.items():    # in turn: one may read another
            made = [(script, with_models(options, claim, seed), seed,
                     model_folder(claim, model, seed), threads)
                    for seed in [*seeds, *[TUNING_SEED] * bool(claim.tune)]]
            for _ in tqdm(pool.map(make_model, made), total=len(made), desc=f"{name}: {model}",
                          dynamic_ncols=True):
                pass
        if claim.tune:
            tuned = tune_arms(claim, configure_arm, job, pool)
        work = [job(arm, seed, [f"--{claim.tune[0]}={tuned[arm]['value']}"] if tuned else [])
                for arm, seed in todo]
        with tqdm(total=len(work), desc=name, dynamic_ncols=True) as bar:
            for (arm, seed), out in zip(todo, pool.map(run_arm, work)):
                bar.set_postfix_str(f"{arm} seed {seed}: {claim.metric} "
                                    f"{of(out, arm, claim.metric):.4g}")
                bar.update()
                got.append(out)
    got, folders = dict(zip(todo, got)), {key: path for key, (*_, path, _) in zip(todo, work)}
    every = [(arm, seed) for arm in claim.arms for seed in seeds]
    return ({(arm, seed): got[runs[arm], seed] for arm, seed in every},
            {(arm, seed): folders[runs[arm], seed] for arm, seed in every}, tuned)


def command_of(script, name, seeds, extra, config, power=False):
    """The line that makes the report again."""
    words = [f"python {script}.py --claim {name}", *["--power"] * power, f"--seeds {seeds}",
             *[f"--config {config}"] * bool(config), *extra]
    return " ".join(words)


def run_claim(name, claim, script, configure_arm, train, *, seeds=5, jobs=0, extra=(), config="",
              results="data/results"):
    """Measure every arm over the seeds, compare, write data/results/<name>.json and .png.

    -> the report, in which `plan` is what a pilot had found before.
    """
    t0, plan = time.time(), power.planned(name, results)
    got, folders, tuned = measure(name, claim, configure_arm, train, range(seeds), jobs=jobs,
                                  extra=extra, config=config)
    report = judge(name, claim, seeds, got)
    report |= dict(tuned=tuned) if tuned else {}
    report |= {"plan": {k: plan[k] for k in ("seeds", "pilot", "power", "commit")}} if plan else {}
    Path(results).mkdir(parents=True, exist_ok=True)
    if claim.curve:
        logs = {key: read_log(path) for key, path in folders.items()}
        with_curves(report, claim, logs, seeds, Path(results) / f"{name}_curves.png")
    if claim.sweep:
        report["sweep"] = sweep(claim, seeds, got)
        draw_sweep(report, claim.sweep[0], Path(results) / f"{name}_sweep.png")
    report |= dict(command=command_of(script, name, seeds, extra, config), commit=commit(),
                   torch=torch.__version__, minutes=round((time.time() - t0) / 60, 1))
    write_text(Path(results) / f"{name}.json", json.dumps(report, indent=1))
    draw_claim(report, Path(results) / f"{name}.png")
    print(table(report), f"\n\n{report['verdict']}", flush=True)
    return report


def run_pilot(name, claim, script, configure_arm, train, *, seeds=5, jobs=0, extra=(), config="",
              results="data/results"):
    """Measure every arm on development seeds; the plan that says how many seeds the claim takes."""
    if seeds < 2:
        raise UserError(f"--power --seeds {seeds}: a spread takes at least 2")
    which = range(power.PILOT_SEED, power.PILOT_SEED + seeds)
    got, folders, _ = measure(name, claim, configure_arm, train, which, jobs=jobs, extra=extra,
                              config=config, tag="-pilot")
    homes = [{arm: folders[arm, seed] for arm in claim.arms} for seed in which]
    diffs = {label: [contrast(claim, weights, got, seed) for seed in which]
             for label, weights in claim.tests.items()}
    kept = {label: [power.kept_of(claim, weights, home) for home in homes]
            for label, weights in claim.tests.items()}
    command = command_of(script, name, seeds, extra, config, power=True)
    return power.write_plan(name, power.plan(claim, diffs, kept), command, results)


def who_runs(claim):
    """{arm: the arm whose run it shares}: the first of its --config string, or itself if tuned."""
    first = {config: arm for arm, config in reversed(claim.arms.items())}
    return {arm: arm if claim.tune else first[config] for arm, config in claim.arms.items()}


def with_curves(report, claim, logs, seeds, path):
    """Add each arm's mean curve to the report, and draw them. logs: {(arm, seed): rows}."""
    report["curve"] = {}
    for arm in claim.arms:
        report["curve"][arm] = mean_curve([logs[arm, seed] for seed in range(seeds)], claim.curve)
    draw_curves(report, claim.curve, path)


def run_from_options(script, claims, setup, known, train, options):
    """What `--claim NAME [--power] [--seeds N] [--jobs 0]` asks for: the claim's report or plan.

    seeds: those of the plan, or 5. jobs: arms trained at once, each on one thread (0: one per core,
    four at most). Other options go to every arm; those that an arm or the seeds set are refused.
    setup(argv) -> (c, f); known: the script's presets and axes.
    """
    name = options.pop("claim")
    if name not in claims:
        raise UserError(f"no claim {name!r}{nearest(name, claims)}")
    claim, pilot = claims[name], cast("power", options.pop("power", "false"), False)
    usual = 5 if pilot else power.planned(name).get("seeds") or 5
    seeds, jobs = (cast(k, options.pop(k, d), d) for k, d in (("seeds", usual), ("jobs", 0)))
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least 1, and 2 for an interval")
    asked = entries(options.get("config", ""))
    fixed = {"seed", "out", "resume", "stop", "eject", *claim.tune[:1]}
    for arm in claim.arms.values():
        for entry in entries(arm):
            fixed |= layer(entry, *known).keys()
    for row in [*(layer(x, *known) for x in asked), options]:
        for key in row.keys() & fixed:
            raise UserError(f"--claim {name} with {key}: the claim sets it itself; "
                            "an arm would not be what its name says")
    more = options.pop("config", "")
    extra = [f"--{k}={v}" for k, v in options.items()]
    for arm in claim.arms.values():                              # all options, before any arm runs
        setup(["--config", ",".join(filter(None, (with_models(arm, claim), more))), *extra])
    job = run_pilot if pilot else run_claim
    return job(name, claim, script, setup, train, seeds=seeds, jobs=jobs, extra=extra, config=more)


def of(result, arm, metric):
    """An arm's metric in the result of its run: its own "arm|metric" where several arms share the
    run."""
    key = f"{arm}|{metric}" if f"{arm}|{metric}" in result else metric
    if key not in result:
        raise UserError(f"the run of arm {arm!r} has no {metric!r}{nearest(metric, list(result))}")
    return result[key]


def contrast(claim, weights, got, seed):
    """One seed's contrast: the weighted sum of the arms' metrics, the arm "" being 1."""
    total = 0.0
    for key, weight in weights.items():
        arm, _, metric = key.partition("|")
        total += weight * (of(got[arm, seed], arm, metric or claim.metric) if arm else 1.0)
    return total


def judge(name, claim, seeds, got):
    """A claim's report from got[(arm, seed)] -> result: means, intervals, paired differences,
    verdict. Each contrast has its own verdict, `alone`, and one with all judged together (Holm),
    from which the claim's is made."""
    metrics = (claim.metric, *claim.also)
    values = {arm: {m: [of(got[arm, s], arm, m) for s in range(seeds)] for m in metrics}
              for arm in claim.arms}
    tests = []
    for label, weights in claim.tests.items():
        diffs = [contrast(claim, weights, got, s) for s in range(seeds)]
        mean, half = interval(diffs)
        sd = statistics.stdev(diffs) if seeds > 1 else 0.0
        # a contrast with a constant asks for a margin or a threshold already
        smallest = 0.0 if "" in weights else power.smallest_of(claim, weights)
        tests.append(dict(test=label, difference=mean, interval=half, smallest=smallest,
                          p=power.p_value(mean, sd, seeds),
                          alone=verdict(diffs, claim.better, smallest)))
    judge_together(tests)
    verdicts = {t["test"]: t["verdict"] for t in tests}
    arms = {arm: {m: dict(zip(("mean", "interval"), interval(v)), values=v) for m, v in ms.items()}
            for arm, ms in values.items()}
    return dict(claim=name, text=claim.text, paper=claim.paper, metric=claim.metric,
                better=claim.better,
                seeds=seeds, verdict=(claim.conclude or conclude_all)(verdicts), arms=arms,
                tests=tests)


def judge_together(tests):
    """Give each contrast Holm's p-value and the verdict with it: what the others' number makes
    uncertain is undecided."""
    adjusted = power.holm({t["test"]: t["p"] for t in tests})
    for t in tests:
        lost = t["alone"] in ("holds", "does not hold") and adjusted[t["test"]] > power.LEVEL
        t |= dict(p_holm=adjusted[t["test"]], verdict="undecided" if lost else t["alone"])


def table(report):
    """The report as aligned text: mean ± 95 % per arm and metric, then the paired differences."""
    metrics = list(next(iter(report["arms"].values())))
    lines = ["", f"{'arm':<20}" + "".join(f"{m:>20}" for m in metrics)]
    for arm, ms in report["arms"].items():
        lines.append(f"{arm:<20}"
                     + "".join(f"{ms[m]['mean']:>11.3f} ± {ms[m]['interval']:<6.3f}"
                               for m in metrics))
    side = "above" if report["better"] == "higher" else "below"
    lines.append(f"\npaired contrasts over {report['seeds']} seeds, 95 %, of {report['metric']} or "
                 f"of what the label names; a label holds where its contrast is {side} 0")
    for t in report["tests"]:
        alone = t.get("alone", t["verdict"])
        lines.append(f"{t['test']:<36}{t['difference']:>+8.3f} ± {t['interval']:<6.3f}  "
                     + t["verdict"] + f" (alone: {alone})" * (alone != t["verdict"]))
    return "\n".join(lines)


def mean_curve(logs, key):
    """[[step, seconds, value]] of the steps at which every log has the key: means over the logs."""
    rows = [{r["step"]: r for r in log if key in r} for log in logs]
    steps = sorted(set.intersection(*(set(r) for r in rows)))
    return [[step, *(round(statistics.fmean(r[step][k] for r in rows), 4)
                     for k in ("seconds", key))]
            for step in steps]


def sweep(claim, seeds, got):
    """{metric: {arm: [[x, mean, half width]]}} of the results "metric@x" (or "arm|metric@x") of a
    claim."""
    out = {}
    for metric in claim.sweep[1]:
        out[metric] = {}
        for arm in claim.arms:
            marks = (f"{arm}|{metric}@", f"{metric}@")
            keys = [k for k in got[arm, 0] if k.startswith(marks[0])] or [
                k for k in got[arm, 0] if k.startswith(marks[1])]
            points = sorted((float(k.rpartition("@")[2]), k) for k in keys)
            rows = [[x, *interval([got[arm, s][k] for s in range(seeds)])] for x, k in points]
            out[metric] |= {arm: rows} if rows else {}
    return out


def draw_sweep(report, xlabel, path):
    """One panel a metric, one line an arm, its 95 % interval shaded; x logarithmic where it spans
    decades."""
    plt = pyplot()
    panels = {m: arms for m, arms in report["sweep"].items() if arms}
    fig, axes = plt.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.8), squeeze=False)
    for ax, (metric, arms) in zip(axes[0], panels.items()):
        for i, (arm, rows) in enumerate(arms.items()):
            x, mean, half = zip(*rows)
            ax.plot(x, mean, lw=1.4, marker="o", ms=3, label=arm, color=f"C{i % 10}",
                    ls=("-", "--")[i // 10])
            ax.fill_between(x, [m - h for m, h in zip(mean, half)],
                            [m + h for m, h in zip(mean, half)],
                            alpha=0.12, lw=0, color=f"C{i % 10}")
        if min(x) > 0 and max(x) / min(x) > 30:
            ax.set_xscale("log", base=2)
        ax.set(xlabel=xlabel, ylabel=metric.replace("_", " "))
    axes[0][-1].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def draw_curves(report, key, path):
    """The arms' mean curves, against steps and against seconds of training."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True)
    for i, (arm, points) in enumerate(report["curve"].items()):
        for ax, x in zip(axes, (0, 1)):
            ax.plot([p[x] for p in points], [p[2] for p in points], lw=1.4, label=arm,
                    ls=("-", "--")[i // 10], color=f"C{i % 10}")
    ends = sorted(p[2] for points in report["curve"].values() for p in points)
    axes[0].set(xlabel="step", ylabel=key.replace("_", " "),
                ylim=(ends[0] - 0.05, ends[int(0.8 * (len(ends) - 1))]))
    axes[1].set(xlabel="seconds of training")
    axes[1].legend(fontsize=7, ncol=2)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def draw_claim(report, path):
    """One dot a seed, mean and 95 % interval, a row an arm."""
    plt = pyplot()
    arms, m = report["arms"], report["metric"]
    fig, ax = plt.subplots(figsize=(6.4, 0.32 * len(arms) + 1.2))
    for y, (arm, ms) in enumerate(arms.items()):
        ax.plot(ms[m]["values"], [y] * len(ms[m]["values"]), "o", ms=3, alpha=0.4, color="tab:gray")
        ax.errorbar(ms[m]["mean"], y, xerr=ms[m]["interval"], fmt="o", ms=5, capsize=3,
                    color="tab:blue")
    ax.set(yticks=range(len(arms)), yticklabels=list(arms),
           xlabel=f"{m.replace('_', ' ')} ({report['better']} is better)",
           title=textwrap.fill(f"{report['claim']}, {report['seeds']} seeds: {report['verdict']}",
                               60))
    ax.invert_yaxis()
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
