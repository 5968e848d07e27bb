"""From results to numbers: differences in pairs, their intervals, harm, gain, verdicts."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from examples.never_hurt.cell import NONE, Cell, Result
from examples.never_hurt.sources import RANDOM_WEIGHTS

LEVEL = 0.95
RESAMPLES = 5000
WEIGHTED_SUM = "weighted_sum"


class Pair(NamedTuple):
    """What is transferred to what."""

    source: str
    target: str


class Setting(NamedTuple):
    """Cells that differ in their seeds alone."""

    source: str
    target: str
    regularizer: str
    rule: str
    strength: float

    @property
    def pair(self) -> Pair:
        """What is transferred to what."""
        return Pair(self.source, self.target)


class Estimate(NamedTuple):
    """A mean and the half width of its interval, in percentage points."""

    mean: float
    half_width: float

    @property
    def is_below(self) -> bool:
        """Whether the interval lies below zero."""
        return self.mean < -self.half_width

    @property
    def is_above(self) -> bool:
        """Whether the interval lies above zero."""
        return self.mean > self.half_width


class Interval(NamedTuple):
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


class Verdict(NamedTuple):
    """How often the settings of a rule fall below what they are compared with.

    Attributes:
        n_settings: How many there are.
        n_below: Those whose interval lies below zero.
        n_below_at_once: Those of them below zero at a level that holds for all at once (Holm).
        n_above: Those whose interval lies above zero.
        mean: Over all settings.
        worst: The setting of the lowest mean.
        worst_estimate: Its estimate.
    """

    n_settings: int
    n_below: int
    n_below_at_once: int
    n_above: int
    mean: float
    worst: Setting
    worst_estimate: Estimate

    @property
    def by_chance(self) -> float:
        """How many would be below if there were no difference at all."""
        return self.n_settings * (1 - LEVEL) / 2


class Gain(NamedTuple):
    """What a rule gains over plain fine-tuning at the strength that validation images choose.

    Attributes:
        strength: The chosen one.
        at_best: The difference on test images there, seed by seed.
    """

    strength: float
    at_best: np.ndarray


class Study:
    """The cells of one grid, compared with plain fine-tuning of the same seed.

    What a setting is compared with is the mean of plain runs that differ in the order of their
    batches, so that luck in one of them does not count against every rule.

    Args:
        results: One for each cell.

    Raises:
        ValueError: If a cell has no plain run of its seed.
    """

    def __init__(self, results: Iterable[Result]) -> None:
        self.accuracy: dict[Setting, dict[int, float]] = defaultdict(dict)
        self.validation: dict[Setting, dict[int, float]] = defaultdict(dict)
        self.results: dict[Setting, list[Result]] = defaultdict(list)
        plain: dict[Pair, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for result in results:
            cell, of_validation = result.cell, 100 * result.validation
            accuracy = of_validation if result.test is None else 100 * result.test
            pair = Pair(cell.source, cell.target)
            if cell.regularizer == NONE:
                plain[pair][cell.seed].append(accuracy)
            else:
                setting = setting_of(cell)
                self.accuracy[setting][cell.seed] = accuracy
                self.validation[setting][cell.seed] = of_validation
                self.results[setting].append(result)
        self.plain = _means(plain)
        for setting, of_seeds in self.accuracy.items():
            if missing := set(of_seeds) - set(self.plain.get(setting.pair, {})):
                raise ValueError(f"{setting} has no plain run of the seeds {sorted(missing)}.")

    @property
    def rules(self) -> list[str]:
        """In the order of the results."""
        return list(dict.fromkeys(setting.rule for setting in self.accuracy))

    @property
    def regularizers(self) -> list[str]:
        """In the order of the results."""
        return list(dict.fromkeys(setting.regularizer for setting in self.accuracy))

    @property
    def strengths(self) -> list[float]:
        """From the weakest to the strongest."""
        return sorted({setting.strength for setting in self.accuracy})

    def settings(self, **wanted: object) -> list[Setting]:
        """Those whose fields are as wanted."""
        return [
            setting
            for setting in self.accuracy
            if all(getattr(setting, name) == value for name, value in wanted.items())
        ]

    def against_plain(self, setting: Setting) -> np.ndarray:
        """Accuracy minus that of plain fine-tuning, in points, seed by seed."""
        plain = self.plain[setting.pair]
        return np.array([x - plain[seed] for seed, x in sorted(self.accuracy[setting].items())])

    def against_scratch(self, setting: Setting) -> np.ndarray:
        """Accuracy minus that of training from random weights, in points, seed by seed."""
        scratch = self.plain[Pair(RANDOM_WEIGHTS, setting.target)]
        return np.array([x - scratch[seed] for seed, x in sorted(self.accuracy[setting].items())])

    def against_sum(self, setting: Setting) -> np.ndarray:
        """Accuracy minus that of the weighted sum of the same strength, in points."""
        other = self.accuracy[setting._replace(rule=WEIGHTED_SUM)]
        return np.array([x - other[seed] for seed, x in sorted(self.accuracy[setting].items())])


def setting_of(cell: Cell) -> Setting:
    """What a cell shares with those of other seeds."""
    return Setting(cell.source, cell.target, cell.regularizer, cell.rule, cell.strength)


def _means(
    runs: Mapping[Pair, Mapping[int, Sequence[float]]],
) -> dict[Pair, dict[int, float]]:
    return {
        pair: {seed: float(np.mean(each)) for seed, each in of_seeds.items()}
        for pair, of_seeds in runs.items()
    }


def estimates(
    settings: Sequence[Setting], difference: Callable[[Setting], np.ndarray]
) -> dict[Setting, Estimate]:
    """The mean difference of each setting with the interval of Student's t.

    Three seeds tell little of their own spread. It is taken as the same in all settings of one
    rule and one target (whose number of images decides most of it) and pooled over them.

    Args:
        settings: Of one rule or more.
        difference: From a setting to its differences, seed by seed.

    Returns:
        One for each setting. With a single seed everywhere the interval is infinite.
    """
    estimated = {}
    for setting, (mean, error, degrees) in _pooled(settings, difference).items():
        reach = stats.t.ppf((1 + LEVEL) / 2, degrees) if degrees else np.inf
        estimated[setting] = Estimate(mean, float(reach * error) if degrees else np.inf)
    return estimated


def verdict(settings: Sequence[Setting], difference: Callable[[Setting], np.ndarray]) -> Verdict:
    """Counts the settings that fall below zero.

    Args:
        settings: Those of one rule.
        difference: From a setting to its differences, seed by seed.
    """
    estimated = estimates(settings, difference)
    p_values = sorted(
        float(stats.t.cdf(mean / error, degrees)) if degrees and error else float(mean >= 0)
        for mean, error, degrees in _pooled(settings, difference).values()
    )
    n = len(settings)
    at_once = 0
    for rank, p_value in enumerate(p_values):
        if p_value > (1 - LEVEL) / 2 / (n - rank):
            break
        at_once += 1
    worst = min(settings, key=lambda setting: estimated[setting].mean)
    return Verdict(
        n_settings=n,
        n_below=sum(each.is_below for each in estimated.values()),
        n_below_at_once=at_once,
        n_above=sum(each.is_above for each in estimated.values()),
        mean=float(np.mean([each.mean for each in estimated.values()])),
        worst=worst,
        worst_estimate=estimated[worst],
    )


def _pooled(
    settings: Sequence[Setting], difference: Callable[[Setting], np.ndarray]
) -> dict[Setting, tuple[float, float, int]]:
    """The mean of each setting, its standard error, and the degrees of freedom of that."""
    values = {setting: difference(setting) for setting in settings}
    squares: dict[tuple[str, str], float] = defaultdict(float)
    degrees: dict[tuple[str, str], int] = defaultdict(int)
    for setting, each in values.items():
        squares[setting.rule, setting.target] += float(np.sum((each - each.mean()) ** 2))
        degrees[setting.rule, setting.target] += len(each) - 1
    pooled = {}
    for setting, each in values.items():
        group = setting.rule, setting.target
        deviation = np.sqrt(squares[group] / max(1, degrees[group]))
        pooled[setting] = (
            float(each.mean()),
            float(deviation / np.sqrt(len(each))),
            degrees[group],
        )
    return pooled


def bootstrap_mean(groups: Sequence[Sequence[np.ndarray]], seed: int = 0) -> Interval:
    """The mean over settings, with an interval from resampling pairs and then seeds.

    Args:
        groups: For each pair of source and target its settings, each with differences by seed.
        seed: Of the resampling.

    Returns:
        The mean over all settings, and the percentile interval. What is drawn are pairs, and then
        seeds of each: settings of one pair and seed share their plain runs, and fall together.
    """
    rng = np.random.default_rng(seed)
    of_seeds = np.stack([np.mean(np.stack(group), axis=0) for group in groups])  # (pairs, seeds)
    sizes = np.array([len(group) for group in groups], float)
    n_pairs, n_seeds = of_seeds.shape
    pairs = rng.integers(n_pairs, size=(RESAMPLES, n_pairs))
    seeds = rng.integers(n_seeds, size=(RESAMPLES, n_pairs, n_seeds))
    means = of_seeds[pairs[:, :, None], seeds].mean(axis=2)
    weights = sizes[pairs]
    drawn = (means * weights).sum(axis=1) / weights.sum(axis=1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    whole = (of_seeds.mean(axis=1) * sizes).sum() / sizes.sum()
    return Interval(float(whole), float(low), float(high))


def by_pair(
    settings: Sequence[Setting], difference: Callable[[Setting], np.ndarray]
) -> list[list[np.ndarray]]:
    """Differences as `bootstrap_mean` wants them."""
    groups: dict[Pair, list[np.ndarray]] = defaultdict(list)
    for setting in settings:
        groups[setting.pair].append(difference(setting))
    return list(groups.values())


def best_gains(study: Study, rule: str) -> dict[tuple[Pair, str], Gain]:
    """For each pair and regularizer the gain at the strength that is best on validation images."""
    gains = {}
    for pair in study.plain:
        for regularizer in study.regularizers:
            settings = study.settings(
                source=pair.source, target=pair.target, regularizer=regularizer, rule=rule
            )
            if settings:
                best = max(settings, key=lambda each: np.mean([*study.validation[each].values()]))
                gains[pair, regularizer] = Gain(best.strength, study.against_plain(best))
    return gains


def kept_gain(study: Study, rule: str, seed: int = 0) -> Interval:
    """The rule's gain at best strengths, as a share of the weighted sum's, over all pairs.

    The interval is from resampling pairs. A share of next to nothing means nothing: see that the
    weighted sum gains something.
    """
    mine, sums = best_gains(study, rule), best_gains(study, WEIGHTED_SUM)
    keys = [key for key in sums if key in mine]
    ours = np.array([mine[key].at_best.mean() for key in keys])
    theirs = np.array([sums[key].at_best.mean() for key in keys])
    rng = np.random.default_rng(seed)
    index = rng.integers(len(keys), size=(RESAMPLES, len(keys)))
    shares = ours[index].sum(axis=1) / theirs[index].sum(axis=1)
    low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(ours.sum() / theirs.sum()), float(low), float(high))


def win_tie_loss(settings: Sequence[Setting], study: Study) -> tuple[int, int, int]:
    """Against the weighted sum: intervals above zero, across it, below it."""
    estimated = estimates(settings, study.against_sum).values()
    wins = sum(each.is_above for each in estimated)
    losses = sum(each.is_below for each in estimated)
    return wins, len(settings) - wins - losses, losses


def conflict_by_layer(study: Study, settings: Sequence[Setting]) -> tuple[list[str], np.ndarray]:
    """The share of steps in conflict: layers, and ``(layers, quarters)`` as a mean over cells."""
    maps = [result.conflict for setting in settings for result in study.results[setting]]
    names = list(maps[0])
    return names, np.mean([[each[name] for name in names] for each in maps], axis=0)
