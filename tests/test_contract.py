"""What every optimizer and nesting must honour, on every backend."""

import functools
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import callback_cases
import contract
import keras
import numpy as np
import pytest
import reference
from interpolation_cases import float64 as double_precision
from marks import quick
from marks import slow_but_on_torch

import keras_stab

ROWS = pytest.mark.parametrize("row", contract.parameters(contract.ROWS))


def one_of_each_family(rows, whole=False, names=contract.OF_EACH_FAMILY):
    return [
        pytest.param(
            *param.values, id=param.id, marks=[*param.marks, pytest.mark.slow]
        )
        if contract.is_slow(param.values[0], names)
        else param
        for param in contract.parameters(rows, whole)
    ]


OWN_ROWS = pytest.mark.parametrize("row", one_of_each_family(contract.ROWS))
OWN_WHOLE_ROWS = pytest.mark.parametrize(
    "row",
    one_of_each_family((r for r in contract.ROWS if not r.nested), whole=True),
)
OWN_WRAPPERS = [
    r
    for r in contract.ROWS
    if r.wraps and not r.nested and r.name not in contract.DO_AS_OTHERS
]
WRAPPERS = pytest.mark.parametrize(
    "row", contract.parameters(OWN_WRAPPERS, whole=True)
)

JAX_OR_TORCH = keras.backend.backend() != "tensorflow"
JIT = [True, False] if keras.backend.backend() != "torch" else [False]
SEVERAL_STEPS = keras.backend.backend() != "torch"


def weights(model):
    return [np.asarray(w) for w in model.get_weights()]


# ---- Mathematics ----------------------------------------------------------


def linear_model(optimizer, kernel, bias, **arguments):
    inputs = keras.Input((len(kernel),))
    outputs = keras.layers.Dense(kernel.shape[1])(inputs)
    model = keras.Model(inputs, outputs)
    model.set_weights([kernel, bias])
    model.compile(optimizer=optimizer, loss="mse", **arguments)
    return model


def regression(rows=(12, 12, 12, 10, 3, 12), seed=0):
    generator = np.random.default_rng(seed)
    batches = [
        (generator.normal(size=(n, 3)), generator.normal(size=(n, 2)))
        for n in rows
    ]
    kernel, bias = generator.normal(size=(3, 2)), generator.normal(size=2)
    return batches, kernel, bias


def golden_parameters():
    rows = [r for r in contract.ROWS if r.reference is not None]
    ways = {
        False: contract.parameters(rows),
        True: one_of_each_family(rows),
    }
    for run_eagerly, parameters in ways.items():
        for parameter in parameters:
            yield pytest.param(
                *parameter.values,
                run_eagerly,
                id=f"{run_eagerly}-{parameter.id}",
                marks=parameter.marks,
            )


@pytest.mark.parametrize("row, run_eagerly", golden_parameters())
def test_golden_steps(row, run_eagerly):
    """Also for batches of other sizes, and with fewer rows than groups."""
    sizes = (12, 3, 3) if run_eagerly else (12, 12, 12, 10, 3, 12)
    batches, kernel, bias = regression(sizes)
    optimizer = row.build(keras.optimizers.SGD(0.1))
    model = linear_model(optimizer, kernel, bias, run_eagerly=run_eagerly)
    problem = reference.LinearRegression(kernel, bias)
    expected = row.reference(problem, batches, 0.1)
    for (x, y), parameters in zip(batches, expected):
        model.train_on_batch(x.astype("float32"), y.astype("float32"))
        for actual, wanted in zip(model.get_weights(), parameters):
            np.testing.assert_allclose(actual, wanted, atol=2e-6, rtol=1e-5)


# One optimizer with and one without a state of its own; the others with the
# slow tests, and where a row promises more.
QUICK_INNER = ("momentum", "adamw")


@pytest.mark.parametrize(
    "row, inner",
    [
        pytest.param(
            row,
            inner,
            id=f"{row.name}-{inner}",
            marks=[]
            if inner in QUICK_INNER or row.name == "GRAIN-1"
            else pytest.mark.slow,
        )
        for row in contract.ROWS
        if row.is_inner
        for inner in contract.INNER
    ],
)
def test_is_the_inner_optimizer_bit_for_bit(row, inner):
    x, y = contract.data(20)
    # TensorFlow's graph optimizer rounds otherwise on the two sides of the
    # barrier that a wrapper puts before assignments; under XLA it does not.
    # GRAIN with one group promises the bits in graph mode too.
    jit = "auto" if row.name == "GRAIN-1" else JIT[0]
    plain = contract.compiled(contract.INNER[inner](), jit_compile=jit)
    wrapped = contract.compiled(
        row.build(contract.INNER[inner]()), jit_compile=jit
    )
    logs = [contract.fit(model, x, y).history for model in (plain, wrapped)]
    contract.assert_same_bits(weights(plain), weights(wrapped))
    assert logs[0] == logs[1]


class Bilinear(keras.Model):
    """Loss `sum(a b)`: no gradient depends on its own variable."""

    def __init__(self):
        super().__init__()
        self.a = self.add_weight(shape=(10,), initializer="ones", name="a")
        self.b = self.add_weight(shape=(10,), initializer="ones", name="b")

    def call(self, inputs):
        return inputs

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return keras.ops.sum(self.a * self.b)


@pytest.mark.parametrize(
    "row",
    contract.parameters(
        [
            row
            for row in contract.ROWS
            # GRAIN-1 is the inner optimizer, with this too; only TensorFlow
            # runs the assignments of a step in an order of its own.
            if row.wraps and row.bilinear is not None and row.name != "GRAIN-1"
            if row.name == "Transparent" or not JAX_OR_TORCH
        ]
    ),
)
def test_no_assignment_overtakes_a_gradient(row):
    """TensorFlow's stock step in graph mode is wrong here, most times."""
    x = np.ones((12, 1), "float32")
    often = row.name == "Transparent" and not JAX_OR_TORCH
    for _ in range(20 if often else 1):
        model = Bilinear()
        model.compile(row.build(keras.optimizers.SGD(0.1)))
        contract.fit(model, np.tile(x, (20, 1)), None, batch_size=12)
        wanted = 1.0
        for _ in range(20 // row.period):
            wanted = row.bilinear(wanted)
        for w in model.get_weights():
            np.testing.assert_allclose(w, wanted, rtol=1e-5)


def every_variable(model):
    return [*model.variables, *model.optimizer.variables]


# Those with a barrier of no other test.
LAYERWISE = ("LARS", "TVLARS", "LAMB")


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=row.name,
            marks=[] if row.name in LAYERWISE else pytest.mark.slow,
        )
        for row in contract.ROWS
        if not row.wraps and (row.name == "LARS" or not JAX_OR_TORCH)
    ],
)
def test_nor_does_one_of_an_optimizer_in_its_own_right(row):
    """Twenty fits are as an eager one, which keeps the order."""
    x = np.ones((60, 1), "float32")
    ends = []
    for eager in (True, False):
        model = Bilinear()
        model.compile(row.build(keras.optimizers.SGD(0.1)), run_eagerly=eager)
        model.optimizer.build(model.trainable_variables)
        start = [np.array(v.numpy()) for v in every_variable(model)]
        for _ in range(1 if eager or JAX_OR_TORCH else 20):
            for variable, value in zip(every_variable(model), start):
                variable.assign(value)
            contract.fit(model, x, None, batch_size=1)
            ends.append(weights(model))
    for end in ends[1:]:
        for actual, wanted in zip(end, ends[0]):
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


# ---- Saving ---------------------------------------------------------------


@ROWS
@pytest.mark.parametrize("inner", contract.INNER)
def test_config_round_trip(row, inner):
    optimizer = row.build(contract.INNER[inner]())
    config = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()
    from_config = type(optimizer).from_config(optimizer.get_config())
    assert from_config.get_config() == optimizer.get_config()


@pytest.fixture(scope="module")
def resume(tmp_path_factory):
    """The folder to which the quick, or the slow, rows were saved."""

    @functools.cache
    def of(speed):
        folder = tmp_path_factory.mktemp("resume")
        _save_and_resume(folder, speed)
        return folder

    return of


def _save_and_resume(folder, speed):
    worker = Path(__file__).parent / "workers" / "resume.py"
    for phase in ("save", "resume"):
        done = subprocess.run(
            [sys.executable, str(worker), phase, str(folder), speed],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "row, inner",
    one_of_each_family(contract.RESUMED, names=contract.OF_EACH_STATE),
)
@pytest.mark.parametrize("kind", ["keras", "weights"])
def test_resume_in_a_fresh_process(row, inner, kind, resume):
    folder = resume(contract.speed_of_resume(row))

    def load(name):
        with np.load(folder / f"{row.name}-{inner}-{name}.npz") as arrays:
            return [arrays[k] for k in arrays.files]

    contract.assert_same_bits(load(kind), load("through"))


@OWN_ROWS
def test_two_fits_are_one(row):
    x, y = contract.data()
    once = contract.compiled(row.build(contract.INNER["adamw"]()))
    contract.fit(once, x, y)
    inner = contract.INNER["adamw"]()
    twice = contract.compiled(row.build(inner))
    contract.fit(twice, x[: 5 * contract.BATCH], y[: 5 * contract.BATCH])
    contract.fit(twice, x[5 * contract.BATCH :], y[5 * contract.BATCH :])
    contract.assert_same_bits(contract.state(once), contract.state(twice))
    if row.wraps:
        updates = 12 // row.period
        assert int(inner.iterations) == updates // row.inner_every
        forwards_to(inner, twice.optimizer, updates)


def forwards_to(inner, optimizer, updates):
    assert int(optimizer.iterations) == updates
    optimizer.learning_rate = 0.25
    assert float(inner.learning_rate) == 0.25
    assert float(optimizer.learning_rate) == 0.25
    own = [v.path for v in optimizer.variables]
    assert own[-len(inner.variables) :] == [v.path for v in inner.variables]
    assert len(own) == len(set(map(id, optimizer.variables)))


@OWN_ROWS
def test_what_is_kept_equals_itself(row):
    """JAX on several processes compares what it loads, and NaN is unequal."""
    x, y = contract.data(4)
    model = contract.compiled(row.build(contract.INNER["adamw"]()))
    contract.fit(model, x, y)
    for variable in model.optimizer.variables:
        value = keras.ops.convert_to_numpy(variable)
        assert not np.any(np.isnan(value)), variable.path
    if row.name.startswith(("GRAIN", "SAM", "IRE")):
        figures = model.optimizer.diagnostics()
        unknown = [k for k, v in figures.items() if np.any(v != v)]
        across = row.name == "GRAIN-batches"
        assert unknown == (["gradient_noise"] if across else [])


@OWN_ROWS
def test_a_state_loaded_before_the_optimizer_is_built(row, tmp_path):
    """It is loaded, or Keras's warning says that it is not."""
    x, y = contract.data(4)

    def made():
        optimizer = row.build(contract.INNER["adamw"]())
        return contract.compiled(optimizer, contract.classifier(dropout=False))

    model = made()
    contract.fit(model, x, y)
    path = tmp_path / "saved.weights.h5"
    model.save_weights(path)
    again = made()
    rates = [float(o.learning_rate) for o in (again.optimizer, model.optimizer)]
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        again.load_weights(path)
    contract.assert_same_bits(weights(model), weights(again))
    assert rates[0] == rates[1] == float(again.optimizer.learning_rate)
    # An SGD without momentum is whole before it is built: it may be loaded.
    assert int(again.optimizer.iterations) in (
        0,
        int(model.optimizer.iterations),
    )
    # What a method starts from is what the model holds now.
    again.optimizer.learning_rate = 0.0
    contract.fit(again, x, y)
    for v, w in zip(again.trainable_variables, model.trainable_variables):
        v, w = (keras.ops.convert_to_numpy(each) for each in (v, w))
        np.testing.assert_allclose(v, w, rtol=1e-6, atol=1e-7)
    # Built before, every number is there.
    built = made()
    built.optimizer.build(built.trainable_variables)
    built.load_weights(path)
    contract.assert_same_bits(contract.state(model), contract.state(built))


@OWN_ROWS
def test_set_weights_of_an_optimizer(row):
    """As Keras's own test has it, with the variables of another one."""
    x, y = contract.data(4)
    optimizer = row.build(contract.INNER["adamw"]())
    contract.fit(contract.compiled(optimizer), x, y)
    model = contract.compiled(row.build(contract.INNER["adamw"]()))
    with pytest.raises(ValueError, match="You are calling"):
        model.optimizer.set_weights(optimizer.variables)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.set_weights(optimizer.variables)
    values = [
        [keras.ops.convert_to_numpy(v) for v in each.variables]
        for each in (optimizer, model.optimizer)
    ]
    contract.assert_same_bits(*values)
    if not row.wraps:
        return  # on JAX Keras's own method lets the two share buffers
    contract.fit(model, x, y)
    contract.assert_same_bits(
        values[0], [keras.ops.convert_to_numpy(v) for v in optimizer.variables]
    )


@WRAPPERS
@pytest.mark.parametrize(
    "name, value",
    [
        ("clipnorm", 0.5),
        ("clipvalue", 0.5),
        ("global_clipnorm", 0.5),
        ("weight_decay", 0.25),
        ("gradient_accumulation_steps", 2),
        ("use_ema", True),
        ("ema_momentum", 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:`clip")
def test_attributes_of_the_inner_optimizer(row, name, value):
    """Keras reads them of the outermost; the slots are the inner one's."""
    inner = keras.optimizers.AdamW(0.01, **{name: value})
    refused = (name == "use_ema" and not row.averages) or (
        name == "gradient_accumulation_steps" and row.period > 1
    )
    if refused:
        with pytest.raises(ValueError, match="average|gradient_accumulation"):
            row.build(inner)
        return
    optimizer = row.build(inner)
    optimizer.build([keras.Variable(np.ones(3, "float32"))])
    assert getattr(optimizer, name) == value
    plain = row.build(keras.optimizers.AdamW(0.01))
    plain.build([keras.Variable(np.ones(3, "float32"))])
    assert len(optimizer.own_variables) == len(plain.own_variables)
    if name in ("clipnorm", "clipvalue", "global_clipnorm"):
        setattr(optimizer, name, 0.75)
        assert getattr(inner, name) == 0.75


@WRAPPERS
def test_mistakes_are_told_with_what_to_write(row):
    """For every wrapper; `build` of a row hands the inner optimizer over."""
    kind = type(row.build("sgd"))
    name = kind.__name__
    right = rf"{name}\(keras.optimizers.SGD\(0.1\)\).*Received"
    for value in (0.1, keras.optimizers.SGD):
        with pytest.raises(ValueError, match=right):
            row.build(value)
    with pytest.raises(ValueError, match="for example 'adam'.*Received"):
        row.build("adamm")
    on_inner = rf"{name}\(keras.optimizers.SGD\(momentum=0.9\)\).*Received"
    with pytest.raises(ValueError, match=on_inner):
        kind("sgd", momentum=0.9)
    with pytest.raises(ValueError, match="did you mean `name`"):
        kind("sgd", nane="a")


# ---- Counting -------------------------------------------------------------


@OWN_WHOLE_ROWS
def test_weights_move_once_a_period(row):
    x, y = contract.data()
    model = contract.compiled(row.build(contract.INNER["sgd"]()))
    first = model.layers[1]
    before = np.asarray(first.get_weights()[0])
    for step in range(2 * row.period):
        rows = slice(step * contract.BATCH, (step + 1) * contract.BATCH)
        model.train_on_batch(x[rows], y[rows])
        after = np.asarray(first.get_weights()[0])
        moved = not np.array_equal(before, after)
        assert moved == ((step + 1) % row.period == 0)
        before = after


@pytest.mark.parametrize(
    "row",
    contract.parameters(
        row for row in contract.ROWS if row.accumulates and row.reference
    ),
)
def test_gradient_accumulation_of_the_inner_optimizer(row):
    """Four batches at the same weights make one step of their mean."""
    batches, kernel, bias = regression(rows=(12,) * 8)
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    model = linear_model(row.build(inner), kernel, bias)
    expected = [kernel, bias]
    for start in (0, 4):
        moves = []
        for batch in batches[start : start + 4]:
            problem = reference.LinearRegression(*expected)
            after = next(row.reference(problem, [batch], 0.1))
            moves.append([a - b for a, b in zip(after, expected)])
            before = model.get_weights()
            model.train_on_batch(*[a.astype("float32") for a in batch])
            if len(moves) < 4:
                contract.assert_same_bits(before, model.get_weights())
        expected = [
            p + np.mean(change, axis=0)
            for p, change in zip(expected, zip(*moves))
        ]
        for actual, wanted in zip(model.get_weights(), expected):
            np.testing.assert_allclose(actual, wanted, atol=2e-6, rtol=1e-5)
    assert int(model.optimizer.iterations) == 2


@pytest.mark.parametrize(
    "row",
    contract.parameters(
        [
            row
            for row in contract.ROWS
            if not (row.nested or (row.accumulates and row.reference))
        ]
    ),
)
def test_gradient_accumulation_in_windows(row, record_property):
    """Four batches move the weights as their union does, at the fourth."""
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    if row.period > 1:
        with pytest.raises(ValueError, match="gradient_accumulation_steps"):
            row.build(inner)
        record_property("support", "refused")
        return
    batches, kernel, bias = regression(rows=(12,) * 8)
    batches = [[a.astype("float32") for a in batch] for batch in batches]
    model = linear_model(row.build(inner), kernel, bias)
    whole = linear_model(row.build(keras.optimizers.SGD(0.1)), kernel, bias)
    for window in (batches[:4], batches[4:]):
        for batch in window[:3]:
            before = model.get_weights()
            model.train_on_batch(*batch)
            contract.assert_same_bits(before, model.get_weights())
        model.train_on_batch(*window[3])
        assert not np.array_equal(before[0], model.get_weights()[0])
        if row.reference is None:
            continue  # it draws labels of the last batch, not of the union
        whole.train_on_batch(*[np.concatenate(parts) for parts in zip(*window)])
        for actual, wanted in zip(model.get_weights(), whole.get_weights()):
            np.testing.assert_allclose(actual, wanted, atol=2e-6, rtol=1e-5)
    assert int(model.optimizer.iterations) == 2


# ---- Several devices ------------------------------------------------------

DEVICE_BATCHES = (12, 12, 12)

if keras.backend.backend() == "jax":

    @pytest.fixture(scope="module")
    def on_two_devices(tmp_path_factory):
        path = tmp_path_factory.mktemp("devices") / "weights.npz"
        worker = Path(__file__).parent / "workers" / "data_parallel.py"
        # Compiling takes most of the time of so small a model.
        flags = "--xla_force_host_platform_device_count=2"
        flags += " --xla_backend_optimization_level=0"
        done = subprocess.run(
            [sys.executable, str(worker), str(path)],
            env={**os.environ, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        with np.load(path) as arrays:
            return dict(arrays)

    @OWN_WHOLE_ROWS
    def test_data_parallel(row, on_two_devices):
        batches, kernel, bias = regression(DEVICE_BATCHES)
        if row.reference is not None:
            problem = reference.LinearRegression(kernel, bias)
            *_, wanted = row.reference(problem, batches, 0.1)
        else:
            optimizer = row.build(keras.optimizers.SGD(0.1))
            model = linear_model(optimizer, kernel, bias)
            for batch in batches:
                model.train_on_batch(*[a.astype("float32") for a in batch])
            wanted = model.get_weights()
        for i, weights in enumerate(wanted):
            actual = on_two_devices[f"{row.name}/{i}"]
            np.testing.assert_allclose(actual, weights, atol=2e-6, rtol=1e-5)


# ---- Precision ------------------------------------------------------------


@pytest.fixture
def float64():
    """Double precision in layers, optimizers and, where it is off, JAX."""
    with double_precision():
        keras.config.set_dtype_policy("float64")
        yield


class DoubleLinear(keras.Model):
    """The linear model by operations that Keras does not round to float32.

    `ops.mean` does on PyTorch and JAX, and `ops.matmul` on PyTorch; `Dense`
    and "mse" with them.
    """

    def __init__(self, kernel, bias):
        super().__init__()
        self.kernel = self.add_weight(shape=kernel.shape, name="kernel")
        self.bias = self.add_weight(shape=bias.shape, name="bias")
        self.built = True
        self.set_weights([kernel, bias])

    def call(self, inputs):
        return keras.ops.einsum("ni,io->no", inputs, self.kernel) + self.bias

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        rows = keras.ops.cast(keras.ops.shape(y)[0], "float64")
        errors = keras.ops.subtract(y_pred, y)
        total = keras.ops.sum(keras.ops.square(errors))
        return total / (rows * y.shape[-1])


def double_linear(optimizer, kernel, bias):
    model = DoubleLinear(kernel, bias)
    model.compile(optimizer)
    return model


# A number that float32 holds too: TensorFlow keeps the learning rate in it.
DOUBLE_RATE = 0.125


@pytest.mark.parametrize(
    "make",
    [double_linear]
    if JAX_OR_TORCH
    else [double_linear, pytest.param(linear_model, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "row",
    one_of_each_family(
        [
            contract.Row("stock", lambda inner: inner, contract.plain_steps),
            contract.Row(
                "ASAM",
                lambda inner: keras_stab.SAM(
                    inner,
                    keras.optimizers.schedules.PolynomialDecay(0.125, 1, 0.125),
                    adaptive=True,
                    interval=2,
                ),
                contract.adaptive_sam_steps,
            ),
            *(r for r in contract.ROWS if r.reference is not None),
        ],
        names=(*contract.OF_EACH_FAMILY, "stock", "ASAM"),
    ),
)
def test_double_precision(row, make, float64):
    """Nothing of ours rounds to float32 on the way."""
    batches, kernel, bias = regression((12, 12, 12, 10, 12, 12))
    model = make(row.build(keras.optimizers.SGD(DOUBLE_RATE)), kernel, bias)
    problem = reference.LinearRegression(kernel, bias)
    expected = row.reference(problem, batches, DOUBLE_RATE)
    for (x, y), parameters in zip(batches, expected):
        model.train_on_batch(x, y)
        assert {v.dtype for v in model.trainable_variables} == {"float64"}
        for actual, wanted in zip(model.get_weights(), parameters):
            np.testing.assert_allclose(actual, wanted, atol=1e-12, rtol=1e-12)


@OWN_ROWS
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(row, policy):
    x, y = contract.data(6)
    keras.config.set_dtype_policy(policy)
    model = contract.compiled(row.build(contract.INNER["adamw"]()))
    start = weights(model)
    history = contract.fit(model, x, y, epochs=3).history
    assert all(np.isfinite(history["loss"]))
    assert not np.array_equal(start[0], weights(model)[0])
    assert all(np.all(np.isfinite(w)) for w in weights(model))
    scaler = model.optimizer
    on_top = isinstance(scaler, keras.optimizers.LossScaleOptimizer)
    assert on_top == (policy == "mixed_float16")
    if on_top:
        an_infinite_batch_is_skipped(model, x, y)


def an_infinite_batch_is_skipped(model, x, y):
    inner = model.optimizer.inner_optimizer
    scale = float(model.optimizer.dynamic_scale)
    trained = [*model.trainable_variables, *inner.variables]
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in trained]
    bad = x[: contract.BATCH].copy()
    bad[5] = np.inf
    model.train_on_batch(bad, y[: contract.BATCH])
    after = [np.array(keras.ops.convert_to_numpy(v)) for v in trained]
    contract.assert_same_bits(before, after)
    assert float(model.optimizer.dynamic_scale) == scale / 2
    contract.fit(model, x, y)


@pytest.mark.parametrize(
    "row",
    one_of_each_family(OWN_WRAPPERS, whole=True, names=contract.OF_EACH_PLACE),
)
def test_a_loss_scaler_inside(row):
    """Our method on top of the scaler does what it does below it."""
    x, y = contract.data(6)

    def trained(optimizer):
        keras.config.set_dtype_policy("mixed_float16")
        model = contract.compiled(optimizer, auto_scale_loss=False)
        contract.fit(model, x, y)
        return weights(model)

    scaler = keras.optimizers.LossScaleOptimizer
    inside = trained(row.build(scaler(contract.INNER["sgd"]())))
    outside = trained(scaler(row.build(contract.INNER["sgd"]())))
    for a, b in zip(inside, outside):
        np.testing.assert_allclose(a, b, atol=1e-6)


# ---- Compilation ----------------------------------------------------------


class Counting(keras.layers.Layer):
    calls = 0

    def call(self, inputs):
        type(self).calls += 1
        return inputs


# On JAX nothing is traced without `jit_compile`.
TRACED = JIT[:1] if keras.backend.backend() == "jax" else JIT


@OWN_WHOLE_ROWS
@pytest.mark.parametrize("jit_compile", TRACED)
def test_no_retrace_after_the_second_step(row, jit_compile, record_property):
    x, y = contract.data(4)
    if not JIT[0]:
        record_property("support", "eager")
    model = keras.Sequential(
        [
            keras.Input((contract.FEATURES,)),
            Counting(),
            keras.layers.Dense(contract.CLASSES),
        ]
    )
    optimizer = row.build(contract.INNER["adamw"]())
    contract.compiled(optimizer, model, jit_compile=jit_compile)
    contract.fit(model, x, y)
    traced = Counting.calls
    contract.fit(model, x, y)
    again = Counting.calls - traced
    if keras.backend.backend() == "torch":  # eager: a pass or two a step
        assert 4 <= again <= 8
    else:
        assert again == 0


@OWN_WHOLE_ROWS
def test_ways_to_execute_agree(row, record_property):
    """Step by step, compiled, and several steps in one call."""
    x, y = contract.data(4)
    # XLA draws other random numbers than eager TensorFlow: no dropout, and no
    # XLA where the optimizer draws some.
    jit = JIT[0] and (JAX_OR_TORCH or row.reference is not None)
    ways = [{"run_eagerly": True}, {"jit_compile": jit}]
    if SEVERAL_STEPS:
        ways.append({"jit_compile": jit, "steps_per_execution": 2})
    else:
        record_property(
            "support",
            {"`steps_per_execution`": "absent", "`jit_compile`": "eager"},
        )
    results = []
    for arguments in ways:
        model = contract.compiled(
            row.build(contract.INNER["momentum"]()),
            contract.classifier(dropout=False),
            **arguments,
        )
        contract.fit(model, x, y)
        results.append(contract.state(model))
    for result in results[1:]:
        for a, b in zip(results[0], result):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_keras_refuses_several_steps_in_one_call_on_torch():
    if SEVERAL_STEPS:
        return
    model = contract.compiled(keras_stab.GRAIN("sgd"), steps_per_execution=3)
    with pytest.raises(ValueError, match="steps_per_execution"):
        contract.fit(model, *contract.data(3))


# ---- Variables ------------------------------------------------------------


class Unused(keras.layers.Layer):
    """Owns a weight that the loss does not depend on."""

    def build(self, input_shape):
        self.spare = self.add_weight(shape=(2,), name="spare")

    def call(self, inputs):
        return inputs


@OWN_WHOLE_ROWS
def test_frozen_layers_and_variables_without_gradient_stay(row):
    x, y = contract.data(6)
    trained = contract.classifier()
    model = keras.Sequential([*trained.layers, Unused(name="unused")])
    for name in ("first", "norm"):
        model.get_layer(name).trainable = False
    stay = [model.get_layer(n) for n in ("first", "norm", "unused")]
    before = [layer.get_weights() for layer in stay]
    last = model.get_layer("last").get_weights()
    contract.compiled(row.build(contract.INNER["sgd"]()), model)
    contract.fit(model, x, y)
    for layer, values in zip(stay, before):
        contract.assert_same_bits(values, layer.get_weights())
    assert not np.array_equal(last[0], model.get_layer("last").get_weights()[0])


@keras.saving.register_keras_serializable(package="keras_stab_tests")
class Offset(keras.layers.Layer):
    """The bias of a linear model, as a layer that can be frozen."""

    def build(self, input_shape):
        self.bias = self.add_weight(
            shape=input_shape[-1:], initializer="zeros", name="bias"
        )

    def call(self, inputs):
        return inputs + self.bias


FREEZE_WAYS = (
    [True, False] if keras.backend.backend() == "tensorflow" else [False]
)
# Twelve steps end a cycle of every row; after thirteen they are inside of one.


@pytest.mark.filterwarnings("error:Gradients do not exist")
@pytest.mark.parametrize("run_eagerly", FREEZE_WAYS)
@pytest.mark.parametrize(
    "frozen, before",
    quick(
        [("kernel", 12), ("bias", 12), ("kernel", 13)],
        lambda case: case == ("kernel", 13),
    ),
)
@OWN_ROWS
def test_a_layer_frozen_without_a_new_compile(row, frozen, before, run_eagerly):
    """It stands still, and the other one is trained as if it were alone."""
    batches, kernel, bias = regression((12,) * (before + 6))
    batches = [[a.astype("float32") for a in batch] for batch in batches]
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(2, use_bias=False, name="kernel"),
            Offset(name="bias"),
        ]
    )
    model.set_weights([kernel, bias])
    optimizer = row.build(keras.optimizers.SGD(0.1))
    model.compile(optimizer, "mse", run_eagerly=run_eagerly)
    problem = reference.LinearRegression(kernel, bias)
    steps = row.reference and row.reference(problem, batches, 0.1)
    names = ("kernel", "bias")
    for step, batch in enumerate(batches):
        if step == before:
            model.get_layer(frozen).trainable = False
            stays = model.get_layer(frozen).get_weights()
            moves = model.get_layer(names[frozen == "kernel"])
            start = moves.get_weights()
            problem.freeze(names.index(frozen))
            if keras.backend.backend() == "jax":
                with pytest.raises(ValueError, match="1:1 to the trainable"):
                    contract.fit(model, *batch)
                return
            # Keras does not trace its step again by itself.
            model.make_train_function(force=True)
        contract.fit(model, *batch)
        wanted = next(steps) if steps else [kernel, bias]
        if step < before:
            continue
        contract.assert_same_bits(stays, model.get_layer(frozen).get_weights())
        if steps and before == 12:
            np.testing.assert_allclose(
                moves.get_weights()[0],
                wanted[names.index(moves.name)],
                atol=2e-5,
            )
    assert not np.array_equal(start[0], moves.get_weights()[0])


FLOAT8_ROWS = pytest.mark.parametrize(
    "row",
    one_of_each_family(
        (r for r in contract.ROWS if r.name not in contract.DO_AS_OTHERS),
        names=contract.OF_EACH_PLACE,
    ),
)


def numbers(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


@FLOAT8_ROWS
def test_scales_of_float8_layers_are_those_of_the_stock_optimizer(row):
    """Weights hardly move: what is left is how the scales are assigned."""
    x, y = contract.data(6)
    ends = []
    for build in (lambda inner: inner, row.build):
        model = contract.compiled(
            build(keras.optimizers.SGD(1e-7)), contract.float8_classifier()
        )
        contract.fit(model, x, y)
        ends.append(numbers(contract.overwritten(model)))
    assert len(ends[0]) == 6
    assert all(np.any(value) for value in ends[0])
    for actual, wanted in zip(*reversed(ends)):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4)


@slow_but_on_torch
@FLOAT8_ROWS
def test_scales_of_float8_layers_count_as_no_weights(row):
    """In no norm, Gram matrix, mask, average or window.

    A step reads the scales. The histories, which may be as large as they
    like, matter to later scales only.
    """
    x, y = contract.data(5)
    ends = []
    for largest in (0.0, 1e6):
        model = contract.compiled(
            row.build(contract.INNER["sgd"]()), contract.float8_classifier()
        )
        model.optimizer.build(model.trainable_variables)
        for step in range(5):
            for variable in contract.overwritten(model):
                value = largest if "history" in variable.name else 0.01
                variable.assign(np.full(variable.shape, value, "float32"))
            rows = slice(step * contract.BATCH, (step + 1) * contract.BATCH)
            model.train_on_batch(x[rows], y[rows])
        others = {id(v) for v in contract.overwritten(model)}
        ends.append(numbers(v for v in model.variables if id(v) not in others))
    contract.assert_same_bits(*ends)


@FLOAT8_ROWS
def test_a_float8_model_loads_and_goes_on(row, tmp_path):
    """A loaded layer has its variables in another order: scales come first."""
    x, y = contract.data(6)
    half = 3 * contract.BATCH
    model = contract.compiled(
        row.build(contract.INNER["momentum"]()), contract.float8_classifier()
    )
    contract.fit(model, x[:half], y[:half])
    lends = row.second_weights and row.second_weights != "own"
    lent = model.optimizer.swap_weights(model) if lends else nullcontext()
    with lent:
        model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, again):
        contract.fit(each, x[half:], y[half:])
    ends = [
        numbers(
            [
                *sorted(each.trainable_variables, key=lambda v: v.path),
                *each.optimizer.variables,
            ]
        )
        for each in (model, again)
    ]
    contract.assert_same_bits(*ends)


@OWN_ROWS
def test_a_nan_batch_is_visible_and_harmless_where_promised(row):
    """GRAIN drops non-finite groups; a plain optimizer promises nothing."""
    if row.is_inner or not row.wraps or not row.drops_nan:
        return
    x, y = contract.data(6)
    model = contract.compiled(row.build(contract.INNER["adamw"]()))
    contract.fit(model, x, y)
    bad = np.full_like(x[: contract.BATCH], np.nan)
    loss = model.train_on_batch(bad, y[: contract.BATCH])[0]
    assert np.isnan(loss)
    # Across batches the forward pass is Keras's own, and so is what it does
    # to moving statistics.
    kept = model.trainable_variables if row.period > 1 else model.variables
    for variable in [*kept, *model.optimizer.inner_optimizer.variables]:
        assert np.all(np.isfinite(keras.ops.convert_to_numpy(variable)))


# ---- Callbacks ------------------------------------------------------------


def callback_parameters():
    """Rows and names of callbacks; slow where another row does the same."""
    pairs = [
        (row, name)
        for row in contract.ROWS
        if not (row.nested or row.name in ("Transparent", "AskingNothing"))
        for name in callback_cases.CHECKS
    ]
    for parameter in contract.parameters(pairs, whole=True):
        row, name = parameter.values
        probed = (
            name == "StabilityMonitor"
            and row.name in (callback_cases.SILENT[1:])
        )
        done_by_others = row.name in contract.DO_AS_OTHERS
        if (
            probed
            or done_by_others
            or contract.is_slow(row, contract.OF_EACH_PLACE)
        ):
            marks = pytest.mark.slow
            parameter = pytest.param(row, name, id=parameter.id, marks=marks)
        yield parameter


@pytest.mark.parametrize("row, name", callback_parameters())
@pytest.mark.filterwarnings("ignore:The model has batch-norm layers")
def test_callback(row, name, tmp_path, record_property):
    outcome = callback_cases.check(row, name, tmp_path)
    record_property("support", outcome)


@OWN_ROWS
def test_what_was_saved_loads(row, tmp_path):
    """A schedule in a callback may end a hair below 0."""
    rate = 0.3 - 0.1 * 3
    assert rate < 0
    x, y = contract.data(4)
    model = contract.compiled(
        row.build(keras.optimizers.SGD(0.01)), contract.classifier(False)
    )
    contract.fit(model, x, y)
    model.optimizer.learning_rate = rate
    contract.fit(model, x, y)
    path = tmp_path / "model.keras"
    model.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = keras.models.load_model(path)
    contract.assert_same_bits(contract.state(model), contract.state(again))
    contract.fit(model, x, y)
    contract.fit(again, x, y)
    contract.assert_same_bits(contract.state(model), contract.state(again))


@pytest.mark.parametrize("scaled", [False, True], ids=["nest", "scaled"])
def test_keras_finds_averages_deep_inside(scaled):
    """`SwapEMAWeights` looks into one `inner_optimizer` only."""
    optimizer = keras_stab.GRAIN(keras.optimizers.SGD(0.1, use_ema=True), 2)
    outer = keras.optimizers.LossScaleOptimizer if scaled else keras_stab.SAM
    model = contract.compiled(outer(optimizer), contract.classifier())
    seen = []
    noting = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(model.get_weights())
    )
    swapping = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    x, y = contract.data(2)
    contract.fit(model, x, y, callbacks=[noting, swapping, noting])
    assert any(np.any(a != b) for a, b in zip(*seen))
    averages = getattr(
        optimizer.inner_optimizer, keras_stab.keras_internals.AVERAGES
    )
    for average, weight in zip(averages, model.trainable_variables):
        np.testing.assert_array_equal(average.numpy(), weight.numpy())
