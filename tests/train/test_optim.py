"""Optimizers against torch.optim (Lion: its formula) over whole trajectories, groups read off Specs, schedules against transformers."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from minllm import spec
from minllm.layer import Execution, Precision
from minllm.layers.mlp import MLP
from minllm.layers.stack import Stack
from minllm.models.llama import llama3
from minllm.optim import SGD, Adafactor, AdamW, Lion, Muon, Schedule, decays
from minllm.run import Run
from minllm.spec import Spec
from minllm.step import TrainState, make_step

STEPS = 50
SPECS = {
    "wide": Spec((5, 12), "embed -> mlp"),
    "tall": Spec((12, 5), "mlp -> embed"),
    "gain": Spec((7,), "_", role="gain"),
    "bias": Spec((4,), "_", role="bias"),
    "table": Spec((9, 6), "vocab embed", role="embedding"),
}
MATRICES = ("wide", "tall")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def start(specs=SPECS):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=s.shape) for name, s in specs.items()}


def slope(p, t):
    """A gradient that depends on the parameters, so that an error grows, and on the step, so that moments matter."""
    count = {name: np.arange(v.size).reshape(v.shape) for name, v in p.items()}
    return {name: (1 + count[name] / v.size) * v + np.cos(t + count[name]) for name, v in p.items()}


def ours(optimizer, p=None, specs=SPECS, slope=slope):
    p = p or start(specs)
    transform = optimizer.transform(specs)
    state, update = transform.init(jax.tree.map(jnp.asarray, p)), jax.jit(transform.update)
    for t in range(STEPS):
        directions, state = update(slope(p, t), state, p)
        p = jax.tree.map(lambda v, d: v - optimizer.lr * np.asarray(d), p, directions)
    return p


def theirs(make, names=tuple(SPECS)):
    """torch: make(parameters by name) -> optimizer."""
    p = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in start().items() if name in names}
    optimizer = make(p)
    for t in range(STEPS):
        for name, g in slope({name: v.detach().numpy() for name, v in p.items()}, t).items():
            p[name].grad = torch.tensor(g)
        optimizer.step()
    return {name: v.detach().numpy() for name, v in p.items()}


def groups(p, decayed, decay):
    return [{"params": [v for n, v in p.items() if (n in decayed) == on], "weight_decay": decay * on} for on in (True, False)]


def agree(ours, theirs, bar):
    for name, want in theirs.items():
        np.testing.assert_allclose(ours[name], want, rtol=0, atol=bar, err_msg=name)


@pytest.mark.parametrize("embeddings", [False, True])
def test_adamw_is_torchs(embeddings):
    """50 steps, 1e-6 (G08). Gains, biases and, unless asked for, embeddings do not decay."""
    decayed = (*MATRICES, "table") if embeddings else MATRICES
    got = ours(AdamW(lr=0.02, b1=0.9, b2=0.95, eps=1e-6, decay=0.3, decay_embeddings=embeddings))
    agree(got, theirs(lambda p: torch.optim.AdamW(groups(p, decayed, 0.3), lr=0.02, betas=(0.9, 0.95), eps=1e-6)), 1e-6)


def test_adam_is_adamw_without_decay():
    agree(ours(AdamW(lr=0.02, decay=0.0)), theirs(lambda p: torch.optim.Adam(p.values(), lr=0.02, betas=(0.9, 0.95))), 1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov):
    """Trajectory 1e-5 (G09): the momentum is kept in float32."""
    got = ours(SGD(lr=0.01, momentum=0.9, nesterov=nesterov, decay=0.1))
    agree(got, theirs(lambda p: torch.optim.SGD(groups(p, MATRICES, 0.1), lr=0.01, momentum=0.9, nesterov=nesterov)), 1e-5)


def test_sgd_without_momentum_descends():
    got = ours(SGD(lr=0.01, momentum=0.0))
    agree(got, theirs(lambda p: torch.optim.SGD(p.values(), lr=0.01)), 1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_torchs(decay):
    """Trajectory 1e-5 (G09). torch factors every matrix and caps the rate at 1/sqrt(step), which 0.02 stays below."""
    got = ours(Adafactor(lr=0.02, least_dim=1, decay=decay))
    agree(got, theirs(lambda p: torch.optim.Adafactor(groups(p, MATRICES, decay), lr=0.02)), 1e-5)


def test_adafactor_memory_is_rows_and_columns():
    state = jax.eval_shape(Adafactor(least_dim=8).transform(SPECS | {"big": Spec((256, 512), "embed -> mlp")}).init,
                           spec.abstract(SPECS | {"big": Spec((256, 512), "embed -> mlp")}))  # fmt: skip
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * (256 + 512)


def test_lion_is_its_formula():
    """arXiv 2302.06675, algorithm 2, in float64; 1e-5 (G09). A sign may flip where its argument is smaller than float32's rounding."""
    lr, b1, b2, decay = 0.003, 0.9, 0.99, 0.5
    p = start()
    m = {name: 0.0 * v for name, v in p.items()}
    for t in range(STEPS):
        for name, g in slope(p, t).items():
            shrink = decay * p[name] * (name in MATRICES)
            p[name] = p[name] - lr * (np.sign(b1 * m[name] + (1 - b1) * g) + shrink)
            m[name] = b2 * m[name] + (1 - b2) * g
    agree(ours(Lion(lr=lr, b1=b1, b2=b2, decay=decay)), p, 1e-5)


@pytest.fixture
def exact_muon(monkeypatch):
    """torch iterates in bfloat16, whose rounding (4e-3) no trajectory of 1e-5 survives: its own source, in the dtype of the gradient."""
    source = inspect.getsource(torch.optim._muon._zeropower_via_newtonschulz)
    assert "torch.bfloat16" in source
    scope = dict(vars(torch.optim._muon))
    exec(source.replace("torch.bfloat16", "grad.dtype"), scope)
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", scope["_zeropower_via_newtonschulz"])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("match_rms", [False, True])
def test_muon_is_torchs(exact_muon, nesterov, match_rms):
    """Trajectory 1e-5 (G09), both scalings by shape. torch's matrices are (outputs, inputs)."""

    def make(p):
        for name in MATRICES:
            p[name].data = p[name].data.T.contiguous()
        scale = "match_rms_adamw" if match_rms else "original"
        return torch.optim.Muon(p.values(), lr=0.01, momentum=0.9, nesterov=nesterov, weight_decay=0.1, adjust_lr_fn=scale)

    p = {name: torch.nn.Parameter(torch.tensor(v)) for name, v in start().items() if name in MATRICES}
    optimizer = make(p)
    for t in range(STEPS):
        for name, g in slope({name: v.detach().numpy().T for name, v in p.items()}, t).items():
            p[name].grad = torch.tensor(g.T.copy())
        optimizer.step()
    got = ours(Muon(lr=0.01, momentum=0.9, nesterov=nesterov, match_rms=match_rms, decay=0.1))
    agree(got, {name: v.detach().numpy().T for name, v in p.items()}, 1e-5)


def test_what_muon_leaves_goes_by_adamw():
    """Embeddings, gains, biases and the head to the vocabulary; with the rate, the eps and the decay groups of `adam`."""
    specs = {**SPECS, "head": Spec((6, 9), "embed -> vocab")}
    adam = AdamW(lr=0.004, b1=0.8, b2=0.9, eps=1e-3, decay=0.3)
    got, want = ours(Muon(lr=0.01, adam=adam), specs=specs), ours(adam, specs=specs)
    for name in ("gain", "bias", "table", "head"):
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-10, err_msg=name)
    assert np.abs(got["wide"] - want["wide"]).max() > 1e-2


@pytest.mark.parametrize("axes", ["embed -> heads head", "heads head -> embed"])
def test_muon_sees_the_matrix_that_a_spec_declares(axes):
    """Several input or output dims are one: every singular value of the update is near 1 (the five coefficients leave 0.68 to 1.13) before
    it is scaled by the shape, and those of another view of the same array would not be."""
    s = Spec((6, 4, 3), axes)
    inputs = 6 if axes.startswith("embed") else 24
    transform = Muon(momentum=0.0, steps=12).transform({"w": s})
    g = {"w": np.random.default_rng(0).normal(size=s.shape)}
    direction = np.asarray(transform.update(g, transform.init(g), g)[0]["w"]).reshape(inputs, -1)
    values = np.linalg.svd(direction, compute_uv=False) / math.sqrt(max(1, direction.shape[1] / inputs))
    assert ((0.6 < values) & (values < 1.2)).all(), values


@pytest.mark.parametrize("optimizer", [AdamW(), SGD(), Lion(lr=0.003), Muon()], ids=lambda o: o.kind)
def test_a_stack_is_its_layers_apart(optimizer):
    """Three stacked layers, or experts, step as three arrays of their own: 1e-10, the order of float64 sums in a batched product."""
    one = MLP(6).params(4)
    stacked = Stack((MLP(6),), 3).params(4).pattern[0]
    apart = {f"{i}/{name}": s for i in range(3) for name, s in one.items()}
    p = start(apart)
    together = {name: np.stack([p[f"{i}/{name}"] for i in range(3)]) for name in one}

    def slopes(p, t):
        return {name: np.stack([slope({"": layer}, t)[""] for layer in v]) for name, v in p.items()}

    got, want = ours(optimizer, together, stacked, slopes), ours(optimizer, p, apart)
    for name in one:
        for i in range(3):
            np.testing.assert_allclose(got[name][i], want[f"{i}/{name}"], rtol=0, atol=1e-10, err_msg=name)


def test_decay_groups_of_a_llama():
    specs = llama3(D=16, layers=2, heads=2, kv_heads=1, hidden=24, vocab=32).params()
    on = {spec.path_name(path) for path, yes in jax.tree_util.tree_leaves_with_path(decays(specs, False)) if yes}
    block = "trunk/0/pattern"
    assert on == {"head", *(f"{block}/0/inner/{w}" for w in "qkvo"), *(f"{block}/1/inner/{w}" for w in ("gate", "up", "down"))}
    assert decays(specs, True)["embed"] is True


# --- clipping, through the step -------------------------------------------------------------------------------------------------------


class Linear:
    """A model and its objective at once: loss = sum(direction * p), whose gradient is the direction."""

    def __init__(self, direction):
        self.direction = direction

    def params(self):
        return {name: Spec(v.shape, " ".join("_" * v.ndim)) for name, v in self.direction.items()}

    def update(self, p, stats):
        return p

    def weight(self, batch):
        return jnp.asarray(1.0)

    def losses(self, model, p, batch, ctx):
        return {"loss": (sum((d * p[name]).sum() for name, d in self.direction.items()), jnp.asarray(1.0))}, ()


@pytest.mark.parametrize("limit", [0.5, 3.0, 1e9])
def test_clipping_is_torchs(limit):
    """F64 (G11). Users choose among float32, bfloat16 and float16; the test asks the step for float64."""
    direction = start()
    run, precision = Run(clip=limit, optimizer=SGD(lr=1.0, momentum=0.0), schedule=Schedule(shape="constant", warmup=0)), Precision()
    for thing, name, value in ((run, "objective", Linear(direction)), (precision, "compute", "float64"), (precision, "reduce", "float64")):
        object.__setattr__(thing, name, value)
    transform = run.optimizer.transform(run.objective.params())
    p = {name: jnp.zeros_like(v) for name, v in direction.items()}
    state = TrainState(jnp.int32(0), p, dict.fromkeys(p), transform.init(p), None, jax.random.key(0), jnp.float32(0))
    step = make_step(run.objective, transform, run, Execution(precision=precision))
    new, metrics = step(state, {"tokens": jnp.zeros((1, 1), jnp.int32)})

    theirs = {name: torch.nn.Parameter(torch.zeros(v.shape, dtype=torch.float64)) for name, v in direction.items()}
    for name, v in theirs.items():
        v.grad = torch.tensor(direction[name])
    norm = torch.nn.utils.clip_grad_norm_(theirs.values(), limit)
    assert abs(float(metrics["grad_norm"]) - norm.item()) <= 1e-10
    for name, v in theirs.items():
        np.testing.assert_allclose(-np.asarray(new.params[name]), v.grad, rtol=0, atol=1e-10)


# --- schedules ------------------------------------------------------------------------------------------------------------------------

N, W = 60, 10


def rates(make, **options):
    """transformers' rate, as a share of the peak, at steps 0 to N."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_warmup_steps=W, **options)
    out = []
    for _ in range(N + 1):
        out.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(out)


WSD = dict(num_stable_steps=N - W - 15, num_decay_steps=15)
ALL = dict(num_training_steps=N)
SHAPES = {
    "cosine": (dict(shape="cosine", floor=0.1), transformers.get_cosine_with_min_lr_schedule_with_warmup, dict(min_lr_rate=0.1, **ALL)),
    "cosine to 0": (dict(shape="cosine", floor=0.0), transformers.get_cosine_schedule_with_warmup, ALL),
    "linear": (dict(shape="linear", floor=0.0), transformers.get_linear_schedule_with_warmup, ALL),
    "constant": (dict(shape="constant"), transformers.get_constant_schedule_with_warmup, {}),
    "wsd": (dict(shape="wsd", floor=0.0, decay=0.25), transformers.get_wsd_schedule, dict(decay_type="linear", **WSD)),
    "wsd sqrt": (dict(shape="wsd", floor=0.0, decay=0.25, cooldown="sqrt"), transformers.get_wsd_schedule,
                 dict(decay_type="1-sqrt", **WSD)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_schedules_are_transformers(name):
    """F64 at every step (G12, G13). transformers begins at rate 0 and wastes the first step: our warm-up is theirs one step later."""
    mine, make, options = SHAPES[name]
    got, want = np.array([Schedule(warmup=W, **mine)(t, N) for t in range(N)]), rates(make, **options)
    np.testing.assert_allclose(got[: W - 1], want[1:W], rtol=0, atol=1e-10)
    np.testing.assert_allclose(got[W - 1 :], [1.0, *want[W:N]], rtol=0, atol=1e-10)


def test_wsd_ends_at_its_floor():
    """F64; with a floor transformers warms up from the floor too, so the decay alone is compared."""
    want = rates(transformers.get_wsd_schedule, decay_type="linear", min_lr_ratio=0.2, **WSD)[W:]
    got = np.array([Schedule(shape="wsd", warmup=W, decay=0.25, floor=0.2)(t, N) for t in range(W, N + 1)])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    assert got[-1] == pytest.approx(0.2, abs=1e-12)


def test_inverse_sqrt_is_transformers():
    """F64; one step later throughout."""
    got = np.array([Schedule(shape="inverse_sqrt", warmup=W)(t, N) for t in range(N)])
    np.testing.assert_allclose(got, rates(transformers.get_inverse_sqrt_schedule)[1:], rtol=0, atol=1e-10)


def test_linear_with_a_floor():
    got = np.array([Schedule(shape="linear", warmup=0, floor=0.25)(t, 4) for t in range(5)])
    np.testing.assert_allclose(got, [1, 0.8125, 0.625, 0.4375, 0.25], rtol=0, atol=1e-12)


def test_a_cooldown_can_branch_from_any_step():
    """WSD's plateau does not know how long the run is: a longer run resumed before the decay has the same past."""
    wsd = Schedule(shape="wsd", warmup=W, decay=0.2)
    assert [float(wsd(t, 60)) for t in range(48)] == [float(wsd(t, 600)) for t in range(48)]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
def test_a_schedule_never_leaves_0_to_1(shape):
    """Without warm-up, with a warm-up longer than the run, past the end, and traced."""
    for warmup, steps in ((0, 10), (50, 10), (1, 1)):
        schedule = Schedule(shape=shape, warmup=warmup)
        got = [float(schedule(t, steps)) for t in range(2 * steps)]
        assert all(0 < rate <= 1 for rate in got), (warmup, steps, got)
        assert float(jax.jit(lambda t: schedule(t, steps))(jnp.int32(0))) == pytest.approx(got[0], abs=1e-12)
