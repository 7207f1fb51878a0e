"""The only backend-specific file of the library.

Each function does the same on TensorFlow, JAX and PyTorch; the three
versions stand side by side. A backend is imported only when Keras runs on it.
"""

import contextlib
import functools
import math

import keras
import numpy as np

from keras_stab.numerics import averaging
from keras_stab.numerics.norms import in_full_precision

BACKEND = keras.backend.backend()
# Whether variables hold no values of their own inside the steps of `fit`.
STATELESS = BACKEND == "jax"
# Whether Python runs every step, instead of tracing the first.
EAGER = BACKEND == "torch"

if BACKEND == "tensorflow":
    import tensorflow as tf
elif BACKEND == "jax":
    import jax
    import jax.numpy as jnp
elif BACKEND == "torch":
    import torch
else:
    raise ImportError(
        "keras_stab trains models on the TensorFlow, JAX and PyTorch backends "
        f"of Keras. Received: KERAS_BACKEND={BACKEND}"
    )

# Traced backends run a mapped computation as one loop; on PyTorch and
# TensorFlow a Python loop over the groups measured as fast or faster.
CAN_SCAN = BACKEND == "jax"

# Tensors made in a function that is differentiated can be used after it.
KEEPS_TENSORS = BACKEND != "jax"


def read(variable):
    """The value of a variable, as a tensor that can be differentiated."""
    if BACKEND == "tensorflow":
        return tf.convert_to_tensor(variable.value)
    return variable.value


def snapshot(variable):
    """The value of a variable, which later assignments do not change."""
    if BACKEND == "torch":
        return variable.value.detach().clone()
    return read(variable)


def read_after(variable):
    """The value after what was assigned before, as a tensor of its own."""
    if BACKEND == "jax":
        # Otherwise the compiler may compute it twice, rounded otherwise.
        return jax.lax.optimization_barrier(variable.value)
    return read(variable)


def concrete_value(variable):
    """The value as an array, also while a step is traced by TensorFlow."""
    if BACKEND == "tensorflow":
        with tf.init_scope():
            return variable.value.numpy()
    return keras.ops.convert_to_numpy(variable.value)


def value_and_gradients(function, values):
    """Evaluates `function(values) -> (scalar, aux)` and differentiates it.

    Returns `(scalar, aux), gradients`; a gradient is `None` where the scalar
    does not depend on the value (never on JAX, where it is zero).
    """
    if BACKEND == "jax":
        return jax.value_and_grad(function, has_aux=True)(values)
    if BACKEND == "tensorflow":
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            scalar, aux = function(values)
        return (scalar, aux), tape.gradient(scalar, values)
    with torch.enable_grad():
        leaves = _leaves(values)
        scalar, aux = function(leaves)
        gradients = torch.autograd.grad(scalar, leaves, allow_unused=True)
    return (scalar.detach(), _detached(aux)), list(gradients)


def value_gradients_and_pullback(function, values):
    """As `value_and_gradients`, with a second way back through the outputs.

    Args:
        function: `function(values) -> (scalar, (outputs, aux))`, outputs a
            list of float tensors.

    Returns:
        `(scalar, aux), gradients, pull`: `pull(cotangents)` gives the
        gradients of `sum <output, cotangent>` without another forward pass.
    """
    if BACKEND == "jax":

        def flat(values):
            scalar, (outputs, aux) = function(values)
            return (scalar, outputs), aux

        (scalar, outputs), vjp, aux = jax.vjp(flat, values, has_aux=True)
        zeros = [jnp.zeros_like(o) for o in outputs]
        (gradients,) = vjp((jnp.ones_like(scalar), zeros))

        def pull(cotangents):
            return vjp((jnp.zeros_like(scalar), cotangents))[0]

        return (scalar, aux), gradients, pull
    if BACKEND == "tensorflow":
        with tf.GradientTape(
            persistent=True, watch_accessed_variables=False
        ) as tape:
            tape.watch(values)
            scalar, (outputs, aux) = function(values)

        def pull(cotangents):
            return tape.gradient(outputs, values, output_gradients=cotangents)

        return (scalar, aux), tape.gradient(scalar, values), pull
    with torch.enable_grad():
        leaves = _leaves(values)
        scalar, (outputs, aux) = function(leaves)
        gradients = torch.autograd.grad(
            scalar, leaves, allow_unused=True, retain_graph=True
        )

    def pull(cotangents):
        pairs = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
        outputs_used, given = zip(*pairs)
        return list(
            torch.autograd.grad(outputs_used, leaves, given, allow_unused=True)
        )

    return (scalar.detach(), _detached(aux)), list(gradients), pull


def _leaves(values):
    """Tensors to differentiate by, on PyTorch.

    At the current weights these are the parameters themselves, so that
    wrapped torch modules, which read no scope, are differentiated too.
    """
    return [
        v if v.requires_grad else v.detach().requires_grad_() for v in values
    ]


def _detached(structure):
    if torch.is_tensor(structure):
        return structure.detach()
    # By hand: for a small step keras.tree takes as long as an operation.
    if isinstance(structure, list):
        return [_detached(part) for part in structure]
    if isinstance(structure, tuple):
        parts = (_detached(part) for part in structure)
        named = hasattr(structure, "_fields")
        return type(structure)(*parts) if named else tuple(parts)
    if not keras.tree.is_nested(structure):
        return structure
    return keras.tree.map_structure(
        lambda t: t.detach() if torch.is_tensor(t) else t, structure
    )


def gradients_at_taps(function):
    """Differentiates by tensors inside a computation, not by its inputs.

    Args:
        function: `function(tap) -> (scalar, aux)`. It passes a tensor through
            `tap(tensor)` where the gradient is wanted, and goes on with the
            result. Weights must enter as constants.

    Returns:
        `(scalar, aux), gradients`, one gradient a tap in the order of the
        calls; `None` where the scalar does not depend on it (zero on JAX).
    """
    if BACKEND == "jax":
        shapes = []

        def trace():
            def tap(tensor):
                shapes.append(jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))
                return tensor

            function(tap)

        jax.eval_shape(trace)

        def shifted(shifts):
            remaining = iter(shifts)
            return function(lambda tensor: tensor + next(remaining))

        zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
        return jax.value_and_grad(shifted, has_aux=True)(zeros)
    taps = []
    if BACKEND == "tensorflow":
        with tf.GradientTape(watch_accessed_variables=False) as tape:

            def tap(tensor):
                tensor = tf.identity(tensor)
                tape.watch(tensor)
                taps.append(tensor)
                return tensor

            scalar, aux = function(tap)
        gradients = tape.gradient(scalar, taps)
        return (scalar, aux), [densify(g) for g in gradients]
    with torch.enable_grad():

        def tap(tensor):
            tensor = tensor.view_as(tensor)
            if not tensor.requires_grad:
                tensor.requires_grad_()
            taps.append(tensor)
            return tensor

        scalar, aux = function(tap)
        if scalar.requires_grad:
            gradients = torch.autograd.grad(scalar, taps, allow_unused=True)
        else:
            gradients = [None] * len(taps)
    return (scalar.detach(), _detached(aux)), list(gradients)


def vector_jacobian(function, values, cotangents):
    """The gradient of `sum <output, cotangent>` by the values.

    Args:
        function: From a list of tensors to a list of tensors.
        values: List of tensors.
        cotangents: One tensor an output, `None` for an output to leave out.
    """
    used = [i for i, c in enumerate(cotangents) if c is not None]
    given = [cotangents[i] for i in used]

    def chosen(values):
        outputs = function(values)
        return [outputs[i] for i in used]

    if BACKEND == "jax":
        outputs, pull = jax.vjp(chosen, values)
        given = [g.astype(o.dtype) for g, o in zip(given, outputs)]
        return pull(given)[0]
    if BACKEND == "tensorflow":
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            outputs = chosen(values)
        given = [tf.cast(g, o.dtype) for g, o in zip(given, outputs)]
        gradients = tape.gradient(outputs, values, output_gradients=given)
        return [densify(g) for g in gradients]
    with torch.enable_grad():
        leaves = [v.detach().requires_grad_() for v in values]
        outputs = chosen(leaves)
        pairs = [(o, g) for o, g in zip(outputs, given) if o.requires_grad]
        if not pairs:
            return [None] * len(leaves)
        outputs = [o for o, _ in pairs]
        given = [g.to(o.dtype) for o, g in pairs]
        return list(
            torch.autograd.grad(outputs, leaves, given, allow_unused=True)
        )


def hessian_vector_product(function, values, vectors):
    """The Hessian of `function(values) -> scalar`, times vectors.

    Returns a list of dense tensors, zero where the gradient does not depend
    on a value.
    """
    if BACKEND == "jax":
        gradient = jax.grad(function)
        try:
            return jax.jvp(gradient, (values,), (vectors,))[1]
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            # A layer brings a gradient of its own, which has no forward mode.
            return jax.vjp(gradient, values)[1](vectors)[0]
    if BACKEND == "tensorflow":
        with (
            _moments_of_second_order(),
            tf.GradientTape(watch_accessed_variables=False) as outer,
        ):
            outer.watch(values)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(values)
                scalar = function(values)
            gradients = [densify(g) for g in inner.gradient(scalar, values)]
        pairs = [(g, v) for g, v in zip(gradients, vectors) if g is not None]
        present, given = zip(*pairs) if pairs else ((), ())
        products = outer.gradient(
            list(present), values, output_gradients=list(given)
        )
    else:
        # The fast kernels of attention have no second derivative.
        plain = torch.nn.attention.SDPBackend.MATH
        with torch.enable_grad(), torch.nn.attention.sdpa_kernel(plain):
            leaves = _leaves(values)
            scalar = function(leaves)
            gradients = [None] * len(leaves)
            if scalar.requires_grad:
                gradients = torch.autograd.grad(
                    scalar, leaves, create_graph=True, allow_unused=True
                )
            pairs = [
                (g, v)
                for g, v in zip(gradients, vectors)
                if g is not None and g.requires_grad
            ]
            products = [None] * len(leaves)
            if pairs:
                present, given = zip(*pairs)
                products = torch.autograd.grad(
                    present, leaves, given, allow_unused=True
                )
    return [
        keras.ops.zeros_like(value) if product is None else densify(product)
        for value, product in zip(values, products)
    ]


@contextlib.contextmanager
def _moments_of_second_order():
    """Makes `tf.nn.moments`, which Keras normalises with, differentiable twice.

    TensorFlow's own takes the mean inside the variance as a constant. That
    leaves the gradient right and makes its derivative wrong.
    """

    def moments(x, axes, shift=None, name=None, keepdims=False):
        del shift, name
        mean = tf.reduce_mean(x, axes, keepdims=True)
        squares = tf.math.squared_difference(x, mean)
        variance = tf.reduce_mean(squares, axes, keepdims=keepdims)
        return mean if keepdims else tf.squeeze(mean, axes), variance

    stock, tf.nn.moments = tf.nn.moments, moments
    try:
        yield
    finally:
        tf.nn.moments = stock


def compiled(function):
    """The function, compiled where the backend compiles train steps."""
    if BACKEND == "jax":
        return jax.jit(function)
    if BACKEND == "tensorflow":
        return tf.function(function, autograph=False)
    return function


def concretely(function):
    """Runs `function() -> list of tensors` now, also inside a traced step.

    Nothing that the step traces may enter it.
    """
    if BACKEND == "jax":
        with jax.ensure_compile_time_eval():
            return [np.asarray(t) for t in jax.jit(function)()]
    if BACKEND == "tensorflow":
        with tf.init_scope():
            # As a graph, like a step: what a loop inside keeps to itself
            # cannot be had there either.
            traced = tf.function(function, autograph=False)
            return [t.numpy() for t in traced()]
    with torch.no_grad():
        return [t.cpu().numpy() for t in function()]


def traced(function, inputs):
    """Runs `function(inputs)` for what Python sees, assigning nothing."""
    if BACKEND == "jax":
        jax.eval_shape(function, inputs)
        return
    with no_gradients():
        function(inputs)


def shapes_of(function):
    """The shapes of the tensors that `function()` would return."""
    if BACKEND == "jax":
        return [s.shape for s in jax.eval_shape(function)]
    if BACKEND == "tensorflow":
        with tf.init_scope():
            return [t.shape for t in function()]
    with torch.no_grad():
        return [t.shape for t in function()]


def stop_gradient(value):
    """The same tensor, a constant to differentiation."""
    return keras.ops.stop_gradient(value)


# Whether a loss depends on some weights shows in another place on each
# backend: when a gradient comes back to them (TensorFlow), when a tangent
# arrives at the loss (JAX), at once (PyTorch).


def noticing_gradient(weight, notice):
    """The same tensor; TensorFlow calls `notice()` if its gradient is made."""
    if BACKEND != "tensorflow":
        return weight

    @tf.custom_gradient
    def passed(weight):
        def gradient(upstream):
            notice()
            return upstream

        return tf.identity(weight), gradient

    return passed(weight)


def noticing_dependence(loss, notice):
    """The same scalar; `notice()` is called if it depends on weights.

    By JAX while the loss is differentiated, by PyTorch at once.
    """
    if BACKEND == "torch" and loss.requires_grad:
        notice()
    if BACKEND != "jax":
        return loss

    @jax.custom_jvp
    def passed(loss):
        return loss

    @functools.partial(passed.defjvp, symbolic_zeros=True)
    def differentiated(primals, tangents):
        (loss,), (tangent,) = primals, tangents
        if isinstance(tangent, jax.custom_derivatives.SymbolicZero):
            return loss, jnp.zeros_like(loss)
        notice()
        return loss, tangent

    return passed(loss)


def no_gradients():
    """A scope in which nothing is recorded for differentiation."""
    if BACKEND == "torch":
        return torch.no_grad()
    return contextlib.nullcontext()


def densify(gradient):
    """A dense tensor, also from a sparse embedding gradient."""
    if BACKEND == "tensorflow" and isinstance(gradient, tf.IndexedSlices):
        return tf.convert_to_tensor(gradient)
    return gradient


def is_dense(leaf):
    """Whether rows can be cut from this leaf of a batch."""
    if isinstance(leaf, np.ndarray):  # a step that runs eagerly
        return True
    if BACKEND == "tensorflow":
        # Sparse and ragged tensors count as tensors to TensorFlow.
        return isinstance(leaf, tf.Tensor)
    if BACKEND == "torch":
        return torch.is_tensor(leaf) and leaf.layout == torch.strided
    return isinstance(leaf, jax.Array)


# ---- Applying gradients ---------------------------------------------------


def apply_gradients(optimizer, gradients, variables):
    """Calls the optimizer so that it works inside any compiled step."""
    if BACKEND == "jax":
        # A LossScaleOptimizer anywhere below branches on finite gradients,
        # which JAX allows in the stateless form only.
        _assign_state(
            optimizer, variables, _stateless(optimizer, gradients, variables)
        )
        return
    optimizer.apply(gradients, variables)


def apply_gradients_if(condition, optimizer, make_gradients, variables):
    """As `apply_gradients`, only when the boolean tensor holds.

    `make_gradients()` is evaluated inside the branch.
    """
    if BACKEND == "jax":
        state = jax.lax.cond(
            condition,
            lambda: _stateless(optimizer, make_gradients(), variables),
            lambda: (
                [v.value for v in variables],
                [v.value for v in optimizer.variables],
            ),
        )
        _assign_state(optimizer, variables, state)
    elif BACKEND == "tensorflow":

        def update():
            optimizer.apply(make_gradients(), variables)
            return True

        tf.cond(condition, update, lambda: False)
    elif bool(condition):
        optimizer.apply(make_gradients(), variables)


def _stateless(optimizer, gradients, variables):
    return optimizer.stateless_apply(
        [v.value for v in optimizer.variables],
        gradients,
        [v.value for v in variables],
    )


def _assign_state(optimizer, variables, state):
    for variable, value in zip(variables, state[0]):
        variable.assign(value)
    for variable, value in zip(optimizer.variables, state[1]):
        variable.assign(value)


def barrier(gradients):
    """All gradients are computed before any weight is assigned.

    In TensorFlow's graph mode without XLA an assignment can overtake the
    read of a variable by another gradient, when the gradient of the assigned
    variable does not depend on its own value. Keras's own step has that race.
    """
    if BACKEND != "tensorflow":
        return gradients
    present = [g for g in gradients if g is not None]
    with tf.control_dependencies(
        [g.values if isinstance(g, tf.IndexedSlices) else g for g in present]
    ):
        return [None if g is None else tf.identity(g) for g in gradients]


def write_slot(variable, index, value):
    """Assigns `variable[index] = value` without copying the other slots."""
    if BACKEND == "tensorflow":
        slices = tf.IndexedSlices(value[None], tf.reshape(index, (1,)))
        variable.value.scatter_update(slices)
    elif BACKEND == "torch":
        with torch.no_grad():
            variable.value.index_copy_(0, index.reshape(1).long(), value[None])
    else:
        variable.assign(
            jax.lax.dynamic_update_index_in_dim(variable.value, value, index, 0)
        )


# ---- One operation for each of many tensors -------------------------------

# Lists in, lists out. On PyTorch one call serves all tensors; elsewhere the
# step is compiled and a call a tensor costs nothing.


def each_value(variables):
    """Tensors of variables or tensors, in full precision."""
    if BACKEND == "torch":
        values = [
            v.value if isinstance(v, keras.Variable) else v for v in variables
        ]
        half = (torch.float16, torch.bfloat16)
        return [v.float() if v.dtype in half else v for v in values]
    return [
        in_full_precision(keras.ops.convert_to_tensor(densify(v)))
        for v in variables
    ]


def each_sum(tensors, others, factor=1.0):
    """`tensor + factor * other`; the factor is a float or scalar tensor."""
    if BACKEND == "torch":
        if torch.is_tensor(factor):
            if factor.device.type != "cpu":
                others = torch._foreach_mul(others, factor)
            factor = 1.0 if factor.device.type != "cpu" else factor.item()
        return torch._foreach_add(tensors, others, alpha=factor)
    if isinstance(factor, float):
        return [t + factor * other for t, other in zip(tensors, others)]
    return [
        t + keras.ops.cast(factor, t.dtype) * other
        for t, other in zip(tensors, others)
    ]


def assign_sum(optimizer, variables, tensors, others, factor):
    """`assign_each` of `each_sum`, without a copy where that can be.

    The tensors may be the values of the variables themselves.
    """
    in_place = BACKEND == "torch" and all(
        v.value.dtype == t.dtype == other.dtype and t.device.type == "cpu"
        for v, t, other in zip(variables, tensors, others)
    )
    if not in_place:
        sums = each_sum(tensors, others, factor)
        assign_each(optimizer, variables, sums)
        return
    factor = float(factor)
    with torch.no_grad():
        for variable, tensor, other in zip(variables, tensors, others):
            torch.add(tensor, other, alpha=factor, out=variable.value)


def each_product(tensors, factors):
    """`factor * tensor`.

    Args:
        factors: A number or scalar tensor for all of them, a vector with one
            for each, or a list of tensors of their shapes.
    """
    is_vector = len(getattr(factors, "shape", ())) > 0
    if BACKEND == "torch":
        return torch._foreach_mul(
            tensors, factors.unbind() if is_vector else factors
        )
    if is_vector:
        factors = keras.ops.unstack(factors, num=len(tensors))
    elif not isinstance(factors, list):
        factors = [factors] * len(tensors)
    return [
        t * (f if isinstance(f, float) else keras.ops.cast(f, t.dtype))
        for t, f in zip(tensors, factors)
    ]


def each_between(tensors, others, weight):
    """`tensor + weight * (other - tensor)`; the weight is a float."""
    if BACKEND == "torch":
        return torch._foreach_lerp(tensors, others, weight)
    if BACKEND == "tensorflow" and are_large(tensors):
        # Three passes over the weights, each with a tensor of its own, become
        # one; what is small is not worth compiling.
        return _compiled(_between)(tensors, others, weight)
    return _between(tensors, others, weight)


def _between(tensors, others, weight):
    return [t + weight * (other - t) for t, other in zip(tensors, others)]


LARGE = 2**20


def are_large(tensors):
    """Whether passing over the tensors takes longer than a kernel launch."""
    return sum(math.prod(t.shape) for t in tensors) >= LARGE


def each_quotient(tensors, others, epsilon):
    """`tensor / (sqrt(other) + epsilon)`."""
    if BACKEND == "torch":
        roots = torch._foreach_sqrt(others)
        torch._foreach_add_(roots, epsilon)
        return torch._foreach_div(tensors, roots)
    return [
        t / (keras.ops.sqrt(other) + epsilon)
        for t, other in zip(tensors, others)
    ]


def each_norm(tensors):
    """Euclidean norms, a vector; of tensors in full precision."""
    dtype = common_dtype(tensors)
    if BACKEND == "torch":
        norms = torch._foreach_norm(tensors)
        return torch.stack([n.to(getattr(torch, dtype)) for n in norms])
    norms = [
        keras.ops.sqrt(keras.ops.sum(keras.ops.square(t))) for t in tensors
    ]
    return keras.ops.stack([keras.ops.cast(n, dtype) for n in norms])


def inner_product(tensors, others):
    """Of two lists as one long vector each, a scalar; in full precision."""
    dtype = common_dtype(tensors)
    if BACKEND == "torch":
        parts = torch._foreach_mul(tensors, others)
        return torch.stack(
            [p.sum().to(getattr(torch, dtype)) for p in parts]
        ).sum()
    return sum(
        keras.ops.cast(keras.ops.sum(t * other), dtype)
        for t, other in zip(tensors, others)
    )


def common_dtype(tensors):
    """The widest dtype among tensors in full precision, a string."""
    dtypes = {t.dtype for t in tensors}
    dtypes = {keras.backend.standardize_dtype(dtype) for dtype in dtypes}
    return "float64" if "float64" in dtypes else "float32"


def assign_each(optimizer, variables, values):
    """Assigns as Keras's own optimizers do, in the dtype of the variable."""
    if BACKEND == "torch":
        pairs = [(v.value, new) for v, new in zip(variables, values)]
        pairs = [(old, new) for old, new in pairs if new is not old]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_(*zip(*pairs))
        return
    for variable, value in zip(variables, values):
        optimizer.assign(variable, keras.ops.cast(value, variable.dtype))


def exchange(variable, value):
    """Gives a variable another value and returns the old one.

    Where the backend allows it no number is copied, so nothing else may hold
    the tensor `value`.
    """
    if BACKEND == "torch":
        old = variable.value.data
        variable.value.data = value
        return old
    old = read(variable)
    variable.assign(value)
    return old


def average(due, often, first, coefficient, values, averages, errors):
    """Moves running averages by one value each; see `numerics.averaging`.

    Args:
        due: Boolean tensor: otherwise nothing changes.
        often: Whether `due` holds in most steps.
        first: Boolean tensor: whether no value was averaged before.
        coefficient: Function of a dtype, a scalar tensor of it.
        values: Tensors.
        averages: Variables.
        errors: Variables, what rounding cut off; or empty.
    """
    if BACKEND == "torch" and averages[0].value.device.type == "cpu":
        if bool(due):
            _average_at_once(
                bool(first),
                coefficient,
                [v.detach() for v in values],
                [a.value for a in averages],
                [e.value for e in errors],
            )
        return
    dtypes = list(dict.fromkeys(a.dtype for a in averages))
    coefficients = [coefficient(dtype) for dtype in dtypes]

    def moved():
        function = _compiled(_moved) if BACKEND == "tensorflow" else _moved
        return function(
            first,
            [coefficients[dtypes.index(a.dtype)] for a in averages],
            values,
            [read(a) for a in averages],
            [read(e) for e in errors],
        )

    assign_if(due, often, [*averages, *errors], moved)


def _moved(first, coefficients, values, averages, errors):
    values = [keras.ops.cast(v, a.dtype) for v, a in zip(values, averages)]
    if not errors:
        return [
            averaging.moved(a, v, c, first)
            for a, v, c in zip(averages, values, coefficients)
        ]
    pairs = [
        averaging.moved_exactly(a, e, v, c, first)
        for a, e, v, c in zip(averages, errors, values, coefficients)
    ]
    return [new for new, _ in pairs] + [error for _, error in pairs]


def _average_at_once(first, coefficient, values, averages, errors):
    """All tensors in a few launches, on PyTorch."""
    with torch.no_grad():
        if first:
            torch._foreach_copy_(averages, values)
            if errors:
                torch._foreach_zero_(errors)
            return
        weight = float(coefficient("float64"))
        if any(v.dtype != a.dtype for v, a in zip(values, averages)):
            values = [v.to(a.dtype) for v, a in zip(values, averages)]
        if not errors:
            torch._foreach_lerp_(averages, values, weight)
            return
        # As `moved_exactly`, in place: memory traffic is what this costs.
        old = torch._foreach_sub(values, averages)
        torch._foreach_add_(errors, old, alpha=weight)
        torch._foreach_copy_(old, averages)
        torch._foreach_add_(averages, errors)
        torch._foreach_sub_(old, averages)
        torch._foreach_add_(errors, old)


def is_known(condition):
    """Whether Python can look at a boolean tensor without any waiting."""
    return BACKEND == "torch" and condition.device.type == "cpu"


def choose(condition, make_first, make_second, often=True):
    """`make_first()` where the boolean tensor holds, else `make_second()`.

    Both return lists of tensors of the same shapes and dtypes. Where it costs
    nothing only one of them is computed.

    Args:
        often: As for `assign_if`.
    """
    if is_known(condition):
        return make_first() if bool(condition) else make_second()
    if BACKEND == "tensorflow" and replicas() == 1:
        return tf.cond(condition, make_first, make_second)
    if BACKEND == "jax" and not often:
        return jax.lax.cond(condition, make_first, make_second)
    return [
        keras.ops.where(condition, first, second)
        for first, second in zip(make_first(), make_second())
    ]


def assign_if(condition, often, variables, make_values):
    """Assigns `make_values()` where the boolean tensor holds.

    Args:
        often: Whether a branch costs more than it saves, since it cannot be
            fused with what is around it: where the condition holds in most
            steps, or the values are cheap next to what made their parts.
    """
    if BACKEND == "tensorflow" and replicas() == 1:

        def assign():
            for variable, value in zip(variables, make_values()):
                variable.assign(value)
            return True

        tf.cond(condition, assign, lambda: False)
        return
    if is_known(condition):
        if bool(condition):
            with torch.no_grad():
                torch._foreach_copy_(
                    [v.value for v in variables], make_values()
                )
        return
    if BACKEND == "jax" and not often:
        values = jax.lax.cond(
            condition, make_values, lambda: [v.value for v in variables]
        )
    else:
        # tf.distribute allows no update under a condition, and PyTorch would
        # wait for the accelerator.
        values = [
            keras.ops.where(condition, value, v.value)
            for value, v in zip(make_values(), variables)
        ]
    for variable, value in zip(variables, values):
        variable.assign(value)


# ---- Randomness -----------------------------------------------------------


def random_state():
    """The state of a generator that lives outside Keras's variables."""
    if BACKEND != "torch":
        return None
    devices = range(torch.cuda.device_count())
    if not torch.cuda.is_initialized():
        devices = []
    return (
        torch.get_rng_state(),
        {d: torch.cuda.get_rng_state(d) for d in devices},
    )


def drew_since(state):
    """Whether that generator gave numbers since `state` was taken."""
    if state is None:
        return False
    now = random_state()
    return not torch.equal(state[0], now[0]) or any(
        not torch.equal(value, now[1][device])
        for device, value in state[1].items()
    )


@contextlib.contextmanager
def replayed(state):
    """Draws the same random numbers again, then returns to where it was."""
    if state is None:
        yield
        return
    now = random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


def _set_random_state(state):
    torch.set_rng_state(state[0])
    for device, value in state[1].items():
        torch.cuda.set_rng_state(value, device)


# ---- Groups ---------------------------------------------------------------


def scan(function, carry, inputs):
    """Runs `carry, out = function(carry, input)` over leading slices."""
    return jax.lax.scan(function, carry, inputs)


def evaluate_if(condition, function, otherwise):
    """`function()` when the boolean tensor holds, else `otherwise()`.

    `otherwise` receives the structure of the first branch's result.
    """
    seen = []

    def first():
        result = function()
        leaves = keras.tree.flatten(result)
        seen.append(result)
        # Unconnected gradients are a matter of the model, not of the batch.
        return [leaf for leaf in leaves if leaf is not None]

    def second():
        leaves = keras.tree.flatten(otherwise(seen[0]))
        return [leaf for leaf in leaves if leaf is not None]

    try:
        flat = iter(tf.cond(condition, first, second))
    except RuntimeError as error:
        if replicas() == 1 or "merge_call" not in str(error):
            raise
        raise ValueError(
            "The number of rows in a batch is not known while the step is "
            "traced, so that each group is evaluated under a condition, in "
            "which tf.distribute lets no layer exchange statistics between "
            "replicas. Pass a tf.data.Dataset batched with "
            "drop_remainder=True, or use no synchronised layers. Received: "
            f"a strategy with {replicas()} replicas"
        ) from error
    leaves = keras.tree.flatten(seen[0])
    leaves = [None if leaf is None else next(flat) for leaf in leaves]
    return keras.tree.pack_sequence_as(seen[0], leaves)


def checked(data, conditions):
    """The same tensors, once every condition holds; for sizes unknown before.

    Args:
        data: Nested structure of tensors, on which the step depends: nothing
            is assigned when a check fails.
        conditions: List of pairs: boolean scalar tensor, message.
    """
    checks = [
        tf.debugging.assert_equal(condition, True, message=message)
        for condition, message in conditions
    ]
    with tf.control_dependencies([c for c in checks if c is not None]):
        return keras.tree.map_structure(
            lambda t: None if t is None else tf.identity(t), data
        )


def pack_groups(groups):
    """Stacks K lists of gradients into the form that products want.

    One stack `[K, *shape]` a variable, which keeps a variable's sharding; on
    PyTorch, where every operation is a launch, one matrix `[K, P]`.
    """
    if BACKEND != "torch":
        stacks = zip(*groups)
        return [
            keras.ops.cast(keras.ops.stack(list(s)), "float32") for s in stacks
        ]
    if not groups[0]:
        return []
    flat = [torch.cat([g.reshape(-1) for g in group]) for group in groups]
    return [torch.stack(flat).to(torch.float32)]


def unpack_group(combined, shapes):
    """One list of gradients, from one combination of a packed form."""
    if BACKEND != "torch" or not combined:
        return combined
    sizes = [int(np.prod(shape)) for shape in shapes]
    pieces = torch.split(combined[0], sizes)
    return [p.reshape(tuple(s)) for p, s in zip(pieces, shapes)]


def pack_vector(tensors):
    """One vector of several tensors, in the form in which products are fast.

    As they are; on PyTorch, where every operation is a launch, flat as one.
    """
    if BACKEND != "torch":
        return list(tensors)
    return [torch.cat([t.reshape(-1) for t in tensors])]


def unpack_vector(vector, shapes):
    """Undoes `pack_vector`."""
    if BACKEND != "torch":
        return vector
    pieces = torch.split(vector[0], [int(np.prod(s)) for s in shapes])
    return [p.reshape(s) for p, s in zip(pieces, shapes)]


def inner_products(stack, other=None):
    """All inner products of the slices of `[K, *shape]`, in full float32.

    With `other`, of shape `[*shape]`, its inner product with each slice.
    Accelerators otherwise use TF32 or bfloat16 in float32 products.
    """
    with_self = other is None
    if BACKEND == "jax" and keras.distribution.distribution() is not None:
        # Flattening would gather a sharded variable on every device.
        axes = list(range(1, stack.ndim))
        own = axes if with_self else list(range(stack.ndim - 1))
        return jnp.tensordot(
            stack,
            stack if with_self else other,
            axes=(axes, own),
            precision=jax.lax.Precision.HIGHEST,
        )
    groups = stack.shape[0]
    matrix = keras.ops.reshape(stack, (groups, -1))
    right = matrix if with_self else keras.ops.reshape(other, (1, -1))
    if BACKEND == "jax":
        highest = jax.lax.Precision.HIGHEST
        products = jnp.matmul(matrix, right.T, precision=highest)
    elif BACKEND == "tensorflow":
        if _uses_tensor_float_32():
            rows = [
                tf.reduce_sum(matrix * right[i], axis=1)
                for i in range(right.shape[0])
            ]
            products = tf.stack(rows, axis=1)
        else:
            products = tf.matmul(matrix, right, transpose_b=True)
    else:
        with _highest_precision():
            products = matrix @ right.T
    return products if with_self else products[:, 0]


def kth_smallest(patterns, k, otherwise):
    """The k-th smallest entry of several int32 tensors.

    PyTorch selects it from all of them in a few operations; the others run
    `otherwise(patterns, k)`, which puts nothing together.
    """
    if BACKEND == "torch":
        flat = torch.cat([p.reshape(-1) for p in patterns])
        return torch.kthvalue(flat, k).values
    return otherwise(patterns, k)


# What follows is in keras.ops too, which looks for symbolic tensors in every
# call: on PyTorch that takes longer than a small operation.


def reshape(tensor, shape):
    """`keras.ops.reshape`."""
    if BACKEND == "torch":
        return tensor.reshape(shape)
    return (jnp if BACKEND == "jax" else tf).reshape(tensor, shape)


def to_float32(tensor):
    """`keras.ops.cast` to float32."""
    if BACKEND == "torch":
        return tensor.to(torch.float32)
    return keras.ops.cast(tensor, "float32")


def sum_over(tensor, axes):
    """`keras.ops.sum`."""
    if BACKEND == "torch":
        return tensor.sum(dim=axes)
    return keras.ops.sum(tensor, axis=axes)


def swapaxes(tensor, first, second):
    """`keras.ops.swapaxes`."""
    if BACKEND == "torch":
        return tensor.transpose(first, second)
    return keras.ops.swapaxes(tensor, first, second)


def exact_products(left, right):
    """`left right'` of matrices of rows, in full float32.

    Accelerators otherwise use TF32 or bfloat16 in float32 products.
    """
    left, right = to_float32(left), to_float32(right)
    if BACKEND == "jax":
        right = jnp.swapaxes(right, -1, -2)
        return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
    if BACKEND == "tensorflow":
        if _uses_tensor_float_32():
            left, right = tf.cast(left, "float64"), tf.cast(right, "float64")
        return tf.cast(tf.matmul(left, right, transpose_b=True), "float32")
    with _highest_precision():
        if left.dim() == 3 and left.shape[0] == 1:  # faster than a batch
            return (left[0] @ right[0].mT)[None]
        return left @ right.mT


def weight_product(left, right):
    """`left' right`, a weight gradient: rounded as ordinary ones are.

    In the precision of its factors, summed and returned in float32.
    """
    if left.dtype != right.dtype:
        left, right = to_float32(left), to_float32(right)
    if BACKEND == "jax":
        left = jnp.swapaxes(left, -1, -2)
        return jnp.matmul(left, right, preferred_element_type="float32")
    if BACKEND == "tensorflow":
        return tf.cast(tf.matmul(left, right, transpose_a=True), "float32")
    if left.dim() == 3 and left.shape[0] == 1:
        return (left[0].mT @ right[0]).to(torch.float32)[None]
    return (left.mT @ right).to(torch.float32)


@contextlib.contextmanager
def _highest_precision():
    """Full float32 in matrix products of PyTorch."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _uses_tensor_float_32():
    return tf.config.experimental.tensor_float_32_execution_enabled() and (
        bool(tf.config.list_physical_devices("GPU"))
    )


def weighted_rows(weights, tensor, axis=0):
    """Multiplies slices by weights; one of weight 0 may hold NaN."""
    column = reshape(weights, _column(tensor, axis))
    if BACKEND == "torch":
        if bool((weights != 0).all()):  # on the host: see `on_small_matrix`
            return tensor * column.to(tensor.device, tensor.dtype)
        column = column.to(tensor.device)
    product = tensor * keras.ops.cast(column, tensor.dtype)
    return keras.ops.where(
        column != 0, product, keras.ops.zeros((), tensor.dtype)
    )


def without_dropped(weights, tensor, axis=0):
    """The same tensor with slices of weight 0, which may hold NaN, zeroed."""
    if BACKEND == "torch" and bool((weights != 0).all()):
        return tensor
    kept = reshape(weights != 0, _column(tensor, axis))
    if BACKEND == "torch":
        kept = kept.to(tensor.device)
    return keras.ops.where(kept, tensor, keras.ops.zeros((), tensor.dtype))


def _column(tensor, axis):
    shape = [1] * len(tensor.shape)
    shape[axis] = -1
    return shape


def has_accelerator():
    """Whether the step runs on a GPU or TPU."""
    if BACKEND == "jax":
        return jax.default_backend() != "cpu"
    if BACKEND == "tensorflow":
        return bool(tf.config.list_logical_devices("GPU"))
    return torch.cuda.is_available()


def combine(weights, stack):
    """The weighted sum of slices; one of weight 0 may hold NaN."""
    if BACKEND == "torch":
        # The weights come from the host (`on_small_matrix`): no read here.
        chosen = torch.nonzero(weights.cpu())[:, 0]
        if len(chosen) < len(weights):
            weights = weights[chosen]
            stack = stack[chosen.to(stack.device)]
        return torch.tensordot(weights.to(stack.device), stack, dims=1)
    if BACKEND == "jax":
        # Slice by slice: XLA on CPUs takes 100 times longer for the sum over
        # the leading axis.
        return sum(
            jnp.where(weights[k] != 0, weights[k] * stack[k], 0.0)
            for k in range(stack.shape[0])
        )
    column = tf.reshape(weights, (-1,) + (1,) * (len(stack.shape) - 1))
    return tf.reduce_sum(tf.math.multiply_no_nan(stack, column), axis=0)


@functools.cache
def _compiled(function):
    """The function compiled by itself; on TensorFlow by XLA, as one kernel."""
    if BACKEND == "jax":
        return jax.jit(function)
    return tf.function(function, jit_compile=True, autograph=False)


def on_small_matrix(function, *arrays):
    """Runs a K x K computation where it is cheapest.

    JAX: in the compiled step. TensorFlow: compiled by itself, since dozens
    of tiny graph operations cost more than the mathematics. PyTorch: NumPy
    on the host, the one read of a step (K x K floats).
    """
    if BACKEND != "torch":
        return _compiled(function)(
            *[keras.ops.convert_to_tensor(a) for a in arrays]
        )
    arrays = [keras.ops.convert_to_numpy(a) for a in arrays]

    def to_tensor(value):
        value = np.asarray(value)
        if value.dtype == np.float64:
            value = value.astype(np.float32)
        return torch.from_numpy(value)  # stays on the host: K numbers

    return keras.tree.map_structure(to_tensor, function(*arrays))


# ---- Several devices ------------------------------------------------------


def replicas():
    """How many replicas of this step run in step, summing their gradients."""
    if BACKEND == "tensorflow":
        return tf.distribute.get_strategy().num_replicas_in_sync
    if BACKEND == "torch" and torch.distributed.is_available():
        if torch.distributed.is_initialized():
            return torch.distributed.get_world_size()
    return 1


def whole_loss(loss):
    """The loss that users see: Keras computes a replica's share of it."""
    if BACKEND == "tensorflow" and replicas() > 1:
        return loss * replicas()
    return loss


def sum_groups(stacks, sizes):
    """Joins the groups of all replicas: their gradients and their rows.

    Keras gives a replica 1/R of the gradient of its own mean loss. That adds
    up to the mean over all rows only where every replica has as many of them;
    in a short batch it does not, and one may have none of a group. So group k,
    of n_k rows on a replica and N_k in all, is weighted by R n_k / N_k.
    """
    if replicas() == 1:
        return stacks, sizes
    if BACKEND != "tensorflow":
        return sum_over_replicas(stacks), sizes
    # As one float tensor: tf.distribute refuses to add several int32 tensors
    # at a time, and not every collective of a GPU knows integers.
    own = tf.cast(tf.stack(sizes), "float32")
    (total,) = sum_over_replicas([own])
    factors = replicas() * tf.math.divide_no_nan(own, total)
    weighted = []
    for stack in stacks:
        column = factors[: stack.shape[0]]
        column = tf.reshape(column, (-1,) + (1,) * (len(stack.shape) - 1))
        weighted.append(tf.where(column > 0.0, column * stack, 0.0))
    return sum_over_replicas(weighted), tf.unstack(tf.cast(total, "int32"))


def sum_over_replicas(tensors):
    """Sums each tensor over the replicas; they all get the same result."""
    if replicas() == 1 or not tensors:
        return tensors
    if BACKEND == "tensorflow":
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)
    raise RuntimeError(
        "keras_stab takes gradients with torch.autograd.grad, which bypasses "
        "the gradient synchronisation of DistributedDataParallel: the workers "
        "would silently train apart. Use one process, or GRAIN with "
        'across="batches" in your own DDP loop, which takes synchronised '
        f"gradients. Received: {replicas()} workers"
    )
