"""
claims.py - what data/results/ holds, as the README shows it.

    python tests/claims.py                         # every claim: its verdict, seeds, command
    python tests/claims.py --table lengths         # a claim's arms and paired differences, as text
    python tests/claims.py --figure grpo           # data/results/grpo_claims.png: all claims of grpo.py in one

Nothing is trained here: `python <script>.py --claim NAME` measures, and writes the JSON that this reads.
"""
import json
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data.run import pyplot, table

RESULTS = ROOT / "data" / "results"


def reports():
    """{name: a claim's JSON}, in the order of their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def figure(script, found):
    """One panel a claim of the script: a row an arm, a dot a seed, mean and 95 % interval. -> the PNG's path"""
    mine = {k: r for k, r in found.items() if r["command"].startswith(f"python {script}.py")}
    if not mine:
        known = {r["command"].split()[1].removesuffix(".py") for r in found.values()}
        sys.exit(f"no claim of {script!r} in {RESULTS}: choose from {', '.join(sorted(known))}")
    plt = pyplot()
    columns = min(4, len(mine))
    rows = -(-len(mine) // columns)
    tall = max(len(r["arms"]) for r in mine.values())
    fig, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, (0.2 * tall + 1.3) * rows), squeeze=False)
    for ax in axes.flat[len(mine):]:
        ax.set_visible(False)
    for ax, (name, report) in zip(axes.flat, mine.items()):
        metric = report["metric"]
        for y, (arm, metrics) in enumerate(report["arms"].items()):
            m = metrics[metric]
            ax.plot(m["values"], [y] * len(m["values"]), "o", ms=2.5, alpha=0.4, color="tab:gray")
            ax.errorbar(m["mean"], y, xerr=m["interval"], fmt="o", ms=4, capsize=2, color="tab:blue")
        ax.set(yticks=range(len(report["arms"])), xlabel=metric.replace("_", " "))
        ax.set_yticklabels(list(report["arms"]), fontsize=6.5)
        ax.set_title(textwrap.fill(f"{name}: {report['verdict']}", 52), fontsize=6.5)
        ax.invert_yaxis()
    fig.tight_layout()
    path = RESULTS / f"{script}_claims.png"
    fig.savefig(path)
    plt.close(fig)
    return path


def main(argv):
    """See the docstring above."""
    found = reports()
    match argv:
        case []:
            for name, report in found.items():
                print(f"{name:<14} {report['seeds']} seeds  {report['verdict']}\n{'':<14} {report['command']}")
        case ["--table", name] if name in found:
            print(table(found[name]), f"\n\n{found[name]['verdict']}")
        case ["--figure", script]:
            print(figure(script, found))
        case _:
            sys.exit(f"{__doc__}\nknown claims: {', '.join(found)}")


if __name__ == "__main__":
    main(sys.argv[1:])
