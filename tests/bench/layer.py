#!/usr/bin/env python3
"""Writes a checkpoint of one full-size layer with random weights and a small vocabulary: what esp_bench --model measures.

usage: layer.py qwen3|gptoss OUT
qwen3: Qwen3-30B-A3B's layer in BF16, per-expert keys.  gptoss: gpt-oss-20b's layer, experts in MXFP4.
"""
import json
import os
import random
import sys

VOCAB = 512
GPTOSS = dict(model_type="gpt_oss", hidden_size=2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64, intermediate_size=2880,
              num_local_experts=32, num_experts_per_tok=4, sliding_window=128, rms_norm_eps=1e-5, rope_theta=150000,
              layer_types=["sliding_attention"], attention_bias=True, swiglu_limit=7.0, quantization_config={"quant_method": "mxfp4"},
              rope_scaling={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                            "original_max_position_embeddings": 4096})
QWEN3 = dict(model_type="qwen3_moe", hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128, intermediate_size=6144,
             moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, rms_norm_eps=1e-6, rope_theta=1e6)


def layer_tensors(kind, c):
    """name -> (dtype, shape, content), content one of: random, one, codes, scales."""
    h, d = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    t = {}
    plain = lambda name, *shape: t.update({name: ("BF16", shape, "random")})
    ones = lambda name, n: t.update({name: ("BF16", (n,), "one")})
    layer = "model.layers.0."
    plain("model.embed_tokens.weight", VOCAB, h)
    plain("lm_head.weight", VOCAB, h)
    for name in ("model.norm", layer + "input_layernorm", layer + "post_attention_layernorm"):
        ones(name + ".weight", h)
    for name, shape in {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}.items():
        plain(f"{layer}self_attn.{name}_proj.weight", *shape)
        if kind == "gptoss":
            plain(f"{layer}self_attn.{name}_proj.bias", shape[0])
    if kind == "qwen3":
        ones(layer + "self_attn.q_norm.weight", d)
        ones(layer + "self_attn.k_norm.weight", d)
        plain(layer + "mlp.gate.weight", c["num_experts"], h)
        for e in range(c["num_experts"]):
            for name in ("gate", "up"):
                plain(f"{layer}mlp.experts.{e}.{name}_proj.weight", c["moe_intermediate_size"], h)
            plain(f"{layer}mlp.experts.{e}.down_proj.weight", h, c["moe_intermediate_size"])
        return t
    e, i = c["num_local_experts"], c["intermediate_size"]
    plain(layer + "self_attn.sinks", c["num_attention_heads"])
    plain(layer + "mlp.router.weight", e, h)
    plain(layer + "mlp.router.bias", e)
    for name, out, width in (("gate_up", 2 * i, h), ("down", h, i)):
        stem = f"{layer}mlp.experts.{name}_proj_"
        t[stem + "blocks"] = ("U8", (e, out, width // 32, 16), "codes")
        t[stem + "scales"] = ("U8", (e, out, width // 32), "scales")
        plain(stem + "bias", e, out)
    return t


def content(rng, kind, size):
    if kind == "one":
        return b"\x80\x3f" * (size // 2)
    if kind == "codes":
        return rng.randbytes(size)
    if kind == "scales":
        return bytes(rng.choices(range(117, 121), k=1 << 16)) * (size // (1 << 16) + 1)
    # BF16 of either sign between 2^-11 and 2^-7.
    bits = int.from_bytes(rng.randbytes(size), "little")
    mask, exponent = (int.from_bytes(bytes(pair) * (size // 2), "little") for pair in ((0xFF, 0x81), (0x00, 0x3A)))
    return ((bits & mask) | exponent).to_bytes(size, "little")


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in ("qwen3", "gptoss"):
        sys.exit(__doc__)
    kind, out = sys.argv[1:]
    config = dict(GPTOSS if kind == "gptoss" else QWEN3, num_hidden_layers=1, vocab_size=VOCAB, hidden_act="silu",
                  max_position_embeddings=32768, tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2)
    tensors = layer_tensors(kind, config)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, _) in tensors.items():
        size = 2 if dtype == "BF16" else 1
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = random.Random(0)
    os.makedirs(out, exist_ok=True)
    json.dump(config, open(os.path.join(out, "config.json"), "w"), indent=1)
    with open(os.path.join(out, "model.safetensors"), "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, (_, _, what) in tensors.items():
            begin, end = header[name]["data_offsets"]
            f.write(content(rng, what, end - begin)[:end - begin])


main()
