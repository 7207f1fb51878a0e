"""Arguments: refused with their name, or good to train with."""

import re
import warnings

import keras
import numpy as np
import pytest
from argument_cases import CASES
from argument_cases import VALUES

def attempt(case, argument, value):
    """What was wrong with a value, or `None`."""
    try:
        made = case.make(**{**case.right, argument: value})
    except (ValueError, TypeError) as error:
        said = str(error)
        if not re.search(rf"\b{argument}\b", said) or "Received" not in said:
            return f"{type(error).__name__} does not name it: {said}"
        return None
    except Exception as error:
        return f"not refused but {type(error).__name__}: {error}"
    try:
        case.use(made)
    except Exception as error:
        return f"accepted, then {type(error).__name__}: {error}"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_wrong_values_are_refused_by_name_or_harmless(name):
    case, wrong = CASES[name], []
    for argument in case.arguments:
        for label, value in VALUES.items():
            problem = attempt(case, argument, value)
            if problem:
                wrong.append(f"{argument}={label}: {problem[:300]}")
    assert not wrong, "\n".join(wrong)
