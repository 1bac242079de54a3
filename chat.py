"""
A conversation with an assistant in the terminal.

    python sample.py --chat                     # the newest assistant under runs/

in:  an engine of sample.py, and what the user types            out: replies
"""
from show import printable

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

def chat(engine, system, max_new_tokens, seed, sampling, ask=str):
    """A conversation in the terminal. An empty line, Ctrl-D or Ctrl-C ends it. When it outgrows the
    context, the oldest turns are forgotten, so that a quarter stays free for the reply, or half of
    it if the reply can hold a passage that was found.

    ask: a function of a question → what the model reads in its place.
    """
    block_size = engine.model.config.block_size
    reply_tokens = block_size // 4
    if engine.tokenizer.special["<|/search|>"] in engine.tools:
        reply_tokens = block_size // 2
    most = block_size - min(max_new_tokens, max(1, reply_tokens))
    has_forgotten = False
    messages = []
    if system:
        messages.append(dict(role="system", content=system))
    while True:
        try:
            question = input("\nuser: ").strip()
        except EOFError:
            return
        if not question:
            return
        asked = [*messages, dict(role="user", content=ask(question))]
        kept, ids = fit_context(engine.tokenizer, asked, most)
        if len(ids) > most:
            print(f"(That is too long: with it the prompt has {len(ids)} tokens, and the model can "
                  f"read {most}. Ask something shorter.)")
            continue
        if len(kept) < len(asked) and not has_forgotten:
            print(f"(The model can read {block_size} tokens; from now on it forgets the oldest "
                  "turns.)")
            has_forgotten = True
        print("assistant: ", end="", flush=True)
        reply = []
        for token, text in engine.stream(ids, max_new_tokens, seed=seed, **sampling):
            if token is not None:
                reply.append(token)
            print(printable(text), end="", flush=True)
        print()
        messages = engine.tokenizer.parse([*ids, *reply])
        seed += 1
