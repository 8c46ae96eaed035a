"""TRL's side of `compare.py`: its own trainers on Llamas of the same shape of random weights.

Float32 on CPU; on a GPU bfloat16 as TRL does it: weights and optimizer in float32 under autocast, and for `generate` a
model in bfloat16. Gradient checkpointing is off. Run by `compare.py --trl-python PYTHON`, where PYTHON has torch, trl
1.12 (the last with PPO) and requests, which TRL imports and does not ask for; it speaks the protocol of
`machine.serve`. Written for a GPU too, but so far run on CPUs only.

What is compared:

    dpo             one step of DPOTrainer.train: collator, chosen and rejected in one forward pass, the reference model
                    in every step, metrics, clipped AdamW
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
import pathlib
import tempfile
from types import SimpleNamespace
from typing import Any

import machine
import torch
from datasets import Dataset
from machine import Turns, now
from shapes import FIGURES, NEW, PROMPT, SHAPES, Sizes, sizes_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

STEPS = 100_000
GPU = torch.cuda.is_available()
COMMON: dict[str, Any] = {
    "gradient_checkpointing": False,
    "bf16": GPU,
    "use_cpu": not GPU,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 10**6,
    "learning_rate": 1e-6,
}


def facts() -> dict[str, Any]:
    names = ("torch", "transformers", "trl")
    return {"versions": machine.versions(*names), "dtype": "bfloat16" if GPU else "float32"}


def turns() -> Turns:
    return Turns(facts, peak=machine.torch_matmul_peak(), bandwidth=machine.bandwidth())


class Steps(TrainerCallback):
    """Each step of a trainer is a turn."""

    def __init__(self):
        self.turns = turns()

    def on_step_begin(self, args, state, control, **kwargs):
        self.turns.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.turns.end(self.turns.start, now())


def config(shape: str, **more: Any) -> LlamaConfig:
    named = {k.replace("num_layers", "num_hidden_layers"): v for k, v in SHAPES[shape].items()}
    named["num_attention_heads"] = named.pop("num_heads")
    named["num_key_value_heads"] = named.pop("num_kv_heads")
    named["tie_word_embeddings"] = named.pop("tied")
    return LlamaConfig(**named, max_position_embeddings=2048, eos_token_id=None, bos_token_id=None, **more)


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per word, w0, w1, …; the end token, also used as padding, is one that the model cannot write."""
    words = {**{f"w{i}": i for i in range(vocab)}, "<eos>": vocab}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", padding_side="left")


def prompts(rows: int, vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, PROMPT), generator=torch.Generator().manual_seed(0))


def dpo(shape: str, sizes: Sizes) -> None:
    """Pairs of exactly PROMPT and NEW tokens: TRL ends a response with <eos>, here an ordinary token."""
    llama = config(shape)
    ids = torch.randint(0, llama.vocab_size - 1, (4 * sizes.pairs, PROMPT + 2 * NEW)).tolist()
    rows = [[f" w{i}" for i in row] for row in ids]
    parts = {"prompt": slice(0, PROMPT), "chosen": slice(PROMPT, PROMPT + NEW - 1), "rejected": slice(1 - NEW, None)}
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=sizes.pairs,
            max_steps=STEPS,
            max_length=PROMPT + NEW,
            **COMMON,
        )
        DPOTrainer(
            model=LlamaForCausalLM(llama),
            ref_model=LlamaForCausalLM(llama),
            args=settings,
            train_dataset=Dataset.from_dict({k: ["".join(row[part]) for row in rows] for k, part in parts.items()}),
            processing_class=tokenizer(llama.vocab_size - 1),
            callbacks=[Steps()],
        ).train()


def generate(shape: str, sizes: Sizes) -> None:
    model = LlamaForCausalLM(config(shape))
    model = model.to("cuda", torch.bfloat16) if GPU else model
    ids = prompts(sizes.sampled, model.config.vocab_size).to(model.device)
    settings = GenerationConfig(
        max_new_tokens=NEW, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, disable_compile=True
    )
    turn = turns()
    while True:
        turn.begin()
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        turn.end(turn.start, now())
        assert out.shape == (len(ids), PROMPT + NEW)


class Free(torch.nn.Module):
    """A reward model of no cost: PPOTrainer calls its backbone, then its `score`."""

    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.model = lambda input_ids, **_: SimpleNamespace(hidden_states=[input_ids[..., None]])

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden % 2 == 0).float()


def ppo(shape: str, sizes: Sizes, update_only: bool) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    rows, llama = sizes.ppo, config(shape)
    turn, moments = turns(), {}

    class Iterations(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turn.begin()

        def on_step_end(self, args, state, control, **kwargs):
            turn.end(moments.pop("first pass"), moments["stepped"]) if update_only else turn.end(turn.start, now())
            moments.clear()
            turn.begin()

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
            total_episodes=rows * STEPS,
            num_mini_batches=1,
            num_ppo_epochs=1,
            num_sample_generations=0,
            response_length=NEW,
            temperature=1.0,
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


def grpo(shape: str, sizes: Sizes) -> None:
    llama = config(shape)

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
            max_steps=STEPS,
            beta=0.04,
            loss_type="grpo",
            temperature=1.0,
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
    parser.add_argument("--scale", type=int, default=1)
    options = parser.parse_args()
    case = options.shape, sizes_of(options.shape, options.scale)
    torch.manual_seed(0)
    if options.figure.startswith("ppo"):
        ppo(*case, update_only=options.figure == "ppo-update")
    else:
        {"dpo": dpo, "generate": generate, "grpo-iteration": grpo}[options.figure](*case)


if __name__ == "__main__":
    main()
