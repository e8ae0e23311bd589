"""How the house is built: spines, chapters, functions and lines of a size that can be understood at
once; data/ that holds data; nobody who imports upwards. On every .py that is there, so that a copy
of a script is held to the same."""
import ast
import importlib
import re
import subprocess
import symtable
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from data import run
from data.run import HEADING

TOP = sorted(ROOT.glob("*.py"))
DATA = sorted(ROOT.glob("data/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
CORE = {"srppo", "route", "adaspec", "openrubrics", "armor", "normuon", "slimmoe", "thinkrm",
        "nowag_p", "advrm"}
SPINE, CHAPTER, CORE_CHAPTER, DOCSTRING, FUNCTION, TRAIN = 450, 80, 150, 25, 50, 120     # lines
FIELDS, COLUMNS = 25, 100
VAGUE = {"told", "have", "made", "said", "look"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def name_of(path):
    """A file's path from the project's folder, as pytest prints it."""
    return path.relative_to(ROOT).as_posix()


def parts(text):
    """The pieces of a script: {"docstring", "spine", and each chapter's heading: number of
    lines}."""
    tree, lines = ast.parse(text), text.splitlines()
    begin = tree.body[0].end_lineno if ast.get_docstring(tree) is not None else 0
    heads = [i for i, line in enumerate(lines) if HEADING.match(line)]
    out = dict(docstring=begin, spine=(heads[0] if heads else len(lines)) - begin)
    for a, b in zip(heads, [*heads[1:], len(lines)]):
        chapter = "\n".join(lines[a:b]).partition('\nif __name__ == "__main__"')[0]
        out[lines[a]] = len(chapter.rstrip().splitlines())
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
        between = [line.strip() for line in lines[before.end_lineno:first - 1]]
        if ["", ""] not in [between[i:i + 2]
                            for i in range(len(between))] or between[:3] == [""] * 3:
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
        inside = {"genexpr", "listcomp", "setcomp", "dictcomp"}        # no functions to a reader
        if table.get_type() == "function" and table.get_name() not in inside:
            free = ", ".join(sorted(table.get_frees()))
            if free.count(",") >= 4:
                out.append(f"line {table.get_lineno()}: {table.get_name()} closes over {free}")
    return out


def vague(text):
    """Names that tell nothing."""
    tree = ast.parse(text)
    names = {(n.id, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Name)
             and isinstance(n.ctx, ast.Store)}
    names |= {(n.arg, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.arg)}
    return [f"line {line}: {name!r} tells nothing"
            for name, line in sorted(names, key=lambda x: x[1]) if name in VAGUE]


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


# --- who may import whom --------------------------------------------------------------------------

FLOORS = {"kernels": {"data"}, "model": {"kernels", "data"}, "optim": {"kernels", "data"}}
SCRIPT_BELOW = {"kernels", "data", "model", "optim", "sft"}


def imported(text):
    """The modules that a file imports: {"torch", "data.run", "kernels", …}."""
    out = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            out |= {x.name for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            out |= {f"{node.module}.{x.name}" for x in node.names} | {node.module}
    return out


def leaks(data, users):
    """{module of data/: why it does not belong there}. data, users: {name: text}."""
    out = {}
    for name, text in data.items():
        above = {x.partition(".")[0] for x in imported(text)} & {*OURS}
        by = {user for user, other in users.items() if f"data.{name}" in imported(other)}
        below = {user for user, other in data.items() if f"data.{name}" in imported(other)}
        if above:
            out[name] = f"imports {', '.join(sorted(above))}"
        elif len(by) < 2 and not below:
            out[name] = f"is used by {', '.join(by) or 'nobody'} alone: it is a chapter there"
    return out


OURS = [path.stem for path in TOP]
TEXTS = {path.stem: path.read_text() for path in TOP}
BELOW = {path.stem: path.read_text() for path in DATA if path.stem != "__init__"}


def test_data_is_what_goes_in_and_what_comes_out():
    assert {*BELOW} <= {"run", "tokenizer", "text", "tasks", "prefs", "stats"}
    assert leaks(BELOW, TEXTS) == {}


def test_a_planted_leak_is_found():
    users = dict(grpo="from data import shaping", ppo="import torch")
    assert "grpo alone" in leaks(dict(shaping="import torch"), users)["shaping"]
    assert "imports model" in leaks(dict(shaping="import torch\nfrom model import load"),
                                    {})["shaping"]
    users |= dict(ppo="from data.shaping import plain")
    assert leaks(dict(shaping="import torch"), users) == {}


@pytest.mark.parametrize("path", TOP, ids=lambda p: p.name)
def test_who_may_import_whom(path):
    """a file imports only from the floors below its own; a script may ask sft.py for its base"""
    text, below = path.read_text(), FLOORS.get(path.stem, SCRIPT_BELOW - {path.stem})
    assert {x.partition(".")[0] for x in imported(text)} & {*OURS, "data", "tests"} <= below
    if "sft" in below:
        assert set(re.findall(r"\bsft\.(\w+)\(", text)) <= {"base", "find"}


# what else lies beside them is somebody's own
FILES = {"model.py", "kernels.py", "optim.py", "sft.py", "reward.py", "ppo.py", "grpo.py",
         "dpo.py", "compress.py", "specdec.py"}


def test_the_top_level_is_fixed():
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    names = {line.split("/")[0] for line in git.stdout.split()}
    assert {x for x in names if not x.startswith(".")} <= {
        "README.md", "requirements.txt", "LICENSE", "data", "tests", *FILES}


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*TOP, *DATA, *TESTS], ids=name_of)
def test_everything_is_of_a_size_that_can_be_understood(path):
    assert violations(path) == []


@pytest.mark.parametrize("text, words", [
    ("x = 1  # " + "y" * 100, "columns"),
    ("def f():\n" + "    x = 1\n" * 50, "f: 51 lines"),
    ("def f():\n    pass\n\ndef g():\n    pass\n", "two blank lines"),
    ("x = [[y for y in range(3)] for z in range(2)]", "comprehension"),
    ("def f(a, b, c, d, e):\n    def g():\n        return a, b, c, d, e\n    return g",
     "closes over a, b"),
    ("told = 1", "'told'")])
def test_a_limit_that_is_passed_is_told(text, words):
    found = too_long(text) + blank_lines(text) + nested(text) + closures(text) + vague(text)
    assert any(words in line for line in found)


def test_parts_of_a_script():
    text = '"""a\nb"""\nx = 1\n# === one, two: 2402.03300, idea ======\n' + "y = 2\n" * 81
    heading = "# === one, two: 2402.03300, idea ======"
    assert parts(text) == {"docstring": 2, "spine": 1, heading: 82}
    assert of_a_script(text) == [f"{heading}: 82 lines, at most 80"]
    assert of_a_script(text.replace("one, two", "armor")) == []


# --- chapters and presets -------------------------------------------------------------------------

SCRIPTS = [path for path in TOP if "PRESETS" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_every_preset_sets_two_keys_and_is_in_the_map(path):
    """a preset that sets one key is key=value; what --help cannot explain has no name"""
    script, lines = importlib.import_module(path.stem), path.read_text().splitlines()
    names = ", ".join(m[1] for m in map(HEADING.match, lines) if m)
    for name, row in script.PRESETS.items():
        assert len(row) != 1, f"{name} sets {row}: write it in --config"
        begins = [i for i, line in enumerate(lines) if re.match(rf' *{name}=|.*"{name}"', line)]
        noted = any("#" in line for i in begins for line in lines[max(0, i - 1):i + 3])
        assert name in re.split(", *", names) or noted or name in (script.__doc__ or ""), name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_an_axis_s_table_is_a_statement_of_its_own(path):
    """TABLE = dict(row=function, …): that --eject can cut to a row"""
    script, units = importlib.import_module(path.stem), run.units_of(path.read_text())
    tables = run.tables_of(path.read_text(), script.Config(), script.AXES)
    for unit in units:
        if isinstance(unit.node, ast.Assign) and unit.defines & tables.keys():
            assert run.table_rows(unit, tables) is not None, unit.defines


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_ends_where_every_chapter_has_spoken(path):
    assert path.read_text().endswith('\n\nif __name__ == "__main__":\n    cli(main)\n')


if __name__ == "__main__":  # python tests/test_house.py FILE …: what is left to do
    for name in sys.argv[1:] or [*TOP, *DATA, *TESTS]:
        for line in violations(name):
            print(f"{name}: {line}")
