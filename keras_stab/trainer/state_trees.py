"""What is set aside, in `get_state_tree` and out of `set_state_tree`.

Keras's Orbax checkpoints are such trees. They hold variables, and the trained
weights that a method has set aside during evaluation are not variables.
"""

import re
import warnings
from collections import defaultdict

import keras

from keras_stab.nesting import whole_nest
from keras_stab.trainer.lending import lenders

_KEY = "trained_weights"


def with_weights_aside(model, following, value_format="backend_tensor"):
    """Keras's tree and, under an optimizer's name, what it has set aside."""
    tree = following(value_format)
    for method in lenders(model):
        aside = method.weights_aside(model)
        if value_format == "numpy_array":
            aside = {k: keras.ops.convert_to_numpy(v) for k, v in aside.items()}
        if aside:
            own = tree["optimizer_variables"].setdefault(method.name, {})
            own[_KEY] = aside
    return tree


def setting_weights_aside(model, following, state_tree):
    """Assigns the tree; what was set aside in it is set aside again."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or "optimizer_variables" not in state_tree:
        return following(state_tree)
    saved = _with_names_of(optimizer, state_tree["optimizer_variables"])
    result = following({**state_tree, "optimizer_variables": saved})
    for each in whole_nest(optimizer):
        if hasattr(each, "forget_left_behind"):
            each.forget_left_behind()
    for method in lenders(model):
        aside = saved.get(method.name, {}).get(_KEY, {})
        if aside and not method.built:
            warnings.warn(
                "The trained weights that were set aside are not loaded, "
                "because the optimizer is not built: call "
                "`optimizer.build(model.trainable_variables)` before "
                f"`set_state_tree`. Received: {method.name!r}",
                stacklevel=4,
            )
            continue
        method.set_weights_aside(model, aside)
    return result


def _with_names_of(optimizer, saved):
    """The saved state under the names that the optimizers have now.

    Keras numbers default names, so that the second model of a process has a
    "lookahead_1" where the first has a "lookahead". Its own optimizers do not
    take part, but for `LossScaleOptimizer`.
    """
    names = defaultdict(list)
    for each in whole_nest(optimizer):
        names[_without_number(each.name)].append(each.name)
    saved_names = defaultdict(list)
    for name in saved:
        saved_names[_without_number(name)].append(name)
    renamed = dict(saved)
    for kind, now in names.items():
        before = saved_names[kind]
        if len(before) != len(now) or set(before) == set(now):
            continue
        for name in before:
            del renamed[name]
        pairs = zip(sorted(before, key=_number), sorted(now, key=_number))
        renamed.update({new: saved[old] for old, new in pairs})
    return renamed


def _without_number(name):
    return re.sub(r"_\d+$", "", name)


def _number(name):
    found = re.search(r"_(\d+)$", name)
    return int(found[1]) if found else 0
