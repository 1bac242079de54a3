"""
One thread computes for everybody: it owns the models, and hands each token to who asked for it.

    dispatcher = Dispatcher({"demo": engine}, max_rows=64, max_waiting=64)
    dispatcher.start()
    async with dispatcher.open("demo", requests) as tickets:
        async for number, event in tickets:     # the next token of one of the requests
            …

in:  requests of engine.py, from coroutines      out: the scheduler's events, to those coroutines

The web server's event loop must answer at once, and a model's step takes milliseconds, so the steps
run in a thread of their own. Orders go to it through a queue, which it empties between two steps.
Events come back with call_soon_threadsafe, all of a step in one call. A coroutine that ends early,
because its client has left, cancels its rows, and the next step is computed without them.
"""
import asyncio
import math
import queue
import threading
import time
from contextlib import asynccontextmanager, suppress

from engine import Scheduler

class Busy(Exception):
    """Too many requests are open. seconds: when to ask again."""

    def __init__(self, seconds):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds

class Failed(Exception):
    """The scheduler refused a request, or broke while it was working on it."""

# ---- In the event loop: who waits for what -------------------------------------------------------

class Ticket:
    """One request on its way. `row` is the thread's; the rest is the event loop's."""

    def __init__(self, tickets, number, model, request):
        self.tickets = tickets
        self.number = number        # among the requests that were opened together
        self.model = model
        self.request = request
        self.row = None             # of the scheduler
        self.started = time.monotonic()

class Tickets:
    """The requests that one client opened: an async iterator over (number, event)."""

    def __init__(self, dispatcher):
        self.dispatcher = dispatcher
        self.loop = asyncio.get_running_loop()
        self.events = asyncio.Queue()
        self.open = {}              # {number: Ticket}

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.open and self.events.empty():
            raise StopAsyncIteration
        number, event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        return number, event

    def receive(self, ticket, event):
        """An event of the thread, or the exception that ended the row."""
        if ticket.number not in self.open:      # it was cancelled a moment ago
            return
        self.events.put_nowait((ticket.number, event))
        if isinstance(event, Exception) or event.finish:
            self.dispatcher.close(ticket)

    def cancel(self, number):
        """Ends one of the requests. What was already written still comes."""
        ticket = self.open.get(number)
        if ticket:
            self.dispatcher.close(ticket)
            self.dispatcher.orders.put(("cancel", ticket))

TOOL_THREADS = 4        # of a model: so many tools may work at a time while it writes for others

# ---- The thread ----------------------------------------------------------------------------------

class Dispatcher(threading.Thread):
    """engines: {name of a model: Engine}. At most max_rows requests of a model are computed at
    once. When max_rows + max_waiting requests are open, `open` raises Busy."""

    def __init__(self, engines, max_rows=64, max_waiting=64):
        super().__init__(name="engine", daemon=True)
        self.engines = engines
        self.max_rows = max_rows
        self.max_open = max_rows + max_waiting
        self.orders = queue.SimpleQueue()       # ("add" | "cancel" | "call" | "stop", its object)
        # of the event loop
        self.n_open = 0
        self.seconds = 1.0                      # that a request takes, smoothed
        # of the thread
        self.schedulers = {name: self.new_scheduler(name) for name in engines}
        self.at_work = {name: {} for name in engines}       # {model: {scheduler's row: Ticket}}

    def new_scheduler(self, model):
        return Scheduler(self.engines[model], self.max_rows, tool_threads=TOOL_THREADS)

    # ---- called in the event loop

    @asynccontextmanager
    async def open(self, model, requests):
        """Gives requests to the scheduler of a model → Tickets. What is not finished at the end
        of the block is cancelled. Raises Busy; the iterator raises Failed."""
        if self.n_open + len(requests) > self.max_open:
            raise Busy(self.retry_after())
        tickets = Tickets(self)
        for number, request in enumerate(requests):
            ticket = Ticket(tickets, number, model, request)
            tickets.open[number] = ticket
            self.n_open += 1
            self.orders.put(("add", ticket))
        try:
            yield tickets
        finally:
            for number in list(tickets.open):
                tickets.cancel(number)

    def close(self, ticket):
        """A request is no longer open."""
        del ticket.tickets.open[ticket.number]
        self.n_open -= 1
        self.seconds += 0.1 * (time.monotonic() - ticket.started - self.seconds)

    def retry_after(self):
        """Whole seconds until there is probably room: in `seconds`, max_rows requests end."""
        return max(1, math.ceil(self.seconds * self.n_open / self.max_rows))

    async def call(self, function, *args):
        """function(*args), computed by the thread between two steps."""
        future = asyncio.get_running_loop().create_future()
        self.orders.put(("call", (future, function, args)))
        return await future

    def stop(self):
        self.orders.put(("stop", None))

    # ---- called in the thread

    def run(self):
        while True:
            is_idle = not any(self.at_work.values())
            if not self.obey(wait=is_idle):
                return
            for model, tickets in self.at_work.items():
                if tickets:
                    self.step(model)

    def obey(self, wait):
        """Carries out all orders → False when the thread is to end. wait: for the first one."""
        while True:
            try:
                what, order = self.orders.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if what == "stop":
                return False
            if what == "add":
                self.add(order)
            elif what == "cancel":
                self.cancel(order)
            else:
                self.answer(*order)

    def add(self, ticket):
        try:
            ticket.row = self.schedulers[ticket.model].add(ticket.request)
        except ValueError as error:
            self.send([(ticket, Failed(str(error)))])
            return
        self.at_work[ticket.model][ticket.row] = ticket

    def cancel(self, ticket):
        if self.at_work[ticket.model].pop(ticket.row, None):
            self.schedulers[ticket.model].cancel(ticket.row)

    def answer(self, future, function, args):
        result = error = None
        try:
            result = function(*args)
        except Exception as problem:        # it belongs to the caller; the thread serves others too
            error = problem
        with suppress(RuntimeError):        # the event loop has been closed
            future.get_loop().call_soon_threadsafe(settle, future, result, error)

    def step(self, model):
        """One step of a model. If it breaks, its requests fail, and it starts afresh."""
        tickets = self.at_work[model]
        try:
            events = self.schedulers[model].step()
        except Exception as problem:        # for instance damaged weights, or too little memory
            failed = Failed(f"the engine failed: {problem}")
            self.send([(ticket, failed) for ticket in tickets.values()])
            tickets.clear()
            self.schedulers[model] = self.new_scheduler(model)
            return
        found = [(tickets[event.row], event) for event in events]
        for _, event in found:
            if event.finish:
                del tickets[event.row]
        self.send(found)

    def send(self, found):
        """Hands (ticket, event) pairs to the event loop."""
        if found:
            ticket, _ = found[0]
            with suppress(RuntimeError):    # the event loop has been closed
                ticket.tickets.loop.call_soon_threadsafe(hand_out, found)

def hand_out(found):
    for ticket, event in found:
        ticket.tickets.receive(ticket, event)

def settle(future, result, error):
    """Gives a future its result, unless its caller has left."""
    if future.cancelled():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(result)
