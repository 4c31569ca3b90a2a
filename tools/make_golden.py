#!/usr/bin/env python3
"""Makes a file of reference logits for `octavo verify` from any model that transformers can run.

    python tools/make_golden.py MODEL_FOLDER [--out MODEL_FOLDER/golden.safetensors]
    octavo verify MODEL_FOLDER

Needs torch, transformers and safetensors. Per prompt it stores the ids and the logits of the last --rows tokens: in float32
arithmetic (`logits`), with keys (after RoPE) and values rounded through e4m3 (`logits_fp8kv`), and both again in
bfloat16 (`logits_bf16`, `logits_bf16_fp8kv`), which tells how far a bfloat16 engine may be. Also 24 greedy tokens, and of the
first prompt the residual stream entering each layer and after the final norm (`hidden0`, ...).
"""

import argparse
import contextlib
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

GREEDY_TOKENS = 24


def through_e4m3(x):
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


@contextlib.contextmanager
def fp8_cache(enabled):
    """Rounds every key and value that enters a cache. Q and P stay as they are."""
    update = DynamicCache.update

    def rounded(self, keys, values, *args, **kwargs):
        return update(self, through_e4m3(keys), through_e4m3(values), *args, **kwargs)

    if enabled:
        DynamicCache.update = rounded
    try:
        yield
    finally:
        DynamicCache.update = update


@torch.no_grad()
def logits(model, ids, rows, fp8):
    with fp8_cache(fp8):
        out = model(ids[None], use_cache=True, past_key_values=DynamicCache(config=model.config))
    return out.logits[0, -rows:].float().cpu().contiguous()


@torch.no_grad()
def hidden_states(model, ids):
    return model(ids[None], output_hidden_states=True).hidden_states


@torch.no_grad()
def greedy(model, ids):
    cache, tokens, step = DynamicCache(config=model.config), [], ids[None]
    for _ in range(GREEDY_TOKENS):
        step = model(step, use_cache=True, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(step.item())
    return torch.tensor(tokens, dtype=torch.int32)


def load(folder, dtype, device):
    """The BF16 weights, in `dtype` arithmetic."""
    # Eager attention: the only one that applies every model's soft-cap and sinks.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    # Widen only: casting a model to bfloat16 as a whole would round its RoPE frequencies too, which from_pretrained does not.
    return (model.float() if dtype == torch.float32 else model).to(device).eval()


def make_prompts(args, vocab_size):
    if args.text:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        ids = tokenizer(pathlib.Path(args.text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
        if len(ids) < max(args.lengths):
            raise SystemExit(f"{args.text}: {len(ids)} tokens, --lengths asks for {max(args.lengths)}")
        return [ids[:n] for n in args.lengths]
    generator = torch.Generator().manual_seed(args.seed)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in args.lengths]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("--out", help="default: golden.safetensors in the model's folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=[12, 48, 160], help="tokens of each prompt")
    parser.add_argument("--rows", type=int, default=160, help="logit rows kept per prompt, the last ones")
    parser.add_argument("--text", help="take the prompts from this UTF-8 file; default: random token ids")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    tensors = {}
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "_bf16")):
        model = load(args.model, dtype, args.device)
        if not suffix:
            prompts = make_prompts(args, model.config.get_text_config().vocab_size)
        for i, prompt in enumerate(prompts):
            ids, key = prompt.to(args.device), f"prompt{i}."
            tensors[key + "logits" + suffix] = logits(model, ids, args.rows, fp8=False)
            tensors[key + "logits" + suffix + "_fp8kv"] = logits(model, ids, args.rows, fp8=True)
            if not suffix:
                tensors[key + "ids"] = prompt.to(torch.int32)
                tensors[key + "greedy"] = greedy(model, ids)
        if not suffix:
            for layer, hidden in enumerate(hidden_states(model, prompts[0].to(args.device))):
                tensors[f"prompt0.hidden{layer}"] = hidden[0].float().cpu().contiguous()
        del model
    out = args.out or str(pathlib.Path(args.model) / "golden.safetensors")
    save_file(tensors, out)
    print(f"{out}: {len(prompts)} prompts of {', '.join(str(len(p)) for p in prompts)} tokens")


if __name__ == "__main__":
    main()
