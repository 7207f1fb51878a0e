"""Time of the largest Hessian eigenvalue, against its products alone.

    python benchmarks/sharpness_time.py

One process per backend. `keras_stab.sharpness` makes a number of products
with the Hessian of the loss; the same number of products, compiled as bare as
they can be (one batch, lists of tensors, no flat vectors, nothing read in
between), take turns with it. A gradient is timed too. Both are compiled
before. Results: `benchmarks/results/sharpness_time_cpu.md` and the `.json`
beside it.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

from models import build_model
from models import make_data
from timing import results as files
from timing import workers

TARGET = 1.3
MODELS = {"mlp": 256, "cnn": 64, "transformer": 64}


def measure(options):
    """Seconds of both ways, for one backend and all models."""
    return {
        "models": {
            name: _measure_model(name, options) for name in options["models"]
        },
        "versions": workers.versions(),
    }


def _measure_model(name, options):
    import keras

    import keras_stab
    from keras_stab import keras_internals
    from keras_stab.backend import differentiation
    from keras_stab.backend import jacobians
    from keras_stab.backend import tracing

    model = build_model(name)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    x, y = make_data(name, MODELS[name])
    x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)
    model(x)
    variables = model.trainable_variables
    others = model.non_trainable_variables
    values = [tracing.read(v) for v in variables]
    state = [tracing.read(v) for v in others]

    def batch_loss(values, state, x, y):
        mapping = [*zip(variables, values), *zip(others, state)]
        with keras.StatelessScope(mapping, collect_losses=True):
            y_pred = model(x, training=False)
            return keras_internals.compute_loss(
                model, x, y, y_pred, None, training=False
            )

    @tracing.compiled
    def bare(values, state, x, y, vectors):
        return jacobians.hessian_vector_product(
            lambda values: batch_loss(values, state, x, y), values, vectors
        )

    @tracing.compiled
    def gradient(values, state, x, y):
        return differentiation.value_and_gradients(
            lambda values: (batch_loss(values, state, x, y), ()), values
        )[1]

    def products(count):
        vectors = values
        for _ in range(count):
            vectors = bare(values, state, x, y, vectors)
        _settle(vectors)

    def gradients(count):
        for _ in range(count):
            answer = gradient(values, state, x, y)
        _settle(answer)

    def ours(count):
        keras_stab.sharpness(
            model,
            [(x, y)],
            measures="eigenvalue",
            eigenvalue_products=count,
            tolerance=1.0,
            verbose=0,
        )

    def exactly(count):
        # It would stop before when it has converged.
        from keras_stab.numerics import spectrum

        stock = spectrum.largest_eigenvalue

        def all_products(product, vectors, start, most, *rest):
            return stock(product, vectors, start, most, -1.0)

        spectrum.largest_eigenvalue = all_products
        try:
            ours(count)
        finally:
            spectrum.largest_eigenvalue = stock

    count = options["products"]
    ways = {"sharpness": exactly, "products": products, "gradients": gradients}
    times = {way: [] for way in ways}
    for _ in range(options["repeats"] + 1):
        for way, run in ways.items():
            gc.collect()
            begun = time.perf_counter()
            run(count)
            times[way].append(time.perf_counter() - begun)
    seconds = {way: statistics.median(t[1:]) for way, t in times.items()}
    seconds["weights"] = model.count_params()
    return seconds


def _settle(tensors):
    import keras

    for tensor in tensors:
        keras.ops.convert_to_numpy(keras.ops.reshape(tensor, (-1,))[:1])


def to_markdown(results):
    machine, count = results["machine"], results["products"]
    lines = [
        "# Time of the largest Hessian eigenvalue",
        "",
        f"Measured on {machine['device']} ({machine['processor']}, "
        f"{machine['cores']} cores) on {machine['date']} by `python "
        f'benchmarks/sharpness_time.py`: `sharpness(measures="eigenvalue")` '
        f"with {count} products, the same number of bare products, and as many "
        "gradients; one batch, seconds, compiled before. `sharpness` makes a "
        f"gradient on top. Target: {TARGET} times the bare products.",
        "",
        "| Backend | Model | weights | sharpness | products | ratio | "
        "gradients |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for backend, entry in results["entries"].items():
        for model, own in entry["models"].items():
            ratio = own["sharpness"] / own["products"]
            verdict = " **missed**" if ratio > TARGET else ""
            lines.append(
                f"| {backend} | {model} | {own['weights']:,} | "
                f"{own['sharpness']:.3f} | {own['products']:.3f} | "
                f"{ratio:.2f}{verdict} | {own['gradients']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backends", nargs="+", default=list(workers.BACKENDS))
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--products", type=int, default=20)
    add("--repeats", type=int, default=5)
    default = files.RESULTS / "sharpness_time_cpu.json"
    add("--output", type=Path, default=default)
    options = parser.parse_args(arguments)
    results = {
        "machine": workers.describe_machine("cpu"),
        "products": options.products,
        "entries": {},
    }
    asked = {
        "products": options.products,
        "repeats": options.repeats,
        "models": options.models,
    }
    for backend, answer in workers.answers(__file__, options.backends, asked):
        results["entries"][backend] = answer
    files.write(results, options.output, to_markdown)
    print(f"Written: {options.output}")


if __name__ == "__main__":
    workers.run_script({"measure": measure}, main)
