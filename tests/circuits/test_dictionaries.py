"""Dictionaries: formulas of their files by hand and by the libraries that write them, training, channels and components."""

import json

import conftest  # noqa: F401  sets the environment before transformers is imported
import golden
import pytest
import torch
from families.tiny import model_of, pairs_of
from safetensors.torch import save_file

import ioi_mamba as im
from ioi_mamba.circuits.dictionaries import (
    Dictionary,
    activations,
    channels,
    load_dictionary,
    principal_components,
    save_dictionary,
    trained,
    unexplained,
    values_of,
)

D, M = 6, 10


def tensors(seed=0, out=D):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, out), "b_dec": (out,), "threshold": (M,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def written(directory, config, weights, name="sae_weights.safetensors"):
    directory.mkdir(exist_ok=True)
    (directory / "cfg.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in weights.items()}, directory / name)
    return directory


def top(values, k):
    """The k largest of each row, one by one."""
    kept = torch.zeros_like(values)
    for row, own in enumerate(values):
        for place in sorted(range(len(own)), key=lambda j: -float(own[j]))[:k]:
            kept[row, place] = own[place]
    return kept


X = torch.randn(40, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("config", "formula"),
    [
        ({"architecture": "standard"}, lambda w: ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()),
        (
            {"architecture": "standard", "apply_b_dec_to_input": False},
            lambda w: (X @ w["W_enc"] + w["b_enc"]).relu(),
        ),
        (
            {"architecture": "topk", "k": 3, "apply_b_dec_to_input": False},
            lambda w: top((X @ w["W_enc"] + w["b_enc"]).relu(), 3),
        ),
        (
            {"architecture": "jumprelu", "apply_b_dec_to_input": False},
            lambda w: torch.where(
                X @ w["W_enc"] + w["b_enc"] > w["threshold"].clamp(min=0), X @ w["W_enc"] + w["b_enc"], 0.0
            ),
        ),
    ],
)
def test_a_file_of_saelens_means_its_formula(tmp_path, config, formula):
    weights = tensors()
    found = load_dictionary(written(tmp_path / "sae", config, weights))
    f = formula(weights)
    torch.testing.assert_close(found.encode(X), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.decode(f), f @ weights["W_dec"] + weights["b_dec"])
    assert 0 < (f > 0).float().mean() < 0.9


def test_activations_that_are_rescaled_by_the_decoders_norm_choose_and_give_the_same(tmp_path):
    weights = tensors(2)
    config = {"architecture": "topk", "k": 2, "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}
    found = load_dictionary(written(tmp_path / "sae", config, weights))
    norm = weights["W_dec"].norm(dim=1)
    f = top(((X @ weights["W_enc"] + weights["b_enc"]) * norm).relu(), 2)
    torch.testing.assert_close(found.encode(X), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.decode(f), (f / norm) @ weights["W_dec"] + weights["b_dec"], rtol=1e-5, atol=1e-5)


def test_a_transcoder_of_saelens_takes_nothing_off(tmp_path):
    weights = tensors(3, out=4)
    found = load_dictionary(written(tmp_path / "t", {"architecture": "skip_transcoder", "d_out": 4}, weights))
    assert found.shift is None
    torch.testing.assert_close(found.encode(X), (X @ weights["W_enc"] + weights["b_enc"]).relu())


@pytest.mark.parametrize("transcode", [False, True])
def test_a_file_of_sparsify_means_what_sparsify_makes_of_it(tmp_path, transcode):
    sparsify = pytest.importorskip("sparsify")
    torch.manual_seed(4)
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=3, transcode=transcode))
    with torch.no_grad():
        for weight in coder.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    coder.save_to_disk(tmp_path / "layer")
    found = load_dictionary(tmp_path / "layer")
    with torch.no_grad():
        want = coder(X)
        dense = torch.zeros(len(X), M).scatter(-1, want.latent_indices, want.latent_acts)
        torch.testing.assert_close(found.encode(X), dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.decode(dense), want.sae_out, rtol=1e-5, atol=1e-5)


def test_what_is_written_is_read_again(tmp_path):
    w = tensors(5)
    plain = (w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"])
    for number, each in enumerate(
        (
            Dictionary(*plain, shift=w["b_dec"], k=4),
            Dictionary(*plain, threshold=w["threshold"].abs()),
            Dictionary(*plain),
        )
    ):
        save_dictionary(each, tmp_path / str(number))
        again = load_dictionary(tmp_path / str(number))
        torch.testing.assert_close(again.encode(X), each.encode(X), rtol=1e-5, atol=1e-5)
        f = each.encode(X)
        torch.testing.assert_close(again.decode(f), each.decode(f))
    with pytest.raises(im.InputError, match="no sparse autoencoder"):
        save_dictionary(channels(D), tmp_path / "channels")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"architecture": "gated"}, {}, "of the kind 'gated', and standard"),
        ({"normalize_activations": "layer_norm"}, {}, "fold it into the weights"),
        ({"architecture": "topk"}, {"b_enc": torch.zeros(3)}, "b_enc has the shape"),
        ({"architecture": "topk", "k": M + 1}, {}, f"k is {M + 1}, of {M} features"),
        ({"architecture": "standard"}, {"b_dec": torch.zeros(2)}, "W_dec has the shape"),
        ({"architecture": "standard"}, {"W_dec": None}, "no dictionary that can be read"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, config, change, message):
    weights = {name: value for name, value in (tensors() | change).items() if value is not None}
    with pytest.raises(im.InputError, match=message):
        load_dictionary(written(tmp_path / "sae", config, weights))


def test_a_directory_without_the_files_is_refused(tmp_path):
    with pytest.raises(im.InputError, match=r"must have cfg\.json and"):
        load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    (tmp_path / "sae.safetensors").write_bytes(b"no tensors")
    with pytest.raises(im.InputError, match="no dictionary that can be read"):
        load_dictionary(tmp_path)


def sparse_data(n=3000, width=24, atoms=12, active=2):
    draw = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(atoms, width, generator=draw), dim=1)
    which = torch.rand(n, atoms, generator=draw).topk(active).indices
    amounts = torch.zeros(n, atoms).scatter(1, which, 0.5 + torch.rand(n, active, generator=draw))
    return directions, amounts @ directions + 0.5


def test_training_finds_the_directions_that_data_were_made_of_and_is_the_same_again():
    directions, data = sparse_data()
    one, other = (trained(data, data, size=24, k=2, steps=400, seed=3) for _ in range(2))
    assert torch.equal(one.W_dec, other.W_dec)
    found = torch.nn.functional.normalize(one.W_dec, dim=1)
    assert (directions @ found.T).max(1).values.min() > 0.95
    components = principal_components(data)
    few = components.encode(data)
    few[:, 2:] = 0
    left = (data - components.decode(few)).pow(2).sum() / (data - data.mean(0)).pow(2).sum()
    assert unexplained(one, data, data) < 0.05 < float(left)
    moved = trained(data @ torch.eye(24)[:, :20], data, size=24, k=2, steps=300)
    assert unexplained(moved, data[:, :20], data) < 0.5
    with pytest.raises(im.InputError, match="1 to 4 are active"):
        trained(data, data, size=4, k=5, steps=1)


def test_channels_and_components_leave_no_error_and_components_are_those_of_the_singular_values():
    _, data = sparse_data(200)
    for each in (channels(24), principal_components(data)):
        torch.testing.assert_close(each.decode(each.encode(data)), data, rtol=1e-4, atol=1e-4)
    _, sizes, vectors = torch.linalg.svd((data - data.mean(0)).double(), full_matrices=False)
    components = principal_components(data)
    for k in range(5):
        assert abs(float(vectors[k] @ components.W_dec[k].double())) == pytest.approx(1, abs=1e-4)
    spread = components.encode(data).pow(2).sum(0).sqrt()
    torch.testing.assert_close(spread[:12].double(), sizes[:12], rtol=1e-3, atol=1e-3)


def test_what_is_trained_on_are_the_values_of_every_token_and_none_of_padding():
    model, pairs = golden.model(), golden.golden_pairs()
    name = "blocks.1.hook_ssm_input"
    values = activations(values_of(model, pairs, [name]), name)
    want = torch.cat([im.read(model, tokens, [name])[name].flatten(0, 1) for tokens in (pairs.clean, pairs.corrupted)])
    torch.testing.assert_close(values, want, rtol=1e-4, atol=1e-4)
    shorter = im.Pairs.from_tokens(
        pairs.clean, pairs.corrupted, pairs.answer, pairs.wrong, lengths=torch.tensor([20, 20, 15, 20, 20])
    )
    assert len(activations(values_of(model, shorter, [name]), name)) == 2 * (4 * 20 + 15)


def test_one_is_trained_on_a_site_of_any_family_and_serves_as_features():
    for family, site, reads in (("mamba2", "ssm_write", None), ("zamba", "out_proj", "layer_input")):
        model, pairs = model_of(family), pairs_of()
        found = im.train_dictionary(model, pairs, 2, site=site, reads=reads, size=12, k=3, steps=40)
        features = im.features_at(model, 2, found, site=site, reads=reads)
        assert features.n == 12
        table = im.attribute(model, pairs, method="eap", features=[features]).table
        assert table["part"].str.startswith(features.name).sum() == 13
    with pytest.raises(im.InputError, match="Unknown hook name"):
        im.train_dictionary(model, pairs, 2, site="no_such")
