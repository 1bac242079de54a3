"""
The loss of training: head, soft-cap and cross-entropy in one, a chunk of tokens at a time, so that
the logits of a batch never exist all together. model.py's GPT.loss calls it.

    >>> z = torch.zeros(1, 4)
    >>> loss_and_gradient(z, torch.tensor([[1]]), torch.ones(1, 1), V=4, s=0)
    (tensor(1.3863), tensor([[ 0.2500, -0.7500,  0.2500,  0.2500]]))

Papers: soft-cap (Gemma 2, arXiv 2408.00118).
Differs from the paper: the gradient is written out, because autograd would keep all logits.
"""
import torch

CHUNK_LOGITS = {"cuda": 2 ** 27, "mps": 2 ** 24, "cpu": 2 ** 20}    # 256, 64, 4 MB, a CPU's cache

def chunk_rows(x, V):
    """Tokens with logits in memory at a time; below 256, reading the weights would dominate."""
    return max(256, CHUNK_LOGITS[x.device.type] // V)

def loss_and_gradient(z, target, share, V, s):
    """The loss of one chunk and its gradient with respect to z, which is overwritten.

    z (n, padded V): the head's outputs, of which those after the first V do not count; target
    (n, 1); share (n, 1): each token's weight in the mean; s: the soft-cap. On a GPU this is
    compiled into one or two passes over z.
    """
    t = z.float()
    y = t.div_(s).tanh_() * s if s else t               # with a soft-cap, t becomes tanh(z / s)
    y_target = y.gather(1, target)
    top = torch.zeros_like(share)
    if not 0 < s < 64:                  # a soft-cap bounds y; else its exp could overflow
        top = y[:, :V].amax(-1, keepdim=True)
        y.sub_(top)
    dy = y.exp_()                       # the loss needs its sum, the gradient all of it
    sum_exp = dy[:, :V].sum(-1, keepdim=True)
    loss = ((top + sum_exp.log() - y_target) * share).sum()
    dy_target = ((y_target - top).exp() / sum_exp - 1) * share
    dy.mul_(share / sum_exp)
    dy[:, V:] = 0
    if s:
        dy.addcmul_(dy, t.square_(), value=-1)
        dy_target = dy_target * (1 - (y_target / s).square())
    return loss, dy.to(z.dtype).scatter_(1, target, dy_target.to(z.dtype))

class CrossEntropy(torch.autograd.Function):
    """Head, soft-cap and mean cross-entropy in one, a chunk of tokens at a time.

    At B = 32, T = 2048 and V = 32,768 the logits alone would take 8 GB. Here forward turns the
    logits of a chunk into their gradient at once, so that they never exist all together and are
    not computed twice. x (N, C), head weight (padded V, C), W: the weight in the dtype of x,
    targets (N,) → the mean over the targets that are not -1. chunk_loss: loss_and_gradient, or the
    same compiled.
        z = W x    y = s tanh(z / s)    loss = ln Σ exp(y) - y[target]
        dz = (softmax(y) - onehot(target)) (1 - (y/s)²) / count    dx = Wᵀ dz    dW = dz xᵀ
    z and dz have padding rows, because a GPU multiplies slower by V = 50,257 than by 50,304.
    """
    @staticmethod
    def forward(ctx, x, weight, W, targets, config, chunk_loss):
        V = config.vocab_size
        s = config.softcap
        dx = torch.empty_like(x)
        dW = torch.zeros_like(weight)
        target = targets.clamp(min=0)[:, None]
        share = (targets >= 0) / (targets >= 0).sum().clamp(min=1)
        share = share[:, None]          # (N, 1): each token's weight in the mean
        total = torch.zeros((), device=x.device)
        size = chunk_rows(x, len(W))
        buffer = x.new_empty(min(size, len(x)), len(W))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            z = torch.mm(x[part], W.T, out=buffer[:len(x[part])])           # (n, padded V)
            loss, dz = chunk_loss(z, target[part], share[part], V, s)
            total += loss
            torch.mm(dz, W, out=dx[part])
            if dz.dtype == dW.dtype:
                dW.addmm_(dz.T, x[part])
            else:
                dW += dz.T @ x[part]
        ctx.save_for_backward(dx, dW)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dW = ctx.saved_tensors
        return dx * grad, dW * grad, None, None, None, None
