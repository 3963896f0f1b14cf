#!/usr/bin/env python3
"""Adapters that espalier writes, loaded by the real PEFT, must give the logits of the adapter that PEFT itself had written.

usage: check_adapter.py ESPALIER GOLDEN_DATA.  Exit status 77 (skipped) where torch, transformers or peft are not installed.
For every golden folder: `espalier convert` writes each form that the family has, PEFT loads it onto the model, and the logits
are compared with those under PEFT's own file."""
import os
import subprocess
import sys
import tempfile

try:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as missing:
    print("skipped:", missing)
    sys.exit(77)

FORMS = {"q3a": ["2d", "3d"], "q3b": ["2d", "3d"], "q3c": ["2d", "3d"], "ol": ["2d", "3d"], "mx": ["2d", "3d"], "go1": ["3d"], "go2": ["3d"]}
IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32]])
LIMIT = 2e-5  # of two f32 runs, as the golden data state it


def logits(model_dir, adapter_dir):
    config = AutoConfig.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, config=config, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter_dir).eval()
    with torch.no_grad():
        return model(IDS).logits.double()


def main(espalier, data):
    failed = 0
    for folder, forms in FORMS.items():
        model_dir, adapter_dir = os.path.join(data, folder, "model"), os.path.join(data, folder, "adapter")
        want = logits(model_dir, adapter_dir)
        for form in forms:
            with tempfile.TemporaryDirectory() as out:
                subprocess.run([espalier, "convert", adapter_dir, out, "--model", model_dir, "--to", form], check=True)
                error = ((logits(model_dir, out) - want).abs().max() / want.abs().max()).item()
            good = error <= LIMIT
            failed += not good
            print(f"{folder} {form}: error {error:.2e}, limit {LIMIT:.0e}{'' if good else '  FAILED'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
