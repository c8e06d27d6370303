"""The recurrence on a TPU: one pass over the sequence, with the memories of several heads in VMEM.

A program takes one chunk of a few value heads; chunks are the innermost grid axis, so the memory stays where it is while the next chunk's
tokens arrive. The heads of a program are independent, so that the matrix unit works on one while another waits for its result. Arrays
come as "B T heads*H", as projections leave them. The backward kernel walks the chunks in reverse and takes the gradient of the same
`chunk`, from the memories that the forward kernel saved.
"""

from functools import partial, reduce
from math import gcd

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from minllm_kernels.ops.recurrence.chunk import Constants, chunk, constants

LANES = 128
HEADS = {"forward": 8, "backward": 4}  # value heads a program, at most: more hide more latency, and spill more registers


def supports(q, k, v, g, beta, *_, C, **__) -> str | None:
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q is {q.dtype}; the kernel takes float32 and bfloat16"
    if C < 16:
        return f"{C} tokens are too few to fill a tile"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"heads of {q.shape[3]} and {v.shape[3]} dims; the kernel takes at most 256"
    return None


class Plan:
    """Which heads a program takes, and where its blocks are."""

    def __init__(self, q, v, g, C, way):
        (self.B, self.T, self.K, self.H), (self.N, self.h) = q.shape, v.shape[2:]
        self.C, self.chunks, self.r = C, self.T // C, self.N // self.K
        # value heads of one program share q and k heads among themselves, or all one head; their memories are at most 512 KiB
        self.P = gcd(self.N, max(1, min(HEADS[way], 2**17 // (self.H * self.h))))
        if self.P % self.r and self.r % self.P:
            self.P = gcd(self.P, self.r)
        self.few = max(1, self.P // self.r)
        self.channels = g.ndim == 4
        self.at = (lambda c: self.chunks - 1 - c) if way == "backward" else (lambda c: c)

    @property
    def grid(self):
        return self.B, self.N // self.P, self.chunks

    def tokens(self, heads, width, of=lambda p: p):
        return pl.BlockSpec((1, self.C, heads * width), lambda b, p, c: (b, self.at(c), of(p)))

    def inputs(self, beta):
        """The BlockSpecs of q, k, v, g, beta."""
        programs = max(1, self.r // self.P)  # that share a q and k head
        qk = self.tokens(self.few, self.H, lambda p: jax.lax.div(p, jnp.int32(programs)))
        row = pl.BlockSpec((1, 1, 1, self.P, self.C), lambda b, p, c: (b, self.at(c), p, 0, 0))
        column = pl.BlockSpec((1, 1, self.C, self.P), lambda b, p, c: (b, p, self.at(c), 0))
        g = self.tokens(self.P, self.H) if self.channels else row
        return [qk, qk, self.tokens(self.P, self.h), g, *([] if beta is None else [column])]

    def arrays(self, q, k, v, g, beta):
        flat = lambda x: x.reshape(*x.shape[:2], -1)
        return [flat(q), flat(k), flat(v), flat(g) if self.channels else self.rows(g), *([] if beta is None else [self.columns(beta)])]

    def rows(self, x):
        """ "B T N" -> (B, T/C, N/P, P, C): tokens along lanes."""
        return x.reshape(self.B, self.chunks, self.C, self.N // self.P, self.P).transpose(0, 1, 3, 4, 2)

    def from_rows(self, x):
        return x.transpose(0, 1, 4, 2, 3).reshape(self.B, self.T, self.N)

    def columns(self, x):
        """ "B T N" -> (B, N/P, T, P): tokens along sublanes."""
        return x.reshape(self.B, self.T, self.N // self.P, self.P).transpose(0, 2, 1, 3)

    def from_columns(self, x):
        return x.transpose(0, 2, 1, 3).reshape(self.B, self.T, self.N)

    def memory(self):
        return pl.BlockSpec((1, self.P, self.h, self.H), lambda b, p, c: (b, p, 0, 0))

    def memories(self):
        return pl.BlockSpec((1, 1, self.P, self.h, self.H), lambda b, p, c: (b, self.at(c), p, 0, 0))

    def fixed(self, dtype):
        """The constants that `chunk` needs, and their BlockSpecs: fetched once."""
        c = jax.tree.map(jnp.asarray, constants(self.C))
        c = c._replace(terms=c.terms.astype(dtype))
        return c, jax.tree.map(lambda a: pl.BlockSpec(a.shape, lambda b, p, c, n=a.ndim: (0,) * n), c)

    def heads(self, q_ref, k_ref, v_ref, g_ref, b_ref):
        """What `chunk` takes, with the program's value heads in front."""
        each = lambda ref, width, own: jnp.stack([ref[0, :, own(n) * width : (own(n) + 1) * width] for n in range(self.P)])
        shared = lambda n: n * self.few // self.P
        q, k = each(q_ref, self.H, shared), each(k_ref, self.H, shared)
        g = each(g_ref, self.H, int) if self.channels else jnp.stack([g_ref[0, 0, 0, n : n + 1, :] for n in range(self.P)])
        b = None if b_ref is None else jnp.stack([b_ref[0, 0, :, n : n + 1] for n in range(self.P)])
        return q, k, each(v_ref, self.h, int), g, b

    def constants(self, *refs):
        wide = lambda x: jnp.broadcast_to(x, (self.P, *x.shape))
        return jax.tree.map(wide, Constants(*refs).load())


# `chunk` of all heads of a program at once, so that each of its products is issued for one head after another: a product's result takes
# some 200 cycles, and the matrix unit takes its work in the order in which it is written down.
heads = jax.vmap(chunk)

PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _padded(x, to):
    short = -x.shape[-1] % to
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x


def _wide(q, k, v, g, state):
    """Head sizes as multiples of the lanes: channels of zeros, which stay zero."""
    to = LANES
    g = _padded(g, to) if g.ndim == 4 else g
    state = _padded(_padded(state, to).swapaxes(-1, -2), to).swapaxes(-1, -2)
    return _padded(q, to), _padded(k, to), _padded(v, to), g, state


@partial(jax.jit, static_argnames=("C", "save", "chip"))  # what is offered everywhere is traced once
def forward(q, k, v, g, beta, state, *, C, save, chip=None):
    """See `reference.forward`."""
    H, h = q.shape[3], v.shape[3]
    g = jnp.zeros(v.shape[:3], jnp.float32) if g is None else g
    q, k, v, g, state = _wide(q, k, v, g, state)
    plan = Plan(q, v, g, C, "forward")
    fixed, fixed_specs = plan.fixed(q.dtype)

    def kernel(*refs):
        refs = list(refs)
        q_ref, k_ref, v_ref, g_ref = refs[:4]
        b_ref = None if beta is None else refs[4]
        rest = refs[4 if beta is None else 5 :]
        *fixed_refs, rest = *rest[:4], rest[4:]
        start_ref, y_ref, S_ref, *saved = rest

        @pl.when(pl.program_id(2) == 0)
        def _():
            S_ref[...] = start_ref[...]

        S = S_ref[0]
        if save:
            saved[0][0, 0] = S
        after, y = heads(S, *plan.heads(q_ref, k_ref, v_ref, g_ref, b_ref), plan.constants(*fixed_refs))
        S_ref[0] = after
        for n in range(plan.P):
            y_ref[0, :, n * plan.h : (n + 1) * plan.h] = y[n].astype(y_ref.dtype)

    shapes = [jax.ShapeDtypeStruct((plan.B, plan.T, plan.N * plan.h), v.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)]
    specs = [plan.tokens(plan.P, plan.h), plan.memory()]
    if save:
        shapes.append(jax.ShapeDtypeStruct((plan.B, plan.chunks, *state.shape[1:]), state.dtype))
        specs.append(plan.memories())
    y, after, *saved = pl.pallas_call(
        kernel, grid=plan.grid, in_specs=[*plan.inputs(beta), *fixed_specs, plan.memory()], out_specs=specs, out_shape=shapes,
        compiler_params=PARAMS, name="recurrence",
    )(*plan.arrays(q, k, v, g, beta), *fixed, state)  # fmt: skip
    y = y.reshape(*v.shape)[..., :h]
    return y, after[:, :, :h, :H], saved[0][:, :, :, :h, :H] if save else None


@partial(jax.jit, static_argnames=("C", "chip"))
def backward(q, k, v, g, beta, states, dy, dstate, *, C, chip=None):
    """See `reference.backward`."""
    H, h, decays = q.shape[3], v.shape[3], g is not None
    g = g if decays else jnp.zeros(v.shape[:3], jnp.float32)
    dy = _padded(dy, LANES)
    states = _padded(_padded(states, LANES).swapaxes(-1, -2), LANES).swapaxes(-1, -2)
    q, k, v, g, dstate = _wide(q, k, v, g, dstate)
    plan = Plan(q, v, g, C, "backward")
    fixed, fixed_specs = plan.fixed(q.dtype)
    shared = plan.P // plan.few  # value heads of a program that share a q and k head

    def kernel(*refs):
        refs = list(refs)
        q_ref, k_ref, v_ref, g_ref = refs[:4]
        b_ref = None if beta is None else refs[4]
        rest = refs[4 if beta is None else 5 :]
        *fixed_refs, rest = *rest[:4], rest[4:]
        saved_ref, dy_ref, last_ref, dq_ref, dk_ref, dv_ref, dg_ref, *rest = rest
        db_ref, dS_ref = (None, *rest) if beta is None else rest

        @pl.when(pl.program_id(2) == 0)
        def _():
            dS_ref[...] = last_ref[...]

        c = plan.constants(*fixed_refs)
        dy = jnp.stack([dy_ref[0, :, n * plan.h : (n + 1) * plan.h] for n in range(plan.P)]).astype(jnp.float32)
        grad = jax.vjp(lambda *args: heads(*args, c), saved_ref[0, 0], *plan.heads(q_ref, k_ref, v_ref, g_ref, b_ref))[1]  # pyright: ignore[reportCallIssue]
        dS_ref[0], dq, dk, dv, dg, db = grad((dS_ref[0], dy))
        for n in range(plan.P):
            dv_ref[0, :, n * plan.h : (n + 1) * plan.h] = dv[n].astype(dv_ref.dtype)
            if plan.channels:
                dg_ref[0, :, n * plan.H : (n + 1) * plan.H] = dg[n]
            else:
                dg_ref[0, 0, 0, n : n + 1, :] = dg[n]
            if db is not None:
                db_ref[0, 0, :, n : n + 1] = db[n]
        for m in range(plan.few):
            for ref, d in ((dq_ref, dq), (dk_ref, dk)):
                own = reduce(jnp.add, (d[n].astype(jnp.float32) for n in range(m * shared, (m + 1) * shared)))
                ref[0, :, m * plan.H : (m + 1) * plan.H] = own.astype(ref.dtype)

    args = plan.arrays(q, k, v, g, beta)
    inputs = plan.inputs(beta)
    # programs that share a q and k head each give their part of its gradient
    parts = plan.N // plan.P * plan.few
    part = plan.tokens(plan.few, plan.H)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    dqk = jax.ShapeDtypeStruct((plan.B, plan.T, parts * plan.H), q.dtype if parts == plan.K else jnp.float32)
    *grads, dS = pl.pallas_call(
        kernel, grid=plan.grid, in_specs=[*inputs, *fixed_specs, plan.memories(), plan.tokens(plan.P, plan.h), plan.memory()],
        out_specs=[part, part, *inputs[2:], plan.memory()], out_shape=[dqk, dqk, *map(like, args[2:]), like(dstate)],
        compiler_params=PARAMS, name="recurrence_backward",
    )(*args, *fixed, states, dy.reshape(*dy.shape[:2], -1), dstate)  # fmt: skip
    dq, dk, dv, dg, *db = grads
    whole = lambda x: x.reshape(plan.B, plan.T, plan.K, -1, plan.H).sum(3).astype(q.dtype)[..., :H]
    dg = (dg.reshape(g.shape)[..., :H] if plan.channels else plan.from_rows(dg)) if decays else None
    return whole(dq), whole(dk), dv.reshape(v.shape)[..., :h], dg, plan.from_columns(db[0]) if db else None, dS[:, :, :h, :H]
