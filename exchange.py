"""
What several ranks send each other while they train: gradients to the rank that owns a parameter,
and the updated parameter from there to all. Both travel in buckets, a layer each, while the ranks
compute the layers before or after it:

    backward   layer 2       layer 1       layer 0       …
    network                  gradients 2   gradients 1   gradients 0
    forward                  layer 0       layer 1       layer 2
    network    weights 0     weights 1     weights 2

The Optimizer of training.py has one; on a single rank it sends nothing.

Papers: ZeRO (arXiv 1910.02054), PyTorch's DDP (2006.15704) for buckets.
Differs from the papers: a bucket is not one flat tensor. It holds whole parameters, each of which
is reduced to its own owner, because Muon needs whole matrices.
"""
import functools
import re

import torch
import torch.distributed as dist

FIRST = -1              # the bucket of what no single layer reads: embeddings, norms, scalars
HEAD = 10 ** 6          # the bucket of lm_head, which is read last

def bucket_of(name):
    """A layer's number, for the parameters that only this layer reads, or FIRST or HEAD."""
    layer = re.match(r"(?:h|value_embeds)\.([0-9]+)\.", name)
    if layer:
        return int(layer[1])
    return HEAD if name.startswith("lm_head") else FIRST

class Exchange:
    """params {name: parameter}; owner {name: rank}. After a step's last backward, which expect()
    announces, collect_gradients(); after the update send_weights(), and wait() or wait_for(…)
    before the weights are read."""
    first = FIRST
    head = HEAD

    def __init__(self, params, owner, ranks):
        self.params = params
        self.owner = owner
        self.ranks = ranks
        self.dtype = None       # of gradients on their way; None: as they are
        buckets = {FIRST: [], HEAD: []}
        for name in params:
            buckets.setdefault(bucket_of(name), []).append(name)
        self.buckets = dict(sorted(buckets.items()))            # as forward reads them
        self.unsent = {}        # {bucket: its names whose gradient is not finished}
        self.gradients = []     # on their way: (name, tensor, work)
        self.weights = {bucket: [] for bucket in self.buckets}  # on their way: {bucket: works}
        if ranks.world_size > 1:
            for name, p in params.items():
                p.register_post_accumulate_grad_hook(functools.partial(self.finished, name))

    def expect(self):
        """The next backward is the last of this step. Each bucket leaves as soon as its gradients
        are finished and the buckets before it have left."""
        if self.ranks.world_size > 1:
            self.unsent = {bucket: set(self.buckets[bucket]) for bucket in reversed(self.buckets)}

    def finished(self, name, _):
        """autograd calls this when it has added to the gradient of a parameter."""
        bucket = bucket_of(name)
        if bucket in self.unsent:
            self.unsent[bucket].discard(name)
            self.send_gradients()

    @torch.no_grad()
    def send_gradients(self, unfinished_too=False):
        """Sends the finished buckets. All ranks send in one order, whatever is finished first: the
        collectives of a rank must meet those of the others."""
        for bucket, missing in list(self.unsent.items()):
            if missing and not unfinished_too:
                break
            del self.unsent[bucket]
            for name in self.buckets[bucket]:
                grad = self.params[name].grad
                if self.dtype:
                    grad = grad.to(self.dtype)
                work = dist.reduce(grad, self.owner[name], async_op=True)
                self.gradients.append((name, grad, work))

    def collect_gradients(self):
        """Waits until the owners hold the sums over all ranks. A GPU waits; Python does not."""
        if self.ranks.world_size == 1:
            return
        if not self.unsent and not self.gradients:      # nobody has announced the last backward
            self.expect()
        self.send_gradients(unfinished_too=True)
        for name, total, work in self.gradients:
            work.wait()
            if self.dtype and self.owner[name] == self.ranks.rank:
                self.params[name].grad.copy_(total)
        self.gradients = []

    def send_weights(self):
        """Starts to send all parameters from their owners, in the order in which forward reads
        them."""
        for bucket, names in self.buckets.items():
            self.weights[bucket] = []
            if self.ranks.world_size > 1:
                self.weights[bucket] = [
                    dist.broadcast(self.params[name].data, self.owner[name], async_op=True)
                    for name in names]

    def wait_for(self, bucket):
        """Waits for a bucket of parameters → whether they are new since the last call."""
        works = self.weights.pop(bucket, None)
        for work in works or []:
            work.wait()
        return works is not None

    def wait(self):
        """Waits for all parameters, which are still new for wait_for()."""
        for works in self.weights.values():
            for work in works:
                work.wait()
