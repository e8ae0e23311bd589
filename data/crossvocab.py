"""
crossvocab.py - a draft model whose tokenizer is not the target's: OmniDraft, 2507.02659.

Map      1 the cache   2 translation   3 the drafter.   Its distillation (L_DM + λ L_ngram) is not
here Letters  t a target token, d a draft token; V, W the rows of their vocabularies; B rows, G
tokens a block
Watch    cache.hits / cache.read, the share of target tokens read that could have been drafted,
bounds what is
         kept. drafter.passes / drafter.places: the draft's passes a drafted token, each of which
         costs c.
"""
import math
import re
from itertools import accumulate, groupby, pairwise

import torch

from data.run import UserError, nearest

# --- 1 the cache ----------------------------------------------------------------------------------


def plain(tok):
    """{id: bytes} of a tokenizer's tokens of text: no specials, no holes."""
    special = {*tok.specials.values(), tok.bos, tok.eos, tok.pad}
    return {i: word for i, word in enumerate(tok.tokens) if word and i not in special}


def matches(target_tok, draft_tok):
    """The direct maps {target id: draft id}: equal bytes, one to one, the lowest ids of equal
    tokens."""
    target, draft = ({word: i for i, word in reversed(plain(x).items())}
                     for x in (target_tok, draft_tok))
    return {t: draft[word] for word, t in reversed(target.items()) if word in draft}


def spell(data, tok):
    """Bytes -> ids. A piece of a UTF-8 character goes byte by byte; a byte without a token is left
    out."""
    ranks = []
    for part in re.split("([\udc80-\udcff])", data.decode("utf-8", "surrogateescape")):
        stray = len(part) == 1 and "\udc80" <= part <= "\udcff"
        ranks += [ord(part) - 0xdc00] if stray else tok.engine.encode_ordinary(part)
    return [tok.order[rank] for rank in ranks if tok.order[rank] >= 0]


class NgramCache:
    """Target token <-> the strings of draft tokens that have its bytes.

    Strings of one token come from the vocabularies. A longer one is added where, in text that is
    read, both ends of a target token are ends of draft tokens (ours: each round's commit is spelled
    by itself); a draft without merges (bytes, characters) spells a token in one way, so that all
    are there from the beginning. The rows share it: what one has read may change what another
    drafts, not the law of what it says.

    strings {(d, …): t};  starts: what longer strings begin with;  known: the t of strings;  direct
    {t: d}; usable [W]: the d of strings;  read, hits: target tokens read, and those of them that
    were known by then
    """

    def __init__(self, target_tok, draft_tok):
        self.words, self.draft = plain(target_tok), draft_tok
        self.direct, self.read, self.hits = matches(target_tok, draft_tok), 0, 0
        self.strings, self.starts, self.known = {}, set(), set()
        self.usable = torch.zeros(draft_tok.vocab_size, dtype=torch.bool)
        for t, d in self.direct.items():
            self.add(t, (d,))
        if len(draft_tok.order) == 256:                    # no merges
            for t, word in self.words.items():
                self.add(t, tuple(spell(word, draft_tok)))
        if not self.strings:
            raise UserError("the vocabularies of target and draft share no token: take a draft whose "
                            "tokenizer has bytes, or words of the target's")
        self.specials = {target_tok.bos: draft_tok.bos, target_tok.eos: draft_tok.eos} | {
            t: draft_tok.specials[x] for x, t in target_tok.specials.items()
            if x in draft_tok.specials}

    def add(self, t, string):
        """An entry, if the bytes are the same."""
        if string and b"".join(self.draft.tokens[d] for d in string) == self.words[t]:
            self.strings.setdefault(string, t)
            self.known.add(t)
            self.starts.update(string[:n] for n in range(1, len(string)))
            self.usable[list(string)] = True

    def follow(self, tokens):
        """Committed target ids -> the draft's ids of the same text; learns the strings that line
        up.

        A special becomes the draft's of the same text, BOS and EOS its BOS and EOS; others it does
        not see.
        """
        ids = []
        for text, run in groupby(tokens, lambda t: t in self.words):
            run = list(run)
            if not text:
                ids += [d for t in run if (d := self.specials.get(t)) is not None]
                continue
            self.read, self.hits = self.read + len(run), self.hits + sum(t in self.known
                                                                         for t in run)
            part = spell(b"".join(self.words[t] for t in run), self.draft)
            places = accumulate((len(self.draft.tokens[d]) for d in part), initial=0)
            at = {n: i for i, n in enumerate(places)}      # bytes: draft tokens
            for t, (a, b) in zip(run, pairwise(accumulate((len(self.words[t]) for t in run),
                                                          initial=0))):
                if a in at and b in at:
                    self.add(t, tuple(part[at[a]:at[b]]))
            ids += part
        return ids

    @property
    def bytes(self):
        """Of the strings of two tokens or more, at four an id."""
        return sum(4 * (1 + len(x)) for x in self.strings if len(x) > 1)


# --- 2 translation --------------------------------------------------------------------------------


def translate(drafted, cache, over=True):
    """Draft ids -> [(target id, how many draft ids it is)], and whether more of them could go on
    from there.

    From left to right the longest string of the cache (a direct map is a string of one); where none
    begins the block ends. over: nothing follows; else what may yet become a longer string is left.
    """
    found, i = [], 0
    while i < len(drafted):
        longest, grows = 0, True
        for n in range(1, len(drafted) - i + 1):
            part = tuple(drafted[i:i + n])
            longest, grows = n if part in cache.strings else longest, part in cache.starts
            if not grows:
                break
        if not longest or grows and not over:
            return found, grows and not over
        found.append((cache.strings[tuple(drafted[i:i + longest])], longest))
        i += longest
    return found, True


def carried(law, pairs, vocab, t, merged, first):
    """q' [V] where the draft's law [W] began target token t.

    q'(t) = q(d) of the direct maps, pairs [2, M] = (t, d).  merged (0: t is one draft token) is Π_j
    q(d_j): t gets it, its first part's own token (`first`, or None) loses it,  q'(d_1) = q(d_1) -
    Π_j q(d_j).
    """
    q = law.new_zeros(vocab).index_copy(0, pairs[0], law[pairs[1]])
    if merged:
        q[t] += merged
        if first is not None:
            q[first] = max(q[first] - merged, 0)
    return q


# --- 3 the drafter --------------------------------------------------------------------------------

MODES = ("point", "ngram")


class Translated:
    """A language model of another vocabulary: it drafts in its own tokens, the cache translates.

    point  a translated token is a point mass, kept with probability p(t). Exact: so is any
    translation that
           sees committed text and draft alone. sampling is the draft's; (0, 0, 1.0) drafts its
           likeliest.
    ngram  the tests see q' (carried). Approximate, the law of samples changes: t is not proposed
    with q'(t)
           where longer strings compete, of which a path of the draft shows one only. Exact where
           all strings are single tokens; and greedy decoding is, in both modes.
    ours: the draft draws among usable tokens alone, q being its law on them; a block has at most
    `longest` draft tokens, and what could still grow at its end is dropped; the draws come from a
    generator seeded with u[b, 0, 0], for verify's own numbers must not be seen; while the longest
    row fills the draft's context nothing is drafted. prefill, law, draw: those of model.py and
    specdec.py.
    """
    context = math.inf                                     # in target tokens, for the loop

    def __init__(self, model, cache, vocab, sampling, *, prefill, law, draw, mode="point",
                 longest=32):
        if mode not in MODES:
            raise UserError(f"no mode {mode!r} of translation{nearest(mode, MODES)}")
        self.model, self.cache, self.vocab, self.sampling, self.mode = model, cache, vocab, sampling, mode
        self.prefill, self.law, self.draw, self.longest = prefill, law, draw, longest
        self.limit, self.passes, self.places = model.config.max_position_embeddings, 0, 0

    @property
    def per_token(self):
        """The draft's passes for a drafted token."""
        return self.passes / max(1, self.places)

    def start(self, prompts, length, rows, new):
        ends = [x for x in (self.cache.draft.bos, self.cache.draft.eos, 0) if x is not None]
        texts = [self.cache.follow(p[:n].tolist()) or ends[:1]
                 for p, n in zip(prompts, length.tolist())]
        most = max(map(len, texts))
        if most > self.limit:
            raise UserError(f"a prompt of {most} of the draft's tokens exceeds its context of {self.limit}: "
                            "shorten the prompt or take a draft with a longer context")
        tokens, size = (torch.tensor(x, device=prompts.device) for x in (
            [x + [0] * (most - len(x)) for x in texts], [len(x) for x in texts]))      # [U, T], [U]
        self.kv = self.prefill(self.model, tokens, size, rows, new)[1]
        self.seen = length[rows].tolist()  # target tokens that are spelled, of each row
        self.ids = [[*texts[i]] for i in rows.tolist()]    # … in draft tokens
        self.held = [*map(len, self.ids)]                  # … that kv holds

    def keep(self, order):
        self.kv.keep(order)
        self.seen, self.ids, self.held = ([x[i] for i in order.tolist()]
                                          for x in (self.seen, self.ids, self.held))

    def read(self, device):
        """Feed what the draft lacks, every row to its end.   -> the hidden states there [B, D]

        A row that lacks less reads some again; one shorter than the largest gap is padded on the
        right, and what that leaves behind its length is overwritten before it is seen.
        """
        sizes = [*map(len, self.ids)]
        gap = max(1, *(n - held for n, held in zip(sizes, self.held)))
        begin = [max(0, n - gap) for n in sizes]
        feed = torch.tensor([(x[i:] + [0] * gap)[:gap] for x, i in zip(self.ids, begin)],
                            device=device)
        slots = self.kv.k.size(3)
        if max(begin) + gap + self.longest > slots:
            self.kv.spread(torch.arange(len(feed), device=device), slots + gap + self.longest)
        self.kv.length, self.kv.used = torch.tensor(begin, device=device), max(begin)
        hidden = self.model(feed, self.kv)                                             # [B, gap, D]
        size, self.held = torch.tensor(sizes, device=device), sizes                      # [B]
        last = size - 1 - (self.kv.length - gap)
        self.kv.length, self.kv.used = size, max(sizes)
        return hidden[torch.arange(len(feed), device=device), last]

    def uniforms(self, u, steps):
        """What the draft draws by [B, steps]."""
        seeds = [torch.Generator().manual_seed(int(x * 2 ** 24))
                 for x in u[:, 0, 0].tolist()]                                             # 24 bits
        return torch.stack([torch.rand(self.longest, generator=g)[:steps] for g in seeds])

    def propose(self, text, length, u, more):
        """Draft, translate what is complete, ask `more` after every target token.   See specdec.py,
        4"""
        (B, _), device = text.shape, text.device
        for b, n in enumerate(length.tolist()):
            self.ids[b] += self.cache.follow(text[b, self.seen[b]:n].tolist())
            self.seen[b] = n
        steps = max(0, min(self.longest, self.limit + 1 - max(map(len, self.ids))))
        drawn, told, laws = [[] for _ in range(B)], [[] for _ in range(B)], []
        usable, v, d = self.cache.usable.to(device), self.uniforms(u, steps).to(device), None
        wants = more(0, u[:, :0, 0]).tolist()
        while any(wants) and len(laws) < steps:
            hidden = self.model(d[:, None], self.kv)[:, -1] if laws else self.read(device)  # [B, D]
            logits = self.model.logits(hidden)[:, :len(usable)].masked_fill(~usable,
                                                                            -math.inf)      # [B, W]
            laws.append(self.law(logits, *self.sampling))
            d = self.draw(laws[-1], v[:, len(laws) - 1])                                 # [B]
            own = logits.softmax(-1).gather(1, d[:, None]).squeeze(1)                    # [B]
            for b, x in enumerate(zip(d.tolist(), own.tolist())):
                drawn[b].append(x)
            self.settle(drawn, told, wants, more, u)
        G = max(map(len, told))
        self.passes, self.places = self.passes + len(laws), self.places + G
        drafted = torch.zeros(B, G, dtype=torch.long, device=device)
        q = laws[0].new_zeros(B, G,
                              self.vocab) if G and self.mode == "ngram" and self.sampling[0] else None
        pairs = torch.tensor([*self.cache.direct.items()], dtype=torch.long,
                             device=device).view(-1, 2).T
        for b, j, (t, i, n, _) in ((b, j, x) for b, row in enumerate(told)
                                   for j, x in enumerate(row)):
            drafted[b, j] = t
            if q is not None:
                string = [d for d, _ in drawn[b][i:i + n]]
                merged = math.prod(laws[i + m][b, x].item()
                                   for m, x in enumerate(string)) if n > 1 else 0
                first = self.cache.strings.get((string[0],))
                q[b, j] = carried(laws[i][b], pairs, self.vocab, t, merged, first)
        return drafted, q, torch.tensor([*map(len, told)], device=device), self.surety(told, G, u)

    def settle(self, drawn, told, wants, more, u):
        """Translate what is complete of drawn [B][(d, its probability)] into told [B][(t, its first
        place in drawn, its length, its probability)], token by token; `wants` [B] says which rows
        draft on."""
        alive = [b for b, want in enumerate(wants) if want]
        while alive:
            new = []
            for b in alive:
                done = sum(n for _, _, n, _ in told[b])
                ids, chances = zip(*drawn[b][done:]) if drawn[b][done:] else ((), ())
                found, wants[b] = translate(ids, self.cache, over=False)
                told[b] += [(t, done, n, math.prod(chances[:n])) for t, n in found[:1]]
                new += [b] * bool(found)
            answers = {k: more(k, self.surety(told, k, u)).tolist()
                       for k in {len(told[b]) for b in new}}
            for b in new:
                wants[b] = answers[len(told[b])][b]
            alive = [b for b in new if wants[b]]

    def surety(self, told, k, u):
        """The draft's own probability of each row's first k tokens [B, k]; 1 where it has fewer."""
        rows = [[x[3] for x in row[:k]] + [1.0] * (k - len(row)) for row in told]
        return torch.tensor(rows, device=u.device, dtype=u.dtype).view(len(told), k)
