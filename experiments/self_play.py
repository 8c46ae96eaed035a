"""Self-play: two players split coins, and learn from their own shares. Nothing is loaded; the players start at random.

The game  One turn each: the first player claims, the second hears it and claims too. What fits into the pile is paid,
          else both get nothing: the ultimatum game (Güth, Schmittberger and Schwarze 1982).
Theory    Every split of all the coins is a Nash equilibrium; in the subgame-perfect one the first player gets nearly
          everything, since the second one's best reply to a claim is all that it leaves (Stahl 1972; Rubinstein 1982
          for one round). Players that learn side by side need not find that one: greedy claims are met by players who
          have not learned to give in yet, and once both split evenly, no other claim is ever tried.
Set-up    Two decoders of 2 layers and width 64 (or two copies of one, --copies), PPO's loss without a critic: an
          episode's reward minus the mean of its player's batch, over the standard deviation, for all tokens of it.
Run       rljax run experiments/self_play.py
Pass      At least 0.9 of the coins paid: the players have agreed on a split.
Got       --seed 0: all coins paid from step 60 on, half of them to the first player. Five minutes on half a CPU core.
"""

import jax
import numpy as np
import optax
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from rljax import environments, losses, models, objectives, train, views
from rljax.environments import Episodes
from rljax.filters import Sampling
from rljax.policy import Policy
from rljax.types import PolicyBatch

LIMITS = {"max_new_tokens": 2, "max_prompt": 80, "max_length": 88}


def random_player(coins: int, key: jax.Array) -> Policy:
    """A random transformer that speaks numbers from 0 to `coins`; all other words are one token to it."""
    words = ["<unk>", *map(str, range(coins + 1))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = models.ModelConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_positions=LIMITS["max_length"],
    )
    model = models.build(config)
    numbers = tuple(range(1, len(words)))  # an action ends in a number
    return Policy(model, model.init(key), PreTrainedTokenizerFast(tokenizer_object=tokenizer), numbers)


def batch_of(played: Episodes) -> PolicyBatch:
    """What a player learns from: the episode's reward against the mean of the batch, at each of its own tokens."""
    scores, mask = played.rewards.sum(1), played.rollout.tokens.mask
    advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
    return PolicyBatch(
        tokens=played.rollout.tokens,
        old_logps=played.rollout.logps,
        advantages=np.where(mask, advantages[:, None], 0).astype(np.float32),
    )


def main(
    *,
    coins: int = 6,
    shared: float = 0.0,
    copies: bool = False,
    steps: int = 150,
    episodes: int = 128,
    learning_rate: float = 2e-3,
    entropy: float = 0.02,
    seed: int = 0,
) -> int:
    """Let two players learn from each other; the exit status is 1 where they do not agree on a split.

    shared: weight of the reward for both, the share of the coins that is paid. copies: two copies of one policy.
    """
    game = environments.split_coins(coins=coins, max_turns=1, shared=shared)
    key, *births = jax.random.split(jax.random.key(seed), 3)
    players = [random_player(coins, births[0 if copies else i]) for i in range(2)]
    optimizer = optax.adam(train.linear(learning_rate, steps))
    look = views.of_policy(players[0].model, sampling=Sampling(), entropy=True)
    update = train.make_update(objectives.policy(look, losses.ppo_clip_loss, entropy_coef=entropy), optimizer)
    states = [train.init_state(player.params, optimizer) for player in players[: 1 if copies else 2]]
    paid, first = 0.0, 0.0
    for step in range(steps):
        now = [player._replace(params=states[i % len(states)].params) for i, player in enumerate(players)]
        both = environments.play_against(now, game, [{}] * episodes, jax.random.fold_in(key, step), seed=step, **LIMITS)
        batches = [batch_of(played) for played in both]
        if copies:
            batches = [jax.tree.map(lambda *x: np.concatenate(x), *batches)]
        states = [update(state, batch)[0] for state, batch in zip(states, batches, strict=True)]
        paid, first = outcome(both, coins)
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}  coins paid {paid:.2f}  of these to the first player {first:.2f}", flush=True)
    holds = paid >= 0.9
    print("pass" if holds else "FAIL")
    return 0 if holds else 1


def outcome(both: tuple[Episodes, ...], coins: int) -> tuple[float, float]:
    """(share of all coins that was paid, share of those that went to the first player), from the claims."""
    claims = np.asarray([state.latest for state in both[0].states], float)  # None (no claim) is nan
    met = np.nan_to_num(claims) * (claims.sum(1, keepdims=True) <= coins)
    return float(met.sum(1).mean() / coins), float(met[:, 0].sum() / max(met.sum(), 1.0))


if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
