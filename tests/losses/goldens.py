"""Hand-computed cases of every public function of the mathematics, shared by the golden tests and the mutation tests.

Inputs are logarithms of small integers, so that every expected number is a line of arithmetic (beside it). The numbers
were worked out from the papers' formulas with a calculator; nothing here calls the code under test.
"""

import dataclasses
from typing import Any

import numpy as np

F, T = False, True
LN2, LN3, LN5, LN6 = 0.6931471805599453, 1.0986122886681098, 1.6094379124341003, 1.791759469228055


@dataclasses.dataclass(frozen=True)
class Golden:
    function: str  # "losses.dpo_loss"
    args: tuple[Any, ...]  # nested lists, or numbers
    expected: Any  # nested lists; (total, weight) for a Mean; a tuple for a function that returns one
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    gradient: tuple[int, ...] = (0,)  # positions of the differentiable arguments; () where a gradient is stopped
    label: str = ""

    @property
    def id(self) -> str:
        return f"{self.function}-{self.label}" if self.label else self.function

    def arrays(self, dtype: Any = np.float32) -> list[Any]:
        """The arguments as numpy arrays: floats in `dtype`, integers and booleans as they are."""
        arrays = [np.asarray(arg) for arg in self.args]
        return [a.astype(dtype) if a.dtype.kind == "f" else a for a in arrays]


def preference(name: str, expected: list[float], label: str = "", **options: Any) -> Golden:
    """Two pairs at beta 0.5: (βd_w, βd_l, βh) = (ln 3, −ln 2, ln 6), and the same swapped: (−ln 2, ln 3, −ln 6)."""
    chosen, rejected = [-3 + 2 * LN3, -5 - 2 * LN2], [-7 - 2 * LN2, -4 + 2 * LN3]
    args = (chosen, rejected, [-3.0, -5.0], [-7.0, -4.0])
    return Golden(f"losses.{name}", args, expected, {"beta": 0.5} | options, (0, 1, 2, 3), label)


# ratio    2    2    1/2   1/2   1      clip to [0.8, 1.3]
RATIOS = [[LN2, LN2, -LN2, -LN2, 0.0]]
OLD = [[0.0, 0.0, 0.0, 0.0, 0.0]]
SIGNS = [[1.0, -1.0, 1.0, -1.0, 2.0]]
CLIP = {"clip_low": 0.2, "clip_high": 0.3}
SEQUENCES = (
    [[2 * LN2, 0.0, 50.0], [-1 - LN2, 9.0, 9.0], [5.0, -1 + 0.1823215568, -2 + 0.1823215568]],
    [[0.0, 0.0, -50.0], [-1.0, 0.0, 0.0], [0.0, -1.0, -2.0]],
    [[1.0, 1.0, 9.0], [-1.0, 9.0, 9.0], [9.0, 2.0, 2.0]],
    [[T, T, F], [T, F, F], [F, T, T]],
)

POLICY = [
    # max(−ρA, −clip(ρ)A): max(−2, −1.3), max(2, 1.3), max(−.5, −.8), max(.5, .8), −2
    Golden("losses.ppo_clip_loss", (RATIOS, OLD, SIGNS), [[-1.3, 2.0, -0.5, 0.8, -2.0]], CLIP),
    # the second is cut to 1.5·|A|
    Golden(
        "losses.ppo_clip_loss",
        (RATIOS, OLD, SIGNS),
        [[-1.3, 1.5, -0.5, 0.8, -2.0]],
        CLIP | {"dual_clip": 1.5},
        label="dual_clip",
    ),
    # the defaults are 0.2 and 0.2
    Golden("losses.ppo_clip_loss", (RATIOS, OLD, SIGNS), [[-1.2, 2.0, -0.5, 0.8, -2.0]], label="defaults"),
    Golden("losses.clip_fraction", (RATIOS, OLD, SIGNS), [[1.0, 0.0, 0.0, 1.0, 0.0]], CLIP, ()),
    Golden(
        "losses.clip_fraction",
        (RATIOS, OLD, SIGNS),
        [[1.0, 1.0, 0.0, 1.0, 0.0]],
        CLIP | {"dual_clip": 1.5},
        (),
        "dual_clip",
    ),
    # −clip(ρ)·A·logp: −1.3 ln 2, 1.3 ln 2, 0.8 ln 2, −0.8 ln 2, 0
    Golden("losses.cispo_loss", (RATIOS, OLD, SIGNS), [[-0.901091, 0.901091, 0.554518, -0.554518, 0.0]], CLIP, ()),
    Golden("losses.reinforce_loss", ([[-1.0, -2.0]], [[2.0, -3.0]]), [[2.0, -6.0]], gradient=(0, 1)),
    # s = √(4·1) = 2, 1/2, 1.2:   max(−2, −1.3), max(.5, .8), max(−2.4, −2.4); 0 outside the mask
    Golden("losses.gspo_loss", SEQUENCES, [[-1.3, -1.3, 0.0], [0.8, 0.0, 0.0], [0.0, -2.4, -2.4]], CLIP),
    Golden("losses.gspo_clip_fraction", SEQUENCES, [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], CLIP, ()),
    # ½ max(V − R, V_clipped − R)²: ½ max(4, 2.25), ½ max(1, 2.25), ½ 0.36, ½ max(0.04, 0.25)
    Golden(
        "losses.value_clip_loss",
        ([[2.0, 2.0, 0.9, 0.2]], [[1.0, 1.0, 1.0, 1.0]], [[0.0, 3.0, 1.5, 0.0]]),
        [[2.0, 1.125, 0.18, 0.125]],
        {"clip": 0.5},
        (0, 2),
    ),
]

KL = [
    Golden("losses.kl_penalty", ([[-1.0, -3.0]], [[-1 - LN2, -3 + LN2]]), [[x, y]], {"estimator": k}, (0, 1), k)
    # d = ln 2 and −ln 2:   d;   ½ d²;   ½ + ln 2 − 1 and 2 − ln 2 − 1
    for k, x, y in [
        ("k1", 0.693147, -0.693147),
        ("k2", 0.240227, 0.240227),
        ("k3", 0.193147, 0.306853),
    ]
] + [
    # S = (1/2, 1/2), T = (3/4, 1/4), M = ¾ S + ¼ T = (9/16, 7/16)
    Golden(
        "losses.distillation_loss",
        ([[[4.0, 4.0]]], [[[1 + LN3, 1.0]]]),
        [[expected]],
        {"divergence": divergence},
        (0, 1),
        label,
    )
    for label, divergence, expected in [
        ("forward_kl", "forward_kl", 0.130812),  # ¾ ln(3/2) + ¼ ln(1/2)
        ("reverse_kl", "reverse_kl", 0.143841),  # ½ ln(2/3) + ½ ln 2
        ("jsd", ("jsd", 0.25), 0.0248700),  # ¼ (¾ ln(4/3) + ¼ ln(4/7)) + ¾ (½ ln(8/9) + ½ ln(8/7))
    ]
]
KL += [
    # S = (1/3, 2/3), T = (3/4, 1/4), as logits times 2: ¾ ln(9/4) + ¼ ln(3/8)
    Golden(
        "losses.distillation_loss",
        ([[[4.0, 4 + 2 * LN2]]], [[[1 + 2 * LN3, 1.0]]]),
        [[0.362990]],
        {"divergence": "forward_kl", "temperature": 2.0},
        (0, 1),
        "temperature",
    ),
]

PREFERENCE = [
    preference("dpo_loss", [0.154151, 1.945910]),  # ln(7/6), ln 7
    preference("dpo_loss", [0.333327, 1.766734], "cdpo", label_smoothing=0.1),  # .9 ln(7/6) + .1 ln 7, and swapped
    preference("robust_dpo_loss", [-0.069819, 2.169880], label_smoothing=0.1),  # (.9 ln(7/6) − .1 ln 7) / .8
    preference("ipo_loss", [6.674570, 21.008646]),  # (±2 ln 6 − 1)²
    preference("hinge_loss", [0.0, 2.791759]),  # max(0, 1 ∓ ln 6)
    # q = 6/7: 6/7 ln((6/7)/.9) + 1/7 ln((1/7)/.1);  q = 1/7: 1/7 ln((1/7)/.9) + 6/7 ln((6/7)/.1)
    preference("exo_loss", [0.009134, 1.578579], label_smoothing=0.1),
    preference("nca_loss", [1.183562, 1.994492]),  # ln(4/3) + ½ ln 4 + ½ ln(3/2);  ln 3 + ½ ln(3/2) + ½ ln 4
    preference("bco_loss", [0.693147, 2.484907]),  # ln(4/3) + ln(3/2);  ln 3 + ln 4
    preference("bco_loss", [0.733969, 2.525729], "delta", delta=LN2),  # −ln .6 − ln .8;  −ln .2 − ln .4
    preference("sppo_loss", [1.582570, 15.916646]),  # (2 ln 3 − 1)² + (1 − 2 ln 2)²;  (−2 ln 2 − 1)² + (2 ln 3 + 1)²
    preference("apo_zero_loss", [0.583333, 1.416667]),  # ¼ + ⅓;  ⅔ + ¾
    preference("apo_down_loss", [0.892857, 1.190476]),  # ¾ + 1/7;  ⅓ + 6/7
    # w = 36/37, 1/37:  (1 − w) ln(7/6) + w/6;   (1 − w) ln 7 + 6 w
    preference("discopop_loss", [0.166328, 2.055480], tau=0.5),
    preference("f_dpo_loss", [0.154151, 1.945910], "reverse_kl", divergence="reverse_kl"),
    # u = 9 and 1/4:  f′ = −1/9 and −4, ½·35/9 = 35/18: ln(1 + e^−35/18), and + 35/18
    preference("f_dpo_loss", [0.133715, 2.078159], "forward_kl", divergence="forward_kl"),
    # f′ = ln 1.8 and ln 0.4, ½ ln 4.5: ln(1 + 1/√4.5), ln(1 + √4.5)
    preference("f_dpo_loss", [0.386217, 1.138256], "js", divergence="js"),
    # f′ = 2(1 − 1/3) and 2(1 − 2), ½·10/3 = 5/3: ln(1 + e^−5/3), and + 5/3
    preference("f_dpo_loss", [0.173008, 1.839675], "alpha", divergence=("alpha", 0.5)),
    # 2·0.25 − 0.5 = 0: ln 2;   2·1 − 0.5: ln(1 + e^−1.5)
    Golden(
        "losses.simpo_loss",
        ([-1.0, -1.0], [-1.25, -2.0]),
        [0.693147, 0.201413],
        {"beta": 2.0, "gamma": 0.5},
        (0, 1),
    ),
    # odds 1 and 1/3: −0.1 ln(3/4), −0.1 ln(1/4)
    Golden(
        "losses.orpo_loss",
        ([-LN2, -2 * LN2], [-2 * LN2, -LN2]),
        [0.0287682, 0.1386294],
        {"beta": 0.1},
        (0, 1),
    ),
    # ½·2 ln 3: ln(4/3), and ln 4
    Golden(
        "losses.cpo_loss",
        ([-1.0, -1 - 2 * LN3], [-1 - 2 * LN3, -1.0]),
        [0.287682, 1.386294],
        {"beta": 0.5},
        (0, 1),
    ),
    Golden("losses.slic_loss", ([-1.0, -1.0, -3.0], [-1.5, -3.0, -1.0]), [0.5, 0.0, 3.0], {"delta": 1.0}, (0, 1)),
    # 1 − ½·1.5, 1 − ½·3, 3 − ½·1
    Golden(
        "losses.unlikelihood_loss", ([-1.0, -1.0, -3.0], [-1.5, -3.0, -1.0]), [0.25, -0.5, 2.5], {"alpha": 0.5}, (0, 1)
    ),
    # z = 2 ln 2; β(d − z) = ln 3, ln 3, −ln 2, −ln 2:  2(1 − ¾), 3·¾, 2·⅔, 3·⅓
    Golden(
        "losses.kto_loss",
        ([-1 + 2 * LN6, -1 + 2 * LN6, -4.0, -4.0], [-1.0, -1.0, -4.0, -4.0], [T, F, T, F], 2 * LN2),
        [0.5, 2.25, 1.333333, 1.0],
        {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0},
        (0, 1),
    ),
    # kl < 0 counts as 0: 1 − σ(½·2 ln 3), σ(ln 3)
    Golden(
        "losses.kto_loss",
        ([-1 + 2 * LN3, -1 + 2 * LN3], [-1.0, -1.0], [T, F], -5.0),
        [0.25, 0.75],
        {"beta": 0.5},
        (0, 1),
        "negative_kl",
    ),
]

SCORES = [1 + LN3, -2.0], [1.0, -2.0]

REWARD = [
    Golden("losses.bradley_terry_loss", SCORES, [0.287682, 0.693147], gradient=(0, 1)),  # ln(4/3), ln 2
    # ln(1 + 1), ln(1 + 3)
    Golden(
        "losses.bradley_terry_loss",
        SCORES,
        [0.693147, 1.386294],
        {"margin": LN3},
        (0, 1),
        "margin",
    ),
    Golden("losses.best_of_k_loss", ([[0.0, LN2, LN5]], [1]), [1.386294]),  # ln(8/2)
    Golden("losses.nll_loss", ([[-2.0, -0.5]],), [[2.0, 0.5]]),
]

# one row, trained tokens 1, 2 and 4: r = 1, 2, 3, V = ½, 1, 2
REWARDS, VALUES, MASK = [[9.0, 1.0, 2.0, 9.0, 3.0, 9.0]], [[9.0, 0.5, 1.0, 9.0, 2.0, 9.0]], [[F, T, T, F, T, F]]

ADVANTAGES = [
    # δ = 3 − 2, 2 + ½·2 − 1, 1 + ½·1 − ½;  A = 1, 2 + .4, 1 + .4·2.4
    Golden(
        "advantages.gae",
        (REWARDS, VALUES, MASK),
        ([[0.0, 1.96, 2.4, 0.0, 1.0, 0.0]], [[0.0, 2.46, 3.4, 0.0, 3.0, 0.0]]),
        {"gamma": 0.5, "lam": 0.8},
        (0, 1),
    ),
    Golden("advantages.discounted_returns", (REWARDS, MASK), [[0.0, 2.75, 3.5, 0.0, 3.0, 0.0]], {"gamma": 0.5}),
    # d = ½, −1: −0.05, 10 + 0.1; the second row is empty
    Golden(
        "advantages.shape_rewards",
        ([10.0, 7.0], [[-1.0, -2.0, -3.0]] * 2, [[-1.5, -1.0, -9.0]] * 2, [[T, T, F], [F, F, F]]),
        [[-0.05, 10.1, 0.0], [0.0, 0.0, 0.0]],
        {"kl_coef": 0.1},
        (0, 1, 2),
    ),
    # ½ d² = 0.125, 0.5
    Golden(
        "advantages.shape_rewards",
        ([10.0], [[-1.0, -2.0, -3.0]], [[-1.5, -1.0, -9.0]], [[T, T, F]]),
        [[-0.0125, 9.95, 0.0]],
        {"kl_coef": 0.1, "estimator": "k2"},
        (0, 1, 2),
        "k2",
    ),
    # mean 3, deviations −2, −1, 0, 3, squares 14
    Golden("advantages.group_relative", ([[1.0, 2.0, 3.0, 6.0]],), [[-2.0, -1.0, 0.0, 3.0]], {"divide_by_std": False}),
    # /(√(14/3) + 0.1) = /2.260247
    Golden(
        "advantages.group_relative",
        ([[1.0, 2.0, 3.0, 6.0]],),
        [[-0.884859, -0.442429, 0.0, 1.327288]],
        {"divide_by_std": True, "eps": 0.1},
        label="std",
    ),
    # /√3.5 = /1.870829
    Golden(
        "advantages.group_relative",
        ([[1.0, 2.0, 3.0, 6.0]],),
        [[-1.069045, -0.534522, 0.0, 1.603567]],
        {"divide_by_std": True, "ddof": 0, "eps": 0.0},
        label="ddof0",
    ),
    # of three with a reward: − 10/3;   /√(19/3) = /2.516611
    Golden(
        "advantages.group_relative",
        ([[1.0, 9.0, 3.0, 6.0]],),
        [[-2.333333, 0.0, -0.333333, 2.666667]],
        {"divide_by_std": False, "applies": np.asarray([[T, F, T, T]])},
        label="applies",
    ),
    Golden(
        "advantages.group_relative",
        ([[1.0, 9.0, 3.0, 6.0]],),
        [[-0.927173, 0.0, -0.132453, 1.059626]],
        {"divide_by_std": True, "eps": 0.0, "applies": np.asarray([[T, F, T, T]])},
        label="applies-std",
    ),
    # the others' means are 9/2, –, 7/2, 2; and nobody to compare with
    Golden(
        "advantages.leave_one_out",
        ([[1.0, 9.0, 3.0, 6.0], [1.0, 2.0, 3.0, 4.0]],),
        [[-3.5, 0.0, -0.5, 4.0], [0.0, 0.0, 0.0, 0.0]],
        {"applies": np.asarray([[T, F, T, T], [F, F, T, F]])},
        label="applies",
    ),
    # the others' means are 11/3, 10/3, 3, 2
    Golden("advantages.leave_one_out", ([[1.0, 2.0, 3.0, 6.0]],), [[-2.666667, -1.333333, 0.0, 4.0]]),
    Golden(
        "advantages.greedy_baseline",
        ([[1.0, 2.0, 3.0, 6.0], [0.5, 0.5, 0.5, 0.5]], [2.0, -1.0]),
        [[-1.0, 0.0, 1.0, 4.0], [1.5, 1.5, 1.5, 1.5]],
        gradient=(0, 1),
    ),
    # 1 + 2 + 4, 2 + 4, 4; the second row is 3 + 5, 5 with a tool token between
    Golden(
        "advantages.reward_to_go",
        ([[1.0, 2.0, 4.0, 99.0], [3.0, 99.0, 5.0, 99.0]], [[T, T, T, F], [T, F, T, F]]),
        [[7.0, 6.0, 4.0, 0.0], [8.0, 0.0, 5.0, 0.0]],
    ),
    # 1 + ½ (2 + ½ 4), 2 + ½ 4, 4
    Golden(
        "advantages.reward_to_go",
        ([[1.0, 2.0, 4.0, 99.0]], [[T, T, T, F]]),
        [[3.0, 4.0, 4.0, 0.0]],
        {"gamma": 0.5},
        label="discounted",
    ),
] + [
    # 0.2 (1 + e·0.5), e = 0.1, 0.2, −0.2
    Golden(
        "advantages.adaptive_kl", (0.2, kl), expected, {"target": 6.0, "horizon": 1024, "batch_size": 512}, (), label
    )
    for kl, expected, label in [(6.6, 0.21, "in_range"), (60.0, 0.22, "high"), (0.0, 0.18, "low")]
]

X, TRAINED = [[1.0, 3.0, 5.0], [99.0, 4.0, 99.0], [99.0, 99.0, 99.0]], [[T, T, T], [F, T, F], [F, F, F]]
WHITEN = ([[1.0, 2.0], [99.0, 6.0]], [[T, T], [F, T]])  # mean 3, deviations −2, −1, 3, squares 14

OPS = [
    # softmax (¼, ¾), then (½, ½): ln ¼, ln ½; the last logits predict nothing
    Golden(
        "ops.token_logps",
        ([[[7.0, 7 + LN3], [1.0, 1.0], [100.0, -100.0]]], [[0, 0, 1]]),
        [[0.0, -1.386294, -0.693147]],
    ),
    Golden("ops.entropy", ([[[7.0, 7 + LN3], [1.0, 1.0], [100.0, -100.0]]],), [[0.0, 0.562335, 0.693147]]),
    Golden("ops.aligned_logps", ([[7.0, 7 + LN3], [1.0, 1.0]], [0, 1]), [-1.386294, -0.693147]),
    Golden("ops.aligned_entropy", ([[7.0, 7 + LN3], [1.0, 1.0]],), [0.562335, 0.693147]),
    Golden("ops.sequence_sum", (X, TRAINED), [9.0, 4.0, 0.0]),
    Golden("ops.sequence_mean", (X, TRAINED), [3.0, 4.0, 0.0]),
    Golden("ops.masked_mean", (X, TRAINED), (13.0, 4.0)),
    Golden("ops.masked_whiten", WHITEN, [[-0.755929, -0.377964], [0.0, 1.133893]]),  # /√7
    Golden("ops.masked_whiten", WHITEN, [[-0.925820, -0.462910], [0.0, 1.388730]], {"ddof": 0}, label="ddof0"),
    Golden(
        "ops.masked_whiten", WHITEN, [[2.244071, 2.622036], [0.0, 4.133893]], {"shift_mean": False}, label="rewards"
    ),
    Golden("ops.masked_whiten", WHITEN, [[-0.666667, -0.333333], [0.0, 1.0]], {"eps": 2.0}, label="eps"),  # /√9
    Golden(
        "ops.aggregate",
        (X, TRAINED),
        (7.0, 2.0),
        {"mode": "seq_mean_token_mean", "rows": np.asarray([T, T, F])},
        label="rows",
    ),
] + [
    Golden("ops.aggregate", (X, TRAINED), expected, {"mode": mode} | options, label=mode)
    for mode, options, expected in [
        ("token_mean", {}, (13.0, 4.0)),
        ("seq_mean_token_mean", {}, (7.0, 3.0)),
        ("seq_mean_token_sum", {}, (13.0, 3.0)),
        ("constant", {"length": 8}, (13.0, 24.0)),
    ]
]

GOLDENS = POLICY + KL + PREFERENCE + REWARD + ADVANTAGES + OPS
