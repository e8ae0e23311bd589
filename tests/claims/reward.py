"""The claims of reward.py: arms as --config strings, contrasts, what was published; and their
headlines."""
from claims import Claim, gated, in_parts, versus


NOISY, ENSEMBLES = ", 25% noise", ("mean", "wco", "uwo")
GRADED = dict(on="accuracy_graded", tag="RL: ")
CLAIMS = dict(
    routing=Claim(
        "Sending uncertain pairs to the judge beats sending as many at random",
        "2510.20369: 89.2 against 87.5 with 9 % of the calls, 91.6 against 89.1 with 42 % "
        "(second-hand)",
        dict.fromkeys(("uncertainty", "margin", "both", "random", "shuffled", "oracle"),
                      "router,big_router"),
        "area", {f"over random, {q:.0%}": {f"uncertainty|accuracy@{q}": 1,
                                           f"random|accuracy@{q}": -1}
                 for q in (0.1, 0.25, 0.4)} | versus("uncertainty", "margin", tag="over margin: ")
        | versus("shuffled", "random", tag="control: ") | {
            "gate: id accuracy > 0.8": {"uncertainty|id_accuracy": 1, "": -0.8},
            "gate: u(ood) > u(id)": {"uncertainty|u_shift": 1}},
        also=("id_accuracy", "ood_accuracy", "u_auroc", "margin_auroc"),
        conclude=gated("uninformative model", "over random", "over margin"),
        sweep=("share of pairs that the judge answers", ("accuracy",)),
        smallest={"area": 0.017, "accuracy@0.1": 0.017, "accuracy@0.25": 0.017,
                  "accuracy@0.4": 0.017, "id_accuracy": 0.017, "u_shift": 0.1},
        why="published: 89.2 for 87.5 with 9 % of the calls; uncertainty: a tenth of its spread"),
    rubrics=Claim(
        "Rubric-RM beats the direct judge of its size; contrast and consistency filtering help it",
        "2510.07743: 70.1 for Rubric-RM-8B, 61.7 for the best judge of its size, over ten "
        "benchmarks",
        dict(rubric="rubrics", oracle="rubrics", direct="rubrics,judge=direct",
             bt="rubrics,bt_rubrics") | {
            "no contrast": "rubrics,contrast=false", "no filter": "rubrics,consistent=false",
            "neither": "rubrics,contrast=false,consistent=false"}, "accuracy",
        versus("rubric", "direct", "bt", tag="judges: ")
        | versus("rubric", "no contrast", tag="contrast: ")
        | versus("no filter", "neither", tag="contrast alone: ")
        | versus("rubric", "no filter", tag="consistency: ")
        | versus("rubric", "no filter", on="verbose", tag="consistency, verbose pairs: ") | {
            "votes: five > one": {"rubric|accuracy_vote": 1, "rubric": -1},
            "gate: oracle > 0.9 on id": {"oracle|id": 1, "": -0.9},
            "gate: direct > 0.6 on id": {"direct|id": 1, "": -0.6}},
        also=("id", "k3", "verbose"),
        conclude=gated("weak judges", "judges", "no contrast", "contrast alone", "consistency",
                       "votes"),
        smallest={"accuracy": 0.02, "verbose": 0.02, "accuracy_vote": 0.02, "id": 0.02},
        why="two points of accuracy: a quarter of the published 8.4"),
    thinkrm=Claim(
        "A judge that reasons at length beats Bradley-Terry and short reasoning, on the hardest "
        "pairs too",
        "2505.16265: 75.1 on RM-Bench against 68.3 (BT) and 68.1 (short, 16 votes) (second-hand)",
        {x + y: "thinkrm" + ",style=short" * (x == "short") for y in ("", "+RL")
         for x in ("long", "short")}
        | {x: f"thinkrm,{x}_style" for x in ("filler", "direct", "bt")}, "hard",
        versus("long", "bt", "direct", "filler", "short", tag="hard: ") | {
            "votes: long > short, 16 votes": {"long|hard": 1, "short|hard_vote": -1},
            "in domain: long > short, majority of 16": {"long|id": 1, "short|id_vote": -1}}
        | versus("long", "bt", "filler", on="id", tag="in domain: ")
        | versus("long+RL", "long", **GRADED) | versus("short+RL", "short", **GRADED)
        | {f"RL: {x} at most 2 % longer": {f"{x}|accuracy_length": 1.02,
                                           f"{x}+RL|accuracy_length": -1}
           for x in ("long", "short")},
        also=("id",), conclude=in_parts("hard", "votes", "in domain", "RL"),
        smallest={"hard": 0.03, "hard_vote": 0.03, "id": 0.03, "id_vote": 0.03,
                  "accuracy_graded": 0.03, "accuracy_length": 0.5},
        why="accuracy: half of the published 6.8 points; length: half a token"),
    advrm=Claim(
        "Adv-RM's retrained reward model resists: RLHF on it runs longer before gold falls",
        "2504.06141: RLHF without hacking 2-3 times longer; strict attacks 93-100 %, "
        "over-optimisation 1-3 %",
        dict.fromkeys(("plain", "mean", "lcb", "more_random", "more_gold", "adv"), "advrm"),
        "collapse", versus("adv", "plain", "more_random", tag="steps: ")
        | versus("adv", "plain", "more_random", on="gold@4", tag="gold at 4 nats: ") | {
            "attack: stronger than over-optimising": {"adv|strict_0": 1, "adv|strict_overopt": -1},
            "later: fewer succeed": {"adv|strict_0": 1, "adv|strict_last": -1},
            "clean accuracy kept to 0.02": {"adv|adv_accuracy": 1, "adv|plain_accuracy": -1,
                                            "": 0.02},
            "gate: 80 % of the pairs confirmed": {"adv|confirmed_0": 1, "": -0.8}},
        also=("gold@1", "gold@4", "peak", "final", "strict_0", "strict_last", "pairs_0",
              "confirmed_0"),
        conclude=in_parts("steps", "nats", "attack", "later", "clean", "gate"),
        sweep=("KL to the SFT model, nats", ("gold",)),
        smallest={"collapse": 7, "gold@4": 0.1, "strict_0": 0.1, "strict_overopt": 0.1,
                  "strict_last": 0.1, "adv_accuracy": 0.02, "plain_accuracy": 0.02,
                  "confirmed_0": 0.1},
        why="steps: half again the plain model's 15, where two to three times is published; "
            "gold, attacks: a tenth of their range; accuracy: the loss that the claim allows"),
    ensembles=Claim(
        "Ensembles of reward models mitigate over-optimisation, with and without label noise",
        "2310.02743: WCO and UWO remove it under best-of-n, mean with clean labels; under PPO they "
        "reduce it",
        {x + tail: "overopt" + ",noise=0.25" * bool(tail) for tail in ("", NOISY)
         for x in ("single", *ENSEMBLES)},
        "best-of-n gold@256",
        {f"{how}: {x}{tail} > single": {f"{x}{tail}|{on}": 1, f"single{tail}|{on}": -1}
         for how, on in (("best-of-n", "best-of-n gold@256"), ("RL", "RL gold@4"))
         for tail in ("", NOISY) for x in ENSEMBLES},
        also=("RL gold@4", "RL peak", "RL final", "RL kl_end", "clean_accuracy"),
        conclude=in_parts(*(f"{how}: {x}" for how in ("best-of-n", "RL") for x in ENSEMBLES)),
        sweep=("n", ("best-of-n gold",)),
        smallest={"best-of-n gold@256": 0.1, "RL gold@4": 0.1},
        why="a tenth of the range of gold between the arms"))

# claim: (the test that judges the headline, method, baseline, statement, what is measured, as
# published). Method and baseline are arms, "arm|metric" for another metric than the claim's,
# {arm|metric: weight} for a sum, or a number.
HEADLINES = dict(
    routing=("", "uncertainty", "random",
             "Sending uncertain pairs to the judge beats sending as many at random",
             "accuracy, area over the share asked ↑",
             "89.2 against 87.5 with 9 % of the calls (second-hand)"),
    ensembles=("best-of-n: uwo > single", "uwo", "single",
               "Ensembles of reward models mitigate over-optimisation, with and without label "
               "noise",
               "gold, best of 256 ↑", "WCO, UWO: removed under best-of-n, reduced under PPO"),
    advrm=("steps: adv > plain", "adv", "plain",
           "Adv-RM: reward models retrained on what an adversarial policy finds let RLHF run "
           "longer before gold falls", "steps until gold falls ↑", "2 to 3 times (second-hand)"),
    thinkrm=("hard: long > bt", "long", "bt",
             "A judge that reasons at length beats Bradley-Terry and short reasoning, on the "
             "hardest pairs too",
             "accuracy, hard pairs ↑",
             "RM-Bench 75.1 against 68.3; short, 16 votes: 68.1 (second-hand)"),
    rubrics=("judges: rubric > direct", "rubric", "direct",
             "Rubric-RM beats the direct judge of its size; contrast and consistency filtering "
             "help it",
             "accuracy ↑", "70.1 against 61.7"),
)
