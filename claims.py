"""
What a claim is, and when a model shows it: numbers with standard errors, and one rule.

    >>> right, guessed = share(45, 60), share(30, 60)
    >>> print(right, "|", Check("right more often than by guessing", right, guessed).z >= LEAST_Z)
    75.0% ± 5.6 | True

    in:  counts and lists of numbers       out: Measured, Check, Finding

Every claim of the talk comes down to checks: one number should be larger than another. A check
passes if the difference is at least two standard errors of the difference. A claim is shown if all
of its checks pass, partly shown if some do, and not shown at this size if none does. No verdict is
written down elsewhere.

A share that is 0 or 1 in a small sample is not certain. Its standard error is therefore that of the
share with one more hit and one more miss (Laplace's rule), which is never 0. What is counted rather
than sampled, such as the pages of a crawl, has no standard error.
"""
import math
from dataclasses import dataclass, field

LEAST_Z = 2.0       # standard errors between two numbers: 1 chance in 44 if they are equal

# ---- Numbers and their standard errors -----------------------------------------------------------

@dataclass(frozen=True)
class Measured:
    """A number with its standard error; unit "%" means a share, which is shown in per cent."""
    value: float
    error: float = 0.0
    unit: str = ""

    def __str__(self):
        if self.unit == "%":
            return f"{self.value:.1%}" + self.plus_minus(f"{100 * self.error:.1f}")
        digits = 3
        if abs(self.value) >= 100:
            digits = 0
        elif abs(self.value) >= 10:
            digits = 1
        unit = f" {self.unit}".rstrip()
        return f"{self.value:,.{digits}f}" + self.plus_minus(f"{self.error:.{digits}f}") + unit

    def plus_minus(self, error):
        """ " ± error", or nothing for what has no standard error."""
        if not self.error:
            return ""
        return f" ± {error}"

def share(hits, n):
    """How many of n, with the standard error that Laplace's rule gives (above)."""
    assert 0 <= hits <= n and n > 0, (hits, n)
    p = (hits + 1) / (n + 2)
    return Measured(hits / n, math.sqrt(p * (1 - p) / (n + 2)), "%")

def share_of(outcomes):
    """The share of a list of True and False that is True."""
    outcomes = list(outcomes)
    return share(sum(1 for outcome in outcomes if outcome), len(outcomes))

def mean(values, unit=""):
    """The mean of independent numbers: the error is their standard deviation over √n."""
    values = list(values)
    n = len(values)
    average = sum(values) / n
    if n == 1:
        return Measured(average, math.inf, unit)
    variance = sum((value - average) ** 2 for value in values) / (n - 1)
    return Measured(average, math.sqrt(variance / n), unit)

def difference(after, before, unit=""):
    """The mean of after - before, number by number: for pairs, such as one question asked twice."""
    return mean([a - b for a, b in zip(after, before, strict=True)], unit)

def ratio(above, below, unit=""):
    """sum(above) / sum(below) over documents. The error is that of the mean of above - ratio·below
    (the delta method), so that long documents count for more."""
    total = sum(below)
    quotient = sum(above) / total
    rest = mean([a - quotient * b for a, b in zip(above, below, strict=True)])
    return Measured(quotient, rest.error * len(below) / total, unit)

def chi_squared(counts, expected):
    """Pearson's test of counts against expected counts → (χ², degrees of freedom, p-value).

    The p-value is the chance of so large a χ² if the counts do come from what was expected. Bins
    are expected to hold 5 or more, or else the formula is not exact (Cochran's rule).
    """
    import torch
    statistic = sum((count - e) ** 2 / e for count, e in zip(counts, expected, strict=True))
    freedom = len(counts) - 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return statistic, freedom, torch.special.gammaincc(half[0], half[1]).item()

# ---- Checks, findings, verdicts ------------------------------------------------------------------

@dataclass(frozen=True)
class Check:
    """One comparison that a claim rests on: `larger` should exceed `smaller`."""
    what: str
    larger: Measured
    smaller: Measured = Measured(0.0)

    @property
    def z(self):
        """The difference in standard errors; if both are exact, ±infinity or 0."""
        gap = self.larger.value - self.smaller.value
        error = math.hypot(self.larger.error, self.smaller.error)
        if math.isinf(error):
            return 0.0
        if error == 0 and gap:
            return math.copysign(math.inf, gap)
        return gap / (error or 1.0)

    @property
    def passes(self):
        return self.z >= LEAST_Z

    def __str__(self):
        verdict = "passes" if self.passes else "fails"
        text = f"{verdict}: {self.what}: {self.larger} against {self.smaller}"
        if math.isfinite(self.z):
            text += f" (z {self.z:.1f})"
        return text

@dataclass
class Finding:
    """What measuring a claim gave: `said` holds the figures in one line, `texts` what was asked and
    what came back."""
    said: str
    checks: list
    figures: dict = field(default_factory=dict)     # name: Measured
    texts: list = field(default_factory=list)

    @property
    def verdict(self):
        passed = [check for check in self.checks if check.passes]
        if not passed:
            return "not at this size"
        return "shown" if len(passed) == len(self.checks) else "partly shown"

class NotMeasured(Exception):
    """A part that a claim needs is not there; the message says what to do."""

# ---- Texts ---------------------------------------------------------------------------------------

def one_line(text, width=88):
    """A text on one line, cut at the end: line ends become ⏎, other control characters spaces."""
    text = str(text).replace("\n", "⏎")
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(text) <= width:
        return text
    return text[:width - 1] + "…"

def distinct_ngrams(words, n):
    """The share of the n-grams of a list of words that are different: low where a text repeats
    itself.

    >>> distinct_ngrams("the the the cat".split(), 2)
    0.6666666666666666
    """
    ngrams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    if not ngrams:
        return 0.0
    return len(set(ngrams)) / len(ngrams)

def matched_tokens(written, wanted):
    """How many tokens are the same from the beginning on.

    >>> matched_tokens([1, 2, 9, 4], [1, 2, 3, 4])
    2
    """
    n = 0
    for one, other in zip(written, wanted):
        if one != other:
            break
        n += 1
    return n
