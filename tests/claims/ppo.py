"""The claims of ppo.py: arms as --config strings, contrasts, what was published; and their
headlines."""
from claims import Claim, in_parts, versus


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


def same_or(conclude):
    """The conclusion of a claim that wants no difference: what is negligible is the same."""
    return lambda verdicts: conclude(verdicts).replace("negligible", "the same")


# Arms on Ring, trained on a reward model of noisy labels that every seed learns anew. Of three to
# five strengths (beta, weight) of each method, a factor of two or three apart, the best by val_gold
# on the development seed 2000 ended 1 to 3 nats from the SFT model; the one here, between two of
# the grid, ends there at 1.5: methods are compared at one KL. Gold judges only.
LEARNED = "ring,ppo,reward={rm},eval_every=100"
RM = dict(rm=("reward", "ring,noise=0.25"))
TWO = "samples=2,rollouts=48"                               # as many responses, in pairs
SOUP = "init=base:ring+init=base:ring"                      # its second model differs by its seed
RING = dict(models=RM, home="ppo-ring")
# gold of the SFT model's responses has a standard deviation of 1.5
FIFTH = dict.fromkeys(("val_gold", "best_gold", "early_gold", "gold@2"), 0.3)
WHY = ("a fifth of the spread of gold between responses of the SFT model, which wins 56 of 100 "
       "comparisons")
ON_RING = dict(
    shaping=Claim(
        "PAR, a sigmoid of the reward relative to the SFT model's, beats other shapes of a reward",
        "2502.18770: the best of ten shapes by win rate after RLHF; without a KL penalty it "
        "resists hacking longest",
        dict(par=f"{LEARNED},par,beta=0.04", raw=f"{LEARNED},beta=0.2",
             centered=f"{LEARNED},centered,beta=0.19", clip=f"{LEARNED},clip,beta=0.16",
             tanh=f"{LEARNED},tanh,beta=0.12", lsc=f"{LEARNED},lsc,beta=0.088",
             minmax=f"{LEARNED},minmax,beta=0.051") | {
            "par, no KL": f"{LEARNED},par,beta=0", "raw, no KL": f"{LEARNED},beta=0"}, "val_gold",
        versus("par", "raw", "centered", "clip", "tanh", "lsc", "minmax", tag="end: ")
        | versus("par, no KL", "raw, no KL", on="best_gold", tag="no KL: "),
        also=("ood_gold", "gold@2", "best_gold", "val_kl"),
        conclude=in_parts("end", "no KL"), smallest=FIFTH, why=WHY, **RING),
    chi2=Claim(
        "A penalty on the χ² divergence of whole responses keeps more gold than one on their KL",
        "2403.03185: higher true reward at the best coefficient in each of four settings, RLHF "
        "among them",
        {"chi2": f"{LEARNED},chi2,weight=0.041", "exact": f"{LEARNED},chi2_exact,beta=0.066",
         "whole KL": f"{LEARNED},chi2_kl,weight=0.14",
         "KL": f"{LEARNED},beta=0.2,eps=0.4,eps_v=0.4"},
        "val_gold", versus("chi2", "KL", "whole KL", tag="end: ")
        | versus("exact", "KL", tag="end: ") | versus("chi2", "KL", on="gold@2", tag="at 2 nats: "),
        also=("ood_gold", "gold@2", "best_gold", "val_kl"),
        conclude=in_parts("end", "at 2 nats"), smallest=FIFTH, why=WHY, **RING),
    fdpg=Claim(
        "Among f-divergences to the tilted SFT model, Jensen-Shannon gains most and reverse KL "
        "keeps the least diversity",
        "2302.08215: JS on or near the best frontier of alignment and entropy in all tasks",
        {x: f"{LEARNED},fdpg_{x},beta={beta}" for x, beta in dict(
            js=0.185, kl=0.18, rkl=0.19, tv=0.18).items()}
        | dict(raw=f"{LEARNED},beta=0.2"), "val_gold",
        versus("js", "kl", "rkl", "tv", "raw", tag="gold: ")
        | versus("kl", "rkl", on="end_entropy", tag="entropy: ")
        | versus("js", "rkl", on="end_entropy", tag="entropy: "),
        also=("ood_gold", "end_entropy", "gold@2", "val_kl"), conclude=in_parts("gold", "entropy"),
        smallest=FIFTH | dict(end_entropy=0.1),
        why=f"{WHY}; entropy: a tenth of a nat a token, of about 2.5", **RING),
    tppo=Claim(
        "Truncated PPO, on windows of a third of a response, ends as high as PPO",
        "2506.15050: up to 2.5 times as efficient (second-hand)",
        {"raw": f"{LEARNED},beta=0.2", "windows": f"{LEARNED},tppo,beta=0.17",
         "windows, equal tokens": f"{LEARNED},tppo,beta=0.17,steps=170"}, "val_gold",
        versus("windows", "raw", tag="equal steps: ")
        | versus("windows, equal tokens", "raw", tag="equal tokens: "),
        also=("ood_gold", "early_gold", "gold@2", "val_kl"),
        conclude=same_or(in_parts("equal steps", "equal tokens")), smallest=FIFTH, why=WHY, **RING),
    p3o=Claim(
        "Pairwise PPO has PPO's frontier without a critic, and does not see what is added to all "
        "of a prompt's scores",
        "2310.00212: KL-reward frontier above PPO's; invariant to shifts of a prompt's rewards",
        dict(p3o=f"{LEARNED},p3o,{TWO},beta=0.2",
             joint=f"{LEARNED},p3o_joint,{TWO},beta=0.2", pairs=f"{LEARNED},{TWO},beta=0.2") | {
            "p3o, shifted": f"{LEARNED},p3o,{TWO},beta=0.2,transform=shifted",
            "pairs, shifted": f"{LEARNED},{TWO},beta=0.2,transform=shifted"}, "val_gold",
        versus("p3o", "pairs", tag="end: ") | versus("joint", "pairs", tag="end: ")
        | versus("p3o, shifted", "pairs, shifted", tag="shifted scores: ")
        | {"invariance: p3o = p3o, shifted": {"p3o, shifted": 1, "p3o": -1}},
        also=("ood_gold", "gold@2", "best_gold", "val_kl"),
        conclude=same_or(in_parts("end", "shifted scores", "invariance")), smallest=FIFTH, why=WHY,
        **RING),
    rto=Claim(
        "A DPO policy's log-ratio as a token reward makes PPO faster and better",
        "2404.18922: 7.5 points of AlpacaEval 2 over PPO, its level with an eighth of the data "
        "(second-hand)",
        dict(rto=f"{LEARNED},rto,dpo={{dpo}},beta=0.215", raw=f"{LEARNED},beta=0.2"), "val_gold",
        versus("rto", "raw", on="early_gold", tag="first quarter: ")
        | versus("rto", "raw", tag="end: "),
        also=("ood_gold", "early_gold", "gold@2", "val_kl"),
        conclude=in_parts("first quarter", "end"), smallest=FIFTH, why=WHY,
        **RING | dict(models=RM | dict(dpo=("dpo", "dpo,noise=0.25")))),
    salsa=Claim(
        "A KL to the average of two SFT models lets PPO go further and higher",
        "2411.01798: more wins than PPO on three benchmarks (second-hand)",
        dict(salsa=f"{LEARNED},salsa,{SOUP},other=base:ring+init=base:ring+seed=1001,beta=0.2",
             one=f"{LEARNED},{SOUP},beta=0.21"), "val_gold",
        versus("salsa", "one", tag="end: ") | versus("salsa", "one", on="best_gold", tag="peak: ")
        | versus("salsa", "one", on="val_kl", tag="further: "),
        also=("ood_gold", "best_gold", "val_kl"), conclude=in_parts("end", "peak", "further"),
        smallest=FIFTH | dict(val_kl=0.3), why=f"{WHY}; KL: a fifth of what both have", **RING),
    infalign=Claim(
        "PPO on a tilt of the calibrated reward for how it is decoded wins under that decoding",
        "2412.19792: 3 to 8 % more wins (second-hand)",
        {f"{x}, {how} of 4": f"{LEARNED},infalign_{x},beta={beta},decode={row},n=4"
         for x, beta in dict(bon=1.16, id=0.59, won=0.05).items()
         for how, row in (("best", "bon"), ("worst", "won"))},
        "val_gold", versus("bon, best of 4", "id, best of 4", "won, best of 4", tag="best: ")
        | versus("won, worst of 4", "id, worst of 4", "bon, worst of 4", tag="worst: ")
        | versus("bon, best of 4", "id, best of 4", on="val_reward", tag="proxy, best: ")
        | versus("won, worst of 4", "id, worst of 4", on="val_reward", tag="proxy, worst: "),
        also=("val_reward", "ood_gold", "gold@2", "val_kl"),
        conclude=lambda v: in_parts("proxy", "gold")(
            {k if k.startswith("proxy") else f"gold, {k}": x for k, x in v.items()}),
        smallest=FIFTH | dict(val_reward=0.1),
        why=f"{WHY}; the reward model's own opinion: a tenth of its spread", **RING))

SEVERAL = "ring,weighted,rewards={rm}+{love},eos=subtract,no_eos=1.0"
POINTS = "rewards={rm}+{love},thresholds={sum}"
JUDGED = "toyif,route,pair_model={pm}/pm"
PARITY = "parity,thinkrm"
APART = dict(
    constrained=Claim(
        "Reward models held at the values that they had where gold peaked end there, where a "
        "weighted sum goes past it",
        "2310.04373: xi-PPO stays at the peak of the evaluation metric, PPO on the sum falls",
        {"xi": f"ring,xi_ppo,{POINTS}", "mu": f"ring,mu_ppo,{POINTS}",
         "sum": f"{SEVERAL},beta=0.1", "sum, less KL": f"{SEVERAL},beta=0.02"}, "val_gold",
        versus("xi", "sum", tag="tuned sum: ") | versus("mu", "sum", tag="tuned sum: ")
        | versus("xi", "sum, less KL", tag="loose sum: ")
        | versus("mu", "sum, less KL", tag="loose sum: "),
        also=("ood_gold", "best_gold", "val_kl", "val_flattery"),
        conclude=in_parts("tuned sum", "loose sum"), smallest=FIFTH, why=WHY,
        models=RM | dict(love=("reward", "recipe=love"), sum=("ppo", f"{SEVERAL},beta=0.02"))),
    maxmin=Claim(
        "A policy for the worst-served of the groups found by EM serves the minority better than "
        "one for the pooled reward",
        "2402.08925: 33 % more wins for minority groups, 16 % on average",
        dict(maxmin="ring,maxmin,rewards={em},beta=0.4", pooled="ring,weighted,eos=subtract,"
             "no_eos=1.0,rewards={em}/pooled,beta=0.4"), "val_gold_b",
        versus("maxmin", "pooled", tag="minority: ")
        | versus("maxmin", "pooled", on="val_gold", tag="majority: "),
        also=("val_gold", "ood_gold", "val_kl", "val_flattery"),
        conclude=in_parts("minority", "majority"),
        smallest=FIFTH | dict(val_gold_b=0.3), why=WHY,
        models=dict(em=("reward", "recipe=maxmin,rows=8000,lr=1e-3"))),
    routing_rl=Claim(
        "RLHF on pairs of which the uncertain ones go to a judge beats as many at random",
        "2510.20369: ahead of random routing downstream (second-hand, no number)",
        {"no judge": f"{JUDGED},budget=0,beta=0.2",
         "random": f"{JUDGED},router=random,beta=0.2",
         "uncertainty": f"{JUDGED},beta=0.2",
         "margin": f"{JUDGED},router=margin,beta=0.2",
         "all": f"{JUDGED},budget=1,beta=0.05"}, "val_gold",
        versus("uncertainty", "random", "no judge", "margin", tag="trained kinds: ")
        | versus("uncertainty", "random", "no judge", "margin", on="ood_gold", tag="unseen kinds: ")
        | {"control: all > no judge": {"all": 1, "no judge": -1}},
        also=("ood_gold", "val_kl"), conclude=in_parts("trained kinds", "unseen kinds", "control"),
        smallest=dict(val_gold=0.05, ood_gold=0.05),
        why="a twentieth of what gold of a right response is",
        models=dict(pm=("reward", "router,big_router"))),
    thinkrm_rl=Claim(
        "A policy trained on the verdicts of a judge that reasons at length beats one trained on "
        "Bradley-Terry's scores or on a judge that reasons little",
        "2505.16265: 47.2 % wins on AlpacaEval 2, 40.3 with short reasoning, 33.1 with "
        "Bradley-Terry (second-hand)",
        dict(long=f"{PARITY},judge={{long}}/sft,lr=1e-4",
             short=f"{PARITY},judge={{short}}/sft,lr=1e-4",
             points=f"{PARITY},judge={{long}}/sft,points=true,transform=group,lr=1e-4",
             bt=f"{PARITY},reward={{bt}}/bt,transform=group,lr=1e-4"), "val_gold",
        versus("long", "bt", "short", tag="judges: ") | versus("long", "points", tag="pairs: "),
        also=("val_exact", "val_kl"), conclude=in_parts("judges", "pairs"),
        smallest=dict(val_gold=0.03, val_exact=0.1),
        why="a fifth of what is left between the start and a policy that is always right",
        models={x: ("reward", f"thinkrm,{y}") for x, y in dict(
            long="rl_steps=0", short="style=short,rl_steps=0", bt="bt_style").items()}))
CLAIMS |= ON_RING | APART

# claim: (the test that judges the headline, method, baseline, statement, what is measured, as
# published). Method and baseline are arms, "arm|metric" for another metric than the claim's,
# {arm|metric: weight} for a sum, or a number.
HEADLINES = dict(
    srppo=("srppo - sft, 512", "srppo 512", "sft 512",
           "Self-Rewarding PPO beats SFT and longer SFT out of domain, most with few "
           "demonstrations",
           "gold, other prompts ↑", "+2 to +4 points (second-hand)"),
    shaping=("end: par > raw", "par", "raw",
             "PAR, a sigmoid of the reward relative to the SFT model's, beats other shapes",
             "gold at one KL ↑", "most wins of ten shapes, hacked last"),
    chi2=("end: chi2 > KL", "chi2", "KL",
          "A penalty on the χ² of whole responses keeps more gold than one on their KL",
          "gold at one KL ↑", "higher true reward in four of four settings"),
    fdpg=("gold: js > rkl", "js", "rkl",
          "Among f-divergences Jensen-Shannon gains most, reverse KL keeps the least diversity",
          "gold at one KL ↑", "JS on or near the best frontier everywhere"),
    tppo=("equal tokens: windows, equal tokens > raw", "windows, equal tokens", "raw",
          "PPO on windows of a third of a response ends as high as PPO",
          "gold at equal tokens ↑", "up to 2.5 times as efficient (second-hand)"),
    p3o=("end: p3o > pairs", "p3o", "pairs",
         "Pairwise PPO has PPO's frontier without a critic, and sees no shift of a prompt's scores",
         "gold at one KL ↑", "frontier above PPO's"),
    rto=("first quarter: rto > raw", "rto|early_gold", "raw|early_gold",
         "A DPO policy's log-ratio as a token reward makes PPO faster and better",
         "gold in the first quarter ↑", "+7.5 points (second-hand)"),
    salsa=("end: salsa > one", "salsa", "one",
           "A KL to the average of two SFT models lets PPO go further and higher",
           "gold ↑", "more wins on three benchmarks (second-hand)"),
    infalign=("best: bon, best of 4 > id, best of 4", "bon, best of 4", "id, best of 4",
              "PPO on a tilt for how it is decoded wins under that decoding",
              "gold, best of 4, at one KL ↑", "+3 to +8 % wins (second-hand)"),
    constrained=("tuned sum: xi > sum", "xi", "sum",
                 "Reward models held where gold peaked end there, a weighted sum goes past it",
                 "gold ↑", "at the peak, where PPO on the sum falls"),
    maxmin=("minority: maxmin > pooled", "maxmin", "pooled",
            "A policy for the worst-served group serves the minority better than a pooled reward's",
            "gold of the minority ↑", "33 % more wins for minorities"),
    routing_rl=("trained kinds: uncertainty > random", "uncertainty", "random",
                "RLHF on pairs of which the uncertain ones go to a judge beats as many at random",
                "gold, held-out prompts ↑", "ahead (second-hand, no number)"),
    thinkrm_rl=("judges: long > bt", "long", "bt",
                "Verdicts of a judge that reasons at length train a better policy than "
                "Bradley-Terry's scores", "share of right positions ↑",
                "47.2 % wins for 33.1 (second-hand)"),
)
