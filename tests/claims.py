"""
claims.py - what data/results/ holds, as the README shows it.

    python tests/claims.py                         # every claim: its verdict, seeds, command
    python tests/claims.py --table                 # write the README's tables anew, say what
    changed
    python tests/claims.py --table lengths         # a claim's arms and paired differences, as text
    python tests/claims.py --figure grpo           # data/results/grpo_claims.png: all of grpo.py's
    claims

Nothing is trained here: `python <script>.py --claim NAME` measures, and writes the JSON that this
reads.
Map      1 what the README says of a claim   2 its tables   3 figures   4 main
"""
import difflib
import json
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data.run import UserError, cli, interval, nearest, pyplot, table, write_text

RESULTS, README = ROOT / "data" / "results", ROOT / "README.md"

# --- what the README says of a claim --------------------------------------------------------------

SCRIPTS = ("sft", "reward", "ppo", "grpo", "dpo", "compress", "specdec")   # the order of the tables

# claim: (the test that judges the headline, method, baseline, statement, what is measured, as
# published). Method and baseline are arms, "arm|metric" for another metric than the claim's,
# {arm|metric: weight} for a sum, or a number. What was measured comes from the JSON alone; its
# `paper` has the papers and what they say.
HEADLINES = dict(
    normuon=("NorMuon < Muon", "NorMuon", "Muon",
             "NorMuon needs fewer steps than Muon, and Muon fewer than AdamW",
             "steps to a loss of 2.30 ↓", "11 % and 22 % more efficient, at 1.1 B parameters"),
    lowrank=("Fira < GaLore", "Fira", "GaLore",
             "Fira, APOLLO and FRUGAL reach a lower loss than GaLore, APOLLO-Mini than sign-SGD",
             "validation loss ↓", "lower perplexity than GaLore"),
    eco=("ECO < 1.01 float32", "ECO, int4", "AdamW, float32",
         "ECO trains weights that exist only in 4 bits to within 1 % of float32, and beats plain rounding",
         "validation loss ↓", "matches float32, 30 M to 2.1 B (second-hand)"),
    hft=("HFT, lr 1e-3 < full, lr 1e-3", "HFT, lr 1e-3", "full, lr 1e-3",
         "Half fine-tuning forgets less than full fine-tuning at the same learning rate",
         "loss on the old task ↓", "less forgetting, no worse on the new task (second-hand)"),
    lion=("Lion, λ 30: inside", "Lion, λ 30", 1.0,
          "Lion with decay λ keeps every weight within 1/λ, and fills that box when it is small",
          "largest weight × λ ↓", "the loss is least within that box"),
    sparse=("25 to 75 % < from the start", "25 to 75 %", "from the start",
            "Pruning between 25 and 75 % of the compute beats other times at equal compute, and costs what a "
            "dense model of the average size does", "validation loss ↓",
            "25 to 75 % is near the best"),
    routing=("", "uncertainty", "random",
             "Sending uncertain pairs to the judge beats sending as many at random",
             "accuracy, area over the share asked ↑",
             "89.2 against 87.5 with 9 % of the calls (second-hand)"),
    ensembles=("best-of-n: uwo > single", "uwo", "single",
               "Ensembles of reward models mitigate over-optimisation, with and without label noise",
               "gold, best of 256 ↑", "WCO, UWO: removed under best-of-n, reduced under PPO"),
    advrm=("steps: adv > plain", "adv", "plain",
           "Adv-RM: reward models retrained on what an adversarial policy finds let RLHF run longer before "
           "gold falls", "steps until gold falls ↑", "2 to 3 times (second-hand)"),
    thinkrm=("hard: long > bt", "long", "bt",
             "A judge that reasons at length beats Bradley-Terry and short reasoning, on the hardest pairs "
             "too",
             "accuracy, hard pairs ↑",
             "RM-Bench 75.1 against 68.3; short, 16 votes: 68.1 (second-hand)"),
    rubrics=("judges: rubric > direct", "rubric", "direct",
             "Rubric-RM beats the direct judge of its size; contrast and consistency filtering help it",
             "accuracy ↑", "70.1 against 61.7"),
    srppo=("srppo - sft, 512", "srppo 512", "sft 512",
           "Self-Rewarding PPO beats SFT and longer SFT out of domain, most with few demonstrations",
           "gold, other prompts ↑", "+2 to +4 points (second-hand)"),
    lengths=("dler: shorter", "dler|val_length", "grpo|val_length",
             "Length methods shorten responses at GRPO's accuracy (within 0.02)",
             "length, tokens ↓", "30-70 % shorter without loss"),
    stale=("lag 4: AIPO within 0.03", "aipo 4", "on policy",
           "With importance weights a policy learns as well (within 0.03) from rollouts that are four "
           "iterations old", "accuracy ↑", "matches on-policy training"),
    exploration=("Clip-Cov: entropy", "clip cov|train_entropy", "grpo|train_entropy",
                 "Clip-Cov and KL-Cov keep the entropy at GRPO's accuracy (within 0.02), ACE and RAPO raise "
                 "pass@8", "entropy, nats ↑", "higher entropy and plateau, higher pass@k"),
    rewards=("noise: 80 % of the gain", "noisy", "grpo",
             "RL survives 40 % of flipped rewards, and rewards without a verifier do nearly as well",
             "accuracy ↑", "72 % for 76 % of clean; RLPR at or above verifiers"),
    teachers=("kdrl > grpo", "kdrl", "grpo",
              "RL with a teacher beats RL alone and distillation alone within 15 steps",
              "accuracy ↑", "KDRL and RLAD over GRPO and KD; ExOPD past the teacher"),
    forgetting=("RECAP: > grpo", "recap", "grpo",
                "RECAP's weights and instance filtering forget less of the old task than RL on the new one "
                "alone", "accuracy, old task ↑", "RECAP keeps general skills; RL forgets little"),
    noise=("rDPO at 40 %", "rdpo 40", "dpo 40",
           "Under flipped labels rDPO and cDPO, told the rate, and IPO beat DPO, and DPO with another beta",
           "gold ↑", "rDPO over DPO and cDPO"),
    length=("LD-DPO: shorter", "ld_dpo|val_length", "dpo|val_length",
            "Where annotators like length, LD-DPO and SimPO give shorter and better responses than DPO",
            "length, tokens ↓", "shorter at a higher win rate"),
    margins=("MADPO: madpo > dpo", "madpo", "dpo",
             "Weights by margin (MADPO) and a batch's own beta (β-DPO) beat DPO, more so under noise",
             "gold ↑", "MADPO over DPO and β-DPO, β-DPO over DPO"),
    overopt=("RPO: rpo > dpo", "rpo", "dpo",
             "On few pairs DPO over-optimises: gold falls from its peak; RPO, HyPO and Flex-DPO end higher",
             "gold at the end ↑", "-"),
    unlearning=("SGD alone: npo keeps more than GA", "npo, SGD alone", "ga, SGD alone",
                "NPO forgets what it should without losing the rest; gradient ascent collapses",
                "NLL of the rest ↓", "gradient ascent diverges linearly, NPO logarithmically"),
    nash=("SPPO below DPO", "sppo", "online",
          "With intransitive annotators self-play methods become less exploitable, online DPO does not",
          "exploitability ↓", "towards the Nash equilibrium"),
    explore=("XPO: xpo > online", "xpo", "online",
             "Optimism (XPO, SELM) finds better responses than online DPO with as many samples",
             "gold ↑", "higher win rates than online DPO"),
    pareto=("over weighted, w55", {"raco w55|val_gold_A": 0.5, "raco w55|val_gold_B": 0.5},
            {"weighted w55|val_gold_A": 0.5, "weighted w55|val_gold_B": 0.5},
            "RACO's clipped conflict-averse gradients reach beyond the Pareto front of weighted DPO",
            "gold, half A, half B ↑", "better trade-offs than weighted DPO, clipping helps"),
    pruning=("order: ARMOR 4 < NoWag-P", "ARMOR 4", "NoWag-P",
             "At 2:4 ARMOR loses less than NoWag-P (2504.14569), that than Wanda, that than magnitude; and "
             "less than SparseGPT and than a low-rank correction of its size", "nats lost ↓",
             "Llama-2-7B perplexity 7.2 against 11.1; Wanda 11.4, SparseGPT 10.2 (second-hand)"),
    codes=("2 bits: NoWag-VQ, 2 < GPTVQ, 2", "NoWag-VQ, 2", "GPTVQ, 2",
           "NoWag-VQ loses less than other ways to round at about as many bits",
           "nats lost, 2 bits ↓", "better than other one-shot vector quantisers (second-hand)"),
    widths=("BAQ: BAQ, 3 < uniform, 3", "BAQ, 3", "uniform, 3",
            "Bits where columns lose most (BAQ) beat the same bits everywhere; groups that need 4 bits are "
            "found by sensitivity", "KL to the original, 3 bits ↓",
            "below GPTQ at equal average bits"),
    arena=("spiky: AWQ 4, spiky < RTN 4, spiky", "AWQ 4, spiky", "RTN 4, spiky",
           "Methods that handle outliers win where outliers are", "KL to the original ↓", "-"),
    kv=("keys: KIVI < keys by token", "KIVI", "keys by token",
        "A 2-bit cache wants keys by channel and values by token; trained heads know which tokens may go",
        "nats lost ↓", "2 bits lose least with keys by channel, values by token (second-hand)"),
    slim=("stages: two stages < one stage", "two stages", "one stage",
          "Slimming experts in stages beats one cut at equal tokens, and slimming beats dropping experts, "
          "random neurons, new weights and a dense model of its active size", "nats lost ↓",
          "stages above one shot"),
    widths_of_layers=("choice: exact < uniform", "exact", "uniform",
                      "The exact choice of a width for every layer beats one width for all, and that a "
                      "random choice; neurons chosen by activations beat a policy that reads weights, and "
                      "that chance",
                      "KL to the original ↓", "-"),
    adaspec=("paper's budgets: docstrings 64", "docstrings 64, AdaSPEC, 2.5x", "docstrings 64, KD",
             "A draft distilled on the tokens with most left to learn is accepted more often than one "
             "distilled on all, at the paper's budgets (2.5 times the data) and at equal data",
             "chance that a sample is kept ↑",
             "Pythia on GSM8K 57.6 -> 62.6 %, CNN/DailyMail 73.1 -> 74.2 %"),
)


def reports():
    """{name: a claim's JSON}, in the order of their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def script_of(report):
    """The script whose --claim wrote the report: 'grpo'."""
    return report["command"].split()[1].removesuffix(".py")


def of_script(script, found):
    """The script's reports: those of HEADLINES in its order, then the others by name."""
    order = {name: i for i, name in enumerate(HEADLINES)}
    mine = [k for k, r in found.items() if script_of(r) == script]
    return {k: found[k] for k in sorted(mine, key=lambda k: (order.get(k, len(order)), k))}


def headline(name, report):
    """The claim's row of HEADLINES; without one its first test, whose arms are those that its label
    names."""
    if name in HEADLINES:
        return HEADLINES[name]
    label = report["tests"][0]["test"]
    sides = re.split(r" [<>-] ", label, maxsplit=1)
    arms = [next((a for a in sorted(report["arms"], key=len, reverse=True) if side.endswith(a)),
                 None)
            for side in sides]
    ours, base = arms if len(arms) == 2 and None not in arms else (None, None)
    if ours and abs(difference(report, ours, base)[0] - report["tests"][0]["difference"]) > 1e-9:
        ours = base = None  # the test asks for more than the difference of two means
    arrow = "↑" if report["better"] == "higher" else "↓"
    return label, ours, base, report["text"], f"{report['metric'].replace('_', ' ')} {arrow}", "-"


def values(report, what):
    """(label, the numbers by seed) of an arm, an "arm|metric", a weighted sum of such, or a
    constant."""
    if isinstance(what, float):
        return f"{what:g}", [what] * report["seeds"]
    terms = {what: 1.0} if isinstance(what, str) else what
    total = [0.0] * report["seeds"]
    for key, weight in terms.items():
        arm, _, metric = key.partition("|")
        if metric not in report["arms"].get(arm, {}) and (metric or arm not in report["arms"]):
            raise UserError(f"{report['claim']} has no {key!r}: mend its row of HEADLINES in tests/claims.py")
        of = report["arms"][arm][metric or report["metric"]]["values"]
        total = [t + weight * v for t, v in zip(total, of)]
    return arm, total


def difference(report, ours, base):
    """(mean, half width of the 95 % interval) of ours - baseline, paired by seed."""
    return interval([x - y for x, y in zip(values(report, ours)[1], values(report, base)[1])])


# --- the README's tables --------------------------------------------------------------------------


def digits(half):
    """Decimals for a number with this interval: 3, one more or up to two less where it is narrow or
    wide."""
    return 1 if half >= 10 else 2 if half >= 1 else 3 if half >= 0.005 or half == 0 else 4


def cell(text):
    """Text that stays one cell of a table, every arXiv number a link."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)",
                  text.replace("|", "\\|"))


def row(name, report):
    """One line of the table of claims."""
    label, ours, base, statement, measure, published = headline(name, report)
    judged = {t["test"]: t for t in report["tests"]}
    if label and label not in judged:
        raise UserError(f"{name} has no test {label!r}: mend its row of HEADLINES in tests/claims.py")
    known = re.findall(r"\d{4}\.\d{5}", statement)
    papers = ", ".join(p for p in re.findall(r"\d{4}\.\d{5}", report["paper"]) if p not in known)
    if ours and base:
        mean, half = difference(report, ours, base)
        sides = [values(report, x) for x in (ours, base)]
        sides = [arm if arm == f"{ys[0]:g}" else f"{arm}: {sum(ys) / len(ys):.{digits(half)}f}"
                 for arm, ys in sides]
    else:
        mean, half, sides = judged[label]["difference"], judged[label]["interval"], ["-", "-"]
    d = digits(half)
    told = "; ".join(x for x in (measure, papers) if x)
    return (f"| {cell(statement)} ({cell(told)}) | {cell(sides[0])} | {cell(sides[1])} "
            f"| {mean:+.{d}f} ± {half:.{d}f} | **{report['verdict']}** | {cell(published)} "
            f"| `{report['command']}` |")


def claims_table(found):
    """The table of all claims, a part a script, in the order of SCRIPTS."""
    lines = []
    for script in SCRIPTS:
        mine = of_script(script, found)
        if mine:
            lines += ["", f"**{script}.py**", "",
                      "| claim | method | baseline | method - baseline ± 95 % | verdict | published "
                      "| command |",
                      "|---|---|---|---|---|---|---|"]
            lines += [row(name, report) for name, report in mine.items()]
    return lines[1:]


def contrasts_table(script, found):
    """Every paired contrast of a script's claims, and what the claim's verdict is made of."""
    lines = ["| contrast | difference ± 95 % | verdict |", "|---|---|---|"]
    for name, report in of_script(script, found).items():
        side = "above" if report["better"] == "higher" else "below"
        took = f", {report['minutes']:.0f} minutes" if report.get("minutes") else ""
        lines.append(f"| **{name}**, {report['seeds']} seeds{took}: `{report['metric']}`, or what a "
                     f"label names; holds {side} 0 ([picture](data/results/{name}.png)) | | |")
        for t in report["tests"]:
            d = digits(t["interval"])
            lines.append(f"| {cell(t['test'])} | {t['difference']:+.{d}f} ± {t['interval']:.{d}f} "
                         f"| {t['verdict']} |")
    return lines


def blocks(found):
    """{marker: lines}: every generated part of the README, from the reports alone."""
    made = {"claims": claims_table(found)}
    return made | {f"contrasts {s}": contrasts_table(s, found) for s in SCRIPTS
                   if of_script(s, found)}


def fresh(text, found):
    """The README's text with what is between <!-- X: begin --> and <!-- X: end --> made anew, for
    every X."""
    for marker, lines in blocks(found).items():
        ends = [f"<!-- {marker}: {end} -->" for end in ("begin", "end")]
        if [text.count(x) for x in ends] != [1, 1]:
            raise UserError(f"README.md must hold {ends[0]!r} and {ends[1]!r}, each once: add them where the "
                            "table should stand")
        head, rest = text.split(ends[0])
        if ends[1] not in rest:
            raise UserError(f"README.md: {ends[1]!r} comes before {ends[0]!r}: swap them")
        text = "\n".join([head + ends[0], "", *lines, "", ends[1]]) + rest.split(ends[1])[1]
    return text


def rewrite(found, path):
    """Bring the README's generated parts up to date; the changed lines, as a diff (none: it was
    fresh)."""
    old = path.read_text()
    new = fresh(old, found)
    if new != old:
        write_text(path, new)
    return [x for x in difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
            if not x.startswith(("---", "+++"))]


# --- figures --------------------------------------------------------------------------------------


def figure(script, found):
    """One panel a claim: a row an arm, a dot a seed, mean and 95 % interval. -> the PNG's path"""
    mine = {k: r for k, r in found.items() if script_of(r) == script}
    if not mine:
        known = {script_of(r) for r in found.values()}
        sys.exit(f"no claim of {script!r} in {RESULTS}: choose from {', '.join(sorted(known))}")
    plt = pyplot()
    columns = min(4, len(mine))
    rows = -(-len(mine) // columns)
    tall = max(len(r["arms"]) for r in mine.values())
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, (0.2 * tall + 1.3) * rows),
                             squeeze=False)
    for ax in axes.flat[len(mine):]:
        ax.set_visible(False)
    for ax, (name, report) in zip(axes.flat, mine.items()):
        metric = report["metric"]
        for y, (arm, metrics) in enumerate(report["arms"].items()):
            m = metrics[metric]
            ax.plot(m["values"], [y] * len(m["values"]), "o", ms=2.5, alpha=0.4, color="tab:gray")
            ax.errorbar(m["mean"], y, xerr=m["interval"], fmt="o", ms=4, capsize=2,
                        color="tab:blue")
        ax.set(yticks=range(len(report["arms"])), xlabel=metric.replace("_", " "))
        ax.set_yticklabels(list(report["arms"]), fontsize=6.5)
        ax.set_title(textwrap.fill(f"{name}: {report['verdict']}", 52), fontsize=6.5)
        ax.invert_yaxis()
    fig.tight_layout()
    path = RESULTS / f"{script}_claims.png"
    fig.savefig(path)
    plt.close(fig)
    return path


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    """See the docstring above."""
    found = reports()
    match sys.argv[1:] if argv is None else argv:
        case []:
            for name, report in found.items():
                print(f"{name:<14} {report['seeds']} seeds  {report['verdict']}")
                print(f"{'':<14} {report['command']}")
        case ["--table"]:
            changed = rewrite(found, README)
            print("\n".join(changed) or "README.md is up to date: nothing changed")
        case ["--table", name] if name in found:
            print(table(found[name]), f"\n\n{found[name]['verdict']}")
        case ["--table", name]:
            raise UserError(f"no claim {name!r} in {RESULTS}{nearest(name, found)}")
        case ["--figure", script]:
            print(figure(script, found))
        case _:
            sys.exit(f"{__doc__}\nknown claims: {', '.join(found)}")


if __name__ == "__main__":
    cli(main)
