"""The claims of ppo.py: arms as --config strings, contrasts, what was published; and their
headlines."""
from claims import Claim


def srppo_arms():
    """Every arm of the claim at both sizes of the demonstration set, 512 and 64."""
    arms = dict(srppo="srppo", srppo_greedy="srppo,eval_temperature=0", sft="sft",
                sft_more="sft,init=base:toyif+steps=304", greedy="greedy", half="half",
                likelihood="likelihood", bon16="bon", raft="raft",
                contrast05="contrast,alpha=0.5", contrast1="contrast", contrast2="contrast,alpha=2")
    out = {f"{name} 512": f"toyif,{row}" for name, row in arms.items()}
    for name, row in arms.items():
        few = "init=base:toyif+rows=64" + "+steps=248" * (name == "sft_more")
        out[f"{name} 64"] = f"toyif,{'sft' if name == 'sft_more' else row},{few}"
    return out


CONTROLS = ("greedy", "half", "likelihood", "contrast05", "contrast1", "contrast2")


def srppo_tests():
    """srppo (sampled) against every other arm at both sizes, greedy against greedy, and whether its
    gain over SFT is larger with fewer demonstrations."""
    others = [a.rsplit(" ", 1)[0] for a in srppo_arms() if a.endswith(" 64")
              and not a.startswith("srppo")]
    tests = {f"srppo - {x}, {n}": {f"srppo {n}": 1, f"{x} {n}": -1} for n in (512, 64)
             for x in others}
    tests |= {f"greedy: srppo - sft, {n}": {f"srppo_greedy {n}": 1, f"greedy {n}": -1}
              for n in (512, 64)}
    tests["gain at 64 - gain at 512"] = {"srppo 64": 1, "sft 64": -1, "srppo 512": -1, "sft 512": 1}
    return tests


def srppo_conclusion(v):
    """Per size: 'holds' if srppo beats sft, sft_more and every control that merely sharpens the SFT
    model; 'sharpening only' if it beats sft but a control beats it; else 'undecided'. Then the
    scarcity claim.
    """
    def at(n):
        gain, more = v[f"srppo - sft, {n}"], v[f"srppo - sft_more, {n}"]
        controls = {v[f"srppo - {x}, {n}"] for x in CONTROLS}
        if gain != "holds" or more == "does not hold":
            return gain if gain != "holds" else "does not hold"
        if "does not hold" in controls:
            return "sharpening only"
        return "holds" if controls | {more} == {"holds"} else "undecided"
    scarce = v["gain at 64 - gain at 512"]
    return f"{at(512)} (512 demonstrations), {at(64)} (64); larger gain when scarce: {scarce}"


CLAIMS = dict(
    srppo=Claim("Self-Rewarding PPO beats SFT and longer SFT out of domain, most with few "
                "demonstrations",
                "2510.21090: about +2 to +4 points over SFT on averaged benchmarks (second-hand)",
                arms=srppo_arms(), metric="ood_gold", tests=srppo_tests(),
                also=("val_gold", "ood_length", "ood_truncated"), conclude=srppo_conclusion,
                smallest={"ood_gold": 0.02},
                why="the least of the published +2 to +4 points of a hundred; gold runs to about "
                    "1"))

# claim: (the test that judges the headline, method, baseline, statement, what is measured, as
# published). Method and baseline are arms, "arm|metric" for another metric than the claim's,
# {arm|metric: weight} for a sum, or a number.
HEADLINES = dict(
    srppo=("srppo - sft, 512", "srppo 512", "sft 512",
           "Self-Rewarding PPO beats SFT and longer SFT out of domain, most with few "
           "demonstrations",
           "gold, other prompts ↑", "+2 to +4 points (second-hand)"),
)
