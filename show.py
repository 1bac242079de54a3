"""
What the terminal shows of a model: the text that it writes, and how sure it was of it.

    python sample.py --prompt "Return the" --num_samples 3
    python sample.py --prompt "Return the" --top 8              # the next tokens as bars

in:  an engine of sample.py, which calls these functions        out: lines in the terminal
"""
import re

import torch

def printable(text):
    """A text that is safe to print: control characters, which could move the cursor or hide what
    was written, are shown as \\x1b; lines and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]",
                  lambda found: ascii(found[0])[1:-1], text)

def show_token(tokenizer, i):
    """A token on one line: 'text', or its bytes if it is not made of whole characters."""
    data = tokenizer.decode_bytes([i])
    try:
        return repr(data.decode("utf-8"))       # which shows control characters as \x1b, too
    except UnicodeDecodeError:
        return "".join(f"<{byte:02x}>" for byte in data)

def show_steps(engine, prompt, top, max_new_tokens, seed, sampling):
    """Prints for each step the `top` most probable tokens as bars, and marks the one drawn."""
    tokenizer = engine.tokenizer
    ids = engine.prompt_ids(prompt)
    for token in engine.generate([prompt], max_new_tokens, seed=seed, **sampling)[0].ids:
        with torch.inference_mode():
            logits = engine.model(torch.tensor([ids], device=engine.device()))[:, -1]
        probs, order = torch.softmax(logits[0, :engine.n_vocab], dim=-1).topk(top)
        print(f"\n… {tokenizer.decode(ids[-12:])!r}")
        for p, i in zip(probs.tolist(), order.tolist()):
            line = f"{i:8d}  {show_token(tokenizer, i):16s} {p:6.1%} {'█' * round(40 * p)} "
            if i == token:
                line += "←"
            print(line)
        ids.append(token)

def show_samples(engine, prompt, num_samples, max_new_tokens, seed, sampling):
    """Prints several continuations of a prompt, token by token, as they are written."""
    for i in range(num_samples):
        print("-" * 80 + f"\n{printable(prompt)}", end="")
        for _, text in engine.stream(prompt, max_new_tokens, seed=seed + i, **sampling):
            print(printable(text), end="", flush=True)
        print()
