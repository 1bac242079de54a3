"""
Continuous batching: one batch for the texts of many users, in which no text waits for another.

    >>> scheduler = Scheduler(engine, rows=64)              # an Engine of sample.py
    >>> row = scheduler.add(Request(engine.prompt_ids("Once"), max_new_tokens=20, seed=7))
    >>> while scheduler.is_busy():
    ...     for event in scheduler.step():
    ...         print(event.row is row, event.token, event.finish)

in:  requests, at any time: a prompt, how to draw, a seed, the tokens that end the text
out: events, one for each new token of each row

A step feeds each row the last token of its text, all rows in one pass through the model, and draws
the next one from what the model says. That is the whole loop. Because the batch is formed again at
each step, a row that ends leaves at once, and the first prompt that waits takes its place. The rest
saves work:

  - a prompt is read in passes of its own (prefill), many positions at a time; long ones in parts,
    between which the other rows are written
  - what another text in the cache begins with is copied from there: the chat so far, a prompt that
    many samples share, a system message. Rows that ended stay until their place is needed
  - on a CPU, a prompt that many samples continue is read once a step for all of them
  - the rows that are being written are always the first ones of the cache, so that a step reads
    them where they are: only a row that changes its place is ever copied

A row's text depends on its own request alone, not on its neighbours: the random number for a token
is computed from the row's seed and the token's position, so there is no generator that rows share.
What remains is rounding: matrix products of another shape may differ in the last bit.

Papers: continuous batching (Orca, OSDI 2022), nucleus sampling (arXiv 1904.09751), min-p
(2407.01082), repetition penalty (CTRL, 1909.05858), shared prompts (Hydragen, 2402.05099),
SplitMix64 (Steele et al., OOPSLA 2014).
Differs from vLLM (2309.06180): a row's keys and values lie in one piece, not in pages. That is
simpler, and each row takes the memory of the longest one.
"""
import math
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from model import KVCache

# ---- What goes in, what comes out ----------------------------------------------------------------

@dataclass
class Request:
    """A text to continue. `ids` is the prompt; `stop` holds the ids that end the text."""
    ids: list
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = None
    top_p: float = None
    min_p: float = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: frozenset = frozenset()
    top: int = None         # alternatives to report with each token; None: no log-probabilities

    def sampling(self):
        """The arguments of next_token_probs, as a tuple, by which equal ones are found."""
        return (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

@dataclass(eq=False)
class Row:
    """A text while it is being written, and afterwards, while its keys and values are kept."""
    request: Request
    ids: list               # the prompt, and what was written after it
    max_tokens: int         # of prompt and text together
    arrival: int            # its number among all rows
    slot: int = None        # its place in the cache, if it has one
    cached: int = 0         # how many of its ids have been read: their keys and values are there
    reused: int = 0         # how many of these were copied from another text
    last_used: int = 0      # the step at which it ended, or was last copied from
    call: object = None     # a Future: the tokens that a tool will force in, if one is at work
    donor: object = None    # the row from which it will copy `shared` tokens when they are read
    shared: int = 0
    finish: str = None      # "stop": the last id is a stop token; "length": out of tokens or
                            # context; "cancelled"

    def unread(self):
        return len(self.ids) - self.cached

    def written(self):
        return self.ids[len(self.request.ids):]

@dataclass(slots=True)
class Event:
    """A new token of a row."""
    row: Row
    token: int
    sampled: bool                   # drawn from the model, or forced in by a tool?
    logprob: float = None           # of the token, as the model sees it: before temperature, cuts
    alternatives: list = None       # the `top` most probable (token, logprob), best first
    finish: str = None              # that of the row, if this is its last token

# ---- The loop ------------------------------------------------------------------------------------

TOOL_SECONDS = 0.02         # how long a step waits for a tool if there is nothing else to do
READ_TOKENS = 1024          # positions of prompts that a step reads, so that other rows do not wait
FEW_TOKENS = 8              # so few are not worth a pass of their own beside other rows
MIN_SHARED = 16             # tokens that are worth being copied; fewer, if they are a whole prompt
MAX_PADDING = 0.25          # of a prompt that is read beside longer ones, as a share of the longest

class Scheduler:
    """Writes the texts of many requests in one batch of at most `rows` rows.

    engine: its model, tokenizer and tools.
    keep: whether what a row has read stays in the cache after its end.
    tool_threads: so many tools may work at a time while other rows are written; 0: all rows wait
    for a tool, so that the steps are the same in every run.

    The cache is as long as the longest text so far, and takes rows × block_size tokens at most. The
    weights must not change while it is in use, and one thread makes all calls.
    """

    def __init__(self, engine, rows=64, keep=True, tool_threads=0):
        self.engine = engine
        self.keep = keep
        self.pool = None
        if tool_threads:
            self.pool = ThreadPoolExecutor(tool_threads)
        self.model = engine.model
        self.device = engine.device()
        self.block_size = self.model.config.block_size
        self.slots = [None] * rows      # the row in each place of the cache: first those that are
        self.running = 0                # being written, so many; then those that ended
        self.waiting = deque()
        self.cache = SlotCache(self.model.config, rows, self.device, self.model.compute_dtype)
        self.common = None              # CommonPrompts of the running rows, if they share some
        self.step_number = 0
        self.arrivals = 0
        self.positions = 0              # tokens that went through the model, for those who count

    def is_busy(self):
        return self.running > 0 or len(self.waiting) > 0

    def add(self, request):
        """→ the request's row, which waits for a place. ValueError if the prompt leaves no room in
        the context, or if a setting is out of range."""
        check_sampling(*request.sampling())
        n = len(request.ids)
        if not 1 <= n < self.block_size:
            raise ValueError(f"a prompt has {n} tokens, but the model reads 1 to "
                             f"{self.block_size - 1}; shorten it")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
        longest = min(n + request.max_new_tokens, self.block_size)
        row = Row(request, list(request.ids), longest, self.arrivals)
        self.arrivals += 1
        self.waiting.append(row)
        return row

    @torch.inference_mode()
    def cancel(self, row):
        """Frees the place of a row whose reader has gone. A row that ended stays as it is."""
        if row.finish:
            return
        row.finish = "cancelled"
        if row in self.waiting:
            self.waiting.remove(row)
        else:
            self.leave([row])

    @torch.inference_mode()
    def step(self):
        """→ the events of this step: one for each row that is written, one more for a prompt that
        was read to its end, and those of tools."""
        self.step_number += 1
        events = self.hear_tools()
        self.admit()
        rows = self.slots[:self.running]
        calls = [row.call for row in rows if row.call]
        if len(calls) == len(rows):             # nothing to write
            wait(calls, TOOL_SECONDS, FIRST_COMPLETED)
            return events
        events += self.read_prompts()
        rows = self.slots[:self.running]        # other ones, or in other places
        if rows:
            logits = self.feed(rows)                                            # (rows, V)
            ready = [i for i, row in enumerate(rows) if not row.unread() and not row.call]
            if len(ready) < len(rows):
                logits = logits[ready]
            events += self.write([rows[i] for i in ready], logits)
            self.leave([row for row in rows if row.finish])
        return events

    def feed(self, rows):
        """Reads one more token of each running row → the logits of what follows it, (rows, V). A
        row that waits for a tool reads its last token again, which changes nothing."""
        at = [min(row.cached, len(row.ids) - 1) for row in rows]
        ids = [[row.ids[i]] for i, row in zip(at, rows)]
        cache = self.cache.part(0, at, 1)
        if self.share_prompts(rows, at):
            cache = CommonCache(cache, self.common)
        logits = self.model(torch.tensor(ids, device=self.device), cache=cache)[:, -1]
        for i, row in zip(at, rows):
            row.cached = i + 1
        self.positions += len(rows)
        return logits

    def share_prompts(self, rows, at):
        """Whether the next tokens of these rows, at the positions `at`, read their prompts from
        self.common: on a CPU, where several rows share each prompt, and the prompts are most of
        what is read."""
        if self.device.type != "cpu":
            return False
        if self.common is None or self.common.rows != rows:
            self.common = self.find_common(rows, at)
        return self.common is not None and max(at) <= 2 * self.common.shortest

    def find_common(self, rows, at):
        """→ CommonPrompts of these rows, or None."""
        prompts = {id(row.request.ids) for row in rows}
        lengths = [common_tokens(row) for row in rows]
        is_read = all(i >= n for i, n in zip(at, lengths))
        is_most = 0 < max(at) <= 2 * min(lengths)
        if not (is_read and is_most) or 2 * len(prompts) > len(rows):
            return None
        common = self.common
        if common is None or not prompts <= common.number.keys():
            common = CommonPrompts(self.cache, rows)
        common.arrange(rows)
        return common

    def write(self, rows, logits):
        """Draws the next token of each row from its logits (rows, V), lets tools answer → events.
        """
        # a checkpoint may have more ids than its tokenizer
        logits = logits[:, :self.engine.n_vocab].to(drawing_device(self.device))
        if not logits.sum().isfinite():         # a single NaN shows in the sum
            raise ValueError("the model's logits are not finite; its weights are damaged")
        tokens = draw_tokens(rows, logits)
        reports = report_logprobs(rows, tokens, logits)
        events = []
        for row, token, report in zip(rows, tokens, reports):
            events.append(self.append(row, token, True, *report))
            if row.finish or not self.engine.calls_tool(row.ids):
                continue
            if self.pool:
                row.call = self.pool.submit(self.engine.tool_output, list(row.ids))
            else:
                events += self.force(row, self.engine.tool_output(row.ids))
        return events

    def hear_tools(self):
        """→ the events of rows whose tools have answered."""
        events = []
        for row in self.slots[:self.running]:
            if row.call and row.call.done():
                events += self.force(row, row.call.result())
                row.call = None
        self.leave([event.row for event in events if event.finish])
        return events

    def force(self, row, tokens):
        """Adds what a tool said to a row, as far as there is room → events."""
        room = row.max_tokens - len(row.ids)
        return [self.append(row, token, False) for token in tokens[:room]]

    def append(self, row, token, sampled, logprob=None, alternatives=None):
        """Adds a token to a row, and notes if it is its last → the event."""
        row.ids.append(token)
        if sampled and token in row.request.stop:
            row.finish = "stop"
        elif len(row.ids) == row.max_tokens:
            row.finish = "length"
        return Event(row, token, sampled, logprob, alternatives, row.finish)

    # ---- who is in the batch

    def admit(self):
        """Gives places to rows that wait, in the order of their arrival."""
        while self.waiting and self.running < len(self.slots):
            row = self.waiting.popleft()
            donor, shared = self.longest_prefix(row)
            if donor and donor.finish and shared == donor.cached:
                self.swap(donor.slot, self.running)     # the newcomer continues it in its place
                row.cached = row.reused = shared
            else:
                if donor:
                    donor.last_used = self.step_number
                row.donor = donor
                row.shared = shared
                self.make_room()
            self.enter(row)
            self.copy_prefix(row)

    def enter(self, row):
        """Puts a row into the place after the running ones. What was kept there is lost."""
        if self.slots[self.running]:
            self.slots[self.running].slot = None
        self.slots[self.running] = row
        row.slot = self.running
        self.running += 1

    def make_room(self):
        """Of the rows that ended, brings the one that was not used for longest to the place after
        the running ones, or an empty place."""
        if self.slots[self.running] is None:
            return
        ages = [row.last_used if row else -1 for row in self.slots[self.running:]]
        self.swap(self.running, self.running + ages.index(min(ages)))

    def leave(self, rows):
        """Takes rows out of the batch; the last running ones move to their places. What they have
        read stays in the cache, because the next question of a chat begins with it."""
        for row in sorted(rows, key=lambda row: row.slot, reverse=True):
            self.running -= 1
            row.last_used = self.step_number
            row.donor = None
            if not self.keep or row.cached < MIN_SHARED:
                self.slots[row.slot] = None
                self.move(self.running, row.slot)
                row.slot = None
            else:
                self.swap(self.running, row.slot)

    def move(self, source, target):
        """A row moves to an empty place."""
        row = self.slots[source]
        if row:
            self.cache.copy(source, target, row.cached)
            row.slot = target
        self.slots[source] = None
        self.slots[target] = row

    def swap(self, a, b):
        """Two rows change places; one of the places may be empty."""
        if a == b:
            return
        if self.slots[a] is None:
            self.move(b, a)
        elif self.slots[b] is None:
            self.move(a, b)
        else:
            first = self.slots[a]
            second = self.slots[b]
            self.cache.swap(a, b, max(first.cached, second.cached))
            first.slot = b
            second.slot = a
            self.slots[a] = second
            self.slots[b] = first

    # ---- what is in the cache already

    def longest_prefix(self, row):
        """The row in the cache with which a new one shares the most ids from the beginning on →
        (row, how many). (None, 0) if they are too few. The last id of a prompt is always read,
        because its logits are needed."""
        most = len(row.ids) - 1
        start = row.ids[:min(most, MIN_SHARED)]
        best = None
        longest = 0
        for other in self.newest_first():
            if longest == most:
                break
            if other is None or other.ids[:len(start)] != start:
                continue
            n = min(shared_tokens(row.ids, other.ids), most)
            if other.finish:
                n = min(n, other.cached)
            if n > longest:
                best = other
                longest = n
        while best and best.donor and longest <= best.shared:   # it will copy these ids itself
            best = best.donor
        return best, longest

    def newest_first(self):
        """All rows in the cache; another sample of the same prompt is found at once."""
        running = self.slots[:self.running]
        return [*reversed(running), *self.slots[self.running:]]

    def copy_prefix(self, row):
        """Copies what a row shares with its donor, as soon as the donor has read it."""
        donor = row.donor
        if donor is None or not donor.finish and donor.cached < row.shared:
            return
        n = min(row.shared, donor.cached)
        if donor.slot is not None and n > row.cached:
            self.cache.copy(donor.slot, row.slot, n)
            row.cached = row.reused = n
        row.donor = None

    # ---- prefill

    def read_prompts(self):
        """Reads prompts that are new, at most READ_TOKENS in a step → the events of their first
        tokens."""
        events = []
        left = READ_TOKENS
        for row in self.slots[:self.running]:
            self.copy_prefix(row)       # a step may have read the last token that it waited for
        while batch := self.next_batch(left):
            events += self.read(batch)
            left -= sum(n for n, _ in batch)
            for row in self.slots[:self.running]:
                self.copy_prefix(row)
        self.leave([row for row in self.slots[:self.running] if row.finish])
        return events

    def next_batch(self, left):
        """(tokens to read, row) of rows that are read in one pass: of those that came first, with
        `left` tokens together, some that are about as long as the longest."""
        waiting = []
        new = [row for row in self.slots[:self.running]
               if row.unread() > 1 and not row.donor and not row.finish]
        for row in sorted(new, key=lambda row: row.arrival):
            n = min(row.unread(), left)
            if n:
                waiting.append((n, row))
                left -= n
        if sum(n for n, _ in waiting) < min(self.running, FEW_TOKENS):
            return []
        longest, first = max(waiting, key=lambda pair: pair[0])
        batch = []
        for n, row in waiting:
            has_room = row.cached + longest <= self.block_size
            is_alike = n >= (1 - MAX_PADDING) * longest
            if has_room and is_alike and (row.cached > 0) == (first.cached > 0):
                batch.append((n, row))
        return batch

    def read(self, batch):
        """batch: (tokens to read, row) of rows that share a pass → the events of those whose
        prompts end with it, and of other samples of these prompts."""
        first = self.running - len(batch)
        for slot, (_, row) in enumerate(batch, first):
            self.swap(slot, row.slot)
        T = max(n for n, _ in batch)
        # later tokens overwrite what the padding leaves in the cache, before a query can see it
        ids = [row.ids[row.cached:row.cached + n] + [0] * (T - n) for n, row in batch]
        cache = self.cache.part(first, [row.cached for _, row in batch], T)
        ids = torch.tensor(ids, device=self.device)
        last = torch.tensor([n - 1 for n, _ in batch], device=self.device)
        logits = self.model.logits(self.model.hidden(ids, cache, last)[:, 0])   # (batch, V)
        ready = []
        at = []                         # for each ready row, its place in the batch
        for i, (n, row) in enumerate(batch):
            row.cached += n
            self.positions += n
            if not row.unread():
                samples = [row, *self.copy_prompt(row)]
                ready += samples
                at += [i] * len(samples)
        if not ready:
            return []
        return self.write(ready, logits[at])

    def copy_prompt(self, donor):
        """Copies all of a prompt to the other samples of it → their rows."""
        samples = [row for row in self.slots[:self.running]
                   if row.donor is donor and row.ids == donor.ids]
        for row in samples:
            self.cache.copy(donor.slot, row.slot, donor.cached)
            row.cached = donor.cached
            row.reused = donor.cached - 1
            row.donor = None
        return samples

def shared_tokens(a, b):
    """How many ids two texts have in common at their beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    for i in range(n):
        if a[i] != b[i]:
            return i

# ---- The cache -----------------------------------------------------------------------------------

class SlotCache(KVCache):
    """A KVCache whose rows come and go, and which becomes longer when a row needs it."""

    def __init__(self, config, rows, device, dtype):
        super().__init__(config, rows, 0, device, dtype)
        self.block_size = config.block_size

    def part(self, first, lengths, T):
        """The rows from `first` on as a cache of their own that shares this memory. lengths: tokens
        in each of them, to which T will be added."""
        room = self.k.shape[2]
        needed = max(lengths) + T
        if needed > room:
            self.lengthen(min(max(needed + 64, 2 * room), self.block_size))
        part = self.rows(slice(first, first + len(lengths)))
        part.pos = torch.tensor(lengths, device=self.k.device)
        part.used = max(lengths)
        return part

    def lengthen(self, tokens):
        for name in ("k", "v"):
            old = getattr(self, name)
            L, B, room, NH, HS = old.shape
            new = old.new_empty(L, B, tokens, NH, HS)
            new[:, :, :room] = old
            new[:, :, room:] = 0        # never NaN: a value that no query sees counts 0 times
            setattr(self, name, new)

    def copy(self, source, target, n):
        """Copies the first n tokens of one row to another."""
        self.k[:, target, :n] = self.k[:, source, :n]
        self.v[:, target, :n] = self.v[:, source, :n]

    def swap(self, a, b, n):
        """The first n tokens of two rows change places."""
        for t in (self.k, self.v):
            of_a = t[:, a, :n].clone()
            t[:, a, :n] = t[:, b, :n]
            t[:, b, :n] = of_a

# ---- Prompts that rows share, read once for all of them ------------------------------------------

def common_tokens(row):
    """So many tokens of a row may be read for all samples of its prompt: not its last one, which a
    new row reads beside rows that are being written."""
    return len(row.request.ids) - 1

class CommonPrompts:
    """Keys and values of the prompts of these rows, (L, P, NH, S, HS). Rows whose requests have the
    same list of ids share one. In the cache a row keeps its own, for the time when it needs them.
    """

    def __init__(self, cache, rows):
        first = {}
        for row in rows:
            first.setdefault(id(row.request.ids), row)
        self.prompts = [row.request.ids for row in first.values()]  # so that no other list gets the
        self.number = {key: p for p, key in enumerate(first)}       # id of one of them
        L, _, _, NH, HS = cache.k.shape
        S = max(common_tokens(row) for row in rows)
        self.k = cache.k.new_zeros(L, len(first), NH, S, HS)
        self.v = cache.k.new_zeros(L, len(first), NH, S, HS)
        for p, row in enumerate(first.values()):
            n = common_tokens(row)
            self.k[:, p, :, :n] = cache.k[:, row.slot, :n].transpose(1, 2)
            self.v[:, p, :, :n] = cache.v[:, row.slot, :n].transpose(1, 2)

    def arrange(self, rows):
        """Notes which rows, in this order, share which prompt."""
        self.rows = rows
        sharing = [[] for _ in self.prompts]
        for i, row in enumerate(rows):
            sharing[self.number[id(row.request.ids)]].append(i)
        G = max(map(len, sharing))
        self.members = torch.tensor([some + [0] * (G - len(some)) for some in sharing])     # (P, G)
        self.places = torch.zeros(len(rows), dtype=torch.long)      # (B,): where in members
        for p, some in enumerate(sharing):
            self.places[some] = p * G + torch.arange(len(some))
        lengths = [common_tokens(row) for row in rows]
        self.lengths = torch.tensor(lengths)[:, None]               # (B, 1)
        self.shortest = min(lengths)
        self.longest = max(lengths)

class CommonCache:
    """To the model a cache of rows that get one more token, as KVCache is. Its attention reads each
    of the prompts that rows share once (Hydragen, arXiv 2402.05099). In two products,

        scores = (q Kᵀ of the prompt, q Kᵀ of the row's own tokens)    p = softmax(scores)
        y      = p V of the prompt + p V of the row's own tokens

    the queries of all rows that share a prompt are one matrix.
    """

    def __init__(self, part, common):
        self.part = part            # of the SlotCache: these rows
        self.common = common
        self.pos = part.pos
        self.used = part.used
        self.masks = {}

    def append(self, layer, k, v, pos, window):
        """What KVCache.append does and returns, but from the end of the shortest prompt on; and a
        mask to be added to the scores, (B, 1, S of the prompts + S of what is returned)."""
        self.layer = layer
        first = self.common.shortest
        k, v, seen = self.part.append(layer, k, v, pos, window)
        if window not in self.masks:
            seen = seen[:, 0, 0]                                    # (B, used + 1)
            is_common = torch.arange(seen.shape[1]) < self.common.lengths
            common = (seen & is_common)[:, :self.common.longest]
            own = (seen & ~is_common)[:, first:]
            hidden = ~torch.cat((common, own), 1)[:, None]
            self.masks[window] = k.new_zeros(hidden.shape).masked_fill(hidden, -math.inf)
        return k[:, first:], v[:, first:], self.masks[window]

    def attention(self, q, k, v, window, scale, mask):
        """What sdpa returns for q, k, v (B, 1 or S, NH, HS) and append's mask: (B, 1, NH, HS)."""
        S = self.common.longest
        members = self.common.members
        prompt_k = self.common.k[self.layer][:, :, :S]              # (P, NH, S, HS)
        prompt_v = self.common.v[self.layer][:, :, :S]
        queries = q[members, 0].transpose(1, 2)                     # (P, NH, G, HS)
        of_prompt = self.by_row(queries @ prompt_k.transpose(2, 3))
        own = (q * k).sum(-1).transpose(1, 2)                       # (B, NH, used + 1 - shortest)
        p = torch.softmax(torch.cat((of_prompt, own), -1) * scale + mask, -1)
        from_prompt = self.by_row(p[members, :, :S].transpose(1, 2) @ prompt_v)
        from_own = (p[..., S:].transpose(1, 2)[..., None] * v).sum(1)
        return (from_prompt + from_own)[:, None]

    def by_row(self, x):
        """x (P, NH, G, …) → (B, NH, …)"""
        return x.transpose(1, 2).flatten(0, 1)[self.common.places]

    def advance(self, T):
        self.part.advance(T)

# ---- From logits to one token --------------------------------------------------------------------

MIN_TEMPERATURE = 1e-5      # a lower one is greedy, and would only overflow

def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None, min_p=None,
                     repetition_penalty=1.0, contexts=()):
    """logits (B, V) → the distribution that the next token is drawn from, (B, V).

    repetition_penalty comes first and needs `contexts`, as penalize describes both.
    Temperature 0 gives all of it to the best token. top_k keeps the k best tokens. top_p keeps, of
    these, the fewest best tokens that hold a share p. min_p keeps those that are at least min_p
    times as probable as the best. The tokens that are kept share the rest in proportion. This is
    also the order of transformers. None: no cut.
    """
    if repetition_penalty != 1:
        logits = penalize(logits, contexts, repetition_penalty)
    if temperature < MIN_TEMPERATURE:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    probs = torch.softmax(logits / temperature, dim=-1)
    if top_k is not None:
        kth = probs.topk(min(top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0.0)
    if top_p is not None and top_p < 1:     # all tokens hold a share 1, whatever rounding says
        ordered, order = probs.sort(descending=True)
        ends = ordered.double().cumsum(-1)
        before = ends - ordered             # a token stays if the better ones hold less than p
        is_cut = before >= top_p * ends[:, -1:]
        probs = probs.masked_fill(torch.zeros_like(is_cut).scatter_(1, order, is_cut), 0.0)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs / probs.sum(-1, keepdim=True)

def penalize(logits, contexts, penalty):
    """logits (B, V) → logits in which each token that a row has read or written is less probable.

    contexts: the ids of each row, its prompt included. A logit above 0 is divided by the penalty
    and one below 0 is multiplied by it, as in transformers. Differs from CTRL, which divides both,
    so that a token whose logit is below 0 becomes more probable there.
    """
    logits = logits.clone()
    for b, ids in enumerate(contexts):
        seen = torch.tensor(sorted(set(ids)), device=logits.device)
        before = logits[b, seen]
        logits[b, seen] = torch.where(before > 0, before / penalty, before * penalty)
    return logits

def check_sampling(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """ValueError if an argument of next_token_probs is outside of its range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; leave it out for no cut")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, got {min_p}")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be above 0, got {repetition_penalty}; 1 means "
                         "none")

# ---- Which token: a random number that depends on the row alone ----------------------------------

def draw_tokens(rows, logits):
    """The next token of each row, from its logits (rows, V). Rows with equal settings share the
    work."""
    groups = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.request.sampling(), []).append(i)
    tokens = [None] * len(rows)
    for sampling, members in groups.items():
        part = logits
        if len(groups) > 1:
            part = logits[members]
        texts = [rows[i].ids for i in members]
        shares = [random_share(rows[i].request.seed, len(rows[i].ids)) for i in members]
        shares = torch.tensor(shares, dtype=torch.float64, device=logits.device)
        probs = next_token_probs(part, *sampling, contexts=texts)
        for i, token in zip(members, draw(probs, shares).tolist()):
            tokens[i] = token
    return tokens

def draw(probs, shares):
    """probs (B, V), shares (B,) from 0 to below 1 → one token per row, (B,), by inverse-CDF
    sampling: the first token at which the cumulative probability exceeds the row's share."""
    # in fp32, rounding could give a share to a token of probability 0
    ends = probs.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(ends, shares[:, None] * ends[:, -1:], right=True)[:, 0]

def splitmix64(x):
    """A 64-bit number → another one, from which nobody would guess the first (SplitMix64)."""
    x = (x + 0x9E3779B97F4A7C15) % 2 ** 64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2 ** 64
    return x ^ x >> 31

def mix(seed, number):
    """The seed of sample `number` of a request: as random as the seed itself, and repeatable."""
    return splitmix64(splitmix64(seed) + number)

def random_share(seed, position):
    """The uniform number, 0 to below 1, that draws the token at this position of a text."""
    return (mix(seed, position) >> 11) / 2 ** 53

def drawing_device(device):
    """Where draw() runs for a model on this device. Apple's GPUs have no fp64."""
    return torch.device("cpu") if device.type == "mps" else device

# ---- Log-probabilities ---------------------------------------------------------------------------

def report_logprobs(rows, tokens, logits):
    """(log-probability of its token, its `top` best alternatives) for each row; () for a row that
    did not ask for them."""
    reports = [()] * len(rows)
    asking = [i for i, row in enumerate(rows) if row.request.top is not None]
    if not asking:
        return reports
    logprobs = torch.log_softmax(logits[asking], dim=-1)
    most = max(rows[i].request.top for i in asking)
    best = logprobs.topk(min(most, logprobs.shape[1]))
    for i, row_logprobs, ids, values in zip(asking, logprobs, best.indices.tolist(),
                                            best.values.tolist()):
        alternatives = list(zip(ids, values))[:rows[i].request.top]
        reports[i] = row_logprobs[tokens[i]].item(), alternatives
    return reports
