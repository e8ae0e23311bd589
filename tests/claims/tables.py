"""
tables.py - what data/results/ holds, as README.md and the pages beside the numbers show it; run it
as `python tests/claims.py`.

    python tests/claims.py                         # every claim: its verdict, seeds, command
    python tests/claims.py --table                 # write all tables anew, say what changed
    python tests/claims.py --table lengths         # a claim's arms and paired differences, as text
    python tests/claims.py --figure grpo           # data/results/grpo_claims.png: all its claims

Nothing is trained here: `python <script>.py --claim NAME` measures, and writes the JSON that this
reads.
Map      1 what a table says of a claim   2 tables of claims   3 what undecided contrasts would
         need   4 the index of methods   5 pages   6 figures   7 main
"""
import difflib
import importlib
import json
import math
import re
import sys
import textwrap
from pathlib import Path

from claims import critical_t, interval, power, table
from data.run import HEADING, UserError, entries, nearest, pyplot, write_text

ROOT = Path(__file__).parent.parent.parent

RESULTS, README = ROOT / "data" / "results", ROOT / "README.md"
PAPER = re.compile(r"\b\d{4}\.\d{5}\b")

# --- what the README says of a claim --------------------------------------------------------------

# the claim of each script that README.md shows; the scripts in the order of all tables
SHOWN = dict(sft="normuon", reward="ensembles", ppo="srppo", grpo="lengths", dpo="noise",
             compress="pruning", specdec="adaspec")
SCRIPTS = tuple(SHOWN)

HEADLINES = {}                   # claim: what its row says, see tests/claims/<script>.py
for script in SCRIPTS:
    HEADLINES |= importlib.import_module(f"claims.{script}").HEADLINES


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
    """The claim's row of HEADLINES; without one its first test, with the arms of its label."""
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
    """(label, numbers by seed) of an arm, an "arm|metric", a weighted sum, or a constant."""
    if isinstance(what, float):
        return f"{what:g}", [what] * report["seeds"]
    terms = {what: 1.0} if isinstance(what, str) else what
    total = [0.0] * report["seeds"]
    for key, weight in terms.items():
        arm, _, metric = key.partition("|")
        if metric not in report["arms"].get(arm, {}) and (metric or arm not in report["arms"]):
            raise UserError(f"{report['claim']} has no {key!r}: mend its row of HEADLINES")
        of = report["arms"][arm][metric or report["metric"]]["values"]
        total = [t + weight * v for t, v in zip(total, of)]
    return arm, total


def difference(report, ours, base):
    """(mean, half width of the 95 % interval) of ours - baseline, paired by seed."""
    return interval([x - y for x, y in zip(values(report, ours)[1], values(report, base)[1])])


# --- tables of claims -----------------------------------------------------------------------------


def claims_of(script):
    """{name: Claim}: a script's claims, those without a result too."""
    return importlib.import_module(f"claims.{script}").CLAIMS


def digits(half):
    """Decimals for a number with this interval: 3, more where narrow, fewer where wide."""
    return 1 if half >= 10 else 2 if half >= 1 else 3 if half >= 0.005 or half == 0 else 4


def cell(text):
    """Text that stays one cell of a table, every arXiv number a link."""
    return PAPER.sub(r"[\g<0>](https://arxiv.org/abs/\g<0>)", text.replace("|", "\\|"))


def difference_cells(report, label, ours, base):
    """Three cells of a claim's row: method, baseline, method - baseline."""
    if ours and base:
        mean, half = difference(report, ours, base)
        sides = [values(report, x) for x in (ours, base)]
        sides = [arm if arm == f"{ys[0]:g}" else f"{arm}: {sum(ys) / len(ys):.{digits(half)}f}"
                 for arm, ys in sides]
    else:
        judged = next(t for t in report["tests"] if t["test"] == label)
        mean, half, sides = judged["difference"], judged["interval"], ["-", "-"]
    d = digits(half)
    return [*map(cell, sides), f"{mean:+.{d}f} ± {half:.{d}f}"]


def cells(name, report, page=""):
    """A claim's row: statement, method, baseline, difference, verdict with a link into the page."""
    label, ours, base, statement, measure, _ = headline(name, report)
    if label and label not in {t["test"] for t in report["tests"]}:
        raise UserError(f"{name} has no test {label!r}: mend its row of HEADLINES")
    known = PAPER.findall(statement)
    papers = ", ".join(p for p in PAPER.findall(report["paper"]) if p not in known)
    detail = "; ".join(x for x in (measure, papers) if x)
    return [f"{cell(statement)} ({cell(detail)})", *difference_cells(report, label, ours, base),
            f"[{report['verdict']}]({page}#claim-{name})"]


def line(*texts):
    """One line of a table."""
    return f"| {' | '.join(texts)} |"


def row(name, report):
    """One line of a script's table of claims."""
    return line(*cells(name, report), cell(headline(name, report)[-1]), f"`{report['command']}`")


def first_claims(found):
    """README.md's table: one claim of every script."""
    lines = ["| script | claim | method | baseline | method - baseline ± 95 % | verdict |",
             "|---|---|---|---|---|---|"]
    for script, name in SHOWN.items():
        if name in found:
            page = f"data/results/{script}.md"
            lines.append(line(f"[{script}.py]({page})", *cells(name, found[name], page)))
    return lines


def claims_table(script, found):
    """The table of a script's claims, and which of them have no result yet."""
    mine = of_script(script, found)
    lines = ["| claim | method | baseline | method - baseline ± 95 % | verdict | published "
             "| command |", "|---|---|---|---|---|---|---|"]
    lines += [row(name, report) for name, report in mine.items()]
    waiting = [name for name in claims_of(script) if name not in mine]
    if waiting:
        commands = ", ".join(f"`python {script}.py --claim {name}`" for name in waiting)
        lines += ["", f"Defined, and not measured yet: {commands}."]
    return lines


def contrasts(script, found):
    """Every paired contrast of a script's claims, under a heading a claim: where verdicts lead."""
    lines = []
    for name, report in of_script(script, found).items():
        side = "above" if report["better"] == "higher" else "below"
        took = f", {report['minutes']:.0f} minutes" if report.get("minutes") else ""
        lines += ["", f"### Claim `{name}`", "",
                  f"{report['seeds']} seeds{took}; `{report['metric']}`, or what a label names; "
                  f"holds {side} 0 ([picture]({name}.png)). Verdict: **{report['verdict']}**.", "",
                  "| contrast | difference ± 95 % | p, Holm | verdict |", "|---|---|---|---|"]
        for t, p in zip(report["tests"], together(report)):
            d, alone = digits(t["interval"]), t.get("alone", t["verdict"])
            lines.append(line(cell(t["test"]), f"{t['difference']:+.{d}f} ± {t['interval']:.{d}f}",
                              f"{p:.2g}", t["verdict"] + f" (alone: {alone})"
                              * (alone != t["verdict"])))
    return lines[1:]


def spread(report, test):
    """The standard deviation of a contrast over the seeds, from its interval."""
    return test["interval"] * math.sqrt(report["seeds"]) / critical_t(report["seeds"])


def together(report):
    """Holm's p-value of each contrast of a report, those measured before plans included."""
    p = {t["test"]: power.p_value(t["difference"], spread(report, t), report["seeds"])
         for t in report["tests"]}
    return power.holm(p).values()


# --- what undecided contrasts would need ----------------------------------------------------------


def needed(report, claim, test):
    """What matters in a contrast, its spread, and the seeds that show it: alone, and with all of
    its claim's (Holm).   -> four numbers, None for more than power.MOST seeds"""
    sd, smallest = spread(report, test), power.smallest_of(claim, claim.tests[test["test"]])
    careful = power.cautious(sd, report["seeds"])
    levels = power.LEVEL, power.LEVEL / len(report["tests"])
    return smallest, sd, *(power.seeds_for(smallest, careful, x, power.ABOVE) for x in levels)


def undecided(found):
    """Every contrast that its seeds left open, and how many would close it."""
    lines, rows = [], []
    for script in SCRIPTS:
        for name, report in of_script(script, found).items():
            claim = claims_of(script).get(name)
            open_ones = [t for t in report["tests"] if t["verdict"] == "undecided"
                         and claim and t["test"] in claim.tests]
            rows += [(script, name, report, t, needed(report, claim, t)) for t in open_ones]
    lines += [f"{len(rows)} contrasts are undecided.", "",
              "| claim | contrast | difference ± 95 % | seeds | matters | sd of a seed | seeds "
              "needed | with all its contrasts |", "|---|---|---|---|---|---|---|---|"]
    for script, name, report, t, (smallest, sd, *seeds) in rows:
        d = digits(t["interval"])
        lines.append(line(f"[{name}]({script}.md#claim-{name})", cell(t["test"]),
                          f"{t['difference']:+.{d}f} ± {t['interval']:.{d}f}",
                          str(report["seeds"]), f"{smallest:g}", f"{sd:.3g}",
                          *(str(x or f"> {power.MOST}") for x in seeds)))
    return lines


# --- the index of methods -------------------------------------------------------------------------


# what stands in a script's spine, which has no heading: names, paper, idea
SPINES = dict(
    sft=("pretrain, sft", ["2203.02155"], "cross-entropy of a text, or of completions only"),
    reward=("bt", ["2203.02155"], "Bradley-Terry: the chosen response scores higher"),
    ppo=("srppo", ["2510.21090"], "the reward is log π_sft(y|x) - log π_base(y|x): demonstrations "
         "are all it needs"),
    grpo=("grpo", ["2402.03300"], "the group's mean as baseline, its std as unit, PPO's clip"),
    dpo=("dpo, online", ["2305.18290"], "the policy as its own reward model: a logistic loss of "
         "pairs from a file, or of its own samples"),
    compress=("nowag_p", ["2504.14569"], "the largest entries of the normalised weight stay, by "
              "the energy of their inputs"),
    specdec=("speculative", ["2211.17192", "2302.01318"], "a draft proposes, the target verifies: "
             "the target's law, exactly"),
    optim=("adamw", ["1711.05101"], "Adam with decoupled weight decay"))


def chapters(text):
    """[(names, papers, idea)] of a script's chapters, from their headings."""
    rows = []
    for head in filter(None, map(HEADING.match, text.splitlines())):
        pieces = head[2].split(", ")
        while len(pieces) > 1 and PAPER.search(pieces[0]):
            pieces.pop(0)
        rows.append((head[1], PAPER.findall(head[2]), ", ".join(pieces)))
    return rows


def methods(script, text, known):
    """A script's methods in reading order: its spine's, then the chapters that have a paper or the
    name of a preset or a row, which `known` holds."""
    return [SPINES[script]] + [row for row in chapters(text)
                               if row[1] or known & {*row[0].split(", ")}]


def short_verdict(name, verdict):
    """The part of a verdict in parts that has the method's name, or all of it."""
    def plain(x):
        return re.sub(r"\W|_", "", x).lower()
    parts = verdict.split("; ")
    return next((x for x in parts if plain(x.split(": ")[0]) == plain(name)), verdict)


def verdicts(names, script, found):
    """Links to the claims of a script in which one of the names is part of an arm, or '-'."""
    links = []
    for claim, report in of_script(script, found).items():
        arms = claims_of(script)[claim].arms.values()
        used = [name for name in names if any(name in entries(arm) for arm in arms)]
        words = dict.fromkeys(cell(short_verdict(name, report["verdict"])) for name in used)
        if words:
            links.append(f"[{claim}: {'; '.join(words)}]({script}.md#claim-{claim})")
    return "; ".join(links) or "-"


def index(found):
    """The table of all methods. optim.py's rules are presets of sft.py, whose claims race them."""
    lines = ["| --config | idea | paper | script | verdict |", "|---|---|---|---|---|"]
    for script in [*SCRIPTS, "optim"]:
        home = "sft" if script == "optim" else script
        module = importlib.import_module(home)
        known = {*module.PRESETS}.union(*module.AXES.values())
        for words, papers, idea in methods(script, (ROOT / f"{script}.py").read_text(), known):
            names = words.split(", ")
            marked = ", ".join(f"`{name}`" if name in known else name for name in names)
            lines.append(line(marked, cell(idea), cell(", ".join(papers)) or "-",
                              f"[{script}.py]({home}.md)", verdicts(names, home, found)))
    return [f"{len(lines) - 2} methods, controls and baselines.", "", *lines]


# --- pages ----------------------------------------------------------------------------------------


def pages(found):
    """{path: {marker: lines}}: every generated part of every page."""
    out = {README: {"claims": first_claims(found)},
           RESULTS / "README.md": {"methods": index(found)},
           RESULTS / "power.md": {"undecided": undecided(found)}}
    for script in SCRIPTS:
        if of_script(script, found):
            out[RESULTS / f"{script}.md"] = {"claims": claims_table(script, found),
                                             "contrasts": contrasts(script, found)}
    return out


def fresh(text, parts, name):
    """A page's text with what is between <!-- X: begin --> and <!-- X: end --> made anew, for every
    part X: lines."""
    for marker, lines in parts.items():
        ends = [f"<!-- {marker}: {end} -->" for end in ("begin", "end")]
        if [text.count(x) for x in ends] != [1, 1]:
            raise UserError(f"{name} must hold {ends[0]!r} and {ends[1]!r}, each once: add them "
                            "where the table should stand")
        head, rest = text.split(ends[0])
        if ends[1] not in rest:
            raise UserError(f"{name}: {ends[1]!r} comes before {ends[0]!r}: swap them")
        text = "\n".join([head + ends[0], "", *lines, "", ends[1]]) + rest.split(ends[1])[1]
    return text


def rewrite(path, parts):
    """Bring a page's generated parts up to date; the changed lines as a diff, none if fresh."""
    old = path.read_text()
    new = fresh(old, parts, path.name)
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
            for path, parts in pages(found).items():
                changed = rewrite(path, parts) or ["nothing changed"]
                print(f"{path.relative_to(ROOT)}:", *changed, sep="\n")
        case ["--table", name] if name in found:
            print(table(found[name]), f"\n\n{found[name]['verdict']}")
        case ["--table", name]:
            raise UserError(f"no claim {name!r} in {RESULTS}{nearest(name, found)}")
        case ["--figure", script]:
            print(figure(script, found))
        case _:
            sys.exit(f"{__doc__}\nknown claims: {', '.join(found)}")
