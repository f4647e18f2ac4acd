"""Opening a model: from a directory, with any dtype, and everything that cannot be opened."""

import json
import shutil

import conftest  # noqa: F401
import golden
import pytest
import torch

import ioi_mamba as im
from ioi_mamba.errors import InputError
from ioi_mamba.passes.forward import forward


@pytest.fixture
def copy(tmp_path):
    """A directory with the golden model, to be spoilt."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden.DIRECTORY / name, tmp_path / name)
    return tmp_path


def set_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_directory_without_a_tokenizer_opens_with_token_ids_as_its_text(copy):
    model = im.open_model(str(copy), device="cpu")
    assert model.tokenizer("17 4 511").input_ids == [17, 4, 511]
    assert model.tokenizer.decode([17, 4, 511]).split() == ["17", "4", "511"]
    assert model.tokenizer.bos_token_id == 0
    by_text = im.run(model, torch.tensor([model.tokenizer("0 17 4").input_ids]), {})
    assert torch.equal(by_text, im.run(golden.model(), torch.tensor([[0, 17, 4]]), {}))


def test_a_path_object_opens_as_its_text_does(copy):
    assert im.open_model(copy, device="cpu").config.num_hidden_layers == 4


def test_an_opened_model_is_frozen_and_in_evaluation_mode():
    module = golden.model()._module
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(("dtype", "noise"), [("bfloat16", 0.05), ("float16", 0.01), ("float64", 1e-5)])
def test_every_dtype_computes_the_scan_in_at_least_float32_and_takes_edits(dtype, noise):
    model = im.open_model(str(golden.DIRECTORY), device="cpu", dtype=dtype)
    tokens, stock = golden.golden_pairs().clean, im.run(golden.model(), golden.golden_pairs().clean, {})
    hooks = [
        f"blocks.1.hook_{site}" for site in ("ssm_input", "B", "delta", "A_bar", "h", "y", "after_skip", "out_proj")
    ]
    values = forward(model, tokens, reads=hooks)
    assert values["blocks.1.hook_h"].dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert values["blocks.1.hook_out_proj"].dtype == getattr(torch, dtype)
    assert golden.relative_error(values["hook_logits"], stock) < noise
    for hook in hooks:
        back, half = (im.run(model, tokens, {hook: v}) for v in (values[hook], values[hook] / 2))
        assert torch.isfinite(half).all()
        assert golden.relative_error(back, values["hook_logits"]) < noise
        want = im.run(golden.model(), tokens, {hook: lambda x: x / 2})
        assert golden.relative_error(half, want) < noise
        assert golden.relative_error(half, stock) > 2 * noise


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no-such-organisation/no-such-model", "Unknown model 'no-such-organisation/no-such-model'"),
        ("no such thing", "Unknown model 'no such thing'"),
        ("", "''"),
    ],
)
def test_an_unknown_model_is_refused_by_its_name(name, says):
    with pytest.raises(InputError, match=says) as error:
        im.open_model(name, device="cpu")
    assert "\n" not in str(error.value)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}.*has no config.json"):
        im.open_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("text", ["{", "", "\xff\xfe", "[1, 2]", "3"])
def test_a_config_that_is_no_json_object_is_refused(copy, text):
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config.json"):
        im.open_model(str(copy), device="cpu")


def test_a_model_that_is_no_mamba_is_refused(tiny_gpt2_dir):
    with pytest.raises(InputError, match="is a gpt2 model, not a Mamba"):
        im.open_model(str(tiny_gpt2_dir), device="cpu")


def test_any_architecture_opens_on_request(tiny_gpt2_dir):
    model = im.open_model(str(tiny_gpt2_dir), device="cpu", any_architecture=True)
    with pytest.raises(InputError, match="A gpt2 model has none of these sites"):
        im.read(model, torch.tensor([[1, 2]]), ["hook_embed"])
    assert model.config.model_type == "gpt2"


def test_weights_of_another_family_than_the_config_says_are_refused(copy):
    set_config(copy, model_type="mamba2", num_heads=4, head_dim=32, n_groups=1)
    for any_architecture in (False, True):
        with pytest.raises(InputError, match=r"weights of .* cannot be loaded"):
            im.open_model(str(copy), device="cpu", any_architecture=any_architecture)


def test_a_config_that_makes_no_model_is_refused_in_a_sentence(copy):
    set_config(copy, model_type="mamba2", num_heads=4, head_dim=16, n_groups=1)
    with pytest.raises(InputError, match=r"cannot be loaded: .*Inconsistent configuration") as error:
        im.open_model(str(copy), device="cpu")
    assert "\n" not in str(error.value)


def test_another_activation_is_refused(copy):
    set_config(copy, hidden_act="gelu")
    with pytest.raises(InputError, match="uses the activation 'gelu'"):
        im.open_model(str(copy), device="cpu")


def test_a_directory_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights of .* cannot be loaded"):
        im.open_model(str(copy), device="cpu")


def test_broken_weights_are_refused(copy):
    (copy / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"weights of .* cannot be loaded"):
        im.open_model(str(copy), device="cpu")


def test_weights_of_another_size_are_refused(copy):
    set_config(copy, hidden_size=32, intermediate_size=64)
    with pytest.raises(InputError, match=r"weights of .* cannot be loaded"):
        im.open_model(str(copy), device="cpu")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float8"}, "dtype 'float8' is unknown: use one of float32"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
        ({"backend": "cloud"}, "backend 'cloud' is unknown"),
    ],
)
def test_an_option_that_is_not_there_is_refused_by_its_value(options, says):
    with pytest.raises(InputError, match=says) as error:
        im.open_model(str(golden.DIRECTORY), **options)
    assert "\n" not in str(error.value)


def test_a_dtype_is_taken_as_torch_has_it(tiny_mamba_dir):
    model = im.open_model(str(tiny_mamba_dir), device="cpu", dtype=torch.bfloat16)
    assert model._module.dtype == torch.bfloat16
    with pytest.raises(InputError, match="dtype 'int8' is unknown"):
        im.open_model(str(tiny_mamba_dir), dtype=torch.int8)
