"""
talk.py: numbers have the standard errors that the formulas give, a verdict follows from them alone,
each claim counts what its sentence says, and what is missing is said.
"""
import math
import random

import pytest

import claims
import claims_base
import claims_data
from claims import Check, Finding, Measured, chi_squared, difference, mean, ratio, share


# ---- numbers, errors, verdicts

def test_the_error_of_a_share_is_laplaces_and_never_0():
    assert share(5, 8).error == pytest.approx(math.sqrt(0.6 * 0.4 / 10))
    assert share(0, 10).value == 0 and share(0, 10).error > 0.05
    assert share(10, 10).error == pytest.approx(share(0, 10).error)


def test_the_errors_are_the_deviations_of_what_repeated_draws_give():
    """The oracle is a simulation: 2,000 samples of 40 documents."""
    rng = random.Random(0)
    means, ratios, errors = [], [], []
    for _ in range(2000):
        lengths = [rng.uniform(1, 9) for _ in range(40)]
        bits = [length * rng.gauss(2, 0.5) for length in lengths]
        means.append(mean(bits).value)
        ratios.append(ratio(bits, lengths).value)
        errors.append((mean(bits).error, ratio(bits, lengths).error))
    for values, error in zip((means, ratios), zip(*errors)):
        deviation = math.sqrt(sum((v - sum(values) / 2000) ** 2 for v in values) / 1999)
        assert sum(error) / 2000 == pytest.approx(deviation, rel=0.06)


def test_a_difference_of_pairs_knows_that_they_are_pairs():
    paired = difference([10.1, 20.1, 30.2], [10, 20, 30])
    assert paired.value == pytest.approx(0.4 / 3) and paired.error < 0.04
    with pytest.raises(ValueError):
        difference([1], [1, 2])


def test_chi_squared_is_pearsons_with_the_p_value_of_the_tables():
    """3.841 and 18.307 are the 5 % points of 1 and 10 degrees of freedom."""
    for freedom, point in ((1, 3.841459), (10, 18.307038)):
        bins = [10.0] * (freedom + 1)
        counts = [10 + math.sqrt(5 * point), 10 - math.sqrt(5 * point), *bins[2:]]
        statistic, found, p = chi_squared(counts, bins)
        assert (found, statistic) == (freedom, pytest.approx(point))
        assert p == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("gap, error, verdict", [
    (0.21, 0.1, "shown"), (0.19, 0.1, "not at this size"), (-1.0, 0.1, "not at this size"),
    (0.1, 0.0, "shown"), (0.0, 0.0, "not at this size"), (9.0, math.inf, "not at this size")])
def test_a_verdict_is_two_standard_errors_of_every_check(gap, error, verdict):
    passing = Check("sure", Measured(5.0, 1.0), Measured(1.0, 1.0))
    check = Check("unsure", Measured(1 + gap, error), Measured(1.0))
    assert Finding("", [passing, check]).verdict == verdict
    assert str(check).startswith("passes" if verdict == "shown" else "fails")


# ---- what is counted

def test_a_share_of_pairs_of_words_falls_where_a_text_repeats_itself():
    assert claims.distinct_ngrams("a b c d".split(), 2) == 1
    assert claims.distinct_ngrams("a b a b a b".split(), 2) == 2 / 5


def test_recited_tokens_are_counted_up_to_the_first_wrong_one():
    assert claims.matched_tokens([4, 5, 9, 7], [4, 5, 6, 7]) == 2
    assert claims.matched_tokens([4], [4, 5]) == 1 and claims.matched_tokens([], [4]) == 0


def test_the_bins_of_the_coin_hold_all_draws_and_5_or_more_are_expected():
    from collections import Counter
    order = [0.5, 0.3, 0.15, 0.03, 0.02]
    counts, expected = claims_base.binned(Counter({0: 60, 2: 20, 4: 20}), order, order)
    assert counts == [60, 0, 20, 20] and expected == pytest.approx([50, 30, 15, 5])


def test_a_smaller_vocabulary_is_the_first_merges(tokenizer):
    text = "the function returns the number"
    small = claims_data.cut(tokenizer, 300)
    ids = small.encode_ordinary(text)
    assert max(ids) < 300 and small.decode(ids) == text
    lengths = [len(claims_data.cut(tokenizer, n).encode_ordinary(text)) for n in (256, 300, 400)]
    assert lengths[0] == len(text) > lengths[1] > lengths[2]
