"""The needle model: a small Llama over bytes, written so that a parameter's name is its Hugging Face name."""

import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

BOS, EOS, VOCAB = 256, 257, 264  # ids 0..255 are bytes; 258..263 are never used
LAYERS, HIDDEN, FFN = 4, 256, 1280
HEADS, KV_HEADS, HEAD_DIM = 2, 1, 128
THETA = 1e8  # most of a head's dimensions turn so slowly that 128k positions hardly move them
EPS = 1e-5
MAX_POSITIONS = 132 * 1024


def config():
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.0625,
        "rms_norm_eps": EPS,
        "use_cache": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_theta": THETA,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
    }


def shapes():
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (HIDDEN,)
        yield layer + "self_attn.q_proj.weight", (q, HIDDEN)
        yield layer + "self_attn.k_proj.weight", (kv, HIDDEN)
        yield layer + "self_attn.v_proj.weight", (kv, HIDDEN)
        yield layer + "self_attn.o_proj.weight", (HIDDEN, q)
        yield layer + "post_attention_layernorm.weight", (HIDDEN,)
        yield layer + "mlp.gate_proj.weight", (FFN, HIDDEN)
        yield layer + "mlp.up_proj.weight", (FFN, HIDDEN)
        yield layer + "mlp.down_proj.weight", (HIDDEN, FFN)
    yield "model.norm.weight", (HIDDEN,)


def init(seed, device):
    """FP32 weights: norms 1, matrices N(0, 1/fan_in), those that write to the residual stream / sqrt(2 layers)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            std = 1 / math.sqrt(HIDDEN if "embed" in name else shape[1])
            if "o_proj" in name or "down_proj" in name:
                std /= math.sqrt(2 * LAYERS)
            weights[name] = torch.randn(shape, generator=generator) * std
    return {k: v.to(device).requires_grad_() for k, v in weights.items()}


def rms_norm(x, weight):
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    return (x.float() * scale).to(x.dtype) * weight.to(x.dtype)


def linear(x, weight):
    return F.linear(x, weight.to(x.dtype))


def rope_tables(positions):
    inverse = THETA ** (-torch.arange(0, HEAD_DIM, 2, device=positions.device).float() / HEAD_DIM)
    angles = positions.float()[:, None] * inverse
    return angles.cos()[:, None], angles.sin()[:, None]  # [tokens, 1, head_dim / 2]


def rope(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def layer_weights(weights, i):
    prefix = f"model.layers.{i}."
    names = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return [weights[prefix + n + ".weight"] for n in names]


def before_attention(x, norm, q, k, v, cos, sin):
    """x [tokens, hidden] -> q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], after RoPE."""
    h = rms_norm(x, norm)
    q = rope(linear(h, q).unflatten(-1, (-1, HEAD_DIM)), cos, sin)
    k = rope(linear(h, k).unflatten(-1, (-1, HEAD_DIM)), cos, sin)
    v = linear(h, v).unflatten(-1, (-1, HEAD_DIM))
    return q, k, v


def after_attention(x, attention, o, norm, gate, up, down):
    x = x + linear(attention, o)
    h = rms_norm(x, norm)
    return x + linear(F.silu(linear(h, gate)) * linear(h, up), down)


def embed(weights, tokens):
    return F.embedding(tokens, weights["model.embed_tokens.weight"]).bfloat16()


def logits(weights, x):
    return linear(rms_norm(x, weights["model.norm.weight"]), weights["model.embed_tokens.weight"])


def byte_alphabet():
    """The character that stands for each byte in a byte-level tokenizer.json."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def tokenizer_json():
    special = ["<bos>", "<eos>"] + [f"<unused_{i}>" for i in range(VOCAB - 258)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    a, b = ({"Sequence": {"id": s, "type_id": 0}} for s in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": s, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, s in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {"type": "TemplateProcessing", "single": [bos, a], "pair": [bos, a, b],
                           "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}}},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {c: i for i, c in enumerate(byte_alphabet())}, "merges": []},
    }


def export(weights, folder):
    """Writes the Hugging Face folder (the model card is written by hand)."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().bfloat16().cpu().contiguous() for k, v in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "chat_template": "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False}
    for name, data in (("config", config()), ("generation_config", generation),
                       ("tokenizer", tokenizer_json()), ("tokenizer_config", tokenizer)):
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def load(folder, device):
    """The BF16 weights of an exported folder."""
    return load_file(pathlib.Path(folder) / "model.safetensors", device=str(device))
