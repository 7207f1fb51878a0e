"""`install` and `uninstall` beside other libraries that patch `keras.Model`."""

import functools
import inspect

import contract
import keras
import numpy as np
import pytest
from callback_cases import Failing

import keras_stab
from keras_stab.trainer import installation

X, Y = contract.data(batches=2)
NAMES = (
    "train_step",
    "make_train_function",
    "fit",
    "evaluate",
    "predict",
    "get_state_tree",
    "set_state_tree",
)
# What an autologger wraps, and what reaches a model through it.
CALLS = {
    "fit": lambda model: contract.fit(model, X, Y),
    "evaluate": lambda model: model.evaluate(X, Y, verbose=0),
    "predict": lambda model: model.predict(X, verbose=0),
    "make_train_function": lambda model: contract.fit(model, X, Y),
    "train_step": lambda model: contract.fit(model, X, Y),
    "get_state_tree": lambda model: model.get_state_tree(),
    "set_state_tree": lambda model: model.set_state_tree(
        model.get_state_tree()
    ),
}


@pytest.fixture(autouse=True)
def keras_model():
    """Puts `keras.Model` back as a new process has it."""
    before = {name: vars(keras.Model).get(name) for name in NAMES}
    yield
    for name, method in before.items():
        if name in vars(keras.Model):
            delattr(keras.Model, name)
        setattr(keras.Model, name, method)
    keras_stab.install()
    assert {name: vars(keras.Model)[name] for name in NAMES} == before


@pytest.fixture
def uninstalled():
    keras_stab.uninstall()


class Wrapper:
    """Another library's wrapper around a method, as autologgers put it."""

    def __init__(self, name):
        self.name, self.calls = name, 0
        self.replaced = vars(keras.Model).get(name)
        original = getattr(keras.Model, name)

        @functools.wraps(original)
        def wrapper(model, *args, **kwargs):
            self.calls += 1
            return original(model, *args, **kwargs)

        self.function = wrapper
        setattr(keras.Model, name, wrapper)

    def take_off(self):
        delattr(keras.Model, self.name)
        if self.replaced is not None:
            setattr(keras.Model, self.name, self.replaced)


def compiled(optimizer, model=None):
    """Eager, since who is called does not depend on what is compiled."""
    return contract.compiled(optimizer, model, run_eagerly=True)


def plain():
    return compiled(keras.optimizers.SGD(0.1))


def grain():
    return compiled(keras_stab.GRAIN(keras.optimizers.SGD(0.1)))


def trained_weights(model):
    contract.fit(model, X, Y)
    return model.get_weights()


def assert_trains_with_grain():
    model = grain()
    contract.fit(model, X, Y)
    assert sum(model.optimizer.diagnostics()["weights"]) == pytest.approx(1.0)


def assert_is_not_installed():
    for name in NAMES:
        assert vars(keras.Model).get(name) not in installation._before
    with pytest.raises(RuntimeError, match="received plain gradients"):
        contract.fit(grain(), X, Y)


def test_nothing_stays_behind():
    keras_stab.install()
    keras_stab.uninstall()
    assert "train_step" not in vars(keras.Model)
    keras_stab.uninstall()
    assert_is_not_installed()
    keras_stab.install()
    assert_trains_with_grain()


def test_no_name_is_wrapped_twice():
    before = {name: vars(keras.Model)[name] for name in NAMES}
    keras_stab.install()
    assert {name: vars(keras.Model)[name] for name in NAMES} == before


def test_methods_keep_their_signature():
    for name in NAMES:
        ours = getattr(keras.Model, name)
        parameters = inspect.signature(ours).parameters
        assert list(parameters) == list(
            inspect.signature(ours.__wrapped__).parameters
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_that_came_later_stays(name):
    wrapper = Wrapper(name)
    CALLS[name](plain())
    assert wrapper.calls
    keras_stab.uninstall()
    assert vars(keras.Model)[name] is wrapper.function
    calls = wrapper.calls
    CALLS[name](plain())
    assert wrapper.calls > calls
    assert_is_not_installed()


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_that_came_first_stays(name, uninstalled):
    wrapper = Wrapper(name)
    keras_stab.install()
    CALLS[name](plain())
    assert wrapper.calls
    assert_trains_with_grain()
    keras_stab.uninstall()
    assert vars(keras.Model)[name] is wrapper.function


@pytest.mark.parametrize("name", NAMES)
def test_installed_again_over_a_wrapper(name):
    wrapper = Wrapper(name)
    for _ in range(2):
        keras_stab.install()
        CALLS[name](plain())
        assert wrapper.calls
        assert_trains_with_grain()
    keras_stab.uninstall()
    assert vars(keras.Model)[name] is wrapper.function
    assert_is_not_installed()


@pytest.mark.parametrize("again", [False, True])
def test_a_wrapper_that_is_taken_off_again(again):
    """Its owner puts back what it found: our method of an earlier time."""
    wrapper = Wrapper("fit")
    if again:
        keras_stab.install()
    wrapper.take_off()
    assert_trains_with_grain()
    keras_stab.uninstall()
    assert_is_not_installed()


# ---- Somebody else's train step -------------------------------------------


def put_foreign_step(calls_what_it_found):
    calls = []
    found = keras.Model.train_step

    def foreign(self, *state_and_data):
        calls.append(self)
        if calls_what_it_found:
            return found(self, *state_and_data)
        return super(keras.Model, self).train_step(*state_and_data)

    keras.Model.train_step = foreign
    return calls


@pytest.mark.parametrize("calls_what_it_found", [True, False])
@pytest.mark.parametrize(
    "order",
    [
        ["foreign", "install"],
        ["install", "foreign"],
        ["install", "foreign", "install"],
        ["foreign", "install", "install"],
        ["foreign", "install", "foreign", "install", "install"],
    ],
    ids=" ".join,
)
def test_a_foreign_step_on_keras_model(order, calls_what_it_found, uninstalled):
    """Plain models train as before, in every order, to the last bit."""
    wanted = trained_weights(plain())
    foreign = []
    for action in order:
        if action == "install":
            keras_stab.install()
        else:
            foreign.append(put_foreign_step(calls_what_it_found))
    contract.assert_same_bits(wanted, trained_weights(plain()))
    assert foreign[-1]
    if order[-1] == "install":
        calls = len(foreign[-1])
        assert_trains_with_grain()
        assert len(foreign[-1]) == calls
    keras_stab.uninstall()
    contract.assert_same_bits(wanted, trained_weights(plain()))


# ---- The mixin ------------------------------------------------------------


def mixed(optimizer):
    class Mixed(keras_stab.TrainStep, keras.Model):
        pass

    model = contract.classifier()
    model = Mixed(model.inputs, model.outputs)
    return compiled(optimizer, model)


def test_the_mixin_trains_without_installation(uninstalled):
    optimizer = keras_stab.GRAIN(keras.optimizers.SGD(0.1))
    weights = trained_weights(mixed(optimizer))
    keras_stab.install()
    contract.assert_same_bits(trained_weights(grain()), weights)
    weights_of_both = trained_weights(
        mixed(keras_stab.GRAIN(keras.optimizers.SGD(0.1)))
    )
    contract.assert_same_bits(weights_of_both, weights)


def averaged(make):
    optimizer = keras_stab.WeightAveraging(keras.optimizers.SGD(0.1))
    model = make(optimizer)
    contract.fit(model, X, Y)
    return model


@pytest.mark.parametrize("kind", ["mixin", "installed"])
@pytest.mark.parametrize(
    "call, moment",
    [
        ("evaluate", "on_test_batch_end"),
        ("predict", "on_predict_batch_end"),
        ("fit", "on_epoch_end"),
    ],
)
def test_lent_weights_come_back_after_an_error(kind, call, moment, uninstalled):
    if kind == "installed":
        keras_stab.install()
    model = averaged(mixed if kind == "mixin" else compiled)
    callbacks = [keras_stab.AveragedWeights(X), Failing(moment)]
    straight = averaged(mixed if kind == "mixin" else compiled)
    with pytest.raises(KeyError):
        if call == "predict":
            model.predict(X, verbose=0, callbacks=callbacks)
        elif call == "evaluate":
            model.evaluate(X, Y, verbose=0, callbacks=callbacks)
        else:
            contract.fit(model, X, Y, callbacks=callbacks)
    assert not model.optimizer.swapped
    if call == "fit":
        contract.fit(straight, X, Y)
    for one, other in zip(model.get_weights(), straight.get_weights()):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["mixin", "installed"])
def test_lent_weights_come_back_before_training(kind, uninstalled):
    if kind == "installed":
        keras_stab.install()
    make = mixed if kind == "mixin" else compiled
    model, straight = averaged(make), averaged(make)
    model.optimizer.swap_in(model)
    assert model.optimizer.swapped
    model.make_train_function(force=True)
    assert not model.optimizer.swapped
    contract.assert_same_bits(trained_weights(model), trained_weights(straight))
