"""Time to put an average into a model and out again, against Keras's own.

    python benchmarks/swap_time.py

Ten million weights, on every backend; the median of some swaps, ours and
those of `keras.callbacks.SwapEMAWeights` in turns. Results:
`benchmarks/results/swap_time_cpu.md` and the `.json` beside it.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

from timing import results as files
from timing import workers

WIDTH = 3163


def measure(options):
    """Milliseconds to put the average in and out again, ours and Keras's."""
    import keras

    import keras_stab

    def prepared(optimizer):
        model = keras.Sequential(
            [keras.Input((WIDTH,)), keras.layers.Dense(WIDTH)]
        )
        model.compile(optimizer, "mse")
        x = keras.ops.ones((1, WIDTH))
        model.train_on_batch(x, x)
        return model

    ours = prepared(
        keras_stab.WeightAveraging(keras.optimizers.SGD(0.1), method="ema")
    )
    stock = prepared(keras.optimizers.SGD(0.1, use_ema=True))
    callback = keras.callbacks.SwapEMAWeights()
    callback.set_model(stock)
    ways = {
        "keras_stab": (
            lambda: ours.optimizer.swap_in(ours),
            lambda: ours.optimizer.swap_out(ours),
            ours,
        ),
        "SwapEMAWeights": (
            callback.on_test_begin,
            callback.on_test_end,
            stock,
        ),
    }

    def settle(model):
        # Reading one number waits for what was queued before.
        for variable in model.trainable_variables:
            value = keras.ops.reshape(variable.value, (-1,))[:1]
            keras.ops.convert_to_numpy(value)

    times = {name: [] for name in ways}
    for _ in range(options["repeats"] + 1):
        for name, (swap_in, swap_out, model) in ways.items():
            gc.collect()
            settle(model)
            begun = time.perf_counter()
            swap_in()
            settle(model)
            swap_out()
            settle(model)
            times[name].append(time.perf_counter() - begun)
    return {
        name: 1e3 * statistics.median(seconds[1:])
        for name, seconds in times.items()
    }


def to_markdown(results):
    machine = results["machine"]
    lines = [
        "# Time of swapping an average in and out",
        "",
        f"Measured on {machine['device']} ({machine['processor']}, "
        f"{machine['cores']} cores) on {machine['date']} by `python "
        f"benchmarks/swap_time.py`: {WIDTH * (WIDTH + 1):,} weights, in and "
        "out again, milliseconds.",
        "",
        "| Backend | keras_stab | keras.callbacks.SwapEMAWeights | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for backend, figures in results["entries"].items():
        own, stock = figures["keras_stab"], figures["SwapEMAWeights"]
        lines.append(
            f"| {backend} | {own:.1f} | {stock:.1f} | {own / stock:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backends", nargs="+", default=list(workers.BACKENDS))
    add("--repeats", type=int, default=15)
    default = files.RESULTS / "swap_time_cpu.json"
    add("--output", type=Path, default=default)
    options = parser.parse_args(arguments)
    results = {"machine": workers.describe_machine("cpu"), "entries": {}}
    asked = {"repeats": options.repeats}
    for backend, answer in workers.answers(__file__, options.backends, asked):
        results["entries"][backend] = answer
    files.write(results, options.output, to_markdown)
    print(f"Written: {options.output}")


if __name__ == "__main__":
    workers.run_script({"measure": measure}, main)
