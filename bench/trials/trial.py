"""Train groups of stacked models side by side within a time limit, then measure them.

    python trial.py --seconds 540 --out DIR [--tiny] [--plan plan.json]
"""

import argparse
import json
import math
import os
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

START = time.perf_counter()


def say(*words):
    print(f"[{time.perf_counter() - START:6.1f}]", *words, flush=True)


SHORT = 56  # documents of at most so many positions are run apart from longer ones
# What every recipe has unless it says otherwise. ramp: share of the steps until the mixture is complete; it begins with
# the published prompts at `first_share`.
RECIPE = dict(drop_until=2.0, seed=0, rate=3e-3, decay=0.05, drop=0.0, warmup=0.03, final=0.02, answer=30.0, ramp=0.0, first_share=0.7,
              published=0.15, betas=(0.9, 0.98), rescale=True, shares={})  # fmt: skip


class Group:
    """M models of one shape."""

    def __init__(self, name, shape, recipes, pools, shares, device, batch):
        from transformers import MambaConfig, MambaForCausalLM

        from data import tokenizer
        from model import Shapes

        self.name, self.shape, self.device = name, shape, device
        self.recipes = [RECIPE | recipe for recipe in recipes]
        self.M, self.n = len(recipes), shape["layers"]
        states = []
        for recipe in self.recipes:
            config = MambaConfig(
                vocab_size=len(tokenizer()), hidden_size=shape["hidden"], state_size=shape["state"],
                num_hidden_layers=self.n, conv_kernel=4, bos_token_id=0, eos_token_id=0, pad_token_id=0,
                tie_word_embeddings=True, rescale_prenorm_residual=recipe["rescale"],
            )  # fmt: skip
            torch.manual_seed(recipe["seed"])
            states.append(MambaForCausalLM(config).state_dict())
        self.shapes = Shapes(states[0])
        self.theta = torch.stack([self.shapes.flat(state) for state in states]).to(device).requires_grad_()
        self.decayed = self.shapes.matrices().to(device)
        self.m1, self.m2 = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        column = lambda key: torch.tensor([float(r[key]) for r in self.recipes], device=device)
        self.decay, self.answer = column("decay")[:, None], column("answer")
        self.drop = column("drop")[None, :, None, None, None].clone()
        self.first_drop, self.drop_until = self.drop.clone(), column("drop_until")[None, :, None, None, None]
        # rate, and the two corrections of Adam's means
        self.rate = torch.zeros(self.M, 1, device=device)
        self.corrections = torch.ones(2, device=device)
        self.pools, self.shares, self.batch = pools, shares, batch
        # How many of a batch's documents are short, by the full mixture; the others are weighted to make up for it.
        self.loss = torch.zeros(self.M, device=device)
        self.right = torch.zeros(self.M, device=device)
        self.inputs = None
        self.history = []
        self.done_steps, self.steps = 0, None

    # -- data: short and long documents of all sources stand in two pools, by source
    def split(self):
        p_long = sum(share * self.pools[s]["long share"] for s, share in self.shares.items())
        n_long = round(self.batch * p_long)
        return {"short": self.batch - n_long} | ({"long": n_long} if n_long else {})

    def draw(self, step, n_steps):
        """Indices into the pools for n_steps from `step` on: by kind [n_steps, M, rows]."""
        names = list(self.shares)
        out = {}
        g = torch.Generator().manual_seed(1000 + step)
        mixtures = []
        for recipe in self.recipes:
            share = dict(self.shares) | recipe["shares"]
            rest = sum(v for k, v in share.items() if k != "published prompts")
            first = recipe["published"]
            if recipe["ramp"]:
                done = min(1.0, step / (recipe["ramp"] * self.steps)) ** 2
                first = recipe["first_share"] + (first - recipe["first_share"]) * done
            mixtures.append([first if k == "published prompts" else (1 - first) * share[k] / rest for k in names])
        mixture = torch.tensor(mixtures)
        for kind, rows in self.split().items():
            long = torch.tensor([self.pools[s]["long share"] for s in names])
            weight = mixture * (long if kind == "long" else 1 - long)
            source = torch.multinomial(weight.repeat(n_steps, 1), rows, True, generator=g).view(n_steps, self.M, rows)
            low = torch.tensor([self.pools[s][kind][0] for s in names])[source]
            count = torch.tensor([self.pools[s][kind][1] for s in names])[source]
            out[kind] = (low + (torch.rand(source.shape, generator=g, dtype=torch.float64) * count).long()).to(self.device)
        return out

    def allocate(self):
        self.inputs = {
            kind: (torch.zeros(self.M, rows, length + 1, dtype=torch.long, device=self.device),
                   torch.zeros(self.M, rows, length, dtype=torch.long, device=self.device))
            for (kind, rows), length in zip(self.split().items(), (SHORT, LONGEST))
        }  # fmt: skip

    def load(self, index):
        """index: by kind [M, rows]."""
        for kind, (tokens, marks) in self.inputs.items():
            tokens.copy_(self.pools["tokens"][kind][index[kind]])
            marks.copy_(self.pools["marks"][kind][index[kind]])

    def step(self):
        """One step on what is in the inputs; all of it can be captured in a graph."""
        from model import forward, linear

        p = self.shapes.views(self.theta)
        loss, total, right, answers = 0, 0, 0, 0
        for tokens, marks in self.inputs.values():
            B = tokens.shape[1]
            keep = (torch.rand(self.n, self.M, B, 1, 1, device=self.device) >= self.drop) / (1 - self.drop)
            logits = linear(forward(p, tokens[:, :, :-1], self.n, keep), p["backbone.embeddings.weight"])
            target = tokens[:, :, 1:]
            each = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(target.shape)
            # The last token of a row is predicted too; padding is not: it is what follows the end, 0 after 0.
            inside = ((target != 0) | (tokens[:, :, :-1] != 0)).clone()
            inside[:, :, 0] = True
            weight = torch.where(marks > 0, self.answer[:, None, None], inside.float())
            loss = loss + (each * weight).sum((1, 2))
            total = total + weight.sum((1, 2))
            with torch.no_grad():
                hit = (logits.argmax(-1) == target) & (marks > 0)
                right, answers = right + hit.sum((1, 2)), answers + (marks > 0).sum((1, 2))
        loss = loss / total
        (g,) = torch.autograd.grad(loss.sum(), [self.theta])
        with torch.no_grad():
            g = g * (1 / g.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
            self.m1.mul_(0.9).add_(g, alpha=0.1)
            self.m2.mul_(0.98).addcmul_(g, g, value=0.02)
            self.theta.mul_(1 - self.rate * self.decay * self.decayed)
            denominator = (self.m2 / self.corrections[1]).sqrt_().add_(1e-8)
            self.theta.sub_(self.rate * (self.m1 / self.corrections[0]) / denominator)
            self.loss.copy_(loss)
            self.right.copy_(right / answers)

    def capture(self):
        self.allocate()
        self.load({kind: index[0] for kind, index in self.draw(0, 1).items()})
        if self.device == "cpu":
            self.replay = self.step
            return
        saved = self.theta.detach().clone()
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        torch.cuda.synchronize()
        with torch.no_grad():
            self.theta.copy_(saved)
            self.m1.zero_(), self.m2.zero_()
        self.graph, self.replay = graph, graph.replay

    def schedule(self, step):
        rates = []
        for r in self.recipes:
            warm = max(1, r["warmup"] * self.steps)
            done = max(0.0, (step - warm) / max(1, self.steps - warm))
            rate = min(1.0, (step + 1) / warm) * (r["final"] + (1 - r["final"]) * (1 + math.cos(math.pi * done)) / 2)
            rates.append(r["rate"] * rate)
        # Pinned where there is a device, so that the copy does not wait.
        return torch.tensor(rates)[:, None], torch.tensor([1 - 0.9 ** (step + 1), 1 - 0.98 ** (step + 1)])

    def chunk(self, size):
        """Prepare the next steps' indices, rates and corrections on the device."""
        first = self.done_steps
        self.indices = self.draw(first, size)
        rows = [self.schedule(first + k) for k in range(size)]
        self.rates = torch.stack([r[0] for r in rows]).to(self.device)
        self.corrects = torch.stack([r[1] for r in rows]).to(self.device)

    def one(self, k):
        self.load({kind: index[k] for kind, index in self.indices.items()})
        self.rate.copy_(self.rates[k])
        if self.done_steps % 100 == 0:
            self.drop.copy_(self.first_drop * (self.done_steps < self.drop_until * self.steps))
        self.corrections.copy_(self.corrects[k])
        self.replay()
        self.done_steps += 1


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=float, required=True)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--plan", type=Path, default=Path(__file__).parent / "plan.json")
    arguments.add_argument("--tiny", action="store_true")
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    plan = json.loads(options.plan.read_text())
    global LONGEST
    import data
    import measure
    import model

    LONGEST = data.LONGEST
    data.kept()
    n_docs = 4000 if options.tiny else plan.get("documents", 1_000_000)
    shares = {name: source.share for name, source in data.corpus.SOURCES.items()}
    workers = os.cpu_count()
    jobs = [(s, k, max(50, int(n_docs * share / 16))) for s, share in shares.items() for k in range(16)]
    tasks = [(each, 12 if options.tiny else 250) for each in data.MEASURED]
    with get_context("fork").Pool(workers) as pool:
        later = pool.map_async(data.measured, tasks, chunksize=1)
        made = pool.map(data.pool, jobs, chunksize=1)
        rows = dict(later.get())
    say("documents made", sum(len(m[0]) for m in made))
    if device == "cuda" and model.triton is not None:
        try:
            check_scan(model, device)
            model.SCAN["scan"] = model.TritonScan
            say("the Triton scan is right")
        except Exception:
            say("no Triton scan:", traceback.format_exc())
    pools = {"tokens": {}, "marks": {}} | {s: {} for s in shares}
    whole = {s: [np.concatenate(c) for c in zip(*(m for j, m in zip(jobs, made) if j[0] == s))] for s in shares}
    for kind, length in (("short", SHORT), ("long", LONGEST)):
        tokens, marks, at = [], [], 0
        for s, (t, a, lengths) in whole.items():
            chosen = (lengths <= SHORT) if kind == "short" else (lengths > SHORT)
            pools[s][kind] = (at, int(chosen.sum()))
            pools[s]["long share"] = float((lengths > SHORT).mean())
            at += int(chosen.sum())
            tokens.append(t[chosen][:, : length + 1])
            marks.append(a[chosen][:, :length])
        pools["tokens"][kind] = torch.from_numpy(np.concatenate(tokens)).to(device)
        pools["marks"][kind] = torch.from_numpy(np.concatenate(marks)).to(device)
    say("long shares", {s: round(pools[s]["long share"], 3) for s in shares})
    groups = []
    for entry in plan["groups"]:
        try:
            group = Group(entry["name"], entry["shape"], entry["recipes"], pools, shares, device, plan.get("batch", 64))
            group.steps = 100
            group.capture()
            group.most = entry.get("tiny_steps", 6) if options.tiny else entry["steps"]
            groups.append(group)
            say("ready", entry["name"], "parameters", sum(group.shapes.sizes))
        except Exception:
            say("FAILED", entry["name"], traceback.format_exc())
    if not groups:
        raise SystemExit("no group is ready")
    measuring = 3 if options.tiny else plan.get("measuring_seconds", 25) * len(groups)

    def run(size):
        """`size` steps of every group that has some left, interleaved."""
        active = [g for g in groups if g.done_steps < g.steps]
        for g in active:
            g.chunk(size)
        if device == "cuda":
            torch.cuda.synchronize()
        for k in range(size):
            for g in active:
                if g.done_steps < g.steps:
                    if device == "cuda":
                        with torch.cuda.stream(g.stream):
                            g.one(k)
                    else:
                        g.one(k)
        if device == "cuda":
            torch.cuda.synchronize()
        for g in active:
            g.history.append([g.done_steps, g.loss.tolist(), g.right.tolist()])

    # How fast all of them are together; then as many steps as fit, in proportion to what each may have.
    for g in groups:
        g.steps = g.most
    trial = 2 if options.tiny else 100
    saved = [(g.theta.detach().clone()) for g in groups]
    run(min(10, trial))
    began = time.perf_counter()
    run(trial)
    per_step = (time.perf_counter() - began) / trial
    for g, theta in zip(groups, saved):
        with torch.no_grad():
            g.theta.copy_(theta), g.m1.zero_(), g.m2.zero_()
        g.done_steps, g.history = 0, []
    left = options.seconds - (time.perf_counter() - START) - measuring
    fit = int(left / per_step * 0.97)
    factor = min(1.0, fit / max(g.most for g in groups))
    for g in groups:
        g.steps = max(2, int(g.most * factor))
    say(f"{1000 * per_step:.1f} ms for a step of all groups; steps {[g.steps for g in groups]} of {[g.most for g in groups]}")
    size = 2 if options.tiny and groups[0].steps < 50 else 200 if not options.tiny else 20
    while any(g.done_steps < g.steps for g in groups):
        run(size)
        if len(groups[0].history) % 10 == 1:
            say({g.name: [g.done_steps, [round(v, 2) for v in g.history[-1][2]]] for g in groups})
        if time.perf_counter() - START > options.seconds - 0.5 * measuring:
            say("out of time for training")
            break
    say("trained")
    from safetensors.torch import save_file

    records = []
    for g in groups:
        theta = g.theta.detach()
        weights = {f"{m}/{k}": v.float() for m in range(g.M) for k, v in g.shapes.state(theta[m]).items() if k != "lm_head.weight"}
        save_file(weights, options.out / f"{g.name}.safetensors")
        record = {"name": g.name, "shape": g.shape, "steps": g.done_steps, "of": g.most, "recipes": g.recipes,
                  "parameters": sum(g.shapes.sizes), "history": g.history}  # fmt: skip
        try:
            g.graph = g.replay = g.inputs = None
            p = {k: v.detach() for k, v in g.shapes.views(theta).items()}
            record["results"] = measure.everything(p, g.n, rows, device, options.tiny)
            for recipe, result in zip(g.recipes, record["results"]):
                short = {k: v for k, v in recipe.items() if RECIPE[k] != v}
                e = result["eap-ig"]
                say(g.name, short, "| published", round(result["published among names (lowest set)"], 3),
                    "| frames", [round(v, 3) for v in result["held-out frames, mean and lowest"]],
                    "| edges", e["edges on a path"], "layers", e["layers"],
                    "| cross-talk", round(result["cross-talk layers, mean"], 2), "differing", result["cross-talk different"],
                    "| matter", result["layers that matter (accuracy - .03)"], "| years", round(result["greater-than"], 2))  # fmt: skip
                say("    ", {k: v for k, v in sorted(result["choices"].items())})
        except Exception:
            say("measuring failed", traceback.format_exc())
        records.append(record)
        (options.out / "results.json").write_text(json.dumps(records))
    say("done")


def check_scan(model, device):
    g = torch.Generator().manual_seed(0)
    M, B, L, E, N = 2, 3, 17, 64, 4
    leaves = [torch.randn(M * B, L, E, generator=g), torch.rand(M * B, L, E, generator=g), -torch.rand(M, E, N, generator=g),
              torch.randn(M * B, L, N, generator=g), torch.randn(M * B, L, N, generator=g)]  # fmt: skip
    leaves = [v.to(device).requires_grad_() for v in leaves]
    found = []
    for scan in (model.DoublingScan, model.TritonScan):
        y = scan.apply(*leaves)
        found.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
