"""Scores a needle model: exact match and mean log-probability of the answer per length and KV cache format.

    python tools/needle/score.py checkpoints/needle --questions 200 --verify

Each haystack of 8 needles is read once with K and V rounded to the format, also inside that pass, as an engine that
reads K and V only from its cache would; then each needle is asked for on its own. An answer is right if every byte of
it is the most likely one, which is what greedy decoding returns. --verify compares with transformers.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
from haystack import HaystackGenerator

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
NEEDLES = 8


def as_bf16(x):
    return x


def as_fp8_e4m3(x):
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).half()


def as_int8_per_token_head(x):
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
    return (torch.round(x / scale) * scale).half()


FORMATS = {"bf16": as_bf16, "fp8_e4m3": as_fp8_e4m3, "int8_per_token_head": as_int8_per_token_head}


class Reader:
    """The forward pass of model.py over a cache: Prefill one text, then ask many questions about it."""

    def __init__(self, weights, store):
        self.weights, self.store = weights, store
        self.device = weights["model.norm.weight"].device

    def forward(self, tokens, first_position, attend):
        """attend(layer, q, k, v) -> [tokens, hidden]; tokens [rows, length]."""
        rows, length = tokens.shape
        positions = torch.arange(first_position, first_position + length, device=self.device).repeat(rows)
        cos, sin = model.rope_tables(positions)
        x = model.embed(self.weights, tokens.flatten())
        for i in range(model.LAYERS):
            norm, q, k, v, o, norm2, gate, up, down = model.layer_weights(self.weights, i)
            q, k, v = model.before_attention(x, norm, q, k, v, cos, sin)
            x = model.after_attention(x, attend(i, q, self.store(k), self.store(v)).to(x.dtype),
                                      o, norm2, gate, up, down)
        return x.unflatten(0, (rows, length))

    def prefill(self, tokens):
        self.cache, self.length = [], tokens.numel()

        def attend(layer, q, k, v):
            self.cache.append((k, v))
            group = q.shape[1] // k.shape[1]
            q, k, v = (t.to(k.dtype).transpose(0, 1)[None] for t in
                       (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
            backend = SDPBackend.MATH if self.device.type == "cpu" else SDPBackend.FLASH_ATTENTION
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out[0].transpose(0, 1).flatten(1)

        return self.forward(tokens[None], 0, attend)[0]

    def ask(self, tokens):
        """Log-probabilities of the next byte at every place of the rows [rows, length] after the cached text."""
        rows, length = tokens.shape
        causal = torch.ones(length, length, device=self.device, dtype=torch.bool).triu(1)

        def attend(layer, q, k, v):
            group = q.shape[1] // k.shape[1]
            q, k, v = (t.float().unflatten(0, (rows, length)) for t in (q, k, v))
            q = q.unflatten(2, (-1, group)) / q.shape[-1] ** 0.5
            old_k, old_v = (t.float() for t in self.cache[layer])
            old = torch.einsum("rlkgd,tkd->rkglt", q, old_k)
            new = torch.einsum("rlkgd,rtkd->rkglt", q, k).masked_fill(causal, float("-inf"))
            p_old, p_new = torch.cat([old, new], -1).softmax(-1).split([self.length, length], -1)
            out = torch.einsum("rkglt,tkd->rlkgd", p_old, old_v) + torch.einsum("rkglt,rtkd->rlkgd", p_new, v)
            return out.flatten(2).flatten(0, 1)

        x = self.forward(tokens, self.length, attend)
        return model.logits(self.weights, x).float().log_softmax(-1)

    def largest(self):
        """Per layer: the largest |K| and |V|."""
        return [tuple(round(t.abs().max().item(), 1) for t in kv) for kv in self.cache]


def haystack_tokens(haystack, device):
    return torch.tensor([model.BOS, *haystack.text], device=device)


def score(reader, haystack):
    """[(right, log-probability)] for each needle."""
    reader.prefill(haystack_tokens(haystack, reader.device))
    rows = [haystack.question(i) + haystack.answer(i) for i in range(NEEDLES)]
    longest = max(map(len, rows))
    tokens = torch.tensor([list(r.ljust(longest)) for r in rows], device=reader.device)
    results = []
    log_probabilities = torch.cat([reader.ask(t) for t in tokens.split(2)])
    for i, (row, p) in enumerate(zip(rows, log_probabilities)):
        begin = len(haystack.question(i))
        p = p[begin - 1:len(row) - 1]
        answer = tokens[i, begin:len(row)]
        results.append(((p.argmax(-1) == answer).all().item(), p.gather(-1, answer[:, None]).sum().item()))
    return results


@torch.no_grad()
def score_table(folder, device, lengths, questions, filler):
    weights = model.load(folder, device)
    generator = HaystackGenerator(filler)
    table = {}
    for length in lengths:
        size = generator.text_bytes(length)
        for name, store in FORMATS.items():
            reader, results, start = Reader(weights, store), [], time.time()
            for seed in range((questions + NEEDLES - 1) // NEEDLES):
                results += score(reader, generator.make(size, NEEDLES, 1_000_000 + seed))
            right = 100 * sum(r for r, _ in results) / len(results)
            mean = sum(p for _, p in results) / len(results)
            table[f"{length} {name}"] = right, mean
            print(f"{length:7} {name:20} exact match {right:6.2f} %, log-probability {mean:8.4f} "
                  f"({len(results)} questions, {time.time() - start:.1f} s)", flush=True)
        if length == lengths[-1]:
            print("largest |K|, |V| per layer:", reader.largest(), flush=True)
    return table


def print_markdown(table, lengths):
    print("| length |" + "".join(f" {f} |" for f in FORMATS))
    print("|---|" + "---|" * len(FORMATS))
    for length in lengths:
        cells = (table[f"{length} {f}"] for f in FORMATS)
        print(f"| {length} |" + "".join(f" {right:.1f} % ({mean:.3f}) |" for right, mean in cells))


@torch.no_grad()
def verify(folder, device):
    """The folder in transformers against this file's arithmetic: logits at 4k, greedy answers at 8k and 32k."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    weights = model.load(folder, device)
    ours = Reader(weights, as_bf16)
    generator = HaystackGenerator()
    text = generator.make(generator.text_bytes(4096), NEEDLES, 7).text.decode()
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    assert ids[0].tolist() == [model.BOS, *text.encode()] and tokenizer.decode(ids[0, 1:]) == text
    odd = "naïve\n  ünïcode \t🙂 <bos>"
    print("tokenizer:", tokenizer(odd)["input_ids"], repr(tokenizer.decode(tokenizer(odd)["input_ids"][1:])))
    a = theirs(ids).logits[0].float()
    b = model.logits(weights, ours.prefill(ids[0])).float()
    print(f"logits at 4096 tokens: transformers and ours differ by {((a - b).norm() / b.norm()).item():.1e} (relative "
          f"norm), same first choice at {100 * (a.argmax(-1) == b.argmax(-1)).float().mean().item():.2f} %")
    for length in (8192, 32768):
        haystack = generator.make(generator.text_bytes(length), NEEDLES, 8)
        answers = []
        for i in range(NEEDLES):
            prompt = (haystack.text + haystack.question(i)).decode()
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
            out = theirs.generate(ids, max_new_tokens=12)[0, ids.shape[1]:]
            answers.append(tokenizer.decode(out, skip_special_tokens=True))
        ours_right = [r for r, _ in score(ours, haystack)]
        theirs_right = [a == haystack.answer(i).decode() for i, a in enumerate(answers)]
        print(f"{length}: transformers answers {answers}, right {sum(theirs_right)}/8, ours {sum(ours_right)}/8, "
              f"same {theirs_right == ours_right}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--haystack", help="a text file to use as filler")
    parser.add_argument("--verify", action="store_true", help="compare with transformers first")
    parser.add_argument("--json", help="write the table here")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", flush=True)
    if args.verify:
        verify(args.folder, device)
    filler = open(args.haystack, "rb").read() if args.haystack else None
    table = score_table(args.folder, device, args.lengths, args.questions, filler)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(table, f, indent=1)
    print_markdown(table, args.lengths)


if __name__ == "__main__":
    main()
