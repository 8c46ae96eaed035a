"""TRL's generation, PPO and GRPO, for comparison: its own trainers on Llamas of the same shape of random weights,
float32 on CPU, gradient checkpointing and mixed precision off. Run by `online.py --against trl --trl-python PYTHON`,
where PYTHON has torch and trl 1.12 (the last with PPO); it speaks the protocol of `machine.serve`.

What is compared:

    generate        `model.generate` as GRPOTrainer calls it, which returns tokens only. (PPOTrainer's generation also
                    keeps all logits; ours returns the sampled tokens' log-probabilities.)
    ppo-update      the update inside PPOTrainer.train, from its first forward pass of policy and critic until the
                    optimizer has stepped: the leanest cut, without GAE before it and the entropies, statistics and
                    logging after it, which ours includes. PPOTrainer does not clip gradients; ours does.
    ppo-iteration   from the end of one step of PPOTrainer.train to the end of the next: generation, reference, values,
                    a reward model that is a stub of no cost, GAE, one epoch of one minibatch, metrics
    grpo-iteration  one step of GRPOTrainer.train: groups of completions, reference (beta 0.04), a reward function of
                    no cost, one update with clipping

No completion ends early: the end token has a number that the model does not know.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import machine
import torch
from datasets import Dataset
from offline import SHAPES
from online import FIGURES, NEW, PROMPT, SIZES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

WARM_UP, STEPS = 2, 1000
COMMON: dict[str, Any] = {
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 10**6,
    "learning_rate": 1e-6,
    "temperature": 1.0,
}


class Turns:
    """The worker's side of `machine.serve` inside a trainer's own loop: lets it take a step when asked to."""

    def __init__(self):
        self.measures = {"peak": machine.torch_matmul_peak(), "bandwidth": machine.bandwidth()}
        self.steps = 0
        self.start = (0.0, 0.0)

    def begin(self) -> None:
        if self.steps == WARM_UP:
            names = ("torch", "transformers", "trl")
            say({"versions": machine.versions(*names), "peak_rss_bytes": machine.peak_rss()})
        if self.steps >= WARM_UP and not sys.stdin.readline():
            sys.exit()
        self.start = now()

    def end(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        self.steps += 1
        if self.steps > WARM_UP:
            found = {"seconds": stop[0] - start[0], "cpu_seconds": stop[1] - start[1]}
            say(found | {name: measure() for name, measure in self.measures.items()})


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def say(found: dict) -> None:
    print("\n" + json.dumps(found), flush=True)


def config(shape: str, **more: Any) -> LlamaConfig:
    named = {k.replace("num_layers", "num_hidden_layers"): v for k, v in SHAPES[shape].items()}
    named["num_attention_heads"] = named.pop("num_heads")
    named["num_key_value_heads"] = named.pop("num_kv_heads")
    return LlamaConfig(
        **named, tie_word_embeddings=True, max_position_embeddings=2048, eos_token_id=None, bos_token_id=None, **more
    )


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per word, w0, w1, …; the end token, also used as padding, is one that the model cannot write."""
    words = {**{f"w{i}": i for i in range(vocab)}, "<eos>": vocab}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", padding_side="left")


def prompts(rows: int, vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, PROMPT), generator=torch.Generator().manual_seed(0))


def generate(shape: str) -> None:
    model = LlamaForCausalLM(config(shape))
    ids = prompts(SIZES[shape].sampled, model.config.vocab_size)
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, disable_compile=True
    )
    turns = Turns()
    for _ in range(WARM_UP + STEPS):
        turns.begin()
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        turns.end(turns.start, now())
        assert out.shape == (len(ids), PROMPT + NEW)


class Free(torch.nn.Module):
    """A reward model of no cost: PPOTrainer calls its backbone, then its `score`."""

    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.model = lambda input_ids, **_: SimpleNamespace(hidden_states=[input_ids[..., None]])

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden % 2 == 0).float()


def ppo(shape: str, update_only: bool) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    rows, llama = SIZES[shape].ppo, config(shape)
    turns, moments = Turns(), {}

    class Iterations(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.begin()

        def on_step_end(self, args, state, control, **kwargs):
            turns.end(moments.pop("first pass"), moments["stepped"]) if update_only else turns.end(turns.start, now())
            moments.clear()
            turns.begin()

    forward = ppo_trainer.forward

    def noted_forward(model: Any, *args: Any) -> Any:
        if isinstance(model, ppo_trainer.PolicyAndValueWrapper):
            moments.setdefault("first pass", now())
        return forward(model, *args)

    ppo_trainer.forward = noted_forward
    words = tokenizer(llama.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=rows,
            total_episodes=rows * (WARM_UP + STEPS),
            num_mini_batches=1,
            num_ppo_epochs=1,
            num_sample_generations=0,
            response_length=NEW,
            **COMMON,
        )
        trainer = PPOTrainer(
            args=settings,
            processing_class=words,
            model=LlamaForCausalLM(llama),
            ref_model=LlamaForCausalLM(llama),
            reward_model=Free(),
            value_model=LlamaForSequenceClassification(config(shape, num_labels=1)),
            train_dataset=Dataset.from_dict({"input_ids": prompts(4 * rows, llama.vocab_size).tolist()}),
            callbacks=[Iterations()],
        )
        zero = trainer.optimizer.zero_grad

        def noted_zero(*args: Any, **kwargs: Any) -> None:
            zero(*args, **kwargs)
            moments["stepped"] = now()

        trainer.optimizer.zero_grad = noted_zero
        trainer.train()


def grpo(shape: str) -> None:
    sizes, llama, turns = SIZES[shape], config(shape), Turns()

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.begin()

        def on_step_end(self, args, state, control, **kwargs):
            turns.end(turns.start, now())

    def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in row) / len(row) for row in completion_ids]

    texts = [" ".join(f"w{i}" for i in row) for row in prompts(4 * sizes.prompts, llama.vocab_size).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        start = pathlib.Path(folder) / "start"  # GRPOTrainer reads its reference from there again
        LlamaForCausalLM(llama).save_pretrained(start)
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=sizes.prompts * sizes.group,
            num_generations=sizes.group,
            steps_per_generation=1,
            max_completion_length=NEW,
            max_steps=WARM_UP + STEPS,
            beta=0.04,
            loss_type="grpo",
            model_init_kwargs={"dtype": "float32"},
            **COMMON,
        )
        GRPOTrainer(
            model=str(start),
            reward_funcs=even,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer(llama.vocab_size),
            callbacks=[Steps()],
        ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--figure", choices=FIGURES, required=True)
    options = parser.parse_args()
    if options.figure == "generate":
        generate(options.shape)
    elif options.figure == "grpo-iteration":
        grpo(options.shape)
    else:
        ppo(options.shape, update_only=options.figure == "ppo-update")


if __name__ == "__main__":
    main()
