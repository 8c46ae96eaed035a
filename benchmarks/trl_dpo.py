"""TRL's DPO step, for comparison: `DPOTrainer.train` on a Llama of the same shape of random weights, float32 on CPU.

The trainer is as TRL ships it (collator, concatenated forward, reference model in every step, metrics, clipped AdamW),
with gradient checkpointing and mixed precision off. Run by `offline.py --against trl --trl-python PYTHON`, where PYTHON
has torch and trl; it speaks the protocol of `machine.serve`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time

import machine
import torch
from datasets import Dataset
from offline import PROMPT, RESPONSE, SHAPES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

WARM_UP, STEPS = 2, 1000


class Turns(TrainerCallback):
    """Times each step of the trainer, and lets it start one only when asked to (a line on stdin)."""

    def __init__(self):
        self.peak = machine.torch_matmul_peak()
        self.start = (0.0, 0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            names = ("torch", "transformers", "trl")
            say({"versions": machine.versions(*names), "peak_rss_bytes": machine.peak_rss()})
        if state.global_step >= WARM_UP and not sys.stdin.readline():
            control.should_training_stop = True
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > WARM_UP:
            seconds, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
            say({"seconds": seconds, "cpu_seconds": cpu, "peak": self.peak()})


def say(found: dict) -> None:
    print("\n" + json.dumps(found), flush=True)


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per word: w0, w1, …; a text of n words is n tokens."""
    words = {"<eos>": 0, **{f"w{i}": i for i in range(1, vocab)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def pairs(count: int, vocab: int) -> Dataset:
    """Random pairs of exactly PROMPT and RESPONSE tokens (TRL ends a response with <eos>)."""
    ids = torch.randint(1, vocab, (count, 2 * RESPONSE + PROMPT), generator=torch.Generator().manual_seed(0))
    rows = [[f"w{i}" for i in row] for row in ids.tolist()]

    def response(words: list[str]) -> str:
        return " " + " ".join(words[: RESPONSE - 1])

    return Dataset.from_list(
        [
            {"prompt": " ".join(row[:PROMPT]), "chosen": response(row[PROMPT:]), "rejected": response(row[-RESPONSE:])}
            for row in rows
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    options = parser.parse_args()
    shape = {k.replace("num_layers", "num_hidden_layers"): v for k, v in SHAPES[options.shape].items()}
    shape["num_attention_heads"] = shape.pop("num_heads")
    shape["num_key_value_heads"] = shape.pop("num_kv_heads")
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=2048)
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=options.pairs,
            max_steps=WARM_UP + STEPS,
            max_length=PROMPT + RESPONSE,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10**6,
        )
        DPOTrainer(
            model=LlamaForCausalLM(config),
            ref_model=LlamaForCausalLM(config),
            args=settings,
            train_dataset=pairs(4 * options.pairs, config.vocab_size),
            processing_class=tokenizer(config.vocab_size),
            callbacks=[Turns()],
        ).train()


if __name__ == "__main__":
    main()
