"""Checkpoints: load and save are exact inverses, on any mesh and for any spelling of config.json."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import ModelConfig, build, hf, hf_read, hf_write, spellings, tokenizer_files
from rljax.models.tensors import open_safetensors
from rljax.sharding import make_mesh
from tests.models.folders import config_of, contents, edit, rewrite, same, tensors_of
from tests.models.make_fixtures import CASES, FOLDER

MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 1, "tensor": 4}]


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name != "gemma3_vision"])
def test_save_gives_back_what_was_loaded(name, tmp_path):
    model, params = hf.load(FOLDER / name)
    hf.save(tmp_path / "out", model, params)
    assert contents(tmp_path / "out") == contents(FOLDER / name)
    assert config_of(tmp_path / "out") == spellings.both(config_of(FOLDER / name))
    generation = "generation_config.json"
    assert json.loads((tmp_path / "out" / generation).read_text()) == json.loads(
        (FOLDER / name / generation).read_text()
    )


def test_a_gemma3_with_vision_is_saved_as_its_text_model(tmp_path):
    model, params = hf.load(FOLDER / "gemma3_vision")
    hf.save(tmp_path / "out", model, params)
    again, params_again = hf.load(tmp_path / "out")
    assert config_of(tmp_path / "out")["architectures"] == ["Gemma3ForCausalLM"]
    assert not [name for name in contents(tmp_path / "out") if "vision" in name or "language_model" in name]
    same(params, params_again)
    assert dataclasses.replace(again.config, source="") == dataclasses.replace(model.config, source="")


def gpt2_of_the_hub(folder):
    """As openai-community/gpt2 is stored: no prefix, causal masks beside the weights."""
    tensors = {name.removeprefix("transformer."): value for name, value in tensors_of(folder).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.uint8))
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return tensors


def neox_of_the_hub(folder):
    tensors = tensors_of(folder)
    for layer in range(2):
        tensors[f"gpt_neox.layers.{layer}.attention.bias"] = np.tril(np.ones((1, 1, 64, 64), bool))
        tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = np.array(-1e4, np.float16)
        tensors[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = np.array([1.0, 0.01], np.float32)
    return tensors


def old_llama(folder):
    """Rotary frequencies in every layer, and the tied output matrix once more."""
    tensors = tensors_of(folder)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.array([1, 0.1, 0.01, 0.001], np.float32)
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}


@pytest.mark.parametrize(
    ("name", "stored"), [("gpt2", gpt2_of_the_hub), ("gpt_neox", neox_of_the_hub), ("llama_biases", old_llama)]
)
def test_buffers_and_prefixes_come_back_too(name, stored, copy, tmp_path):
    folder = copy(name)
    rewrite(folder, stored(folder))
    model, params = hf.load(folder)
    same(params, hf.load(FOLDER / name)[1])
    hf.save(tmp_path / "out", model, params)
    assert contents(tmp_path / "out") == contents(folder)
    assert "rljax" not in config_of(tmp_path / "out")


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_write, "SHARD_BYTES", 30_000)
    model, params = hf.load(FOLDER / "llama")
    hf.save(tmp_path / "out", model, params)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    assert contents(tmp_path / "out") == contents(FOLDER / "llama")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_dtype_is_held_computed_in_and_written(dtype, tmp_path):
    model, params = hf.load(FOLDER / "llama", dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    assert model.config.compute_dtype == dtype
    hf.save(tmp_path / "out", model, params)
    assert config_of(tmp_path / "out")["dtype"] == dtype
    assert {stored for stored, _, _ in contents(tmp_path / "out").values()} == {dtype}


def test_stored_types_are_kept():
    model, params = hf.load(FOLDER / "qwen3")
    assert params["embed"]["tokens"].dtype == jnp.bfloat16
    assert model.config.compute_dtype == "float32"  # on a CPU


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "olmo2"])
def test_any_mesh_holds_the_same_model(name, mesh, tmp_path):
    plain = hf.load(FOLDER / name)[1]
    model, params = hf.load(FOLDER / name, mesh=make_mesh(**mesh))
    same(plain, params)
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size < up.size
    hf.save(tmp_path / "out", model, params)
    assert contents(tmp_path / "out") == contents(FOLDER / name)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_every_element_is_read_once(name, mesh, monkeypatch):
    """Shards read their own slices; replicas share one reading; only fused parts may read their neighbours."""
    read = {}

    def counting(folder):
        def count(tensor, full_name):
            def reader(box):
                value = tensor.read(box)
                read[full_name] = read.get(full_name, 0) + value.size
                return value

            return tensor._replace(read=reader)

        return {full_name: count(tensor, full_name) for full_name, tensor in open_safetensors(folder).items()}

    monkeypatch.setattr(hf_read, "open_safetensors", counting)
    hf.load(FOLDER / name, mesh=make_mesh(**mesh))
    for full_name, tensor in open_safetensors(FOLDER / name).items():
        times = 3 if "query_key_value" in full_name else 1  # heads interleave their parts
        assert read[full_name] == times * np.prod(tensor.shape), full_name


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_llama3", "llama_yarn", "llama_linear", "qwen3", "mistral"])
def test_old_spellings_mean_the_same(name, copy):
    folder = copy(name)
    new = hf.load(folder)[0].config
    rope = dict(config_of(folder)["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"type": kind, **rope}
    dtype = config_of(folder)["dtype"]
    edit(folder, drop=("rope_parameters", "dtype"), rope_theta=theta, rope_scaling=scaling, torch_dtype=dtype)
    old, params = hf.load(folder)
    assert dataclasses.replace(old.config, source="") == dataclasses.replace(new, source="")
    hf.save(folder.with_name("out"), old, jax.tree.map(lambda x: x.astype(jnp.float16), params))
    assert config_of(folder.with_name("out"))["torch_dtype"] == "float16"
    assert "dtype" not in config_of(folder.with_name("out"))


def test_old_gemma3_spelling_means_the_same(copy):
    folder = copy("gemma3")
    new = hf.load(folder)[0].config
    scaling = {"rope_type": "linear", "factor": 2.0}
    edit(folder, drop=("rope_parameters",), rope_theta=1000.0, rope_local_base_freq=50.0, rope_scaling=scaling)
    assert dataclasses.replace(hf.load(folder)[0].config, source="") == dataclasses.replace(new, source="")


def test_windows_follow_their_switches(copy):
    folder = copy("qwen2")
    assert hf.load(folder)[0].config.windows == (0, 6)
    edit(folder, drop=("layer_types",), max_window_layers=0)
    assert hf.load(folder)[0].config.windows == (6, 6)
    edit(folder, drop=("layer_types",), use_sliding_window=False)
    assert hf.load(folder)[0].config.windows == ()


@pytest.mark.parametrize("name", [name for name in CASES if name != "gemma3_vision"])
def test_a_model_without_source_gets_a_config_json(name, tmp_path):
    model, params = hf.load(FOLDER / name)
    bare = build(dataclasses.replace(model.config, source=""))
    hf.save(tmp_path / "out", bare, params)
    again, params_again = hf.load(tmp_path / "out")
    assert dataclasses.replace(again.config, source="") == bare.config
    same(params, params_again)


def test_configs_that_no_family_has_are_refused(tmp_path):
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 2}
    config = ModelConfig(**shape, num_kv_heads=1, head_dim=4, max_positions=8, norm="layer", qk_norm="full")
    model = build(config)
    with pytest.raises(ValueError, match="no supported family"):
        hf.save(tmp_path / "out", model, model.init(jax.random.key(0)))


def test_a_config_changed_after_loading_is_refused(tmp_path):
    model, params = hf.load(FOLDER / "llama")
    faster = build(dataclasses.replace(model.config, remat="full", compute_dtype="bfloat16"))
    hf.save(tmp_path / "out", faster, params)
    other = build(dataclasses.replace(model.config, norm_eps=0.5))
    with pytest.raises(ValueError, match=r"norm_eps=0\.5"):
        hf.save(tmp_path / "out2", other, params)


# --- the target folder ------------------------------------------------------------------------------------------------


def test_an_export_is_replaced_and_nothing_else(tmp_path):
    model, params = hf.load(FOLDER / "llama")
    other, other_params = hf.load(FOLDER / "mistral")
    hf.save(tmp_path / "out", other, other_params)
    hf.save(tmp_path / "out", model, params)
    assert contents(tmp_path / "out") == contents(FOLDER / "llama")
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        hf.save(tmp_path / "out", model, params)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match="is a file"):
        hf.save(tmp_path / "out" / "thesis.tex", model, params)


def test_a_failed_save_leaves_the_old_export(tmp_path, monkeypatch):
    model, params = hf.load(FOLDER / "llama")
    hf.save(tmp_path / "out", model, params)
    with pytest.raises(ValueError, match="tokenizer"):
        hf.save(tmp_path / "out", model, jax.tree.map(jnp.zeros_like, params), tokenizer=tmp_path / "nothing")
    assert contents(tmp_path / "out") == contents(FOLDER / "llama")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_tokenizers_are_saved_from_objects_and_folders(stories, tmp_path):
    from rljax.models.resolve import load_tokenizer

    model, params = hf.load(stories)
    tokenizer = load_tokenizer(stories)
    hf.save(tmp_path / "object", model, params, tokenizer=tokenizer)
    hf.save(tmp_path / "folder", model, params, tokenizer=stories)
    for folder in ("object", "folder"):
        assert load_tokenizer(tmp_path / folder)("Once upon a time") == tokenizer("Once upon a time")
    assert (tmp_path / "folder" / "tokenizer.json").read_bytes() == (stories / "tokenizer.json").read_bytes()


def test_an_unchanged_tokenizer_is_handed_over_file_by_file_and_a_changed_one_without_truncation(stories, tmp_path):
    """What transformers 5 saves (TokenizersBackend, is_local) does not open in transformers 4."""
    from rljax.models.resolve import load_tokenizer

    tokenizer = load_tokenizer(stories)
    tokenizer("Once upon a time", truncation=True, max_length=2, padding="max_length")  # as some reward has called it
    for folder in ("same", "changed"):
        (tmp_path / folder).mkdir()
    tokenizer_files.write_tokenizer(tmp_path / "same", tokenizer)
    for file in tokenizer_files.files_of(stories):
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer_files.write_tokenizer(tmp_path / "changed", tokenizer)
    written = json.loads((tmp_path / "changed" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|im_end|>"]
    assert not {"is_local", "backend", "extra_special_tokens", "local_files_only"} & set(written)
    saved = json.loads((tmp_path / "changed" / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)
    again = load_tokenizer(tmp_path / "changed")
    assert again("a time <|im_end|>")["input_ids"][-1] == 512
    assert again.eos_token == "</s>"
    assert tokenizer.backend_tokenizer.truncation is not None  # the caller's own is left as it was


def test_rotary_settings_have_the_names_of_transformers_4_too():
    """4 would take a base of 10,000 and no scaling, without a word; 5 reads the same from both."""
    plain = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    assert spellings.both(plain) == {**plain, "rope_theta": 1e5, "rope_scaling": None}
    linear = {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}
    assert spellings.both(linear)["rope_scaling"] == {"rope_type": "linear", "factor": 3.0}
    neox = spellings.both(
        {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}
    )
    assert (neox["rotary_emb_base"], neox["rotary_pct"]) == (9.0, 0.5)
    both = {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 5.0}}
    gemma = spellings.both({"model_type": "gemma3_text", "rope_parameters": both})
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (7.0, 5.0)
    for left in ({}, {"rope_parameters": {}}, {"rope_theta": 3.0, "rope_parameters": {"rope_theta": 3.0}}):
        assert spellings.both(left) == left


def test_tensors_are_written_as_they_are_whatever_their_layout_in_memory(copy, tmp_path, monkeypatch):
    """A device may keep them by columns, and safetensors 0.8 ignores strides; the tied matrix and buffers too."""
    folder = copy("llama_biases")
    rewrite(folder, old_llama(folder))
    model, params = hf.load(folder)
    plain = hf_write.gather
    monkeypatch.setattr(hf_write, "gather", lambda array: np.asfortranarray(plain(array)))
    hf.save(tmp_path / "out", model, params)
    assert contents(tmp_path / "out") == contents(folder)


# --- reward models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}], ids=str)
def test_reward_models_come_back(name, mesh, tmp_path):
    mesh = make_mesh(**mesh) if mesh else None
    model, params = hf.load(FOLDER / name, mesh=mesh)
    head = {"kernel": jnp.linspace(-1, 1, 32), "bias": jnp.float32(0.7)}
    hf.save_reward(tmp_path / "out", model, {"model": params, "head": head})
    again, reward = hf.load_reward(tmp_path / "out", mesh=mesh)
    same({key: value for key, value in params.items() if key != "unembed"}, reward["model"])
    same(head, reward["head"])
    written = config_of(tmp_path / "out")
    assert written["architectures"][0].endswith("ForSequenceClassification")
    assert len(written["id2label"]) == 1
    assert written["rljax"] == {"reward_bias": pytest.approx(0.7)}
    hf.save_reward(tmp_path / "out2", again, reward)
    assert contents(tmp_path / "out2") == contents(tmp_path / "out")
    assert config_of(tmp_path / "out2") == written


def test_reward_models_and_language_models_are_not_confused(tmp_path):
    model, params = hf.load(FOLDER / "llama")
    head = {"kernel": jnp.ones(32), "bias": jnp.float32(0)}
    hf.save_reward(tmp_path / "out", model, {"model": params, "head": head})
    with pytest.raises(ValueError, match="load_reward"):
        hf.load(tmp_path / "out")
    with pytest.raises(ValueError, match=r"no score\.weight"):
        hf.load_reward(FOLDER / "llama")
    config = tmp_path / "out" / "config.json"
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    config.write_text(json.dumps(json.loads(config.read_text()) | labels))
    with pytest.raises(ValueError, match=r"2 labels apart \(bad, good\)"):
        hf.load_reward(tmp_path / "out")
