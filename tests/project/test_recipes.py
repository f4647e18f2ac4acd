"""The recipes of docs/recipes.md run, and give what the stock model gives by plain hooks of torch."""

import conftest  # noqa: F401  sets the environment before transformers is imported
import pytest
import torch
from pages import DOCS, left_by

import ioi_mamba as im


@pytest.fixture
def left(tmp_path_factory):
    """The names that each block of the page leaves."""
    return left_by(tmp_path_factory, DOCS / "recipes.md")


def test_features_are_scored_and_patched(left):
    found = left[0]
    assert len(found["strongest"]) == 8
    clean = im.run(found["model"], found["pairs"].clean)
    assert found["patched"].shape == clean.shape
    assert (found["patched"] - clean).abs().max() > 0


def test_causal_tracing_is_that_of_the_stock_model_under_hooks(left):
    found = left[1]
    model, tokens, noise, subject = (found[name] for name in ("model", "tokens", "noise", "subject"))
    stock, answer, trace = model._module, found["answer"], found["trace"]
    clean = {}

    def probability(drown, give=None):
        def embed(module, inputs, output):
            output = output.clone()
            output[:, subject] += noise
            return output

        def block(module, inputs, output):
            output = output.clone()
            output[:, give[1]] = clean[give[0]][:, give[1]]
            return output

        handles = [stock.backbone.embeddings.register_forward_hook(embed)] if drown else []
        if give:
            handles.append(stock.backbone.layers[give[0]].register_forward_hook(block))
        with torch.no_grad():
            logits = stock(tokens, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return float(logits.softmax(-1)[:, answer].mean())

    keep = [
        layer.register_forward_hook(lambda module, inputs, output, k=k: clean.__setitem__(k, output[:1].clone()))
        for k, layer in enumerate(stock.backbone.layers)
    ]
    whole = probability(False)
    for handle in keep:
        handle.remove()
    assert found["probability"]({}) == pytest.approx(whole, abs=1e-5)
    drowned = found["probability"]({"hook_embed": found["noised"]})
    assert drowned == pytest.approx(probability(True), abs=1e-5)
    assert drowned < whole
    for layer, place in ((0, trace.columns[0]), (len(trace) - 3, trace.columns[1])):
        assert trace.loc[layer, place] == pytest.approx(probability(True, (layer, place)), abs=1e-4)
    # The last stream at the last token is all that the answer is read from.
    assert trace.iloc[-1, -1] == pytest.approx(whole, abs=1e-4)
    assert trace.iloc[0, 0] > drowned


def test_hidden_attention_is_the_matrix_that_makes_y_of_x(left):
    found = left[2]
    model, layer, matrix = found["model"], found["layer"], found["matrix"]
    names = [f"blocks.{layer}.hook_{site}" for site in ("ssm_input", "y")]
    x, y = (each[0] for each in im.read(model, found["pair"].clean, names).values())
    torch.testing.assert_close(torch.einsum("ets,se->te", matrix, x), y, rtol=1e-4, atol=1e-3)
    sizes = found["sizes"].pivot(index="to", columns="from", values="size").loc[found["labels"], found["labels"]]
    torch.testing.assert_close(torch.tensor(sizes.to_numpy()), matrix.abs().mean(0))
    assert (torch.tensor(sizes.to_numpy()).triu(1) == 0).all()
    assert found["chart"].to_dict()["mark"]["type"] == "rect"
