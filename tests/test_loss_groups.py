"""Groups of losses: in multi-task learning, and measured outside of it.

The reference gradients are steps of Keras's own SGD, compiled with one loss at
a time; the rules are those of `reference`, by enumeration.
"""

import functools
import itertools

import contract
import keras
import numpy as np
import pytest
import reference
from keras import layers
from marks import ON_TORCH
from marks import quick
from marks import slow_but_on_torch

import keras_stab
from keras_stab.backend import devices
from keras_stab.backend import several_gradients
from keras_stab.methods import GradientMethod
from keras_stab.methods import GradientOracle

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 8
# Not in the order of their names.
LOSSES = {"top": "mse", "right": "mae", "left": "mse"}
WEIGHTS = {"top": 1.0, "right": 2.0, "left": 0.5}
RULES = {
    "min_norm": reference.min_norm_by_enumeration,
    "upgrad": reference.upgrad_by_enumeration,
    "mean": lambda gram: np.full(len(gram), 1 / len(gram)),
}


def data(rows=2 * BATCH):
    """Three tasks; the second one wants the first's output to be another."""
    draw = np.random.default_rng(5)
    x = draw.normal(size=(rows, 3)).astype("float32")
    y = x @ draw.normal(size=(3, 2)).astype("float32")
    return x, {"left": y, "right": -y[:, :1], "top": y[:, 1:] ** 2}


def shares(rows):
    """Weights of the rows, others for each loss."""
    draw = np.random.default_rng(6)
    return {n: draw.uniform(0.5, 2.0, rows).astype("float32") for n in LOSSES}


def tasks(as_list=False, norm=False, penalty=0.01, names=tuple(LOSSES)):
    """A trunk and heads; "right" sees the output "left"."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((3,))
    trunk = layers.Dense(
        4,
        "tanh",
        name="trunk",
        kernel_regularizer=keras.regularizers.L2(penalty),
        activity_regularizer=keras.regularizers.L1(penalty),
    )
    hidden = trunk(inputs)
    if norm:
        hidden = layers.Dropout(0.25, seed=5)(hidden)
        hidden = layers.BatchNormalization()(hidden)
    left = layers.Dense(2, name="left")(hidden)
    outputs = {"left": left, "right": layers.Dense(1, name="right")(left)}
    for name in set(names) - set(outputs):
        outputs[name] = layers.Dense(1, name=name)(hidden)
    outputs = {name: outputs[name] for name in names}
    model = keras.Model(inputs, list(outputs.values()) if as_list else outputs)
    draw = np.random.default_rng(11)
    for variable in model.trainable_variables:
        if variable.path.endswith("kernel"):
            variable.assign(draw.normal(0.0, 0.7, tuple(variable.shape)))
    if "right" in names:
        model.get_layer("right").kernel.assign([[1.0], [0.5]])
    return model


def compiled(optimizer, model=None, losses=None, weights=None, **arguments):
    """`losses` and `weights` are dicts; for a model with a list, lists."""
    model = tasks() if model is None else model
    losses = dict(LOSSES if losses is None else losses)
    weights = dict(WEIGHTS if weights is None else weights)
    if isinstance(model.output, list):
        losses, weights = [*losses.values()], [*weights.values()]
    model.compile(optimizer, losses, loss_weights=weights, **arguments)
    return model


def fit(model, x, y, sample_weight=None, **arguments):
    if isinstance(model.output, list):
        y = list(y.values())
        sample_weight = sample_weight and list(sample_weight.values())
    arguments = {"batch_size": BATCH, "shuffle": False} | arguments
    return model.fit(x, y, sample_weight=sample_weight, verbose=0, **arguments)


def aggregate(rule="upgrad", inner=None, **arguments):
    inner = keras.optimizers.SGD(0.1) if inner is None else inner
    return keras_stab.Aggregate(inner, rule, groups="losses", **arguments)


def trained(optimizer=None, rows=2 * BATCH, model=None, **arguments):
    model = compiled(optimizer or aggregate(), model, **arguments)
    fit(model, *data(rows))
    return model


def array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def close(left, right, tolerance=2e-6):
    assert len(left) == len(right)
    for one, other in zip(left, right):
        np.testing.assert_allclose(one, other, atol=tolerance)


def flat(tensors):
    return np.concatenate([np.ravel(t) for t in tensors]).astype("float64")


@functools.cache
def one_loss_at_a_time(as_list):
    """A model for each loss; its step is one of that loss and penalties."""
    return [
        compiled(
            keras.optimizers.SGD(1.0),
            tasks(as_list),
            weights={n: len(LOSSES) * w * (n == k) for n, w in WEIGHTS.items()},
            run_eagerly=not devices.FUNCTIONAL,  # sooner done than compiled
        )
        for k in LOSSES
    ]


def golden_gradients(weights, batch, as_list=False):
    """Those of all losses, one a row."""
    gradients = []
    for model in one_loss_at_a_time(as_list):
        model.set_weights(weights)
        fit(model, *batch, batch_size=len(batch[0]))
        after = model.get_weights()
        gradients.append(flat(weights) - flat(after))
    return np.array(gradients)


def golden_step(weights, rule, batch, as_list=False, rate=0.1):
    """Weights after a step, and the weights of the groups."""
    gradients = golden_gradients(weights, batch, as_list)
    chosen = RULES[rule](gradients @ gradients.T)
    step, after = rate * chosen @ gradients, []
    for weight in weights:
        size = weight.size
        after.append(weight - step[:size].reshape(weight.shape))
        step = step[size:]
    return after, chosen


# ---- Against steps of Keras -------------------------------------------------


@pytest.mark.parametrize(
    "rule, as_list",
    quick(
        list(itertools.product(RULES, (False, True))),
        lambda case: case in (("min_norm", False), ("upgrad", True)),
    ),
)
def test_golden_steps(rule, as_list):
    """Weights of losses and of rows, penalties, a short last batch."""
    x, y = data(BATCH + 3)
    share = shares(len(x))
    optimizer = aggregate(rule)
    model = compiled(optimizer, tasks(as_list))
    expected = model.get_weights()
    for start in range(0, len(x), BATCH):
        rows = slice(start, start + BATCH)
        batch = (
            x[rows],
            {n: part[rows] for n, part in y.items()},
            {n: part[rows] for n, part in share.items()},
        )
        expected, chosen = golden_step(expected, rule, batch, as_list)
    fit(model, x, y, share)
    close(model.get_weights(), expected)
    figures = optimizer.diagnostics()
    np.testing.assert_allclose(figures["weights"], chosen, atol=1e-4)
    assert figures["excluded"] == figures["nonfinite"] == 0
    assert figures["min_cosine"] < -0.1  # there is something to do
    assert np.isnan(figures["gradient_noise"])
    assert np.isnan(figures["gradient_norm_squared"])


@slow_but_on_torch
def test_min_norm_is_grain():
    states = [
        contract.state(trained(optimizer))
        for optimizer in (
            aggregate("min_norm"),
            keras_stab.GRAIN(keras.optimizers.SGD(0.1), groups="losses"),
        )
    ]
    contract.assert_same_bits(*states)


def test_the_mean_is_the_plain_step():
    """Also in metrics, dropout masks and moving statistics."""
    found = []
    for optimizer in (keras.optimizers.SGD(0.1), aggregate("mean")):
        model = compiled(optimizer, tasks(norm=True), metrics={"left": ["mae"]})
        history = fit(model, *data(3 * BATCH), epochs=2).history
        assert {"left_loss", "right_loss", "top_loss"} < set(history)
        found.append((history, [array(v) for v in model.variables]))
    (history, variables), (expected, others) = found
    assert history.keys() == expected.keys()
    for name in history:
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-5)
    close(variables, others)


@slow_but_on_torch
def test_one_forward_pass():
    """As for a method that asks for the plain gradient."""
    counts = []
    for optimizer in (contract.AskingNothing("sgd"), aggregate()):
        calls = []

        class Counting(layers.Layer):
            def call(self, x, calls=calls):
                calls.append(1)
                return 1.0 * x

        inputs = keras.Input((3,))
        model = keras.Model(inputs, tasks()(Counting()(inputs)))
        compiled(optimizer, model)
        x, y = data(BATCH)
        model.train_on_batch(x, y)
        model.train_on_batch(x, y)
        counts.append(len(calls))
    assert counts[1] == counts[0] >= 2


# ---- What models there are --------------------------------------------------


@slow_but_on_torch
def test_frozen_layers_and_heads_that_nobody_asks():
    """A head is reached by one loss; the last one is reached by none."""
    model = tasks()
    model.get_layer("top").trainable = False
    losses = {"top": None, "right": "mae", "left": "mse"}
    found = []
    for optimizer in (keras.optimizers.SGD(0.1), aggregate("mean")):
        own = keras.models.clone_model(model)
        own.set_weights(model.get_weights())
        own = compiled(optimizer, own, losses, {n: 1.0 for n in losses})
        fit(own, *data())
        found.append(own.get_weights())
    close(*found)
    unasked = tasks()
    compiled(aggregate("min_norm"), unasked, losses, {n: 1.0 for n in losses})
    before = [array(v) for v in unasked.get_layer("top").variables]
    fit(unasked, *data())
    close([array(v) for v in unasked.get_layer("top").variables], before, 0.0)
    assert len(unasked.optimizer.diagnostics()["weights"]) == 2


class Explodes(keras.losses.Loss):
    """Not finite once the targets are negative."""

    def call(self, y, y_pred):
        return keras.ops.mean(keras.ops.log(y) * y_pred, axis=-1)


@pytest.mark.parametrize(
    "rule", quick(["min_norm", "upgrad"], lambda rule: rule == "upgrad")
)
def test_a_loss_that_is_not_finite_is_dropped(rule):
    x, y = data(BATCH)
    y["right"] = -np.abs(y["right"])
    optimizer = aggregate(rule)
    model = compiled(
        optimizer, tasks(), {"top": "mse", "right": Explodes(), "left": "mse"}
    )
    fit(model, x, y)
    figures = optimizer.diagnostics()
    assert figures["nonfinite"] == 1 and figures["weights"][1] == 0
    assert min(figures["weights"][::2]) > 0
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_what_is_infinite_reaches_no_other_gradient():
    """Also where a layer of one head alone has overflowed."""

    def function(values):
        (a,) = values
        broken = keras.ops.exp(1000.0 * a)
        return [keras.ops.sum(a * a), keras.ops.sum(broken * 0.0)], "aux"

    values = [keras.ops.convert_to_tensor([1.0, 2.0])]
    (scalars, aux), (first, second) = several_gradients.values_and_gradients(
        function, values
    )
    assert aux == "aux" and float(scalars[0]) == 5.0
    np.testing.assert_allclose(array(first[0]), [2.0, 4.0])
    assert np.isnan(array(second[0])).all()


def test_a_gradient_of_ones_own():
    @keras.ops.custom_gradient
    def square(x):
        def gradient(*arguments, upstream=None):
            (upstream,) = arguments if upstream is None else (upstream,)
            return keras.ops.multiply(upstream, 3.0 * x)

        return x * x, gradient

    def function(values):
        return [keras.ops.sum(square(v)) for v in values], None

    values = [keras.ops.convert_to_tensor([1.0, 2.0]) for _ in range(2)]
    _, each = several_gradients.values_and_gradients(function, values)
    for k in range(2):
        np.testing.assert_allclose(array(each[k][k]), [3.0, 6.0])
        assert each[k][1 - k] is None or not np.any(array(each[k][1 - k]))


@slow_but_on_torch
def test_a_loss_of_all_outputs():
    """Keras gives it all of them, where there are more losses than outputs."""

    def difference(y, y_pred):
        return keras.ops.mean((y_pred["a"] - y_pred["b"]) ** 2)

    def size(y, y_pred):
        return keras.ops.mean((y["a"] - y_pred["a"]) ** 2)

    def other(y, y_pred):
        return keras.ops.mean((y["b"] - y_pred["b"]) ** 2)

    found = []
    x, y = data()
    y = {"a": y["right"], "b": y["top"]}
    for optimizer in (keras.optimizers.SGD(0.1), aggregate("mean")):
        model = tasks(names=("a", "b"))
        model.compile(optimizer, [size, other, difference])
        fit(model, x, y)
        found.append(model.get_weights())
    close(*found)
    assert len(optimizer.diagnostics()["weights"]) == 3


def test_inputs_of_any_kind():
    """Sparse gradients, masks, and sizes that are not known before."""
    draw = np.random.default_rng(0)
    x = draw.integers(0, 5, size=(BATCH + 3, 4))
    y = {"a": draw.normal(size=(len(x), 1)), "b": x[:, :1] * 1.0}
    found = []
    for optimizer in (keras.optimizers.SGD(0.1), aggregate("mean")):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((None,))
        hidden = layers.Embedding(5, 3, mask_zero=True)(inputs)
        hidden = layers.GlobalAveragePooling1D()(hidden)
        outputs = {n: layers.Dense(1, name=n)(hidden) for n in y}
        model = keras.Model(inputs, outputs)
        model.compile(optimizer, {n: "mse" for n in y})
        fit(model, x, y)
        found.append(model.get_weights())
    close(*found)


def test_parts_of_other_lengths():
    """Nothing is cut, so that an input may have one row for all the others."""
    x, y = data(BATCH)
    found = []
    for optimizer in (keras.optimizers.SGD(0.1), aggregate("mean")):
        keras.utils.set_random_seed(1)
        inputs = [keras.Input((3,)), keras.Input((3,))]
        hidden = layers.Add()([layers.Dense(4)(part) for part in inputs])
        outputs = {
            n: layers.Dense(y[n].shape[1], name=n)(hidden) for n in LOSSES
        }
        model = compiled(optimizer, keras.Model(inputs, outputs))
        model.train_on_batch([x, x[:1]], y)
        found.append(model.get_weights())
    close(*found)


# ---- In training ------------------------------------------------------------


def test_resumed_to_the_last_bit(tmp_path):
    """In process and from a file, with K weights of losses and the orders."""

    def make():
        inner = keras.optimizers.Adam(0.01)
        return aggregate("pcgrad", inner, seed=4)

    x, y = data(2 * BATCH)
    half = slice(BATCH), slice(BATCH, None)
    whole = compiled(make())
    fit(whole, x, y)
    parts = compiled(make())
    fit(parts, x[half[0]], {n: part[half[0]] for n, part in y.items()})
    parts.save(tmp_path / "model.keras")
    parts.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.groups == "losses"
    weights = parts.optimizer.diagnostics()["weights"]
    assert loaded.optimizer.diagnostics()["weights"] == weights
    assert len(weights) == 3
    again = compiled(make())
    again.optimizer.build(again.trainable_variables)
    assert again.optimizer.diagnostics()["weights"] == []
    again.load_weights(tmp_path / "model.weights.h5")
    for model in (parts, loaded, again):
        fit(model, x[half[1]], {n: part[half[1]] for n, part in y.items()})
        contract.assert_same_bits(contract.state(model), contract.state(whole))


@slow_but_on_torch
def test_the_state_of_other_groups_is_refused(tmp_path):
    path = tmp_path / "model.weights.h5"
    trained(keras_stab.Aggregate("sgd", groups=4)).save_weights(path)
    model = trained()
    with pytest.raises(ValueError, match="a state of 4 groups"):
        model.load_weights(path)


@slow_but_on_torch
def test_accumulation():
    """The mean of two directions, each of which was combined by itself."""
    models = []
    for steps in (None, 2):
        inner = keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps)
        models.append(compiled(aggregate(inner=inner)))
    single, accumulating = models
    before = single.get_weights()
    x, y = data()
    changes = []
    for rows in (slice(BATCH), slice(BATCH, None)):
        single.set_weights(before)
        fit(single, x[rows], {n: part[rows] for n, part in y.items()})
        pairs = zip(before, single.get_weights())
        changes.append([after - old for old, after in pairs])
    fit(accumulating, x, y)
    expected = [w + (a + b) / 2 for w, a, b in zip(before, *changes)]
    close(accumulating.get_weights(), expected)


def test_mixed_precision_with_a_scaler():
    """Scaled losses, and a loss that overflows: the step is skipped."""
    x, y = data(3 * BATCH)
    found = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        optimizer = aggregate("min_norm")
        if policy == "mixed_float16":  # so low that no step is skipped
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=64.0
            )
        model = compiled(optimizer)
        fit(model, x, y)
        found.append(model)
    close(*(model.get_weights() for model in found), 3e-3)
    scaler = model.optimizer
    assert isinstance(scaler, keras.optimizers.LossScaleOptimizer)
    single, mixed = (
        each.optimizer if each is found[0] else scaler.inner_optimizer
        for each in found
    )
    np.testing.assert_allclose(
        mixed.diagnostics()["weights"],
        single.diagnostics()["weights"],
        atol=0.02,
    )
    scale, before = float(scaler.dynamic_scale), model.get_weights()
    y["top"][:] = np.inf
    fit(model, x[:BATCH], {n: part[:BATCH] for n, part in y.items()})
    close(model.get_weights(), before, 0.0)
    assert float(scaler.dynamic_scale) == scale / 2


@slow_but_on_torch
def test_scales_of_float8_layers():
    """Also where a layer belongs to one head alone."""
    found = []
    sgd = keras.optimizers.SGD
    for optimizer in (sgd(1e-7), aggregate("mean", sgd(1e-7))):
        model = tasks()
        for name in ("trunk", "top"):
            model.get_layer(name).quantize("float8")
        compiled(optimizer, model)
        fit(model, *data())
        scales = [array(v) for v in contract.overwritten(model)]
        found.append((scales, model))
    (expected, _), (scales, model) = found
    assert len(scales) == len(expected) > 0
    names = [v.path for v in contract.overwritten(model)]
    for name, one, other in zip(names, scales, expected):
        if "outputs_grad" in name:  # of each loss by itself: none is larger
            assert np.isfinite(one).all() and np.any(one != 0)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-3, err_msg=name)


@slow_but_on_torch
@pytest.mark.parametrize(
    "outer", ["WeightAveraging", "SAM", "AdaptiveClipping"]
)
def test_nested(outer):
    optimizer = getattr(keras_stab, outer)(aggregate())
    model = trained(optimizer)
    assert len(optimizer.inner_optimizer.diagnostics()["weights"]) == 3
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.inner_optimizer.groups == "losses"
    contract.assert_same_bits(
        contract.state(model), contract.state(trained(again))
    )


@slow_but_on_torch
def test_figures_of_a_monitor():
    monitor = keras_stab.StabilityMonitor()
    optimizer = aggregate()
    fit(compiled(optimizer), *data(), callbacks=[monitor])
    (sample,) = monitor.samples
    weights = [sample[f"aggregate/weights/{k}"] for k in range(3)]
    assert weights == optimizer.diagnostics()["weights"]
    assert "aggregate/weights/3" not in sample


seen = []


def by_rows(gram, sizes):
    seen.append((tuple(gram.shape), sizes))
    return sizes / keras.ops.sum(sizes)


def test_a_function_sees_the_rows_and_is_traced_once():
    """Three losses of all rows; the last batch is a short one."""
    seen.clear()
    optimizer = aggregate(by_rows)
    trained(optimizer, 2 * BATCH + 3)
    assert {shape for shape, _ in seen} == {(3, 3)}
    if ON_TORCH:
        rows = [array(sizes).tolist() for _, sizes in seen]
        assert rows == [[n] * 3 for n in (BATCH, BATCH, 3)]
    else:
        assert len(seen) <= 2  # one for each size of a batch
    np.testing.assert_allclose(optimizer.diagnostics()["weights"], 1 / 3)


@slow_but_on_torch
def test_plan():
    optimizer = aggregate()
    model = compiled(optimizer)
    x, y = data(BATCH)
    plan = optimizer.plan(model, x, y)
    assert (plan.engine, plan.groups, plan.grouping) == (
        "one_forward",
        3,
        "losses",
    )
    assert plan.step_ratio > 0.5
    assert "one forward pass" in str(plan)
    before = model.get_weights()
    fit(model, x, y)
    assert any(np.any(a != b) for a, b in zip(before, model.get_weights()))
    assert optimizer.plan().groups == 3


class Losses(GradientMethod):
    """Asks for the losses itself, and for what an oracle cannot answer."""

    def estimate(self, oracle):
        losses = oracle.loss_gradients()
        assert losses is oracle.loss_gradients()
        assert tuple(losses.gram().shape) == (3, 3)
        vector = oracle.gradient()
        with_mean = losses.inner(vector)
        oracle.notes[self] = (with_mean, keras.ops.mean(losses.gram(), axis=1))
        with pytest.raises(ValueError, match="another loss"):
            oracle.with_loss(lambda *batch: 0.0).loss_gradients()
        shifted = oracle.at(vector, 0.0).loss_gradients()
        return shifted.combine(keras.ops.full((3,), 1 / 3))

    def apply_in_order(self, gradients, variables):
        self.products = self.handed_over
        super().apply_in_order(gradients, variables)


@pytest.mark.skipif(not ON_TORCH, reason="tensors of a traced step")
def test_questions_of_ones_own():
    optimizer = Losses(keras.optimizers.SGD(0.1))
    found = [trained(optimizer), trained(keras.optimizers.SGD(0.1))]
    close(*(model.get_weights() for model in found))
    np.testing.assert_allclose(*map(array, optimizer.products), rtol=1e-4)


# ---- Outside of training ----------------------------------------------------


def measured(model, x, y, sample_weight=None, **arguments):
    arguments = {"groups": "losses", "verbose": 0} | arguments
    return keras_stab.group_gradients(
        model, x, y, sample_weight=sample_weight, **arguments
    )


@pytest.mark.parametrize(
    "as_list, batch_size",
    quick(
        list(itertools.product((False, True), (5, 256))),
        lambda case: case == (True, 5),
    ),
)
def test_measured_gradients(as_list, batch_size):
    """Against steps of Keras on all rows; also of several batches."""
    x, y = data(BATCH + 3)
    share = shares(len(x))
    model = compiled("sgd", tasks(as_list))
    rows = golden_gradients(model.get_weights(), (x, y, share), as_list)
    if as_list:
        y, share = list(y.values()), list(share.values())
    found = measured(model, x, y, share, batch_size=batch_size)
    assert found.names == tuple(LOSSES) and found.engine == "one_forward"
    np.testing.assert_array_equal(found.sizes, [len(x)] * len(LOSSES))
    # What a step of float32 leaves of a gradient limits the accuracy.
    np.testing.assert_allclose(found.gram, rows @ rows.T, rtol=1e-5, atol=5e-5)
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(found.norms, lengths, rtol=1e-5)
    cosines = rows @ rows.T / lengths[:, None] / lengths
    np.testing.assert_allclose(found.cosines, cosines, atol=5e-6)
    assert found.cosines[1, 2] < -0.1  # the conflict that `data` tells of
    weights = np.array([1.0, -0.5, 2.0])
    combined = found.combine(weights)
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    assert [part.shape for part in combined] == shapes
    np.testing.assert_allclose(flat(combined), weights @ rows, atol=5e-6)


def test_measured_in_both_modes_nothing_changes():
    """Also metrics that the losses make, and the masks of dropout."""
    x, y = data(BATCH)
    model = compiled("sgd", tasks(norm=True), metrics={"left": ["mae"]})
    measured(model, x, y)  # builds what there is
    before, generator = contract.state(model), devices.random_state()
    metrics = [array(v) for v in model.metrics_variables]
    assert not any(np.any(m) for m in metrics) and len(metrics) >= 8
    grams = [
        measured(model, x, y, training=mode).gram for mode in (True, False)
    ]
    contract.assert_same_bits(before, contract.state(model))
    now = [array(v) for v in model.metrics_variables]
    contract.assert_same_bits(metrics, now)
    assert not devices.drew_since(generator)
    asked = GradientOracle(model, *map(_tensors, (x, y))).loss_gradients()
    np.testing.assert_allclose(grams[0], array(asked.gram()), rtol=1e-4)
    assert not np.allclose(*grams, rtol=0.01)


def _tensors(data):
    return keras.tree.map_structure(keras.ops.convert_to_tensor, data)


@slow_but_on_torch
@pytest.mark.parametrize("as_list", [False, True])
def test_targets_as_keras_takes_them(as_list):
    """Of a model that nothing has used: a list for a dict, and vice versa."""
    x, y = data(BATCH)
    # In the order that Keras takes: of names for a dict.
    listed = [y[n] for n in (LOSSES if as_list else sorted(LOSSES))]
    found = [
        measured(compiled("sgd", tasks(as_list)), x, targets).gram
        for targets in (y, listed)
    ]
    contract.assert_same_bits(*found)


@slow_but_on_torch
def test_measured_with_mixed_precision():
    x, y = data(BATCH)
    found = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        optimizer = keras.optimizers.SGD(0.1)
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=64.0
            )
        model = compiled(optimizer)
        found.append(measured(model, x, y, batch_size=5))
    single, mixed = found
    np.testing.assert_allclose(mixed.norms, single.norms, rtol=0.01)
    np.testing.assert_allclose(mixed.cosines, single.cosines, atol=0.01)
    assert {part.dtype for part in mixed.combine([1.0] * 3)} == {
        np.dtype("float32")
    }


@slow_but_on_torch
def test_a_measured_loss_that_is_not_finite():
    x, y = data(BATCH)
    y["right"] = -np.abs(y["right"])
    losses = {"top": "mse", "right": Explodes(), "left": "mse"}
    found = measured(compiled("sgd", tasks(), losses), x, y)
    finite = np.isfinite(found.gram)
    np.testing.assert_array_equal(finite, np.outer([1, 0, 1], [1, 0, 1]) > 0)
    assert np.isfinite(flat(found.combine([0.5, 0.0, 0.5]))).all()


# ---- What is refused --------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"groups": "loss"}, 'from 1 to 64 or "losses"'),
        ({"across": "batches"}, "leave `across` out"),
        ({"across": "replicas"}, "leave `across` out"),
        ({"engine": "microbatch"}, "leave `engine` out"),
        ({"grouping": "contiguous"}, "leave `grouping` out"),
    ],
)
@pytest.mark.parametrize("method", ["Aggregate", "GRAIN"])
def test_bad_arguments(method, arguments, words):
    with pytest.raises(ValueError, match=words):
        getattr(keras_stab, method)("sgd", **{"groups": "losses", **arguments})


class OwnLoss(keras.Model):
    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return keras.ops.mean(y_pred["left"])


def test_models_that_have_no_single_losses():
    x, y = data(BATCH)
    plain = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    plain.compile(aggregate(), "mse")
    with pytest.raises(ValueError, match=r"with 1 loss(\n|$)"):
        plain.train_on_batch(x, y["right"])
    # Of several losses of one output Keras takes the first alone.
    plain.compile(aggregate(), ["mse", "mae"])
    with pytest.raises(ValueError, match=r"with 1 loss(\n|$)"):
        plain.train_on_batch(x, y["right"])
    own = tasks()
    own = OwnLoss(own.inputs, own.output)
    own.compile(aggregate(), LOSSES)
    with pytest.raises(ValueError, match="compute_loss of OwnLoss"):
        own.train_on_batch(x, y)
    alone = tasks()
    alone.compile(aggregate())
    with pytest.raises(ValueError, match="with 0 losses"):
        alone.train_on_batch(x, y)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"engine": "one_pass"}, "leave `engine` out.*one_pass"),
        ({"engine": "microbatch"}, "leave `engine` out.*microbatch"),
        ({"memory_limit": 100}, "larger `memory_limit`.*Received"),
        ({"y": None}, "without targets"),
    ],
    ids=str,
)
def test_what_is_not_measured(arguments, words):
    x, y = data(BATCH)
    given = {"x": x, "y": y} | arguments
    with pytest.raises(ValueError, match=words):
        measured(compiled("sgd"), **given)


def test_models_whose_losses_are_not_measured():
    x, y = data(BATCH)
    plain = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    for loss in ("mse", ["mse", "mae"]):  # Keras takes the first alone
        plain.compile("sgd", loss)
        with pytest.raises(ValueError, match=r"with 1 loss(\n|$)"):
            measured(plain, x, y["right"])
    own = tasks()
    own = OwnLoss(own.inputs, own.output)
    for loss in (LOSSES, None):
        own.compile("sgd", loss)
        with pytest.raises(ValueError, match="compute_loss of OwnLoss"):
            measured(own, x, y)


@slow_but_on_torch
def test_more_losses_than_groups_can_be():
    x, y = data(BATCH)
    many = {f"head_{i}": "mse" for i in range(65)}
    inputs = keras.Input((3,))
    outputs = {n: layers.Dense(1, name=n)(inputs) for n in many}
    model = keras.Model(inputs, outputs)
    model.compile(aggregate(), many)
    with pytest.raises(ValueError, match="at most 64 losses"):
        model.train_on_batch(x, {n: y["right"] for n in many})


def test_plain_gradients_are_refused():
    optimizer = aggregate()
    point = keras.Variable(np.zeros(2), dtype="float32")
    optimizer.build([point])
    with pytest.raises(RuntimeError, match="one for each output"):
        optimizer.apply([keras.ops.ones(2)], [point])
