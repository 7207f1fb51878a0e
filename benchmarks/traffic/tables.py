"""The results as Markdown."""

from traffic import cases
from traffic import scale

BACKENDS = {"jax": "JAX", "torch": "PyTorch", "tensorflow": "TensorFlow"}

HEAD = """# What the devices send each other

Made by

```
python benchmarks/communication.py
```

One train step of a compiled Keras model, {rows} rows, {devices} devices of one
processor. P is the size of the weights, 4 bytes each.

- Sent: bytes that leave one device, for the least that each collective needs
  (a ring: an all-reduce of P sends 2 P ({devices} - 1) / {devices}).
- Payload: bytes of the results of all collectives on one device. An all-reduce
  sends nearly twice its result, an all-gather or all-to-all nearly once:
  compare what is sent.
- JAX: read from the program that XLA compiled for a step under `DataParallel`,
  loops unrolled, with its temporary memory, and the rows that one device
  computes, from the matrix products of one layer.
- PyTorch: what is handed to `torch.distributed` in `fit` of each process; with
  Adam, to the gradient hook of `DistributedDataParallel` in a loop.
- TensorFlow: collectives and copies between devices in the graph of a step
  under `MirroredStrategy`, which runs no group in one pass. The gradient of
  an embedding is sparse with Adam; what is gathered of it is not counted.
"""


def markdown(results):
    """The file of results."""
    head = HEAD.format(rows=cases.ROWS, devices=cases.DEVICES)
    return _joined([head, *counted(results), *on_paper(results)])


def for_guide(results):
    """The tables in `guides/many_devices.md`."""
    parts = [*counted(results, "###"), *on_paper(results, "###")]
    return _joined([MARKS[0], *parts, MARKS[1]])


MARKS = "<!-- figures -->", "<!-- end of figures -->"


def counted(results, level="##"):
    """A table for each model."""
    parts = []
    for model in cases.MODELS:
        weights = next(
            own["weights"]
            for entries in results["counts"].values()
            for own in entries[model.name].values()
            if "weights" in own
        )
        title = model.words[0].upper() + model.words[1:]
        parts.append(f"{level} {title}")
        parts.append(f"P = {weights:,} weights.")
        parts.append(steps_table(results, model))
    return parts


def on_paper(results, level="##"):
    """The tables of a large model."""
    parts = [f"{level} On paper", SCALE.format(**results["paper"])]
    parts.append(scale_table(results["paper"]))
    parts.append(checked(results["counts"]))
    if results.get("solver"):
        parts.append(solver_table(results["solver"]))
    return parts


def _joined(parts):
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def steps_table(results, model):
    before = results.get("before", {}).get("jax", {}).get(model.name, {})
    titles = ["step", "JAX: payload", "sent", "temporary memory", "rows"]
    titles += ["PyTorch: sent", "TensorFlow: sent"]
    lines = [titles, ["---"] * len(titles)]
    for arm in cases.ARMS:
        line = [arm.words]
        counts = results["counts"].get("jax", {}).get(model.name, {})
        own = counts.get(arm.name, {})
        old = before.get(arm.name, {})
        for key, unit in (
            ("payload", " P"),
            ("sent", " P"),
            ("memory", " P"),
            ("rows", ""),
        ):
            line.append(_cell(own, key, unit, old))
        for backend in ("torch", "tensorflow"):
            entries = results["counts"].get(backend, {}).get(model.name, {})
            line.append(_cell(entries.get(arm.name, {}), "sent", " P", {}))
        lines.append(line)
    return _table(lines)


def _cell(own, key, unit, old):
    if "error" in own:
        return "refused"
    if key not in own:
        return "-"
    number = "{:.2f}" if unit else "{:.0f}"
    text = number.format(own[key]) + unit
    if key in old:
        former = number.format(old[key]) + unit
        if former != text:
            text = f"{former}, now {text}"
    return text


SCALE = """{weights:.3g} weights of {width} bytes, {devices} devices,
{gigabytes:g} GB/s leaving each of them: seconds of the exchange in one step,
when nothing hides it."""


def scale_table(paper):
    lines = [["exchange", "sent", "seconds"], ["---"] * 3]
    mean = None
    for what, groups, words in (
        ("mean", 1, "mean gradient, one all-reduce"),
        (
            "aligned",
            paper["devices"],
            f"GRAIN, K = {paper['devices']}, a group on each device",
        ),
        ("spread", 8, "GRAIN, K = 8, every group on all devices"),
    ):
        gradients, _ = scale.sent(what, paper["devices"], groups)
        own = scale.seconds(
            what,
            paper["weights"],
            paper["devices"],
            groups,
            paper["gigabytes"] * 1e9,
            paper["width"],
        )
        mean = mean or own
        lines.append(
            [words, f"{gradients:.2f} P", f"{own:.3f} ({own / mean:.2f} x)"]
        )
    return _table(lines)


def checked(counts):
    """The formulas at the size that was counted."""
    words = []
    for backend, arm, what, groups, name in (
        ("jax", "adam", "mean", 1, "Adam on JAX"),
        ("jax", "replicas", "aligned", cases.DEVICES, "replicas on JAX"),
        ("torch", "replicas", "aligned", cases.DEVICES, "on PyTorch"),
        ("torch", "one_pass_8", "spread", 8, "K = 8 on PyTorch"),
    ):
        own = counts.get(backend, {}).get("mlp", {}).get(arm, {})
        if "sent" in own:
            gradients, products = scale.sent(what, cases.DEVICES, groups)
            expected = gradients + products / own["weights"]
            words.append(f"{name} {expected:.2f} and {own['sent']:.2f} P")
    return (
        "The same formulas for the perceptron above on "
        f"{cases.DEVICES} devices, and what was counted: {'; '.join(words)}."
    )


def solver_table(times):
    lines = [["K x K problem, ms", *times], ["---"] * (1 + len(times))]
    for kind, words in (
        ("host", "on the host (PyTorch)"),
        ("compiled", "compiled (JAX), called by itself"),
    ):
        lines.append(
            [words, *(f"{1e3 * own[kind]:.2f}" for own in times.values())]
        )
    return (
        "Every device solves the K x K problem for itself after one sum of "
        "K x K numbers; on this machine it took, by K,\n\n" + _table(lines)
    )


def _table(lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
