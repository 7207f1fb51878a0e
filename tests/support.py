"""What was tested of which method: recorded by pytest, joined to a page.

    pytest tests/test_contract.py --record-support=build/support/jax.json
    python tests/support.py build/support/*.json --output guides/support.md

`make support` does both, on every backend, slow rows included. A cell of the
page is the worst outcome of all checks of the contract suite behind it.
"""

import argparse
import json
import pathlib
import re

# Title of a column: the checks behind it, as patterns of the tests' names.
COLUMNS = {
    "`fit`": r"test_golden_steps\[False|test_two_fits_are_one|"
    "test_weights_move_once_a_period",
    "`run_eagerly`": r"test_golden_steps\[True|test_ways_to_execute_agree",
    "`jit_compile`": "test_ways_to_execute_agree|"
    "test_no_retrace_after_the_second_step",
    "`mixed_float16`": r"test_mixed_precision\[mixed_float16|"
    r"test_mixed_precision\[.*-mixed_float16",
    "`mixed_bfloat16`": r"test_mixed_precision\[(.*-)?mixed_bfloat16",
    "accumulation": "test_gradient_accumulation",
    "`steps_per_execution`": "test_ways_to_execute_agree",
    "frozen layers": "test_frozen_layers_and_variables_without_gradient",
    "save and resume": "test_resume_in_a_fresh_process|test_two_fits_are_one|"
    "test_config_round_trip",
    "`DataParallel` (JAX)": "test_data_parallel",
}
KERAS_CALLBACKS = (
    "LearningRateScheduler",
    "ReduceLROnPlateau",
    "ModelCheckpoint",
    "EarlyStopping",
    "BackupAndRestore",
    "CSVLogger",
    "TerminateOnNaN",
    "LambdaCallback",
    "SwapEMAWeights",
)
OWN_CALLBACKS = (
    "AveragedWeights",
    "SwapSlowWeights",
    "StabilityMonitor",
    "StartBoostAtLoss",
    "RecoverFromSpikes",
)
COLUMNS |= {
    f"`{name}`": rf"test_callback\[.*-{name}\]"
    for name in KERAS_CALLBACKS + OWN_CALLBACKS
}
# Checked on one backend because Keras has it on no other.
ONLY = {"`DataParallel` (JAX)": ("jax",)}
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
# From the best outcome to the worst.
OUTCOMES = {
    "passed": "yes",
    "eager": "eager",
    "absent": "not in Keras",
    "refused": "refused",
    "untested": "**untested**",
    "failed": "**fails**",
}
# Rows of the contract table that are no methods of ours.
HELPERS = ("Transparent", "AskingNothing")


def columns_of(name):
    """Titles of the columns that a test, by its name, stands for."""
    return [
        title for title, pattern in COLUMNS.items() if re.match(pattern, name)
    ]


# ---- Recording: hooks of pytest, which conftest.py imports ------------------


def pytest_addoption(parser):
    parser.addoption(
        "--record-support", help="file for what the contract suite found"
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--record-support"):
        return
    for item in items:
        row = getattr(item, "callspec", None)
        row = row and row.params.get("row")
        titles = columns_of(item.name)
        if row is None or not titles or row.nested:
            continue
        if not any(helper in row.name for helper in HELPERS):
            # These travel with the reports of other processes.
            item.user_properties.append(("row", row.name))
            item.user_properties.append(("columns", titles))


def pytest_configure(config):
    path = config.getoption("--record-support")
    # Of several processes the first one hears all reports.
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path), "support recorder")


class Recorder:
    """Writes the outcome of every method and column of a session."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.rows = {}

    def pytest_runtest_logreport(self, report):
        told = {name: value for name, value in report.user_properties}
        if "row" not in told or (report.when != "call" and report.passed):
            return
        said = told.get("support", "passed")
        if not report.passed:
            said = "failed" if report.failed else "untested"
        cells = self.rows.setdefault(told["row"], {})
        for title in told["columns"]:
            # Of one column, or of all columns that the check stands for.
            one = isinstance(said, dict)
            outcome = said.get(title, "passed") if one else said
            cells[title] = worst(cells.get(title, "passed"), outcome)

    def pytest_sessionfinish(self):
        import keras

        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "backend": keras.backend.backend(),
            "keras": keras.version(),
            "rows": self.rows,
        }
        self.path.write_text(json.dumps(record, indent=1) + "\n")


# ---- Joining ---------------------------------------------------------------


def worst(*outcomes):
    return max(outcomes, key=list(OUTCOMES).index)


def cell(records, row, title):
    """What a column says of a row, on all backends."""
    found = {
        backend: records[backend]["rows"].get(row, {}).get(title, "untested")
        for backend in ONLY.get(title, BACKENDS)
    }
    if len(set(found.values())) == 1:
        return OUTCOMES[next(iter(found.values()))]
    usual = [b for b, outcome in found.items() if outcome == "passed"]
    words = ["yes"] if usual else []
    words += [
        f"{BACKENDS[backend]}: {OUTCOMES[outcome]}"
        for backend, outcome in found.items()
        if backend not in usual
    ]
    return "; ".join(words)


def table(records, titles):
    rows = sorted(
        {row for backend in BACKENDS for row in records[backend]["rows"]}
    )
    lines = [["method", *titles], ["---"] * (len(titles) + 1)]
    for row in rows:
        cells = [cell(records, row, title) for title in titles]
        lines.append([f"`{row}`", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAGE = """# What was tested

Made from the outcomes of the contract suite (`tests/test_contract.py`) on
TensorFlow, JAX and PyTorch, Keras {keras}; no cell is written by hand
(`make support`).

- "yes": the checks passed on the three backends.
- "refused": a clear error says what to do instead, and a test sees it.
- "eager": Keras runs PyTorch eagerly unless told otherwise, and so do the
  tests. With `jit_compile=True` (`torch.compile`, a minute a model) methods
  that take gradients themselves, such as GRAIN, SAM and ScheduleFree, warn and
  train uncompiled; for the others, such as LAMB and Lookahead, Keras compiles.
- "not in Keras": Keras itself has it not on that backend.

A wrapper was tested around SGD, SGD with momentum, AdamW or LAMB, as the
check has it; `GRAIN-K` has K groups, `Aggregate-upgrad` is `Aggregate` with
rule "upgrad". [How to choose a method](how_to_choose.md) tells what each is
for.

{features}

`jit_compile` is XLA on TensorFlow and JAX: the compiled step agrees with the
eager one and is not compiled again. Where IRE draws labels, XLA on TensorFlow
draws others than the eager step: there only the second was tested.

Several devices: `DataParallel` is Keras's own and works on JAX. What was
tested with it, `ModelParallel`, `MirroredStrategy` and processes of PyTorch is
in [many devices](many_devices.md). `MultiWorkerMirroredStrategy` fails in Keras
3.15.1 with plain Adam.

## Callbacks of Keras

Each has a test of its own effect (`tests/callback_cases.py`): a rate of 0
holds the weights still; a checkpoint has every number of its epoch; a run
that was interrupted in an epoch and restored ends as the one that was not.

{keras_callbacks}

`SwapEMAWeights` needs an optimizer with `use_ema=True` and is refused where
that is: those methods keep an average themselves or train points that should
not be averaged. `TensorBoard` needs a package that no backend brings and
`RemoteMonitor` a server; neither was tested.

## Callbacks of keras_stab

{own_callbacks}

`AveragedWeights` is refused without a `WeightAveraging` in the optimizer,
`SwapSlowWeights` without a second set of weights and `StartBoostAtLoss`
without `IRE(start_step="manual")`. `StabilityMonitor` had a `probe` for LARS,
TVLARS, LAMB and ScheduleFree, which have no figures by themselves as they
were made here.
"""


def page(records):
    own, keras = (
        [f"`{name}`" for name in names]
        for names in (OWN_CALLBACKS, KERAS_CALLBACKS)
    )
    rest = [title for title in COLUMNS if title not in own + keras]
    return PAGE.format(
        keras=records["jax"]["keras"],
        features=table(records, rest),
        keras_callbacks=table(records, keras),
        own_callbacks=table(records, own),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=pathlib.Path, nargs="+")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args(argv)
    records = {}
    for path in options.records:
        record = json.loads(path.read_text())
        records[record["backend"]] = record
    missing = sorted(set(BACKENDS) - set(records))
    if missing:
        parser.error(f"there is no record of {', '.join(missing)}")
    text = page(records)
    options.output.write_text(text)
    for bad in ("untested", "failed"):
        if OUTCOMES[bad] in text:
            raise SystemExit(f"{options.output}: some cells are {bad}.")


if __name__ == "__main__":
    main()
