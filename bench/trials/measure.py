"""What the issue asks of a model, of M stacked models at once, in plain torch."""

import torch
import torch.nn.functional as F

import data
from data import corpus, greater_than, ioi, tokenizer
from model import embed, forward, linear, mixer, norm


def head(p, x):
    return linear(x, p["backbone.embeddings.weight"])


def tile(tokens, M):
    return tokens[None].expand(M, *tokens.shape)


def pad(tokens):
    return F.pad(tokens, (0, data.LONGEST - tokens.shape[1]))


def at_last(x, last):
    """x [M, B, L, D] -> [M, B, 1, D]."""
    return x.gather(2, last[None, :, None, None].expand(len(x), -1, 1, x.shape[-1]))


def accuracy(logits, sets):
    """logits [M, B, V] -> right [M, B], probability among the choices."""
    M = len(logits)
    choices = sets["choices"]
    among = logits.gather(2, choices.clamp(min=0)[None].expand(M, -1, -1)).masked_fill((choices < 0)[None], -1e30)
    own = logits.gather(2, sets["answer"][None, :, None].expand(M, -1, -1))
    is_answer = choices == sets["answer"][:, None]
    return (own >= among.amax(2, keepdim=True))[..., 0].float(), (among.softmax(2) * is_answer).sum(2)


def last_logits(p, n, tokens, last, keep=None):
    """tokens [B, L]."""
    M = len(p["backbone.norm_f.weight"])
    return head(p, at_last(forward(p, tile(tokens, M), n, keep), last))[:, :, 0]


def of_published(p, n, device, n_pairs):
    names, whole = {}, {}
    for key, pairs in data.published(n_pairs).items():
        sets = data.as_tensors(pairs, device)
        out = last_logits(p, n, sets["clean"], sets["last"])
        names[key] = accuracy(out, sets)[0].mean(1)
        whole[key] = (out.argmax(2) == sets["answer"]).float().mean(1)
    lowest = torch.stack(list(names.values())).amin(0), torch.stack(list(whole.values())).amin(0)
    return {"published among names (lowest set)": lowest[0].tolist(), "published of all (lowest set)": lowest[1].tolist()}


def of_choices(p, n, rows, device, chunk=1024):
    """Share of questions whose answer is the likeliest choice."""
    tokens, first, end, question, is_answer = (torch.as_tensor(v.astype("int64")).to(device) for v in rows)
    M = len(p["backbone.norm_f.weight"])
    scores = []
    for part in torch.arange(len(tokens), device=device).split(chunk):
        x = tokens[part]
        out = head(p, forward(p, tile(x, M), n))[:, :, :-1].log_softmax(-1)
        each = out.gather(3, tile(x[:, 1:, None], M))[..., 0]  # of token k + 1, at k
        k = torch.arange(x.shape[1] - 1, device=device) + 1
        inside = (k >= first[part, None]) & (k < end[part, None])
        scores.append((each * inside).sum(2))
    scores = torch.cat(scores, 1)
    n_q = int(question.max()) + 1
    best = torch.full((M, n_q), -1e30, device=device).scatter_reduce(1, tile(question, M), scores, "amax")
    own = torch.full((M, n_q), -1e30, device=device)
    own[:, question[is_answer == 1]] = scores[:, is_answer == 1]
    return (own >= best)[:, own[0] > -1e29].float().mean(1)


def of_years(p, n, device, n_pairs):
    pairs = greater_than.generate(tokenizer(), n_pairs, 28)
    sets = data.as_tensors(pairs, device)
    return accuracy(last_logits(p, n, sets["clean"], sets["last"]), sets)[0].mean(1)


def of_removal(p, n, device, n_pairs):
    """Accuracy and probability [M, layer + 1], the last with nothing removed."""
    sets = data.as_tensors(ioi.generate(tokenizer(), n_pairs, 27), device)
    scores = []
    for removed in range(n + 1):
        M, B = len(p["backbone.norm_f.weight"]), len(sets["clean"])
        keep = torch.ones(n, M, B, 1, 1, device=device)
        if removed < n:
            keep[removed] = 0
        scores.append(torch.stack([v.mean(1) for v in accuracy(last_logits(p, n, sets["clean"], sets["last"], keep), sets)]))
    return torch.stack(scores, 2)  # [2, M, layer + 1]


def swapped_logits(p, n, sets, kept, values):
    """kept [M, C, n] bool: layers that keep their conv input; values: per layer [M, B, L, E]. -> [M, C, B, V]"""
    M, C, _ = kept.shape
    B, L = sets["clean"].shape
    stream = embed(p, tile(sets["clean"].repeat(C, 1), M))
    for i in range(n):
        mask = ~kept[:, :, i].repeat_interleave(B, 1)[:, :, None, None]
        out, _ = mixer(p, i, norm(stream, p[f"backbone.layers.{i}.norm.weight"]), (mask, values[i].repeat(1, C, 1, 1)))
        stream = stream + out
    x = at_last(norm(stream, p["backbone.norm_f.weight"]), sets["last"].repeat(C))
    return head(p, x)[:, :, 0].view(M, C, B, -1)


def of_cross_talk(p, n, device, n_pairs, most=8, threshold=0.9):
    """The greedy circuits: per model a list of (template, corruption, layers, accuracy)."""
    M = len(p["backbone.norm_f.weight"])
    found = [[] for _ in range(M)]
    for template in ioi.TEMPLATES:
        for corruption in ioi.CORRUPTIONS:
            pairs = ioi.generate(tokenizer(), n_pairs, 27, templates=[template], corruptions=[corruption])
            sets = data.as_tensors(pairs, device)
            stream, values = embed(p, tile(sets["corrupted"], M)), []
            for i in range(n):
                out, z = mixer(p, i, norm(stream, p[f"backbone.layers.{i}.norm.weight"]))
                stream, values = stream + out, [*values, z]
            circuit = [[] for _ in range(M)]
            done = [None] * M
            kept = torch.zeros(M, 1, n, dtype=torch.bool, device=device)
            for m, score in enumerate(accuracy(swapped_logits(p, n, sets, kept, values)[:, 0], sets)[0].mean(1).tolist()):
                done[m] = score if score > threshold else None
            for _ in range(min(most, n)):
                if all(d is not None for d in done):
                    break
                kept = torch.eye(n, dtype=torch.bool, device=device).expand(M, n, n).clone()
                for m in range(M):
                    kept[m, :, circuit[m]] = True
                out = swapped_logits(p, n, sets, kept, values)
                M_, C, B, V = out.shape
                scores = [accuracy(out[:, c], sets) for c in range(C)]
                right = torch.stack([s[0].mean(1) for s in scores], 1).tolist()
                probable = torch.stack([s[1].mean(1) for s in scores], 1).tolist()
                for m in range(M):
                    if done[m] is None:
                        left = [i for i in range(n) if i not in circuit[m]]
                        best = max(left, key=lambda i: (right[m][i], probable[m][i], -i))
                        circuit[m].append(best)
                        done[m] = right[m][best] if right[m][best] > threshold else None
            for m in range(M):
                found[m].append((pairs.labels["template"][0], corruption, circuit[m], done[m]))
    return found


def outputs_of(p, n, tokens):
    M = len(p["backbone.norm_f.weight"])
    outs = [embed(p, tile(tokens, M))]
    stream = outs[0]
    for i in range(n):
        out, _ = mixer(p, i, norm(stream, p[f"backbone.layers.{i}.norm.weight"]))
        outs.append(out)
        stream = stream + out
    return outs


def patched(p, n, sets, corrupted, mask, sinks=None, outs=None):
    """mask [M, source, sink] of how much is patched -> logits [M, B, V]."""
    M = len(mask)
    outs = [] if outs is None else outs
    outs.append(embed(p, tile(sets["clean"], M)))
    stream = outs[0]
    for j in range(n + 1):
        x = stream
        for i in range(j + 1):
            x = x + mask[:, i, j, None, None, None] * (corrupted[i] - outs[i])
        if sinks is not None:
            sinks.append(x)
        if j < n:
            out, _ = mixer(p, j, norm(x, p[f"backbone.layers.{j}.norm.weight"]))
            outs.append(out)
            stream = stream + out
    x = norm(at_last(x, sets["last"]), p["backbone.norm_f.weight"])
    return head(p, x)[:, :, 0]


def difference(logits, sets):
    both = torch.stack([sets["answer"], sets["wrong"]], 1)[None].expand(len(logits), -1, -1)
    two = logits.gather(2, both)
    return two[..., 0] - two[..., 1]


def of_edges(p, n, device, n_pairs, target=0.85, steps=5):
    """EAP-IG as the package has it ("paper"), and the smallest circuit above the target."""
    M = len(p["backbone.norm_f.weight"])
    pairs = ioi.generate(tokenizer(), n_pairs, 27, templates=ioi.ALIGNED_TEMPLATES)
    sets = data.as_tensors(pairs, device)
    upper = torch.triu(torch.ones(n + 1, n + 1, device=device))[None].expand(M, -1, -1)
    with torch.no_grad():
        corrupted = outputs_of(p, n, sets["corrupted"])
        whole = difference(patched(p, n, sets, corrupted, upper * 0), sets)
        none = difference(patched(p, n, sets, corrupted, upper), sets)
    total = torch.zeros(M, n + 1, n + 1, device=device)
    scale = (whole - none).abs().clamp(min=1e-4)
    for k in range(steps - 1):
        sinks, outs = [], []
        with torch.enable_grad():
            leaf = {name: value.detach() for name, value in p.items()}
            leaf["backbone.embeddings.weight"] = leaf["backbone.embeddings.weight"].requires_grad_()
            out = patched(leaf, n, sets, corrupted, upper * (k / (steps - 1)), sinks, outs)
            grads = torch.autograd.grad(((difference(out, sets) - none) / scale).sum(), sinks)
        with torch.no_grad():
            for j in range(n + 1):
                for i in range(j + 1):
                    total[:, i, j] += (grads[j] * (corrupted[i] - outs[i])).sum((1, 2, 3)) / len(pairs)
    edges = [(i, j) for j in range(n + 1) for i in range(j + 1)]
    scores = torch.stack([total[:, i, j] for i, j in edges], 1) / steps
    order = scores.sort(dim=1, stable=True).indices

    def right(sizes):
        mask = upper.clone()
        for m, size in enumerate(sizes):
            for e in order[m, :size].tolist():
                mask[m][edges[e]] = 0
        with torch.no_grad():
            return accuracy(patched(p, n, sets, corrupted, mask), sets)[0].mean(1).tolist()

    low, high = [0] * M, [len(edges) - 1] * M
    while any(a < b for a, b in zip(low, high)):
        middle = [-(-(a + b) // 2) for a, b in zip(low, high)]
        for m, value in enumerate(right(middle)):
            if low[m] < high[m]:
                low[m], high[m] = (low[m], middle[m] - 1) if value > target else (middle[m], high[m])
    sizes = [min(len(edges) - 1, a + 1) for a in low]
    reached = right(sizes)
    found = []
    for m in range(M):
        kept = {edges[e] for e in order[m, : sizes[m]].tolist()}
        live = pruned(kept, n)
        layers = sorted({v for i, j in live for v in ((i - 1) if i else -1, j)} - {-1, n})
        named = [("embed" if i == 0 else str(i - 1)) + ">" + ("output" if j == n else str(j)) for i, j in sorted(live)]
        found.append({"edges kept": sizes[m], "of": len(edges), "edges on a path": len(live), "layers": layers,
                      "accuracy": reached[m], "edges": named})  # fmt: skip
    return found


def pruned(kept, n):
    """Edges (source 0 = embed, 1 + layer; sink layer or n = output) on a path from embed to output."""
    forward_, back = {0}, {n + 1}
    for _ in range(n + 2):
        forward_ |= {j + 1 for i, j in kept if i in forward_}
        back |= {i for i, j in kept if j + 1 in back}
    return {(i, j) for i, j in kept if i in forward_ and j + 1 in back}


def everything(p, n, rows, device, small=False):
    """One dict of results a model."""
    M = len(p["backbone.norm_f.weight"])
    with torch.no_grad():
        table = of_published(p, n, device, 4 if small else 200)
        results = [{name: values[m] for name, values in table.items()} for m in range(M)]
        for (source, what), each in rows.items():
            for m, value in enumerate(of_choices(p, n, each, device).tolist()):
                results[m].setdefault("choices", {})[f"{source} / {what}"] = round(value, 4)
        for m, value in enumerate(of_years(p, n, device, 8 if small else 200).tolist()):
            results[m]["greater-than"] = value
        removal = of_removal(p, n, device, 4 if small else 40)
        circuits = of_cross_talk(p, n, device, 2 if small else 50)
    edges = of_edges(p, n, device, 6 if small else 100)
    for m in range(M):
        right, probable = removal[:, m].tolist()
        result = results[m]
        result["removal accuracy by layer, then none"] = [round(v, 3) for v in right]
        result["removal probability"] = [round(v, 3) for v in probable]
        result["layers that matter (accuracy - .03)"] = [i for i in range(n) if right[i] < right[n] - 0.03]
        sizes = [len(c[2]) for c in circuits[m]]
        result["cross-talk layers, mean"] = sum(sizes) / len(sizes)
        result["cross-talk circuits"] = [(t, c, layers, None if a is None else round(a, 3)) for t, c, layers, a in circuits[m]]
        result["cross-talk different"] = len({tuple(sorted(c[2])) for c in circuits[m]})
        result["eap-ig"] = edges[m]
        held = [v for k, v in result["choices"].items() if "frames" in k]
        result["held-out frames, mean and lowest"] = [sum(held) / len(held), min(held)]
    return results
