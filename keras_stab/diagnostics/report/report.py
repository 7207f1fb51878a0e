"""Trains arms on paired seeds and says what can be said about them."""

import pathlib

from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn

from keras_stab.diagnostics.extras import extra
from keras_stab.diagnostics.report import processes as workers
from keras_stab.diagnostics.report import run_plan
from keras_stab.diagnostics.report.comparison import QUESTIONS
from keras_stab.diagnostics.report.comparison import check_options
from keras_stab.diagnostics.report.findings import StabilityReport
from keras_stab.diagnostics.report.findings import pick_metric
from keras_stab.diagnostics.report.run_files import RunFiles


def stability_report(
    build_and_fit,
    arms,
    seeds=8,
    folder="stability_report",
    metric=None,
    vary="both",
    processes=1,
    settings=None,
    level=0.95,
    questions=QUESTIONS,
    higher_is_better=None,
    relevant_difference=None,
    failure_score=None,
    test_rows=None,
    unit="",
    pictures=True,
    progress=True,
):
    r"""Did a method help? Trains every arm on the same seeds and compares.

    Each arm is compared with the first one, the baseline, seed by seed: mean
    difference, ratio of standard deviations, failed runs; with intervals, and
    with a verdict that can be "cannot tell" (see
    `keras_stab.compare_scores`). `report.md`, `report.json` and two pictures
    are written to `folder`.

    A finished run is one file in `folder/runs`. If the work is interrupted
    (Ctrl-C, a killed process), the same call does what is missing; so do more
    seeds or more arms later. If the code of `build_and_fit`, an optimizer's
    configuration, `settings`, the backend or a version has changed, the old
    runs are refused. What `build_and_fit` calls cannot be seen: put what may
    change there into `settings`.

    Args:
        build_and_fit: Function of `(optimizer, seeds)` that builds a model,
            trains it and returns its score: a number, or a dict of numbers
            by name. The dict may also hold `"predictions"` on the test set
            (classes, or a score for each class), `"targets"` (their true
            classes), and lists of numbers, such as the score after each
            epoch, which are kept. `keras.utils.set_random_seed(
            seeds.initialisation)` has been called; `seeds.order` is for the
            order of the data: call `set_random_seed(seeds.order)` when the
            model is built, or hand it to what shuffles.
        arms: Dict from name to a function without arguments that makes a new
            optimizer. The first is the baseline.
        seeds: Int, how many; or a list of ints, or of pairs `(initialisation,
            order)`. At least two. Defaults to 8.
        folder: Path. Defaults to `"stability_report"`.
        metric: String, the number to compare if there are several. Defaults
            to `None`.
        vary: `"both"`; `"initialisation"` or `"order"` keep the other seed at
            0. Defaults to `"both"`.
        processes: Int, how many spawned processes train side by side; 1
            trains in this one. They share the machine: see to threads
            (`OMP_NUM_THREADS`) and to the memory of an accelerator yourself.
            Defaults to 1.
        settings: What JSON can hold; a change of it is a change of the
            configuration. Defaults to `None`.
        level: Float, the confidence with which all intervals of the report
            hold together. Defaults to 0.95.
        questions: What to ask, any of `"mean"` and `"spread"`. Defaults to
            both.
        higher_is_better: Boolean; `None`: `False` if the metric's name holds
            "loss" or "error". Defaults to `None`.
        relevant_difference: Float, the smallest difference that matters.
            Defaults to `None`.
        failure_score: Float; a run whose score is not better counts as failed
            (that of the most frequent class, say) but keeps its score.
            Defaults to `None`.
        test_rows: Int, of the test set, if the metric is the share of rows
            (or percentage) that are right. Known from `"targets"`, too.
            Defaults to `None`.
        unit: String behind differences, such as `"points"`. Defaults to `""`.
        pictures: Boolean; they need matplotlib. Defaults to `True`.
        progress: Boolean, whether a progress bar is shown. Defaults to
            `True`.

    Returns:
        `StabilityReport`: print it; `report.comparisons`, `report.verdict`.

    Raises:
        ValueError: If an argument is out of range, a metric is missing, or
            the folder holds runs of another configuration.
        RuntimeError: If a process was killed; what is finished is kept.
        ImportError: If scipy, or matplotlib for `pictures`, is missing.

    A run that raises `FloatingPointError` or `OverflowError`, runs out of
    memory, or whose metrics are not all finite, is recorded as failed and not
    run again. Any other exception is a mistake in the code and is raised.

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
    if isinstance(processes, bool) or processes < 1:
        raise ValueError(
            f"`processes` must be a positive int. Received: {processes!r}"
        )
    check_options(level, questions, relevant_difference)
    arms = run_plan.make_arms(arms)
    seeds = run_plan.make_seeds(seeds, vary)
    runs = _all_runs(
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
        folder=pathlib.Path(folder),
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
    """Dict from arm to its records in the order of the seeds."""
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
        pick_metric(record, metric)
    with _progress_bar(progress and bool(tasks)) as bar:
        row = bar.add_task(
            "", total=len(seeds) * len(arms), completed=len(done)
        )
        for task, record in _perform(tasks, build_and_fit, processes):
            done[task["arm"], task["seeds"]] = record
            # A name that is missing is told at once, not after hours.
            pick_metric(record, metric)
            bar.update(
                row,
                advance=1,
                description=f"{task['arm']}, seeds {tuple(task['seeds'])}",
            )
        bar.update(row, description="Trained")
    return {arm: [done[arm, each] for each in seeds] for arm in arms}


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
