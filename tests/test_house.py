"""How the house is built: spines, chapters, functions and lines of a size that can be understood at
once; data/ that holds data; nobody who imports upwards. On every .py that is there, so that a copy
of a script is held to the same."""
import ast
import re
import symtable
from pathlib import Path

import pytest
from conftest import ROOT

TOP = sorted(ROOT.glob("*.py"))
DATA = sorted(ROOT.glob("data/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
HEADING = re.compile(r"# === ([\w, ]+): (.*?)(?: =+)?$")
CORE = {"srppo", "route", "adaspec", "openrubrics", "armor", "normuon", "slimmoe", "thinkrm",
        "nowag_p", "advrm"}
SPINE, CHAPTER, CORE_CHAPTER, DOCSTRING, FUNCTION, TRAIN, FIELDS, COLUMNS = 450, 80, 150, 25, 50, 120, 25, 100
VAGUE = {"told", "have", "made", "said", "look", "s"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def parts(text):
    """The pieces of a script: {"docstring", "spine", and each chapter's heading: number of
    lines}."""
    tree, lines = ast.parse(text), text.splitlines()
    begin = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
    heads = [i for i, line in enumerate(lines) if HEADING.match(line)]
    out = dict(docstring=begin, spine=(heads[0] if heads else len(lines)) - begin)
    for a, b in zip(heads, [*heads[1:], len(lines)]):
        out[lines[a]] = len("\n".join(lines[a:b]).split('\nif __name__ == "__main__"')[0].rstrip().splitlines())
    return out


def too_long(text):
    """Lines over the columns, functions over their lines."""
    wide = [f"line {i}: {len(x)} columns" for i, x in enumerate(text.splitlines(), 1)
            if len(x) > COLUMNS]
    long = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = node.end_lineno - node.lineno + 1
            if size > (TRAIN if node.name == "train" else FUNCTION):
                long.append(f"{node.name}: {size} lines")
    return wide + long


def blank_lines(text):
    """Definitions at the top level that are not two blank lines from what is before and after
    them."""
    tree, lines, out = ast.parse(text), text.splitlines(), []
    kinds = (ast.FunctionDef, ast.ClassDef)
    for before, node in zip(tree.body, tree.body[1:]):
        if not isinstance(node, kinds) and not isinstance(before, kinds):
            continue
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
        between = lines[before.end_lineno:first - 1]
        runs = "\n".join("x" if x.strip() else "" for x in between)
        if not re.match(r"\n(\n|$)", runs + "\n") and "\n\n" not in f"\n{runs}\n"[1:]:
            out.append(f"line {first}: two blank lines are wanted")
    return out


def nested(text):
    """Comprehensions inside comprehensions."""
    return [f"line {inner.lineno}: a comprehension in a comprehension"
            for node in ast.walk(ast.parse(text)) if isinstance(node, COMPREHENSIONS)
            for inner in ast.walk(node) if inner is not node and isinstance(inner, COMPREHENSIONS)]


def closures(text):
    """Functions inside functions that read five or more variables of the one outside."""
    out, todo = [], [symtable.symtable(text, "x", "exec")]
    while todo:
        table = todo.pop()
        todo += table.get_children()
        kind = table.get_name()
        if table.get_type() != "function" or kind in ("genexpr", "listcomp", "setcomp", "dictcomp"):
            continue
        if len(free := table.get_frees()) >= 5:
            out.append(f"line {table.get_lineno()}: {table.get_name()} closes over {', '.join(sorted(free))}")
    return out


def vague(text):
    """Names that tell nothing."""
    tree = ast.parse(text)
    names = {(n.id, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Name)
             and isinstance(n.ctx, ast.Store)}
    names |= {(n.arg, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.arg)}
    return [f"line {line}: {name!r} tells nothing"
            for name, line in sorted(names, key=lambda x: x[1]) if name in VAGUE - {"s"}]


def own_fields(text):
    """How many fields the Config of a script has of its own: those that every run has stand in
    data/run.py."""
    common = set()
    for node in ast.parse((ROOT / "data" / "run.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in ("Common", "Training"):
            common |= {x.target.id for x in node.body if isinstance(x, ast.AnnAssign)}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return len({x.target.id for x in node.body if isinstance(x, ast.AnnAssign)} - common)
    return 0


def of_a_script(text):
    """All that is wrong with a script's parts."""
    out = []
    for name, size in parts(text).items():
        heading = HEADING.match(name)
        core = heading and CORE & set(re.split(r"[, ]+", heading[1]))
        most = dict(docstring=DOCSTRING, spine=SPINE).get(name, CORE_CHAPTER if core else CHAPTER)
        out += [f"{name}: {size} lines, at most {most}"] * (size > most)
    if (n := own_fields(text)) > FIELDS:
        out.append(f"Config: {n} fields of its own, at most {FIELDS}")
    return out


def violations(path):
    """Everything about a file that its limits forbid."""
    text, path = Path(path).read_text(), Path(path).resolve()
    out = too_long(text)
    if path.parent in (ROOT, ROOT / "data"):
        out += blank_lines(text) + nested(text) + closures(text) + vague(text)
    if path.parent == ROOT:
        out += of_a_script(text)
    return out


if __name__ == "__main__":  # python tests/test_house.py FILE …: what is left to do
    import sys
    for name in sys.argv[1:] or [*TOP, *DATA, *TESTS]:
        for line in violations(name):
            print(f"{name}: {line}")
