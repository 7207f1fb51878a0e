"""IRE: vectors, thresholds, sampled labels, invariants, bad input."""

import itertools

import contract
import keras
import numpy as np
import pytest
import small_classifier
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from marks import slow_but_on_torch

import keras_stab
from keras_stab.backend import longer_steps
from keras_stab.backend import ranking
from keras_stab.backend import tracing
from keras_stab.gradients.oracle import GradientOracle
from keras_stab.gradients.sampled_labels import SampledLabels
from keras_stab.numerics.threshold import bits_of
from keras_stab.numerics.threshold import kth_smallest
from keras_stab.numerics.threshold import rank_of

JIT = "auto" if keras.backend.backend() == "torch" else True
VECTORS = small_classifier.IRE
RUNS = VECTORS["runs"]


def numpy(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor))


def own(optimizer, ending):
    """Variables that the optimizer saves, by the ends of their paths."""
    found = [v for v in optimizer.own_variables if v.path.endswith(ending)]
    return [numpy(v) for v in found]


def flat_masks(optimizer):
    """What is flat, from the saved masks or the saved average of scores."""
    (threshold,) = own(optimizer, "threshold_bits")
    scores = own(optimizer, "_curvature")
    return own(optimizer, "_flat") or [
        score.view("int32") <= threshold for score in scores
    ]


# ---- Threshold ------------------------------------------------------------


def smallest(parts, k):
    """By counting, and as this backend does it."""
    patterns = [bits_of(keras.ops.convert_to_tensor(p)) for p in parts]
    answers = [
        kth_smallest(patterns, k),
        ranking.kth_smallest(patterns, k),
    ]
    # Guesses that bracket it, and some that are far off or not in order.
    for guesses in ((answers[0] - 1, answers[0] + 1), (2**31 - 1, 0, 5)):
        guesses = [keras.ops.cast(g, "int32") for g in guesses]
        answers.append(kth_smallest(patterns, k, guesses=guesses))
    first, *others = (numpy(a) for a in answers)
    assert all(first == other for other in others)
    return first[()].view("float32"), patterns, first


@pytest.mark.parametrize("k", [1, 30_000, 65_000, 70_400])
def test_a_threshold_among_many_scores(k):
    """Where TensorFlow looks at a sample first."""
    rng = np.random.default_rng(k)
    parts = [rng.exponential(size=s) for s in ((220, 310), (2200,))]
    parts[0][:60] = 0.0
    parts = [p.astype("float32") for p in parts]
    expected = np.partition(np.concatenate([p.ravel() for p in parts]), k - 1)
    assert smallest(parts, k)[0] == expected[k - 1]


SCORES = st.one_of(
    st.floats(0, np.float32(np.inf), width=32, allow_nan=False),
    st.sampled_from([0.0, 1.0, 1e-45, 3e38, float("inf")]),
)


@given(
    # Two shapes, so that little is compiled.
    arrays.arrays("float32", st.sampled_from([1, 12]), elements=SCORES),
    st.data(),
)
def test_threshold_is_the_partition_element(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    cut = len(scores) // 2
    parts = [p for p in (scores[:cut], scores[cut:]) if len(p)]
    found, patterns, bits = smallest(parts, k)
    expected = np.partition(scores.view("int32"), k - 1)[k - 1]
    assert bits == expected
    flat = sum(int(np.sum(numpy(p) <= bits)) for p in patterns)
    assert flat == np.sum(scores.view("int32") <= expected) >= k


@pytest.mark.parametrize(
    "rule",
    VECTORS["threshold_rules"],
    ids=lambda r: f"{r['desc']} {r['gamma']}",
)
def test_threshold_vectors(rule):
    values = np.array(rule["values"], "float32")
    wanted = rule["kthvalue"]
    k = rank_of(round(rule["gamma"], 12), len(values))
    assert k == wanted["k"]
    found, patterns, bits = smallest([values], k)
    assert found == np.float32(wanted["threshold"])
    assert np.sum(numpy(patterns[0]) <= bits) == wanted["flat_count"]


@pytest.mark.parametrize(
    "fraction, count, k",
    [(0.1, 10, 1), (0.9, 10, 9), (0.6, 5, 3), (1e-9, 7, 1), (1.0, 7, 7)],
)
def test_rank_has_no_rounding_error(fraction, count, k):
    assert rank_of(fraction, count) == k


# ---- Vectors --------------------------------------------------------------


class Recorded(keras_stab.IRE):
    """Takes rows and labels of the Fisher pass from a recorded run."""

    def __init__(self, run, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.run = run

    def fisher_roots(self, oracle, step):
        batches = [self._batch(r) for r in self.run["refreshes"]]
        index = (step - self.start_step) // self.update_every
        x, y = (
            keras.ops.take(keras.ops.stack(part), index, axis=0)
            for part in zip(*batches)
        )
        oracle = oracle.head(1.0)
        oracle.batch = (x, y, None)

        def likelihood(y, y_pred, sample_weight):
            return small_classifier.LOGITS(y, y_pred)

        return oracle.with_loss(likelihood).gradient(), 4.0

    def _batch(self, refresh):
        y = np.array(refresh["sampled_labels"], "int32")
        if refresh["inputs"] == "estimation_inputs":
            x = np.array(small_classifier.PROBLEM["estimation_inputs"])
        else:
            x = small_classifier.batch(int(refresh["inputs"].split()[-1]))[0]
        return keras.ops.convert_to_tensor(x, "float32"), y


def recorded(run, inner):
    settings = run["ire"]
    # Counts of flat weights that the official rule of ties gives.
    flat = settings.get("flat_count", settings["k"])
    return Recorded(
        run,
        inner,
        flat_fraction=(flat + 0.5) / 43,
        boost=settings["boost"],
        update_every=settings["update_every"],
        start_step=settings["start_step"],
        curvature_momentum=settings["curvature_momentum"],
        boost_schedule=settings["boost_schedule"],
        reference_learning_rate=0.01
        if settings["boost_schedule"] == "learning_rate"
        else None,
        boost_weight_decay=settings.get("boost_weight_decay", True),
    )


@keras.saving.register_keras_serializable(package="keras_stab_tests")
def smoothed(y, y_pred):
    """Cross-entropy from targets of 0.9 and 0.05."""
    targets = 0.85 * keras.ops.one_hot(keras.ops.cast(y, "int32"), 3) + 0.05
    targets = keras.ops.reshape(targets, keras.ops.shape(y_pred))
    return keras.ops.categorical_crossentropy(targets, y_pred, from_logits=True)


ENTROPY = -(0.9 * np.log(0.9) + 2 * 0.05 * np.log(0.05))


@pytest.mark.parametrize("name", RUNS)
def test_vectors(name):
    run = RUNS[name]
    inner = small_classifier.base(run)
    if "sam" in run:
        inner = keras_stab.SAM(inner, rho=run["sam"]["rho"])
    smooth = run["train_loss"] == "smooth_kl_0.1"
    model = small_classifier.network()
    optimizer = recorded(run, inner)
    model.compile(optimizer, smoothed if smooth else small_classifier.LOGITS)
    refreshes = {r["before_step"]: r["flat"] for r in run["refreshes"]}
    for step, wanted in enumerate(run["loss_by_step"]):
        loss = model.train_on_batch(*small_classifier.batch(step))
        loss -= ENTROPY if smooth else 0.0
        np.testing.assert_allclose(loss, wanted, atol=2e-5)
        if step in refreshes:
            flat = small_classifier.flattened(flat_masks(optimizer)).astype(int)
            assert "".join(map(str, flat)) == refreshes[step]
        if str(step) in run["params_after"]:
            np.testing.assert_allclose(
                small_classifier.parameters(model),
                run["params_after"][str(step)],
                atol=2e-5,
            )


# ---- Sampled labels -------------------------------------------------------


def test_mean_over_all_labellings_is_the_fisher_diagonal():
    """The recorded one, from the likelihood that the Fisher pass uses."""
    case = VECTORS["fisher_enumeration"]
    model = small_classifier.network()
    model.compile("sgd", small_classifier.LOGITS)
    x = np.array(small_classifier.PROBLEM["inputs"], "float32")[:3]
    softmax = np.array(case["softmax"])
    total = np.zeros(43)
    for labels in itertools.product(range(3), repeat=3):
        oracle = GradientOracle(model, keras.ops.convert_to_tensor(x))
        y = keras.ops.convert_to_tensor(labels)
        gradient = oracle.with_loss(
            lambda _, y_pred, __: small_classifier.LOGITS(y, y_pred)
        ).gradient()
        share = np.prod([softmax[i, c] for i, c in enumerate(labels)])
        total += share * 3 * small_classifier.flattened(gradient) ** 2
    np.testing.assert_allclose(total, case["exact_diag_fisher"], atol=2e-6)


def compiled(loss, outputs=1, **arguments):
    """A linear model of three features; `loss` may be one or several."""
    inputs = keras.Input((3,))
    dense = [
        keras.layers.Dense(n, use_bias=False, name=f"head{i}")(inputs)
        for i, n in enumerate(np.atleast_1d(outputs).tolist())
    ]
    activation = arguments.pop("activation", None)
    if activation is not None:
        dense = [keras.layers.Activation(activation)(d) for d in dense]
    model = keras.Model(inputs, dense if len(dense) > 1 else dense[0])
    model.compile("sgd", loss, **arguments)
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=w.shape) for w in model.get_weights()]
    model.set_weights(weights)
    return model, generator.normal(size=(5, 3)).astype("float32"), weights


def mean_squares(model, x, y, sample_weight=None, draws=400):
    """`n ghat^2` averaged over drawn labels, for each variable."""
    generator = keras.random.SeedGenerator(5)
    convert = keras.ops.convert_to_tensor
    y = keras.tree.map_structure(convert, y)
    if sample_weight is not None:
        sample_weight = convert(sample_weight, "float32")
    state = generator.state.value + 0

    def squares(x, y, sample_weight, k):
        seed = keras.ops.stack([state[0], keras.ops.cast(k, state.dtype)])
        oracle = GradientOracle(model, x, y, sample_weight)
        labels = SampledLabels(model, generator, seed)
        gradients = oracle.with_loss(labels).gradient()
        count = keras.ops.cast(labels.count, "float32")
        return [count * keras.ops.square(g) for g in gradients]

    model.compute_loss(None, y, model(x))  # builds the compiled losses
    if keras.backend.backend() == "jax":
        import jax

        squares = jax.jit(squares)
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        squares = tf.function(squares, autograph=False)
    total = 0.0
    for k in range(draws):
        parts = squares(convert(x), y, sample_weight, convert(16 * k))
        total = total + np.concatenate([numpy(p).ravel() for p in parts])
    return total / draws


def curvature(x, outputs, factor, shares):
    """`sum_i c_i sum_j F_j(f_i) x_i^2`, for weights in `[3, outputs]`."""
    return np.einsum("i,ia,ij->aj", shares, x**2, factor).ravel()


def categorical_curvature(x, logits, shares):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return curvature(x, None, p * (1 - p), shares)


SAMPLED = {
    "logits": (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        3,
        None,
        np.zeros(5, "int32"),
        lambda f: categorical(f),
    ),
    "probabilities, smoothed": (
        keras.losses.CategoricalCrossentropy(label_smoothing=0.2),
        3,
        "softmax",
        np.eye(3, dtype="float32")[[0, 1, 2, 0, 1]],
        lambda f: categorical(f),
    ),
    "binary": (
        keras.losses.BinaryCrossentropy(from_logits=True),
        2,
        None,
        np.zeros((5, 2), "float32"),
        lambda f: sigmoid(f) * (1 - sigmoid(f)) / 2,
    ),
    "squared": (
        "mse",
        2,
        None,
        np.zeros((5, 2), "float32"),
        lambda f: np.full_like(f, 2.0) / 2,
    ),
    "absolute": (
        "mae",
        2,
        None,
        np.zeros((5, 2), "float32"),
        lambda f: np.ones_like(f) / 2,
    ),
    "poisson": (
        "poisson",
        2,
        "exponential",
        np.ones((5, 2), "float32"),
        lambda f: np.exp(f) / 2,
    ),
}


def sigmoid(f):
    return 1 / (1 + np.exp(-f))


def categorical(f):
    p = np.exp(f - f.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p * (1 - p)


@pytest.mark.parametrize("name", SAMPLED)
def test_squares_are_on_average_the_gauss_newton_diagonal(name):
    """Also with weights that are neither 0 nor 1."""
    loss, outputs, activation, y, factor = SAMPLED[name]
    model, x, weights = compiled(loss, outputs, activation=activation)
    share = np.array([1.0, 0.5, 0.0, 2.0, 1.0])
    actual = mean_squares(model, x, y, share)
    wanted = np.einsum(
        "i,ia,ij->aj", share / 5, x**2, factor(x @ weights[0])
    ).ravel()
    # Draws: about 7 % a coordinate, less on the whole.
    np.testing.assert_allclose(actual, wanted, rtol=0.4)
    assert actual.sum() == pytest.approx(wanted.sum(), rel=0.15)


def test_several_outputs_enter_with_their_loss_weights():
    logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model, x, weights = compiled(
        {"head0": logits, "head1": "mse"},
        [3, 2],
        loss_weights={"head0": 0.5, "head1": 3.0},
    )
    y = [np.zeros(5, "int32"), np.zeros((5, 2), "float32")]
    actual = mean_squares(model, x, y)
    shares = np.full(5, 1 / 5)
    wanted = np.concatenate(
        [
            0.5 * curvature(x, 3, categorical(x @ weights[0]), shares),
            3.0 * curvature(x, 2, np.ones((5, 2)), shares),
        ]
    )
    for part in (slice(0, 9), slice(9, 15)):
        assert actual[part].sum() == pytest.approx(wanted[part].sum(), rel=0.15)


@pytest.mark.parametrize("kind", ["mask", "ignored", "weights"])
def test_padding_does_not_count(kind):
    """The same rows without their padding give the same curvature."""
    ignore = -1 if kind == "ignored" else None
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=ignore
    )
    ids = np.array([[1, 2, 0, 0], [3, 1, 2, 0]], "int32")
    keras.utils.set_random_seed(2)
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(4, 3, mask_zero=kind == "mask")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    model.compile("sgd", loss)
    y = np.where(ids == 0, -1 if kind == "ignored" else 0, 1)
    valid = (ids > 0).astype("float32")
    actual = mean_squares(
        model, ids, y, valid if kind == "weights" else None, draws=200
    )
    table = model.get_weights()[0]
    rows = table[ids[ids > 0]].astype("float64")
    f = rows @ model.get_weights()[1] + model.get_weights()[2]
    # With weights Keras divides by all positions, with a mask by the valid.
    shares = np.full(len(rows), 1 / (8 if kind == "weights" else len(rows)))
    wanted = curvature(rows, None, categorical(f), shares)
    assert np.all(actual[:3] == 0.0)  # the row of the padding
    kernel = actual[12:21]
    assert kernel.sum() == pytest.approx(wanted.sum(), rel=0.25)


class OwnLoss(keras.Model):
    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        y = keras.ops.convert_to_tensor(y)
        return keras.ops.mean(keras.ops.square(y - y_pred))


@pytest.mark.parametrize("loss", ["huber", "hinge", lambda y, p: p - y, None])
def test_unknown_losses_are_refused(loss):
    model, x, _ = compiled(loss or "mse")
    if loss is None:
        model = OwnLoss(model.inputs, model.outputs)
    model.compile(keras_stab.IRE("sgd"), loss or "mse")
    words = 'label_sampler.*"second_moment" or curvature="gradient"'
    with pytest.raises(ValueError, match=words):
        model.train_on_batch(x, np.zeros((5, 1), "float32"))


@slow_but_on_torch
@pytest.mark.parametrize("start_step", [99, "manual"])
def test_unknown_losses_are_refused_at_the_first_step(start_step):
    """Not from inside of a branch, when labels are drawn first."""
    model, x, _ = compiled("mse")
    model.compile(keras_stab.IRE("sgd", start_step=start_step), "huber")
    with pytest.raises(ValueError, match="^The labels that the model") as error:
        model.train_on_batch(x, np.zeros((5, 1), "float32"))
    assert "Cond.call" not in str(error.value)


@pytest.mark.parametrize("given", [["head0", "head1"], ["head1"]])
def test_an_output_without_a_loss_takes_no_part(given):
    inputs = keras.Input((3,))
    heads = {
        name: keras.layers.Dense(2, name=name)(inputs)
        for name in ("head0", "head1")
    }
    model = keras.Model(inputs, heads)
    optimizer = keras_stab.IRE("sgd", update_every=1)
    model.compile(optimizer, {"head0": None, "head1": "mse"})
    y = {name: np.zeros((5, 2), "float32") for name in given}
    model.train_on_batch(np.ones((5, 3), "float32"), y)
    figures = optimizer.diagnostics()
    assert (figures["refreshes"], figures["skipped_refreshes"]) == (1, 0)


@keras.saving.register_keras_serializable(package="keras_stab_tests")
def normal_labels(outputs, seed):
    noise = keras.random.normal(keras.ops.shape(outputs), seed=seed)
    return outputs + noise * 0.5**0.5


@pytest.mark.parametrize("own", [False, True])
def test_label_sampler(own):
    """For a loss of one's own; penalties stay out of the curvature."""
    inputs = keras.Input((3,))
    dense = keras.layers.Dense(
        1, use_bias=False, kernel_regularizer=keras.regularizers.L2(1e6)
    )
    model = (OwnLoss if own else keras.Model)(inputs, dense(inputs))
    optimizer = keras_stab.IRE(
        keras.optimizers.SGD(0.0),
        label_sampler=normal_labels,
        fisher_fraction=1.0,
        update_every=1,
    )
    model.compile(optimizer, "huber")
    x = np.eye(3, dtype="float32")
    model.train_on_batch(x, np.zeros((3, 1), "float32"))
    trace = optimizer.diagnostics()["curvature_trace"]
    assert 0.0 < trace < 1e3
    again = keras_stab.IRE.from_config(optimizer.get_config())
    assert again.label_sampler is normal_labels


# ---- Invariants -----------------------------------------------------------


def little(optimizer):
    """One layer: most of what follows is about the optimizer alone."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((contract.FEATURES,))
    model = keras.Model(inputs, keras.layers.Dense(contract.CLASSES)(inputs))
    return contract.compiled(optimizer, model, jit_compile=JIT)


def trained(optimizer, steps=4, make=little):
    model = make(optimizer)
    contract.fit(model, *contract.data(steps))
    return model


@pytest.mark.parametrize(
    "arguments",
    [{"boost": 0.0}, {"start_step": 99}, {"start_step": "manual"}],
    ids=str,
)
def test_off_is_the_inner_optimizer_bit_for_bit(arguments):
    plain = trained(contract.INNER["adamw"]())
    off = trained(keras_stab.IRE(contract.INNER["adamw"](), **arguments))
    contract.assert_same_bits(plain.get_weights(), off.get_weights())


def test_sharp_weights_keep_the_bits_of_the_inner_step():
    """Over one step: flat ones move by 1 + boost times as much."""
    plain = trained(contract.INNER["adamw"](), steps=1)
    optimizer = keras_stab.IRE(contract.INNER["adamw"](), boost=3.0)
    boosted = trained(optimizer, steps=1)
    start = little("sgd")
    for i, (a, b, w) in enumerate(
        zip(
            plain.trainable_variables,
            boosted.trainable_variables,
            start.trainable_variables,
        )
    ):
        flat = flat_masks(optimizer)[i]
        a, b, w = numpy(a), numpy(b), numpy(w)
        np.testing.assert_array_equal(a[~flat], b[~flat])
        wanted = w + 4.0 * (a - w)
        np.testing.assert_allclose(b[flat], wanted[flat], atol=1e-6)
    # The inner optimizer has seen nothing of it.
    contract.assert_same_bits(
        [numpy(v) for v in plain.optimizer.variables],
        [numpy(v) for v in optimizer.inner_optimizer.variables],
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_a_longer_step_touches_nothing_outside_of_the_mask(
    compiled, monkeypatch
):
    """No bit of it, not even where the step was infinite."""
    if compiled:  # on TensorFlow, as for large weights
        monkeypatch.setattr(tracing, "WORTH_A_KERNEL", 0)
    variable = keras.Variable(np.array([-0.0, 1.0, 2.0, 3.0], "float32"))
    before = longer_steps.before_step([variable])
    variable.assign(np.array([-0.0, np.inf, 1.0, 5.0], "float32"))
    mask = keras.ops.convert_to_tensor([False, False, True, True])
    longer_steps.lengthen([variable], before, [mask], 2.0, [None])
    wanted = np.array([-0.0, np.inf, -1.0, 9.0], "float32")
    np.testing.assert_array_equal(
        numpy(variable).view("int32"), wanted.view("int32")
    )
    decay = keras.ops.convert_to_tensor(np.float32(0.5))
    before = longer_steps.before_step([variable])
    longer_steps.lengthen([variable], before, [mask], 2.0, [decay])
    assert numpy(variable)[2:].tolist() == [-2.0, 18.0]


def test_threshold_of_matrices():
    """Columns are counted first; more rows than fit into int16 are not.

    A weight may have no entries.
    """
    generator = np.random.default_rng(5)
    scores = generator.exponential(size=(40000, 2)).astype("float32")
    parts = [scores, scores[:9].reshape(3, 3, 2), scores[:0]]
    k = 48011
    found, _, _ = smallest(parts, k)
    every = np.concatenate([p.ravel() for p in parts])
    assert found == np.partition(every, k - 1)[k - 1]


def test_every_weight_flat_multiplies_the_step():
    optimizer = keras_stab.IRE(
        keras.optimizers.SGD(0.1), flat_fraction=1.0, boost=1.5
    )
    one = trained(optimizer, steps=3)
    other = trained(keras.optimizers.SGD(0.25), steps=3)
    for a, b in zip(one.get_weights(), other.get_weights()):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert optimizer.diagnostics()["flat_fraction"] == 1.0


def test_mask_has_the_count_and_ignores_scale_sign_and_cut():
    generator = np.random.default_rng(3)
    ghat = generator.normal(size=60).astype("float32")

    def mask(scores, shapes, fraction=0.6):
        weights = [keras.Variable(np.zeros(s, "float32")) for s in shapes]
        optimizer = keras_stab.IRE("sgd", fraction, curvature="gradient")
        optimizer.build(weights)
        parts = np.split(scores, np.cumsum([np.prod(s) for s in shapes])[:-1])
        parts = [
            keras.ops.convert_to_tensor(p.reshape(s))
            for p, s in zip(parts, shapes)
        ]
        optimizer.apply(parts, weights)
        return np.concatenate([m.ravel() for m in flat_masks(optimizer)])

    whole = mask(ghat, [(60,)])
    assert whole.sum() == 36
    np.testing.assert_array_equal(whole, mask(-1e-20 * ghat, [(4, 5), (40,)]))
    more = mask(ghat, [(60,)], fraction=0.8)
    assert more.sum() == 48 and np.all(more[whole])
    assert mask(np.ones(60, "float32"), [(60,)]).sum() == 60  # ties are flat


def test_fisher_pass_leaves_no_trace():
    """Noise, statistics and metrics are those of a run without it."""
    still = keras.optimizers.SGD(0.0)
    off = trained(still, steps=3, make=contract.compiled)
    ire = keras_stab.IRE(
        keras.optimizers.SGD(0.0), update_every=1, fisher_fraction=0.5
    )
    on = trained(ire, steps=3, make=contract.compiled)
    assert ire.diagnostics()["refreshes"] == 3
    for a, b in zip(off.get_weights(), on.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for one, other in zip(off.variables, on.variables):
        np.testing.assert_allclose(numpy(one), numpy(other), rtol=1e-6)


class Separate(keras_stab.IRE):
    """Makes a forward pass of its own."""

    def fisher_roots(self, oracle, step):
        return super().fisher_roots(oracle.head(1.0), step)


class Counting(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.calls = 0

    def call(self, inputs):
        self.calls += 1
        return inputs


def test_the_forward_pass_of_the_whole_batch_is_used_again():
    """Same masks of weights and outputs, one pass less."""
    figures, calls = [], []
    for kind in (keras_stab.IRE, Separate):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((4,), dtype="int32")
        counting = Counting()
        x = keras.layers.Embedding(5, 3, mask_zero=True)(inputs)
        x = keras.layers.Dropout(0.5, seed=1)(x)
        x = keras.layers.Dense(4, activation="tanh")(x)
        model = keras.Model(inputs, keras.layers.Dense(3)(counting(x)))
        optimizer = kind("sgd", fisher_fraction=1.0, seed=5)
        model.compile(optimizer, small_classifier.LOGITS, run_eagerly=True)
        ids = np.array([[1, 2, 0, 0], [3, 1, 2, 4], [4, 0, 0, 0]], "int32")
        counting.calls = 0
        model.train_on_batch(ids, ids % 3)
        calls.append(counting.calls)
        figures.append(optimizer.diagnostics())
    assert calls[0] == calls[1] - 1
    one, other = (f.pop("curvature_trace") for f in figures)
    assert one == pytest.approx(other, rel=1e-5) and one > 0.0
    by_path = [list(f.pop("flat_fractions").values()) for f in figures]
    assert by_path[0] == by_path[1]
    assert figures[0] == figures[1]


def test_refreshes_are_where_they_are_due():
    optimizer = keras_stab.IRE("sgd", update_every=3, start_step=2)
    model = little(optimizer)
    x, y = contract.data(1)
    counts = []
    for _ in range(9):
        model.train_on_batch(x, y)
        counts.append(optimizer.diagnostics()["refreshes"])
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_around_sam_the_masks_come_from_the_weights_themselves():
    masks = []
    for inner in ("sgd", keras_stab.SAM("sgd", rho=1.0)):
        optimizer = keras_stab.IRE(inner, seed=3)
        trained(optimizer, steps=1)
        masks.append(flat_masks(optimizer))
    contract.assert_same_bits(*masks)


def test_without_boost_it_is_sam():
    sam = trained(keras_stab.SAM("sgd"))
    ire = trained(keras_stab.IRE(keras_stab.SAM("sgd"), boost=0.0))
    contract.assert_same_bits(sam.get_weights(), ire.get_weights())


@pytest.mark.parametrize("curvature", ["fisher", "second_moment", "gradient"])
def test_around_grain(curvature):
    optimizer = keras_stab.IRE(
        keras_stab.GRAIN("adam", groups=4),
        curvature=curvature,
        update_every=1,
        start_step=1,
    )
    trained(optimizer, steps=3)
    figures = optimizer.diagnostics()
    assert figures["refreshes"] == 2 and figures["skipped_refreshes"] == 0
    assert figures["flat_fraction"] == pytest.approx(12 / 21)


def test_second_moment_is_the_inner_average():
    optimizer = keras_stab.IRE(
        "adam", flat_fraction=0.5, curvature="second_moment", update_every=1
    )
    model = trained(optimizer, steps=2)
    second = [
        numpy(v)
        for v in optimizer.inner_optimizer.variables
        if v.path.endswith("_velocity")
    ]
    model.train_on_batch(*contract.data(1))
    limit = np.sort(np.concatenate([s.ravel() for s in second]))
    limit = limit[rank_of(0.5, len(limit)) - 1]
    for flat, s in zip(flat_masks(optimizer), second, strict=True):
        np.testing.assert_array_equal(flat, s <= limit)
    # At update 0 every average is zero: nothing to rank.
    assert optimizer.diagnostics()["skipped_refreshes"] == 1


def test_constraint_holds_after_the_boost():
    inputs = keras.Input((2,))
    dense = keras.layers.Dense(
        1, use_bias=False, kernel_constraint=keras.constraints.NonNeg()
    )
    model = keras.Model(inputs, dense(inputs))
    model.set_weights([np.array([[1.0], [1.0]], "float32")])
    model.compile(
        keras_stab.IRE(keras.optimizers.SGD(0.2), flat_fraction=1.0, boost=9.0),
        "mse",
    )
    model.train_on_batch(np.eye(2, dtype="float32"), np.zeros((2, 1)))
    assert np.all(model.get_weights()[0] == 0.0)


def test_excluded_variables_are_neither_ranked_nor_boosted():
    optimizer = keras_stab.IRE("sgd", exclude=["bias$"])
    trained(optimizer, steps=1)
    names = [
        p.split("/")[-1] for p in optimizer.diagnostics()["flat_fractions"]
    ]
    assert names == ["kernel"]
    with pytest.raises(ValueError, match="matches no variable"):
        trained(keras_stab.IRE("sgd", exclude=["nothing"]), steps=1)


# ---- When -----------------------------------------------------------------


def test_warmup_end():
    rate = keras_stab.WarmupCosine(0.1, warmup_steps=2, total_steps=9)
    optimizer = keras_stab.IRE(
        keras.optimizers.SGD(rate), start_step="warmup_end", update_every=1
    )
    trained(optimizer, steps=4)
    assert optimizer.diagnostics()["refreshes"] == 2
    with pytest.raises(ValueError, match="`warmup_steps`"):
        keras_stab.IRE("sgd", start_step="warmup_end")


def test_start_at_a_loss():
    """The count begins there; the start is saved with the state."""
    optimizer = keras_stab.IRE("sgd", start_step="manual", update_every=1)
    model = little(optimizer)
    x, y = contract.data(6)
    never = keras_stab.StartBoostAtLoss(0.0, window=1)
    contract.fit(model, x, y, callbacks=[never])
    assert not optimizer.has_started
    now = keras_stab.StartBoostAtLoss(100.0, window=2)
    contract.fit(model, x, y, callbacks=[now])
    assert optimizer.has_started
    assert own(optimizer, "start_step") == [8]
    # After two of these six batches.
    assert optimizer.diagnostics()["refreshes"] == 4
    with pytest.raises(ValueError, match='start_step="manual"'):
        contract.fit(contract.compiled("sgd"), x, y, callbacks=[now])
    with pytest.raises(ValueError, match="is already set"):
        keras_stab.IRE("sgd").start_boost()


def test_level_is_above_the_floor_of_label_smoothing():
    from keras_stab.callbacks.start_boost import smoothing_floor

    assert smoothing_floor(0.1, 10) == pytest.approx(0.5003, abs=1e-4)
    assert smoothing_floor(0.1, 100) == pytest.approx(0.7778, abs=1e-4)
    assert smoothing_floor(0.1, 3) == pytest.approx(0.2911, abs=1e-4)
    loss = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=0.1
    )
    model, x, _ = compiled(loss, 3)
    optimizer = keras_stab.IRE("sgd", start_step="manual")
    model.compile(optimizer, loss)
    y = np.eye(3, dtype="float32")[[0, 1, 2, 0, 1]]
    mean = model.evaluate(x, y, verbose=0) - smoothing_floor(0.1, 3)
    for level, started in ((mean - 1e-3, False), (mean + 1e-3, True)):
        start = keras_stab.StartBoostAtLoss(level)
        model.fit(x, y, callbacks=[start], verbose=0)
        assert optimizer.has_started == started


# ---- Faults ---------------------------------------------------------------


def test_a_fisher_pass_with_nan_keeps_the_mask_and_is_counted():
    optimizer = keras_stab.IRE(keras.optimizers.SGD(0.0), update_every=1)
    model = trained(optimizer, steps=2)
    before = flat_masks(optimizer)
    x, y = contract.data(1)
    model.train_on_batch(np.full_like(x, np.nan), y)
    contract.assert_same_bits(before, flat_masks(optimizer))
    figures = optimizer.diagnostics()
    assert (figures["refreshes"], figures["skipped_refreshes"]) == (2, 1)


def test_a_batch_of_weight_zero_carries_no_ranking():
    optimizer = keras_stab.IRE("sgd", fisher_fraction=1.0)
    model = little(optimizer)
    x, y = contract.data(1)
    model.train_on_batch(x, y, sample_weight=np.zeros(len(x), "float32"))
    figures = optimizer.diagnostics()
    assert (figures["refreshes"], figures["skipped_refreshes"]) == (0, 1)
    assert figures["flat_fraction"] == 0.0


def test_a_skipped_step_leaves_no_trace():
    """Under a loss scaler, and on top of one."""
    keras.config.set_dtype_policy("mixed_float16")
    scaler = keras.optimizers.LossScaleOptimizer
    x, y = contract.data(1)
    bad = np.full_like(x, np.inf)
    makers = (
        lambda: keras_stab.IRE(
            scaler(keras.optimizers.SGD(0.1)), update_every=1
        ),
        lambda: keras_stab.IRE("sgd", update_every=1, fisher_fraction=1.0),
    )
    for make in makers:
        optimizer = make()
        inside = isinstance(optimizer.inner_optimizer, scaler)
        model = contract.compiled(optimizer, auto_scale_loss=not inside)
        model.train_on_batch(x, y)
        kept = [numpy(v) for v in optimizer.own_variables]
        weights = [numpy(v) for v in model.trainable_variables]
        model.train_on_batch(bad, y)
        contract.assert_same_bits(
            kept, [numpy(v) for v in optimizer.own_variables]
        )
        contract.assert_same_bits(
            weights, [numpy(v) for v in model.trainable_variables]
        )


def test_one_refresh_an_accumulated_update():
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    optimizer = keras_stab.IRE(inner, update_every=1)
    trained(optimizer, steps=6)
    assert optimizer.diagnostics()["refreshes"] == 2
    assert int(optimizer.iterations) == 2


def test_state_is_one_byte_a_weight():
    optimizer = keras_stab.IRE("sgd")
    model = trained(optimizer, steps=1)
    masks = [v for v in optimizer.own_variables if v.path.endswith("_flat")]
    assert all(v.dtype == "bool" for v in masks)
    assert sum(numpy(v).nbytes for v in masks) == sum(
        int(np.prod(v.shape)) for v in model.trainable_variables
    )
    every = sum(numpy(v).nbytes for v in optimizer.own_variables)
    assert every <= sum(numpy(v).nbytes for v in masks) + 64


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"flat_fraction": 0.0}, r"`flat_fraction` must be in \(0, 1\]"),
        ({"flat_fraction": 1.5}, r"`flat_fraction` must be in \(0, 1\]"),
        ({"flat_fraction": -0.5}, r"`flat_fraction` must be in \(0, 1\]"),
        ({"boost": -1.0}, "`boost` must be at least 0"),
        ({"boost": float("nan")}, "`boost` must be"),
        ({"update_every": 0}, "`update_every` must be an integer"),
        ({"start_step": -1}, "`start_step` must be an integer"),
        ({"start_step": "soon"}, '"warmup_end" or "manual"'),
        ({"curvature": "hessian"}, "`curvature` must be one of"),
        ({"curvature_momentum": 1.0}, "`curvature_momentum` must be"),
        ({"fisher_fraction": 0.0}, r"`fisher_fraction` must be in \(0, 1\]"),
        ({"curvature": "second_moment"}, 'Use curvature="gradient" with SGD'),
        ({"label_sampler": 3}, "must be a function"),
        ({"boost_schedule": "learning_rate"}, "reference_learning_rate"),
        ({"exclude": "bias"}, "`exclude` must be a list"),
        ({"clipnorm": 1.0}, "belong on the inner one"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        keras_stab.IRE("sgd", **arguments)


def test_inner_optimizers_that_cannot_be_used():
    make = keras.optimizers
    for inner, words in (
        (make.SGD(0.1, use_ema=True), "Average outside of IRE"),
        (make.Adafactor(), 'curvature="gradient" with Adafactor'),
        (keras_stab.IRE("sgd"), "IRE inside IRE"),
        (keras_stab.Lookahead("adam"), r"outside, Lookahead\(IRE"),
        (keras_stab.WeightAveraging("adam"), r"WeightAveraging\(IRE"),
        (keras_stab.RAPP(0.1), "Use another inner optimizer"),
    ):
        with pytest.raises(ValueError, match=words):
            keras_stab.IRE(inner, curvature="second_moment")
    with pytest.raises(ValueError, match="already: leave"):
        keras_stab.IRE(
            "adam", curvature="second_moment", curvature_momentum=0.5
        )
    with pytest.raises(ValueError, match=r"IRE\(SAM\(...\)\)"):
        keras_stab.SAM(keras_stab.IRE("sgd"))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_variable_without_gradient_is_not_ranked(momentum):
    weights = [keras.Variable(np.ones(4, "float32")) for _ in range(2)]
    optimizer = keras_stab.IRE(
        "sgd",
        0.5,
        curvature="gradient",
        curvature_momentum=momentum,
        update_every=1,
    )
    optimizer.build(weights)
    for _ in range(2):
        gradient = keras.ops.convert_to_tensor([4.0, 2.0, 3.0, 1.0])
        optimizer.apply([gradient, None], weights)
    flat = [mask.tolist() for mask in flat_masks(optimizer)]
    assert flat == [[False, True, False, True], [False] * 4]
    assert numpy(weights[1]).tolist() == [1.0] * 4


def test_plain_gradients():
    """Enough for two of the curvatures, in any loop."""
    weights = [keras.Variable(np.ones(4, "float32"))]
    gradient = keras.ops.convert_to_tensor([1.0, 2.0, 3.0, 4.0])
    optimizer = keras_stab.IRE(
        keras.optimizers.SGD(0.1), 0.5, boost=1.0, curvature="gradient"
    )
    optimizer.apply([gradient], weights)
    np.testing.assert_allclose(numpy(weights[0]), [0.8, 0.6, 0.7, 0.6])
    optimizer = keras_stab.IRE("sgd")
    optimizer.build(weights)
    with pytest.raises(RuntimeError, match='curvature="gradient"'):
        optimizer.apply([gradient], weights)


# ---- The toy of the theory ------------------------------------------------


class Valley(keras.Model):
    """Loss `(1 + u^2) v^2 / 2`: flat along u, flatter as u falls."""

    def __init__(self):
        super().__init__()
        self.u = self.add_weight(shape=(), initializer="ones", name="u")
        self.v = self.add_weight(shape=(), initializer="zeros", name="v")
        self.v.assign(0.01)

    def call(self, inputs):
        return inputs

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        u, v = map(keras.ops.convert_to_tensor, (self.u, self.v))
        return (1.0 + keras.ops.square(u)) * keras.ops.square(v) / 2.0


def descend(inner, boost, steps):
    """Where u is after so many steps; IRE finds out that u is flat."""
    model = Valley()
    optimizer = keras_stab.IRE(
        inner, 0.5, boost, update_every=1, curvature="gradient"
    )
    model.compile(optimizer)
    ends = []
    for more in np.diff([0, *steps]):
        model.fit(np.ones((more, 1)), batch_size=1, verbose=0)
        ends.append(float(model.u.value))
    assert not boost or optimizer.diagnostics()["flat_fraction"] == 0.5
    return ends


TOY = VECTORS["toy_quadratic"]["results"]


@pytest.mark.parametrize("boost", [0, 90, 900, 9000])
def test_descent_goes_further_along_the_valley(boost):
    # From update 100 on nothing moves any more, where there is a boost.
    steps = 100 if boost else 400
    (u,) = descend(keras.optimizers.SGD(1.0), boost, [steps])
    wanted = TOY[f"gd_eta1_kappa{boost}"]["u_at_400"]
    # The last jumps from 1 to 0.1 to 0.01: float32 cancels.
    assert u == pytest.approx(wanted, rel=5e-3 if boost == 9000 else 1e-4)


def test_sharpness_falls_faster_by_the_boost():
    """With SAM, u decays at a rate of `(1 + boost) lr rho^2`."""
    rates = {}
    for boost in (0, 1, 4, 10):
        sam = keras_stab.SAM(keras.optimizers.SGD(0.01), rho=0.1)
        first, last = descend(sam, boost, [100, 300])
        rates[boost] = np.log(first / last) / 200
        wanted = TOY[f"sam_eta0.01_rho0.1_kappa{boost}"]["u_at_100"][0]
        assert first == pytest.approx(wanted, rel=1e-4)
    assert rates[0] == pytest.approx(0.01 * 0.1**2, rel=0.05)
    for boost, ratio in ((1, 1.997), (4, 4.979), (10, 10.963)):
        assert rates[boost] / rates[0] == pytest.approx(ratio, rel=0.05)
