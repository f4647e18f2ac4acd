"""Checkpoints in both layouts: same logits as transformers, same sites as the reference, and what is refused."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import checkpoint_files as files
import golden
import huggingface_hub.constants
import pytest
import reference
import torch
from conditioning import assert_same_effects, logit_rounding, widest
from transformers import AutoModelForCausalLM, FalconMambaConfig, Mamba2Config, RwkvConfig

import ioi_mamba as im
from ioi_mamba.analyses import layer_ablation
from ioi_mamba.errors import InputError
from ioi_mamba.model.families.mamba import MAMBA
from ioi_mamba.model.mamba import checkpoints
from ioi_mamba.model.sites import MODEL_SITES
from ioi_mamba.passes.probe import probe
from ioi_mamba.study.runs import describe_model

D, LAYERS, ROWS = 32, 3, 632  # width; layers; 630 tokens (some of no tokenizer), padded to a multiple of 8
LAYOUTS = ["hf", "original"]


def opened(directory, **options):
    return im.open_model(str(directory), device="cpu", **options)


@pytest.fixture(scope="module")
def tensors():
    return files.random_tensors(D, LAYERS, ROWS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tensors):
    """The same tensors in both layouts, GPT-NeoX's tokenizer files beside them."""
    home = tmp_path_factory.mktemp("checkpoints")
    made = {
        "hf": files.write_hf(home / "mamba-tiny-hf", tensors),
        "original": files.write_original(home / "mamba-tiny", tensors, vocab_size=630),
    }
    for directory in made.values():
        files.write_neox_files(directory)
    return made


@pytest.fixture(scope="module")
def models(directories):
    return {layout: opened(directory) for layout, directory in directories.items()}


@pytest.fixture(scope="module")
def prompts(models):
    """Pairs of the task as the tokenizer beside the checkpoints cuts them."""
    return im.ioi.generate(models["hf"].tokenizer, 2, seed=27, templates=im.ioi.ALIGNED_TEMPLATES[:1], symmetric=False)


# -- one model, two layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logits_are_those_of_transformers(directories, models, prompts, layout):
    model, stock = models[layout], AutoModelForCausalLM.from_pretrained(directories["hf"]).eval()
    logits = im.run(model, prompts.clean, {})
    # Bit for bit of the same tensors; the others have their own place in memory, and sums of theirs another order.
    assert torch.equal(logits, model._module(prompts.clean, use_cache=False).logits)
    difference = logits - stock(prompts.clean, use_cache=False).logits
    assert difference.abs().max() < logit_rounding(model, prompts.clean)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_site_of_every_layer_has_the_value_of_the_reference(models, tensors, prompts, layout):
    want = reference.run(files.reference_weights(tensors), prompts.clean)
    got = im.read(models[layout], prompts.clean, list(want))
    bad = {hook: error for hook in want if not (error := golden.relative_error(got[hook], want[hook])) < 1e-5}
    assert not bad
    assert {hook.rsplit("hook_", 1)[1].split(".")[0] for hook in want} == {*MAMBA.sites, *MODEL_SITES}


def test_both_layouts_are_one_model_to_a_manifest_but_for_its_name(directories, models):
    hf, original = (describe_model(models[layout]) for layout in LAYOUTS)
    assert original.pop("id") == str(directories["original"])
    assert hf.pop("id") == str(directories["hf"])
    assert original == hf
    assert probe(models["original"])["weights_sha256"] == probe(models["hf"])["weights_sha256"]


def test_an_experiment_gives_one_table_whatever_the_layout(models, prompts):
    pairs = widest(models["hf"], prompts)
    hf, original = (layer_ablation.EXPERIMENT(models[layout], pairs) for layout in LAYOUTS)
    assert_same_effects(hf, original, models["hf"], pairs)
    assert hf["effect"].abs().max() > 0.01


@pytest.mark.parametrize(
    ("mixer", "shapes"),
    [
        ({"d_state": 5}, {"N": 5}),
        ({"d_conv": 3}, {"K": 3}),
        ({"expand": 3}, {"E": 3 * D}),
        ({"dt_rank": 7}, {"R": 7}),
        ({"dt_rank": "auto"}, {}),
        ({"conv_bias": False}, {"conv_bias": False}),
        ({"bias": True}, {"bias": True}),
        ({"layer": "Mamba1", "use_fast_path": False, "dt_min": 0.01, "dt_init": "constant"}, {}),
    ],
)
def test_an_option_of_the_mixer_is_carried_over(tmp_path, mixer, shapes):
    tensors = files.random_tensors(D, 2, 40, **shapes)
    model = opened(files.write_original(tmp_path, tensors, vocab_size=40, ssm_cfg=mixer))
    tokens = torch.arange(12).reshape(2, 6)
    want = reference.logits(files.reference_weights(tensors), tokens)
    assert golden.relative_error(im.run(model, tokens, {}), want) < 1e-5


@pytest.mark.parametrize(
    ("size", "width", "layers"),
    [("0.13", 768, 24), ("0.37", 1024, 48), ("0.79", 1536, 48), ("1.4", 2048, 48), ("2.8", 2560, 64)],
)
def test_the_published_configs_give_models_of_the_sizes_in_their_names(size, width, layers):
    config = checkpoints.translated(files.ORIGINAL_370M | {"d_model": width, "n_layer": layers}, "a")
    assert config is not None
    E, N, K, R = config.intermediate_size, config.state_size, config.conv_kernel, int(config.time_step_rank)
    assert (config.vocab_size, E, N, K, R) == (50280, 2 * width, 16, 4, width // 16)
    mixer = 2 * E * width + E * (K + 1) + E * (R + 2 * N) + E * (R + 1) + E * (N + 1) + E * width
    parameters = config.vocab_size * width + layers * (mixer + width) + width
    assert f"{parameters / 1e9:.2g}" == size
    if width == 1024:
        same = {key: value for key, value in config.to_dict().items() if key in files.HF_370M}
        left_over = {"architectures", "d_inner", "d_model", "fused_add_norm", "n_layer", "pad_vocab_size_multiple"}
        left_over |= {"rms_norm", "ssm_cfg", "torch_dtype", "transformers_version"}
        published = {key: value for key, value in files.HF_370M.items() if key not in left_over}
        assert {key: same.get(key) for key in published} == published


def test_half_precision_files_open_in_the_dtype_asked_for(tmp_path):
    tensors = {key: tensor.half() for key, tensor in files.random_tensors(D, 2, 40).items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    model = opened(files.write_original(tmp_path, tensors, vocab_size=40))
    assert {parameter.dtype for parameter in model._module.parameters()} == {torch.float32}
    tokens = torch.arange(12).reshape(2, 6)
    want = reference.logits(files.reference_weights(tensors), tokens)
    assert golden.relative_error(im.run(model, tokens, {}), want) < 1e-5


def test_a_bin_in_the_format_before_torch_1_6_opens(directories, models, tensors, prompts, tmp_path):
    shutil.copytree(directories["original"], tmp_path, dirs_exist_ok=True)
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert probe(opened(tmp_path))["weights_sha256"] == probe(models["hf"])["weights_sha256"]


# -- padding, tying, BOS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_padding_of_the_vocabulary_has_logits_and_tokens_end_behind_it(models, prompts, layout):
    model = models[layout]
    assert model.config.vocab_size == ROWS
    assert im.run(model, prompts.clean, {}).shape[-1] == ROWS
    assert len(model.tokenizer) <= 630
    im.run(model, torch.tensor([[0, ROWS - 1]]), {})
    with pytest.raises(InputError, match=f"tokens must be 0 to {ROWS - 1} for this vocabulary; found 0 to {ROWS}"):
        im.run(model, torch.tensor([[0, ROWS]]), {})


@pytest.mark.parametrize(("stated", "multiple", "rows"), [(40, 8, 40), (33, 8, 40), (39, 1, 39), (39, None, 40)])
def test_a_vocabulary_is_padded_to_the_multiple_that_the_config_states(tmp_path, stated, multiple, rows):
    files.write_original(tmp_path, files.random_tensors(D, 1, rows), vocab_size=stated)
    config = json.loads((tmp_path / "config.json").read_text()) | {"pad_vocab_size_multiple": multiple}
    (tmp_path / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    model = opened(tmp_path)
    assert model.config.vocab_size == model._module.lm_head.weight.shape[0] == rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_head_is_the_embedding_itself(models, layout):
    module = models[layout]._module
    assert module.lm_head.weight is module.backbone.embeddings.weight


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_untied_head_is_its_own(tmp_path, layout):
    tensors = files.random_tensors(D, 2, 40, tied=False)
    write, key = {
        "hf": (files.write_hf, "tie_word_embeddings"),
        "original": (files.write_original, "tie_embeddings"),
    }[layout]
    model = opened(write(tmp_path, tensors, vocab_size=40, **{key: False}))
    tokens = torch.arange(12).reshape(2, 6)
    want = reference.logits(files.reference_weights(tensors), tokens)
    assert golden.relative_error(im.run(model, tokens, {}), want) < 1e-5


@pytest.mark.parametrize("absent", ["lm_head.weight", "backbone.embedding.weight"])
def test_of_a_tied_pair_one_may_be_left_out_of_the_file(tmp_path, absent):
    tensors = files.random_tensors(D, 2, 40)
    kept = tensors["lm_head.weight"]
    del tensors[absent]
    module = opened(files.write_original(tmp_path, tensors, vocab_size=40))._module
    assert torch.equal(module.lm_head.weight, kept)
    assert torch.equal(module.backbone.embeddings.weight, kept)


@pytest.mark.parametrize("layout", [*LAYOUTS, "tokenizer.json alone"])
def test_every_prompt_begins_with_one_bos(directories, models, prompts, tmp_path, layout):
    if layout in models:
        model = models[layout]
    else:
        shutil.copytree(directories["original"], tmp_path, dirs_exist_ok=True)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (tmp_path / name).unlink()
        model = opened(tmp_path)
    assert model.tokenizer.bos_token_id == 0
    again = im.ioi.generate(model.tokenizer, 2, seed=27, templates=im.ioi.ALIGNED_TEMPLATES[:1], symmetric=False)
    assert torch.equal(again.clean, prompts.clean)
    assert (again.clean[:, 0] == 0).all()
    assert (again.clean[:, 1:] > 0).all()
    assert model.tokenizer.decode(again.clean[0, 1:]) == next(iter(again.texts or ()))[0]


# -- tokenizers and the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache with both layouts and GPT-NeoX's tokenizer, as downloads leave it; nothing else can be reached."""
    tensors = files.random_tensors(16, 1, checkpoints.NEOX_ROWS)
    hf = files.write_neox_files(files.write_hf(tmp_path / "made" / "hf", tensors))
    original = files.write_original(tmp_path / "made" / "original", tensors)
    cache = tmp_path / "cache"
    files.put_into_hub_cache(cache, "state-spaces/mamba-130m-hf", hf)
    files.put_into_hub_cache(cache, "state-spaces/mamba-130m", original)
    files.put_into_hub_cache(cache, checkpoints.NEOX, files.write_neox_files(tmp_path / "made" / "neox"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache, original


def test_both_layouts_open_by_hub_id_and_the_original_takes_the_tokenizer_of_gpt_neox(hub):
    hf, original = opened("state-spaces/mamba-130m-hf"), opened("state-spaces/mamba-130m")
    assert probe(hf)["weights_sha256"] == probe(original)["weights_sha256"]
    text = "Then, Aaron and Adam went to the store."
    assert hf.tokenizer(text).input_ids == original.tokenizer(text).input_ids
    assert original.tokenizer.decode(original.tokenizer(text).input_ids) == text
    assert describe_model(original)["id"] == "state-spaces/mamba-130m"


def test_a_directory_without_a_tokenizer_takes_that_of_gpt_neox_only_if_its_vocabulary_is_meant(hub, tmp_path):
    assert opened(hub[1]).tokenizer.bos_token == "<|endoftext|>"
    small = files.write_original(tmp_path / "small", files.random_tensors(D, 1, 40), vocab_size=40)
    assert opened(small).tokenizer("17 4").input_ids == [17, 4]


def test_a_tokenizer_that_cannot_be_had_is_one_sentence_with_the_fix(hub):
    cache, original = hub
    shutil.rmtree(cache / "models--EleutherAI--gpt-neox-20b")
    for name in ("state-spaces/mamba-130m", str(original)):
        with pytest.raises(InputError, match=r"put the tokenizer.json of EleutherAI/gpt-neox-20b beside") as error:
            opened(name)
        assert str(error.value).startswith(f"{name!r} has no tokenizer")
        assert "\n" not in str(error.value)


def test_a_hub_id_without_weights_is_refused(hub):
    for file in (hub[0] / "models--state-spaces--mamba-130m").rglob("pytorch_model.bin"):
        file.unlink()
    with pytest.raises(InputError, match=r"The weights of 'state-spaces/mamba-130m' cannot be loaded") as error:
        opened("state-spaces/mamba-130m")
    assert "\n" not in str(error.value)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "is made of Mamba3 layers"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "config.json that makes no Mamba .*num_heads"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 7}}, "unknown mixer option 'dt_rank'"),
        ({"attn_layer_idx": [1]}, r"has attention layers \(attn_layer_idx is \[1\]\)"),
        ({"d_intermediate": 64}, r"has MLPs between its layers \(d_intermediate is 64\)"),
        ({"rms_norm": False}, "uses LayerNorm"),
        ({"ssm_cfg": {"headdim": 64}}, "unknown mixer option 'headdim'"),
        ({"d_model": 0}, "has d_model 0 in config.json"),
        ({"n_layer": "three"}, "has n_layer 'three' in config.json"),
        ({"pad_vocab_size_multiple": 0}, "has pad_vocab_size_multiple 0"),
        ({"ssm_cfg": {"d_state": 1.5}}, "has d_state 1.5"),
        ({"ssm_cfg": {"conv_bias": "maybe"}}, "config.json that makes no Mamba .*use_conv_bias"),
        ({"ssm_cfg": 3}, "has ssm_cfg 3 in config.json"),
        ({"model_type": "rwkv"}, "is a rwkv model, not a Mamba"),
    ],
)
def test_a_config_that_is_no_mamba_1_is_refused_with_the_reason(directories, tmp_path, config, says):
    shutil.copytree(directories["original"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputError, match=says) as error:
        opened(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_is_not_asked_for_the_layout_that_it_cannot_open(directories):
    with pytest.raises(InputError, match="is in the layout of mamba_ssm, which a server cannot open: use its -hf"):
        opened(directories["original"], backend="ndif", host="nowhere.invalid")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def without(key):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without("backbone.layers.1.mixer.D"), "it lacks 1 of the model's tensors, 'backbone.layers.1.mixer.D' among"),
        (lambda tensors: {}, f"it lacks {10 * LAYERS + 3} of the model's tensors"),
        (
            lambda tensors: tensors | {"backbone.layers.0.mlp.fc1.weight": torch.ones(2)},
            "it has 1 tensors without a place in this model, 'backbone.layers.0.mlp.fc1.weight' among",
        ),
        (lambda tensors: tensors | {"backbone.norm_f.weight": torch.ones(D + 1)}, "cannot be loaded"),
        (lambda tensors: tensors | {"lm_head.weight": torch.ones(ROWS, D)}, "lm_head.weight is not the embedding"),
        (lambda tensors: list(tensors.values()), "no dictionary of tensors"),
        (lambda tensors: {"model": tensors}, "no dictionary of tensors"),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_refused(directories, tmp_path, tensors, spoil, says):
    shutil.copytree(directories["original"], tmp_path, dirs_exist_ok=True)
    torch.save(spoil(dict(tensors)), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=says) as error:
        opened(tmp_path)
    assert str(error.value).startswith(f"The weights of {str(tmp_path)!r} cannot be loaded: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_bin_is_refused_and_does_not_run(directories, tmp_path, tensors, write):
    shutil.copytree(directories["original"], tmp_path / "model")
    trace = tmp_path / "ran"
    write(tensors | {"backbone.norm_f.weight": Bomb(trace)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds other things than tensors, or is broken"):
        opened(tmp_path / "model")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_a_bin_that_is_broken_or_absent_is_refused(directories, tmp_path, content):
    shutil.copytree(directories["original"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "pytorch_model.bin"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"pytorch_model.bin") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_a_gap_in_a_transformers_checkpoint_is_refused_and_not_filled_with_random_numbers(tmp_path, tensors):
    files.write_hf(tmp_path, without("backbone.layers.1.mixer.out_proj.weight")(tensors))
    with pytest.raises(InputError, match=r"lacks 1 of the model's tensors, 'backbone.layers.1.mixer.out_proj.weight'"):
        opened(tmp_path)


def test_a_relative_as_transformers_writes_it_opens(tmp_path):
    config = FalconMambaConfig(hidden_size=D, num_hidden_layers=2, vocab_size=40)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert opened(tmp_path).config.model_type == "falcon_mamba"


def test_the_first_layout_of_a_mamba_2_is_the_same_model(tmp_path):
    sizes = {"num_heads": 8, "head_dim": 8, "state_size": 6, "n_groups": 2, "conv_kernel": 3}
    config = Mamba2Config(hidden_size=D, num_hidden_layers=2, vocab_size=48, chunk_size=8, **sizes)
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config)
    stock.save_pretrained(tmp_path / "hf")
    tensors = {key.replace("backbone.embeddings.", "backbone.embedding."): t for key, t in stock.state_dict().items()}
    mixer = {"layer": "Mamba2", "headdim": 8, "d_state": 6, "ngroups": 2, "d_conv": 3, "chunk_size": 8}
    described = {"d_model": D, "n_layer": 2, "vocab_size": 41, "ssm_cfg": mixer, "tie_embeddings": False}
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(json.dumps(described))
    torch.save(tensors, tmp_path / "original" / "pytorch_model.bin")
    tokens = torch.tensor([[0, 3, 9, 40, 2]])
    hooks = ["hook_logits", "blocks.1.hook_h", "blocks.0.hook_B"]
    one, other = (im.read(opened(tmp_path / name), tokens, hooks) for name in ("hf", "original"))
    for hook in hooks:
        assert torch.equal(one[hook], other[hook])


def test_a_family_that_is_not_known_is_refused_in_a_sentence(tmp_path):
    AutoModelForCausalLM.from_config(RwkvConfig(hidden_size=D, num_hidden_layers=2, vocab_size=40)).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="is a rwkv model, not a Mamba: use a checkpoint") as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


# -- full size ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_full_size_runs_an_experiment_within_six_gibibytes(tmp_path, capsys):
    model = tmp_path / "mamba-370m"
    try:
        files.write_original(model, files.random_tensors(1024, 48, checkpoints.NEOX_ROWS))
        files.write_neox_files(model)
        size = (model / "pytorch_model.bin").stat().st_size
        line = {
            "corruption": "ABC AB C -> ABD AB D",
            "uncorrupted": "Then, Aaron, Adam and Alan went to the store. Aaron and Adam gave a drink to",
            "corrupted": "Then, Aaron, Adam and Amy went to the store. Aaron and Adam gave a drink to",
            "answer_uncorrupted": " Alan",
            "answer_corrupted": " Amy",
            "incorrect_for_uncorrupted": [" Aaron", " Adam"],
            "incorrect_for_corrupted": [" Aaron", " Adam"],
        }
        lines = [json.dumps(line).replace("Alan", name) for name in ("Alan", "Amber", "Ana", "Allison")]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        command = [sys.executable, "-m", "ioi_mamba", "run", "layer-ablation", "--model", str(model), "--device", "cpu"]
        command += ["--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out")]
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds, peak = time.monotonic() - began, usage.ru_maxrss / 2**20  # Linux counts in KiB
    finally:
        shutil.rmtree(model, ignore_errors=True)
    with capsys.disabled():
        print(f"\nfull size: {size / 1e9:.2f} GB on disk, {seconds:.0f} s, peak {peak:.2f} GiB")
    assert process.returncode == 0
    assert size > 1.4e9
    assert peak <= 6
    manifest = json.loads((tmp_path / "out" / "layer-ablation.json").read_text())
    assert manifest["model"]["config"]["num_hidden_layers"] == 48
    assert re.fullmatch("[0-9a-f]{64}", manifest["model"]["weights_sha256"])
