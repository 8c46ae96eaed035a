"""GRPO on grade-school mathematics, with a public figure to be held against.

Paper     Shao et al. 2024, arXiv:2402.03300; Cobbe et al. 2021, arXiv:2110.14168 (the data). Anchor:
          AI-Hypercomputer/maxtext, pull request 4015
Model     Qwen/Qwen3-1.7B
Data      hf:openai/gsm8k:main
Hardware  v6e:8x8 for the anchor, and planned for that
Run       rljax run experiments/cards/grpo_gsm8k_qwen3_1p7b.py
Expected  mean reward 0.8077 ± 0.005 after 100 steps, over several seeds, with MaxText on a v6e:8x8; NeMo-RL's band on
          GPUs is 0.8042 to 0.8199 (the pull request). Compare eval/rewards/numeric_match/mean.
Settings  100 steps (the pull request, which does not state its recipe). The rest as MaxText's GSM8K recipe for Qwen3-4B
          has it (rl_gsm8k_qwen3_4b_v6e8.yml): KL coefficient 0.08, clip 0.2, AdamW 3e-6 with β₂ = 0.99 and weight decay
          0.1, warm-up over a tenth, gradients clipped at 0.1, T = 0.9, top-k 50, 1,024 tokens. Ours: 64 prompts with 8
          answers each, 1 for the right number and 0 otherwise, and /no_think, since thoughts would not fit.
Differs   the anchor's reward functions are its own; that they come to the share of right answers is [unverified].
Shape     batch 64 × 8, 256 + 1024 tokens, microbatches 1, remat dots, float32
Plan      rljax plan experiments/cards/grpo_gsm8k_qwen3_1p7b.py --topology v6e:8x8
              Qwen/Qwen3-1.7B: 1.72 billion parameters on v6e:8x8, 64 devices (TPU v6e), mesh data=1 fsdp=64 tensor=1
                context=1, microbatches=1
              sampler (the longest case: every row is written to its last token): fits, 24.99 GiB of 31.25 GiB free
                (80%)
              at best 3 s, bound by HBM (compute 34.1 ms, HBM 3 s, ICI 16.9 ms)
              notes (reference, values): fits, 29.62 GiB of 31.25 GiB free (95%)
              at best 150 ms, bound by HBM (compute 33.7 ms, HBM 150 ms, ICI 20.4 ms)
              update: fits, 16.94 GiB of 31.25 GiB free (54%)
              at best 446 ms, bound by HBM (compute 110 ms, HBM 446 ms, ICI 369 ms)
"""

import functools

import jax
import optax

from rljax import data, policy, presets, rewards, train

ASK = "{question} Think step by step, and end with the answer as a number after ####. /no_think"


def questions(start: policy.Policy, key: jax.Array, *, source: str = "hf:openai/gsm8k:main", split: str = "train"):
    """{"prompt", "answer"}: questions as messages, with their whole solutions."""
    del start, key
    return [
        {"prompt": [{"role": "user", "content": ASK.format(question=row["question"])}], "answer": row["answer"]}
        for row in data.read(source, split=split)
    ]


experiment = presets.grpo(
    model="Qwen/Qwen3-1.7B",
    data=questions,
    reward=rewards.numeric_match,
    kl_loss=0.08,
    optimizer=functools.partial(optax.adamw, b2=0.99, weight_decay=0.1),
    learning_rate=3e-6,
    schedule=functools.partial(train.cosine, warmup=10),
    clip_norm=0.1,
    temperature=0.9,
    top_k=50,
    batch=64,
    group=8,
    steps=100,
    max_prompt=256,
    max_completion=1024,
    eval_rows=256,
    eval_every=20,
    save_every=20,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
