"""Paged attention for TPUs: one pass over the pages of each row, read once, while the pages to come are already on their way.

A row's queries are cut into items of `tile` tokens. An item goes through its pages block by block with the online softmax (arXiv
2205.14135). A cursor runs ahead of the computation, over the ends of items, and keeps the buffers filled, so that the copies never stop.
A decoding batch is bound by them: the time is bytes / bandwidth.

Lanes are 128 wide, so heads are taken in groups whose lanes are a multiple of 128: one head of 128, two of 64. The queries of a group
stand in their own head's lanes with zeros in the others: one product gives the scores of all of them without a slice inside a register.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2E = math.log2(math.e)
CORES = {"TPU v4": 2, "TPU v5": 2, "TPU v5p": 2}        # of a device; one for all others
BUFFERS = 3                             # blocks: one is computed with, the others are on their way
BLOCK_BYTES, BLOCK_PAGES = 2**21, 32    # of keys and values in one block: more than a DMA's latency times the bandwidth
SCORES = 2**17                          # of one lane group in one block
SMEM_WORDS = 2**17                      # for the table, of 2^18 words of scalar memory


def supports(q, k_pages, v_pages, table, q_starts, kv_lens, sinks, k_scale, v_scale, *, chip, max_q, v_size, **static) -> str | None:
    S, lanes = k_pages.shape[1:]
    packed = 32 // k_pages.dtype.itemsize
    if table.size + 5 * (table.shape[0] + q.shape[0]) > SMEM_WORDS:
        return f"the table has {table.shape[0]} x {table.shape[1]} entries, scalar memory has room for {SMEM_WORDS}"
    if S % packed:
        return f"pages of {S} tokens of {k_pages.dtype} are not a multiple of {packed} tokens"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries are {q.dtype}, the kernel takes float32 and bfloat16"
    return None


def forward(
    q, k_pages, v_pages, table, q_starts, kv_lens, sinks, k_scale, v_scale, *,
    max_q, v_size, window, scale, softcap, chip=None, interpret=False,
):  # fmt: skip
    """o "T N h". interpret: pltpu.InterpretParams; the table's entries are then taken as they are, so that a wrong one is found."""
    T, N, H = q.shape
    B = len(kv_lens)
    K = k_pages.shape[2] // H
    lens = q_starts[1:] - q_starts[:-1]
    shape = Shape(N, K, H, v_size)
    row_scale = jnp.full((K,), scale, jnp.float32) if k_scale is None else k_scale * scale
    out_scale = jnp.ones((K,), jnp.float32) if v_scale is None else v_scale
    if v_pages is None and k_scale is not None:
        out_scale = out_scale * k_scale
    run = partial(_items, q, k_pages, v_pages, table, q_starts, kv_lens, sinks, row_scale, out_scale, shape=shape, window=window,
                  softcap=softcap, cores=CORES.get(chip or "", 1), interpret=interpret)  # fmt: skip
    one = run(lens == 1 if max_q > 1 else lens > 0, tile=1, items=min(B, T))
    if max_q == 1:
        return one
    tile = max(2, 256 // shape.rows)
    many = run(lens > 1, tile=tile, items=min(B, T) + T // tile)
    row = jnp.clip(at_most(q_starts, jnp.arange(T)) - 1, 0, B - 1)
    return jnp.where((lens[row] == 1)[:, None, None], one, many)


def at_most(edges, x):
    """How many of the edges are at most x: one comparison of all with all, where a binary search is a dozen small programs."""
    return (edges <= x[:, None]).sum(1)


class Shape:
    """Heads in lane groups: J heads of a group, G query heads each; rows: of one token in one group."""

    def __init__(self, N, K, H, h):
        self.N, self.K, self.H, self.h = N, K, H, h
        J = math.lcm(H, 128) // H
        while J > 1 and J * h % 128:
            J += math.lcm(H, 128) // H
            if J > K:
                break
        self.J = J if K % J == 0 else K
        self.groups, self.G = K // self.J, N // K
        self.rows = self.J * self.G


def _items(
    q, k_pages, v_pages, table, q_starts, kv_lens, sinks, row_scale, out_scale, chosen, *,
    shape, tile, items, window, softcap, cores, interpret,
):  # fmt: skip
    """o "T N h" of the chosen rows; zeros elsewhere."""
    T, N, H = q.shape
    P, S, lanes = k_pages.shape
    B, M = table.shape
    J, G, groups, h = shape.J, shape.G, shape.groups, shape.h
    bytes_a_token = (lanes + (0 if v_pages is None else v_pages.shape[2])) * k_pages.dtype.itemsize
    R = -(-tile * J * G // 8) * 8
    pages = max(1, min(M, BLOCK_PAGES, BLOCK_BYTES // (bytes_a_token * S), SCORES // (R * S)))
    pages = 1 << pages.bit_length() - 1         # of a block; the scalar unit divides by it
    each = -(-items // cores)
    items = each * cores

    # The items: which row, which tokens, which pages. Active ones come first.
    lens = jnp.where(chosen, q_starts[1:] - q_starts[:-1], 0)
    ends = jnp.cumsum(-(-lens // tile))
    item = jnp.arange(items)
    row = jnp.clip(at_most(ends, item), 0, B - 1)
    first = (item - (ends[row] - -(-lens[row] // tile))) * tile      # of the row's queries
    position = kv_lens[row] - lens[row] + first
    seen = jnp.clip(jnp.minimum(position + tile, kv_lens[row]), 0, M * S)
    hi = -(-seen // S)
    lo = jnp.zeros_like(hi) if window is None else jnp.clip((position - window + 1) // S, 0, hi)
    plan = jnp.stack([row, position, seen, lo, hi]).astype(jnp.int32).reshape(-1)

    # Queries by item, each in its own head's lanes: [items, groups, rows of the tile, J x H].
    token = jnp.clip(q_starts[row][:, None] + first[:, None] + jnp.arange(tile), 0, T - 1)
    x = q[token].reshape(items, tile, groups, J, G, 1, H) * jnp.eye(J, dtype=q.dtype)[:, None, :, None]
    x = x.transpose(0, 2, 1, 3, 4, 5, 6).reshape(items, groups, tile * J * G, J * H)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, R - tile * J * G), (0, 0)))

    def by_row(per_head):
        """[N] -> [groups, R, 128]: what each row of a tile needs, in every lane."""
        wide = jnp.broadcast_to(per_head.astype(jnp.float32).reshape(groups, 1, J * G), (groups, tile, J * G)).reshape(groups, -1)
        return jnp.broadcast_to(jnp.pad(wide, ((0, 0), (0, R - tile * J * G)))[..., None], (groups, R, 128))

    constants = [by_row(jnp.repeat(row_scale, G)), by_row(jnp.repeat(out_scale, G))] + ([] if sinks is None else [by_row(sinks)])
    offset = jnp.broadcast_to((jnp.arange(R, dtype=jnp.int32) // (J * G))[:, None], (R, 128))
    active = ends[-1:].astype(jnp.int32)

    def mine(core, step, plan, active, table):
        """An item's block; a core that has no more items stays with its last, and never with another core's."""
        return jnp.maximum(jnp.minimum(core * each + step, active[0] - 1), core * each), 0, 0, 0

    whole = lambda *shape: pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
    value = k_pages if v_pages is None else v_pages
    kernel = partial(_kernel, S=S, M=M, P=P, pages=pages, items=items, each=each, groups=groups, W=J * H, w=J * h, window=window,
                     softcap=softcap, sinks=sinks is not None, shared=v_pages is None, clamp=not interpret)  # fmt: skip
    o = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((items, groups, R, J * h), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, each),
            in_specs=[
                pl.BlockSpec((1, groups, R, J * H), mine),
                *(whole(groups, R, 128) for _ in constants),
                whole(R, 128),
                pl.BlockSpec(memory_space=pl.ANY),
                *([] if v_pages is None else [pl.BlockSpec(memory_space=pl.ANY)]),
            ],
            out_specs=pl.BlockSpec((1, groups, R, J * h), mine),
            scratch_shapes=[
                pltpu.VMEM((BUFFERS, pages * S, lanes), k_pages.dtype),
                *([] if v_pages is None else [pltpu.VMEM((BUFFERS, pages * S, value.shape[2]), value.dtype)]),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.VMEM((groups, R, 128), jnp.float32),
                pltpu.VMEM((groups, R, 128), jnp.float32),
                pltpu.VMEM((groups, R, J * h), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True, vmem_limit_bytes=48 * 2**20
        ),
        interpret=interpret,
        name=f"paged_attention_{'decode' if tile == 1 else 'chunk'}",
    )(plan, active, table.astype(jnp.int32).reshape(-1), x, *constants, offset, k_pages, *([] if v_pages is None else [v_pages]))

    # Each row's own head out of its group's, then by token.
    o = o[:, :, : tile * J * G].reshape(items, groups, tile, J, G, J, h)
    o = jnp.stack([o[:, :, :, j, :, j] for j in range(J)], axis=3).transpose(0, 2, 1, 3, 4, 5).reshape(items * tile, N, h)
    t = jnp.arange(T)
    owner = jnp.clip(at_most(q_starts, t) - 1, 0, B - 1)
    within = t - q_starts[owner]
    place = (ends[owner] - -(-lens[owner] // tile)) * tile + within
    there = (within < lens[owner]) & (t < q_starts[B])
    return jnp.where(there[:, None, None], o[jnp.clip(place, 0, items * tile - 1)], 0)


def _kernel(
    plan, active, table, x, row_scale, out_scale, *rest,
    S, M, P, pages, items, each, groups, W, w, window, softcap, sinks, shared, clamp,
):  # fmt: skip
    sink = rest[0] if sinks else None
    offset, k_pages, *rest = rest[1:] if sinks else rest
    v_pages, rest = (k_pages, rest) if shared else (rest[0], rest[1:])
    out, k_buffer, *rest = rest
    v_buffer, rest = (k_buffer, rest) if shared else (rest[0], rest[1:])
    semaphore, cursor, m, l, acc = rest
    step = pl.program_id(1)
    begin = pl.program_id(0) * each
    item, end = begin + step, jnp.minimum(begin + each, active[0])
    of = lambda what, item: plan[what * items + item]
    ROW, POSITION, SEEN, LO, HI = range(5)

    def blocks_of(item):
        return jnp.maximum(pl.cdiv(of(HI, item) - of(LO, item), pages), 1)

    def copies(item, block, slot, act):
        """Start, or await, the pages of a block of an item."""
        page, last, entry = of(LO, item) + block * pages, of(HI, item), of(ROW, item) * M
        for j in range(pages):

            @pl.when(page + j < last)
            def _(j=j):
                source = table[entry + page + j]
                source = jnp.clip(source, 0, P - 1) if clamp else source
                for pool, buffer in [(k_pages, k_buffer)] + ([] if shared else [(v_pages, v_buffer)]):
                    act(pltpu.make_async_copy(pool.at[source], buffer.at[slot, pl.ds(j * S, S)], semaphore.at[slot]))

    def after(slot):
        return jnp.where(slot == BUFFERS - 1, 0, slot + 1)

    # The cursor: item, block and slot of the next copy; and the slot that the next computation takes.
    def fetch():
        ahead, block, slot = cursor[0], cursor[1], cursor[2]

        @pl.when(ahead < end)
        def _():
            copies(ahead, block, slot, lambda copy: copy.start())
            last = block + 1 == blocks_of(ahead)
            cursor[0], cursor[1], cursor[2] = jnp.where(last, ahead + 1, ahead), jnp.where(last, 0, block + 1), after(slot)

    @pl.when(step == 0)
    def _():
        cursor[0], cursor[1], cursor[2], cursor[3] = begin, 0, 0, 0
        jax.lax.fori_loop(0, BUFFERS - 1, lambda _, nothing: fetch(), None)

    @pl.when(item < end)
    def _():
        row_position, seen, lo = of(POSITION, item), of(SEEN, item), of(LO, item)
        m[...] = sink[...] * LOG2E if sinks else jnp.full(m.shape, -jnp.inf, jnp.float32)
        l[...] = jnp.full(l.shape, 1.0 if sinks else 0.0, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

        def body(block, slot):
            fetch()
            copies(item, block, slot, lambda copy: copy.wait())
            base = (lo + block * pages) * S
            R, kind = x.shape[2], x.dtype
            key = base + jax.lax.broadcasted_iota(jnp.int32, (R, pages * S), 1)
            position = row_position + offset[:, :1]
            see = key <= position
            if window is not None:
                see &= key > position - window
            precision = jax.lax.Precision.HIGHEST if kind == jnp.float32 else None
            there = base + jax.lax.broadcasted_iota(jnp.int32, (pages * S, w), 0) < seen
            for g in range(groups):
                k = k_buffer[slot, :, g * W : (g + 1) * W].astype(kind)
                v = v_buffer[slot, :, g * w : (g + 1) * w].astype(kind)
                v = jnp.where(there, v, jnp.zeros_like(v))          # pages hold anything behind the last token, NaN too
                s = jax.lax.dot_general(x[0, g], k, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
                if softcap is None:
                    s = s * (row_scale[g][:, :1] * LOG2E)
                else:
                    s = jnp.tanh(s * (row_scale[g][:, :1] / softcap)) * (softcap * LOG2E)
                s = jnp.where(see, s, -jnp.inf)
                before = m[g]
                most = jnp.maximum(before, s.max(1, keepdims=True))
                finite = jnp.where(most == -jnp.inf, 0.0, most)
                p = jnp.exp2(s - finite[:, :1])
                fade = jnp.exp2(before - finite)
                m[g] = most
                l[g] = l[g] * fade + p.sum(1, keepdims=True)
                pv = jax.lax.dot(p.astype(kind), v, precision=precision, preferred_element_type=jnp.float32)
                acc[g] = acc[g] * fade[:, :1] + pv
            return after(slot)

        cursor[3] = jax.lax.fori_loop(0, blocks_of(item), body, cursor[3])
        for g in range(groups):
            total = l[g][:, :1]
            out[0, g] = (acc[g] * (out_scale[g][:, :1] / jnp.where(total > 0, total, 1.0))).astype(out.dtype)
