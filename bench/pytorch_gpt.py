#!/usr/bin/env python3
"""What softmax attention reaches in the same time: a small GPT on the characters of a text, in PyTorch on the CPU.

    python3 bench/pytorch_gpt.py corpus.txt

The recipe is that of nanoGPT for a CPU: 4 layers of 4 heads, 128 wide, context 64, batch 12, 2000 steps, AdamW with
betas 0.9 and 0.99, weight decay 0.1, learning rate 1e-3 after 100 steps of warm-up, then a cosine to 1e-4, no dropout.
Prints the loss in nats per character over all of the last 10 % of the text, and the seconds of training until then.
"""
import math
import sys
import time

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError:
    sys.exit("pytorch_gpt.py: cannot import torch; this comparison is optional, install it with: pip install torch")

L, H, D, T, B, STEPS, RATE, WARMUP = 4, 4, 128, 64, 12, 2000, 1e-3, 100


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x):                                               # (B,T,D)
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, N):
        super().__init__()
        self.tokens, self.places = nn.Embedding(N, D), nn.Embedding(T, D)
        self.blocks = nn.Sequential(*(Block() for _ in range(L)))
        self.norm, self.head = nn.LayerNorm(D, bias=False), nn.Linear(D, N, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * L) if name.endswith(("out.weight", "down.weight")) else 1))
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places.weight[:ids.shape[1]])))


@torch.no_grad()
def validate(net, data):
    """Nats per character over all windows of T characters that follow each other."""
    n = (len(data) - 1) // T
    x, y = data[:n * T].view(n, T), data[1:n * T + 1].view(n, T)
    losses = [F.cross_entropy(net(a).flatten(0, 1), b.flatten(), reduction="sum") for a, b in
              zip(x.split(256), y.split(256))]
    return sum(losses).item() / (n * T)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    text = open(sys.argv[1], "rb").read()
    symbols = sorted(set(text))
    data = torch.tensor([symbols.index(c) for c in text])
    cut = len(data) * 9 // 10
    train, val = data[:cut], data[cut:]
    torch.manual_seed(1337)
    net = GPT(len(symbols))
    decayed, plain = ([p for p in net.parameters() if (p.dim() > 1) == d] for d in (True, False))
    adamw = torch.optim.AdamW([dict(params=decayed, weight_decay=0.1), dict(params=plain, weight_decay=0.0)], lr=RATE,
                              betas=(0.9, 0.99))
    seconds = 0.0
    for step in range(STEPS + 1):
        if step % 250 == 0:
            print(f"step {step:5}  {seconds:6.1f} s  validation {validate(net, val):.4f} nats per character", flush=True)
        if step == STEPS:
            break
        start = time.perf_counter()
        rate = RATE * (step + 1) / WARMUP if step < WARMUP else \
            0.1 * RATE + 0.45 * RATE * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        for group in adamw.param_groups:
            group["lr"] = rate
        at = torch.randint(len(train) - T, (B,))
        x, y = (torch.stack([train[i + d:i + d + T] for i in at]) for d in (0, 1))
        adamw.zero_grad()
        F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adamw.step()
        seconds += time.perf_counter() - start


if __name__ == "__main__":
    main()
