"""tunix's side of `compare.py`: its own trainers on its own Llama 3 of the same shape, of random weights.

Float32 on CPU. On an accelerator bfloat16 as tunix does it: weights, gradients and optimizer moments, where ours and
TRL's keep weights and moments in float32. Remat is off. Run by `compare.py --tunix-python PYTHON`, where PYTHON has
google-tunix (0.1.7); it speaks the protocol of `machine.serve`. Written for accelerators too, but so far run on CPUs
only.

What is compared:

    dpo             one step of DPOTrainer.train on tokenised pairs: chosen and rejected in one forward pass, the
                    reference model in every step, metrics, clipped AdamW
    generate        `Sampler.__call__` with log-probabilities, from strings to strings: its tokenizer splits numbers at
                    spaces, which costs nothing
    ppo-update      the update inside PPOLearner.train: both trainers, policy and critic, one after the other. Rewards,
                    log-probabilities, values and GAE before it are not in it; ours includes rewards and GAE.
    ppo-iteration   one global step of PPOLearner.train: generation, reference, old log-probabilities (which tunix
                    always computes again), values, a reward function of no cost, GAE, one epoch of one minibatch
    grpo-iteration  one global step of GRPOLearner.train: groups of completions, reference (beta 0.04), a reward
                    function of no cost, one update

A step ends when the weights that it makes are there. No completion ends early: the end token has a number that the
model does not know. tunix reads a group's prompt once for every completion, and unembeds all positions.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
import optax
from flax import nnx
from machine import Turns, now
from shapes import FIGURES, NEW, PROMPT, SHAPES, Sizes, sizes_of
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl import rl_cluster, utils
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

STEPS = 100_000


def facts() -> dict[str, Any]:
    return {"versions": machine.versions("google-tunix", "jax", "jaxlib", "flax"), "dtype": machine.jax_dtype()}


def turns() -> Turns:
    peak = machine.jax_matmul_peak(machine.jax_dtype())
    return Turns(facts, peak=peak, bandwidth=machine.bandwidth())


def llama(name: str, kind: type[Llama3] = Llama3, **more: Any) -> Llama3:
    """tunix's own initial weights are partly zeros; these are all random, in the dtype that it trains in."""
    s = SHAPES[name]
    settings = {
        "num_layers": s["num_layers"],
        "vocab_size": s["vocab_size"],
        "embed_dim": s["hidden_size"],
        "hidden_dim": s["intermediate_size"],
        "num_heads": s["num_heads"],
        "num_kv_heads": s["num_kv_heads"],
        "head_dim": s["head_dim"],
        "weight_tying": s["tied"],
    }
    model = kind(ModelConfig(**settings | more, rope_theta=10_000, norm_eps=1e-6), rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(model))
    keys, dtype = jax.random.split(jax.random.key(0), len(leaves)), jnp.dtype(machine.jax_dtype())
    drawn = [0.02 * jax.random.normal(key, x.shape, dtype) for key, x in zip(keys, leaves, strict=True)]
    same = [new if x.ndim > 1 else x.astype(dtype) for x, new in zip(leaves, drawn, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, same))
    return model


class Critic(Llama3):
    """Without the `segment_ids` that 0.1.7 hands to a critic and its Llama 3 does not take: here all of them are 1."""

    def __call__(self, *args: Any, segment_ids: Any = None, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Numbers:
    """The tokenizer: a text is the numbers of its tokens. End and padding are numbers that the model cannot write."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # tunix then adds none

    def pad_id(self) -> int:
        return self.vocab

    def eos_id(self) -> int:
        return self.vocab + 1


def random_ids(rows: int, columns: int, vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, vocab, (rows, columns), dtype=np.int32)


def prompts(rows: int, vocab: int) -> np.ndarray:
    return np.array([" ".join(map(str, row)) for row in random_ids(rows, PROMPT, vocab)])


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))


def taking_turns(batch: Any, turn: Turns, finish: Callable[[], Any], moments: list | None = None) -> Iterator[Any]:
    """The data of a trainer, which asks for a batch when the step before it is dispatched. moments: where others than
    the step's own beginning and end are to count.
    """
    while True:
        turn.begin()
        yield dict(batch) if isinstance(batch, dict) else batch
        jax.block_until_ready(finish())
        turn.end(*(moments or (turn.start, now())))


def dpo(shape: str, sizes: Sizes) -> None:
    policy, n = llama(shape), sizes.pairs
    ids = random_ids(n, PROMPT + 2 * NEW, SHAPES[shape]["vocab_size"])
    prompt, chosen, rejected = np.split(ids, [PROMPT, PROMPT + NEW], axis=1)
    masks = {"prompt_mask": np.ones_like(prompt), "chosen_mask": np.ones_like(chosen)}
    batch = TrainingInput(
        prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected, rejected_mask=masks["chosen_mask"], **masks
    )
    settings = DPOTrainingConfig(eval_every_n_steps=STEPS, max_steps=STEPS, pbar_description=None, beta=0.1)
    trainer = DPOTrainer(policy, llama(shape), optimizer(), settings)
    trainer.train(taking_turns(batch, turns(), lambda: nnx.state(policy)))


def generate(shape: str, sizes: Sizes) -> None:
    model, vocab = llama(shape), SHAPES[shape]["vocab_size"]
    c = model.config
    sampler = Sampler(model, Numbers(vocab), CacheConfig(PROMPT + NEW, c.num_layers, c.num_kv_heads, c.head_dim))
    texts, turn, count = list(prompts(sizes.sampled, vocab)), turns(), 0
    how = {"max_generation_steps": NEW, "max_prompt_length": PROMPT, "temperature": 1.0, "top_p": 1.0}
    while True:
        turn.begin()
        count += 1
        out = sampler(texts, **how, return_logprobs=True, seed=count)
        turn.end(turn.start, now())
        assert all(len(row) == NEW for row in out.tokens)


def cluster(shape: str, critic: Llama3 | None, rows: int) -> rl_cluster.RLCluster:
    """Everything on one device, with tunix's own sampler."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer(),
        critic_optimizer=optimizer() if critic else None,
        eval_every_n_steps=STEPS,
        max_steps=STEPS,
        mini_batch_size=rows,
        train_micro_batch_size=rows,
        pbar_description=None,
    )
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens_to_generate": NEW, "max_prompt_length": PROMPT}
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
        training_config=training,
        rollout_config=RolloutConfig(**sampling, kv_cache_size=PROMPT + NEW),
    )
    models = {"actor": llama(shape), "reference": llama(shape), "critic": critic}
    return rl_cluster.RLCluster(**models, tokenizer=Numbers(SHAPES[shape]["vocab_size"]), cluster_config=config)


def even(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    """The share of even tokens."""
    rows = [text.split() for text in completions]
    assert [len(row) for row in rows] == [NEW] * len(prompts)
    return [sum(int(token) % 2 == 0 for token in row) / NEW for row in rows]


def ppo(shape: str, sizes: Sizes, update_only: bool) -> None:
    whole = llama(
        shape, Critic, weight_tying=False
    )  # `create_critic_model` puts the value head in the place of `lm_head`
    critic = utils.create_critic_model(whole)
    critic.lm_head.kernel[...] = critic.lm_head.kernel[...].astype(machine.jax_dtype())
    del whole
    group, moments = cluster(shape, critic, sizes.ppo), [(0.0, 0.0)] * 2
    update_actor, update_critic = group.update_actor, group.update_critic

    def noted_actor(*args: Any) -> None:
        moments[0] = now()
        update_actor(*args)

    def noted_critic(*args: Any) -> None:
        update_critic(*args)
        jax.block_until_ready(finish())
        moments[1] = now()

    def finish() -> Any:
        return nnx.state(group.actor_trainer.model), nnx.state(group.critic_trainer.model)

    group.update_actor, group.update_critic = noted_actor, noted_critic
    batch = {"prompts": prompts(sizes.ppo, SHAPES[shape]["vocab_size"])}
    learner = PPOLearner(group, PPOConfig(num_iterations=1), reward_fns=even)
    learner.train(taking_turns(batch, turns(), finish, moments if update_only else None))


def grpo(shape: str, sizes: Sizes) -> None:
    group = cluster(shape, None, sizes.prompts)
    batch = {"prompts": prompts(sizes.prompts, SHAPES[shape]["vocab_size"])}
    learner = GRPOLearner(group, GRPOConfig(num_generations=sizes.group, beta=0.04), reward_fns=even)
    learner.train(taking_turns(batch, turns(), lambda: nnx.state(group.actor_trainer.model)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--figure", choices=FIGURES, required=True)
    parser.add_argument("--scale", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    case = options.shape, sizes_of(options.shape, options.scale)
    if options.figure.startswith("ppo"):
        ppo(*case, update_only=options.figure == "ppo-update")
    else:
        {"dpo": dpo, "generate": generate, "grpo-iteration": grpo}[options.figure](*case)


if __name__ == "__main__":
    main()
