"""What is written is checked: the README's commands, tables, pictures and verdicts; the shape of the tree."""
import json
import re
import subprocess

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_files_stay_within_their_budget(name):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= 1200 and max(map(len, lines)) <= 110


def test_the_top_level_is_fixed():
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    listed = git.stdout.split()
    names = {p.split("/")[0] for p in listed} or {p.name for p in ROOT.iterdir()} - {"out"}
    assert {n for n in names if not n.startswith((".", "__"))} <= TOP


@pytest.mark.parametrize("module, below", [
    ("kernels", {"data"}), ("model", {"kernels", "data"}), ("optim", {"kernels", "data"}),
    ("sft", {"kernels", "data", "model", "optim"}), ("ppo", {"kernels", "data", "model", "optim", "sft"}),
    ("reward", {"kernels", "data", "model", "optim", "sft"}),
    ("grpo", {"kernels", "data", "model", "optim", "sft"}), ("dpo", {"kernels", "data", "model", "optim", "sft"}),
    ("compress", {"kernels", "data", "model", "optim", "sft"})])
def test_who_may_import_whom(module, below):
    """a file imports only from the floors below its own; a script may ask sft.py for its base checkpoint"""
    text = (ROOT / f"{module}.py").read_text()
    ours = set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) & {*[s[:-3] for s in SCRIPTS], "data"}
    assert ours <= below
    if "sft" in below:
        assert set(re.findall(r"\bsft\.(\w+)\(", text)) <= {"base", "find"}


def test_claims_py_shows_what_was_measured(capsys, monkeypatch, tmp_path):
    import claims
    claims.main([])
    assert "python grpo.py --claim lengths --seeds 5" in capsys.readouterr().out
    found = claims.reports()
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert claims.figure("ppo", found).stat().st_size > 10_000
    with pytest.raises(SystemExit, match="choose from"):
        claims.figure("nothing", found)
