#!/usr/bin/env python3
"""The peer of metala.c: the same model in plain eager PyTorch on the CPU, to compare speed and numbers.

    python3 bench/pytorch_metala.py                      time a training step (forward, backward, clip, AdamW)
    python3 bench/pytorch_metala.py --scan recurrent     the same with the loop over T
    python3 bench/pytorch_metala.py --generate 200       tokens/s of recurrent decoding, batch 1
    python3 bench/pytorch_metala.py --check DIR          logits, loss, gradients against the golden files in DIR

Letters as in metala.c: B batch, T time, D width, H heads, K = D/2/H, V = D/H, F GLU width, N vocabulary, L layers.
Needs torch; --check also needs safetensors. metala.c itself needs neither.
"""
import argparse
import os
import statistics
import sys
import time

# On a shared machine, threads that spin at barriers lose whole time slices, and PyTorch looks several times slower
# than it is. Set the variable yourself to override. It must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError:
    sys.exit("pytorch_metala.py: cannot import torch; this comparison is optional, install it with: pip install torch")


# ============================================================== 1. The decay scan
#   S_t = diag(e^{a_t}) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t       (q comes scaled by K^(-1/2))
#   q, k, a (B,H,T,K)    v, o (B,H,T,V)    S (B,H,K,V)    a <= 0

def scan_recurrent(q, k, v, a, S=None):
    """The two equations, one token after another. Returns o and the last state."""
    if S is None:
        S = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    o = []
    for q_t, k_t, v_t, alpha_t in zip(*(x.unbind(2) for x in (q, k, v, a.exp()))):
        S = alpha_t[..., None] * S + k_t[..., None] * v_t[..., None, :]
        o.append((q_t[..., None, :] @ S)[..., 0, :])
    return torch.stack(o, 2), S


class SmallScores(torch.autograd.Function):
    """A_tj = Σ_i q_ti k_ji e^{r_ti - r_ji}, j <= t, with one exponential for each (t,j,i), r = cumulative sum of a.

    q, k, r (...,c,K) -> A (...,c,c), c tiny. Hand-written backward: autograd keeps three (c,c,K) tensors, this one.
    """
    @staticmethod
    def forward(ctx, q, k, r):
        E = (r[..., :, None, :] - r[..., None, :, :]).clamp_(max=0).exp_()   # j > t: no overflow, cut off by tril
        ctx.save_for_backward(q, k, E)
        return (E * k[..., None, :, :]).mul_(q[..., :, None, :]).sum(-1).tril_()

    @staticmethod
    def backward(ctx, dA):
        q, k, E = ctx.saved_tensors
        W = E * dA.tril()[..., None]
        dk = (W * q[..., :, None, :]).sum(-3)
        dq = W.mul_(k[..., None, :, :]).sum(-2)
        return dq, dk, q * dq - k * dk


def scores(q, k, a, base=4):
    """A_tj = Σ_i q_ti k_ji e^{a_{j+1,i} + ... + a_ti}, j <= t, within blocks: (...,c,K) -> (...,c,c).

    Halve the block. From the first half to the second the decay splits at the middle into two factors, both <= 1,
    so that this quarter is one matrix product that cannot overflow; the halves themselves are the same problem.
    """
    c = q.shape[-2]
    if c == base:
        return SmallScores.apply(q, k, a.cumsum(-2))
    q, k, a = (x.unflatten(-2, (2, c // 2)) for x in (q, k, a))
    A0, A1 = scores(q, k, a, base).unbind(-3)
    (k0, _), (_, q1), (a0, a1) = (x.unbind(-3) for x in (k, q, a))
    r0 = a0.cumsum(-2)
    A10 = (q1 * a1.cumsum(-2).exp()) @ (k0 * (r0[..., -1:, :] - r0).exp()).mT
    return torch.cat([F.pad(A0, (0, c // 2)), torch.cat([A10, A1], -1)], -2)


def scan_chunk(q, k, v, a, c=32):
    """Chunks of c tokens, all at once but for the carry of the states; safe for any gate: every exponent is <= 0.

    o_t = S_0ᵀ (q_t ⊙ e^{r_t}) + Σ_{j<=t} A_tj v_j,   S_c = diag(e^{r_c}) S_0 + Σ_j (k_j ⊙ e^{r_c - r_j}) v_jᵀ
    """
    T = q.shape[2]
    if T % c:
        q, k, v, a = (F.pad(x, (0, 0, 0, -T % c)) for x in (q, k, v, a))
    q, k, v, a = (x.unflatten(2, (-1, c)) for x in (q, k, v, a.clamp(min=-80)))        # (B,H,T/c,c,K or V)
    r = a.cumsum(-2)
    R = r[..., -1:, :]
    new = (k * (R - r).exp()).mT @ v                                                   # (B,H,T/c,K,V)
    S, starts = torch.zeros_like(new[:, :, 0]), []
    for new_n, decay_n in zip(new.unbind(2), R.exp().mT.unbind(2)):
        starts.append(S)
        S = torch.addcmul(new_n, decay_n, S)
    o = (q * r.exp()) @ torch.stack(starts, 2) + scores(q, k, a) @ v
    return o.flatten(2, 3)[:, :, :T], S


# ============================================================== 2. The model, under the authors' parameter names

def rms(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def wide(x):
    """At least float32: gates, scan and head norm are never computed in bfloat16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class TokenMixer(nn.Module):
    def __init__(self, D, H):
        super().__init__()
        self.H = H
        self.conv1d = nn.Conv1d(D, D, 4, groups=D, bias=False)
        self.q_proj, self.k_gate = (nn.Linear(D, D // 2, bias=False) for _ in range(2))
        self.v_proj, self.out_proj = (nn.Linear(D, D, bias=False) for _ in range(2))
        self.g_proj = nn.Linear(D, D)
        self.aug_balance = nn.Parameter(torch.zeros(D // 2))

    def forward(self, n, mask, scan, cache):                            # n (B,T,D)
        heads = lambda x: x.unflatten(-1, (self.H, -1)).transpose(1, 2)                # (B,H,T,K or V)
        if mask is not None:
            n = n * mask
        padded = torch.cat([cache["tail"], n], 1) if cache else F.pad(n, (0, 0, 3, 0))
        u = F.silu(self.conv1d(padded.mT).mT.contiguous())
        v = self.v_proj(u) if mask is None else self.v_proj(u) * mask
        q, z, v = (heads(wide(x)) for x in (self.q_proj(u), self.k_gate(u), v))
        a = F.logsigmoid(z) / 16
        k = -torch.expm1(a)
        o, S = scan(q * q.shape[-1] ** -0.5, k, v, a, *([cache["S"]] if cache else []))
        if cache is not None:
            cache.update(S=S, tail=padded[:, -3:])
        w = (q * k * wide(self.aug_balance).view(self.H, 1, -1)).sum(-1, keepdim=True)  # (B,H,T,1), q not scaled
        p = F.layer_norm(o + torch.sigmoid(w * v), v.shape[-1:], eps=1e-5)
        return self.out_proj(F.silu(self.g_proj(u)) * p.transpose(1, 2).flatten(2).to(n.dtype))


class ChannelMixer(nn.Module):
    def __init__(self, D, F_):
        super().__init__()
        self.l1, self.l2 = (nn.Linear(D, F_, bias=False) for _ in range(2))
        self.l3 = nn.Linear(F_, D, bias=False)

    def forward(self, n):
        return self.l3(F.silu(self.l1(n)) * self.l2(n))


class Layer(nn.Module):
    def __init__(self, D, H, F_):
        super().__init__()
        self.token_mixer, self.channel_mixer = TokenMixer(D, H), ChannelMixer(D, F_)

    def forward(self, x, mask, scan, cache):
        x = x + self.token_mixer(rms(x), mask, scan, cache)
        return x + self.channel_mixer(rms(x))


class MetaLA(nn.Module):
    def __init__(self, D, L, H, F_, N, tied=False, pad_token_id=2):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(N, D, padding_idx=pad_token_id)
        self.model.layers = nn.ModuleList(Layer(D, H, F_) for _ in range(L))
        self.lm_head = nn.Linear(D, N, bias=False)
        for module in self.modules():                                   # conv1d and aug_balance keep theirs
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.model.embed_tokens.weight[pad_token_id] = 0
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, mask=None, scan=scan_chunk, caches=None):
        """ids (B,T) -> logits (B,T,N). mask (B,T), 1 token, 0 padding. caches: a list of L dicts, for decoding."""
        x = self.model.embed_tokens(ids)
        mask = None if mask is None else mask[..., None].to(x.dtype)
        for layer, cache in zip(self.model.layers, caches or [None] * len(self.model.layers)):
            x = layer(x, mask, scan, cache)
        return self.lm_head(rms(x))


def cross_entropy(logits, labels):
    return F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), ignore_index=-100)


# ============================================================== 3. Check, training step, decoding

def check(folder):
    """Worst max|x - ref| / max|ref| over logits, loss and all gradients of each golden file, in float64."""
    try:
        from safetensors import safe_open
    except ImportError:
        sys.exit("pytorch_metala.py: --check cannot import safetensors; install it with: pip install safetensors")
    failed = 0
    for case in ("tiny", "odd", "stress", "padding", "tied", "bf16", "decode"):
        path = os.path.join(folder, case + ".safetensors")
        if not os.path.isfile(path):
            sys.exit(f"{path}: no such file; --check needs the folder with the golden files")
        with safe_open(path, "pt") as f:
            config, golden = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}
        D, L, H, F_, N, pad = (int(config[name]) for name in ("decoder_embed_dim", "decoder_layers",
                               "decoder_attention_heads", "glu_dim", "vocab_size", "pad_token_id"))
        tied = config["tie_word_embeddings"] == "true"
        net = MetaLA(D, L, H, F_, N, tied, pad).double()
        names = [name for name, _ in net.named_parameters()]            # a tied weight appears once
        net.load_state_dict({name: golden[name] for name in names}, strict=not tied)
        ids, mask = golden["input_ids"].long(), golden.get("attention_mask")
        for scan in (scan_chunk, scan_recurrent):
            got, worst, where = {}, 0.0, "nothing"
            if case == "decode" and scan is scan_recurrent:             # one token a call, with the cache
                got["logits"] = decode(net, ids)
            else:
                got["logits"] = net(ids, mask, scan)
            if case != "decode":
                loss = cross_entropy(got["logits"], golden["labels"].long())
                got["loss"] = loss.view(1)
                got.update(zip(("grad." + name for name in names), torch.autograd.grad(loss, list(net.parameters()))))
            for name, x in got.items():
                error = (x - golden[name]).abs().max().item() / (golden[name].abs().max().item() or 1.0)
                if not error <= worst:                                  # also true for NaN
                    worst, where = error, name
            ok = worst <= 1e-9
            failed += not ok
            print(f"{case:8} {scan.__name__:15} {len(got):3} tensors   worst {worst:.1e} in {where}   (1e-09)   "
                  + ("ok" if ok else "FAILED"))
    return 1 if failed else 0


@torch.no_grad()
def decode(net, ids, generate=0):
    """Feeds ids (B,T) one by one, then `generate` greedy tokens; returns the logits of every call."""
    p = net.lm_head.weight
    D, H, B = p.shape[1], net.model.layers[0].token_mixer.H, len(ids)
    state = lambda: wide(p.new_zeros(B, H, D // 2 // H, D // H))
    caches = [dict(S=state(), tail=p.new_zeros(B, 3, D)) for _ in net.model.layers]
    out = []
    for t in range(ids.shape[1] + generate):
        token = ids[:, t:t + 1] if t < ids.shape[1] else out[-1].argmax(-1)
        out.append(net(token, scan=scan_recurrent, caches=caches))
    return torch.cat(out, 1)


def bench(args):
    torch.manual_seed(1)
    net = MetaLA(args.width, args.layers, args.heads, args.glu_dim, args.vocab).to(getattr(torch, args.dtype))
    sizes = f"pytorch D{args.width} L{args.layers} H{args.heads} F{args.glu_dim} N{args.vocab}"
    suffix = "" if args.dtype == "float32" else f" ({args.dtype})"
    if args.generate:
        prompt = torch.ones(1, 1, dtype=torch.long)
        decode(net, prompt, 8)
        start = time.perf_counter()
        decode(net, prompt, args.generate)
        s = (time.perf_counter() - start) / (args.generate + 1)         # the prompt is a token too
        print(f"{sizes} decode: {s * 1e3:.2f} ms/token, {1 / s:.0f} tokens/s{suffix}")
        return 0
    scan = dict(chunk=scan_chunk, recurrent=scan_recurrent)[args.scan]
    decayed = [p for p in net.parameters() if p.dim() >= 2]
    plain = [p for p in net.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=0.1), dict(params=plain, weight_decay=0.0)],
                                  lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    seconds = []
    for _ in range(2 + args.steps):                                     # two steps of warm-up
        ids = torch.randint(args.vocab, (args.batch, args.context + 1))
        start = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(net(ids[:, :-1], scan=scan), ids[:, 1:]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    s = statistics.median(seconds[2:])
    rate = args.batch * args.context / s
    gflops = 6 * sum(p.numel() for p in net.parameters()) * rate / 1e9
    print(f"{sizes} B{args.batch} T{args.context} scan {args.scan}: {s * 1e3:.1f} ms/step, {rate:.0f} tokens/s, "
          f"{gflops:.1f} GFLOP/s{suffix}")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=256, layers=6, heads=4, glu_dim=704, vocab=256, batch=8, context=256,
                            steps=7, threads=0, generate=0).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value, metavar="N", help=f"{value}")
    parser.add_argument("--scan", choices=["chunk", "recurrent"], default="chunk")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], default="float32")
    parser.add_argument("--check", metavar="DIR", help="compare with the golden files in DIR, in float64")
    args = parser.parse_args()
    if args.width % 2 or args.heads < 1 or args.width // 2 % args.heads or args.vocab < 3 or args.steps < 1:
        parser.error("--heads must divide half of --width, which must be even; --vocab from 3, --steps from 1")
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    return check(args.check) if args.check else bench(args)


if __name__ == "__main__":
    sys.exit(main())
