#!/usr/bin/env python3
"""The GRPO step of the demo in PyTorch: what espalier-grpo's step is compared with, in processor seconds.

Same model, settings and work: experts through NF4 (block 64) and back, LoRA r=8 on q, k, v, o, gate_up and down of every expert, 16 prompts x 8
samples drawn with a key-value cache, log-probabilities, backward, clip, AdamW.  f32, one thread.  Written for speed within plain PyTorch: one
batched forward a decode step, experts over their gathered rows, padded attention.  Skips (exit status 0, one line) without torch.
"""
import argparse
import json
import os
import struct
import sys
import time

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print("reference loop: skipped, torch is not installed")
    sys.exit(0)

NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
RANK, SCALE, PROMPTS, SAMPLES, NEW_TOKENS, EOS = 8, 2.0, 16, 8, 10, 2


def read_safetensors(path):
    data = open(path, "rb").read()
    (size,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, entry in json.loads(data[8:8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[entry["dtype"]]
        raw = torch.frombuffer(bytearray(data[8 + size + begin:8 + size + end]), dtype=dtype)
        tensors[name] = raw.reshape(entry["shape"]).float()
    return tensors


def through_nf4(w):
    blocks = w.reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks / absmax.clamp_min(1e-38), (NF4[1:] + NF4[:-1]) / 2)
    return (NF4[codes] * absmax).reshape(w.shape)


def rms_norm(x, w, eps):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class Model:
    def __init__(self, folder):
        config = json.load(open(os.path.join(folder, "config.json")))
        w = read_safetensors(os.path.join(folder, "model.safetensors"))
        self.layers, self.heads, self.kv_heads = config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.experts, self.top_k, self.eps = config["num_experts"], config["num_experts_per_tok"], config["rms_norm_eps"]
        theta = config.get("rope_theta", 1e6)
        self.inv_freq = theta ** (-torch.arange(0, self.dim, 2).float() / self.dim)
        self.embed, self.norm, self.head = w["model.embed_tokens.weight"], w["model.norm.weight"], w["lm_head.weight"]
        self.params, self.w = [], []
        for i in range(self.layers):
            p = f"model.layers.{i}."
            layer = {n: w[f"{p}self_attn.{n}_proj.weight"] for n in "qkvo"}
            layer.update(norm1=w[p + "input_layernorm.weight"], norm2=w[p + "post_attention_layernorm.weight"],
                         q_norm=w[p + "self_attn.q_norm.weight"], k_norm=w[p + "self_attn.k_norm.weight"], router=w[p + "mlp.gate.weight"])
            expert = lambda e, n: through_nf4(w[f"{p}mlp.experts.{e}.{n}_proj.weight"])
            layer["gate_up"] = [torch.cat([expert(e, "gate"), expert(e, "up")]) for e in range(self.experts)]
            layer["down"] = [expert(e, "down") for e in range(self.experts)]
            for n in "qkvo":
                layer["lora_" + n] = self.lora(layer[n].shape)
            for n in ("gate_up", "down"):
                layer["lora_" + n] = [self.lora(m.shape) for m in layer[n]]
            self.w.append(layer)

    def lora(self, shape):
        a = ((torch.rand(RANK, shape[1]) * 2 - 1) / shape[1] ** 0.5).requires_grad_()
        b = torch.zeros(shape[0], RANK).requires_grad_()
        self.params += [a, b]
        return a, b

    @staticmethod
    def linear(x, w, ab):
        return F.linear(x, w) + SCALE * F.linear(F.linear(x, ab[0]), ab[1])

    def rotate(self, x, positions):
        angle = positions[..., None].float() * self.inv_freq
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def moe(self, x, layer):
        probability = F.softmax(F.linear(x, layer["router"]), -1)
        weight, index = probability.topk(self.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e in range(self.experts):
            token, slot = torch.where(index == e)
            if len(token) == 0:
                continue
            gate, up = self.linear(x[token], layer["gate_up"][e], layer["lora_gate_up"][e]).chunk(2, -1)
            y = self.linear(F.silu(gate) * up, layer["down"][e], layer["lora_down"][e])
            out = out.index_add(0, token, y * weight[token, slot, None])
        return out

    def forward(self, tokens, positions, mask, cache=None):
        """tokens, positions [n,s]; mask [n,s,keys], True where a key is seen; cache: per layer [k, v], grown in place."""
        n, s = tokens.shape
        h = self.embed[tokens]
        for i, layer in enumerate(self.w):
            x = rms_norm(h, layer["norm1"], self.eps)
            split = lambda y, heads: y.view(n, s, heads, self.dim).transpose(1, 2)
            q = self.rotate(rms_norm(split(self.linear(x, layer["q"], layer["lora_q"]), self.heads), layer["q_norm"], self.eps), positions)
            k = self.rotate(rms_norm(split(self.linear(x, layer["k"], layer["lora_k"]), self.kv_heads), layer["k_norm"], self.eps), positions)
            v = split(self.linear(x, layer["v"], layer["lora_v"]), self.kv_heads)
            if cache is not None:
                if cache[i] is not None:
                    k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
                cache[i] = (k, v)
            group = self.heads // self.kv_heads
            a = F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=mask[:, None])
            h = h + self.linear(a.transpose(1, 2).reshape(n, s, -1), layer["o"], layer["lora_o"])
            x = rms_norm(h, layer["norm2"], self.eps)
            h = h + self.moe(x.reshape(n * s, -1), layer).view(n, s, -1)
        return F.linear(rms_norm(h, self.norm, self.eps), self.head)


def encode(text):
    characters = " =:>+-*?,.0123456789abcdefghijklmnopqrstuvwxyz"
    return [1] + [4 + characters.index(c) for c in text]


def sample(model, prompts):
    """Left-padded prompts, prefilled once each and repeated.  Returns tokens [128, width + new], widths and completion lengths."""
    width = max(map(len, prompts))
    pad = torch.tensor([width - len(p) for p in prompts])
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    column = torch.arange(width)
    mask = (column[None, None, :] <= column[None, :, None]) & (column[None, None, :] >= pad[:, None, None])
    mask = mask | torch.eye(width, dtype=torch.bool)  # a padded query sees itself: no row without a key
    cache = [None] * model.layers
    logits = model.forward(tokens, (column - pad[:, None]).clamp_min(0), mask, cache)[:, -1]
    repeat = lambda x: x.repeat_interleave(SAMPLES, 0)
    tokens, pad, logits = repeat(tokens), repeat(pad), repeat(logits)
    cache = [(repeat(k), repeat(v)) for k, v in cache]
    done = torch.zeros(len(tokens), dtype=torch.bool)
    for step in range(NEW_TOKENS):
        new = torch.multinomial(F.softmax(logits, -1), 1)[:, 0].masked_fill(done, 0)
        tokens = torch.cat([tokens, new[:, None]], 1)
        done = done | (new == EOS)
        if done.all() or step == NEW_TOKENS - 1:
            break
        column = torch.arange(tokens.shape[1])
        mask = (column[None] >= pad[:, None])[:, None]
        logits = model.forward(new[:, None], (tokens.shape[1] - 1 - pad)[:, None], mask, cache)[:, -1]
    return tokens, pad, width


def reward(completion, answer):
    body = completion[:completion.index(EOS)] if EOS in completion else completion
    exact = body == answer and EOS in completion
    return exact + 0.2 * sum(x == y for x, y in zip(body, answer)) / len(answer)


def train(model, optimiser, tokens, pad, width, answers):
    completions = [row[width:].tolist() for row in tokens]
    counted = torch.zeros(len(tokens), tokens.shape[1] - width)
    for i, c in enumerate(completions):
        counted[i, :c.index(EOS) + 1 if EOS in c else len(c)] = 1
    rewards = torch.tensor([reward(c, answers[i // SAMPLES]) for i, c in enumerate(completions)]).view(PROMPTS, SAMPLES)
    advantage = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)
    column = torch.arange(tokens.shape[1])
    mask = (column[None, None, :] <= column[None, :, None]) & (column[None, None, :] >= pad[:, None, None])
    mask = mask | torch.eye(tokens.shape[1], dtype=torch.bool)
    logits = model.forward(tokens, (column - pad[:, None]).clamp_min(0), mask)[:, width - 1:-1]
    logprob = F.log_softmax(logits, -1).gather(-1, tokens[:, width:, None])[..., 0]
    loss = -((logprob - logprob.detach()).exp() * advantage * counted).sum() / counted.sum()
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.params, 1.0)
    optimiser.step()
    return rewards.mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = Model(args.model)
    optimiser = torch.optim.AdamW(model.params, lr=1e-3, weight_decay=0)
    lines = [json.loads(line) for line in open(args.train)]
    seconds = []
    for step in range(args.steps):
        batch = lines[step * PROMPTS % len(lines):][:PROMPTS]
        start = time.process_time()
        with torch.no_grad():
            tokens, pad, width = sample(model, [encode(line["prompt"]) for line in batch])
        sampled = time.process_time()
        mean = train(model, optimiser, tokens, pad, width, [encode(line["answer"])[1:] for line in batch])
        end = time.process_time()
        seconds.append((end - start, sampled - start, end - sampled))
        print(f"step {step + 1}: reward {mean:.3f}, {end - start:.3f} s of processor time ({sampled - start:.3f} sampling)", flush=True)
    timed = sorted(seconds[1:] or seconds)
    best, middle = timed[0][0], timed[len(timed) // 2][0]
    print(f"reference: torch {torch.__version__}, processor seconds a step: best {best:.3f}, median {middle:.3f}")


main()
