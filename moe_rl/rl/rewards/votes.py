"""Which of a problem's answers are one answer, so that they can be counted as votes (cons@n)."""

import collections
import dataclasses

from moe_rl.rl.rewards import functions, mathematics
from moe_rl.rl.rewards.pool import Item, RewardPool
from moe_rl.rl.rewards.verdicts import CORRECT, WRONG

# Longer ones are the same only if they are spelt the same; the longest reference of MATH has 159 characters.
_MAX_COMPARED_CHARS = 500


@dataclasses.dataclass(frozen=True)
class Ballot:
  """The answers to one problem: as extracted (None without one), with their verdicts."""

  kind: str
  reference: str
  answers: list[str | None]
  verdicts: list[str]


def votes(pool: RewardPool, ballots: list[Ballot]) -> list[list[int | None]]:
  """For each answer the place of the first that is equal to it, or None if it does not vote.

  Equal are answers that the kind's own rule calls equal: those that are correct, those of one spelling (`Rule.normal`),
  and, where the rule knows values (`Rule.compares`), those of which one is correct if the other is the reference. That
  is asked of the workers. Only what is correct or wrong votes: what cannot be read, or was not read in time, does not.
  """
  firsts = [_by_spelling(ballot) for ballot in ballots]
  waiting = {n: sorted(set(first) - {None, *_correct(ballot)}) for n, (ballot, first) in
             enumerate(zip(ballots, firsts, strict=True)) if functions.ACCURACY[ballot.kind].compares}
  while waiting := {n: places for n, places in waiting.items() if len(places) > 1}:  # the first of each with the others
    pairs = [(n, places[0], other) for n, places in waiting.items() for other in places[1:]]
    same = collections.defaultdict(set)
    for (n, one, other), equal in zip(pairs, _equal(pool, ballots, pairs), strict=True):
      if equal:
        same[n].add(other)
        firsts[n] = [one if first == other else first for first in firsts[n]]
    waiting = {n: [place for place in places[1:] if place not in same[n]] for n, places in waiting.items()}
  return firsts


def _correct(ballot: Ballot) -> list[int]:
  return [i for i, verdict in enumerate(ballot.verdicts) if verdict == CORRECT][:1]


def _by_spelling(ballot: Ballot) -> list[int | None]:
  """The first of the same spelling, of the correct ones the first correct one."""
  normal, seen, out = functions.ACCURACY[ballot.kind].normal, {}, []
  for i, (answer, verdict) in enumerate(zip(ballot.answers, ballot.verdicts, strict=True)):
    if answer is None or verdict not in (CORRECT, WRONG):
      out.append(None)
    else:
      key = CORRECT if verdict == CORRECT else (WRONG, normal(answer, ballot.reference))
      out.append(seen.setdefault(key, i))
  return out


def _equal(pool: RewardPool, ballots: list[Ballot], pairs: list[tuple[int, int, int]]) -> list[bool]:
  """Whether each (ballot, one, other) is a pair of equal answers; plain numbers need no worker."""
  found, asked = {}, {}
  for n, one, other in pairs:
    given, wanted = ballots[n].answers[other], ballots[n].answers[one]
    verdict = mathematics.plainly(given, wanted)
    if verdict is None and max(len(given), len(wanted)) <= _MAX_COMPARED_CHARS:
      asked[n, one, other] = Item(ballots[n].kind, f'<answer>{given}</answer>', wanted)
    found[n, one, other] = verdict == CORRECT
  grades = pool.grade(asked.values()) if asked else []
  found |= {pair: grade.verdict == CORRECT for pair, grade in zip(asked, grades, strict=True)}
  return [found[pair] for pair in pairs]
