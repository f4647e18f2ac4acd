"""Relevance rules: values stay, gradients are those of the layer made linear, and relevance is conserved where promised."""

import conftest  # noqa: F401  sets the environment before transformers is imported
import pytest
import torch
from families.tiny import CONFIGS, model_of, pairs_of
from scipy.stats import pearsonr

import ioi_mamba as im
from ioi_mamba.circuits import relevance
from ioi_mamba.circuits.relevance import DEFAULT_RULES, RULES
from ioi_mamba.circuits.variants import RELP
from ioi_mamba.passes.forward import forward
from ioi_mamba.passes.metrics import logit_diff
from ioi_mamba.tasks import ioi


def relevance_of_the_embeddings(model, pairs, rules):
    """(gradient times embedding summed over all, logit difference), each [pair]; and the logits."""
    leaf = []

    def embed(x):
        leaf.append(x.requires_grad_())
        return leaf[0]

    def differentiate(saved):
        metric = logit_diff(saved["hook_logits"][:, -1], pairs.answer, pairs.wrong)
        (gradient,) = torch.autograd.grad(metric.sum(), leaf)
        total = (gradient * leaf[0]).flatten(1).sum(1)
        return {"total": total.detach(), "metric": metric.detach(), "logits": saved["hook_logits"].detach()}

    edits, observe = relevance.hooks(model, rules)
    with torch.enable_grad():
        return forward(
            model, pairs.clean, edits | {"hook_embed": embed}, observe=observe, own_scan=True, reduce=differentiate
        )


@pytest.mark.parametrize("rules", [tuple(RULES), DEFAULT_RULES, ("silu",), ("norm",), ("ssm",)])
@pytest.mark.parametrize("family", CONFIGS)
def test_rules_leave_the_values_as_they_are(family, rules):
    model, pairs = model_of(family), pairs_of()
    found = relevance_of_the_embeddings(model, pairs, rules)
    want = im.run(model, pairs.clean)
    assert float((found["logits"] - want).abs().max()) <= 5e-5 * float(want.abs().max())
    assert torch.isfinite(found["total"]).all()


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_relevance_is_conserved_with_all_rules_where_there_is_no_bias_and_not_without_half(family):
    model, pairs = model_of(family), pairs_of()
    kept = {}
    for name, parameter in model._module.named_parameters():
        if name.endswith("conv1d.bias"):
            kept[name] = parameter.detach().clone()
            parameter.data.zero_()
    try:
        whole = relevance_of_the_embeddings(model, pairs, tuple(RULES))
        assert torch.allclose(whole["total"], whole["metric"], rtol=1e-3, atol=1e-4)
        twice = relevance_of_the_embeddings(model, pairs, DEFAULT_RULES)
        assert float((twice["total"] - twice["metric"]).abs().max()) > 0.05 * float(twice["metric"].abs().max())
    finally:
        for name, value in kept.items():
            model._module.get_parameter(name).data.copy_(value)


def test_the_score_of_an_edge_is_that_of_its_layer_made_linear_by_hand():
    """embed to the last layer of a Mamba-1: the change of the embedding carried through the layer, all slopes fixed."""
    model, pairs = model_of("mamba"), pairs_of()
    last = model.config.num_hidden_layers - 1
    mixer = model._module.backbone.layers[last].mixer
    sites = ("layer_input", "normalized_input", "conv", "ssm_output", "skip", "resid_post")
    name = lambda site: f"blocks.{last}.hook_{site}"
    got = im.read(model, pairs.clean, [*map(name, sites), "hook_embed", "hook_norm", "hook_logits"])
    changed = im.read(model, pairs.corrupted, ["hook_embed", "hook_logits"])
    values = {site: got[name(site)] for site in sites}
    with torch.no_grad():
        change = changed["hook_embed"] - got["hook_embed"]
        d_normalized = values["normalized_input"] / values["layer_input"] * change
        d_u, d_gate = mixer.in_proj(d_normalized).chunk(2, -1)
        d_conv = torch.zeros_like(d_u)
        K = mixer.conv1d.weight.shape[-1]
        for k in range(K):
            back = K - 1 - k
            d_conv[:, back:] += mixer.conv1d.weight[:, 0, k] * d_u[:, : d_u.shape[1] - back]
        d_x = torch.sigmoid(values["conv"]) * d_conv
        M = im.hidden_attention(model, pairs.clean, last)
        d_o = torch.einsum("bets,bse->bte", M, d_x) + mixer.D * d_x
        z = values["skip"]
        d_out = mixer.out_proj(torch.nn.functional.silu(z) * d_o + values["ssm_output"] * torch.sigmoid(z) * d_gate)
        d_norm = got["hook_norm"] / values["resid_post"] * d_out
        d_logits = model._module.lm_head(d_norm)[:, -1]
    ends = [
        logit_diff(logits[:, -1], pairs.answer, pairs.wrong) for logits in (got["hook_logits"], changed["hook_logits"])
    ]
    want = (logit_diff(d_logits, pairs.answer, pairs.wrong) / (ends[0] - ends[1]).abs()).mean()
    table = im.attribute(model, pairs, variant="relp").table
    score = table[(table["source"] == "embed") & (table["target"] == str(last))]["score"].iloc[0]
    assert score == pytest.approx(float(want), rel=2e-3)
    assert table.equals(im.attribute(model, pairs, method="eap", variant="relp").table)


def test_on_mini_scores_are_near_exact_effects():
    model = im.open_model("mini", device="cpu")
    pairs = ioi.generate(model.tokenizer, 8, 27, templates=ioi.ALIGNED_TEMPLATES)
    exact, relp, eap = (
        im.attribute(model, pairs, parts=True, **options).table
        for options in ({"method": "exact"}, {"variant": "relp"}, {"method": "eap"})
    )
    for rows in (exact["part"].isna(), exact["part"].notna()):
        near, far = (pearsonr(exact["score"][rows], table["score"][rows])[0] for table in (relp, eap))
        assert near > 0.97
        assert near > far


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        (RELP._replace(rules=("norms",)), "no rule 'norms'"),
        (RELP._replace(rules=("half", "norm")), "give both"),
        ("relap", "did you mean 'relp'"),
    ],
)
def test_what_is_no_variant_is_refused(variant, says):
    with pytest.raises(im.InputError, match=says):
        im.attribute(model_of("mamba"), pairs_of(), variant=variant)
