"""
A conversation with an assistant in the terminal.

    python sample.py                                    # with the newest assistant under runs/
    python sample.py --chat --system "Your name is Ada."
    echo "Who are you?" | python sample.py --chat       # without a terminal, a line is a question

in:  an engine of sample.py, and what the user types; /help lists the commands
out: replies; /save FILE.jsonl adds the conversation to a file that chat_sft.py can learn from

Before each reply the model reads what is new in the conversation; the engine keeps the rest. When
that outgrows the context, the oldest turns are dropped, each with its question and its replies; the
system message stays, and the model reads all of what is left again.
"""
import json
import math
import re
import sys
from contextlib import suppress
from pathlib import Path

from show import printable, until

HELP = """/reset            begins a new conversation
/system TEXT      begins a new one with this system message; without TEXT, with none
/temperature X    0 gives the most probable reply, 1 replies as the model believes
/save FILE.jsonl  adds the conversation to a file, from which chat_sft.py can learn
/help             shows this list
Ctrl-C stops a reply, Ctrl-D ends. A line that begins with a space is not a command."""

# ---- What people see of a reply ------------------------------------------------------------------

TOOLS = dict(python=("asks Python: ", "Python answers: "), search=("searches for: ", "finds: "),
             think=("thinks: ", ""))        # part of a reply: how it is shown, and what answers it
# The end of a text that may become its last line "#### 42", so that it cannot be shown yet, with
# the space before it. A longer row of # counts too, as it does for checkers.
UNDECIDED = re.compile(r"\s*(#{1,3}|#{4,}.*\s*)?\Z")
DIM = "\033[2m{}\033[0m"    # for a terminal: what was only thought is less bright
LAST_MARK = re.compile(r"\s*#{4,}[ \t]*(.*?)\s*")

class Shown:
    """What people see of a reply while it is being written.

    A tool call is shown as (asks Python: 6 * 7) and (Python answers: 42). A last line "#### 42",
    the mark by which checkers find an answer (problems.py), is shown as "Answer: 42", or as 42 if
    nothing stands before it, and "It is #### 42." as "It is 42." A mark with more lines below it is
    a heading and stays as it is.
    """

    def __init__(self, tokenizer):
        self.name_of = {i: name for name, i in tokenizer.special.items()}
        self.is_empty = True
        self.is_line_due = False    # after a tool call, the text continues on a new line
        self.part = None            # of a tool call, if one is open
        self.is_part_empty = False  # what it says is shown without the space that may begin it
        self.tool = "python"        # the last one that was called
        self.undecided = ""
        self.last = ""              # the last character that was shown

    def add(self, token, text):
        """The next pair of Engine.stream → the text to print now."""
        name = self.name_of.get(token)
        if name is None or not text.endswith(name):
            return self.add_text(text)
        before = self.add_text(text.removesuffix(name))     # the end of a broken character
        part = name.strip("<|/>")
        if self.part is None and name == f"<|{part}|>" and part in (*TOOLS, "output"):
            return before + self.open(part)
        if self.part == part and name == f"<|/{part}|>":
            return before + self.close()
        return before + self.add_text(name)

    def open(self, part):
        before = self.say(self.undecided.rstrip())
        self.undecided = ""
        self.part = part
        self.is_part_empty = True
        label = TOOLS[self.tool][1]
        if part != "output":
            self.tool = part
            label = TOOLS[part][0]
        self.is_line_due = not self.is_empty
        return before + self.say(f"({label}")

    def close(self):
        self.part = None
        self.is_line_due = True
        return ")"

    def add_text(self, text):
        if self.part:
            if self.is_part_empty:
                text = text.lstrip(" ")
                self.is_part_empty = text == ""
            return text
        text = self.undecided + text
        certain = UNDECIDED.search(text).start()
        self.undecided = text[certain:]
        return self.say(text[:certain])

    def end(self):
        """The text to print at the end of the reply."""
        if self.part:
            return self.close()
        mark = LAST_MARK.fullmatch(self.undecided)
        if not mark:
            return self.say(self.undecided.rstrip())
        answer = mark[1]
        is_in_sentence = self.undecided.startswith(" ") and self.last.isalpha()
        if answer and is_in_sentence:
            return self.say(f" {answer}")
        if answer and not self.is_empty:
            self.is_line_due = True
            answer = f"Answer: {answer}"
        return self.say(answer)

    def say(self, text):
        """The text as it is shown: on a new line if one is due, and without space at its start."""
        if self.is_empty or self.is_line_due:
            text = text.lstrip()
        if not text:
            return ""
        self.is_empty = False
        self.last = text[-1]
        if self.is_line_due:
            self.is_line_due = False
            text = "\n" + text
        return text

# ---- The conversation ----------------------------------------------------------------------------

def fit_context(tokenizer, messages, most):
    """Drops the oldest turns, each with its question and its replies, until the prompt has at most
    `most` tokens → (messages, ids). The system message and the last question stay."""
    messages = list(messages)
    while True:
        ids, _ = tokenizer.render(messages, for_completion=True)
        questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if len(ids) <= most or len(questions) < 2:
            return messages, ids
        del messages[questions[0]:questions[1]]

class Chat:
    """A conversation: `ask` prints the reply to a question, `run` reads what the user types.

    Raises ValueError if the system message leaves no room for a question.
    """

    def __init__(self, engine, system, max_new_tokens, seed, sampling, stops=()):
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.sampling = dict(sampling)
        self.stops = stops
        self.block_size = engine.model.config.block_size
        self.in_context = str       # a question → what the model reads in its place (--rag)
        # the longest prompt: a quarter of the context stays free for the reply, and another one
        # for what the search tool may find
        reply_tokens = self.block_size // (2 if engine.can_search else 4)
        self.most = self.block_size - min(max_new_tokens, max(1, reply_tokens))
        self.begin(system)

    def begin(self, system):
        """Begins a new conversation, with a system message or with None."""
        messages = []
        content = system
        if self.engine.can_search:
            from search import CAN_SEARCH
            content = f"{system or ''} {CAN_SEARCH}".strip()
        if content:
            messages.append(dict(role="system", content=content))
        ids, _ = self.tokenizer.render(messages, for_completion=True)
        if len(ids) >= self.most:
            raise ValueError(f"the system message is too long: with it the prompt has {len(ids)} "
                             f"tokens, and the model can read {self.most}; shorten it")
        self.system = system
        self.messages = messages        # what the model reads
        self.said = list(messages)      # the same and the turns that were dropped
        self.has_forgotten = False

    def ask(self, question):
        """Prints the reply, and adds both to the conversation. A question that is too long is
        dropped, and so is one whose reply was stopped before its first word."""
        asked = [*self.messages, dict(role="user", content=self.in_context(question))]
        kept, ids = fit_context(self.tokenizer, asked, self.most)
        if len(ids) > self.most:
            print(f"(That is too long: with it the prompt has {len(ids)} tokens, and the model can "
                  f"read {self.most}. Ask something shorter.)")
            return
        if len(kept) < len(asked) and not self.has_forgotten:
            print(f"(The model can read {self.block_size} tokens; from now on it forgets the "
                  "oldest turns.)")
            self.has_forgotten = True
        reply, is_kept = self.write(ids)
        self.seed += 1
        if is_kept:
            message = self.tokenizer.parse([*ids, *reply])[-1]
            self.messages = [*kept, self.without_stop(message)]
            self.said += [asked[-1], self.messages[-1]]

    def write(self, ids):
        """Prints a reply to the prompt `ids` → (its ids, whether it stays in the conversation)."""
        print("assistant: ", end="", flush=True)
        shown = Shown(self.tokenizer)
        reply = []
        is_stopped = False
        pieces = self.engine.stream(ids, self.max_new_tokens, seed=self.seed, **self.sampling)
        try:
            for token, text in until(pieces, self.stops):
                if token is not None:
                    reply.append(token)
                is_thought = shown.part == "think"
                piece = printable(shown.add(token, text))
                is_thought = is_thought or shown.part == "think"
                if is_thought and piece and sys.stdout.isatty():
                    piece = DIM.format(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            is_stopped = True
        print(printable(shown.end()))
        if is_stopped and shown.is_empty:
            print("(Stopped before the first word; the question is forgotten.)")
            return reply, False
        if is_stopped:
            print("(Stopped; what was said stays in the conversation.)")
        self.explain_cut(ids, reply)
        if shown.is_empty:
            print("(The model ended its turn without a word.)")
        return reply, True

    def explain_cut(self, ids, reply):
        """Says so if a reply ended for want of tokens."""
        special = self.tokenizer.special
        if reply and reply[-1] in (special["<|im_end|>"], special["<|endoftext|>"]):
            return
        if len(reply) == self.max_new_tokens:
            print(f"(Cut after {len(reply)} tokens; --max_new_tokens allows more.)")
        elif len(ids) + len(reply) == self.block_size:
            print(f"(Cut after {len(reply)} tokens, because the model can read no more than "
                  f"{self.block_size} in all.)")

    def without_stop(self, message):
        """A reply without the text of --stop that ended it."""
        parts = message["content"]
        if isinstance(parts, str):
            parts = [dict(type="text", text=parts)]
        last = parts[-1]
        for stop in self.stops:
            last["text"] = last["text"].partition(stop)[0]
        if isinstance(message["content"], str):
            return dict(message, content=last["text"])
        return message

    # ---- commands: each gets what stands after its name

    def reset(self, _):
        self.begin(self.system)
        print("(This is a new conversation.)")

    def set_system(self, text):
        try:
            self.begin(text or None)
        except ValueError as error:
            print(f"({error})")
            return
        message = "a new system message" if text else "no system message"
        print(f"(This is a new conversation with {message}.)")

    def set_temperature(self, text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            print(f"(/temperature needs a number of at least 0, got {printable(text) or 'none'}; "
                  f"it stays {self.sampling.get('temperature', 1):g}.)")
            return
        self.sampling["temperature"] = value
        print(f"(The temperature is {value:g}.)")

    def save(self, name):
        """Adds {"messages": …} as a line to a file of conversations."""
        path = Path(name).expanduser()
        if path.suffix != ".jsonl":
            print("(/save needs the name of a file that ends in .jsonl: each line of it is a "
                  "conversation.)")
            return
        if not any(message["role"] == "user" for message in self.said):
            print("(There is nothing to save yet.)")
            return
        line = json.dumps(dict(messages=self.said), ensure_ascii=False).encode() + b"\n"
        try:
            with open(path, "a+b") as file:
                if file.seek(0, 2):
                    file.seek(-1, 2)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                file.write(line)
        except OSError as error:
            print(f"({printable(name)} cannot be written: {error.strerror}.)")
            return
        print(f"({len(self.said)} messages were added to {printable(name)}.)")

    def help(self, _):
        print(HELP)

    # ---- the loop

    def run(self):
        """Answers what the user types until the end of the input → the number of questions."""
        n_questions = 0
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")     # bytes that are not UTF-8 become U+FFFD
        while True:
            try:
                line = read_line()
                if line is None:
                    return n_questions
                if line.startswith("/"):
                    self.obey(line)
                elif line.strip():
                    n_questions += 1
                    self.ask(line.strip())
            except KeyboardInterrupt:
                print("\n(Ctrl-D ends the conversation.)")

    def obey(self, line):
        """Runs a command."""
        name, _, rest = line.strip().partition(" ")
        if name in COMMANDS:
            COMMANDS[name](self, rest.strip())
        else:
            print(f"(There is no command {printable(name)}; /help lists them. A question that "
                  "begins with / needs a space before it.)")

COMMANDS = {"/reset": Chat.reset, "/system": Chat.set_system, "/save": Chat.save,
            "/temperature": Chat.set_temperature, "/help": Chat.help}

def read_line():
    """The next line that the user types; None at the end of the input. Without a terminal the line
    is printed, so that what is printed can be read as a conversation."""
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    prompt = ""
    if is_terminal:
        with suppress(ImportError):
            import readline     # noqa: F401  arrow keys and a history for input()
        print()
        prompt = "user: "
    try:
        line = input(prompt)
    except (EOFError, RuntimeError):    # RuntimeError: stdin is closed
        print()
        return None
    if not is_terminal:
        print(f"\nuser: {printable(line)}")
    return line
