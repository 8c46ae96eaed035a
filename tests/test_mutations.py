"""Every golden can fail: each formula is broken in the source, and the goldens must notice (trap 29)."""

import ast
import dataclasses
import functools
import inspect
import types

import pytest

from rljax import advantages, ops
from rljax.losses import kl, policy, preference, reward, supervised, value
from tests.losses.goldens import GOLDENS
from tests.losses.support import lookup, matches

LOSSES = (kl, policy, preference, reward, supervised, value)


@dataclasses.dataclass(frozen=True)
class Mutation:
    function: str  # whose goldens must notice
    old: str  # exactly once in the function's code (docstring aside), or in that of the helper `within`
    new: str
    within: str | None = None


def mutations(function: str, *changes: tuple[str, ...]) -> list[Mutation]:
    return [Mutation(function, *change) for change in changes]


FLIP_CHOSEN = ("as_float(policy_chosen_logps) -", "as_float(policy_chosen_logps) +", "_log_ratios")
FLIP_REJECTED = ("as_float(policy_rejected_logps) -", "as_float(policy_rejected_logps) +", "_log_ratios")
MARGIN = (FLIP_CHOSEN, FLIP_REJECTED, ("chosen - rejected", "chosen + rejected"))

TABLE = [
    *mutations(
        "losses.ppo_clip_loss",
        ("jnp.maximum", "jnp.minimum"),
        ("jnp.minimum", "jnp.maximum"),
        ("advantages < 0", "advantages > 0"),
        ("-advantages * dual_clip", "advantages * dual_clip"),
        ("clip_high: Scalar = 0.2", "clip_high: Scalar = 0.28"),
        ("1.0 - clip_low", "1.0 + clip_low", "_terms"),
        ("1.0 + clip_high", "1.0 - clip_high", "_terms"),
        ("return -advantages * ratio", "return advantages * ratio", "_terms"),
        ("as_float(logps) - as_float(old_logps)", "as_float(old_logps) - as_float(logps)", "_ratio"),
    ),
    *mutations(
        "losses.clip_fraction",
        ("clipped > plain", "clipped < plain"),
        ("clipped > plain", "clipped >= plain"),
        ("advantages < 0", "advantages > 0"),
        ("ratio > dual_clip", "ratio < dual_clip"),
        ("1.0 + clip_high", "9.0", "_terms"),
    ),
    *mutations(
        "losses.cispo_loss",
        ("1.0 - clip_low", "1.0 + clip_low"),
        ("1.0 + clip_high", "1.0"),
        ("jax.lax.stop_gradient(weight) * as_float(advantages)", "as_float(advantages)"),
    ),
    *mutations("losses.reinforce_loss", ("-as_float", "as_float"), (" * ", " + ")),
    *mutations(
        "losses.gspo_loss",
        ("sequence_mean(difference, mask)", "jnp.sum(difference, axis=1)", "_sequence_ratio"),
        ("jnp.maximum", "jnp.minimum"),
        ("return zero_where_masked(loss, mask)", "return loss + 1"),
        ("as_float(logps) - as_float(old_logps)", "as_float(old_logps) - as_float(logps)", "_sequence_ratio"),
        ("1.0 - clip_low", "1.0 + clip_low", "_terms"),
    ),
    *mutations(
        "losses.gspo_clip_fraction",
        ("clipped > plain", "clipped < plain"),
        ("clipped > plain", "clipped >= plain"),
        ("sequence_mean(difference, mask)", "jnp.sum(difference, axis=1)", "_sequence_ratio"),
    ),
    *mutations("losses.value_clip_loss", ("0.5 * ", ""), ("jnp.maximum", "jnp.minimum"), ("-clip, clip", "0, clip")),
    *mutations(
        "losses.kl_penalty",
        ("as_float(logps) -", "as_float(logps) +"),
        ("0.5 * ", ""),
        ("finite_expm1(-difference)", "finite_expm1(difference)"),
        ("+ difference", "- difference"),
    ),
    *mutations(
        "losses.distillation_loss",
        ("as_float(student_logits) / temperature", "as_float(student_logits) * temperature"),
        ("as_float(teacher_logits) / temperature", "as_float(teacher_logits)"),
        ("return _kl(teacher, student)", "return _kl(student, teacher)"),
        ("return _kl(student, teacher)", "return _kl(teacher, student)"),
        ("_mixture(student, teacher, beta)", "_mixture(teacher, student, beta)"),
        ("beta * _kl(teacher, mixture)", "_kl(teacher, mixture)"),
        ("(1.0 - beta) * ", ""),
        ("(logps - other_logps)", "(-other_logps)", "_kl"),
    ),
    *mutations(
        "losses.dpo_loss",
        *MARGIN,
        ("beta * ", ""),
        ("-(1.0 - label_smoothing)", "-(1.0 + label_smoothing)"),
        ("- label_smoothing * log_sigmoid(-logits)", "+ label_smoothing * log_sigmoid(-logits)"),
    ),
    *mutations(
        "losses.robust_dpo_loss",
        *MARGIN,
        ("beta * ", ""),
        ("+ label_smoothing * log_sigmoid", "- label_smoothing * log_sigmoid"),
        ("1.0 - 2.0 * label_smoothing", "1.0"),
    ),
    *mutations("losses.ipo_loss", *MARGIN, ("2.0 * beta", "beta"), ("** 2", "")),
    *mutations("losses.hinge_loss", *MARGIN, ("1.0 - beta", "beta"), ("beta * ", ""), ("relu(", "(")),
    *mutations(
        "losses.exo_loss",
        *MARGIN,
        ("beta * ", ""),
        ("log1p(-label_smoothing)", "log(label_smoothing)"),
        ("- jnp.log(label_smoothing)", "+ jnp.log(label_smoothing)"),
        ("wins + sigmoid(-logits)", "wins + sigmoid(logits)"),
    ),
    *mutations(
        "losses.nca_loss",
        FLIP_CHOSEN,
        FLIP_REJECTED,
        ("0.5 * log_sigmoid(-beta * chosen)", "log_sigmoid(-beta * chosen)"),
        ("0.5 * log_sigmoid(-beta * rejected)", "0.5 * log_sigmoid(beta * rejected)"),
        ("return -log_sigmoid(beta * chosen)", "return -log_sigmoid(chosen)"),
    ),
    *mutations(
        "losses.bco_loss",
        FLIP_CHOSEN,
        FLIP_REJECTED,
        ("beta * chosen - delta", "beta * chosen + delta"),
        ("delta - beta * rejected", "-delta - beta * rejected"),
        ("delta - beta * rejected", "delta - rejected"),
    ),
    *mutations(
        "losses.sppo_loss",
        FLIP_CHOSEN,
        FLIP_REJECTED,
        ("chosen - 1.0", "chosen + 1.0"),
        ("rejected + 1.0", "rejected - 1.0"),
        ("chosen - 1.0 / (2.0 * beta)", "chosen - 1.0 / beta"),
    ),
    *mutations(
        "losses.apo_zero_loss",
        FLIP_CHOSEN,
        FLIP_REJECTED,
        ("sigmoid(-beta * chosen)", "sigmoid(beta * chosen)"),
        ("sigmoid(beta * rejected)", "sigmoid(-beta * rejected)"),
    ),
    *mutations(
        "losses.apo_down_loss",
        *MARGIN,
        ("sigmoid(beta * chosen)", "sigmoid(-beta * chosen)"),
        ("sigmoid(-beta * (", "sigmoid(beta * ("),
    ),
    *mutations(
        "losses.discopop_loss",
        *MARGIN,
        ("beta * ", ""),
        ("log_sigmoid(logits / tau)", "log_sigmoid(logits)"),
        ("sigmoid(-logits / tau)", "sigmoid(logits / tau)"),
        ("+ exponential", "- exponential"),
    ),
    *mutations(
        "losses.f_dpo_loss",
        FLIP_CHOSEN,
        FLIP_REJECTED,
        ("beta * ", ""),
        ("_f_prime(chosen, divergence) -", "_f_prime(chosen, divergence) +"),
        ("finite_expm1(-log_ratio)", "finite_expm1(log_ratio)", "_f_prime"),
        ("return log_sigmoid(log_ratio)", "return -log_sigmoid(-log_ratio)", "_f_prime"),
        ("-alpha * log_ratio", "-(1 - 0.1 * alpha) * log_ratio", "_f_prime"),
        (" / alpha", "", "_f_prime"),
        (
            'case "reverse_kl":\n            return log_ratio',
            'case "reverse_kl":\n            return -log_ratio',
            "_f_prime",
        ),
    ),
    *mutations("losses.simpo_loss", ("beta * ", ""), ("- gamma", "- beta * gamma"), ("logps) - as", "logps) + as")),
    *mutations(
        "losses.orpo_loss",
        ("-beta * ", "-"),
        ("_log_odds(chosen_average_logps) -", "_log_odds(chosen_average_logps) +"),
        ("logps - jnp.log", "logps + jnp.log", "_log_odds"),
    ),
    *mutations("losses.cpo_loss", ("beta * ", ""), ("logps) - as", "logps) + as"), ("-log_sigmoid", "log_sigmoid")),
    *mutations("losses.slic_loss", ("relu(", "("), ("delta - ", "delta + "), ("+ as_float", "- as_float")),
    *mutations("losses.unlikelihood_loss", ("alpha * ", ""), (") - as_float", ") + as_float"), ("alpha *", "-alpha *")),
    *mutations(
        "losses.kto_loss",
        ("jnp.maximum(as_float(kl), 0.0)", "as_float(kl)"),
        ("- reference_point", "+ reference_point"),
        ("beta * ", ""),
        ("desirable_weight * sigmoid(-gain)", "sigmoid(-gain)"),
        ("undesirable_weight * sigmoid(gain)", "undesirable_weight * sigmoid(-gain)"),
    ),
    *mutations("losses.bradley_terry_loss", ("chosen) -", "chosen) +"), ("- as_float(margin)", "+ as_float(margin)")),
    *mutations("losses.best_of_k_loss", ("return -aligned", "return aligned")),
    *mutations("losses.nll_loss", ("-as_float", "as_float")),
    *mutations(
        "advantages.gae",
        ("+ gamma * next_value", "+ next_value"),
        ("- value + gamma", "+ gamma"),
        ("gamma * lam * next_advantage", "gamma * next_advantage"),
        ("jnp.where(trained, value, next_value)", "value"),
        ("jnp.where(trained, advantage, next_advantage)", "advantage"),
        ("jnp.where(trained, advantage, 0.0)", "advantage"),
        ("advantages.T + values", "advantages.T"),
        ("reverse=True", "reverse=False"),
    ),
    *mutations("advantages.discounted_returns", ("gamma=gamma", "gamma=1.0"), ("lam=1.0", "lam=0.0")),
    *mutations(
        "advantages.shape_rewards",
        ("score - kl_coef", "score + kl_coef"),
        ("kl_coef * ", ""),
        ("positions == last", "positions == mask.shape[1] - 1"),
        ("jnp.where(mask, positions, -1)", "positions"),
        ("estimator=estimator)", 'estimator="k1")'),
        ("estimator=estimator)", 'estimator="k2")'),
        ("return jnp.where(mask, score - kl_coef * penalty, 0.0)", "return score + 1 - kl_coef * penalty"),
    ),
    *mutations(
        "advantages.group_relative",
        ("rewards - mean", "rewards + mean"),
        ("jnp.maximum(n, 1)", "rewards.shape[1]"),
        ("n - ddof", "n"),
        ("+ eps", ""),
        ("+ eps", "+ 1e-4"),
        ("if not divide_by_std", "if divide_by_std"),
        ("centred / (jnp.sqrt(jnp.where(varied, variance, 1.0))", "centred / (jnp.where(varied, variance, 1.0)"),
    ),
    *mutations(
        "advantages.leave_one_out",
        ("jnp.maximum(n - 1, 1)", "n"),
        ("jnp.maximum(n - 1, 1)", "(rewards.shape[1] - 1)"),
        ("keepdims=True) - rewards", "keepdims=True)"),
        ("applies & (n > 1)", "n > 1"),
        ("applies & (n > 1)", "applies"),
    ),
    *mutations(
        "advantages.greedy_baseline", ("- as_float(greedy)", "+ as_float(greedy)"), ("as_float(rewards) -", "-")
    ),
    *mutations("advantages.reward_to_go", ("gamma=gamma", "gamma=1.0"), ("gamma: Scalar = 1.0", "gamma: Scalar = 0.5")),
    *mutations(
        "advantages.adaptive_kl",
        ("- 1.0, -0.2, 0.2", "- 1.0, -0.2, 1.0"),
        ("- 1.0, -0.2, 0.2", "- 1.0, -1.0, 0.2"),
        ("1.0 + error", "1.0 - error"),
        ("batch_size / horizon", "batch_size"),
    ),
    *mutations(
        "ops.token_logps",
        (")[:, :-1]", ")[:, 1:]"),
        ("(1, 0)", "(0, 1)"),
        ("below - size", "below + size", "_chosen"),
    ),
    *mutations("ops.entropy", (")[:, :-1]", ")[:, 1:]"), ("(1, 0)", "(0, 1)")),
    *mutations("ops.aligned_logps", ("below - size", "below + size", "_chosen"), ("+ jnp.expm1(below)", "", "_chosen")),
    *mutations("ops.aligned_entropy", ("return -jnp", "return jnp", "_entropy"), ("jnp.exp(logps) * ", "", "_entropy")),
    *mutations("ops.sequence_sum", ("zero_where_masked(x, mask)", "x")),
    *mutations("ops.sequence_mean", ("jnp.maximum(jnp.sum(jnp.asarray(mask), axis=1), 1)", "x.shape[1]")),
    *mutations("ops.masked_mean", ("zero_where_masked(x, mask)", "x"), ("jnp.asarray(mask)", "jnp.ones(x.shape)")),
    *mutations(
        "ops.masked_whiten",
        ("n - ddof", "n"),
        ("n - ddof", "n - 1"),
        ("+ eps", ""),
        ("x - mean", "x"),
        ("whitened if shift_mean else whitened + mean", "whitened"),
        ("jax.lax.rsqrt", "jnp.reciprocal"),
    ),
    *mutations(
        "ops.aggregate",
        ("jnp.sum(sequence_mean(x, mask))", "tokens.total"),
        ("weight=count * length", "weight=count"),
        ("            return tokens", "            return Mean(total=tokens.total, weight=count)"),
        ("total=tokens.total, weight=count)", "total=tokens.total, weight=tokens.weight)"),
        ("jnp.sum(jnp.asarray(rows))", "jnp.shape(x)[0]"),
    ),
]


def home(function: str) -> types.ModuleType:
    """The module that defines a function of the mathematics."""
    package, name = function.split(".")
    modules = {"ops": (ops,), "advantages": (advantages,), "losses": LOSSES}[package]
    return next(module for module in modules if hasattr(module, name) and name in inspect.getsource(module))


@functools.cache
def code_span(module: types.ModuleType, name: str) -> tuple[int, int]:
    """Where a function's code lies in its module's source: the signature and the body after the docstring."""
    source = inspect.getsource(module)
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts[node.lineno - 1], starts[node.end_lineno]


def without_docstring(code: str) -> str:
    docstring = ast.get_docstring(ast.parse(code).body[0], clean=False)
    return code.replace(f'"""{docstring}"""', '"""."""') if docstring else code


def mutant(mutation: Mutation) -> types.ModuleType:
    """A copy of the module with the mutation applied."""
    module = home(mutation.function)
    start, end = code_span(module, mutation.within or mutation.function.split(".")[1])
    source = inspect.getsource(module)
    code = without_docstring(source[start:end])
    assert code.count(mutation.old) == 1, f"{mutation.old!r} stands {code.count(mutation.old)} times in\n{code}"
    copy = types.ModuleType(module.__name__)
    changed = source[:start] + code.replace(mutation.old, mutation.new) + source[end:]
    exec(compile(changed, f"<mutant of {module.__name__}>", "exec"), copy.__dict__)
    return copy


def survives(golden, module) -> bool:
    return matches(lookup(golden, module)(*golden.arrays()), golden, atol=1e-4)


@functools.cache
def killed(mutation: Mutation) -> frozenset[str]:
    """The goldens that notice a mutation."""
    module = mutant(mutation)
    return frozenset(g.id for g in GOLDENS if g.function == mutation.function and not survives(g, module))


@pytest.mark.slow
@pytest.mark.parametrize("mutation", TABLE, ids=lambda m: f"{m.function}: {m.old} -> {m.new}")
def test_a_broken_formula_fails_a_golden(mutation):
    assert killed(mutation)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.id)
def test_every_golden_can_fail(golden):
    assert any(golden.id in killed(m) for m in TABLE if m.function == golden.function)


def test_the_harness_itself_changes_nothing():
    for function in ("losses.dpo_loss", "advantages.gae", "ops.masked_whiten"):
        source = inspect.getsource(home(function))
        copy = types.ModuleType("copy")
        exec(compile(source, "<copy>", "exec"), copy.__dict__)
        assert all(survives(golden, copy) for golden in GOLDENS if golden.function == function)
