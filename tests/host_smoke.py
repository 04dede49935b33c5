"""A call of every C++ kernel and path on the host engine; run under a sanitizer, without torch.

    python tests/host_smoke.py MODULE SCHEDULES

Inputs lie in arrays of their own, so that any access outside them is outside an allocation; page
slots without keys and pages that no sequence has are forbidden memory under AddressSanitizer.
"""

import importlib.util
import sys

import numpy as np

FLOAT16 = 1


def load(path):
    spec = importlib.util.spec_from_file_location("smoke._host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def address(array):
    return 0 if array is None else array.ctypes.data


def write(host, slots):
    tokens, heads, size, dim = len(slots), 2, 8, 64
    k, v = (np.ones((tokens, heads, dim), np.float16) for _ in range(2))
    pages = [np.zeros((3, heads, size, dim), np.float16) for _ in range(2)]
    host.paged_write(
        address(k), address(v), address(pages[0]), address(pages[1]), address(slots), 0,
        *k.strides[:2], *v.strides[:2], *pages[0].strides[:3], *pages[1].strides[:3], 1, tokens, 3,
        heads, size, dim * 2, 16, True, 0,
    )  # fmt: skip
    written = len({s for s in slots.tolist() if 0 <= s < 3 * size})
    assert pages[0].sum() == written * heads * dim


def decode(host, lengths, *, group, dim, window=-1, fused=False, prefix=0, apart=False):
    batch, kv_heads, size = len(lengths), 2, 16
    width = -(-max(lengths) // size)
    shape = (batch * width + 1, kv_heads, size, dim)
    k, v = (np.ones(shape, np.float16) for _ in range(2))
    if apart:  # slots of a head are not neighbours
        k, v = (pages.swapaxes(1, 2).copy().swapaxes(1, 2) for pages in (k, v))
    q = np.ones((batch, kv_heads * group, dim), np.float16)
    table = (1 + np.arange(batch * width, dtype=np.int32)).reshape(batch, width)
    lens = np.array(lengths, np.int32)
    out = np.zeros_like(q)
    lse = np.zeros((kv_heads * group, batch), np.float32)
    slots = min(32, -(-width * size // 128)) + host.count_splits(prefix)
    part = np.full((batch, kv_heads * group, slots, dim), np.nan, np.float32)
    part_lse = np.full(part.shape[:3], np.nan, np.float32)
    new = [np.ones((batch, kv_heads, dim), np.float16) for _ in range(2)] if fused else [None, None]
    row = dim * 2
    forbidden = [(0, head, 0, size) for head in range(kv_heads)]
    for b, length in enumerate(lengths):
        for page in range(length // size, width):
            used = max(0, length - page * size)
            forbidden += [(table[b, page], head, used, size) for head in range(kv_heads)]
    bands = [
        (address(pages[page, head, slot]), row)
        for pages in (k, v)
        for page, head, first, last in forbidden
        for slot in range(first, last)
    ]
    for band in bands:
        host.poison(*band)
    strides = [s // 2 for s in (*q.strides[:2], *k.strides[:3], *v.strides[:3])]
    new_strides = [kv_heads * dim, dim] * 2
    host.paged_decode(
        address(q), address(k), address(v), address(table), address(lens), address(out),
        address(lse), address(part), address(part_lse), address(new[0]), address(new[1]), 0,
        *strides, *new_strides, width, 1, 1, len(k), batch, kv_heads * group, kv_heads, dim, size,
        width, window, prefix, slots, dim**-0.5, False, False, FLOAT16, 0,
    )  # fmt: skip
    for band in bands:
        host.unpoison(*band)
    expected = (np.array(lengths) > 0)[:, None, None]
    assert np.abs(out - expected).max() < 1e-3


def norm(host, rows, width, drop_below=0):
    x = np.arange(rows * width, dtype=np.float32).reshape(rows, width).astype(np.float16)
    weight, y, total = np.ones(width, np.float16), np.zeros_like(x), np.zeros_like(x)
    host.add_layer_norm(
        address(x), address(x), address(weight), address(weight), address(y), address(total), 0, 7,
        rows, width, width, drop_below, 1.0, 1e-5, width, False, FLOAT16, 0,
    )  # fmt: skip
    assert np.isfinite(y).all()


def linear(host, rows):
    x = np.ones((rows, 72), np.float16)
    w, b, y = np.ones((9, 72), np.float16), np.ones(9, np.float16), np.zeros((rows, 9), np.float16)
    host.linear_gelu(
        address(x), address(w), address(b), address(y), 72, 72, rows, 72, 9, True, FLOAT16, 0
    )
    assert (y == 73).all()


def sample(host, vocabulary, **settings):
    """Rows of odd lengths, so that they start at every offset from 16 bytes."""
    rows = 9
    logits = np.sin(np.arange(rows * vocabulary)).astype(np.float16).reshape(rows, vocabulary)
    tokens = np.full(rows, -1, np.int64)
    names = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "seed": 5}
    names |= {"sequence": 0, "step": 0}
    values = {name: settings.get(name, usual) for name, usual in names.items()}
    sequences = np.arange(rows)
    at = {name: address(sequences) if name == "sequence" else 0 for name in names}
    host.sample(
        address(logits), address(tokens), 0, *(x for n in names for x in (at[n], values[n])), rows,
        vocabulary, vocabulary, FLOAT16, 0,
    )  # fmt: skip
    assert ((tokens >= 0) & (tokens < vocabulary)).all()


def main():
    host = load(sys.argv[1])
    for seed in range(int(sys.argv[2])):
        host.set_schedule(seed)
        write(host, np.array([3, -1, 23, 3, 24], np.int64))
        decode(host, [300, 5, 0, 129], group=1, dim=64)
        decode(host, [150, 33], group=5, dim=80, window=40)
        decode(host, [40, 17], group=3, dim=32, fused=True)
        decode(host, [70, 9], group=2, dim=64, apart=True)
        decode(host, [200, 160, 161], group=2, dim=32, prefix=160)
        norm(host, 5, 768, drop_below=2**31)
        norm(host, 2, 2048)
        linear(host, 1)
        linear(host, 5)
        sample(host, 2101, top_k=40, top_p=0.9, min_p=0.2)
        sample(host, 2101, temperature=0.0)
        sample(host, 5)
    print("all paths ran")


if __name__ == "__main__":
    main()
