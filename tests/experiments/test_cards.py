"""Every reproduction card on a small random model of its family, with rows as its data set has them.

Each reads its rows, and its programs are traced; one pipeline takes two steps of each of its cards here, all do with
RLJAX_ALL_TESTS. Models and data lie where a card looks for them, under the names it has in the card, so that the steps
of a pipeline are run as their docstrings say: in turn, each finding what the one before has left under runs/.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from rljax import cli, data, models, offline, online, plan, policy, program, prompts, rewards, settings, tracking
from rljax.models import hf, hf_read
from rljax.models.tensors import open_safetensors
from rljax.plan import programs
from tests.data.conftest import SMOLLM2, byte_level

CARDS = pathlib.Path(__file__).parents[2] / "experiments" / "cards"
FIXTURES = pathlib.Path(__file__).parents[1] / "models" / "fixtures"
VOCAB, POSITIONS = 512, 256
NEOX, GPT2 = ("gpt_neox", None), ("gpt2", None)
MODELS = {  # name -> (fixture of its family, chat template)
    "EleutherAI/pythia-2.8b": NEOX,
    "EleutherAI/pythia-2.8b-deduped": NEOX,
    "openai-community/gpt2-large": GPT2,
    "siebert/sentiment-roberta-large-english": ("encoder_roberta_classifier", None),
    "Qwen/Qwen3-1.7B": ("qwen3", SMOLLM2),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", SMOLLM2),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", SMOLLM2),
    "mistralai/Mistral-7B-v0.1": ("mistral", None),
}
TINY = ["--steps", "2", "--batch", "8", "--samples", "0", "--mesh.fsdp", "1", "--max_prompt", "64"]
TINY += ["--max_completion", "16", "--eval_rows", "8"]
PIPELINES = {  # the cards that run one after the other
    "hh": ["sft_hh_pythia_2p8b", "dpo_hh_pythia_2p8b"],
    "tldr": ["tldr_sft_pythia", "tldr_reward_model_pythia", "tldr_ppo_pythia", "dpo_tldr_pythia_2p8b"],
    "imdb": ["imdb_sft_gpt2_large", "imdb_dpo_gpt2_large", "imdb_ppo_gpt2_large"],
    "gsm8k": ["grpo_gsm8k_qwen3_1p7b"],
    "qwen": ["dpo_ultrafeedback_qwen2p5", "simpo_ultrafeedback_qwen2p5"],
    "llama": ["dpo_ultrafeedback_llama3_8b", "simpo_ultrafeedback_llama3_8b"],
    "zephyr": ["zephyr_sft", "zephyr_dpo"],
}


# --- models -----------------------------------------------------------------------------------------------------------


def resized(name: str, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A tensor of a fixture with as many rows as there are tokens, positions or labels."""
    rows = {"tokens": VOCAB, "positions": POSITIONS, "labels": 2}
    kinds = {"wpe": "positions", "position_embeddings": "positions", "out_proj": "labels"}
    kinds |= dict.fromkeys(("wte", "embed_in", "embed_out", "embed_tokens", "word_embeddings", "lm_head"), "tokens")
    kind = next((kind for part, kind in kinds.items() if part in name.split(".")), None)
    if kind is None:
        return array
    return rng.normal(0, 0.1, (rows[kind], *array.shape[1:])).astype(array.dtype)


def write_model(folder: pathlib.Path, fixture: str, template: str | None) -> None:
    """A checkpoint of a fixture's family with room for real texts, and a tokenizer."""
    rng = np.random.default_rng(0)
    store = open_safetensors(FIXTURES / fixture)
    tensors = {name: resized(name, hf_read.whole(box), rng) for name, box in store.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((FIXTURES / fixture / "config.json").read_text())
    config |= {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "n_positions": POSITIONS}
    config |= {"sliding_window": None, "use_sliding_window": False}
    if fixture.startswith("encoder"):
        labels = ("NEGATIVE", "POSITIVE")
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = byte_level()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


# --- rows as the data sets have them ----------------------------------------------------------------------------------

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "does", "not", "sleep", "apples", "she"]


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def hh(rng):
    begin = f"\n\nHuman: {words(rng, 6)}?\n\nAssistant:"
    return {"chosen": f"{begin} {words(rng, 5)}", "rejected": f"{begin} {words(rng, 3)}"}


def ultrafeedback(rng):
    prompt = words(rng, 6)
    sides = {
        side: [{"content": prompt, "role": "user"}, {"content": words(rng, 5), "role": "assistant"}]
        for side in ("chosen", "rejected")
    }
    return {
        "prompt": prompt,
        "prompt_id": words(rng, 1),
        **sides,
        "messages": sides["chosen"],
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    }


def generated(rng):
    """princeton-nlp/llama3-ultrafeedback."""
    row = ultrafeedback(rng)
    kept = {name: row[name] for name in ("prompt_id", "prompt", "chosen", "rejected")}
    return {**kept, "all_generated_responses": [words(rng, 4)] * 5, "all_rm_scores": [0.1, 0.2, 0.3, 0.4, 0.5]}


def ultrachat(rng):
    roles = ["user", "assistant"] * 2
    messages = [{"content": words(rng, 4), "role": role} for role in roles]
    return {"prompt": messages[0]["content"], "prompt_id": words(rng, 1), "messages": messages}


def post(rng):
    body = "\n".join(words(rng, 4) for _ in range(3))
    return {"id": "t3_1", "subreddit": "pets", "title": words(rng, 3), "post": body, "summary": words(rng, 4)}


def compared(rng):
    info = {"id": "t3_1", "post": words(rng, 12), "title": words(rng, 3), "subreddit": "pets", "site": None}
    summaries = [{"text": f" {words(rng, n)}", "policy": "sup1", "note": None} for n in (4, 3)]
    return {
        "info": {**info, "article": None},
        "summaries": summaries,
        "choice": int(rng.integers(2)),
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    }


def review(rng):
    return {"text": words(rng, 30), "label": int(rng.integers(2))}


def question(rng):
    a, b = rng.integers(1, 50, 2)
    return {"question": f"How much is {a} + {b}?", "answer": f"It is <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}


DATA = {  # name in the cards -> (row, splits)
    "Anthropic/hh-rlhf": (hh, ["train"]),
    "HuggingFaceH4/ultrafeedback_binarized": (ultrafeedback, ["train_prefs"]),
    "princeton-nlp/llama3-ultrafeedback": (generated, ["train"]),
    "HuggingFaceH4/ultrachat_200k": (ultrachat, ["train_sft"]),
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered": (post, ["train"]),
    "openai/summarize_from_feedback:comparisons": (compared, ["train"]),
    "stanfordnlp/imdb": (review, ["train", "test"]),
    "openai/gsm8k:main": (question, ["train"]),
}


def write_data(name: str) -> pathlib.Path:
    """A data set in the working folder as the hub has it: a Parquet file for each split."""
    make, splits = DATA[name]
    folder = pathlib.Path("data", name.replace(":", "-"))
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for seed, split in enumerate(splits):
            rng = np.random.default_rng(seed)
            table = pyarrow.Table.from_pylist([make(rng) for _ in range(96)])
            pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


# --- traced -----------------------------------------------------------------------------------------------------------

ULTRA, IMDB = "HuggingFaceH4/ultrafeedback_binarized", "stanfordnlp/imdb"
POSTS, COMPARED = "vwxyzjn/summarize_from_feedback_tldr_3_filtered", "openai/summarize_from_feedback:comparisons"
ROWS = {  # the option of each card that names its rows, and their name
    "sft_hh_pythia_2p8b": ("--data.source", "Anthropic/hh-rlhf"),
    "dpo_hh_pythia_2p8b": ("--data", "Anthropic/hh-rlhf"),
    "tldr_sft_pythia": ("--data.source", POSTS),
    "tldr_reward_model_pythia": ("--data.source", COMPARED),
    "tldr_ppo_pythia": ("--data.source", POSTS),
    "dpo_tldr_pythia_2p8b": ("--data.source", COMPARED),
    "imdb_sft_gpt2_large": ("--data", IMDB),
    "imdb_dpo_gpt2_large": ("--data.source", IMDB),
    "imdb_ppo_gpt2_large": ("--data.source", IMDB),
    "grpo_gsm8k_qwen3_1p7b": ("--data.source", "openai/gsm8k:main"),
    "dpo_ultrafeedback_qwen2p5": ("--data", ULTRA),
    "simpo_ultrafeedback_qwen2p5": ("--data", ULTRA),
    "dpo_ultrafeedback_llama3_8b": ("--data", "princeton-nlp/llama3-ultrafeedback"),
    "simpo_ultrafeedback_llama3_8b": ("--data", "princeton-nlp/llama3-ultrafeedback"),
    "zephyr_sft": ("--data", "HuggingFaceH4/ultrachat_200k"),
    "zephyr_dpo": ("--data", ULTRA),
}
LEFT = {  # by the cards before: what the next ones begin with
    "runs/sft_hh_pythia_2p8b/export": "EleutherAI/pythia-2.8b",
    "runs/tldr_sft_pythia/export": "EleutherAI/pythia-2.8b-deduped",
    "runs/imdb_sft_gpt2_large/export": "openai-community/gpt2-large",
    "runs/zephyr_template/model": "mistralai/Mistral-7B-v0.1",
    "runs/zephyr_sft/export": "mistralai/Mistral-7B-v0.1",
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A working folder in which all pipelines have been run up to their last cards."""
    folder = tmp_path_factory.mktemp("left")
    for name, made in MODELS.items():
        write_model(folder / name, *made)
    for path, name in LEFT.items():
        fixture, template = MODELS[name]
        zephyr = cli.import_file(CARDS / "zephyr_template.py").TEMPLATE
        write_model(folder / path, fixture, zephyr if "zephyr" in path else template)
    start = policy.load(str(folder / "runs/tldr_sft_pythia/export"))
    head = models.scalar_head(start.model.config.hidden_size).init(jax.random.key(0))
    judge = folder / "runs/tldr_reward_model_pythia/export"
    judge.parent.mkdir()
    hf.save_reward(judge, start.model, {"model": start.params, "head": head}, tokenizer=start.tokenizer)
    return folder


def typed(name: str, *options: str) -> list[str]:
    """As a user types it, but for sizes and where the data are."""
    warm = ["--schedule.warmup", "0"] if "warmup=" in (CARDS / f"{name}.py").read_text() else []
    return [str(CARDS / f"{name}.py"), *TINY, *options, *warm]


@pytest.fixture
def cards(monkeypatch):
    """Imports a file of the folder, and forgets it afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield lambda name: cli.import_file(CARDS / f"{name}.py")
    for name in {file.stem for file in CARDS.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_card_reads_its_rows_and_its_programs_are_traced(name, left, cards, monkeypatch, tmp_path):
    monkeypatch.chdir(left)
    option, rows = ROWS[name]
    few = ["--data.count", "32"] if name == "imdb_ppo_gpt2_large" else []
    few += ["--data.longest", "64"] if "tldr" in name else []
    run, _ = cli.read_experiment(typed(name, option, str(write_data(rows)), *few), "run")
    is_online = isinstance(run, online.Sampled)
    (settings.check if is_online else offline.check)(run)
    mesh = program.make_mesh(run)
    with jax.set_mesh(mesh), tracking.Tracker(tmp_path / "log", total_steps=2, tensorboard=False) as tracker:
        if name != "imdb_dpo_gpt2_large":  # whose rows the policy writes
            start = program.load_policy(run, mesh)
            read = program.read_rows(run, start, tmp_path / "run", tracker)
            assert len(read[0]) + len(read[1]) == (32 if few[1:] == ["32"] else 96)
            if is_online:
                kept, held_out, _ = prompts.tried(run, start, read)
                assert (len(kept), len(held_out)) == (len(read[0]), len(read[1]))
                rewards.check_fields(rewards.as_rewards(run.reward), prompts.fields(kept))
            else:
                fresh = dataclasses.replace(run, cache_reference=False) if hasattr(run, "cache_reference") else run
                task = offline._task(fresh, start, read, mesh, tracker)
                assert task.tokens(task.batch(0)).mask.any(1).all()
        found = programs.programs(run, mesh, plan.describe(run.model))
        assert [note for note in found.notes if "left out" in note] == []
        for one in found.programs:
            one.function.trace(*one.args)


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A working folder with the models where the cards look for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    for name, (fixture, template) in MODELS.items():
        write_model(tmp_path / name, fixture, template)
    yield tmp_path
    for name in {file.stem for file in CARDS.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def run_card(name: str, *options: str) -> list[dict]:
    """The metrics of two steps of a card."""
    assert cli.main(["run", *typed(name, *options)]) == 0
    records = tracking.read_rows(pathlib.Path("runs", name, "metrics.jsonl"))
    assert [record["step"] for record in records] == [0, 1, 2]
    losses = [value for record in records[1:] for key, value in record.items() if key.split("/")[0] == "loss"]
    assert losses
    assert all(value is not None and math.isfinite(value) for value in losses)
    return records


def export(name: str) -> None:
    """What a card says under Then."""
    assert f"rljax export runs/{name} runs/{name}/export" in (CARDS / f"{name}.py").read_text()
    assert cli.main(["export", f"runs/{name}", f"runs/{name}/export"]) == 0


def begun_with(name: str) -> str:
    return json.loads(pathlib.Path("runs", name, "experiment.json").read_text())["model"]


@pytest.mark.long
def test_hh(world):
    rows = str(write_data("Anthropic/hh-rlhf"))
    run_card("sft_hh_pythia_2p8b", "--data.source", rows)
    made = data.read("runs/sft_hh_pythia_2p8b/data/train.jsonl")[0]
    assert made["prompt"] + made["completion"] == data.read(rows)[0]["chosen"]
    export("sft_hh_pythia_2p8b")
    records = run_card("dpo_hh_pythia_2p8b", "--data", rows)
    assert records[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is its reference
    assert begun_with("dpo_hh_pythia_2p8b") == "runs/sft_hh_pythia_2p8b/export"


@pytest.mark.long
def test_tldr(world):
    posts, pairs = map(str, map(write_data, (name for name in DATA if "summarize" in name)))
    short = ["--data.longest", "64"]
    run_card("tldr_sft_pythia", "--data.source", posts, *short)
    export("tldr_sft_pythia")
    run_card("tldr_reward_model_pythia", "--data.source", pairs, "--normalize", "8", *short)
    export("tldr_reward_model_pythia")
    records = run_card("tldr_ppo_pythia", "--data.source", posts, *short)
    assert records[1]["objective/kl"] == pytest.approx(0, abs=1e-4)  # it starts at the SFT model
    assert records[1]["rewards/preference/mean"] is not None
    run_card("dpo_tldr_pythia_2p8b", "--data.source", pairs, *short)


@pytest.mark.long
def test_imdb(world):
    rows = str(write_data("stanfordnlp/imdb"))
    run_card("imdb_sft_gpt2_large", "--data", rows)
    export("imdb_sft_gpt2_large")
    few = ["--data.source", rows, "--data.count", "16"]
    evaluated = ["--evaluate.source", rows, "--evaluate.count", "16"]
    records = run_card("imdb_dpo_gpt2_large", *few, *evaluated, "--data.max_new_tokens", "16")
    assert records[0]["eval/kl"] == pytest.approx(0, abs=1e-4)
    assert 0 < records[2]["eval/reward/mean"] < 1
    module = cli.import_file(CARDS / "_imdb.py")
    for row in data.read("runs/imdb_dpo_gpt2_large/data/train.jsonl"):
        better, worse = module.SIEBERT.fn([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert better > worse
    records = run_card("imdb_ppo_gpt2_large", *few)
    assert 0 < records[2]["rewards/siebert/mean"] < 1


@pytest.mark.long
def test_gsm8k(world):
    rows = write_data("openai/gsm8k:main")
    records = run_card("grpo_gsm8k_qwen3_1p7b", "--data.source", str(rows), "--group", "2")
    assert records[2]["rewards/numeric_match/mean"] is not None
    assert records[2]["eval/rewards/numeric_match/mean"] is not None


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("dpo_ultrafeedback_qwen2p5", "HuggingFaceH4/ultrafeedback_binarized"),
        ("simpo_ultrafeedback_qwen2p5", "HuggingFaceH4/ultrafeedback_binarized"),
        ("dpo_ultrafeedback_llama3_8b", "princeton-nlp/llama3-ultrafeedback"),
        ("simpo_ultrafeedback_llama3_8b", "princeton-nlp/llama3-ultrafeedback"),
    ],
)
def test_ultrafeedback(name, rows, world):
    assert run_card(name, "--data", str(write_data(rows)))[2]["rewards/accuracies"] is not None


@pytest.mark.long
def test_zephyr(world):
    assert cli.main(["run", str(CARDS / "zephyr_template.py")]) == 0
    assert policy.load("mistralai/Mistral-7B-v0.1").tokenizer.chat_template is None  # the source is as it was
    run_card("zephyr_sft", "--data", str(write_data("HuggingFaceH4/ultrachat_200k")))
    export("zephyr_sft")
    run_card("zephyr_dpo", "--data", str(write_data("HuggingFaceH4/ultrafeedback_binarized")))
    said = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    tokenizer = policy.load("runs/zephyr_sft/export").tokenizer
    end = tokenizer.eos_token
    asked = tokenizer.apply_chat_template(said[:2], tokenize=False, add_generation_prompt=True)
    assert asked == f"<|system|>\nsystem{end}\n<|user|>\nuser{end}\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(said, tokenize=False) == f"{asked}assistant{end}\n"


# --- formats ----------------------------------------------------------------------------------------------------------


def test_a_query_is_written_and_cut_as_openai_does(cards):
    tldr, tokenizer = cards("_tldr"), byte_level()
    row = {"subreddit": "pets", "title": "My dog", "post": "one\ntwo two\nthree three three"}
    whole = "SUBREDDIT: r/pets\n\nTITLE: My dog\n\nPOST: one\ntwo two\nthree three three\n\nTL;DR:"
    assert tldr.query(row, tokenizer) == whole
    length = len(tokenizer(whole)["input_ids"])
    assert tldr.query(row, tokenizer, length) == whole
    assert tldr.query(row, tokenizer, length - 1) == whole.replace("\nthree three three", "")
    line = {**row, "post": "x" * 40}
    cut = tldr.query(line, tokenizer, len(tokenizer(whole.replace("\nthree three three", ""))["input_ids"]))
    assert 0 < cut.count("x") < 40  # without a line end single characters go
    with pytest.raises(ValueError, match="subreddit and title of 'My dog' alone have more than 8 tokens"):
        tldr.query(row, tokenizer, 8)


def test_the_chosen_summary_is_the_one_that_was_preferred(cards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write_data("openai/summarize_from_feedback:comparisons")
    start = policy.Policy(None, {}, byte_level(), ())  # pyright: ignore[reportArgumentType]
    made = cards("_tldr").comparisons(start, jax.random.key(0), source=str(rows))
    for row, raw in zip(made, data.read(rows), strict=True):
        assert row["chosen"] == raw["summaries"][raw["choice"]]["text"]
        assert row["rejected"] == raw["summaries"][1 - raw["choice"]]["text"]
        assert row["prompt"].endswith(f"{raw['info']['post']}\n\nTL;DR:")


def test_prefixes_are_the_beginnings_of_reviews(cards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, tokenizer = write_data("stanfordnlp/imdb"), byte_level()
    texts = [row["text"] for row in data.read(rows)]
    found = cards("_imdb").prefixes(tokenizer, str(rows), "train")
    assert all(text.startswith(prefix) for text, prefix in zip(texts, found, strict=True))
    lengths = {len(tokenizer(prefix)["input_ids"]) for prefix in found}
    assert lengths == set(range(2, 9))
    some = cards("_imdb").prefixes(tokenizer, str(rows), "train", count=10)
    assert len(some) == 10
    assert some == cards("_imdb").prefixes(tokenizer, str(rows), "train", count=10)


# --- the gallery ------------------------------------------------------------------------------------------------------


def test_every_card_is_run_here(cards):
    names = [file.stem for file in cards("_gallery").cards()]
    assert sorted(itertools.chain(*PIPELINES.values())) == sorted(ROWS) == names
    text = pathlib.Path(__file__).read_text().split("# --- running")[1]
    assert not [name for name in itertools.chain(*PIPELINES.values()) if f'"{name}"' not in text]


def test_cards_name_their_real_data_and_models(cards):
    gallery = cards("_gallery")
    for file in gallery.cards():
        title, says = gallery.read(file)
        assert says["Data"].removeprefix("hf:") in DATA, file.name
        assert says["Data"] in file.read_text() or any(
            f'"{says["Data"]}"' in (CARDS / f"{shared}.py").read_text() for shared in ("_tldr", "_imdb")
        )
        assert says["Model"].split()[0] in MODELS, file.name
        assert f"experiments/cards/{file.name}" in says["Run"]
        assert title.endswith(".")
        assert "arXiv:" in says["Paper"]


def test_the_gallery_says_what_the_cards_say(cards):
    gallery = cards("_gallery")
    assert [problem for problem in map(gallery.drifted, gallery.cards()) if problem] == []
    assert gallery.PAGE.read_text() == gallery.page(), "run python experiments/cards/_gallery.py"


def test_the_gallery_reads_plans(cards):
    planned = cards("_gallery").planned
    head = "rljax plan x.py --topology v5e:4x4\n  m: 2.78 billion parameters on v5e:4x4, 16 devices\n"
    sampler = "sampler: fits, 6.00 GiB of 15.75 GiB free (38%)\nat best 1.50 s, bound by HBM\n"
    update = "update: fits, 6.31 GiB of\n 15.75 GiB free (40%)\nat best 250 ms, bound by compute (compute 250 ms)\n"
    where = "2.78 billion on v5e:4x4"
    assert planned(head + sampler + update) == [(where, "1.8 s", "9.8 of 15.8 GiB")]
    over = "update: does not fit: needs 41.45 GiB of 15.75 GiB, 25.70 GiB over\n"
    assert planned(head + over + head + update) == [
        (where, "—", "41.5 of 15.8 GiB: does not fit"),
        (where, "0.25 s", "9.4 of 15.8 GiB"),
    ]
    with pytest.raises(ValueError, match="not the lines of a plan"):
        planned(head)


def test_plans_go_back_where_they_were_read(cards):
    plans, gallery = cards("_plans"), cards("_gallery")
    for file in gallery.cards():
        blocks = plans.blocks(gallery.read(file)[1]["Plan"])
        assert plans.written(file.read_text(), "\n".join(blocks)) == file.read_text()
        for command in map(plans.command, blocks):
            assert command.startswith(f"rljax plan experiments/cards/{file.name} --topology ")
            assert len(command.split()) in (5, 7), command  # and a model, but nothing of what is quoted
    assert plans.command("rljax plan x.py --topology v5e:4x4\n    not made yet") == "rljax plan x.py --topology v5e:4x4"


def in_this_process(command, **_):
    """What `subprocess.run` gives of `python -m rljax …`."""
    assert command[:3] == [sys.executable, "-m", "rljax"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(command[3:])
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


@pytest.mark.long
def test_what_a_plan_prints_is_quoted(cards, tmp_path, monkeypatch):
    """The plan of a card for the fixture of its family, written into a copy of the card, and read for the gallery."""
    pytest.importorskip("libtpu")
    plans, gallery = cards("_plans"), cards("_gallery")
    monkeypatch.setattr(plans, "subprocess", types.SimpleNamespace(run=in_this_process))
    write_model(tmp_path / "pythia", *NEOX)
    sizes = "--batch 8 --max_prompt 64 --max_completion 16"
    command = f"rljax plan experiments/cards/tldr_sft_pythia.py --topology v5e:2x2 --model {tmp_path}/pythia {sizes}"
    card = tmp_path / "card.py"
    source = (CARDS / "tldr_sft_pythia.py").read_text()
    card.write_text(plans.written(source, plans.made(command)))
    assert card.read_text().partition('\n"""\n')[2] == source.partition('\n"""\n')[2]
    plan = gallery.read(card)[1]["Plan"]
    assert plans.command(plan) == command
    assert "memory of a device" not in plan
    assert "at best" in plan.splitlines()[-1]
    ((where, step, memory),) = gallery.planned(plan)
    assert where.endswith("on v5e:2x2")
    assert step.endswith(" s")
    assert memory.endswith(" of 15.8 GiB")
    with pytest.raises(RuntimeError, match="no-such-model"):
        plans.made(command.replace(f"{tmp_path}/pythia", "no-such-model"))
