"""
OpenAI's API: a client's request becomes rows of the engine, and their tokens become its answer.

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="demo-small-rl", messages=[…], stream=True)

in:  the JSON that the client sent, and the models that serve.py loaded
out: requests for the engine; then the JSON of the answer, whole or in pieces

Nothing here waits or touches the network: read_chat and read_completion check a request, a Choice
collects the tokens of one answer, and an Answer puts them into OpenAI's forms.

Differs from OpenAI: top_k, min_p and repetition_penalty are known too. What an assistant thinks,
and what it asks a tool and is told, is `reasoning_content`, as other servers of open models have
it. A field that would change the answer and is not known here is refused, never ignored.
"""
import codecs
import math
import secrets
import time
from dataclasses import dataclass, field

from engine import Request

# ---- Checking a request --------------------------------------------------------------------------

class Refused(Exception):
    """A request that cannot be answered. status: of HTTP; param: the field that is wrong."""

    def __init__(self, message, param=None, status=400, code=None):
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
         404: "invalid_request_error", 405: "invalid_request_error", 408: "invalid_request_error",
         413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error"}

def error_form(refused):
    """A Refused → the JSON that OpenAI's clients expect."""
    error = dict(message=str(refused), type=KINDS.get(refused.status, "server_error"),
                 param=refused.param, code=refused.code)
    return dict(error=error)

NUMBERS = {     # field: (its type, the least, the most)
    "max_tokens": (int, 1, 2 ** 31), "max_completion_tokens": (int, 1, 2 ** 31),
    "n": (int, 1, 128), "seed": (int, -2 ** 63, 2 ** 63 - 1), "temperature": (float, 0, 2),
    "top_k": (int, 1, 2 ** 31), "top_p": (float, 0, 1), "min_p": (float, 0, 1),
    "repetition_penalty": (float, 0.01, 100), "top_logprobs": (int, 0, 20)}
NEUTRAL = {     # fields that are not known here: the values with which they change nothing
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,),
    "echo": (False,), "suffix": ("",), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],)}
HARMLESS = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
            "prompt_cache_key")
COMMON = ("model", "stream", "stream_options", "stop", "logprobs", *NUMBERS)
MAX_STOPS = 16          # OpenAI allows 4

def check_fields(body, more):
    """Refuses a field that is not known, unless its value changes nothing."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    for name, value in body.items():
        is_known = name in COMMON or name in more or name in HARMLESS
        if is_known or value is None:
            continue
        if name not in NEUTRAL:
            raise Refused(f"unknown field: {name}", name, code="unknown_parameter")
        if value not in NEUTRAL[name]:
            raise Refused(f"{name} is not supported; leave it out", name, code="unsupported_value")

def number(body, name, default=None):
    """A field that is a number in its range; a default if it is not there or null."""
    value = body.get(name)
    if value is None:
        return default
    kind, least, most = NUMBERS[name]
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or isinstance(value, float) and not math.isfinite(value):
        words = {int: "a whole number", float: "a number"}
        raise Refused(f"{name} must be {words[kind]}", name)
    if not least <= value <= most:
        raise Refused(f"{name} must be from {least} to {most}, got {value}", name)
    return value

def flag(body, name):
    """A field that is true or false, or not there."""
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise Refused(f"{name} must be true or false", name)
    return value

def texts(body, name, most):
    """A field that is a text or a list of texts → the list."""
    value = body.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise Refused(f"{name} must be a text, or a list of texts, that are not empty", name)
    if len(value) > most:
        raise Refused(f"{name} must have at most {most} texts, got {len(value)}", name)
    return value

def find_model(body, models):
    """The model that a body names. Raises Refused with status 404 if there is none."""
    name = body.get("model")
    if not isinstance(name, str):
        raise Refused("model must name one of the models of /v1/models", "model")
    if name not in models:
        raise Refused(f"there is no model {name}; /v1/models lists them", "model", 404,
                      "model_not_found")
    return models[name]

PARTS = ("think", "python", "output", "search")     # what an assistant's turn has beside text
MAX_MESSAGES = 1000

def read_messages(body):
    """The messages of a chat, as Tokenizer.render takes them."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list that is not empty", "messages")
    if len(messages) > MAX_MESSAGES:
        raise Refused(f"there may be at most {MAX_MESSAGES} messages, got {len(messages)}",
                      "messages")
    return [read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]

def read_message(message, where):
    """A message → {"role", "content"}; where: how an error names it."""
    if not isinstance(message, dict):
        raise Refused(f"{where} must be an object", "messages")
    role = message.get("role")
    content = message.get("content")
    if role == "developer":         # what newer models call the system
        role = "system"
    if role not in ("system", "user", "assistant", "tool"):
        raise Refused(f"{where}.role must be system, user, assistant or tool", "messages")
    if isinstance(content, list):
        content = [read_part(part, role, where) for part in content]
    elif not isinstance(content, str):
        raise Refused(f"{where}.content must be a text or a list of parts", "messages")
    return dict(role=role, content=content)

def plain(message):
    """The text of a message, without what else an assistant's may have."""
    if isinstance(message["content"], str):
        return message["content"]
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")

def read_part(part, role, where):
    """A part of a content. An assistant's may be those of bpe.py; the others' are texts."""
    allowed = ("text",)
    if role == "assistant":
        allowed = ("text", *PARTS)
    if not isinstance(part, dict) or part.get("type") not in allowed:
        raise Refused(f"{where}.content may have parts of type {', '.join(allowed)} alone",
                      "messages")
    if not isinstance(part.get("text"), str):
        raise Refused(f"{where}.content: the text of a part must be a text", "messages")
    return dict(type=part["type"], text=part["text"])

# ---- What is asked -------------------------------------------------------------------------------

@dataclass
class Asked:
    """A request that was checked."""
    model: object               # of serve.py: its name, engine and prompts
    prompts: list               # lists of ids
    sampling: dict
    n: int = 1                  # answers to each prompt
    max_tokens: int = 16
    seed: int = 0
    stops: list = field(default_factory=list)
    top: int = 0                # alternatives at each token
    has_logprobs: bool = False
    is_stream: bool = False
    has_usage: bool = False     # at the end of a stream
    is_chat: bool = False

    def requests(self):
        """What the engine is to do: n rows for each prompt. Row i of a prompt has the seed
        seed + i, so that it is what a request for it alone would write."""
        tokenizer = self.model.engine.tokenizer
        special = tokenizer.special
        stop = frozenset([special["<|endoftext|>"], special["<|im_end|>"]])
        top = self.top if self.has_logprobs else None
        rows = []
        for prompt in self.prompts:
            for i in range(self.n):
                rows.append(Request(prompt, self.max_tokens, seed=self.seed + i, stop=stop,
                                    top=top, **self.sampling))
        return rows

# OpenAI's defaults, and no cut for the settings that it does not have
SAMPLING = dict(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0)

def read_common(body, model, prompts, default_tokens):
    """The fields that both kinds of request share → Asked."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or options and not body.get("stream"):
        raise Refused("stream_options must be an object, and needs stream: true", "stream_options")
    sampling = {name: number(body, name, default) for name, default in SAMPLING.items()}
    if sampling["top_p"] == 0:      # clients send it for the best token alone
        sampling.update(top_p=None, top_k=1)
    room = model.block_size - max(map(len, prompts))
    if room < 1:
        most = max(map(len, prompts))
        raise Refused(f"this model's maximum context length is {model.block_size} tokens, and the "
                      f"prompt has {most} of them, which leaves none for an answer",
                      "messages", code="context_length_exceeded")
    wanted = number(body, "max_completion_tokens", number(body, "max_tokens", default_tokens))
    seed = number(body, "seed")
    if seed is None:
        seed = secrets.randbits(62)
    return Asked(model, prompts, sampling, n=number(body, "n", 1),
                 max_tokens=min(wanted or room, room, model.max_tokens), seed=seed % 2 ** 63,
                 stops=texts(body, "stop", MAX_STOPS), is_stream=flag(body, "stream"),
                 has_usage=flag(options, "include_usage"))

def read_chat(body, models):
    """The body of /v1/chat/completions → Asked. A base model gets the text of the messages as the
    beginning of a document, since it has never seen a conversation."""
    check_fields(body, ("messages",))
    model = find_model(body, models)
    prompt = model.prompt(read_messages(body))
    asked = read_common(body, model, [prompt], None)
    asked.is_chat = True
    asked.has_logprobs = flag(body, "logprobs")
    asked.top = number(body, "top_logprobs", 0)
    if asked.top and not asked.has_logprobs:
        raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    return asked

MAX_PROMPTS = 64

def read_completion(body, models):
    """The body of /v1/completions → Asked. The prompt is a text, ids, or a list of either."""
    check_fields(body, ("prompt",))
    model = find_model(body, models)
    prompt = body.get("prompt", "")
    is_ids = isinstance(prompt, list) and prompt and isinstance(prompt[0], int)
    if isinstance(prompt, str) or is_ids:
        prompt = [prompt]
    if not isinstance(prompt, list) or not 1 <= len(prompt) <= MAX_PROMPTS:
        raise Refused(f"prompt must be a text, a list of ids, or a list of 1 to {MAX_PROMPTS} of "
                      "them", "prompt")
    prompts = [model.document(one) for one in prompt]
    asked = read_common(body, model, prompts, 16)
    top = body.get("logprobs")
    if top is not None:
        if not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= 20:
            raise Refused("logprobs must be a whole number from 0 to 20", "logprobs")
        asked.has_logprobs = True
        asked.top = top
    return asked

# ---- One answer ----------------------------------------------------------------------------------

@dataclass
class Piece:
    """The text of a token of an answer."""
    part: str       # "text" or one of PARTS
    text: str       # "" for a token that is not the last one of its character
    event: object   # of the scheduler; None for what is left of a character at the end

class Choice:
    """One of the answers to a request, while it is being written: `add` takes the next event of the
    scheduler and returns the pieces that are certain, none of which may still be the beginning of a
    text in `stops`. `finish` is None, "stop" or "length"."""

    def __init__(self, tokenizer, stops=(), in_parts=False):
        self.tokenizer = tokenizer
        self.stops = stops
        self.in_parts = in_parts        # whether special tokens open parts, as in a chat
        self.name_of = {i: name for name, i in tokenizer.special.items()}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.part = "text"
        self.waiting = []
        self.pieces = []                # all that was returned
        self.finish = None
        self.n_tokens = 0

    def add(self, event):
        self.n_tokens += 1
        part = self.part_after(event.token)
        if event.finish == "stop" or part != self.part:     # a token that is not text ends a text
            certain = self.release()
            self.part = part
        else:
            text = self.decoder.decode(self.tokenizer.decode_bytes([event.token]))
            self.waiting.append(Piece(self.part, text, event))
            certain = self.settle()
        if event.finish and not self.finish:
            self.finish = event.finish
            certain += self.release()
        self.pieces += certain
        return certain

    def part_after(self, token):
        """The part that a token opens; "text" if it closes one; the same part for other tokens."""
        name = self.name_of.get(token, "")
        if self.in_parts and self.part == "text" and name.strip("<|>") in PARTS:
            return name.strip("<|>")
        if self.in_parts and name == f"<|/{self.part}|>":
            return "text"
        return self.part

    def settle(self):
        """The waiting pieces that no stop text can begin in; ends the answer at a stop text."""
        from show import beginning
        text = "".join(piece.text for piece in self.waiting)
        found = [text.index(stop) for stop in self.stops if stop in text]
        certain = len(text) - beginning(text, self.stops)
        if found:
            self.finish = "stop"
            certain = min(found)
        done = []
        while self.waiting and len(self.waiting[0].text) <= certain:
            certain -= len(self.waiting[0].text)
            done.append(self.waiting.pop(0))
        if found:
            if certain:
                self.waiting[0].text = self.waiting[0].text[:certain]
                done.append(self.waiting[0])
            self.waiting = []
        return done

    def release(self):
        """All waiting pieces, because the text has ended, and what is left of a character that was
        cut."""
        done = self.waiting
        self.waiting = []
        rest = self.decoder.decode(b"", final=True)
        if rest:
            done.append(Piece(self.part, rest, None))
        return done

    def text_of(self, is_text=True):
        """What it says; or with False, what else stands in its turn."""
        return "".join(piece.text for piece in self.pieces if (piece.part == "text") == is_text)

    def parts(self):
        """[{"type", "text"}], as a message of training has them."""
        merged = []
        for piece in self.pieces:
            if merged and merged[-1]["type"] == piece.part:
                merged[-1]["text"] += piece.text
            else:
                merged.append(dict(type=piece.part, text=piece.text))
        return merged

# ---- OpenAI's forms ------------------------------------------------------------------------------

class Answer:
    """The answer to an Asked in OpenAI's forms: `whole`, or `chunk` after `chunk`."""

    def __init__(self, asked):
        self.asked = asked
        self.tokenizer = asked.model.engine.tokenizer
        self.choices = [Choice(self.tokenizer, asked.stops, asked.is_chat)
                        for _ in range(asked.n * len(asked.prompts))]
        kind = "text_completion"
        prefix = "cmpl-"
        if asked.is_chat:
            kind = "chat.completion"
            prefix = "chatcmpl-"
        self.head = dict(id=prefix + secrets.token_hex(12), object=kind, created=int(time.time()),
                         model=asked.model.name)
        self.offsets = [0] * len(self.choices)      # characters of text so far

    def usage(self):
        """Tokens read and written. A prompt counts once, however many answers it has."""
        prompt_tokens = sum(map(len, self.asked.prompts))
        completion_tokens = sum(choice.n_tokens for choice in self.choices)
        return dict(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
                    total_tokens=prompt_tokens + completion_tokens)

    def whole(self):
        """The answer of a request that is no stream."""
        choices = []
        for i, choice in enumerate(self.choices):
            form = dict(index=i, finish_reason=choice.finish, logprobs=None)
            if self.asked.has_logprobs:
                form["logprobs"] = self.logprobs(i, choice.pieces)
            if self.asked.is_chat:
                form["message"] = self.message(choice)
            else:
                form["text"] = choice.text_of()
            choices.append(form)
        return dict(self.head, choices=choices, usage=self.usage())

    def message(self, choice):
        """A choice as a message; `parts`, which OpenAI does not have, keeps the order in which an
        assistant thought, asked tools and spoke."""
        message = dict(role="assistant", content=choice.text_of(), refusal=None)
        reasoning = choice.text_of(is_text=False)
        if reasoning:
            message.update(reasoning_content=reasoning, parts=choice.parts())
        return message

    def chunk(self, i, pieces, is_first=False, is_last=False):
        """A chunk of a stream: the next pieces of choice i; the first has its role, the last how it
        ended."""
        form = dict(index=i, finish_reason=None, logprobs=None)
        if is_last:
            form["finish_reason"] = self.choices[i].finish
        if self.asked.has_logprobs and pieces:
            form["logprobs"] = self.logprobs(i, pieces)
        if self.asked.is_chat:
            form["delta"] = delta(pieces, is_first)
        else:
            form["text"] = "".join(piece.text for piece in pieces)
        return self.chunk_form([form])

    def chunk_form(self, choices, usage=None):
        """What all chunks share. With include_usage, all but the last say usage: null."""
        form = dict(self.head, choices=choices)
        if self.asked.is_chat:
            form["object"] = "chat.completion.chunk"
        if self.asked.has_usage:
            form["usage"] = usage
        return form

    def last_chunk(self):
        """The chunk after all choices, which stream_options asks for."""
        return self.chunk_form([], self.usage())

    def logprobs(self, i, pieces):
        """The log-probabilities of the tokens of some pieces, before temperature and cuts. Of
        /v1/completions they have a form of their own, with the place of each token in the text."""
        pieces = [piece for piece in pieces if piece.event]
        if self.asked.is_chat:
            return dict(content=[self.entry(piece.event) for piece in pieces], refusal=None)
        form = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for piece in pieces:
            event = piece.event
            form["tokens"].append(self.tokenizer.decode([event.token]))
            form["token_logprobs"].append(event.logprob)
            form["top_logprobs"].append({self.tokenizer.decode([token]): logprob
                                         for token, logprob in event.alternatives or ()})
            form["text_offset"].append(self.offsets[i])
            self.offsets[i] += len(piece.text)
        return form

    def entry(self, event):
        """A token of a chat with its alternatives. A tool's token has no log-probability."""
        top = [self.named(token, logprob) for token, logprob in event.alternatives or ()]
        return dict(self.named(event.token, event.logprob), top_logprobs=top)

    def named(self, token, logprob):
        """A token as text, and as bytes, since it may be a part of a character."""
        data = self.tokenizer.decode_bytes([token])
        return dict(token=data.decode("utf-8", "replace"), logprob=logprob, bytes=list(data))

def delta(pieces, is_first):
    """What a chunk adds to a message."""
    form = {}
    if is_first:
        form = dict(role="assistant", content="")
    for piece in pieces:
        name = "content" if piece.part == "text" else "reasoning_content"
        form[name] = form.get(name, "") + piece.text
    return form

def models_form(models):
    """/v1/models."""
    return dict(object="list", data=[model_form(model) for model in models.values()])

def model_form(model):
    return dict(id=model.name, object="model", created=model.created, owned_by="deepdive")
