"""Verification by ``rejection``: recursive rejection sampling over siblings drawn from the drafter's law.

Letters. p is the target's law at a visited node, after all processors; q the drafter's law of its children, which were
drawn from q without replacement (Gumbel top-k) and are tried in the order drawn. With r uniform in [0, 1):

    accept x if r q(x) < p(x);   else p <- max(p - q, 0) / sum,   q <- q without x, / sum
    none accepted: draw from what is left of p

So each emitted token has the law p (SpecInfer, arXiv 2305.09781; without replacement: Sequoia, arXiv 2402.12374).
Cousins may share their draws, as all nodes of one position in a block do: only one parent a level is visited. What
would matter is any choice among drawn siblings by their values, so the tree is a static one, its ranks being the order
drawn, and dynamic trees go with ``follow`` only. ``follow`` accepts more where the drafter's law is flatter than
the target's, as at low temperature; ``rejection`` at temperatures near 1 with a good drafter.

The randomness is a generator of its own, seeded by one draw from the user's (see [`SiblingDraws`]). It must depend on
the user's seed: with a fixed one the siblings would be the same in every call, so not drawn from q at all, and the law
of the text over the user's seeds would be wrong. So a seed gives the same text again, but not plain decoding's text.

``tests/runtime/test_rejection.py`` holds the law by exact enumeration. Knows no model. Device syncs: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .tree import DraftTree


@dataclass(frozen=True)
class Proposals:
    """What the siblings of a static tree were drawn from.

    Attributes:
        laws: ``[B, L, D]`` float, the laws q of all positions of all passes, over the D tokens drafted over.
        positions: of each node, the position whose law its children were drawn from; -1 for a leaf.
        children: of each node, its children's ids ``[m]`` in the order drawn.
        vocabulary: ``[D]`` token ids, ascending, or None if all tokens are drafted over.
    """

    laws: torch.Tensor
    positions: tuple[int, ...]
    children: tuple[torch.Tensor, ...]
    vocabulary: torch.Tensor | None

    def law(self, row: int, node: int, size: int) -> torch.Tensor:
        """The law q ``[V]`` of a node's children, for a vocabulary of ``size`` tokens; zeros for a leaf."""
        if self.positions[node] < 0:
            return self.laws.new_zeros(size)
        law = self.laws[row, self.positions[node]]
        full = law.new_zeros(size)
        if self.vocabulary is None:
            full[: law.shape[0]] = law
            return full
        return full.index_copy(0, self.vocabulary, law)


class SiblingDraws:
    """The private randomness of one call of ``generate()``: draws siblings, and accepts or rejects them.

    Args:
        temperature: of the drafter's laws; the user's, so that they are as flat as the target's.
        device: where the laws live.
    """

    def __init__(self, temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        # On the CPU, so that it costs no device sync.
        seed = int(torch.randint(2**62, (1,)))
        self.generator = torch.Generator(device).manual_seed(seed)

    def siblings(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw ``count`` without replacement from each law of ``[..., D]`` logits: indices in order, and the laws q."""
        scaled = logits.float() / self.temperature
        noise = torch.empty_like(scaled).exponential_(generator=self.generator)
        # argmax(log q - log E) is a draw from q, and the next largest are draws from what is left.
        return (scaled - noise.log()).topk(count, dim=-1).indices, scaled.softmax(-1)

    def follow_node(self, p: torch.Tensor, tree: DraftTree, row: int, node: int) -> torch.Tensor:
        """The token ``[1]`` behind a visited node of ``row``, from the target's law p ``[1, V]`` there."""
        proposals = tree.proposals
        if proposals is None:  # the root alone
            return self._draw(p[0].to(self.generator.device))
        law = proposals.law(row, node, p.shape[-1])
        children = tree.tokens[row].to(law.device)[proposals.children[node]]
        return self.choose(p[0].to(law.device), law, children)

    def choose(self, p: torch.Tensor, q: torch.Tensor, children: torch.Tensor) -> torch.Tensor:
        """The token ``[1]`` that follows a node with target law p ``[V]`` and children ``[m]`` drawn from q ``[V]``."""
        target_chances, draft_chances, rest = rejection_chances(p, q, children)
        tried = torch.rand(children.shape[0] + 1, generator=self.generator, device=p.device)
        # Strictly less, so that what the target never says is never accepted. The last entry is the draw from the rest.
        accepted = torch.cat(
            (tried[:-1] * draft_chances < target_chances, torch.ones_like(tried[:1], dtype=torch.bool))
        )
        # gather, because indexing by a scalar tensor would read it on the host.
        return torch.cat((children, self._draw(rest))).gather(0, accepted.int().argmax(0, keepdim=True))

    def _draw(self, law: torch.Tensor) -> torch.Tensor:
        """One token ``[1]`` from ``[V]``; unlike ``torch.multinomial``, which checks its input, without a sync."""
        noise = torch.empty_like(law).exponential_(generator=self.generator)
        return (law / noise.clamp_min(torch.finfo(law.dtype).tiny)).argmax(0, keepdim=True)


def rejection_chances(
    p: torch.Tensor, q: torch.Tensor, children: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What decides at a node, for all outcomes at once.

    Args:
        p: ``[V]``, the target's law.
        q: ``[V]``, the drafter's law.
        children: ``[m]`` tokens in the order drawn.

    Returns:
        ``[m]`` p(x) and ``[m]`` q(x) of each child when its turn comes: it is accepted if r q(x) < p(x); and ``[V]``,
        the law to draw from if none is. A child that q cannot have given (it has run out of tokens) has p(x) = 0 here.
    """
    target_chances, draft_chances = [], []
    for rank in range(children.shape[0]):  # each step needs the one before; m counts siblings, not nodes
        token = children[rank : rank + 1]
        own = q.gather(0, token)
        target_chances.append(torch.where(own > 0, p.gather(0, token), 0))
        draft_chances.append(own)
        rest = (p - q).clamp_min(0)
        total = rest.sum()
        # p = q up to rounding: no child is rejected then, but a rounding error must not make the law zero.
        usable = (total > 0) & (own > 0)
        p = torch.where(usable, rest / total, p)
        q = q.scatter(0, token, 0)
        q = q / q.sum().clamp_min(torch.finfo(q.dtype).tiny)
    if not target_chances:
        return p[:0], p[:0], p
    return torch.cat(target_chances), torch.cat(draft_chances), p
