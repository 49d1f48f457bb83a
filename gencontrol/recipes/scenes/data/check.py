"""Whether an image shows what a caption says: the objects that were found against the things that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from gencontrol.recipes.scenes.data.detect import Found
from gencontrol.recipes.scenes.data.grammar import SceneSpec, Thing

#: pixels that the centres of two things in a relation lie apart along its axis, at least
APART = 3.0


@dataclass(frozen=True)
class Verdict:
    """`exact`: everything asked for is there and nothing else; `share`: satisfied share of the demands, in [0, 1]."""

    exact: bool
    share: float


def agreement(thing: Thing, found: Found) -> tuple[int, int]:
    """Return (satisfied, named) properties of one object for one thing; the shape is always named."""
    asked = [(thing.shape, found.shape), (thing.colour, found.colour), (thing.size, found.size)]
    named = [(wish, fact) for wish, fact in asked if wish is not None]
    return sum(wish == fact for wish, fact in named), len(named)


def holds(relation: str, first: Found, second: Found) -> bool:
    """Whether the first object lies in the relation to the second."""
    dx, dy = second.x - first.x, second.y - first.y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return along >= APART


def judge(spec: SceneSpec, found: Sequence[Found]) -> Verdict:
    """Compare by the best assignment of objects to things.

    The graded share counts every named property of every thing, the relation, and each object too many; it is 1
    exactly where the verdict is exact.
    """
    wanted = [thing for thing in spec.things for _ in range(thing.count)]
    demands = sum(agreement(thing, _NOTHING)[1] for thing in wanted) + (spec.relation is not None)
    surplus = max(0, len(found) - len(wanted))
    best = 0
    candidates: list[Found | None] = [*found[:6], *([None] * max(0, len(wanted) - len(found)))]
    for chosen in permutations(candidates, len(wanted)):
        score = sum(agreement(thing, f)[0] for thing, f in zip(wanted, chosen, strict=True) if f is not None)
        if spec.relation is not None and chosen[0] is not None and chosen[1] is not None:
            score += holds(spec.relation, chosen[0], chosen[1])
        best = max(best, score)
        if best == demands:
            break
    share = best / (demands + surplus)
    return Verdict(best == demands and not surplus, share)


_NOTHING = Found(None, "", 0.0, 0.0, 0.0, 0.0)
