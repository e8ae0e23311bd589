"""
search.py - a tree of steps a prompt: which continuation of a response is worth more? (MCTS-DPO,
2405.00451)

    trees = grow_trees(prompts, extend, value, max_new)          # extend samples steps, value is
    the verifier
    step_pairs(trees[0])                                         # [(prefix, better step, worse
    step)]

A response is a path of steps, each a few tokens. All trees grow by one leaf at a time, so that a
language model extends them in one batch. Pure Python: the model comes in through `extend`.
"""
import math


class Node:
    """One step: ids since the parent, its prior, v the worth of a response that goes on from it.

    N visits;  r = v - v(parent);  V the children's mean Q by visits;  Q = r + V."""

    def __init__(self, ids=(), prior=1.0, finished=False, parent=None):
        self.ids, self.prior, self.finished, self.parent = list(ids), prior, finished, parent
        self.v, self.V, self.N, self.children = 0.0, 0.0, 0, []

    @property
    def Q(self):
        """r + V: what the step adds to its parent's worth, and what its best continuations add to
        its own."""
        return self.v - (self.parent.v if self.parent else 0.0) + self.V

    def path(self):
        """All ids from the root to here."""
        return (self.parent.path() if self.parent else []) + self.ids


def descend(node, w=1.0):
    """PUCT down to a leaf: the child with the largest Q + w p √N / (1 + N_child)."""
    while node.children:
        root = math.sqrt(node.N)
        node = max(node.children, key=lambda x: x.Q + w * x.prior * root / (1 + x.N))
    return node


def back_up(node):
    """N + 1 on the way up;  V(parent) = Σ max(1, N_c) Q_c / Σ max(1, N_c)."""
    while node:
        node.N += 1
        if node.children:
            weights = [max(1, x.N) for x in node.children]
            node.V = sum(n * x.Q for n, x in zip(weights, node.children)) / sum(weights)
        node = node.parent


def step_pairs(root):
    """(prefix, better ids, worse ids) at every node down the most valuable path; none where Q is
    equal."""
    out, node = [], root
    while node.children:
        best, worst = (choose(node.children, key=lambda x: x.Q) for choose in (max, min))
        if best.Q > worst.Q and best.ids != worst.ids:
            out.append((node.path(), best.ids, worst.ids))
        node = best
    return out


def grow_trees(prompts, extend, value, max_new, *, iterations=8, children=3, chunk=4, depth=4):
    """One tree a prompt -> their roots, after `iterations` leaves each.

    extend([ids], new, k) -> for every start k tuples (ids of at most `new` tokens, prior,
    finished); value(i, ids, finished) -> the worth of a whole response to prompt i. A leaf within
    `depth` steps gets `children` steps of `chunk` tokens; each is worth what one completion from it
    is (2405.00451 adds the model's own confidence: ours is the verifier alone).
    """
    roots = [Node() for _ in prompts]
    for _ in range(iterations):
        leaves = [descend(root) for root in roots]
        grow = [i for i, x in enumerate(leaves)
                if not x.finished and len(x.path()) + chunk <= min(chunk * depth, max_new)]
        steps = extend([prompts[i] + leaves[i].path() for i in grow], chunk,
                       children) if grow else []
        fresh = []
        for i, made in zip(grow, steps):
            leaves[i].children = [Node(ids, prior, done, leaves[i]) for ids, prior, done in made]
            fresh += [(i, x) for x in leaves[i].children]
        rest = {}
        for i, x in fresh:
            if not x.finished and len(x.path()) < max_new:
                rest.setdefault(max_new - len(x.path()), []).append((i, x))
        ends = {id(x): (x.path(), x.finished) for _, x in fresh}
        for room, same in rest.items():  # one call a length: all end at max_new
            made = extend([prompts[i] + x.path() for i, x in same], room, 1)
            ends |= {id(x): (x.path() + ids, done) for (_, x), ((ids, _, done),) in zip(same, made)}
        for i, x in fresh:
            x.v = value(i, *ends[id(x)])
        for leaf in leaves:
            back_up(leaf)
    return roots
