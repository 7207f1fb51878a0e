"""The averaging rules: their arguments, and what they refuse."""

import functools

import keras

from keras_stab.arguments import checked_boolean
from keras_stab.arguments import checked_choice
from keras_stab.arguments import checked_fraction
from keras_stab.arguments import checked_number
from keras_stab.nesting import whole_nest
from keras_stab.numerics import averaging

# The arguments of each rule and their defaults.
RULES = {
    "uniform": {},
    "ema": {
        "decay": 0.999,
        "warmup_gamma": None,
        "warmup_power": 2.0 / 3.0,
        "dynamic": False,
    },
    "polynomial": {"exponent": 3.0},
    "power": {"relative_std": 0.1},
}


def checked_rule(method, given):
    """The arguments of a rule, completed and checked.

    Args:
        method: Name of the rule.
        given: Dict of arguments of all rules; `None` where not given.

    Raises:
        ValueError: If the rule is unknown, takes no such argument, or one is
            out of range.
    """
    checked_choice("method", method, tuple(RULES))
    given = {k: v for k, v in given.items() if v is not None}
    for argument in given:
        if argument not in RULES[method]:
            owner = next(m for m, a in RULES.items() if argument in a)
            raise ValueError(
                f'`{argument}` belongs to method="{owner}". Received: '
                f"{argument}={given[argument]!r} with method={method!r}"
            )
    arguments = {**RULES[method], **given}
    if method == "ema":
        _check_ema(arguments)
    elif method == "polynomial":
        arguments["exponent"] = checked_number(
            "exponent", arguments["exponent"], 0.0
        )
    elif method == "power":
        # The width of the mean of all values, exponent 0, is 0.2887.
        arguments["relative_std"] = checked_number(
            "relative_std", arguments["relative_std"], 1e-6, 0.2887
        )
    return arguments


def _check_ema(arguments):
    arguments["decay"] = checked_fraction(
        "decay", arguments["decay"], zero=True, one=False
    )
    arguments["dynamic"] = checked_boolean("dynamic", arguments["dynamic"])
    arguments["warmup_power"] = checked_number(
        "warmup_power", arguments["warmup_power"], above=0.0
    )
    if arguments["warmup_gamma"] is None:
        if arguments["warmup_power"] != RULES["ema"]["warmup_power"]:
            raise ValueError(
                "`warmup_power` needs `warmup_gamma`. Received: warmup_power="
                f"{arguments['warmup_power']!r}, warmup_gamma=None"
            )
    else:
        arguments["warmup_gamma"] = checked_number(
            "warmup_gamma", arguments["warmup_gamma"], above=0.0
        )
        if arguments["dynamic"]:
            raise ValueError(
                "`warmup_gamma` and `dynamic` are two warm-ups of the decay: "
                "give one. Received: warmup_gamma="
                f"{arguments['warmup_gamma']}, dynamic=True"
            )


def rule(method, arguments):
    """The coefficient as a function of the number averaged before.

    Args:
        method: Name of the rule.
        arguments: As `checked_rule` returns them.
    """
    if method == "uniform":
        return averaging.uniform
    if method == "polynomial":
        return functools.partial(averaging.polynomial, **arguments)
    if method == "power":
        exponent = averaging.power_exponent(arguments["relative_std"])
        return functools.partial(averaging.power, exponent=exponent)
    arguments = dict(arguments)
    if arguments.pop("dynamic"):
        return functools.partial(
            averaging.dynamic_exponential, decay=arguments["decay"]
        )
    return functools.partial(averaging.exponential, **arguments)


def refuse_other_averages(name, optimizer):
    """Raises a `ValueError` if an optimizer inside averages weights too."""
    for each in whole_nest(optimizer):
        if getattr(each, "use_ema", False):
            raise ValueError(
                f"`use_ema=True` of the optimizer inside {name} is an average "
                "of its own, which replaces the weights at the end of `fit`. "
                f"Leave one of the two out. Received: {each.name!r} with "
                "use_ema=True"
            )
        if getattr(each, "averages_weights", False):
            raise ValueError(
                f"The optimizer inside {name} averages weights already: "
                "leave one of the two out. Received: inner optimizer "
                f"{each.name!r} of type {type(each).__name__}"
            )


def refuse_momentum_and_decay(inner):
    """Raises a `ValueError` if an optimizer does what ScheduleFree does."""
    for argument in ("momentum", "beta_1"):
        value = getattr(inner, argument, 0.0)
        if value:
            raise ValueError(
                f"In ScheduleFree `beta` takes the place of `{argument}`: set "
                f"it to 0, or use ScheduleFree.adamw(...). Received: "
                f"{inner.name!r} with {argument}={value}"
            )
    if getattr(inner, "weight_decay", None):
        raise ValueError(
            "Give `weight_decay` to ScheduleFree, which decays y, and not to "
            f"the inner optimizer. Received: {inner.name!r} with "
            f"weight_decay={inner.weight_decay}"
        )


def refuse_half_precision(variables):
    """Raises a `ValueError` if weights cannot hold an average."""
    for variable in variables:
        precise = variable.dtype in ("float32", "float64")
        if not (precise or variable.overwrite_with_gradient):
            raise ValueError(
                "ScheduleFree keeps its average in the weights, where half "
                "precision would make it stand still. Use the policy "
                '"mixed_bfloat16" or "mixed_float16". Received: '
                f"{variable.path!r} of dtype {variable.dtype}"
            )


def coefficient(rule, count):
    """A function of a dtype: the coefficient, a scalar tensor of it."""

    @functools.cache
    def of(dtype):
        return rule(keras.ops.cast(count, dtype))

    return of
