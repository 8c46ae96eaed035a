"""A matrix product whose weight gradient is written the way that compilers run fastest."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rljax.models.attention import exact

RESULT = "product"  # the name under which rematerialisation policies find what `product` returns


def product(equation: str, x: Array, y: Array) -> Array:
    """einsum of two arrays, `equation` as in "btd,df->btf".

    Differentiated as it stands, the gradient of y comes out transposed and is transposed back by a copy: on CPUs the
    weight gradients of an MLP take twice as long that way as the same product written out. (Reverse mode only.) Where x
    has more numbers than the result has, CPUs compute it transposed after all, for the sake of x: see `_turned`.
    Its result has a name, since a policy that looks for products does not look into a function with its own gradient.
    """
    return checkpoint_name(_product(equation, x, y), RESULT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, precision=exact(x.dtype))


def _forward(equation: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(equation, x, y), (x, y)


def _backward(equation: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    (x, y), (inputs, out) = saved, equation.split("->")
    left, right = inputs.split(",")
    straight = functools.partial(_product, f"{left},{out}->{right}")
    if x.size > g.size:
        grad_y = jax.lax.platform_dependent(x, g, cpu=functools.partial(_turned, left, right, out), default=straight)
    else:
        grad_y = straight(x, g)
    return _product(f"{out},{right}->{left}", g, y), grad_y


def _turned(left: str, right: str, out: str, x: Array, g: Array) -> Array:
    """The gradient of y as its transpose, turned back. A product of sums over rows copies its first operand transposed
    on CPUs, reading at a stride: here that is g, narrower than x. The barriers keep XLA from undoing it.
    """
    turned = "".join(sorted(right, key=left.__contains__))
    made = _product(f"{out},{left}->{turned}", g, jax.lax.optimization_barrier(x))
    return jnp.einsum(f"{turned}->{right}", jax.lax.optimization_barrier(made))


_product.defvjp(_forward, _backward)
