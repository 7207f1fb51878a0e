"""Arguments: refused with their name, or good to train with."""

import functools
import json
import re
import warnings

import keras
import pytest
from argument_cases import CASES
from argument_cases import VALUES
from marks import ON_TORCH

# Whether these are right can be seen with the model and its data only.
LATE = ("axis",)
# Elsewhere steps take too long for all values that are right.
OF_NUMPY = ("float32", "int64", "bool_", "0-d float", "0-d int", "0-d bool")


def attempt(case, argument, label):
    """What was wrong with a value, or `None`."""
    value = VALUES[label]

    def names_it(error):
        said = str(error)
        return re.search(rf"\b{argument}\b", said) and "Received" in said

    try:
        made = case.make(**{**case.right, argument: value})
    except (ValueError, TypeError) as error:
        if names_it(error):
            return None
        return f"{type(error).__name__} does not name it: {error}"
    except ImportError as error:  # a package that this argument needs
        return None if argument in str(error) else str(error)
    except Exception as error:
        return f"not refused but {type(error).__name__}: {error}"
    try:
        if ON_TORCH or label in OF_NUMPY:
            case.use(made)
        if hasattr(made, "get_config"):
            json.dumps(keras.saving.serialize_keras_object(made))
    except Exception as error:
        if argument not in LATE or not names_it(error):
            return f"accepted, then {type(error).__name__}: {error}"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_wrong_values_are_refused_by_name_or_harmless(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a text may be the path of a file
    case, wrong = CASES[name], []
    for argument in case.arguments:
        for label in VALUES:
            problem = attempt(case, argument, label)
            if problem:
                wrong.append(f"{argument}={label}: {problem[:300]}")
    assert not wrong, "\n".join(wrong)


def numbers_of(config):
    """The names of the numbers in a configuration, those within too."""
    for key, value in config.items():
        inside = value.get("config") if isinstance(value, dict) else None
        if isinstance(inside, dict):
            yield from ((key, "config", *rest) for rest in numbers_of(inside))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (key,)


SAVED = [
    name
    for name, case in CASES.items()
    if isinstance(case.make, type) and hasattr(case.make, "get_config")
]


# What Keras itself refuses, and what another argument leaves no room for.
NOT_LOADED = {
    "momentum",
    ("CEGPlus", "minty_constant"),
    ("CEGPlus", "relaxation"),
    ("ConstantTail-steps", "decay_from"),
    ("WeightAveraging-ema", "warmup_power"),
}


@pytest.mark.parametrize("name", SAVED)
def test_numbers_of_a_configuration_are_loaded(name):
    """However odd: the check of a user's arguments is no check of a file."""
    case = CASES[name]
    kind = type(case.make(**case.right))
    serialize = keras.saving.serialize_keras_object
    for path in numbers_of(case.make(**case.right).get_config()):
        if not NOT_LOADED.isdisjoint({path[-1], (name, path[-1])}):
            continue
        config = json.loads(json.dumps(serialize(case.make(**case.right))))
        *above, last = ("config", *path)
        place = functools.reduce(lambda part, key: part[key], above, config)
        place[last] = type(place[last])(-7)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = keras.saving.deserialize_keras_object(config)
        assert type(again) is kind
        assert serialize(again) == config
        try:
            case.make(**{**case.right, last: -7})
        except (TypeError, ValueError):
            said = [str(warning.message) for warning in caught]
            ours = any(f"`{last}`" in text for text in said)
            assert ours or len(path) > 1, (path, said)
