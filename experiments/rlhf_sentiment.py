"""Reinforcement learning from (simulated) human feedback in one command: the three steps of InstructGPT (Ouyang et al.
2022, arXiv:2203.02155, figure 2) on sentences about movies.

    rljax run experiments/rlhf_sentiment.py --data sentences.jsonl

Needs `pip install -e ".[gguf,metrics]"`; the model is fetched once (93 MB). The sentences of the figures below are the
10,662 of Pang and Lee (2005). 50 minutes on two CPU cores, half of them PPO's. Expected: a reward model well above
chance, and a policy that it likes better at a KL of a few nats, with the gold reward, VADER's sentiment, following.
Measured on about 640 held-out pairs and 128 held-out prompts (standard error of a mean about 0.04), by iterations of
PPO:

                 gold reward of the policy      score by the reward model      KL(policy ‖ SFT model), nats
    iteration    0      15     30     45        0       15     30     45       0      15     30     45
    --seed 0     0.20   0.33   0.43   0.67      −0.13   0.31   0.84   1.40     0.0    0.8    3.8    6.4
    --seed 1     0.12   0.19   0.36   0.73      0.02    0.11   0.68   1.67     0.0    0.3    1.7    7.4
    --seed 2     0.22   0.38   0.67   0.89      0.07    0.60   1.49   2.36     0.0    0.7    4.3    16.5

The KL's coefficient is fixed at the paper's 0.02, so that nothing holds it at a few nats: with seed 2 it went on to
16.5, and the policy praises whatever it is asked about. Accuracy of the reward model, by pairs that it has seen:

    pairs        0      400    800    1,200  1,600
    --seed 0     0.51   0.62   0.65   0.63   0.66
    --seed 1     0.52   0.62   0.63   0.70   0.71
    --seed 2     0.49   0.63   0.71   0.73   0.70

The run with seed 0 had 256 openings held out, these 128 among them, where the file now holds out 128: its prompts to
train on were others than those of a fresh run. With 128 openings, 60 and 24 steps, and the moving average of the
weights that the preset has, evaluated, the gold reward did not move with any of three seeds.
"""

import functools
import itertools
import pathlib
import random
from typing import Any

import jax
from matplotlib.figure import Figure

from rljax import artefacts, data, manifest, offline, online, policy, presets, program, report, rewards, tracking

GOLD = functools.partial(rewards.vader_sentiment, judged="prompt+completion")  # stands in for the human
PROMPT, COMPLETION, SAMPLES = 16, 24, 4  # tokens, tokens, completions that the human compares
SHORT = range(8, 17)  # words of a sentence
NEEDS = """--data names the sentences: a .jsonl or .parquet file, or tfds:NAME (tfds:glue/sst2), with rows
{"text": "a sentence about a movie", "label": 0 or 1}, such as the 10,662 of Pang and Lee (2005)"""


def sentence(row: data.Row) -> tuple[str, int]:
    """(text, label: 1 for a positive one) of a row."""
    text, label = row.get("text", row.get("sentence")), row.get("label")
    if not isinstance(text, str) or label not in (0, 1):
        raise ValueError(f"this row has the fields {', '.join(row)}. {NEEDS}")
    return text.strip(), int(label)


def write_data(source: str, folder: pathlib.Path, *, openings: int, seed: int) -> None:
    """The sentences that SFT learns from, and of others, which it does not see, the first four words as prompts."""
    try:
        rows = data.read(source)
    except ValueError as error:
        raise ValueError(f"{error}. {NEEDS}") from None
    found = [rows.apply(sentence, i) for i in range(len(rows))]
    short = [(text, label) for text, label in found if len(text.split()) in SHORT]
    random.Random(seed).shuffle(short)
    start = openings // 4
    held, asked, texts = short[:start], short[start : start + openings], short[start + openings :]
    if {label for _, label in texts} != {0, 1}:
        raise ValueError(
            f"{source}: of its {len(rows)} rows {len(short)} have {SHORT[0]} to {SHORT[-1]} words; {len(held + asked)} "
            f"become prompts, and the other {len(texts)} are not both positive and negative ones. {NEEDS}"
        )
    data.write_jsonl(folder / "sentences.jsonl", [{"text": text} for text, _ in texts])
    for name, some in (("prompts", asked), ("held_out", held)):
        data.write_jsonl(folder / f"{name}.jsonl", [{"prompt": " ".join(text.split()[:4])} for text, _ in some])


def compare(writer: policy.Policy, prompts: list[str], key: jax.Array) -> list[dict]:
    """Pairs of completions of a prompt, the one that the gold reward prefers chosen; ties are left out."""
    asked = [prompt for prompt in prompts for _ in range(SAMPLES)]
    texts = policy.complete(writer, asked, key, max_new_tokens=COMPLETION, max_prompt=PROMPT, batch=64).texts
    judged, rows = list(zip(asked, texts, GOLD(asked, texts), strict=True)), []
    for start in range(0, len(judged), SAMPLES):
        group = sorted(judged[start : start + SAMPLES], key=lambda one: one[2])
        for (prompt, worse, low), (_, better, high) in itertools.combinations(group, 2):
            if low < high and worse and better:
                rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return rows


def write_pairs(model: str, folder: pathlib.Path, seed: int) -> None:
    """Preferences between completions by `model`: of the prompts, and of those held out (written last)."""
    if (folder / "held_out_pairs.jsonl").is_file():
        return
    writer = policy.load(model, dtype="float32")
    for i, (source, target) in enumerate((("prompts", "pairs"), ("held_out", "held_out_pairs"))):
        prompts = [row["prompt"] for row in data.read(folder / f"{source}.jsonl")]
        print(f"comparing {SAMPLES} completions of each of {len(prompts)} prompts", flush=True)
        data.write_jsonl(folder / f"{target}.jsonl", compare(writer, prompts, jax.random.key(seed + i)))


def finish(experiment: program.Run, export: pathlib.Path) -> int:
    """Run a step of the pipeline, or go on with it, and export its weights; nothing where that was done before."""
    folder = program.run_folder(experiment, None)
    if (export / "config.json").is_file():
        print(f"{folder}: finished", flush=True)
        return 0
    print(f"\n--- {folder}", flush=True)
    status = online.run(experiment) if isinstance(experiment, online.Sampled) else offline.run(experiment)
    if status == 0:
        artefacts.export(folder, export)
    return status


def write_report(folder: pathlib.Path) -> pathlib.Path:
    """report.md of the three steps, with a figure."""
    rm, ppo = (tracking.read_rows(folder / name / "metrics.jsonl") for name in ("2-reward-model", "3-ppo"))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, rows, names in (
        (panels[0], rm, ["eval/accuracy"]),
        (panels[1], ppo, [f"{held}rewards/{name}/mean" for name in ("proxy", "gold") for held in ("", "eval/")]),
        (panels[2], ppo, ["objective/kl"]),
    ):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            style = "o--" if name.startswith("eval/") else "-"
            panel.plot(*zip(*points, strict=True), style, label=name, color="C1" if "gold" in name else "C0")
        panel.set(xlabel="step of PPO" if rows is ppo else "step of the reward model")
        panel.legend(fontsize=8)

    def last(rows: list[dict], name: str, which: int = -1) -> str:
        found = [row[name] for row in rows if row.get(name) is not None]
        return f"{found[which]:.3f}"

    gold, proxy = "eval/rewards/gold/mean", "eval/rewards/proxy/mean"
    results = report.table(
        ["", "before", "after"],
        [
            ["accuracy of the reward model, held-out pairs", *(last(rm, "eval/accuracy", i) for i in (0, -1))],
            ["reward model's score of the policy, held-out prompts", *(last(ppo, proxy, i) for i in (0, -1))],
            ["gold reward of the policy, held-out prompts", *(last(ppo, gold, i) for i in (0, -1))],
            ["KL(policy ‖ SFT model), nats", *(last(ppo, "objective/kl", i) for i in (0, -1))],
        ],
    )
    samples = tracking.read_rows(folder / "3-ppo" / "samples.jsonl")
    phases = [{row["prompt"]: row for row in samples if row["phase"] == phase} for phase in ("before", "after")]
    written = [[prompt, *(phase[prompt]["completion"] for phase in phases)] for prompt in phases[0]]
    golds = [[GOLD([prompt], [text])[0] for text in texts] for prompt, *texts in written]
    shown = [[*map(report.escape, row), f"{a:.2f} → {b:.2f}"] for row, (a, b) in zip(written[:12], golds, strict=False)]
    texts = report.table(["prompt", "SFT model", "after PPO", "gold reward"], shown)
    return report.write_report(
        folder, sections=[("Results", results), ("Samples", texts)], figures=[("The pipeline", figure)]
    )


def steps_of(
    folder: pathlib.Path, *, model: str, seed: int, steps_sft: int, steps_rm: int, steps_ppo: int, batch: int
) -> tuple[program.Run, program.Run, program.Run]:
    """The three experiments, which hand on their weights in folder/sft-model and folder/reward-model."""
    texts, sft, rm = (str(folder / name) for name in ("data", "sft-model", "reward-model"))
    shared: dict[str, Any] = {"out": str(folder), "seed": seed, "max_prompt": PROMPT, "max_completion": COMPLETION}
    supervised = offline.SFT(
        model=model,
        data=f"{texts}/sentences.jsonl",
        name="1-sft",
        packing=True,
        steps=steps_sft,
        batch=16,
        learning_rate=1e-4,
        **shared,
    )
    compared = offline.RewardModel(
        model=sft,
        data=f"{texts}/pairs.jsonl",
        eval_data=f"{texts}/held_out_pairs.jsonl",
        name="2-reward-model",
        normalize=64,
        steps=steps_rm,
        batch=8,
        learning_rate=5e-5,
        eval_every=50,
        **shared,
    )
    reinforced = presets.ppo_instructgpt(
        model=sft,
        data=f"{texts}/prompts.jsonl",
        eval_data=f"{texts}/held_out.jsonl",
        name="3-ppo",
        reward=(rewards.from_checkpoint(rm, name="proxy"), rewards.reward(GOLD, weight=0.0, name="gold")),
        critic=rm,
        missing_eos_penalty=1.0,
        ema=None,  # the average of 0.992 an iteration that the paper exports needs hundreds of them to follow
        steps=steps_ppo,
        batch=batch,
        learning_rate=1e-5,
        samples=12,
        eval_every=15,
        save_every=15,
        **shared,
    )
    return supervised, compared, reinforced


def main(
    *,
    data: str = "sentences.jsonl",
    model: str = "smollm2-135m-instruct",
    out: str = "runs/rlhf_sentiment",
    seed: int = 0,
    steps_sft: int = 60,
    steps_rm: int = 200,
    steps_ppo: int = 45,
    openings: int = 512,
    batch: int = 32,
) -> int:
    """Supervised fine-tuning, a reward model, PPO; the same command again goes on where it stopped.

    Args:
        data: rows {"text", "label"}
        model: where everything starts
        out: the folder of all three runs
        openings: prompts, whose completions are compared, and which PPO trains on; a quarter as many are held out
        batch: prompts of a step of PPO
    """
    folder = pathlib.Path(out)
    sizes = {"steps_sft": steps_sft, "steps_rm": steps_rm, "steps_ppo": steps_ppo, "batch": batch}
    options = {"data": data, "model": model, "seed": seed, "openings": openings, **sizes}
    manifest.write_manifest(folder, experiment=options, seed=seed)  # an error where they were others
    write_data(data, folder / "data", openings=openings, seed=seed)
    supervised, compared, reinforced = steps_of(folder, model=model, seed=seed, **sizes)
    status = finish(supervised, folder / "sft-model")
    if status == 0:
        write_pairs(compared.model, folder / "data", seed)
        status = finish(compared, folder / "reward-model") or finish(reinforced, folder / "ppo-model")
    if status == 0:
        print(f"\nreport of the pipeline: {write_report(folder)}")
    return status


if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
