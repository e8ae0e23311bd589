"""dpo.py: credits of tokens and the divergence at each, worked by hand."""
from types import SimpleNamespace

import pytest
import torch
from conftest import close

import dpo

L3 = 1.0986123                       # log 3: (log 3, 0) is the law (3/4, 1/4), (0, 0) is (1/2, 1/2)


class Laws:
    """A model of two tokens whose hidden states, which are its logits, depend on the first token
    of a row and on the place."""
    head, of_all_tokens = torch.eye(2), True

    def __init__(self, *rules):
        self.rules = rules

    def modules(self):
        """Itself alone: rows stay whole, as their first token says the rule."""
        return [self]

    def __call__(self, tokens):
        """The rule of a row's first token, for all of its places.   [N, T, 2]"""
        return torch.stack([torch.tensor(self.rules[int(row[0])][:len(row)]) for row in tokens])


def test_the_divergence_of_each_token_by_hand():
    """KL(π_ref||π): of (1/2, 1/2) from (3/4, 1/4) .143841, of (3/4, 1/4) from (1/2, 1/2) .130812;
    at t the law that predicts t, and 0 off the mask"""
    policy = Laws([[L3, 0.], [0, 0], [L3, 0], [0, 0]])
    ref = Laws([[0., 0.], [L3, 0], [L3, 0], [L3, 0]])
    tokens, mask = torch.zeros(2, 4).long(), torch.tensor([[0., 1, 1, 1], [0, 0, 1, 0]])
    got = dpo.token_kl(policy, ref, dpo.ref_hidden(ref, tokens), tokens, mask)
    assert close(got, [[0, .143841, .130812, 0], [0, 0, .130812, 0]], 1e-6)


@pytest.fixture
def one_pair(monkeypatch):
    """A pair of responses to "p": the ids of "ab" and EOS, and of "ba"."""
    row = dict(text=dict(prompt="p"))
    monkeypatch.setattr(dpo, "pairs", lambda data: [dict(sides=[[0, 1, 9], [1, 0]]) for _ in data])
    return [row]


def test_an_oracle_s_credits_by_hand(one_pair):
    """σ(scale Δ) - 1/2 of what a token adds to gold: an a adds 1, a b takes 2, EOS adds nothing"""
    tok = SimpleNamespace(stops=(9,), decode=lambda ids: "".join("ab........"[i] for i in ids))
    world = SimpleNamespace(reward=lambda problem, text, finished:
                            text.count("a") - 2 * text.count("b") - 5 * text.count("."))
    r, = dpo.credited(one_pair, world, tok)
    assert close(r["credits"], [.231059, -.380797, 0, -.380797, .231059], 1e-6)
    r, = dpo.credited(one_pair, world, tok, scale=2.0)
    assert close(r["credits"], [.380797, -.482014, 0, -.482014, .380797], 1e-6)


def test_credits_of_two_prompts_by_hand(one_pair, monkeypatch):
    """σ(log π(y|better) - log π(y|worse)) - 1/2: of (3/4, 1/4) and (1/2, 1/2) .1 and -.166667"""
    monkeypatch.setattr(dpo, "pairs", lambda data: [dict(sides=[[0, 1], [1, 0, 0]])])
    tok = SimpleNamespace(pad=0, prompt=lambda p, chat: [dict(g=0, b=1)[p["prompt"][0]], 0])
    start = Laws([[L3, 0.]] * 5, [[0., 0.]] * 5)
    c = SimpleNamespace(chat=False, device="cpu", dtype="float32")
    r, = dpo.prompted(one_pair, start, tok, c, better="good ", worse="bad ")
    assert close(r["credits"], [.1, -.166667, -.166667, .1, .1], 1e-6)
    r, = dpo.prompted(one_pair, start, tok, c, better="bad ", worse="good ")
    assert close(r["credits"], [-.1, .166667, .166667, -.1, -.1], 1e-6)
