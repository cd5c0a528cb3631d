"""How long work takes: a guess, corrected by what was seen."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

MEMORY = 0.95
"""What an observation counts once there is a newer one."""
FADE = 0.97
"""What it counts a second later."""
LIKE_SIZE = 64
"""What others saw counts as one observation of this size."""


@dataclass(slots=True)
class Learned:
    """Seconds that work of a size takes: `fixed_s + size * each_s`, times a factor learned for the
    size's power of two. Where nothing was seen of that, the factor is that of all sizes, and else
    that of `like`, which sees all that its likes see."""

    fixed_s: float
    each_s: float
    like: Learned | None = None
    _seen_s: float = 0.0
    _guessed_s: float = 0.0
    """What was guessed for what was seen."""
    _by_size: dict[int, tuple[float, float]] = field(default_factory=dict)
    """The same two, by the bits of the size."""

    def learn(self, size: float, took_s: float) -> None:
        guess_s, bits = self._guess_s(size), int(size).bit_length()
        self._seen_s = self._seen_s * MEMORY + took_s
        self._guessed_s = self._guessed_s * MEMORY + guess_s
        seen_s, guessed_s = self._by_size.get(bits, (0.0, 0.0))
        self._by_size[bits] = (seen_s * MEMORY + took_s, guessed_s * MEMORY + guess_s)
        if self.like is not None:
            self.like.learn(size, took_s)

    def predict_s(self, size: float) -> float:
        guess_s, factor = self._guess_s(size), self.factor
        if (sums := self._by_size.get(int(size).bit_length())) is not None:
            factor = (sums[0] + factor * guess_s) / (sums[1] + guess_s)
        return guess_s * factor

    def fade(self) -> None:
        """To be called every second where, once it looks bad, nothing more may be seen of it: what
        was seen is forgotten by and by."""
        self._seen_s *= FADE
        self._guessed_s *= FADE
        for bits, (seen_s, guessed_s) in self._by_size.items():
            self._by_size[bits] = (seen_s * FADE, guessed_s * FADE)

    @property
    def factor(self) -> float:
        likes = 1.0 if self.like is None else self.like.factor
        weight_s = self._guess_s(LIKE_SIZE)
        return (self._seen_s + likes * weight_s) / (self._guessed_s + weight_s)

    def _guess_s(self, size: float) -> float:
        return self.fixed_s + size * self.each_s


def _prefill() -> Learned:
    return Learned(0.01, 1 / 10_000)


def _step() -> Learned:
    return Learned(0.02, 1 / 5_000)


def _exposed() -> Learned:
    return Learned(0.005, 1e-9)


@dataclass(slots=True)
class Rates:
    """One worker's, or all workers'."""

    prefill: Learned = field(default_factory=_prefill)
    """By prompt tokens computed."""
    step: Learned = field(default_factory=_step)
    """A step in which nothing but decoding was done, by requests decoding."""
    exposed: Learned = field(default_factory=_exposed)
    """What a request waits for its KV to arrive after it was computed, by bytes."""
    _prefilled_at_s: float = 0.0
    _step_at_s: float = 0.0
    _step_legs: Collection[str] = ()
    """Those of the latest step."""

    def saw_step(
        self, now_s: float, legs: Collection[str], prefilled_tokens: int, since_s: float
    ) -> None:
        """An engine step ended with an output for each of `legs`. With it ended the prefill of
        `prefilled_tokens` that came at `since_s`, and waited for those before."""
        if prefilled_tokens:
            self.prefill.learn(prefilled_tokens, now_s - max(since_s, self._prefilled_at_s))
            self._prefilled_at_s = now_s
        elif any(leg in self._step_legs for leg in legs):
            # One that was in the step before, too: nothing was between the two.
            self.step.learn(len(legs), now_s - self._step_at_s)
        self._step_at_s, self._step_legs = now_s, legs

    def of_one(self) -> Rates:
        """A new worker's: until it has shown what it does, it is like the others."""
        one = Rates()
        one.prefill.like, one.step.like, one.exposed.like = self.prefill, self.step, self.exposed
        return one
