"""The product with a gradient of its own equals plain einsum: value, gradient, second derivative, vmap, remat."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.product import product

CASES = [
    ("btd,df->btf", (2, 3, 4), (4, 5)),
    ("btd,dhk->bthk", (2, 3, 4), (4, 2, 3)),
    ("bhtk,hkd->btd", (2, 2, 3, 4), (2, 4, 5)),
    ("btf,fd->btd", (2, 3, 5), (5, 4)),  # to a narrower result: the weight gradient is computed transposed on CPUs
    ("bhtk,hkd->btd", (2, 2, 3, 4), (2, 4, 3)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("equation", "left", "right"), CASES)
def test_equals_einsum(equation, left, right):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (left, right))
    ours = lambda x, y: jnp.sum(jnp.sin(product(equation, x, y)))  # noqa: E731
    plain = lambda x, y: jnp.sum(jnp.sin(jnp.einsum(equation, x, y, precision="highest")))  # noqa: E731
    for f in (lambda g: g, jax.checkpoint):
        got = jax.jit(jax.value_and_grad(f(ours), (0, 1)))(x, y)
        chex.assert_trees_all_close(got, jax.value_and_grad(plain, (0, 1))(x, y), rtol=1e-5, atol=1e-5)
    twice = [jax.grad(lambda y, f=f: jnp.sum(jax.grad(f)(x, y) ** 2))(y) for f in (ours, plain)]
    chex.assert_trees_all_close(*twice, rtol=1e-4, atol=1e-4)
    many = jnp.stack([y, 2 * y])
    chex.assert_trees_all_close(
        jax.vmap(jax.grad(ours, 1), (None, 0))(x, many), jax.vmap(jax.grad(plain, 1), (None, 0))(x, many), atol=1e-5
    )


def test_bfloat16_gradients_are_bfloat16():
    x, y = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
    dx, dy = jax.grad(lambda x, y: jnp.sum(product("btd,df->btf", x, y)).astype(jnp.float32), (0, 1))(x, y)
    assert (dx.dtype, dy.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_on_cpus_the_wider_operand_comes_second():
    """Of x [b t f] and g [b t d] with f > d the product is d × f, turned back after it; a wide g is not turned."""
    x, y = jnp.ones((2, 3, 5)), jnp.ones((5, 4))

    def barriers(equation, x, y):
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda y: product(equation, x, y).sum()))(y))
        lines = [line for line in jaxpr.splitlines() if "optimization_barrier" in line]
        return [line.split("=")[0].split(":")[1].strip() for line in lines]

    assert barriers("btf,fd->btd", x, y) == ["f32[2,3,5]", "f32[4,5]"]
    assert barriers("btd,df->btf", jnp.ones((2, 3, 4)), y.T) == []
