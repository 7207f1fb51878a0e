"""Trains arms on paired seeds and compares them."""

import os
import pathlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_count
from keras_stab.arguments import checked_number
from keras_stab.diagnostics.extras import extra
from keras_stab.diagnostics.report import run_plan
from keras_stab.diagnostics.report import workers
from keras_stab.diagnostics.report.checks import QUESTIONS
from keras_stab.diagnostics.report.checks import checked_options
from keras_stab.diagnostics.report.findings import StabilityReport
from keras_stab.diagnostics.report.findings import pick_metric
from keras_stab.diagnostics.report.run_files import RunFiles
from keras_stab.diagnostics.report.run_plan import RunSeeds


def stability_report(
    build_and_fit: Callable[
        [keras.optimizers.Optimizer, RunSeeds], float | dict[str, Any]
    ],
    arms: Mapping[str, Callable[[], keras.optimizers.Optimizer]],
    seeds: int | Iterable[int | tuple[int, int]] = 8,
    folder: str | os.PathLike = "stability_report",
    metric: str | None = None,
    vary: str = "both",
    processes: int = 1,
    settings: dict[str, Any] | None = None,
    level: float = 0.95,
    questions: Sequence[str] = QUESTIONS,
    higher_is_better: bool | None = None,
    relevant_difference: float | None = None,
    failure_score: float | None = None,
    test_rows: int | None = None,
    unit: str = "",
    pictures: bool = True,
    progress: bool = True,
) -> StabilityReport:
    r"""Did a method help? Trains every arm on the same seeds and compares.

    Each arm is compared with the first one, the baseline, seed by seed: mean
    difference, ratio of standard deviations, failed runs; with intervals, and
    with a verdict that can be "cannot tell" (see
    `keras_stab.compare_scores`). `report.md`, `report.json` and the pictures
    are written to `folder`.

    Each finished run is one file in `folder/runs`. If the work is interrupted
    (Ctrl-C, a killed process), the same call does what is missing; a call with
    more seeds or more arms adds those. If the code of `build_and_fit`, an
    optimizer's configuration, `settings`, the backend or a version has
    changed, the old runs are refused. Changes in what `build_and_fit` calls
    are not noticed: put what may change there into `settings`.

    Args:
        build_and_fit: Function of `(optimizer, seeds)` that builds a model,
            trains it and returns its score: a number, or a dict of numbers
            by name. The dict may also hold `"predictions"` on the test set
            (classes, or a score for each class), `"targets"` (the true
            classes), and lists of numbers, such as the score after each
            epoch, which are kept. `keras.utils.set_random_seed(
            seeds.initialisation)` has been called before; `seeds.order` is for
            the order of the data: call `set_random_seed(seeds.order)` when the
            model is built, or pass it to what shuffles.
        arms: Dict from name to a function without arguments that makes a new
            optimizer. The first is the baseline.
        seeds: Int, how many; or a list of ints, or of pairs `(initialisation,
            order)`. At least two. Defaults to 8.
        folder: Path. Defaults to `"stability_report"`.
        metric: String, name of the number to compare if there are several.
            Defaults to `None`.
        vary: `"both"`; or `"initialisation"` or `"order"`, which keeps the
            other seed at 0. Defaults to `"both"`.
        processes: Int, how many spawned processes train side by side; 1
            trains in this one. They share the machine: limit threads
            (`OMP_NUM_THREADS`) and the memory of an accelerator yourself.
            Defaults to 1.
        settings: Dict of anything that JSON can hold; it is part of the
            configuration. Defaults to `None`.
        level: Float, the confidence with which all intervals of the report
            hold together. Defaults to 0.95.
        questions: What to ask: a list or tuple of `"mean"`, `"spread"` or
            both. Defaults to both.
        higher_is_better: Boolean; `None` stands for `False` if the metric's
            name contains "loss" or "error", else for `True`. Defaults to
            `None`.
        relevant_difference: Float, the smallest difference that matters.
            Defaults to `None`.
        failure_score: Float; a run whose score is not better than this (that
            of always predicting the most frequent class, for example) counts
            as failed but keeps its score. Defaults to `None`.
        test_rows: Int, rows of the test set, if the metric is the share (or
            percentage) of rows that are right. Not needed with `"targets"`.
            Defaults to `None`.
        unit: String behind differences, such as `"points"`. Defaults to `""`.
        pictures: Boolean, whether to draw, which needs matplotlib. Defaults
            to `True`.
        progress: Boolean, whether a progress bar is shown. Defaults to
            `True`.

    Returns:
        A `StabilityReport`: `print` it, or see its `comparisons` and its
        `verdict`.

    Raises:
        ValueError: If an argument is out of range, a metric is missing, or
            the folder holds damaged runs or runs of another configuration.
        RuntimeError: If a process was killed; what is finished is kept.
        ImportError: If scipy, or matplotlib for `pictures`, is missing.

    A run that raises `FloatingPointError` or `OverflowError`, that runs out of
    memory, or whose metrics are not all finite, is recorded as failed and not
    repeated. Any other exception is a mistake in the code and is raised.

    Example:

    >>> import tempfile
    >>> import keras, keras_stab
    >>> x = keras.random.normal((64, 4), seed=0)
    >>> y = keras.ops.sum(x, axis=1, keepdims=True)
    >>> def build_and_fit(optimizer, seeds):
    ...     model = keras.Sequential(
    ...         [keras.Input((4,)), keras.layers.Dense(1)]
    ...     )
    ...     model.compile(optimizer, loss="mse")
    ...     keras.utils.set_random_seed(seeds.order)
    ...     history = model.fit(x, y, epochs=2, verbose=0)
    ...     return {"loss": history.history["loss"][-1]}
    >>> report = keras_stab.stability_report(
    ...     build_and_fit,
    ...     {
    ...         "SGD": lambda: keras.optimizers.SGD(0.01),
    ...         "SAM": lambda: keras_stab.SAM(keras.optimizers.SGD(0.01)),
    ...     },
    ...     seeds=2,
    ...     folder=tempfile.mkdtemp(),
    ...     pictures=False,
    ...     progress=False,
    ... )
    >>> print(report.comparisons["SAM"].pairs)
    2
    """
    extra("scipy.stats", "`stability_report`")
    if pictures:
        extra("matplotlib.figure", "`stability_report` with `pictures=True`")
    # All checks come first, even of what is needed only after hours.
    processes = checked_count("processes", processes, 1)
    level, questions, relevant_difference = checked_options(
        level, questions, relevant_difference
    )
    checked_boolean("higher_is_better", higher_is_better, optional=True)
    failure_score = checked_number(
        "failure_score", failure_score, optional=True
    )
    test_rows = checked_count("test_rows", test_rows, 1, optional=True)
    if not callable(build_and_fit):
        raise ValueError(
            "`build_and_fit` must be a function of (optimizer, seeds) that "
            "trains a new model and returns its score. Received: "
            f"build_and_fit={build_and_fit!r}"
        )
    checked_boolean("pictures", pictures)
    checked_boolean("progress", progress)
    for argument, value in (("unit", unit), ("metric", metric or "")):
        if not isinstance(value, str):
            raise ValueError(
                f"`{argument}` must be a string. Received: {argument}={value!r}"
            )
    folder = pathlib.Path(folder)
    arms = run_plan.make_arms(arms)
    seeds = run_plan.make_seeds(seeds, vary)
    runs, metric = _all_runs(
        build_and_fit,
        arms,
        seeds,
        folder,
        metric,
        processes,
        settings,
        progress,
    )
    report = StabilityReport.from_runs(
        runs,
        folder=folder,
        metric=metric,
        level=level,
        questions=questions,
        higher_is_better=higher_is_better,
        relevant_difference=relevant_difference,
        failure_score=failure_score,
        test_rows=test_rows,
        unit=unit,
    )
    report.write(pictures)
    return report


def _all_runs(
    build_and_fit, arms, seeds, folder, metric, processes, settings, progress
):
    """Dict from arm to records in the order of the seeds, and the metric."""
    tasks, done = [], {}
    configurations = {
        arm: run_plan.configuration(build_and_fit, make, settings)
        for arm, make in arms.items()
    }
    if processes > 1:
        workers.check_sendable("`build_and_fit`", build_and_fit)
        for arm, make in arms.items():
            workers.check_sendable(f"Arm {arm!r}", make)
    files = RunFiles(folder)
    # Seed by seed, so that what an interruption leaves is paired.
    for each in seeds:
        for arm, make in arms.items():
            record = files.read(arm, each, configurations[arm])
            if record is not None:
                done[arm, each] = record
                continue
            tasks.append(
                {
                    "arm": arm,
                    "seeds": each,
                    "make_optimizer": make,
                    "path": files.path(arm, each),
                    "configuration": configurations[arm],
                }
            )
    for record in done.values():
        metric = pick_metric(record, metric)
    with _progress_bar(progress and bool(tasks)) as bar:
        row = bar.add_task(
            "", total=len(seeds) * len(arms), completed=len(done)
        )
        for task, record in _perform(tasks, build_and_fit, processes):
            done[task["arm"], task["seeds"]] = record
            # A missing name is reported at once, not after hours.
            metric = pick_metric(record, metric)
            bar.update(
                row,
                advance=1,
                description=f"{task['arm']}, seeds {tuple(task['seeds'])}",
            )
        bar.update(row, description="Trained")
    return {arm: [done[arm, each] for each in seeds] for arm in arms}, metric


def _perform(tasks, build_and_fit, processes):
    if processes > 1:
        yield from workers.perform_all(tasks, build_and_fit, processes)
        return
    for task in tasks:
        yield task, workers.finish(task, build_and_fit)


def _progress_bar(visible):
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not visible,
    )
