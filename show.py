"""
What the terminal shows of a model: the text that it writes, and how sure it was of it.

    python sample.py --prompt "Return the" --num_samples 3      # three continuations
    python sample.py --prompt "Return the" --top 8              # the next tokens as bars
    python sample.py --logprobs "Return the the"                # how much each token surprises it

in:  an engine of sample.py, which calls these functions        out: lines in the terminal
"""
import codecs
import math
import re
from collections import deque

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

def until(pieces, stops):
    """Pairs (id, text), as Engine.stream yields them → the same pairs up to the first of the texts
    in `stops`, which is left out with all that follows.

    A stop text may span several tokens: pairs whose text may be its beginning wait for the next.
    """
    waiting = deque()
    for pair in pieces:
        waiting.append(pair)
        text = "".join(text for _, text in waiting)
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            yield from first_characters(waiting, min(found))
            return
        certain = len(text) - beginning(text, stops)
        while waiting and len(waiting[0][1]) <= certain:
            certain -= len(waiting[0][1])
            yield waiting.popleft()
    yield from waiting

def beginning(text, stops):
    """How many of the last characters of a text may be the beginning of a stop text."""
    for start in range(max(0, len(text) - max(map(len, stops), default=0)), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return len(text) - start
    return 0

def first_characters(pairs, n):
    """The pairs (id, text) that hold the first n characters; the text of the last one is cut."""
    for token, text in pairs:
        if n <= 0:
            return
        yield token, text[:n]
        n -= len(text)

# ---- What a model writes -------------------------------------------------------------------------

def show_samples(engine, prompt, num_samples, max_new_tokens, seed, sampling, stops=()):
    """Prints several continuations of a prompt, token by token, as they are written."""
    for i in range(num_samples):
        print("-" * 80 + f"\n{printable(prompt)}", end="")
        written = ""
        pieces = engine.stream(prompt, max_new_tokens, seed=seed + i, **sampling)
        for _, text in until(pieces, stops):
            print(printable(text), end="", flush=True)
            written += text
        print()
        if not written.strip():
            print("(The model wrote nothing: its first token ended the text. Another --seed or a "
                  "higher --temperature may write more.)")

# ---- How sure it is ------------------------------------------------------------------------------

def show_steps(engine, prompt, top, max_new_tokens, seed, sampling, stops=()):
    """Prints for each step the `top` most probable tokens as bars, and marks the one drawn."""
    tokenizer = engine.tokenizer
    ids = engine.prompt_ids(prompt)
    pieces = engine.stream(prompt, max_new_tokens, seed=seed, **sampling)
    drawn = [token for token, _ in until(pieces, stops) if token is not None]
    for token in drawn:
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

COLOURS = ((1, "32"), (4, "33"), (8, "35"), (math.inf, "31"))   # up to so many bits: ANSI colour

def surprises(engine, text):
    """→ (ids, bits): the tokens of a text, and for each -log2 of its probability after
    <|endoftext|> and the tokens before it. ValueError if the text is empty, or too long to read."""
    ids = engine.prompt_ids(text)
    block_size = engine.model.config.block_size
    if not 2 <= len(ids) <= block_size + 1:
        raise ValueError(f"the text has {len(ids) - 1} tokens, but the model reads 1 to "
                         f"{block_size}; give a text of such a length")
    ids = torch.tensor(ids, device=engine.device())
    with torch.inference_mode():
        logits = engine.model(ids[None, :-1])[0, :, :engine.n_vocab].float()        # (T, V)
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]
    return ids[1:].tolist(), (-logprobs / math.log(2)).tolist()

def show_surprise(engine, text, in_colours):
    """Prints how much each token of a text surprises the model: in colours, or one a line with its
    bits. Then the sum, and its share of a byte, in which models with other tokens can be compared.
    """
    ids, bits = surprises(engine, text)
    if in_colours:
        print_coloured(engine.tokenizer, ids, bits)
    else:
        print("   bits  token")
        for token, amount in zip(ids, bits):
            print(f"{amount:7.2f}  {show_token(engine.tokenizer, token)}")
    n_bytes = len(engine.tokenizer.decode_bytes(ids))
    print(f"{len(ids)} tokens, {n_bytes} bytes: {sum(bits):.2f} bits, "
          f"{sum(bits) / n_bytes:.3f} bits a byte")

def print_coloured(tokenizer, ids, bits):
    """Prints tokens in the colours of their bits, and below them what each colour means. A
    character that is split over tokens has the colour of its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token, amount in zip(ids, bits):
        colour = next(colour for most, colour in COLOURS if amount <= most)
        text = decoder.decode(tokenizer.decode_bytes([token]))
        print(f"\033[{colour}m{printable(text)}", end="")
    print("\033[0m")
    for most, colour in COLOURS:
        legend = f"up to {most} bits"
        if most == math.inf:
            legend = "more"
        print(f"\033[{colour}m{legend}\033[0m", end="  ")
    print()
