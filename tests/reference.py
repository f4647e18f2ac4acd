"""A Mamba forward pass spelled out in plain torch: the tests' independent oracle.

No nnsight and no transformers; the recurrence is a loop over tokens and every value has its hook's name. It runs in
the dtype of its weights, float64 for comparisons, and gradients flow through all of it.
"""

import torch
import torch.nn.functional as F

from ioi_mamba.passes.metrics import logit_diff, normalized_logit_diff


def weights_of(model, dtype=torch.float64):
    """Tensors by their checkpoint names, with the few sizes that shapes do not tell."""
    tensors = {name: tensor.detach().to(dtype) for name, tensor in model._module.state_dict().items()}
    return tensors | {"layers": model.config.num_hidden_layers, "eps": model.config.layer_norm_epsilon}


def run(weights, tokens, edits=None, values=None):
    """Every value of the pass by hook name (`blocks.1.hook_h.3`, `blocks.1.hook_conv_slice.-1`, ...).

    edits: hook name -> new value or function of the value. values: a dictionary to fill, for edits that look at what
    the same pass had before.
    """
    edits, values = edits or {}, {} if values is None else values

    def at(name, value):
        edit = edits.get(name)
        if edit is not None:
            value = edit(value) if callable(edit) else edit.to(value.dtype)
        values[name] = value
        return value

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + weights["eps"]) * weight

    stream = at("hook_embed", weights["backbone.embeddings.weight"][tokens])
    for layer in range(weights["layers"]):
        stream = _block(
            lambda name, layer=layer: weights.get(f"backbone.layers.{layer}.{name}"),
            lambda site, value, layer=layer: at(f"blocks.{layer}.hook_{site}", value),
            stream,
            norm,
        )
    stream = at("hook_norm", norm(stream, weights["backbone.norm_f.weight"]))
    at("hook_logits", stream @ weights["lm_head.weight"].T)
    return values


def _linear(x, weight, bias=None):
    return x @ weight.T if bias is None else x @ weight.T + bias


def _block(weight, at, stream, norm):
    n_pos = stream.shape[1]
    stream = at("resid_pre", stream)
    x = at("normalized_input", norm(at("layer_input", stream.clone()), weight("norm.weight")))
    u, gate = _linear(x, weight("mixer.in_proj.weight"), weight("mixer.in_proj.bias")).chunk(2, -1)
    u, gate = at("in_proj", u), at("skip", gate)

    taps = weight("mixer.conv1d.weight")[:, 0]
    K = taps.shape[1]
    past = at("conv_start", u.new_zeros(len(u), K - 1, u.shape[2]))
    padded = torch.cat((past, u), 1)
    conv = sum(at(f"conv_slice.{k + 1 - K}", taps[:, k] * padded[:, k : k + n_pos]) for k in range(K))
    bias = weight("mixer.conv1d.bias")
    x = at("ssm_input", F.silu(at("conv", conv if bias is None else conv + bias)))

    A = -torch.exp(weight("mixer.A_log"))
    N = A.shape[1]
    low, B, C = _linear(x, weight("mixer.x_proj.weight")).split((weight("mixer.dt_proj.weight").shape[1], N, N), -1)
    low, B, C = at("delta_1", low), at("B", B), at("C", C)
    delta = at("delta_2", _linear(low, weight("mixer.dt_proj.weight"), weight("mixer.dt_proj.bias")))
    delta = at("delta", F.softplus(delta))
    A = at("A", A)
    A_bar = at("A_bar", torch.exp(delta[..., None] * A))
    B_bar = at("B_bar", delta[..., None] * B[:, :, None, :])
    Bx = at("ssm_write", B_bar * x[..., None])
    h, y = at("h_start", x.new_zeros(len(x), *A.shape)), []
    for t in range(n_pos):
        h = at(f"h.{t}", A_bar[:, t] * h + Bx[:, t])
        y.append((h * C[:, t, None, :]).sum(-1))
    y = at("y", torch.stack(y, 1))
    y = at("after_skip", at("ssm_output", y + weight("mixer.D") * x) * F.silu(gate))
    out = at("out_proj", _linear(y, weight("mixer.out_proj.weight"), weight("mixer.out_proj.bias")))
    return at("resid_post", stream + out)


def logits(weights, tokens, edits=None):
    return run(weights, tokens, edits)["hook_logits"]


def states(values, layer, n_pos):
    """[batch, pos, E, N] out of the states by position."""
    return torch.stack([values[f"blocks.{layer}.hook_h.{t}"] for t in range(n_pos)], 1)


def source_hook(node):
    return "hook_embed" if node == "embed" else f"blocks.{node}.hook_out_proj"


def patch_edits(weights, corrupted, values, amounts, detach=False):
    """The edits that carry out equation 11 (13): `amounts` maps (source, target, part, position) to alpha.

    corrupted: values of the corrupted run. values: the dictionary the patched pass fills. A part has source = target.
    """
    n_layers, (_, n_pos, _) = weights["layers"], corrupted["hook_logits"].shape
    by_target, edits = {}, {}
    for (source, target, part, position), alpha in amounts.items():
        spread = torch.zeros(n_pos, 1, dtype=corrupted["hook_embed"].dtype)
        spread[slice(None) if position is None else position] = alpha
        by_target.setdefault((target, part), []).append((source, spread))
    for (target, part), sources in by_target.items():
        block = f"blocks.{target}.hook_"
        if part is None:
            name = f"blocks.{n_layers - 1}.hook_resid_post" if target == "output" else block + "layer_input"

            def toward(x, sources=sources):
                for source, spread in sources:
                    now = values[source_hook(source)]
                    x = x + spread * (corrupted[source_hook(source)] - (now.detach() if detach else now))
                return x
        elif part == "ssm":
            name = block + "y"

            def toward(y, sources=sources, block=block, layer=int(target)):
                h = states(corrupted, layer, n_pos)
                return y + sum(spread for _, spread in sources) * (_read(h, values[block + "C"]) - y)
        else:
            name = block + (f"conv_slice.{part.removeprefix('conv')}" if part.startswith("conv") else part)

            def toward(x, sources=sources, name=name):
                return x + sum(spread for _, spread in sources) * (corrupted[name] - x)

        edits[name] = toward
    return edits


def _read(h, C):
    return (h * C[:, :, None, :]).sum(-1)


def patch_edges(weights, pairs, items):
    """Values of the clean run with these items (source, target, position, part) patched, one by one and slowly."""
    corrupted, values = run(weights, pairs.corrupted), {}
    amounts = {(item.source, item.target, item.part, item.position): 1.0 for item in items}
    return run(weights, pairs.clean, patch_edits(weights, corrupted, values, amounts), values)


def attributions(weights, pairs, alphas, variant, path_parts, conv_width):
    """Mean over `alphas` of gradient times difference: (source, target, part) -> [pair, pos].

    path_parts: whether the path interpolates the conv slices as well as the edges.
    """
    n, rows = weights["layers"], torch.arange(len(pairs))
    nodes = ["embed", *map(str, range(n)), "output"]
    kinds = [(nodes[i], nodes[j], None) for j in range(1, n + 2) for i in range(j)]
    slices = [f"conv{k + 1 - conv_width}" for k in range(conv_width)]
    last = lambda values: values["hook_logits"][rows, pairs.last]
    difference = lambda values: logit_diff(last(values), pairs.answer, pairs.wrong)
    corrupted, clean = run(weights, pairs.corrupted), run(weights, pairs.clean)
    total = {}
    for alpha in alphas:
        amounts = dict.fromkeys([(*kind, None) for kind in kinds], alpha)
        if path_parts:
            amounts |= {(str(i), str(i), part, None): alpha for i in range(n) for part in slices}
        values, unpatched = {}, {}
        edits = patch_edits(weights, corrupted, values, amounts, variant == "detached")
        for i in range(n):  # the slices as the pass had them before the path moved them
            for part in slices:
                name = f"blocks.{i}.hook_conv_slice.{part[4:]}"
                move = edits.get(name, lambda x: x)
                edits[name] = lambda x, name=name, move=move, unpatched=unpatched: move(unpatched.setdefault(name, x))
        edits["hook_embed"] = lambda x: x.requires_grad_()
        run(weights, pairs.clean, edits, values)
        now = clean if variant == "clean-difference" else values | unpatched
        metric = normalized_logit_diff(difference(values), difference(clean), difference(corrupted)).sum()
        gradient = lambda name, metric=metric, values=values: torch.autograd.grad(
            metric, values[name], retain_graph=True
        )[0]

        def add(kind, grad, change):
            total[kind] = total.get(kind, 0) + (grad * change).sum(-1).detach() / len(alphas)

        for source, target, part in kinds:
            sink = f"blocks.{n - 1}.hook_resid_post" if target == "output" else f"blocks.{target}.hook_layer_input"
            name = source_hook(source)
            add((source, target, part), gradient(sink), corrupted[name] - now[name])
        for i in range(n):
            block, node = f"blocks.{i}.hook_", str(i)
            for part in slices:
                name = f"{block}conv_slice.{part[4:]}"
                add((node, node, part), gradient(block + "conv"), corrupted[name] - now[name])
            y = _read(states(corrupted, i, pairs.clean.shape[1]), now[block + "C"]) - now[block + "y"]
            add((node, node, "ssm"), gradient(block + "y"), y)
            add(
                (node, node, "skip"),
                gradient(block + "skip"),
                corrupted[block + "skip"] - now[block + "skip"],
            )
    return total
