"""What is written is checked: the README's commands, tables, numbers and links; the shape of the
tree."""
import importlib
import json
import re
import shlex
import subprocess
from dataclasses import fields
from itertools import combinations

import bench
from claims import tables as claims
import pytest
from conftest import ROOT

import model
from data.run import UserError, claims_of, configure, parse

README = (ROOT / "README.md").read_text()
FOUND = claims.reports()
TOP = {"README.md", "requirements.txt", "LICENSE", "model.py", "kernels.py", "optim.py", "sft.py",
       "reward.py", "ppo.py", "grpo.py", "dpo.py", "compress.py", "specdec.py", "data", "tests"}
SCRIPTS = [p.name for p in ROOT.glob("*.py")]


def test_two_commands_each_complete_in_itself():
    commands = re.findall(r"^python3 -m venv.*$", README, re.M)
    assert len(commands) == 2 and all("pip install -r requirements.txt" in c for c in commands)
    assert commands[0].endswith("python ppo.py") and "pytest" in commands[1]


def test_every_script_has_its_row_and_every_row_its_script():
    rows = re.findall(r"^\| `(\w+\.py)` ", README, re.M)
    assert sorted(rows) == sorted(SCRIPTS)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((data/[^)]+)\)", README))))
def test_pictures_are_there(path):
    assert (ROOT / path).stat().st_size > 1000


@pytest.mark.parametrize("path", sorted(ROOT.glob("data/results/*.json")), ids=lambda p: p.stem)
def test_the_readme_states_each_claim_s_verdict(path):
    report = json.loads(path.read_text())
    assert report["verdict"] in README and f"--claim {report['claim']}" in README
    assert report["seeds"] >= 5 and path.with_suffix(".png").exists()


def test_no_placeholder_is_left():
    assert not re.search(r"\b(TODO|MINUTES|TABLE|UNEVEN)\b|[A-Z]+TABLE", README)


def test_the_top_level_is_fixed():
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    listed = git.stdout.split()
    names = {p.split("/")[0] for p in listed} or {p.name for p in ROOT.iterdir()} - {"out"}
    assert {n for n in names if not n.startswith((".", "__"))} <= TOP


@pytest.mark.parametrize("module, below", [
    ("kernels", {"data"}), ("model", {"kernels", "data"}), ("optim", {"kernels", "data"}),
    ("sft", {"kernels", "data", "model", "optim"}),
    ("ppo", {"kernels", "data", "model", "optim", "sft"}),
    ("reward", {"kernels", "data", "model", "optim", "sft"}),
    ("grpo", {"kernels", "data", "model", "optim", "sft"}),
    ("dpo", {"kernels", "data", "model", "optim", "sft"}),
    ("compress", {"kernels", "data", "model", "optim", "sft"})])
def test_who_may_import_whom(module, below):
    """a file imports only from the floors below its own; a script may ask sft.py for its base
    checkpoint"""
    text = (ROOT / f"{module}.py").read_text()
    ours = set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) & {*[s[:-3] for s in SCRIPTS],
                                                                     "data"}
    assert ours <= below
    if "sft" in below:
        assert set(re.findall(r"\bsft\.(\w+)\(", text)) <= {"base", "find"}


# --- commands -------------------------------------------------------------------------------------

BASH = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S))
INLINE = [" ".join(x.split()) if "$'" not in x else x
          for x in re.findall(r"(?<!`)`(python[^`]*)`", README)]
COMMANDS = sorted({x for x in [*BASH.splitlines(), *INLINE] if re.match(r"python |torchrun ", x)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_script_and_options_presets_and_claims_that_exist(command, workdir):
    for name in ("demos.jsonl", "pairs.jsonl", "gsm8k.jsonl", "text.txt"):       # what a reader has
        (workdir / name).write_text('{"prompt": "a", "completion": "b"}\n')
    words = shlex.split(command, comments=True)
    while not words[0].endswith(".py"):
        words.pop(0)
    name, argv = words[0].removesuffix(".py"), words[1:]
    assert (ROOT / words[0]).exists()
    if name == "model":
        with pytest.raises(UserError, match="does not exist"):  # every option of it was understood
            model.main(argv)
    elif name == "tests/claims":
        kind, *which = argv
        assert (kind, set(which) <= {*FOUND}) == ("--table", True) or which[0] in claims.SCRIPTS
    elif name == "tests/bench":
        assert all(any(word in row for row in bench.ROWS) for word in argv)
    elif not name.startswith("tests/"):
        script = importlib.import_module(name)
        options = dict(parse(argv, {x.name: x.default for x in fields(script.Config)}))
        known = claims_of(name).CLAIMS
        assert options.pop("claim", next(iter(known))) in known
        assert int(options.pop("seeds", 5)) >= 2
        for axis, rows in script.AXES.items():
            if "PATH" in rows and "/" in options.get(axis, ""):
                options[axis] = str(ROOT)                             # a folder that the reader has
        argv = [f"--{k}={v}" for k, v in options.items()]
        configure(script.Config, script.PRESETS, script.AXES, argv=argv, readers=script.readers)


def test_the_commands_are_found():
    """the pattern above sees what a reader sees: code blocks, tables, sentences"""
    assert len(COMMANDS) > 60 and len([c for c in COMMANDS if "--claim" in c]) >= len(FOUND)
    run = {s for s in SCRIPTS if f"| `{s}` " in README} - {"kernels.py", "optim.py"}
    assert {c.split()[1] for c in COMMANDS if c.startswith("python ")} >= run


@pytest.mark.parametrize("name", claims.SCRIPTS)
def test_claims_without_a_result_are_said_to_be_without_one(name):
    if not (ROOT / f"{name}.py").exists() or f"| `{name}.py` " not in README:
        pytest.skip(f"{name}.py is not in the README")
    told = re.search(r"^Defined, and not measured yet: (.*)$", README, re.M)
    told = set(re.findall(rf"python {name}\.py --claim (\w+)", told[1] if told else ""))
    assert told == {*claims_of(name).CLAIMS} - {*FOUND}


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?:)([^)]+)\)", README))))
def test_links_lead_somewhere(path):
    heads = re.findall(r"^#+ (.*)$", README, re.M)
    slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads}
    assert path[1:] in slugs if path.startswith("#") else (ROOT / path).exists()


def test_what_is_folded_is_closed():
    assert README.count("<details>") == README.count("</details>") == README.count("<summary>")
    for fold in re.findall(r"</summary>(..)", README, re.S):
        assert fold == "\n\n"  # without an empty line GitHub shows raw Markdown


# --- numbers --------------------------------------------------------------------------------------


def test_the_generated_tables_are_fresh():
    assert claims.fresh(README, FOUND) == README, "run python tests/claims.py --table"


def test_rewriting_tells_what_changed_and_then_nothing(tmp_path):
    stale = README.replace("| +0.012 ± 0.008 |", "| +0.912 ± 0.008 |")
    path = tmp_path / "README.md"
    path.write_text(stale)
    changed = claims.rewrite(FOUND, path)
    assert any(x.startswith("-") and "+0.912" in x for x in changed) and path.read_text() == README
    assert claims.rewrite(FOUND, path) == []


def test_a_missing_or_misplaced_marker_is_named():
    with pytest.raises(UserError, match="contrasts dpo: end"):
        claims.fresh(README.replace("<!-- contrasts dpo: end -->", ""), FOUND)
    with pytest.raises(UserError, match="swap them"):
        claims.fresh(README.replace("claims: begin", "@").replace("claims: end", "claims: begin")
                     .replace("@", "claims: end"), FOUND)


@pytest.mark.parametrize("name", [n for n in claims.HEADLINES if claims.HEADLINES[n][0]])
def test_a_headline_is_the_difference_that_its_test_judged(name):
    """method - baseline, from the seeds, is the JSON's difference, up to the sign and a stated
    margin"""
    label, ours, base, *_ = claims.HEADLINES[name]
    mean, half = claims.difference(FOUND[name], ours, base)
    test = next(t for t in FOUND[name]["tests"] if t["test"] == label)
    if name in ("eco", "lion", "rewards", "stale"):  # within 1 %, within the box, 80 %, within 0.03
        assert 0 < abs(test["difference"] - mean) < 0.13
    else:
        assert abs(test["difference"]) == pytest.approx(abs(mean), abs=1e-9)
        assert test["interval"] == pytest.approx(half, abs=1e-9)


def test_a_claim_without_a_headline_shows_its_first_test(monkeypatch):
    monkeypatch.setattr(claims, "HEADLINES", {})
    line = claims.row("slim", FOUND["slim"])
    assert "| two stages: 0.081 | one stage: 0.069 | +0.012 ± 0.014 |" in line and "loss increase ↓" in line
    line = claims.row("lengths", FOUND["lengths"])  # "dler: as accurate" allows 0.02: no two arms
    assert "| - | - | +0.041 ± 0.011 |" in line


def test_a_headline_that_the_json_does_not_have_is_an_error(monkeypatch):
    monkeypatch.setitem(claims.HEADLINES, "slim",
                        ("stages: two stages < one stage", "three stages", *"abcd"))
    with pytest.raises(UserError, match="slim has no 'three stages'"):
        claims.row("slim", FOUND["slim"])


@pytest.mark.parametrize("half, digits",
                         [(31.4, 1), (2.13, 2), (0.85, 3), (0.011, 3), (0.0045, 4), (0.0, 3)])
def test_a_narrow_interval_shows_more_decimals(half, digits):
    assert claims.digits(half) == digits


# slim's cut_loss less the original's 1.53 nats, which the JSON does not have
AFTER_THE_CUT = ("1.32 ± 0.06", "2.43 ± 0.20", "1.70 ± 0.18", "4.05 ± 0.03", "4.05 ± 0.04")


def measured(report):
    """(mean, interval) of all that a claim's JSON holds: tests, arms, any two arms' difference,
    sweeps."""
    out = [(t["difference"], t["interval"]) for t in report["tests"]]
    for metric in next(iter(report["arms"].values())):
        arms = [ms[metric] for ms in report["arms"].values()]
        out += [(m["mean"], m["interval"]) for m in arms]
        out += [claims.interval([x - y for x, y in zip(a["values"], b["values"])])
                for a, b in combinations(arms, 2)]
    lines = [line for arms in report.get("sweep", {}).values() for line in arms.values()]
    return out + [(mean, half) for line in lines for _, mean, half in line]


@pytest.mark.parametrize("script", [s for s in claims.SCRIPTS if claims.of_script(s, FOUND)])
def test_every_interval_that_is_written_by_hand_was_measured(script):
    """each "mean ± interval" of a script's details is in a JSON of its claims, to the digits
    shown"""
    text = re.search(rf"<summary><b>{script}\.py</b>.*?<!-- contrasts {script}: begin", README,
                     re.S)[0]
    text = re.sub(r"\n(?!\|)", " ", text)
    known = [p for r in claims.of_script(script, FOUND).values() for p in measured(r)]
    number = r"(\d+(?:\.\d+)?)( ?%)?"
    written = list(re.finditer(rf"{number} ± {number}", text))
    assert len(written) > 10
    for m in written:
        mean, half, scale = m[1], m[3], 100 if m[2] or m[4] else 1
        places = [len(x.partition(".")[2]) for x in (mean, half)]
        assert m[0] in AFTER_THE_CUT or any(
            f"{abs(p * scale):.{places[0]}f}" == mean and f"{q * scale:.{places[1]}f}" == half
            for p, q in known), f"{m[0]}, after: …{text[max(0, m.start() - 80):m.start()]}"


def test_claims_py_shows_what_was_measured(capsys, monkeypatch, tmp_path):
    claims.main([])
    assert "python grpo.py --claim lengths --seeds 5" in capsys.readouterr().out
    claims.main(["--table", "lengths"])
    assert FOUND["lengths"]["verdict"] in capsys.readouterr().out
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert claims.figure("ppo", FOUND).stat().st_size > 10_000
    with pytest.raises(SystemExit, match="choose from"):
        claims.figure("nothing", FOUND)
