"""The placement policies by name: Baton's own, and those that installed packages add as entry
points of the group `baton.policies`, each a callable that makes a policy of `PolicyOptions`."""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.scheduler.handover import HandOver, HandOverRule
from cluster.scheduler.policies.baselines import PowerOfTwo, Random, RoundRobin
from cluster.scheduler.policies.guarded import Guarded
from cluster.scheduler.policies.scored import PredictedLatency, PrefixAware
from cluster.scheduler.policies.splitwise import Splitwise
from cluster.scheduler.policy import PlacementPolicy

GROUP = "baton.policies"
DEFAULT = "splitwise"


class BadPolicy(Exception):
    """No policy has the name, or it cannot be made. The message says why, in one line."""


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    local_prompt_tokens: int = 0
    queue_threshold_tokens: int = 8192
    rng: random.Random = field(default_factory=random.Random)
    hand_over: HandOver = "always"

    @property
    def rule(self) -> HandOverRule:
        return HandOverRule(self.local_prompt_tokens, self.hand_over)


BUILT_IN: dict[str, Callable[[PolicyOptions], PlacementPolicy]] = {
    "splitwise": lambda o: Splitwise(o.rule, o.queue_threshold_tokens),
    "round_robin": lambda o: RoundRobin(o.rule),
    "random": lambda o: Random(o.rng, o.rule),
    "power_of_two": lambda o: PowerOfTwo(o.rng, o.rule),
    "prefix_aware": lambda o: PrefixAware(o.rule),
    "predicted_latency": lambda o: PredictedLatency(o.rule),
}


def policy_names() -> list[str]:
    """Baton's own first. An entry point cannot take the name of one of those."""
    added = {point.name for point in importlib.metadata.entry_points(group=GROUP)}
    return [*BUILT_IN, *sorted(added - BUILT_IN.keys())]


def make_policy(name: str, options: PolicyOptions) -> PlacementPolicy:
    """
    Raises:
        BadPolicy
    """
    make = BUILT_IN.get(name)
    if make is not None:
        return make(options)
    points = tuple(importlib.metadata.entry_points(group=GROUP, name=name))
    if not points:
        raise BadPolicy(_unknown(name, policy_names()))
    if len(points) > 1:
        values = " and ".join(point.value for point in points)
        raise BadPolicy(f"several policies are called {name!r}: {values}")
    try:
        made: PlacementPolicy = points[0].load()(options)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise BadPolicy(f"policy {name!r} ({points[0].value}) cannot be made: {said}") from error
    return Guarded(made, make_policy(DEFAULT, options))


class Policies:
    """One of each name, made when it is first asked for: some keep turns or a random generator."""

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options
        # Clients ask for names: what is installed is looked up once.
        self._names = policy_names()
        self._made: dict[str, PlacementPolicy | BadPolicy] = {}

    def get(self, name: str) -> PlacementPolicy:
        """
        Raises:
            BadPolicy
        """
        if name not in self._names:
            raise BadPolicy(_unknown(name, self._names))
        if name not in self._made:
            try:
                self._made[name] = make_policy(name, self._options)
            except BadPolicy as error:
                self._made[name] = error
        made = self._made[name]
        if isinstance(made, BadPolicy):
            raise BadPolicy(str(made))
        return made


def _unknown(name: str, names: list[str]) -> str:
    return f"no policy is called {name!r}: there are {', '.join(names)}"
