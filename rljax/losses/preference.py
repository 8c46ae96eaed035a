"""Learning from preferences, directly on the policy: log-probs of responses [b] -> loss [b].

The four arrays of most losses are sums of log-probs over the response (`ops.sequence_sum`), of the policy and of the
frozen reference, for the chosen (w) and the rejected (l) response; averages (`ops.sequence_mean`) where a name says so.

    d_w = log π(y_w) − log π_ref(y_w)      d_l = log π(y_l) − log π_ref(y_l)      h = d_w − d_l

Values and gradients are finite for all log-ratios a model can produce.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, relu, sigmoid
from jaxtyping import ArrayLike, Bool, Float, Real

from rljax.errors import UserError
from rljax.ops import Scalar, as_float, finite_exp, finite_expm1, require_positive

Logps = Real[ArrayLike, " b"]
Loss = Float[Array, " b"]


def _log_ratios(
    policy_chosen_logps: Logps, policy_rejected_logps: Logps, ref_chosen_logps: Logps, ref_rejected_logps: Logps
) -> tuple[Array, Array]:
    """d_w and d_l."""
    chosen = as_float(policy_chosen_logps) - as_float(ref_chosen_logps)
    return chosen, as_float(policy_rejected_logps) - as_float(ref_rejected_logps)


def dpo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> Loss:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290 Eq. 7).

    loss = −(1 − ε) log σ(βh) − ε log σ(−βh),   ε = label_smoothing

    ε > 0 is conservative DPO (cDPO, Mitchell 2023): a label is wrong with probability ε, the optimum is σ(βh) = 1 − ε.
    `robust_dpo_loss` is the unbiased alternative. TRL: "sigmoid".
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    logits = beta * (chosen - rejected)
    return -(1.0 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)


def robust_dpo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
    label_smoothing: Scalar,
) -> Loss:
    """Robust DPO, unbiased under flipped labels (Chowdhury et al. 2024, arXiv:2403.00409).

    loss = (−(1 − ε) log σ(βh) + ε log σ(−βh)) / (1 − 2ε),   ε = label_smoothing, the probability of a flip

    Its mean over flips is DPO's loss on the true labels; it may be negative. ε = 0 is DPO. TRL: "robust".
    Raises UserError for ε ≥ ½.
    """
    if isinstance(label_smoothing, float) and label_smoothing >= 0.5:
        raise UserError(
            f"robust_dpo_loss: label_smoothing is {label_smoothing}, and labels that are flipped half of the time say "
            "nothing: pass a value below 0.5 (above it, swap chosen and rejected)."
        )
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    logits = beta * (chosen - rejected)
    biased = -(1.0 - label_smoothing) * log_sigmoid(logits) + label_smoothing * log_sigmoid(-logits)
    return biased / (1.0 - 2.0 * label_smoothing)


def ipo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
) -> Loss:
    """Identity preference optimization (Azar et al. 2023, arXiv:2310.12036 Eq. 17).

    loss = (h − 1/(2β))²,   β is the paper's τ

    With sums of log-probs this is the paper's formula. The authors' experiments, and TRL's "ipo", use averages over the
    response: pass `ops.sequence_mean`s for those; the loss is the same function.
    """
    require_positive(beta=beta)
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (chosen - rejected - 1.0 / (2.0 * beta)) ** 2


def hinge_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
) -> Loss:
    """Hinge on the normalised margin, RSO's "hinge-norm" (Liu et al. 2023, arXiv:2309.06657); TRL: "hinge".

    loss = max(0, 1 − βh)

    SLiC-HF's hinge has no reference: that is `slic_loss`.
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return relu(1.0 - beta * (chosen - rejected))


def exo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
    label_smoothing: Scalar,
) -> Loss:
    """Efficient exact optimization, for pairs (Ji et al. 2024, arXiv:2402.00856 Eq. 16); TRL: "exo_pair".

    loss = KL(q‖p) = q log(q / (1 − ε)) + (1 − q) log((1 − q) / ε),   q = σ(βh),   ε = label_smoothing

    cDPO is the forward KL(p‖q) plus a constant; this is the reverse. Raises UserError for ε outside (0, 1): at ε = 0
    the loss is infinite (TRL then takes 1e-3).
    """
    if isinstance(label_smoothing, int | float) and not 0.0 < label_smoothing < 1.0:
        raise UserError(
            f"exo_loss: label_smoothing is {label_smoothing}, but the loss is KL(σ(βh)‖1 − label_smoothing), which "
            "is infinite at 0 and at 1: pass a value between, for example 1e-3."
        )
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    logits = beta * (chosen - rejected)
    wins = sigmoid(logits) * (log_sigmoid(logits) - jnp.log1p(-label_smoothing))
    return wins + sigmoid(-logits) * (log_sigmoid(-logits) - jnp.log(label_smoothing))


def nca_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
) -> Loss:
    """Noise contrastive alignment, for pairs (Chen et al. 2024, arXiv:2402.05369); TRL: "nca_pair".

    loss = −log σ(βd_w) − ½ log σ(−βd_w) − ½ log σ(−βd_l)

    It raises d_w itself, where DPO raises only h.
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    noise = 0.5 * log_sigmoid(-beta * chosen) + 0.5 * log_sigmoid(-beta * rejected)
    return -log_sigmoid(beta * chosen) - noise


def bco_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
    delta: Scalar = 0.0,
) -> Loss:
    """Binary classifier optimization (Jung et al. 2024, arXiv:2404.04656).

    loss = −log σ(βd_w − δ) − log σ(−(βd_l − δ))

    δ is the paper's reward shift: half the sum of the running means of the two rewards βd, computed before the update
    (it is data: no gradient runs through it). δ = 0 is TRL's "bco_pair".
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return -log_sigmoid(beta * chosen - delta) - log_sigmoid(delta - beta * rejected)


def sppo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
) -> Loss:
    """Self-play preference optimization with hard labels (Wu et al. 2024, arXiv:2405.00675); TRL: "sppo_hard".

    loss = (d_w − 1/(2β))² + (d_l + 1/(2β))²,   β = 1/η

    The reference is the policy of the previous iteration. The winner's probability of winning is taken as 1.
    """
    require_positive(beta=beta)
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (chosen - 1.0 / (2.0 * beta)) ** 2 + (rejected + 1.0 / (2.0 * beta)) ** 2


def apo_zero_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
) -> Loss:
    """Anchored preference optimization, "zero" (D'Oosterlinck et al. 2024, arXiv:2408.06266 Eq. 7); TRL: "apo_zero".

    loss = (1 − σ(βd_w)) + σ(βd_l)

    Chosen up, rejected down: for chosen responses that are better than the model's own. The paper leaves out the 1.
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return sigmoid(-beta * chosen) + sigmoid(beta * rejected)


def apo_down_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
) -> Loss:
    """Anchored preference optimization, "down" (D'Oosterlinck et al. 2024, arXiv:2408.06266 Eq. 8); TRL: "apo_down".

    loss = σ(βd_w) + (1 − σ(βh))

    Both down, rejected more: for chosen responses that are worse than the model's own. The paper leaves out the 1.
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return sigmoid(beta * chosen) + sigmoid(-beta * (chosen - rejected))


def discopop_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
    tau: Scalar = 0.05,
) -> Loss:
    """The loss that a language model discovered (DiscoPOP, Lu et al. 2024, arXiv:2406.08414 Eq. 5); TRL: "discopop".

    loss = −(1 − w) log σ(βh) + w exp(−βh),   w = σ(βh / τ)

    Logistic where the pair is ordered wrongly, exponential where it is right; not convex between.
    """
    require_positive(tau=tau)
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    logits = beta * (chosen - rejected)
    exponential = finite_exp(log_sigmoid(logits / tau) - logits)  # w exp(−βh): the factors alone would be 0 · inf
    return -sigmoid(-logits / tau) * log_sigmoid(logits) + exponential


def _f_prime(log_ratio: Array, divergence: str | tuple[str, Scalar]) -> Array:
    """f′(u) of an f-divergence, up to a constant, from log u = log π/π_ref."""
    match divergence:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return -finite_expm1(-log_ratio)
        case "js":
            return log_sigmoid(log_ratio)
        case ("alpha", alpha) if isinstance(alpha, int | float) and alpha == 0:
            return log_ratio  # the limit
        case ("alpha", alpha):
            return -finite_expm1(-alpha * log_ratio) / alpha
    options = '"reverse_kl", "forward_kl", "js" or ("alpha", a)'
    raise UserError(f"Unknown divergence {divergence!r}: choose {options}.")


def f_dpo_loss(
    policy_chosen_logps: Logps,
    policy_rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    *,
    beta: Scalar,
    divergence: str | tuple[str, Scalar],
) -> Loss:
    """DPO under another divergence from the reference (f-DPO, Wang et al. 2023, arXiv:2309.16240, Table 1).

    loss = −log σ(β f′(u_w) − β f′(u_l)),   u = π/π_ref

    "reverse_kl"   f′(u) = log u + 1: `dpo_loss`         "forward_kl"   f′(u) = −1/u
    "js"           f′(u) = log(2u / (1 + u))             ("alpha", a)   f′(u) = (1 − u^(−a)) / a

    a is the paper's α, between 0 (reverse KL) and 1 (forward KL). u^(−a) is exact to e⁶² in float32 and linear in log u
    beyond (TRL caps it). Raises UserError for an unknown divergence.
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return -log_sigmoid(beta * (_f_prime(chosen, divergence) - _f_prime(rejected, divergence)))


def simpo_loss(chosen_average_logps: Logps, rejected_average_logps: Logps, *, beta: Scalar, gamma: Scalar) -> Loss:
    """SimPO (Meng et al. 2024, arXiv:2405.14734 Eq. 6): length-normalised, no reference.

    loss = −log σ(β log π(y_w)/|y_w| − β log π(y_l)/|y_l| − γ)

    γ is the paper's target margin, not multiplied by β: TRL's `simpo_gamma`; the authors' `gamma_beta_ratio` is γ/β.
    """
    return -log_sigmoid(beta * (as_float(chosen_average_logps) - as_float(rejected_average_logps)) - gamma)


def _log_odds(logps: Logps) -> Array:
    """log p/(1 − p) from log p, bounded where log p rounds to 0."""
    logps = as_float(logps)
    certain = -jnp.finfo(logps.dtype).eps
    logps = jnp.where(logps < certain, logps, certain)
    return logps - jnp.log(-jnp.expm1(logps))


def orpo_loss(chosen_average_logps: Logps, rejected_average_logps: Logps, *, beta: Scalar) -> Loss:
    """The odds-ratio term of ORPO (Hong et al. 2024, arXiv:2403.07691 Eq. 7), which its objective adds to `nll_loss`.

    loss = −β log σ(log odds(y_w) − log odds(y_l)),   odds = p/(1 − p),   p = exp(average log-prob of a token)

    β is the paper's λ (0.1). An average log-prob of 0 (p = 1) counts as one rounding step below.
    """
    return -beta * log_sigmoid(_log_odds(chosen_average_logps) - _log_odds(rejected_average_logps))


def cpo_loss(policy_chosen_logps: Logps, policy_rejected_logps: Logps, *, beta: Scalar) -> Loss:
    """The preference term of CPO (Xu et al. 2024, arXiv:2401.08417), which its objective adds to `nll_loss`.

    loss = −log σ(β (log π(y_w) − log π(y_l))):  DPO without a reference
    """
    return -log_sigmoid(beta * (as_float(policy_chosen_logps) - as_float(policy_rejected_logps)))


def slic_loss(policy_chosen_logps: Logps, policy_rejected_logps: Logps, *, delta: Scalar) -> Loss:
    """The calibration term of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425 Eq. 1): a hinge without a reference.

    loss = max(0, δ − log π(y_w) + log π(y_l))

    The objective adds λ · `nll_loss` of the SFT target.
    """
    return relu(delta - as_float(policy_chosen_logps) + as_float(policy_rejected_logps))


def unlikelihood_loss(policy_chosen_logps: Logps, policy_rejected_logps: Logps, *, alpha: Scalar) -> Loss:
    """Likelihood of the preferred, unlikelihood of the other (Welleck et al. 2019, arXiv:1908.04319); no reference.

    loss = −log π(y_w) + α log π(y_l)

    As the baseline of DPO (Rafailov et al. 2023, arXiv:2305.18290, section 6) has it: of whole responses, log π(y_l)
    in place of −log(1 − π(y_l)). Without a lower bound for α > 0; α = 0 is fine-tuning on what was preferred.
    """
    return alpha * as_float(policy_rejected_logps) - as_float(policy_chosen_logps)


def kto_loss(
    policy_logps: Logps,
    ref_logps: Logps,
    desirable: Bool[ArrayLike, " b"],
    kl: Scalar | Logps,
    *,
    beta: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> Loss:
    """Kahneman-Tversky optimization: single responses, thumb up or down (Ethayarajh et al. 2024, arXiv:2402.01306).

    loss = λ_D (1 − σ(β(d − z)))  if desirable,   λ_U (1 − σ(β(z − d)))  if not;   d = log π(y) − log π_ref(y)

    z = max(0, kl) without gradient. `kl` is the mean log-ratio, without β, of responses paired with other prompts
    (x_i, y_{i+1}): a scalar, or the same repeated [b]. Both terms saturate, so outliers lose their gradient. TRL's
    KTOTrainer is the same with `desirable_weight` and `undesirable_weight`.
    """
    reference_point = jax.lax.stop_gradient(jnp.maximum(as_float(kl), 0.0))
    gain = beta * (as_float(policy_logps) - as_float(ref_logps) - reference_point)
    return jnp.where(desirable, desirable_weight * sigmoid(-gain), undesirable_weight * sigmoid(gain))
