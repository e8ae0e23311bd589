"""The claims of dpo.py: arms as --config strings, contrasts, what was published; and their
headlines."""
from claims import Claim, in_parts


def above(label, ours, theirs, on="", by=0.0, sign=1):
    """{label: contrast}: ours + by > theirs on a metric ("": the claim's); sign -1: ours < theirs -
    by."""
    return {label: {f"{ours}|{on}": sign, f"{theirs}|{on}": -sign} | ({"": by} if by else {})}


def each(*contrasts):
    """Several tests as one dictionary."""
    return {k: v for contrast in contrasts for k, v in contrast.items()}


def noise_arms():
    """DPO and its robust kin at 20 and 40 % flips, told the rate; and DPO with the β that each
    amounts to."""
    arms = {"dpo 0": "dpo"}
    for e, robust, smooth in ((20, "beta=0.06", "beta=0.17"), (40, "beta=0.02", "beta=0.5")):
        arms |= {f"{x} {e}": f"{x},flips{e}" for x in ("dpo", "cdpo", "rdpo", "ipo")}
        arms |= {f"dpo, {word} {e}": f"dpo,{beta},flips{e}"
                 for word, beta in (("b(1-2e)", robust), ("b/(1-2e)", smooth))}
    return arms


GAMES = dict(online="online", sppo="SPPO", inpo="INPO", dno="DNO", nash_md="Nash-MD",
             nash_mp="Nash-MP")

CLAIMS = dict(
    noise=Claim(
        "Under flipped labels rDPO and cDPO, told the rate, and IPO beat DPO, and DPO with "
        "another beta",
        "2403.00409: rDPO over DPO and cDPO at 20 and 40 % flips; 2310.12036", noise_arms(),
        "val_gold", each(*(above(f"{name} at {e} %", f"{x} {e}", f"dpo {e}") for e in (20, 40)
               for name, x in (("rDPO", "rdpo"), ("cDPO", "cdpo"), ("IPO", "ipo"))),
             *(above(f"rDPO over the conservative one at {e} %", f"rdpo {e}", f"cdpo {e}")
               for e in (20, 40)),
             *(above(f"beyond beta: {word} at {e} %", f"{x} {e}", f"dpo, {b} {e}") for e in (20, 40)
               for word, x, b in (("robust", "rdpo", "b(1-2e)"),
                                  ("conservative", "cdpo", "b/(1-2e)")))),
        also=("val_win", "val_kl", "val_accuracy"),
        conclude=in_parts("rDPO", "cDPO", "IPO", "beyond beta"),
        smallest={"val_gold": 0.05},
        why="2 % of what DPO reaches without flips, 2.4"),
    length=Claim(
        "Where annotators like length, LD-DPO and SimPO give shorter and better responses than DPO",
        "2409.06411, 2405.14734: shorter at a higher win rate",
        {x: f"{x},length_bias=0.15" for x in ("dpo", "ld_dpo", "dpo_norm")}
        | {"ld_dpo, no EOS": "ld_dpo,no_eos,length_bias=0.15", "dpo, no bias": "dpo",
           "simpo": "simpo,length_bias=0.15,kl=true"}, "val_gold",
        each(*(above(f"{part}: better", x, "dpo")
               | above(f"{part}: shorter", x, "dpo", "val_length", sign=-1)
               for part, x in (("LD-DPO", "ld_dpo"), ("without EOS", "ld_dpo, no EOS"),
                               ("SimPO", "simpo"), ("per token", "dpo_norm")))),
        also=("val_length", "val_win", "val_kl"),
        conclude=in_parts("LD-DPO", "without EOS", "SimPO", "per token"),
        smallest={"val_gold": 0.05, "val_length": 1},
        why="gold: 2 % of what DPO reaches; length: one token of ten"),
    margins=Claim(
        "Weights by margin (MADPO) and a batch's own beta (β-DPO) beat DPO, more so under noise",
        "2510.05342: MADPO over DPO and β-DPO; 2407.08639: β-DPO over DPO",
        {f"{x}{tag}": f"{names}{noise}" for tag, noise in (("", ""), (" 20", ",flips20"))
         for x, names in (
            ("dpo", "dpo"), ("madpo", "madpo"), ("madpo, to 4", "madpo,strongest=4.0"),
            ("madpo, shuffled", "madpo,strongest=4.0,shuffled=true"), ("beta_dpo", "beta_dpo"))},
        "val_gold",
        each(*(above(f"{part}: {x}{tag} > dpo", f"{x}{tag}", f"dpo{tag}") for tag in ("", " 20")
               for part, x in (("MADPO", "madpo"), ("MADPO", "madpo, to 4"), ("beta", "beta_dpo"))),
             *(above(f"its margins{tag or ' 0'}", f"madpo, to 4{tag}", f"madpo, shuffled{tag}")
               for tag in ("", " 20"))),
        also=("val_win", "val_kl", "val_accuracy"),
        conclude=in_parts("MADPO", "beta", "its margins"),
        smallest={"val_gold": 0.05},
        why="2 % of what DPO reaches, 2.4"),
    overopt=Claim(
        "On few pairs DPO over-optimises: gold falls from its peak; RPO, HyPO and Flex-DPO end "
        "higher",
        "2405.16436, 2406.01462, 2406.07327: an SFT term, an online KL, less weight on the "
        "rejected side",
        {"dpo": "dpo,few", "rpo": "rpo,few", "dpo + 0.1 sft": "dpo,few,sft=0.1", "flex": "flex,few",
         "hypo": "hypo,few", "dpo, beta 1": "dpo,few,beta=1.0"}, "val_gold",
        {"over-optimisation: DPO falls by more than 0.1": {"dpo|val_peak": 1, "dpo": -1, "": -0.1}}
        | each(*(above(f"{part}: {x} > dpo", x, "dpo") for part, x in (
            ("RPO", "rpo"), ("SFT", "dpo + 0.1 sft"), ("Flex", "flex"), ("HyPO", "hypo"),
            ("a larger beta", "dpo, beta 1")))),
        also=("val_peak", "val_kl", "val_truncated"),
        conclude=in_parts("over-optimisation", "RPO", "SFT", "Flex", "HyPO", "a larger beta"),
        smallest={"val_gold": 0.1, "val_peak": 0.1},
        why="the fall that the claim calls over-optimisation"),
    unlearning=Claim(
        "NPO forgets what it should without losing the rest; gradient ascent collapses",
        "2404.05868: GA diverges linearly, NPO only logarithmically",
        {f"{x}, {o}{tag}": f"{rows},{how}{more},short"
         for o, how in (("SGD", "plain_sgd"), ("Adam", "lr=3e-4"))
         for tag, more in ((" alone", ",retain=0.0"), (" + retain", ""))
         for x, rows in (("ga", "ga"), ("npo", "npo"), ("npo1", "npo,beta=1.0"))},
        "val_retain_nll",
        each(*(above(f"{o}{tag}: {x} keeps more than GA", f"{x}, {o}{tag}", f"ga, {o}{tag}")
               for o in ("SGD", "Adam") for tag in (" alone", " + retain")
               for x in ("npo", "npo1")),
             *({f"forgets: {x}, {o} + retain": {f"{x}, {o} + retain|val_forget_nll": -1,
                                               f"{x}, {o} + retain|start_val_forget_nll": 1,
                                               "": 0.5}}
               for o in ("SGD", "Adam") for x in ("npo", "npo1"))),
        better="lower", also=("val_forget_nll", "val_gold", "val_truncated"),
        conclude=in_parts("SGD alone", "SGD + retain", "Adam alone", "Adam + retain", "forgets"),
        smallest={"val_retain_nll": 0.1, "val_forget_nll": 0.1},
        why="a tenth of a nat: 10 % of the perplexity on what is kept"),
    nash=Claim(
        "With intransitive annotators self-play methods become less exploitable, online DPO does "
        "not",
        "2312.00886, 2505.19731, 2407.00617, 2405.00675, 2404.03715: towards the Nash equilibrium",
        {x: f"{x},judge=duel" for x in GAMES}, "val_exploitability",
        {f"{name} falls": {x: 1, f"{x}|start_val_exploitability": -1} for x, name in GAMES.items()
         if x != "online"} | {"online DPO does not": {"online": -1,
                                                      "online|start_val_exploitability": 1}}
        | each(*(above(f"{name} below DPO", x, "online") for x, name in list(GAMES.items())[1:])),
        better="lower", also=("val_gold", "val_kl", "start_val_exploitability"),
        conclude=in_parts(*GAMES.values()),
        smallest={"val_exploitability": 0.01, "start_val_exploitability": 0.01},
        why="a sixth of what self-play takes off the start's 0.33"),
    explore=Claim(
        "Optimism (XPO, SELM) finds better responses than online DPO with as many samples",
        "2405.21046, 2405.19332: higher win rates than online / iterative DPO",
        {"dpo, offline": "dpo", "online": "online", "xpo": "xpo", "xpo, 0.01": "xpo,alpha=0.01",
         "selm": "selm", "selm, 0.01": "selm,alpha=0.01"}, "val_gold",
        each(*(above(f"{part}: {x} > online", x, "online") for part, x in (
            ("XPO", "xpo"), ("XPO", "xpo, 0.01"), ("SELM", "selm"), ("SELM", "selm, 0.01"))),
             above("own samples: online > offline", "online", "dpo, offline")),
        also=("val_win", "val_kl", "val_length"), conclude=in_parts("XPO", "SELM", "own samples"),
        smallest={"val_gold": 0.05},
        why="2 % of what online DPO reaches, 2.4"),
    pareto=Claim(
        "RACO's clipped conflict-averse gradients reach beyond the Pareto front of weighted DPO",
        "2602.02495: better trade-offs than weighted DPO, clipping helps",
        {f"{x} w{a}{b}": f"raco,weights=0.{a},0.{b}{more}" for a, b in ((2, 8), (5, 5), (8, 2))
         for x, more in (("weighted", ",combine=weighted"), ("raco", ""),
                         ("unclipped", ",clipped=false"))},
        "val_gold_A",
        {f"{label} {w}": {f"raco {w}|val_gold_{g}": s for g, s in (("A", a), ("B", b))}
         | {f"{x} {w}|val_gold_{g}": -s for g, s in (("A", a), ("B", b))}
         for w, a, b in (("w28", 0.2, 0.8), ("w55", 0.5, 0.5), ("w82", 0.8, 0.2))
         for label, x in (("over weighted,", "weighted"), ("over unclipped,", "unclipped"))},
        also=("val_gold_B", "val_kl", "val_length"),
        conclude=in_parts("over weighted", "over unclipped"),
        smallest={"val_gold_A": 0.05, "val_gold_B": 0.05},
        why="2 % of what the weighted loss reaches of A, 2.5"))

# claim: (the test that judges the headline, method, baseline, statement, what is measured, as
# published). Method and baseline are arms, "arm|metric" for another metric than the claim's,
# {arm|metric: weight} for a sum, or a number.
HEADLINES = dict(
    noise=("rDPO at 40 %", "rdpo 40", "dpo 40",
           "Under flipped labels rDPO and cDPO, told the rate, and IPO beat DPO, and DPO with "
           "another beta",
           "gold ↑", "rDPO over DPO and cDPO"),
    length=("LD-DPO: shorter", "ld_dpo|val_length", "dpo|val_length",
            "Where annotators like length, LD-DPO and SimPO give shorter and better responses "
            "than DPO",
            "length, tokens ↓", "shorter at a higher win rate"),
    margins=("MADPO: madpo > dpo", "madpo", "dpo",
             "Weights by margin (MADPO) and a batch's own beta (β-DPO) beat DPO, more so under "
             "noise",
             "gold ↑", "MADPO over DPO and β-DPO, β-DPO over DPO"),
    overopt=("RPO: rpo > dpo", "rpo", "dpo",
             "On few pairs DPO over-optimises: gold falls from its peak; RPO, HyPO and Flex-DPO "
             "end higher",
             "gold at the end ↑", "-"),
    unlearning=("SGD alone: npo keeps more than GA", "npo, SGD alone", "ga, SGD alone",
                "NPO forgets what it should without losing the rest; gradient ascent collapses",
                "NLL of the rest ↓", "gradient ascent diverges linearly, NPO logarithmically"),
    nash=("SPPO below DPO", "sppo", "online",
          "With intransitive annotators self-play methods become less exploitable, online DPO "
          "does not",
          "exploitability ↓", "towards the Nash equilibrium"),
    explore=("XPO: xpo > online", "xpo", "online",
             "Optimism (XPO, SELM) finds better responses than online DPO with as many samples",
             "gold ↑", "higher win rates than online DPO"),
    pareto=("over weighted, w55", {"raco w55|val_gold_A": 0.5, "raco w55|val_gold_B": 0.5},
            {"weighted w55|val_gold_A": 0.5, "weighted w55|val_gold_B": 0.5},
            "RACO's clipped conflict-averse gradients reach beyond the Pareto front of weighted "
            "DPO",
            "gold, half A, half B ↑", "better trade-offs than weighted DPO, clipping helps"),
)
