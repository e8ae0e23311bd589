"""What is written is checked: commands, tables, numbers and links of README.md and of the pages in
data/results/; the shape of the tree."""
import importlib
import json
import re
import shlex
import sys
from dataclasses import fields
from functools import cache
from itertools import combinations
from types import SimpleNamespace

import bench
from claims import tables as claims
import pytest
import test_house
from conftest import ROOT

import model
from data.run import UserError, configure, parse

RESULTS = ROOT / "data" / "results"
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(RESULTS.glob("*.md")))}
README, TEXT = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
FOUND = claims.reports()
SCRIPTS = sorted(test_house.FILES)


@cache
def parts():
    """{path: {marker: lines}}: what tests/claims.py generates of each page"""
    return claims.pages(FOUND)


def by_hand(text):
    """A page without what is generated."""
    return re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", text, flags=re.S)


def test_two_commands_each_complete_in_itself():
    commands = re.findall(r"^python3 -m venv.*$", README, re.M)
    assert len(commands) == 2 and all("pip install -r requirements.txt" in c for c in commands)
    assert commands[0].endswith("python grpo.py") and commands[1].endswith("python -m pytest -q")


def test_the_readme_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 300


def test_every_script_has_its_row_and_every_row_its_script():
    rows = re.findall(r"^\| `(\w+\.py)` ", README, re.M)
    assert sorted(rows) == sorted(SCRIPTS)


@pytest.mark.parametrize("name", [*claims.SCRIPTS, "speed", "README"])
def test_every_script_has_a_page_and_the_readme_leads_to_it(name):
    assert RESULTS / f"{name}.md" in PAGES and f"](data/results/{name}.md)" in README


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_its_script_s_page_states_each_claim_s_verdict(path):
    report = json.loads(path.read_text())
    page = PAGES[RESULTS / f"{claims.script_of(report)}.md"]
    assert report["verdict"] in page and f"--claim {report['claim']}" in page
    assert report["seeds"] >= 5 and path.with_suffix(".png").exists()


def test_no_placeholder_is_left():
    assert not re.search(r"\b(TODO|MINUTES|TABLE|UNEVEN)\b|[A-Z]+TABLE", TEXT)


# --- commands -------------------------------------------------------------------------------------

BASH = "\n".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S))
INLINE = [" ".join(x.split()) if "$'" not in x else x
          for x in re.findall(r"(?<!`)`(python[^`]*)`", TEXT)]
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
        assert all(any(w in row for row in {**bench.ROWS, **bench.COMPRESSED}) for w in argv)
    elif not name.startswith("tests/"):
        script = importlib.import_module(name)
        options = dict(parse(argv, {x.name: x.default for x in fields(script.Config)}))
        options.pop("eject", None)
        known = claims.claims_of(name)
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
def test_claims_of_one_home_mean_one_run_by_one_arm_s_name(name):
    known = {}
    for claim in claims.claims_of(name).values():
        for what, made in (claim.arms | claim.models).items() if claim.home else ():
            assert known.setdefault((claim.home, what), made) == made, what


@pytest.mark.parametrize("name", claims.SCRIPTS)
def test_claims_without_a_result_are_said_to_be_without_one(name):
    line = re.search(r"^Defined, and not measured yet: (.*)$", PAGES[RESULTS / f"{name}.md"], re.M)
    waiting = set(re.findall(rf"python {name}\.py --claim (\w+)", line[1] if line else ""))
    assert waiting == {*claims.claims_of(name)} - {*FOUND}


# --- links ----------------------------------------------------------------------------------------

LINKS = sorted({(path.relative_to(ROOT).as_posix(), link) for path, text in PAGES.items()
                for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)})


@cache
def anchors(path):
    """What a link into a page may name: its headings, each once, as GitHub spells them."""
    heads = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
             for h in re.findall(r"^#+ (.*)$", path.read_text(), re.M)]
    return {h for h in heads if heads.count(h) == 1}


@pytest.mark.parametrize("page, link", LINKS)
def test_links_lead_somewhere(page, link):
    where, _, anchor = link.partition("#")
    path = (ROOT / page).parent / where if where else ROOT / page
    assert path.exists() and (not anchor or anchor in anchors(path))
    assert path.suffix != ".png" or path.stat().st_size > 1000


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_generated_tables_are_fresh(path):
    text = PAGES[path]
    new = claims.fresh(text, parts().get(path, {}), path.name)
    assert new == text, "run python tests/claims.py --table"


def test_rewriting_tells_what_changed_and_then_nothing(tmp_path):
    page = RESULTS / "ppo.md"
    path = tmp_path / "ppo.md"
    path.write_text(PAGES[page].replace("| +0.012 ± 0.008 |", "| +0.912 ± 0.008 |"))
    changed = claims.rewrite(path, parts()[page])
    assert any(x.startswith("-") and "+0.912" in x for x in changed)
    assert path.read_text() == PAGES[page] and claims.rewrite(path, parts()[page]) == []


def test_a_missing_or_misplaced_marker_is_named():
    page = RESULTS / "dpo.md"
    text, lines = PAGES[page], parts()[page]
    with pytest.raises(UserError, match="dpo.md must hold .*contrasts: end"):
        claims.fresh(text.replace("<!-- contrasts: end -->", ""), lines, page.name)
    with pytest.raises(UserError, match="swap them"):
        claims.fresh(text.replace("claims: begin", "@").replace("claims: end", "claims: begin")
                     .replace("@", "claims: end"), lines, page.name)


@pytest.mark.parametrize("name", [n for n in claims.HEADLINES
                                  if claims.HEADLINES[n][0] and n in FOUND])
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
    assert "| two stages: 0.081 | one stage: 0.069 | +0.012 ± 0.014 |" in line
    assert "loss increase ↓" in line
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
    """(mean, interval) of all of a claim's JSON: tests, arms, two arms' differences, sweeps."""
    out = [(t["difference"], t["interval"]) for t in report["tests"]]
    for metric in next(iter(report["arms"].values())):
        arms = [ms[metric] for ms in report["arms"].values()]
        out += [(m["mean"], m["interval"]) for m in arms]
        out += [claims.interval([x - y for x, y in zip(a["values"], b["values"])])
                for a, b in combinations(arms, 2)]
    lines = [line for arms in report.get("sweep", {}).values() for line in arms.values()]
    return out + [(mean, half) for line in lines for _, mean, half in line]


@pytest.mark.parametrize("script", claims.SCRIPTS)
def test_every_interval_that_is_written_by_hand_was_measured(script):
    """each "mean ± interval" of a script's page is in a JSON of its claims, to the digits shown"""
    text = re.sub(r"\n(?!\|)", " ", by_hand(PAGES[RESULTS / f"{script}.md"]))
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


@pytest.mark.parametrize("name", ["README.md", "data/results/README.md", "data/results/speed.md"])
def test_other_pages_leave_intervals_to_the_tables(name):
    assert " ± " not in by_hand(PAGES[ROOT / name]).replace("baseline ± 95 %", "")


# --- the index of methods -------------------------------------------------------------------------

CHAPTERS = """
# === hapo: 2505.11225, beat the shortest correct response yet ==================================
# === kd, kdrl: 2506.02208, 2602.12125, a teacher, beside the reward or alone
# === linear: control, every response pays
#=== no heading: 2501.00001, nothing
PRESETS["hapo"] = dict(shaper="history")      # 2505.11225 section 4
"""


def test_the_index_is_read_from_the_headings_of_chapters():
    assert claims.HEADING.pattern == test_house.HEADING.pattern
    assert claims.chapters(CHAPTERS) == [
        ("hapo", ["2505.11225"], "beat the shortest correct response yet"),
        ("kd, kdrl", ["2506.02208", "2602.12125"], "a teacher, beside the reward or alone"),
        ("linear", [], "control, every response pays")]
    names = [row[0] for row in claims.methods("grpo", CHAPTERS, {"linear"})]
    assert names == ["grpo", "hapo", "kd, kdrl", "linear"]
    assert len(claims.methods("grpo", CHAPTERS, {"other"})) == 3         # linear has no paper


def test_a_method_s_verdicts_are_those_of_the_claims_that_it_is_an_arm_of():
    undecided = "[lengths: hapo: undecided](grpo.md#claim-lengths)"
    assert claims.verdicts(["hapo"], "grpo", FOUND) == undecided
    assert claims.verdicts(["dr_grpo"], "grpo", FOUND) == "-"
    assert claims.short_verdict("rdpo", FOUND["noise"]["verdict"]) == "rDPO: holds"
    assert claims.short_verdict("dpo", FOUND["noise"]["verdict"]) == FOUND["noise"]["verdict"]


def test_the_index_has_every_script_and_no_method_twice():
    rows = re.findall(r"^\| ([^|]+) \|.*\[(\w+)\.py\]", PAGES[RESULTS / "README.md"], re.M)
    names = [(name, script) for words, script in rows for name in re.findall(r"`(\w+)`", words)]
    assert len(set(names)) == len(names) > 200
    assert {script for _, script in names} == {*claims.SCRIPTS, "optim"}


def test_every_preset_of_a_method_is_in_the_index():
    page = PAGES[RESULTS / "README.md"]
    for script in ("grpo", "dpo", "compress", "specdec"):
        text = (ROOT / f"{script}.py").read_text()
        for name in importlib.import_module(script).PRESETS:
            heading = re.search(rf"^# === (?:\w+, )*{name}[,:]", text, re.M)
            assert f"`{name}`" in page or not heading, name


def test_claims_are_looked_for_in_tests_claims_first(monkeypatch):
    assert "lengths" in claims.claims_of("grpo")
    monkeypatch.setitem(sys.modules, "claims.grpo", SimpleNamespace(CLAIMS={"other": 1}))
    assert claims.claims_of("grpo") == {"other": 1}


def test_claims_py_shows_what_was_measured(capsys, monkeypatch, tmp_path):
    claims.main([])
    assert "python grpo.py --claim lengths --seeds 5" in capsys.readouterr().out
    claims.main(["--table", "lengths"])
    assert FOUND["lengths"]["verdict"] in capsys.readouterr().out
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert claims.figure("ppo", FOUND).stat().st_size > 10_000
    with pytest.raises(SystemExit, match="choose from"):
        claims.figure("nothing", FOUND)
