"""
Log-likelihood: how probable a model finds the possible answers of a question.

    >>> row = SharedRow([([0, 5, 6, 7], 2), ([0, 5, 8, 9], 2)], block_size=8)
    >>> row.ids                         # two answers, 6 7 and 8 9; 0 5 before both is read once
    [0, 5, 6, 8]

    in:  a model; questions, each a list of spans (ids, start), of which ids[start:] is scored
    out: a Score for each span

score_alone is the obvious way: each answer is read with all that stands before it. score finds the
same faster. It reads what the answers of a question begin with once, and then every answer as a
branch that sees this beginning and itself; and the head sees only the places whose next id counts.
"""
from dataclasses import dataclass

import torch

from engine import shared_tokens
from model import sdpa, visible

# ---- One answer at a time ------------------------------------------------------------------------

def token_spans(tokenizer, pairs):
    """(context, continuation) texts → spans (ids, start): ids[start:] is what gets scored.

    Context and continuation are tokenized together, because " Paris" is one token even if the space
    belongs to the context. The span starts where the tokens first differ from the context's own.
    """
    tokens = {}         # of each text; choices have the same context
    for context, continuation in pairs:
        for text in (context, context + continuation):
            if text not in tokens:
                tokens[text] = tokenizer.encode_ordinary(text)
    spans = []
    for context, continuation in pairs:
        whole = tokens[context + continuation]
        shared = shared_tokens(tokens[context], whole[:-1])     # at least one token is scored
        spans.append(([tokenizer.eot, *whole], 1 + shared))
    return spans

def score_alone(model, ids, start):
    """The log-probabilities of ids[start:], each predicted from all ids before it, and whether
    greedy decoding writes them. This is what score() computes faster."""
    logits = model(torch.tensor([ids[:-1]], device=next(model.parameters()).device))[0, start - 1:]
    wanted = torch.tensor(ids[start:], device=logits.device)
    logprobs = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
    return logprobs, bool((logits.argmax(-1) == wanted).all())

@dataclass(frozen=True)
class Score:
    """What a model finds about a span: how probable it is, and whether greedy decoding writes it.
    """
    logprob: float      # in nats, the sum over its tokens
    n_tokens: int
    greedy: bool

    def mean(self):
        return self.logprob / self.n_tokens

# ---- All answers of a question at once -----------------------------------------------------------

class SharedRow:
    """The spans of a question as one row of ids, in which what several begin with stands once.

    >>> row = SharedRow([([0, 5, 6, 7], 2), ([0, 5, 8, 9], 2)], block_size=8)
    >>> row.ids, row.pos, row.ends              # 0 5, which both begin with; then 6; then 8
    ([0, 5, 6, 8], [0, 1, 2, 2], [4, 4, 3, 4])
    >>> row.asked, row.targets                  # 5 predicts 6 and 8; 6 predicts 7; 8 predicts 9
    ([1, 2, 1, 3], [6, 7, 8, 9])

    Each id has its position in its span. The id at s belongs to the spans of those from s to
    ends[s] - 1, so that they alone see it. The last id of a span is predicted, but never read.
    """
    def __init__(self, spans, block_size):
        self.ids = []
        self.pos = []
        self.ends = []
        self.asked = []         # places whose next ids are scored, span after span
        self.targets = []       # these ids
        self.lengths = []       # how many there are of each span
        places = {}             # of each span's ids in the row
        path = []               # those of the span before it
        before = []
        cut = [max(0, len(ids) - 1 - block_size) for ids, _ in spans]   # a beginning is lost
        for n in sorted(range(len(spans)), key=lambda n: spans[n][0][cut[n]:]):
            read = spans[n][0][cut[n]:-1]
            shared = shared_tokens(before, read)
            self.close(path[shared:])
            path = path[:shared] + list(range(len(self.ids), len(self.ids) + len(read) - shared))
            self.ids += read[shared:]
            self.pos += range(shared, len(read))
            self.ends += [None] * (len(read) - shared)
            places[n] = path
            before = read
        self.close(path)
        for n, (ids, start) in enumerate(spans):
            start = max(1, start - cut[n])
            self.asked += places[n][start - 1:]
            self.targets += ids[cut[n] + start:]
            self.lengths.append(len(places[n]) - start + 1)

    def close(self, places):
        """The ids at these places belong to no span that comes later."""
        for place in places:
            self.ends[place] = len(self.ids)

class SharedRows:
    """A batch of rows, padded at the end. To model.hidden it is a cache, as KVCache is: it keeps
    nothing, but says which ids of a row see which."""
    attention = staticmethod(sdpa)

    def __init__(self, rows, device):
        def padded(lists, fill):
            longest = max(map(len, lists))
            return torch.tensor([one + [fill] * (longest - len(one)) for one in lists],
                                device=device)

        self.ids = padded([row.ids for row in rows], 0)                         # (B, T)
        self.asked = padded([row.asked for row in rows], 0)                     # (B, N)
        self.targets = padded([row.targets for row in rows], -1)                # (B, N)
        T = self.ids.shape[1]
        self.t = torch.arange(T, device=device)
        self.pos = torch.zeros(len(rows), dtype=torch.long, device=device)
        self.used = 0
        self.masks = {}
        self.ends = None                # every id sees all before it
        if any(row.pos[-1] + 1 < len(row.pos) for row in rows):
            self.pos = padded([row.pos for row in rows], 0) - self.t            # added to 0, 1, …
            self.used = 1 + max(max(row.pos) for row in rows) - T
            self.ends = padded([row.ends for row in rows], T)[:, None]          # (B, 1, T)

    def append(self, layer, k, v, pos, window):
        if self.ends is not None and window not in self.masks:
            t = self.t[:, None]
            mask = visible(pos[:, :, None], pos[:, None], window)               # (B, T, T)
            mask &= (self.t <= t) & (t < self.ends)
            self.masks[window] = mask[:, None]
        return k, v, self.masks.get(window)

    def advance(self, T):
        """A batch is read once."""

def batches(rows, batch_ids):
    """Yields the indices of rows that are read together. The longest come first, so that rows of
    similar length share a batch, which holds at most batch_ids ids or one row."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    while order:
        B = max(1, batch_ids // len(rows[order[0]].ids))
        yield order[:B]
        order = order[B:]

@torch.inference_mode()
def score(model, questions):
    """Questions, each a list of spans (ids, start) → for each question a list of Scores. What the
    spans of a question begin with is read once. A span that is longer than the model's context
    loses its beginning."""
    device = next(model.parameters()).device
    batch_ids = 2 ** 15 if device.type == "cuda" else 2 ** 9    # a CPU's cache holds so many
    rows = [SharedRow(spans, model.config.block_size) for spans in questions]
    training = model.training
    model.eval()
    found = [None] * len(rows)
    for chosen in batches(rows, batch_ids):
        batch = SharedRows([rows[i] for i in chosen], device)
        scored = batch.targets >= 0
        hidden = model.hidden(batch.ids, batch, batch.asked)[scored]    # (n, C)
        targets = batch.targets[scored]                                 # (n,)
        logprobs = []
        greedy = []
        for h, target in zip(hidden.split(256), targets.split(256)):
            logits = model.logits(h)                                    # (256, V)
            logprobs += logits.log_softmax(-1).gather(1, target[:, None])[:, 0].tolist()
            greedy += (logits.argmax(-1) == target).tolist()
        at = 0
        for i in chosen:
            found[i] = []
            for n in rows[i].lengths:
                part = slice(at, at + n)
                found[i].append(Score(sum(logprobs[part]), n, all(greedy[part])))
                at += n
    model.train(training)
    return found

def mean_log_probs(model, spans):
    """For each span the mean log-probability of its tokens in nats; none shares what it reads."""
    return [found.mean() for [found] in score(model, [[span] for span in spans])]

def is_right(scores, gold):
    """The best of a question's scores is the gold one, by its mean log-probability per token;
    without gold, greedy decoding must write the only span."""
    if gold is None:
        return scores[0].greedy
    best = max(range(len(scores)), key=lambda i: scores[i].mean())
    return best == gold
