"""The words of a verdict."""

import math

CANNOT_TELL = "cannot tell"


def judge(comparison, questions, sign, relevant, unit, failures_differ):
    """Answers and sentences for a `Comparison`.

    Args:
        comparison: `Comparison` with its figures.
        questions: Tuple of `"mean"` and `"spread"`.
        sign: 1 if higher scores are better, else -1.
        relevant: Float, the smallest difference that matters, or `None`.
        unit: String behind differences.
        failures_differ: Boolean, whether one arm fails more often than
            chance explains.

    Returns:
        Tuple of a dict from question to answer and a list of sentences.
    """
    answers, sentences = {}, []
    unit = unit and " " + unit
    if any(comparison.failed):
        answers["failures"], sentence = _failures(comparison, failures_differ)
        sentences.append(sentence)
    if "mean" in questions:
        answers["mean"], sentence = _mean(comparison, sign, relevant, unit)
        sentences.append(sentence)
    if "spread" in questions:
        answers["spread"], sentence = _spread(comparison)
        sentences.append(sentence)
    return answers, sentences


def percent(level):
    return f"{100 * level:.3g} %"


def decimals(interval):
    """Digits after the point that show an interval to three figures."""
    half = (interval.high - interval.low) / 2
    # An interval without width still has a last digit.
    half = max(half, 1e-3 * abs(interval.value))
    if not half or not math.isfinite(half):
        return 2
    return max(0, 2 - math.floor(math.log10(half)))


def ends(interval, level, digits=None):
    """`95 % interval 1.20 to 5.00`"""
    digits = decimals(interval) if digits is None else digits
    return f"{percent(level)} interval {span(interval, digits)}"


def span(interval, digits):
    """`1.20 to 5.00`"""
    low, high = (number(x, digits) for x in (interval.low, interval.high))
    return f"{low} to {high}"


def number(value, digits, sign=""):
    """A number with this many digits after the point, but never `-0.00`."""
    text = f"{value:{sign}.{digits}f}"
    return text.replace("-", sign, 1) if not float(text) else text


def _mean(comparison, sign, relevant, unit):
    first, second = comparison.baseline, comparison.arm
    interval, level = comparison.difference, comparison.level
    if interval is None:
        return CANNOT_TELL, (
            f"We cannot tell which is better: {comparison.pairs} of "
            f"{comparison.runs} pairs of runs have two scores, and at least "
            "two are needed."
        )
    digits = decimals(interval)
    size = number(interval.value, digits, "+") + unit
    seen = f"{second} minus {first} is {size}"
    if (
        relevant is not None
        and -relevant < interval.low
        and (interval.high < relevant)
    ):
        return "no relevant difference", (
            f"No difference that matters: {seen} ({ends(interval, level)}), "
            f"within {relevant:g} either way."
        )
    if not any(comparison.deviations):
        return CANNOT_TELL, (
            f"We cannot tell: {seen}, but every run of an arm gave the same "
            "score. Do the runs use their seeds?"
        )
    if interval.contains(0.0):
        return CANNOT_TELL, (
            f"We cannot tell: {seen}, {ends(interval, level)}, which contains "
            f"0. {_advice(comparison, relevant, unit, digits)}"
        )
    resampled = comparison.difference_resampled
    if resampled is not None and resampled.contains(0.0):
        return CANNOT_TELL, (
            f"We cannot tell: {seen}. Its {ends(interval, level)} (Student's "
            "t) excludes 0; the one from resampled pairs does not "
            f"({span(resampled, digits)}). "
            f"{_advice(comparison, relevant, unit, digits)}"
        )
    word = "better" if sign * interval.value > 0 else "worse"
    if interval.value < 0:
        interval = type(interval)(
            -interval.value, -interval.high, -interval.low
        )
    return word, (
        f"{second} is {word} by {interval.value:.{digits}f}{unit} "
        f"({ends(interval, level)})."
    )


def _advice(comparison, relevant, unit, digits):
    text = (
        f"{comparison.pairs} pairs like these find a difference of "
        f"{comparison.detectable:.{digits}f}{unit} four times in five"
    )
    if relevant is None:
        return text + "."
    return (
        f"{text}; to find {relevant:g} takes {comparison.seeds_needed} seeds."
    )


def _spread(comparison):
    first, second = comparison.baseline, comparison.arm
    interval, level = comparison.ratio, comparison.level
    if interval is None:
        reason = (
            "at least three pairs are needed"
            if comparison.pairs < 3
            else "the scores of an arm are all the same"
        )
        return CANNOT_TELL, f"We cannot tell which is steadier: {reason}."
    seen = (
        f"the standard deviation of {second} is {interval.value:.2f} times "
        f"that of {first} ({ends(interval, level, 2)})"
    )
    if interval.contains(1.0):
        return CANNOT_TELL, f"We cannot tell which is steadier: {seen}."
    if comparison.swap_p_value > 1 - level:
        return CANNOT_TELL, (
            f"We cannot tell which is steadier: {seen}, but a test that does "
            "not assume normal scores does not confirm it (p = "
            f"{comparison.swap_p_value:.2g}; {comparison.pairs} pairs allow "
            f"{2 / 2**comparison.pairs:.2g} at best)."
        )
    word = "steadier" if interval.value < 1 else "less steady"
    return word, f"{second} is {word}: {seen}."


def _failures(comparison, differ):
    first, second = comparison.failed
    counts = (
        f"{second} of {comparison.runs} runs with {comparison.arm} failed and "
        f"{first} of {comparison.runs} with {comparison.baseline}"
    )
    lost = comparison.runs - comparison.pairs
    note = (
        f" What follows leaves out {lost} pair{'s' * (lost != 1)} with a run "
        "that has no score, which flatters the arm that fails more often."
        if lost
        else ""
    )
    if not differ:
        return CANNOT_TELL, f"{counts}: too few to tell them apart.{note}"
    answer = "fewer" if second < first else "more"
    return answer, f"{counts}: {answer} than chance explains.{note}"
