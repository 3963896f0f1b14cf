"""Cuts real vocabularies down to what the strings of data/tokenizer can ever ask for.

Merging looks only at pairs whose bytes stand side by side in the text, so a vocabulary without the tokens that are no substring of any
text gives the same ids.  usage: tokenizer_subset.py QWEN3_TOKENIZER_JSON O200K_BASE_TIKTOKEN FOLDER (with the files of strings)
"""

import base64
import json
import sys
import unicodedata


def alphabet():
    """GPT-2's character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {b: chr(b) for b in printable}
    rest = [b for b in range(256) if b not in chars]
    chars.update({b: chr(256 + i) for i, b in enumerate(rest)})
    return chars


def texts(path, normalise):
    with open(path, encoding="utf-8") as lines:
        found = [json.loads(line)["text"] for line in lines]
    return [(unicodedata.normalize("NFC", t) if normalise else t).encode() for t in found]


def needed(vocabulary, strings):
    longest = max(map(len, vocabulary))
    keep = {bytes([b]) for b in range(256)}
    for s in strings:
        for i in range(len(s)):
            keep.update(s[i:j] for j in range(i + 2, min(len(s), i + longest) + 1) if s[i:j] in vocabulary)
    return keep


def main(qwen, o200k, folder):
    with open(o200k) as lines:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    keep = needed(ranks, texts(f"{folder}/o200k.jsonl", False) + texts(f"{folder}/chat_harmony.jsonl", False))
    with open(f"{folder}/o200k_base.tiktoken", "w") as out:
        out.writelines(f"{base64.b64encode(t).decode()} {ranks[t]}\n" for t in sorted(keep, key=ranks.get))

    with open(qwen, encoding="utf-8") as f:
        tokenizer = json.load(f)
    byte_of = {c: b for b, c in alphabet().items()}
    model = tokenizer["model"]
    bytes_of = {token: bytes(byte_of[c] for c in token) for token in model["vocab"]}
    keep = needed(set(bytes_of.values()), texts(f"{folder}/qwen3.jsonl", True) + texts(f"{folder}/chat_qwen3.jsonl", True))
    model["vocab"] = {token: i for token, i in model["vocab"].items() if bytes_of[token] in keep}
    model["merges"] = [m for m in model["merges"] if all(part in model["vocab"] for part in (m[0], m[1], m[0] + m[1]))]
    with open(f"{folder}/tokenizer.json", "w", encoding="utf-8") as out:
        json.dump(tokenizer, out, ensure_ascii=False, separators=(",", ":"))


main(*sys.argv[1:])
