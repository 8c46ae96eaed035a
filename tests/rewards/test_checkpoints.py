"""Rewards by models: reward models of ours, decoders and encoders of Hugging Face, embeddings."""

import concurrent.futures
import gc
import json
import math
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import artefacts, critics, data, models, online, policy, rewards
from rljax.checkpoint import Checkpoints
from rljax.manifest import write_json
from rljax.models import encoder, hf, resolve
from rljax.rewards import checkpoints
from rljax.sharding import make_mesh, shardings

FIXTURES = pathlib.Path(__file__).parent.parent / "models" / "fixtures"
PROMPTS = ["Once upon a time", "The cat", "She", "One day, Lily and Tom went to the park to play with a ball."]
COMPLETIONS = [" there was a dog.", " sat on the mat and it was very happy because the sun was out.", "", " They ran."]
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def trained(small):
    """(policy, reward model's params): Two layers of stories260K with a random head and a bias."""
    start = policy.load(str(small))
    head = models.scalar_head(start.model.config.hidden_size).init(jax.random.key(1))
    return start, {"model": start.params, "head": {**head, "bias": jnp.asarray(0.25)}}


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    start, params = trained
    path = tmp_path_factory.mktemp("rm") / "reward"
    hf.save_reward(path, start.model, params, tokenizer=start.tokenizer)
    return path


@pytest.fixture(scope="module")
def expected(trained):
    """From the tokens of a comparison: prompt, completion and end token."""
    start, params = trained
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        pair = {"prompt": prompt, "completions": [completion, "x"], "best": 0}
        rows.append(data.comparison_example(pair, start.tokenizer).examples[0])
        assert rows[-1].ids[-1] == start.tokenizer.eos_token_id
    score = jax.jit(models.reward_model(start.model).scores)
    return np.asarray(score(params, data.pad(rows, 50)))


def test_a_decoder_scores_texts_with_its_own_tokenizer(folder, expected):
    reward = rewards.from_checkpoint(folder, batch=3)
    assert (reward.name, reward.on_device) == ("reward", False)
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), expected, rtol=2e-4, atol=2e-5)
    assert np.ptp(expected) > 0.05  # the rows differ, so that their order is tested
    few = rewards.from_checkpoint(folder, batch=3, output="probability")
    np.testing.assert_allclose(few(PROMPTS, COMPLETIONS), 1 / (1 + np.exp(-expected)), rtol=2e-4)


def test_few_programs_are_compiled(folder):
    reward = rewards.from_checkpoint(folder, batch=2, max_length=30)
    words = [" the dog ran" * n for n in range(1, 40)]
    reward(PROMPTS[:1] * len(words), words)
    assert checkpoints._open(reward.fn).score._cache_size() <= 2  # widths 16 and 30


def test_a_long_row_loses_the_beginning_of_its_prompt(folder, small):
    tokenizer = resolve.load_tokenizer(small)
    tokenizer.add_bos_token = True
    whole = data.completion_example({"prompt": PROMPTS[3], "completion": COMPLETIONS[3]}, tokenizer)
    limit = len(whole.ids) - 4
    cut = checkpoints._ids(PROMPTS[3], COMPLETIONS[3], tokenizer, limit)
    assert cut.tolist() == [whole.ids[0], *whole.ids[5:]]  # <s> stays
    tail = checkpoints._ids(PROMPTS[3], COMPLETIONS[3] * 9, tokenizer, 10)
    assert len(tail) == 10
    assert tail[0] == whole.ids[0]
    with pytest.raises(ValueError, match=r"max_length=100000, but .* has 512 positions"):
        rewards.from_checkpoint(folder, max_length=100_000)(PROMPTS, COMPLETIONS)


def test_with_the_policys_tokenizer_a_decoder_scores_tokens_on_the_device(folder, trained, expected):
    start, _ = trained
    assert checkpoints.same_tokenizer(start.tokenizer, resolve.load_tokenizer(folder))
    lazy = rewards.from_checkpoint(folder, weight=2.0, name="rm")
    (reward,) = rewards.opened([lazy], start.tokenizer)
    assert (reward.on_device, reward.weight, reward.name) == (True, 2.0, "rm")
    assert rewards.from_checkpoint(folder, tokenizer=start.tokenizer).on_device
    made = [
        data.completion_example({"prompt": p, "completion": c}, start.tokenizer)
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    tokens = jax.tree.map(jnp.asarray, data.pad(made, 64))
    total, per_token, parts = jax.jit(lambda params, tokens: rewards.judge_on_device([reward], params, tokens))(
        rewards.device_params([reward]), tokens
    )
    np.testing.assert_allclose(parts["rm"], expected, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(total, 2 * np.asarray(parts["rm"]))
    assert per_token is None


def test_another_tokenizer_keeps_it_on_the_host(folder, small):
    other = resolve.load_tokenizer(small)
    other.chat_template = CHAT
    assert not checkpoints.same_tokenizer(other, resolve.load_tokenizer(small))
    assert not rewards.opened([rewards.from_checkpoint(folder)], other)[0].on_device


def test_prompts_of_messages_go_through_the_template_of_the_reward_model(folder, tmp_path):
    chatty = tmp_path / "chatty"
    shutil.copytree(folder, chatty)
    (chatty / "chat_template.jinja").write_text(CHAT)
    messages = [[{"role": "user", "content": text}] for text in PROMPTS[:2]]
    plain = [f"user: {text}\nassistant: " for text in PROMPTS[:2]]
    got = rewards.from_checkpoint(chatty)(messages, COMPLETIONS[:2])
    np.testing.assert_allclose(got, rewards.from_checkpoint(folder)(plain, COMPLETIONS[:2]), rtol=1e-4, atol=1e-5)


SETTINGS = {"kind": "RewardModel", "dtype": "float32", "best": None, "best_mode": "max"}


@pytest.fixture(scope="module")
def run(trained, small, tmp_path_factory):
    """A run of a reward model, as `offline.RewardModel` leaves it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run.mkdir()
    write_json(run / "experiment.json", {**SETTINGS, "model": str(small)})
    with Checkpoints(run / "checkpoints") as saved:
        saved.save(3, {"params": trained[1]}, {})
    return run


def test_a_run_of_ours(trained, run, tmp_path, small, expected):
    start, _ = trained
    reward = rewards.from_checkpoint(run)
    np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), expected, rtol=2e-4, atol=2e-5)
    assert rewards.opened([reward], start.tokenizer)[0].on_device

    write_json(tmp_path / "experiment.json", {**SETTINGS, "model": str(small), "kind": "SFT"})
    with Checkpoints(tmp_path / "checkpoints") as saved:
        saved.save(1, {"params": start.params}, {})
    with pytest.raises(ValueError, match="is the run of a policy, which gives no rewards"):
        rewards.opened([rewards.from_checkpoint(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "folder"])
@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_a_judge_is_spread_over_the_mesh_and_nowhere_else(request, trained, kind, axes):
    """As a reward and as a critic, in a run (the mesh is set): no device holds more than another."""
    start, params = trained
    mesh, path = make_mesh(**axes), request.getfixturevalue(kind)
    before = held(mesh)
    with jax.set_mesh(mesh):
        (reward,) = rewards.opened([rewards.from_checkpoint(path)], start.tokenizer, mesh=mesh)
        critic = critics.load(online.PPO(model="", data="", critic=str(path)), start, mesh)
    size, sizes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), set((held(mesh) - before).tolist())
    assert len(sizes) == 1
    assert 2 * size / 4 <= sizes.pop() < 2 * size / 4 + size / 8  # only norms and biases are copied
    assert reward.on_device
    places = shardings(params, models.RULES, mesh)
    for found in (reward.params, critic.params):
        wanted = {name: leaf for name, leaf in params.items() if name in found}
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        assert jax.tree.map(lambda x: x.sharding, found) == places


def held(mesh) -> np.ndarray:
    """The bytes of all arrays on each device of a mesh."""
    gc.collect()
    size = dict.fromkeys(mesh.devices.flat, 0)
    for x in jax.live_arrays():
        for device in x.sharding.device_set & size.keys():
            size[device] += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return np.asarray(list(size.values()))


def test_in_a_run_a_judge_on_the_host_is_apart_from_the_mesh(run, trained, expected):
    """It scores the rows of one process, on one of its devices; so do encoders."""
    mesh = make_mesh(fsdp=4)
    with jax.set_mesh(mesh):
        (reward,) = rewards.opened([rewards.from_checkpoint(run, max_length=100)], trained[0].tokenizer, mesh=mesh)
        assert not reward.on_device
        np.testing.assert_allclose(reward(PROMPTS, COMPLETIONS), expected, rtol=2e-4, atol=2e-5)
        params = checkpoints._open(reward.fn).params
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {1}


def test_in_a_run_what_is_loaded_is_on_its_mesh(run, small, trained):
    """An experiment's own `evaluate` opens another run or checkpoint: beside it they can be computed with."""
    mesh, (_, params) = make_mesh(fsdp=2, tensor=2), trained
    places = shardings(params, models.RULES, mesh)
    with jax.set_mesh(mesh):
        start, found, step = artefacts.load_run(run)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert jax.tree.map(lambda x: x.sharding, found) == places
    assert jax.tree.map(lambda x: x.sharding, start.params) == places["model"]
    jax.tree.map(np.testing.assert_array_equal, start.params, params["model"])


def test_parameters_of_other_rewards_come_to_the_mesh():
    """What the user made before there was a mesh: on one device, or in numpy."""
    mesh, table = make_mesh(fsdp=4), {"a": jax.device_put(jnp.arange(3.0), jax.devices()[0]), "b": np.ones(2)}
    one = rewards.on_device(lambda params, tokens: params["a"].sum() + 0.0 * tokens.ids[:, 0], params=table)
    (reward,) = rewards.opened([one], mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, reward.params, table)
    assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(reward.params))


def test_wrong_paths_are_found_when_opened_and_named_while_judging(tmp_path, small):
    reward = rewards.from_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no folder"):
        rewards.opened([reward])
    judging = rewards.start([reward], ["p"], ["c"], fields={}, prompt_ids=[[1]], completion_ids=[[1]])
    with pytest.raises(rewards.RewardError, match=r"the reward nothing failed .*there is no folder"):
        judging.result(timeout=60)
    with pytest.raises(ValueError, match=r"no score\.weight: it is not a reward model"):
        rewards.opened([rewards.from_checkpoint(small)])
    with pytest.raises(ValueError, match="output is 'odds'; choose one of 'logit', 'probability'"):
        rewards.from_checkpoint(small, output="odds")


# --- encoders ---------------------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "dog", "sat", "ran", "."]
TEXTS = ["the cat sat.", "dog", "the dog ran. the cat ran."]


def with_tokenizer(name, folder):
    """A copy of an encoder's fixture with a tiny tokenizer of its special tokens' kind."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers import models as kinds

    shutil.copytree(FIXTURES / name, folder)
    tokenizer = Tokenizer(kinds.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # pyright: ignore
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return with_tokenizer("encoder_bert_classifier", tmp_path_factory.mktemp("encoders") / "bert")


def logits(folder, *rows, types=None):
    """Of rows of token ids."""
    model, params = encoder.load(folder)
    width = model.config.max_positions
    ids, segments = np.zeros((2, len(rows), width), np.int32)
    for place, row in enumerate(rows):
        ids[place, : len(row)], segments[place, : len(row)] = row, 1
    types = None if types is None else np.asarray([types + [0] * (width - len(types))])
    return np.asarray(jax.jit(model.classify)(params, ids, segments, types=types))


def test_an_encoder_gives_the_logit_or_probability_of_a_label(classifier):
    reward = rewards.from_checkpoint(classifier, label="good", judged="completion", batch=2)
    wanted = logits(classifier, [2, 4, 5, 7, 9, 3], [2, 6, 3], [2, 4, 6, 8, 9, 4, 5, 8, 9, 3])
    np.testing.assert_allclose(reward([""] * 3, TEXTS), wanted[:, 2], rtol=1e-4, atol=1e-5)
    fine = rewards.from_checkpoint(classifier, label="fine", judged="completion", output="probability")
    np.testing.assert_allclose(fine([""] * 3, TEXTS), np.exp(wanted[:, 1]) / np.exp(wanted).sum(1), rtol=1e-4)
    assert not rewards.opened([reward], resolve.load_tokenizer(classifier))[0].on_device


def test_an_encoder_reads_prompt_and_completion_as_one_text_or_as_a_pair(classifier):
    prompts, said = ["the cat ", [{"role": "user", "content": "the cat"}]], ["sat.", "sat."]
    one = rewards.from_checkpoint(classifier, label="bad")
    np.testing.assert_allclose(one(prompts, said), [logits(classifier, [2, 4, 5, 7, 9, 3])[0, 0]] * 2, rtol=1e-4)
    pair = rewards.from_checkpoint(classifier, label="bad", judged="pair")
    wanted = logits(classifier, [2, 4, 5, 3, 7, 9, 3], types=[0, 0, 0, 0, 1, 1, 1])[0, 0]
    np.testing.assert_allclose(pair(prompts, said), [wanted] * 2, rtol=1e-4)
    # 20 positions: the end of the text is what is left
    long = rewards.from_checkpoint(classifier, label="bad")(["dog " * 30], ["cat"])
    np.testing.assert_allclose(long, logits(classifier, [2, *[6] * 17, 5, 3])[:, 0], rtol=1e-4)


def test_many_threads_load_a_checkpoint_once(folder, monkeypatch):
    loads, load = [], hf.load_reward

    def slow(path, **options):
        loads.append(path)
        time.sleep(0.2)
        return load(path, **options)

    monkeypatch.setattr(hf, "load_reward", slow)
    source = rewards.from_checkpoint(folder, batch=7).fn
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        judges = list(pool.map(checkpoints._open, [source] * 4))
    assert len(loads) == 1
    assert all(judge is judges[0] for judge in judges)


def test_a_length_that_was_set_is_honoured(folder, trained):
    """On the device rows are as they were sampled, so a decoder with a max_length stays on the host."""
    start, _ = trained
    (reward,) = rewards.opened([rewards.from_checkpoint(folder, max_length=12)], start.tokenizer)
    assert not reward.on_device
    long = rewards.from_checkpoint(folder)(PROMPTS, COMPLETIONS)
    assert abs(reward(PROMPTS, COMPLETIONS)[3] - long[3]) > 1e-4


def test_of_a_pair_the_prompt_is_cut_first(classifier):
    pair = rewards.from_checkpoint(classifier, label="bad", judged="pair")  # 20 positions, three special tokens
    long, short = ["cat", *["dog"] * 11], ["the", *["cat"] * 9]
    wanted = [2, *[6] * 5, 3, 5, *[6] * 11, 3]  # of ten and twelve tokens the last five, and all twelve
    types = [0] * 7 + [1] * 13
    got = pair(["the cat the cat the " + "dog " * 5], [" ".join(long)])
    np.testing.assert_allclose(got, logits(classifier, wanted, types=types)[:, 0], rtol=1e-4)
    both = [2, 3, *[5] * 7, 4, *[5] * 9, 3]  # no room for any prompt: the end of the completion
    got = pair(["dog"], [" ".join(short * 3)])
    np.testing.assert_allclose(got, logits(classifier, both, types=[0, 0] + [1] * 18)[:, 0], rtol=1e-4)


def test_labels_have_to_be_named_and_there(classifier):
    with pytest.raises(ValueError, match=r"3 labels apart \(bad, fine, good\), and no label was named: set label"):
        rewards.opened([rewards.from_checkpoint(classifier)])
    with pytest.raises(ValueError, match="and 'great' is none of them"):
        rewards.opened([rewards.from_checkpoint(classifier, label="great")])


@pytest.mark.parametrize("name", ["encoder_distilbert_classifier", "encoder_roberta_classifier"])
def test_the_other_encoders(name, tmp_path):
    folder = with_tokenizer(name, tmp_path / "encoder")
    label = json.loads((folder / "config.json").read_text()).get("id2label", {"0": "LABEL_0"})["0"]
    reward = rewards.from_checkpoint(folder, label=label, judged="completion")
    np.testing.assert_allclose(reward([""], TEXTS[:1]), logits(folder, [2, 4, 5, 7, 9, 3])[:, 0], rtol=1e-4, atol=1e-5)


def test_embedding_similarity(tmp_path):
    folder = with_tokenizer("encoder_bert", tmp_path / "encoder")
    model, params = encoder.load(folder)
    ids = np.asarray([[2, 5, 3, 0, 0], [2, 6, 3, 0, 0], [2, 6, 8, 9, 3]], np.int32)
    found = np.asarray(jax.jit(encoder.embed, static_argnums=0)(model, params, ids, (ids > 0).astype(np.int32)))
    cat, dog, ran = found / np.linalg.norm(found, axis=1, keepdims=True)
    got = rewards.embedding_similarity(
        [""] * 4,
        ["cat", "cat", "cat", "dog ran."],
        reference=["cat", "dog", None, ["cat", "dog"]],
        encoder=str(folder),
    )
    wanted = [1.0, cat @ dog, None, max(ran @ cat, ran @ dog)]
    assert got == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match="embedding_similarity compares with a reference"):
        rewards.embedding_similarity([""], ["cat"], encoder=str(folder))


@pytest.mark.slow
def test_similarity_by_a_real_encoder():
    folder = resolve.cache_folder() / "sentence-transformers--all-MiniLM-L6-v2"
    if not folder.is_dir():
        pytest.skip("all-minilm-l6-v2 has not been fetched")
    said = ["A feline is resting in the garden.", "Stock prices fell sharply on Monday."]
    near, far = rewards.embedding_similarity(["", ""], said, answer=["The cat sits outside."] * 2)
    assert near > 0.5 > 0.2 > far
