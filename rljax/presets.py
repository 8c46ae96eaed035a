"""Online algorithms as their papers have them: settings, with the source of each. Everything else is yours to choose.

    experiment = presets.grpo(model=..., data=..., reward=..., steps=200)

A preset is `functools.partial` of a kind of run; what it sets can be set again. Batch sizes, lengths and numbers of
steps are the model's and the machine's business and are left at the defaults of the run. Settings marked with a dagger
(†) could not be checked against the paper's text or code; read there before you cite them.
"""

import functools

from rljax import advantages, losses, train
from rljax.settings import PPO, Imitation, OnlinePreference, PolicyGradient

# --- actor and critic -------------------------------------------------------------------------------------------------

# Ziegler et al. 2019 (arXiv:1909.08593) and the code released with it: TF1 Adam, KL in the reward with the adaptive
# controller (target 6 nats, from 0.15, horizon 10 000), rewards whitened without their mean, biased variances, T = 0.7,
# −1 for a completion without an end, a value head that starts at 0 on the policy's trunk, one minibatch, 4 epochs.
ppo_ziegler2019 = functools.partial(
    PPO,
    optimizer=functools.partial(train.tf1_adam, eps=1e-5),
    learning_rate=1e-5,
    clip_norm=None,
    schedule=train.linear,
    temperature=0.7,
    kl_reward=0.15,
    kl_target=6.0,
    kl_horizon=10_000,
    epochs=4,
    minibatches=1,
    gamma=1.0,
    lam=0.95,
    value_coef=0.1,
    whiten_rewards=True,
    whiten_advantages=True,
    whiten_ddof=0,
    critic="shared",
    missing_eos_score=-1.0,
)

# Stiennon et al. 2020 (arXiv:2009.01325)†: β = 0.05 fixed, γ = 1, λ = 0.95, 4 epochs, the critic starts from the
# reward model (give its folder as `critic`), whose scores have mean 0 on reference summaries.
ppo_stiennon2020 = functools.partial(
    PPO,
    optimizer=functools.partial(train.tf1_adam, eps=1e-5),
    learning_rate=1.5e-5,
    clip_norm=None,
    temperature=1.0,
    kl_reward=0.05,
    epochs=4,
    minibatches=1,
    gamma=1.0,
    lam=0.95,
    value_coef=0.1,
    whiten_rewards=True,
    whiten_ddof=0,
)

# InstructGPT (Ouyang et al. 2022, arXiv:2203.02155): β = 0.02, weights averaged with decay 0.992, the critic starts
# from the reward model (give its folder as `critic`), and with
# `pretrain_data` PPO-ptx with γ = 27.8; one inner epoch over 8 minibatches (512 in 64s)†, clip 0.2†, no discount†,
# 9e-6 after a short warm-up†.
ppo_instructgpt = functools.partial(
    PPO,
    learning_rate=9e-6,
    schedule=functools.partial(train.constant, warmup=10),
    temperature=1.0,
    kl_reward=0.02,
    epochs=1,
    minibatches=8,
    gamma=1.0,
    ema=0.992,
    pretrain_coef=27.8,
)

# Huang et al. 2024 (arXiv:2403.17031), "The N+ implementation details of RLHF with PPO"†: AdamW with ε = 1e-5, 3e-6
# falling linearly, T = 0.7 in sampling and training, β = 0.05, EOS trick −1, advantages whitened and rewards not;
# give the reward model's folder as `critic`, as they do.
ppo_huang2024 = functools.partial(
    PPO,
    optimizer=functools.partial(train.adamw, eps=1e-5),
    learning_rate=3e-6,
    clip_norm=None,
    schedule=train.linear,
    temperature=0.7,
    kl_reward=0.05,
    epochs=4,
    minibatches=1,
    gamma=1.0,
    lam=0.95,
    value_coef=0.1,
    whiten_rewards=False,
    whiten_advantages=True,
    missing_eos_score=-1.0,
)

# --- without a critic -------------------------------------------------------------------------------------------------

# Williams 1992: the policy gradient of the whole return, no baseline; KL in the reward as RLHF has it.
reinforce = functools.partial(
    PolicyGradient,
    loss=losses.reinforce_loss,
    advantage=advantages.reward_to_go,
    aggregate="seq_mean_token_sum",
    group=1,
    kl_reward=0.05,
)

# Ahmadian et al. 2024 (arXiv:2402.14740): leave-one-out baseline, the whole completion is one action, KL in the reward
# with β = 0.03, k = 4 (or 2), AdamW 1e-6, plain policy gradient.
rloo = functools.partial(
    PolicyGradient,
    loss=losses.reinforce_loss,
    advantage=advantages.leave_one_out,
    aggregate="seq_mean_token_sum",
    group=4,
    kl_reward=0.03,
    learning_rate=1e-6,
)

# Li et al. 2023 (arXiv:2310.10505)†: the baseline is the reward of the greedy completion; KL in the reward.
remax = functools.partial(
    PolicyGradient,
    loss=losses.reinforce_loss,
    advantage=advantages.greedy_baseline,
    aggregate="seq_mean_token_sum",
    group=1,
    kl_reward=0.05,
    learning_rate=1e-6,
)

# Hu et al. 2025 (arXiv:2501.03262)†: PPO's clip without a critic, token returns with a k1 KL in the reward, advantages
# normalised over the whole batch.
reinforce_plus_plus = functools.partial(
    PolicyGradient,
    loss=losses.ppo_clip_loss,
    advantage=advantages.reward_to_go,
    aggregate="token_mean",
    group=1,
    kl_reward=0.01,
    whiten_advantages=True,
    learning_rate=5e-7,
)

# The same paper "with baseline": rewards minus their group's mean, then normalised over the batch; KL (k2) in the loss.
reinforce_plus_plus_baseline = functools.partial(
    PolicyGradient,
    loss=losses.ppo_clip_loss,
    advantage=functools.partial(advantages.group_relative, divide_by_std=False),
    aggregate="token_mean",
    group=8,
    kl_loss=0.01,
    kl_loss_estimator="k2",
    whiten_advantages=True,
    learning_rate=5e-7,
)

# Shao et al. 2024 (arXiv:2402.03300): group-relative advantages over the standard deviation, k3 KL in the loss with
# β = 0.04, a mean per completion, 1e-6, 64 completions a prompt in the paper (8 here), one update per rollout.
grpo = functools.partial(
    PolicyGradient,
    loss=functools.partial(losses.ppo_clip_loss, clip_low=0.2, clip_high=0.2),
    advantage=functools.partial(advantages.group_relative, divide_by_std=True),
    aggregate="seq_mean_token_mean",
    group=8,
    kl_loss=0.04,
    learning_rate=1e-6,
)

# Liu et al. 2025 (arXiv:2503.20783): neither the standard deviation nor the completion's own length divides; no KL.
dr_grpo = functools.partial(
    PolicyGradient,
    loss=functools.partial(losses.ppo_clip_loss, clip_low=0.2, clip_high=0.2),
    advantage=functools.partial(advantages.group_relative, divide_by_std=False),
    aggregate="constant",
    group=8,
    learning_rate=1e-6,
)

# Yu et al. 2025 (arXiv:2503.14476): clip-higher 0.2 / 0.28, dynamic sampling, a mean over all tokens, soft overlong
# punishment (set overlong_buffer to a fifth of max_completion: 4 096 of 20 480 in the paper), no KL, 16 completions,
# 16 updates a rollout.
dapo = functools.partial(
    PolicyGradient,
    loss=functools.partial(losses.ppo_clip_loss, clip_low=0.2, clip_high=0.28),
    advantage=functools.partial(advantages.group_relative, divide_by_std=True),
    aggregate="token_mean",
    group=16,
    filter_groups=True,
    overlong_buffer=32,
    minibatches=16,
    learning_rate=1e-6,
)

# Zheng et al. 2025 (arXiv:2507.18071): one ratio per completion, clipped to [1 − 3e-4, 1 + 4e-4]; four minibatches. So
# narrow a range would clip the rounding of the sampler's log-probabilities in bfloat16: the trainer's are the old ones.
gspo = functools.partial(
    PolicyGradient,
    loss=functools.partial(losses.gspo_loss, clip_low=3e-4, clip_high=4e-4),
    advantage=functools.partial(advantages.group_relative, divide_by_std=True),
    aggregate="seq_mean_token_mean",
    group=8,
    minibatches=4,
    old_logps="trainer",
    learning_rate=1e-6,
)

# MiniMax-M1 (arXiv:2506.13585): the clipped importance weight multiplies a REINFORCE term, so no token loses its
# gradient; only the upper side is clipped (the paper tunes it; ratios up to 5 here†), a mean over all tokens, no KL.
cispo = functools.partial(
    PolicyGradient,
    loss=functools.partial(losses.cispo_loss, clip_low=1.0, clip_high=4.0),
    advantage=functools.partial(advantages.group_relative, divide_by_std=True),
    aggregate="token_mean",
    group=8,
    minibatches=4,
    learning_rate=1e-6,
)

# --- no policy gradient -----------------------------------------------------------------------------------------------

# Guo et al. 2024 (arXiv:2402.04792), OAIF: two completions by the current policy, the reward or judge picks, DPO.
online_dpo = functools.partial(
    OnlinePreference, loss=functools.partial(losses.dpo_loss, beta=0.1), group=2, learning_rate=5e-7
)

# Dong et al. 2023 (arXiv:2304.06767), RAFT: supervised fine-tuning on the best of n, again and again.
raft = functools.partial(Imitation, group=8, learning_rate=2e-5)

# Anthony et al. 2017 (arXiv:1705.08439), STaR (arXiv:2203.14465): only right completions become demonstrations.
expert_iteration = functools.partial(Imitation, group=8, threshold=0.0, learning_rate=2e-5)
