#!/usr/bin/env python3
"""Makes data/gla and data/glb: tiny random GLM-4-MoE models by the real transformers class, with their logits.

usage: glm4_moe.py OUT      by a Python that has torch and transformers (made with torch 2.15.0, transformers 5.24.0, f32, eager attention, one padded batch)
"""
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

LENGTHS = [17, 9]
SHAPE = dict(vocab_size=150, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             moe_intermediate_size=24, n_routed_experts=7, num_experts_per_tok=3, n_shared_experts=1, first_k_dense_replace=1,
             partial_rotary_factor=0.5, routed_scaling_factor=1.7, n_group=1, topk_group=1, attention_bias=True, max_position_embeddings=256,
             tie_word_embeddings=False, rms_norm_eps=1e-5)


def spread(model):
    """Random weights that are nowhere degenerate: the class starts with biases 0 and norms 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif "gate.weight" in name or name.endswith("bias"):
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
        for name, b in model.named_buffers():
            if "correction" in name:
                b.copy_(0.2 * torch.randn_like(b))


def make(folder, **options):
    config = Glm4MoeConfig(**SHAPE, **options)
    config._attn_implementation = "eager"
    model = Glm4MoeForCausalLM(config).float().eval()
    spread(model)
    ids, mask = torch.randint(0, config.vocab_size, (len(LENGTHS), max(LENGTHS))), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
        ids[row, length:] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    packed = lambda x: torch.cat([x[row, :length] for row, length in enumerate(LENGTHS)]).contiguous()
    model.save_pretrained(os.path.join(folder, "model"))
    borders = torch.tensor([0] + LENGTHS).cumsum(0)
    save_file({"ids": ids.int(), "mask": mask.int(), "lengths": torch.tensor(LENGTHS).int(), "packed_ids": packed(ids).int(),
               "cu_seqlens": borders.int(), "base.logits": packed(logits)}, os.path.join(folder, "ref.safetensors"))


if len(sys.argv) != 2:
    sys.exit(__doc__)
torch.manual_seed(0)
make(os.path.join(sys.argv[1], "gla"), use_qk_norm=True, norm_topk_prob=True)
make(os.path.join(sys.argv[1], "glb"), use_qk_norm=False, norm_topk_prob=False)
