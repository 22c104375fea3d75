"""When enough draws have been made to know which class is the most probable.

After each group of draws that depend on each other (an antithetic pair, or one draw), with a the class of
the largest mean probability so far and d_g = p_g(a) - p_g(c) its lead over another class c in group g:

* Certain: with n of N draws made, the lead cannot be lost, n mean(d) > N - n, since each draw
  changes it by at most 1. The decision is that of all N draws.
* With an error rate alpha the evidence K for a positive mean of the lead has reached (C - 1) / alpha against
  every other class. Were another class c the one that infinitely many draws prefer, K against it would
  ever reach that with a probability of at most alpha / (C - 1), by Ville's inequality: however often is
  looked, the wrong class is settled on with one of at most alpha. K is, with G independent groups,

  - rule "normal", the Bayes factor of the t statistic, for leads d_g that are normal, of any variance:

        K = (k / (G + k))^(1/2) (V / (V - S^2 / (G + k)))^(G/2) where S > 0,  k = 1/4,

    with S = sum_g d_g and V = sum_g d_g^2. It is a martingale where the mean is 0, and smaller where it is
    negative. Real leads are about normal; a rare draw that turns a lead round is not foreseen.
  - rule "betting", the capital of bets on the lead, for any leads in [-1, 1]:

        K = 1/4 sum_b prod_g (1 + b d_g),  b in {1/4, 1/2, 3/4, 0.99}.

    It needs about log((C - 1) / alpha) / d groups for a lead of d, however little that varies.

Sources: Wang and Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown
variance", Sequential Analysis 44, 2025, arXiv 2310.03722 (after Lai, 1976); Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", JRSS B 86, 2024, arXiv 2010.09686; Ville, "Etude
critique de la notion de collectif", 1939.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .logits import ClassSums, Prediction

# Stakes: large ones end soon where the lead is large, small ones at all where it is small.
_STAKES = (0.25, 0.5, 0.75, 0.99)
# k of the rule "normal": standardised leads are expected to be of the order of 1 / sqrt(k).
_SPREAD = 0.25

RULES = ("normal", "betting")


def check_stop(stop: float | None, rule: str, min_samples: int, return_samples: bool) -> None:
    """Refuse what is no rule.

    Raises:
        ValueError: as it says.
    """
    if stop is None:
        return
    number = isinstance(stop, (int, float)) and not isinstance(stop, bool)
    if not number or not 0 <= stop < 0.5:
        raise ValueError(
            f"predict: stop must be None or an error rate from 0 (certain) to below 0.5, got {stop!r}"
        )
    if rule not in RULES:
        raise ValueError(f"predict: stop_rule must be one of {RULES}, got {rule!r}; choose one")
    if not hasattr(min_samples, "__index__") or min_samples < 1:
        raise ValueError(
            f"predict: min_samples must be an integer of at least 1, got {min_samples!r}"
        )
    if return_samples:
        raise ValueError(
            "predict: return_samples must be False with stop, which gives texts different numbers of "
            "draws; leave one of them out"
        )


def stop_options(
    stop: float | None, rule: str | None, min_samples: int | None, n_samples: int | None = None
) -> dict[str, Any]:
    """The arguments of `predict` that end draws early, from options that may be None for the defaults.

    Args:
        stop, rule, min_samples: as in `predict`.
        n_samples: draws that there are; None where that is not known yet.

    Raises:
        ValueError: they are out of range, have nothing to end, or are given without `stop`.
    """
    given = {"stop_rule": rule, "min_samples": min_samples}
    found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if stop is None:
        if found:
            name, value = next(iter(found.items()))
            raise ValueError(f"predict: {name} must be None without stop, got {value!r}; set stop")
        return {}
    found["stop"] = stop
    check_stop(stop, found.get("stop_rule", RULES[0]), found.get("min_samples", 1), False)
    if n_samples is not None and n_samples < 2:
        raise ValueError(
            f"predict: stop must be None where there are fewer than two draws to end, got {stop} and "
            f"n_samples={n_samples}"
        )
    return found


def settled(
    groups: Tensor, *, total: int, dependent: int, stop: float, rule: str = "normal"
) -> Tensor:
    """Which examples need no further draws, (B,) bool.

    Args:
        groups: (G, B, C) mean probabilities of the groups so far.
        total: N, the most draws.
        dependent: draws of a group.
        stop: alpha; 0 for certainty.
        rule: "normal" or "betting".
    """
    top = groups.mean(0).argmax(-1)
    where = top[None, :, None].expand(len(groups), -1, 1)
    lead = groups.gather(-1, where) - groups
    enough = lead.sum(0) * dependent > total - len(groups) * dependent
    if stop > 0:
        evidence = (_normal if rule == "normal" else _betting)(lead)
        enough |= evidence >= math.log(max(groups.shape[-1] - 1, 1) / stop)
    return enough.scatter_(1, top[:, None], True).all(-1)


def _normal(lead: Tensor) -> Tensor:
    """log K (B, C) of leads (G, B, C)."""
    count, total, squares = len(lead), lead.sum(0), lead.square().sum(0)
    # At least k / (G + k) of V is left, by Cauchy and Schwarz.
    ratio = (total.square() / (count + _SPREAD) / squares.clamp(min=1e-300)).clamp(max=1)
    log = 0.5 * math.log(_SPREAD / (count + _SPREAD)) - 0.5 * count * torch.log1p(-ratio)
    return torch.where(total > 0, log, -math.inf)


def _betting(lead: Tensor) -> Tensor:
    """log K (B, C) of leads (G, B, C)."""
    capital = torch.stack([torch.log1p(stake * lead).sum(0) for stake in _STAKES])
    return capital.logsumexp(0) - math.log(len(_STAKES))


class Settling:
    """Logits of draws until each example of a batch is settled.

    Which draws count for an example depends on its draws alone: not on the others, and not on how many
    draws share a pass.

    Args:
        examples: B.
        total: N, the most draws.
        dependent: draws of a group.
        stop: alpha; 0 for certainty.
        minimum: the fewest draws.
        rule: "normal" or "betting".
    """

    def __init__(
        self,
        examples: int,
        total: int,
        *,
        dependent: int,
        stop: float,
        minimum: int,
        rule: str = "normal",
    ) -> None:
        self.total, self.dependent, self.stop, self.minimum = total, dependent, stop, minimum
        self.rule = rule
        self.logits: Tensor | None = None
        self.drawn = 0
        self.used = torch.full((examples,), total)
        self.open = torch.arange(examples)

    def next_pass(self, per_pass: int) -> int:
        """Draws of the next pass: at first the fewest, then at most half as many again, in whole groups."""
        count = self.minimum if self.drawn == 0 else max(1, self.drawn // 2)
        count = -(-count // self.dependent) * self.dependent
        return min(per_pass, count, self.total - self.drawn)

    def add(self, logits: Tensor) -> None:
        """Logits (count, B', C) of further draws of the examples `open`."""
        count = len(logits)
        if self.logits is None:
            shape = self.total, len(self.used), logits.shape[-1]
            self.logits = torch.zeros(shape, dtype=logits.dtype)
        self.logits[self.drawn : self.drawn + count, self.open] = logits.cpu()
        before, self.drawn = self.drawn, self.drawn + count
        of_open = self.logits[: self.drawn, self.open].softmax(-1)
        going = torch.ones(len(self.open), dtype=torch.bool)
        for g in range(before // self.dependent + 1, self.drawn // self.dependent + 1):
            made = g * self.dependent
            if made < self.minimum:
                continue
            groups = of_open[:made].unflatten(0, (g, self.dependent)).mean(1)
            now = going & settled(
                groups,
                total=self.total,
                dependent=self.dependent,
                stop=self.stop,
                rule=self.rule,
            )
            self.used[self.open[now]] = made
            going &= ~now
        self.open = self.open[going]

    def result(self, labels: Tensor | None) -> Prediction:
        """Each example's prediction from its draws."""
        assert self.logits is not None
        parts = {}
        for count in self.used.unique().tolist():
            rows = (self.used == count).nonzero()[:, 0]
            sums = ClassSums(keep=False, dependent=self.dependent)
            sums.add(self.logits[:count, rows])
            parts[count] = rows, sums.result(count, None)
        back = torch.cat([rows for rows, _ in parts.values()]).argsort()

        def joined(name: str) -> Tensor:
            found = [(getattr(part, name), len(rows)) for rows, part in parts.values()]
            return torch.cat(
                [torch.full((n,), math.nan).double() if t is None else t for t, n in found]
            )[back]

        return Prediction(
            joined("log_probs"),
            joined("entropy"),
            joined("expected_entropy"),
            self.total,
            labels,
            entropy_bias=joined("entropy_bias"),
            draws_used=self.used,
        )
