"""
tables.py - what data/results/ holds, as README.md shows it: run it as `python tests/claims.py`.

    python tests/claims.py                         # every claim: its verdict, seeds, command
    python tests/claims.py --table                 # write the tables anew, say what changed
    python tests/claims.py --table lengths         # a claim's arms and paired differences, as text
    python tests/claims.py --figure grpo           # data/results/grpo_claims.png: all its claims

Nothing is trained here: `python <script>.py --claim NAME` measures, and writes the JSON.
Map      1 what the README says of a claim   2 its tables   3 figures   4 main
"""
import difflib
import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

from claims import interval, table
from data.run import UserError, nearest, pyplot, write_text

ROOT = Path(__file__).parent.parent.parent

RESULTS, README = ROOT / "data" / "results", ROOT / "README.md"

# --- what the README says of a claim --------------------------------------------------------------

SCRIPTS = ("sft", "reward", "ppo", "grpo", "dpo", "compress", "specdec")   # the order of the tables

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
            raise UserError(f"{report['claim']} has no {key!r}: mend its row of HEADLINES in "
                            "tests/claims.py")
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
        raise UserError(f"{name} has no test {label!r}: mend its row of HEADLINES in "
                        "tests/claims.py")
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
                      "| claim | method | baseline | method - baseline ± 95 % | verdict | "
                      "published | command |",
                      "|---|---|---|---|---|---|---|"]
            lines += [row(name, report) for name, report in mine.items()]
    return lines[1:]


def contrasts_table(script, found):
    """Every paired contrast of a script's claims, and what the claim's verdict is made of."""
    lines = ["| contrast | difference ± 95 % | verdict |", "|---|---|---|"]
    for name, report in of_script(script, found).items():
        side = "above" if report["better"] == "higher" else "below"
        took = f", {report['minutes']:.0f} minutes" if report.get("minutes") else ""
        lines.append(f"| **{name}**, {report['seeds']} seeds{took}: `{report['metric']}`, or what "
                     f"a label names; holds {side} 0 ([picture](data/results/{name}.png)) | | |")
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
            raise UserError(f"README.md must hold {ends[0]!r} and {ends[1]!r}, each once: add them "
                            "where the table should stand")
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
