"""Shifting, masked statistics, aggregation."""

import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import ops

MODES = [
    ("token_mean", {}),
    ("seq_mean_token_mean", {}),
    ("seq_mean_token_sum", {}),
    ("constant", {"length": 7}),
]
each_mode = pytest.mark.parametrize(("mode", "options"), MODES, ids=[mode for mode, _ in MODES])
X = np.asarray([[1.0, -2.0, 4.0, 9.0], [3.0, 0.5, 9.0, 9.0], [9.0] * 4, [2.0, 2.0, 2.0, 1.0]], np.float32)
MASK = np.asarray([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)


def test_token_logps_describe_the_token_they_stand_at():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
    ids = np.asarray([[4, 0, 3, 1], [2, 2, 2, 0]])
    logps = jax.jit(ops.token_logps)(logits, ids)
    every = jax.nn.log_softmax(logits)
    assert logps[:, 0].tolist() == [0.0, 0.0]
    for row in range(2):
        for t in range(1, 4):
            assert logps[row, t] == pytest.approx(float(every[row, t - 1, ids[row, t]]), rel=1e-5)
    # a later token, and the last logits, change nothing before them
    changed = ops.token_logps(logits.at[:, 3].set(99.0), ids)
    np.testing.assert_array_equal(changed, logps)


def test_token_logps_survive_extreme_and_impossible_logits():
    logits = np.asarray([[[1e30, -1e30, -np.inf], [0.0, -np.inf, 0.0], [0.0, 0.0, 0.0]]], np.float32)
    logps, slope = jax.value_and_grad(lambda x: ops.token_logps(x, np.asarray([[1, 0, 2]])).sum())(logits)
    assert logps == pytest.approx(-np.log(2))  # certainty, then one of two
    np.testing.assert_allclose(slope, [[[0, 0, 0], [-0.5, 0, 0.5], [0, 0, 0]]], atol=1e-6)


CERTAIN = [[20.0, 10.0], [-60.0, -90.0], [1000.0, 985.0, 980.0], [5.0, 5.0, 5.0], [3.0, 1.0, 3.0, -7.0], [40.0, 0.0]]


def exactly(logits):
    """(log p, entropy, slopes of log p by token, slope of the entropy) with fifty digits."""
    with decimal.localcontext() as context:
        context.prec = 50
        powers = [decimal.Decimal(x).exp() for x in logits]
        p = [x / sum(powers) for x in powers]
        logp = [x.ln() for x in p]
        entropy = -sum(x * y for x, y in zip(p, logp, strict=True))
        slopes = [[float((i == j) - p[j]) for j in range(len(p))] for i in range(len(p))]
        bends = [float(-x * (y + entropy)) for x, y in zip(p, logp, strict=True)]
        return [float(x) for x in logp], float(entropy), slopes, bends


def test_nearly_certain_tokens_keep_what_is_left_of_them():
    """float32 to its rounding: of [20, 10] the first has −4.54e-5 and the entropy is 4.99e-4."""
    logps, entropies, certainties = (jax.jit(f) for f in (ops.aligned_logps, ops.aligned_entropy, ops.log_softmax))
    slope = jax.jit(jax.grad(lambda x, i: ops.aligned_logps(x, i)))
    entropy_slope = jax.jit(jax.grad(ops.aligned_entropy))
    for logits in CERTAIN:
        x = np.pad(np.float32(logits), (0, 4 - len(logits)), constant_values=-np.inf)  # one shape, one compilation
        logp, entropy, slopes, bends = exactly(logits)
        n, exact = len(logits), functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-38)
        exact(certainties(x)[:n], logp)
        exact(entropies(x), entropy)
        exact(entropy_slope(x)[:n], bends, atol=1e-7 if entropy > 0.5 else 1e-38)
        for i in range(n):
            exact(logps(x, i), logp[i])
            exact(slope(x, i)[:n], slopes[i])


def test_curvature_of_a_log_probability():
    """The second derivative of log p is −(diag p − p pᵀ), whichever token."""
    with jax.enable_x64(True):
        x = np.asarray([1.0, -0.5, 2.0])
        p = np.exp(x) / np.exp(x).sum()
        for i in range(3):
            bend = jax.hessian(lambda x, i=i: ops.aligned_logps(x, i))(x)
            np.testing.assert_allclose(bend, np.outer(p, p) - np.diag(p), atol=1e-12)


def test_an_id_beyond_the_vocabulary_is_nan_and_not_a_neighbour():
    assert np.isnan(ops.token_logps(np.zeros((1, 2, 3)), np.asarray([[0, 3]]))[0, 1])


def test_bfloat16_logits_are_normalised_in_float32():
    # 256 equal logits: ln 256 = 5.545; a bfloat16 sum of exps would stop growing at 256·2^-8
    logits = jnp.zeros((1, 2, 1000), jnp.bfloat16)
    assert ops.token_logps(logits, np.zeros((1, 2), int))[0, 1] == pytest.approx(-np.log(1000), rel=1e-6)
    assert ops.entropy(logits)[0, 1] == pytest.approx(np.log(1000), rel=1e-5)
    assert jax.grad(lambda x: ops.token_logps(x, np.zeros((1, 2), int)).sum())(logits).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "function",
    [lambda x: ops.token_logps(x, np.zeros((2, 8), np.int32)), ops.entropy],
    ids=["token_logps", "entropy"],
)
def test_no_float32_array_with_a_vocabulary_waits_for_the_backward_pass(function):
    logits = jnp.zeros((2, 8, 512), jnp.bfloat16)
    _, pullback = jax.vjp(function, logits)
    kept = jax.tree.leaves(pullback)
    assert kept
    assert not [x.shape for x in kept if x.dtype == jnp.float32 and x.size >= 512]


def test_forward_and_second_derivatives_of_token_logps():
    with jax.enable_x64(True):
        logits = jax.random.normal(jax.random.key(1), (1, 2, 3))
        ids = np.asarray([[0, 1]])
        hessian = jax.jit(jax.hessian(lambda z: ops.token_logps(logits.at[0, 0].set(z), ids).sum()))(logits[0, 0])
        p = np.asarray(jax.nn.softmax(logits[0, 0]))
        np.testing.assert_allclose(hessian, np.outer(p, p) - np.diag(p), atol=1e-12)


def test_entropy_limits():
    logits = np.asarray([[[0.0, 0.0, -np.inf, -np.inf], [1e30, 0.0, -1e30, 0.0], [0.0] * 4, [0.0] * 4]], np.float32)
    entropy, slope = jax.value_and_grad(lambda x: ops.entropy(x).sum())(logits)
    np.testing.assert_allclose(ops.entropy(logits), [[0.0, np.log(2), 0.0, np.log(4)]], atol=1e-6)
    assert np.isfinite(entropy)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)  # extremes of the entropy, all of them


def test_trap_12_pads_never_move_a_masked_metric():
    # a pad's log-prob −1 counts as one nat when it is averaged in
    logps = np.asarray([[-0.5, -0.3, -1.0, -1.0]])
    mask = np.asarray([[True, True, False, False]])
    assert ops.masked_mean(-logps, mask).value() == pytest.approx(0.4)
    longer = np.pad(logps, ((0, 1), (0, 5)), constant_values=-1.0), np.pad(mask, ((0, 1), (0, 5)))
    assert ops.masked_mean(-longer[0], longer[1]).value() == pytest.approx(0.4)


def test_masked_mean_of_rows_and_of_nothing():
    mean = ops.masked_mean(np.asarray([1.0, 5.0, np.nan]), np.asarray([True, True, False]))
    assert (mean.value(), mean.weight) == (3.0, 2.0)
    assert ops.masked_mean(np.full(2, np.nan), np.zeros(2, bool)).value() == 0.0


def test_whitened_moments():
    for ddof in (0, 1):
        white = np.asarray(ops.masked_whiten(X, MASK, ddof=ddof))[MASK]
        assert white.mean() == pytest.approx(0.0, abs=1e-6)
        assert white.var(ddof=ddof) == pytest.approx(1.0, rel=1e-5)
        kept = np.asarray(ops.masked_whiten(X, MASK, ddof=ddof, shift_mean=False))[MASK]
        assert kept.mean() == pytest.approx(X[MASK].mean(), rel=1e-5)


def test_whitening_one_element_or_equal_ones():
    one = np.asarray([[5.0, 9.0]]), np.asarray([[True, False]])
    for ddof in (0, 1):
        assert ops.masked_whiten(*one, ddof=ddof).tolist() == [[0.0, 0.0]]
        assert ops.masked_whiten(*one, ddof=ddof, shift_mean=False).tolist() == [[5.0, 0.0]]
    # trap 7: eps = 0 is legal; 0 / 0 is not
    value, slope = jax.value_and_grad(lambda x: ops.masked_whiten(x, one[1], eps=0.0).sum())(one[0])
    assert (value, slope.tolist()) == (0.0, [[0.0, 0.0]])


@each_mode
def test_trap_05_duplicating_the_batch_changes_nothing(mode, options):
    once = ops.aggregate(X, MASK, mode=mode, **options).value()
    twice = ops.aggregate(np.tile(X, (2, 1)), np.tile(MASK, (2, 1)), mode=mode, **options).value()
    assert twice == pytest.approx(float(once), rel=1e-6)


@each_mode
def test_trap_03_and_05_uneven_microbatches_add_up_in_loss_and_gradient(mode, options):
    @functools.partial(jax.jit, static_argnames="pieces")
    def loss(x, pieces):
        means = [
            ops.aggregate(part, mask, mode=mode, **options)
            for part, mask in zip(jnp.split(x, pieces), np.split(MASK, pieces), strict=True)
        ]
        return functools.reduce(lambda a, b: a + b, means).value()

    whole = jax.value_and_grad(loss)(X, 1)
    for pieces in (2, 4):
        parts = jax.value_and_grad(loss)(X, pieces)
        np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
        np.testing.assert_allclose(parts[1], whole[1], rtol=1e-6)


def test_aggregate_counts_an_empty_row_in_sequence_means():
    for mode, weight in [("seq_mean_token_mean", 4), ("seq_mean_token_sum", 4), ("token_mean", 9)]:
        assert ops.aggregate(X, MASK, mode=mode).weight == weight


def test_aggregate_errors_name_the_modes():
    with pytest.raises(ValueError, match="Unknown aggregate mode 'mean': choose one of \"token_mean\""):
        ops.aggregate(X, MASK, mode="mean")
    with pytest.raises(ValueError, match="pass length="):
        ops.aggregate(X, MASK, mode="constant")


def test_finite_exp_is_exact_then_linear():
    for function, exact in [(ops.finite_exp, np.exp), (ops.finite_expm1, np.expm1)]:
        x = np.asarray([-1e4, -3.0, 0.0, 5.0, 61.0], np.float32)
        np.testing.assert_allclose(function(jnp.asarray(x)), exact(x), rtol=1e-6)
        far = jnp.asarray([89.0, 1e4, 1e6], jnp.float32)
        value, slope = function(far), jax.grad(lambda x, f=function: f(x).sum())(far)
        assert np.isfinite(value).all()
        assert (np.diff(value) > 0).all()
        np.testing.assert_allclose(slope, slope[0])
        assert 0 < slope[0] < np.inf
    with jax.enable_x64(True):
        assert ops.finite_exp(jnp.asarray(200.0)) == pytest.approx(np.exp(200.0))


def test_require_positive():
    ops.require_positive(beta=0.1, horizon=3)
    for value in (0.0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"tau is {value}.*above 0"):
            ops.require_positive(tau=value)
    jax.jit(lambda beta: ops.require_positive(beta=beta))(0.0)  # traced: cannot be known
