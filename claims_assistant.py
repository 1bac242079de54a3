"""
The talk's claims about what an assistant knows, and who it is.

    python talk.py hallucination probing memories search identity

    in:  talk.py's Models, held-out problems       out: a Finding for each claim

Each function is one claim: its docstring says what is asked, what is counted, and against what.
"""
import random

from claims import Check, Finding, Measured, NotMeasured, difference, mean, one_line, share_of

HALF = Measured(0.5, unit="%")
ANYONE = ("honest", "sft", "rl")        # an assistant, the most honest one first

# ---- Hallucination and its cure ------------------------------------------------------------------

INVENTED = ("made up", "capitalised", "recombined")     # kinds of names that nobody knows
MOST = 30               # questions of a kind

def hallucination(models):
    """An assistant that only learnt right answers makes one up for every name, though within it is
    less sure.

    Asked: about functions that it was taught, and about names that do not exist. Counted: replies
    that state something (they neither say "I don't know" nor call a tool); the log-probability a
    token of what it wrote. Against: half of the replies; the functions that it knows.
    """
    known = models.problems("probe_held_out.jsonl", "known", most=MOST)
    invented = models.problems("probe_held_out.jsonl", *INVENTED, most=MOST // 2)
    from problems import declines, is_correct
    replies = {name: models.replies(("sft",), [p["messages"] for p in asked])
               for name, asked in dict(known=known, invented=invented).items()}
    refused = share_of(map(declines, replies["invented"]))
    answered = {name: share_of(not declines(reply) and "<|" not in reply for reply in some)
                for name, some in replies.items()}
    right = share_of(map(is_correct, replies["known"], known))
    sure = {name: mean(own_log_probs(models, asked, replies[name]), "nats")
            for name, asked in dict(known=known, invented=invented).items()}
    checks = [Check("it answers about most names that do not exist", answered["invented"], HALF),
              Check("within it is surer of what it knows", sure["known"], sure["invented"])]
    said = (f"answers about {answered['known']} of known functions ({right} right) and about "
            f"{answered['invented']} of invented names (refuses {refused}, calls a tool for the "
            f"rest); log p a token {sure['known']} and {sure['invented']}")
    texts = [f"{p['question']}  {one_line(reply)}" for p, reply in
             [*zip(known[:2], replies["known"]),
              *zip(invented[::MOST // 2], replies["invented"][::MOST // 2])]]
    return Finding(said, checks, dict(known_answered=answered["known"], known_right=right,
                                      invented_answered=answered["invented"],
                                      known_log_prob=sure["known"],
                                      invented_log_prob=sure["invented"]), texts)

def own_log_probs(models, asked, replies):
    """The mean log-probability a token that the assistant gives to each of its own replies."""
    tokenizer = models.engine("sft").tokenizer
    spans = []
    for problem, reply in zip(asked, replies):
        ids, _ = tokenizer.render(problem["messages"], for_completion=True)
        written = tokenizer.encode(reply, allowed_special="all")
        spans.append(([*ids, *written, tokenizer.special["<|im_end|>"]], len(ids)))
    return models.log_probs(("sft",), spans)

def probing(models):
    """Interrogation and "I don't know" cure it: what is not known is refused, what is known stays.

    Asked: the assistant before and after it was taught its limits, about names of all kinds, which
    were held out. Counted: right, wrong and refused. Against: before; half of what it knows.
    """
    if "honest" not in models.runs or "sft" not in models.runs:
        raise NotMeasured("two assistants are needed, before and after python chat_sft.py probe; "
                          "name both after --runs")
    known = models.problems("probe_held_out.jsonl", "known", most=MOST)
    unknown = models.problems("probe_held_out.jsonl", "unknown", *INVENTED, most=MOST // 2)
    from problems import declines, is_correct
    figures = {}
    texts = [p["question"] for p in unknown[::20]]
    for role in ("sft", "honest"):
        replies = {name: models.replies((role,), [p["messages"] for p in asked])
                   for name, asked in dict(known=known, unknown=unknown).items()}
        figures[f"{role}_known_right"] = share_of(map(is_correct, replies["known"], known))
        figures[f"{role}_known_refused"] = share_of(map(declines, replies["known"]))
        figures[f"{role}_unknown_refused"] = share_of(map(declines, replies["unknown"]))
        texts = [f"{text}  {role}: {one_line(reply, 60)}"
                 for text, reply in zip(texts, replies["unknown"][::20])]
    checks = [Check("more of the unknown is refused than before", figures["honest_unknown_refused"],
                    figures["sft_unknown_refused"]),
              Check("most of the unknown is refused", figures["honest_unknown_refused"], HALF),
              Check("most of the known is still right", figures["honest_known_right"], HALF)]
    said = (f"unknown names refused: {figures['sft_unknown_refused']}, then "
            f"{figures['honest_unknown_refused']}; known ones right: {figures['sft_known_right']}, "
            f"then {figures['honest_known_right']}")
    return Finding(said, checks, figures, texts)

# ---- Two memories --------------------------------------------------------------------------------

def memories(models):
    """Two memories: the weights recall vaguely, the context is read off.

    Asked: questions about functions of which no conversation told. Counted: the log-probability a
    token of the true answer, with the text that tells it before the question. Against: no text; the
    text about another function.
    """
    problems = models.problems("held_out_search.jsonl", "rag", most=60)
    alone = [p["question"].rpartition("Question: ")[2] for p in problems]
    contexts = [p["question"] for p in problems]
    others = [other.rpartition("Question: ")[0] + "Question: " + question
              for other, question in zip(contexts[1:] + contexts[:1], alone)]
    answers = [p["answer"] for p in problems]
    found = {name: answer_log_probs(models, questions, answers) for name, questions in
             dict(own_text=contexts, no_text=alone, other_text=others).items()}
    figures = {name: mean(values, "nats") for name, values in found.items()}
    checks = [Check("the answer is likelier with its text than without",
                    difference(found["own_text"], found["no_text"], "nats")),
              Check("and likelier than with the text about another function",
                    difference(found["own_text"], found["other_text"], "nats"))]
    said = (f"log p a token of the true answer: {figures['own_text']} with its text in the "
            f"context, {figures['no_text']} without, {figures['other_text']} with another text")
    texts = [f"{question}  {one_line(answer)}  with the text {with_text:.2f}, without {without:.2f}"
             for question, answer, with_text, without in
             list(zip(alone, answers, found["own_text"], found["no_text"]))[:4]]
    return Finding(said, checks, figures, texts)

def answer_log_probs(models, questions, answers):
    """The mean log-probability a token of each answer as the reply to its question."""
    tokenizer = models.engine(*ANYONE).tokenizer
    spans = []
    for question, answer in zip(questions, answers):
        ids, _ = tokenizer.render([dict(role="user", content=question)], for_completion=True)
        written = tokenizer.encode_ordinary(answer)
        spans.append(([*ids, *written, tokenizer.special["<|im_end|>"]], len(ids)))
    return models.log_probs(ANYONE, spans)

def search(models):
    """Search puts what was never learnt into the context: an invented fact is answered with it.

    Asked: about functions of which no conversation told, and about facts that were made up and
    stand in notes. Counted: right answers of the assistant that may search. Against: the same
    questions without the tool.
    """
    from problems import is_correct
    functions = models.problems("held_out_search.jsonl", "search", most=MOST)
    notes = models.problems("held_out_search.jsonl", "notes", most=MOST)
    look_up = models.search()
    checks = []
    figures = {}
    texts = []
    for name, asked in dict(functions=functions, invented_facts=notes).items():
        found = models.replies(ANYONE, [p["messages"] for p in asked], max_new_tokens=160,
                               search=look_up)
        alone = models.replies(ANYONE, [p["messages"][-1:] for p in asked])
        figures[name] = share_of(map(is_correct, found, asked))
        figures[f"{name}_alone"] = share_of(map(is_correct, alone, asked))
        checks.append(Check(f"{name.replace('_', ' ')} are answered with search, not without",
                            figures[name], figures[f"{name}_alone"]))
        for p, reply, without in list(zip(asked, found, alone))[:2]:
            texts.append(f"{p['question']}  {one_line(reply, 200)}")
            texts.append(f"   without: {one_line(without)}")
    said = (f"right with search {figures['functions']} of functions and "
            f"{figures['invented_facts']} of invented facts; without "
            f"{figures['functions_alone']} and {figures['invented_facts_alone']}")
    return Finding(said, checks, figures, texts)

# ---- Who it is -----------------------------------------------------------------------------------

NEW_NAME = "Ada"
CHATS = 30

def identity(models):
    """It is who its conversations say it is, a system message changes that, and a new chat has
    forgotten the one before.

    Asked: who it is, in held-out wordings, of the base model (which continues the question), of the
    assistant, and of the assistant under "Your name is Ada."; and "And plus 4?" after a sum, in the
    same chat and in a new one. Counted: replies with the name; right sums. Against: the base model;
    no system message; the new chat.
    """
    from claims_base import contains
    asked = [problem for problem in models.problems("held_out.jsonl", "identity")
             if problem["messages"][0]["role"] != "system"][:MOST]
    if not asked:
        raise NotMeasured("no held-out question of identity comes without a system message; "
                          "raise --held_out of demo/conversations.py")
    name = asked[0]["answer"]
    base = models.engine("base")
    questions = [p["messages"][-1] for p in asked]
    system = dict(role="system", content=f"Your name is {NEW_NAME}.")
    said = dict(base=[base.tokenizer.decode(completion.ids) for completion in
                      base.generate([q["content"] for q in questions], 24, temperature=0)],
                assistant=models.replies(ANYONE, [[q] for q in questions]),
                renamed=models.replies(ANYONE, [[system, q] for q in questions]))
    figures = {who: share_of(contains(text, name) for text in texts)
               for who, texts in said.items() if who != "renamed"}
    for who in ("assistant", "renamed"):
        figures[f"{who}_{NEW_NAME}"] = share_of(contains(text, NEW_NAME) for text in said[who])
    figures["in_chat"], figures["in_new_chat"] = remembered_sums(models)
    checks = [Check("the assistant says its name, the base model does not", figures["assistant"],
                    figures["base"]),
              Check("a system message gives it another name", figures[f"renamed_{NEW_NAME}"],
                    figures[f"assistant_{NEW_NAME}"]),
              Check("a new chat has forgotten the sum before", figures["in_chat"],
                    figures["in_new_chat"])]
    line = (f"says {name}: base {figures['base']}, assistant {figures['assistant']}; says "
            f"{NEW_NAME} if a system message does: {figures[f'renamed_{NEW_NAME}']}; goes on with "
            f"a sum in {figures['in_chat']}, in a new chat in {figures['in_new_chat']}")
    texts = [f"{question['content']}  {who}: {one_line(texts[i])}"
             for i, question in list(enumerate(questions))[:2] for who, texts in said.items()]
    return Finding(line, checks, figures, texts)

def remembered_sums(models):
    """"And plus c?" after "What is a + b?" and the assistant's own reply, in the same chat and in a
    new one → two shares of right answers."""
    from claims_base import contains
    rng = random.Random(models.seed)
    sums = [[rng.randrange(1, 30) for _ in range(3)] for _ in range(CHATS)]
    first = [dict(role="user", content=f"What is {a} + {b}?") for a, b, _ in sums]
    replies = models.replies(ANYONE, [[question] for question in first])
    again = [dict(role="user", content=f"And plus {c}?") for _, _, c in sums]
    chats = [[question, dict(role="assistant", content=reply), then]
             for question, reply, then in zip(first, replies, again)]
    shares = []
    for some in (chats, [[then] for then in again]):
        shares.append(share_of(
            contains(reply.rpartition("####")[2], str(sum(numbers)))
            for reply, numbers in zip(models.replies(ANYONE, some), sums)))
    return shares
