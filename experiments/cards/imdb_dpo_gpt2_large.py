"""Controlled sentiment: DPO on pairs that SiEBERT has ranked, for the frontier of reward and KL.

Paper     Rafailov et al. 2023, arXiv:2305.18290, section 6.1, figure 2 (left) and appendix C.1
Model     openai-community/gpt2-large after imdb_sft_gpt2_large.py
Data      hf:stanfordnlp/imdb
Hardware  planned for a v5e:2x4
Run       rljax run experiments/cards/imdb_dpo_gpt2_large.py --loss.beta 0.1 --name imdb_dpo_beta_0.1
Expected  a reward of about 0.9 at a KL of 2.5 nats and near 1.0 from 5 nats on (read off figure 2); log
          eval/reward/mean and eval/kl of runs with β = 0.05, 0.1, 1 and 5
Settings  β ∈ {0.05, 0.1, 1, 5} (figure 2), RMSprop, 1e-6 after 150 steps of warm-up, 64 pairs (appendix B), gradients
          clipped at 10 (config/config.yaml of the code); prefixes of 2 to 8 tokens, 4 continuations of each of 25,000,
          all 6 pairs of them ranked by SiEBERT (appendix C.1). One epoch. 64 new tokens are ours.
Shape     batch 64, 16 + 65 tokens, microbatches 1, remat dots, float32
Plan      rljax plan experiments/cards/imdb_dpo_gpt2_large.py --topology v5e:2x4 --model openai-community/gpt2-large
              openai-community/gpt2-large: 0.77 billion parameters on v5e:2x4, 8 devices (TPU v5e), mesh data=1 fsdp=8
                tensor=1 context=1, microbatches=1
              update: fits, 11.91 GiB of 15.75 GiB free (76%)
              at best 51.3 ms, bound by ICI (compute 27.5 ms, HBM 19 ms, ICI 51.3 ms)
"""

import functools

import _imdb
import optax

from rljax import losses, offline, train

experiment = offline.Preference(
    model="runs/imdb_sft_gpt2_large/export",
    data=_imdb.sampled_pairs,
    loss=functools.partial(losses.dpo_loss, beta=0.1),
    evaluate=_imdb.reward_and_kl,
    optimizer=functools.partial(optax.rmsprop, decay=0.99, eps_in_sqrt=False),  # as in torch
    learning_rate=1e-6,
    schedule=functools.partial(train.constant, warmup=150),
    clip_norm=10.0,
    batch=64,
    steps=2343,
    max_prompt=16,
    max_completion=_imdb.COMPLETION + 1,
    eval_rows=256,
    eval_every=100,
    save_every=100,
    samples=8,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
