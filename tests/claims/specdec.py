"""The claims of specdec.py: arms as --config strings, contrasts, what was published; and their
headlines."""
from claims import Claim, in_parts

CELLS = {f"{name} {size}": f"{preset}draft=base:draft{size}"
         for name, preset in (("text", ""), ("docstrings", "docs,")) for size in (64, 32)}
DRAFTS = {"KD": "arena", "AdaSPEC": "adaspec,arena",
          "KD, 2.5x": "arena,batch=20", "AdaSPEC, 2.5x": "adaspec,arena,batch=20"}
CONTROLS = {"random, 2.5x": "adaspec,arena,batch=20,at_random",
            "smallest, 2.5x": "adaspec,arena,batch=20,smallest"}
ALSO = ("draft_acceptance", "draft_efficiency", "draft_independent", "draft_speedup",
        "draft_predicted")


def over(part, cells, ours, theirs):        # tests: ours above theirs in each cell
    return {f"{part}: {cell}": {f"{cell}, {ours}": 1, f"{cell}, {theirs}": -1} for cell in cells}


CLAIMS = dict(
    adaspec=Claim(
        "A draft distilled on the tokens with most left to learn is accepted more often than one "
        "distilled on all, at the paper's budgets and at equal data",
        "2510.19779: acceptance of DistillSpec -> AdaSPEC: GSM8K 57.6 -> 62.6, CNN/DailyMail 73.1 "
        "-> 74.2, "
        "XSum 47.2 -> 49.1 % (Pythia, 3 epochs); the code gives AdaSPEC 2.5 times the data",
        {f"{cell}, {arm}": f"{presets},{config}" for cell, config in CELLS.items()
         for arm, presets in (
            DRAFTS | (CONTROLS if cell == "docstrings 64" else {})).items()},
        "overlap",
        over("paper's budgets", CELLS, "AdaSPEC, 2.5x", "KD")
        | over("equal data", CELLS, "AdaSPEC, 2.5x", "KD, 2.5x")
        | over("same batch", CELLS, "AdaSPEC", "KD")
        | over("selection", ["docstrings 64"], "AdaSPEC, 2.5x", "random, 2.5x")
        | over("order", ["docstrings 64"], "AdaSPEC, 2.5x", "smallest, 2.5x"),
        also=ALSO, conclude=in_parts("paper's budgets", "equal data", "same batch", "selection",
                                     "order"),
        smallest={"overlap": 0.011},
        why="the least published gain: acceptance 73.1 to 74.2 %"),
)

# claim: (the test that judges the headline, method, baseline, statement, what is measured, as
# published). Method and baseline are arms, "arm|metric" for another metric than the claim's,
# {arm|metric: weight} for a sum, or a number.
HEADLINES = dict(
    adaspec=("paper's budgets: docstrings 64", "docstrings 64, AdaSPEC, 2.5x", "docstrings 64, KD",
             "A draft distilled on the tokens with most left to learn is accepted more often than "
             "one distilled on all, at the paper's budgets (2.5 times the data) and at equal data",
             "chance that a sample is kept ↑",
             "Pythia on GSM8K 57.6 -> 62.6 %, CNN/DailyMail 73.1 -> 74.2 %"),
)
