"""The tables of mutants: each can be made, and what reads them tells what is wrong; all of them
run with -m slow."""
import pytest
from conftest import ROOT

import mutants


def test_every_mutant_can_be_made():
    """its text stands in its file once"""
    texts = {m.file: (ROOT / m.file).read_text() for m in mutants.tables()}
    for m in mutants.tables():
        assert m.applied(texts[m.file]) != texts[m.file], m


@pytest.mark.parametrize("text, words", [
    ("x = 1\nx = 1\n", "2 places have"), ("y = 1\n", "0 places have")])
def test_a_change_that_is_not_one_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        mutants.Mutant("f.py", "two", "x = 1", "x = 2", ("test_f.py",)).applied(text)


def test_a_table_of_two(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "TABLES", tmp_path)
    (tmp_path / "f.py.txt").write_text(
        "> test_f.py -k a and b\n# first\n- x = 1\n-     y\n+ x = 2\n\n"
        "# second\n# of two lines\n- z\n+ w\n= nobody reads z\n")
    one, two = mutants.tables(["f.py"])
    assert one == mutants.Mutant("f.py", "first", "x = 1\n    y", "x = 2",
                                 ("test_f.py", "-k", "a and b"))
    assert two.what == "second of two lines" and two.argued == "nobody reads z"
    (tmp_path / "f.py.txt").write_text("nonsense\n")
    with pytest.raises(ValueError, match="begins with none"):
        mutants.tables()


@pytest.mark.slow
def test_no_mutant_survives():
    assert mutants.main(["--jobs", "2"]) == 0
