"""Trains the needle model and writes it as a Hugging Face folder.

    python tools/needle/train.py --out checkpoints/needle --checkpoint-dir /tmp/needle
    torchrun --nproc-per-node 2 tools/needle/train.py ...        (the same on two GPUs)

Stages are fractions of --budget-seconds of training. A checkpoint is saved every minute and at the end, and the same
command goes on from it. Every step takes 128k tokens per GPU, as one sequence of 128k, 4 of 32k, ..., so that the compiled parts (all but
attention) see one shape. Data, initial weights and order follow from --seed; where the clock ends a stage does not.
At the end the model is scored (score.py scores a folder again).
"""

import argparse
import collections
import json
import math
import multiprocessing
import os
import pathlib
import random
import time

import torch
import torch.distributed
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import model
import score

TOKENS = 128 * 1024  # per step and GPU
LENGTHS = (131072, 131072, 131072, 32768, 8192, 2048)
STAGES = ((0.038, (512,)), (0.076, (2048,)), (0.123, (8192,)), (0.19, (32768,)), (0.94, LENGTHS),
          (1.0, (131072, 32768, 8192, 8192, 2048, 2048)))  # end of the stage; lengths, drawn evenly
ANNEAL, FOREIGN = STAGES[3][0], STAGES[4][0]  # the first cosine; then a second, short one with foreign filler
PEAK_LR, FOREIGN_LR, FINAL_LR, WARMUP_STEPS = 1.5e-3, 5e-4, 1e-5, 100
LM_WEIGHT = 0.3
SAVE_SECONDS, LOG_SECONDS = 60, 10
PREFETCH = 24  # batches


def stage_lengths(fraction):
    return next((lengths for end, lengths in STAGES if fraction < end), STAGES[-1][1])


def learning_rate(fraction, step):
    if fraction < FOREIGN:
        peak, progress = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS), (fraction - ANNEAL) / (FOREIGN - ANNEAL)
    else:
        progress = (fraction - FOREIGN) / (1 - FOREIGN)
        peak = FOREIGN_LR * min(1, progress / 0.1)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1, max(0, progress)))
    return FINAL_LR + max(0, peak - FINAL_LR) * cosine


def attend(q, k, v, rows, backend):
    """Causal attention of `rows` sequences; q [tokens, heads, head_dim] -> [tokens, hidden]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def fastest_attention(device):
    """Times forward and backward at 32k; a backend that fails or disagrees with the first is out."""
    if device.type == "cpu":
        return SDPBackend.MATH
    g = torch.Generator(device).manual_seed(0)
    qkv = [torch.randn((TOKENS // 4, heads, model.HEAD_DIM), device=device, dtype=torch.bfloat16, generator=g)
           for heads in (model.HEADS, model.KV_HEADS, model.KV_HEADS)]
    best, first = None, None
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            for _ in range(3):
                leaves = [t.clone().requires_grad_() for t in qkv]
                torch.cuda.synchronize()
                start = time.time()
                out = attend(*leaves, 1, backend)
                out.float().square().sum().backward()
                torch.cuda.synchronize()
                seconds = time.time() - start
        except RuntimeError as e:
            print(f"{backend.name}: {str(e).splitlines()[0]}", flush=True)
            continue
        results = [out.detach()] + [t.grad for t in leaves]
        first = first or results
        error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(results, first))
        print(f"{backend.name}: {1e3 * seconds:.1f} ms forward + backward at 32k, difference {error:.1e}", flush=True)
        if error < 0.02 and (best is None or seconds < best[0]):
            best = seconds, backend
    return best[1]


def head_loss(x, norm, embedding, labels, token_weights):
    logits = model.linear(model.rms_norm(x, norm), embedding).float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * token_weights).sum(), logits.argmax(-1) == labels


class Trainer:
    def __init__(self, args):
        self.args = args
        self.started = time.time()
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.pool = multiprocessing.get_context("fork").Pool(args.workers)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world > 1:
            torch.distributed.init_process_group()
        self.backend = fastest_attention(self.device)
        self.weights = model.init(args.seed, self.device)
        matrices = [w for w in self.weights.values() if w.dim() > 1]
        norms = [w for w in self.weights.values() if w.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}],
            lr=0.0, betas=(0.9, 0.98), fused=True)
        self.step, self.elapsed = 0, 0.0
        self.resume()
        compile_ = torch.compile if self.device.type == "cuda" else lambda f, **_: f
        self.before = compile_(model.before_attention, dynamic=False)
        self.after = compile_(model.after_attention, dynamic=False)
        self.head = compile_(head_loss, dynamic=False)
        self.rope = {}

    # Checkpoints: weights, optimizer and clock.

    def resume(self):
        folder = pathlib.Path(self.args.checkpoint_dir)
        if not (folder / "state.json").exists():
            return
        state = json.loads((folder / "state.json").read_text())
        self.step, self.elapsed = state["step"], state["elapsed"]
        with torch.no_grad():
            for name, value in torch.load(folder / "weights.pt", map_location=self.device).items():
                self.weights[name].copy_(value)
        if (folder / "optimizer.pt").exists():
            self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=self.device))
        print(f"resumed at step {self.step}, {self.elapsed:.0f} s", flush=True)

    def save(self):
        if self.rank:
            return
        folder = pathlib.Path(self.args.checkpoint_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"step": self.step, "elapsed": self.elapsed}
        torch.save({k: w.detach() for k, w in self.weights.items()}, folder / "weights.new")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.new")
        (folder / "state.new").write_text(json.dumps(state))
        (folder / "weights.new").replace(folder / "weights.pt")
        (folder / "optimizer.new").replace(folder / "optimizer.pt")
        (folder / "state.new").replace(folder / "state.json")

    # Data: batches are made by worker processes, PREFETCH ahead; all ranks draw the same lengths.

    def request(self, step):
        seed = self.args.seed * 1_000_003 + step
        fraction = self.elapsed / self.args.budget_seconds
        length = random.Random(seed).choice(stage_lengths(fraction))
        length = min(length, self.args.tokens)
        job = self.pool.apply_async(
            data.batch, (length, self.args.tokens // length, seed * self.world + self.rank, fraction >= FOREIGN))
        return length, job

    def rope_tables(self, length):
        if length not in self.rope:
            positions = torch.arange(length, device=self.device).repeat(self.args.tokens // length)
            self.rope[length] = model.rope_tables(positions)
        return self.rope[length]

    def loss(self, tokens, answers):
        rows, length = tokens.shape
        labels = F.pad(tokens[:, 1:], (0, 1)).flatten()
        answers = F.pad(answers[:, 1:], (0, 1)).flatten()
        weights = answers.float() / answers.sum() + LM_WEIGHT / labels.numel()
        cos, sin = self.rope_tables(length)
        x = model.embed(self.weights, tokens.flatten())
        for i in range(model.LAYERS):
            norm, q, k, v, o, norm2, gate, up, down = model.layer_weights(self.weights, i)
            q, k, v = self.before(x, norm, q, k, v, cos, sin)
            x = self.after(x, attend(q, k, v, rows, self.backend), o, norm2, gate, up, down)
        loss, right = self.head(x, self.weights["model.norm.weight"], self.weights["model.embed_tokens.weight"],
                                labels, weights)
        return loss, (right & answers).sum() / answers.sum()

    def average_gradients(self):
        if self.world == 1:
            return
        gradients = [w.grad for w in self.weights.values()]
        flat = torch.cat([g.flatten() for g in gradients]) / self.world
        torch.distributed.all_reduce(flat)
        for g, f in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(f.view_as(g))

    def train(self):
        queue = collections.deque()
        begin, base = None, self.elapsed
        saved = logged = time.time()
        stats = collections.defaultdict(lambda: [0, 0.0, 0.0, time.time()])
        while True:
            if self.out_of_time(begin, base):
                break
            while len(queue) < PREFETCH:
                queue.append(self.request(self.step + len(queue)))
            length, job = queue.popleft()
            tokens, answers = job.get()
            tokens = torch.from_numpy(tokens).to(self.device, torch.long)
            answers = torch.from_numpy(answers).to(self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.elapsed / self.args.budget_seconds, self.step)
            loss, accuracy = self.loss(tokens, answers)
            loss.backward()
            self.average_gradients()
            torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if begin is None:  # compilation is not training
                loss.item()
                begin = time.time()
            self.step += 1
            s = stats[length]
            s[0], s[1], s[2] = s[0] + 1, s[1] + loss.detach(), s[2] + accuracy.detach()
            now = time.time()
            if now - logged > LOG_SECONDS:
                logged = now
                if self.rank == 0:
                    parts = [f"{l}: {n} steps, loss {float(a) / n:.3f}, answer bytes {100 * float(b) / n:.1f} %"
                             for l, (n, a, b, _) in sorted(stats.items())]
                    print(f"[{self.elapsed:.0f} s, step {self.step}] " + "; ".join(parts), flush=True)
                stats.clear()
            if now - saved > SAVE_SECONDS:
                saved = now
                self.save()
        self.save()
        if self.rank == 0:
            model.export(self.weights, self.args.out)
            print(f"stopped at {self.elapsed:.0f} s, step {self.step}; wrote {self.args.out}", flush=True)
        self.pool.terminate()
        if self.world > 1:
            torch.distributed.destroy_process_group()
        if self.rank == 0 and self.elapsed >= self.args.budget_seconds and self.device.type == "cuda":
            table = score.score_table(self.args.out, self.device, score.LENGTHS, 200, None)
            score.print_markdown(table, score.LENGTHS)

    def out_of_time(self, begin, base):
        """Rank 0's clock rules: all ranks see the same stages and stop at the same step."""
        stop = time.time() - self.started > self.args.stop_after
        clock = torch.tensor([base + (time.time() - begin if begin else 0.0), float(stop)],
                             device=self.device, dtype=torch.float64)
        if self.world > 1:
            torch.distributed.broadcast(clock, 0)
        self.elapsed, stop = clock.tolist()
        return stop > 0 or self.elapsed >= self.args.budget_seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the Hugging Face folder to write")
    parser.add_argument("--checkpoint-dir", required=True)
    parser.add_argument("--budget-seconds", type=float, default=1160)
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds of this run, start included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=7, help="processes that make data, per GPU")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens per step and GPU")
    Trainer(parser.parse_args()).train()


if __name__ == "__main__":
    main()
