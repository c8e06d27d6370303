"""Checkpoints: bitwise on any mesh, strict about what fits, and whole whatever happens while one is written (law 11, *Restore*)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from minllm.checkpoint import Checkpointer, RestoreError, SaveError, latest, read_extra, restore, steps
from minllm.data import Data
from minllm.run import Mesh, Model, Run
from minllm.step import build

ROOT = Path(__file__).parents[2]


def state(seed=0, D=16):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": jax.random.normal(keys[0], (D, 4)),
        "trunk": ({"q": jax.random.normal(keys[1], (D, D), jnp.bfloat16)}, {"o": jnp.zeros((1, 3))}),
    }
    odd = [jnp.float8_e4m3fn(1.5), jnp.int8(-3), jnp.array([True, False]), jax.random.key(1, impl="rbg"), None]
    return {"params": params, "optimizer": optax.adamw(1e-3).init(params), "step": jnp.int32(seed), "key": keys, "odd": odd}


def same(a, b):
    """Bitwise, with dtype and structure."""

    def bits(x):
        x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.map(bits, a) == jax.tree.map(bits, b)


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def run(code, *args, devices=1, **kwargs):
    """A fresh process with so many simulated devices."""
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], env=env, text=True, **kwargs)


def test_round_trip_is_bitwise(tmp_path):
    saved, extra = state(), {"data": 7, "config": {"lr": 1e-3}, "tokenizer": "ab12", "text": "ü"}
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest() is None and latest(tmp_path) is None
        assert checkpoints.save(20, saved, extra)
    read, told = restore(tmp_path, abstract(saved))
    assert same(read, saved) and told == extra and read_extra(tmp_path) == extra
    assert jax.random.key_impl(read["odd"][3]) == "rbg"
    assert jnp.array_equal(jax.random.normal(read["key"][0]), jax.random.normal(saved["key"][0]))


def test_a_part_is_restored_alone(tmp_path):
    saved = state()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, saved)
    params, _ = restore(tmp_path, abstract(saved["params"]), under="params")
    assert same(params, saved["params"])
    second, _ = restore(tmp_path, abstract(saved["params"]["trunk"][1]), under="params/trunk/1")
    assert same(second, saved["params"]["trunk"][1])
    with pytest.raises(RestoreError, match=r"1 in the checkpoint, but not asked for: embed"):
        restore(tmp_path, abstract({"trunk": saved["params"]["trunk"]}), under="params")


def test_what_does_not_fit_is_refused_before_reading(tmp_path, monkeypatch):
    saved = {"params": {"a": jnp.zeros((4, 8)), "b": jnp.zeros((3,)), "c": jnp.zeros((2,))}, "key": jax.random.key(0), "step": jnp.int32(0)}
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, saved)
    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", lambda *a, **k: pytest.fail("something was read"))
    asked = {"params": {"a": jnp.zeros((4, 16)), "b": jnp.zeros((3,), jnp.bfloat16), "d": jnp.zeros((2,))},
             "key": jax.random.key(0, impl="rbg"), "step": jnp.int32(0)}  # fmt: skip
    with pytest.raises(RestoreError) as caught:
        restore(tmp_path, abstract(asked))
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/checkpoints/3 does not fit: of 5 stored leaves and 5 asked for,",
        "  1 missing in the checkpoint: params/d",
        "  1 in the checkpoint, but not asked for: params/c",
        "  1 of another shape: params/a (4, 8), asked for (4, 16)",
        "  2 of another dtype: key key<fry>, asked for key<rbg>; params/b float32, asked for bfloat16",
        "Restore with the config that was saved with it, or begin a new run folder (init_from takes parameters alone).",
    ]
    with pytest.raises(RestoreError, match="and 15 more"):
        restore(tmp_path, abstract({f"layer{i}": jnp.zeros(1) for i in range(25)}))


def test_a_raw_key_is_not_a_typed_key(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"key": jax.random.key(0)})
    with pytest.raises(RestoreError, match=r"shape: key \(\), asked for \(2,\)\n  1 of another dtype: key key<fry>, asked for uint32"):
        restore(tmp_path, abstract({"key": jax.random.PRNGKey(0)}))


def test_which_checkpoint(tmp_path):
    with pytest.raises(RestoreError, match=r"no checkpoint in .*: it has none"):
        restore(tmp_path, {})
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 10):
            checkpoints.save(step, {"x": jnp.float32(step)}, {"step": step})
        assert checkpoints.restore(abstract({"x": jnp.float32(0)}))[1] == {"step": 10}
    assert steps(tmp_path) == [2, 10] and latest(tmp_path) == 10
    assert restore(tmp_path, abstract({"x": jnp.float32(0)}), step=2)[0]["x"] == 2
    with pytest.raises(RestoreError, match=r"no checkpoint 7 in .*: it has 2, 10"):
        restore(tmp_path, {}, step=7)


@pytest.mark.parametrize("better, kept", [("min", [3, 5, 6]), ("max", [1, 5, 6]), (None, [5, 6])])
def test_the_newest_and_the_best_are_kept(tmp_path, better, kept):
    metrics = {1: 9.0, 2: 2.0, 3: 1.0, 4: None, 5: 3.0, 6: None}
    for some in ((1, 2, 3), (4, 5, 6)):  # reopened in between: the metrics are read back
        with Checkpointer(tmp_path, keep=2, best=better) as checkpoints:
            for step in some:
                checkpoints.save(step, {"x": jnp.float32(step)}, metric=metrics[step])
            checkpoints.wait()
            assert checkpoints.best() == (kept[0] if better else None)
    assert steps(tmp_path) == kept


def test_the_same_step_is_saved_once_and_never_an_older_one(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.save(4, {"x": jnp.float32(1)})
        assert not checkpoints.save(4, {"x": jnp.float32(2)})
        with pytest.raises(ValueError, match=r"cannot save step 3: .* already holds step 4"):
            checkpoints.save(3, {"x": jnp.float32(1)})
    with Checkpointer(tmp_path) as checkpoints:
        assert not checkpoints.save(4, {"x": jnp.float32(2)})
    assert restore(tmp_path, abstract({"x": jnp.float32(0)}))[0]["x"] == 1


def test_what_cannot_be_saved_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="params/w is a float: state holds jax Arrays; plain values belong into `extra`"):
            checkpoints.save(1, {"params": {"w": 1.0}})
        with pytest.raises(ValueError, match=r"w has shape \(0, 3\)"):
            checkpoints.save(1, {"w": jnp.zeros((0, 3))})
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, {"w": jnp.zeros(1)}, {"path": Path("x")})
        assert checkpoints.latest() is None
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)


def test_a_save_is_a_snapshot(tmp_path):
    # The next steps may donate the buffers that are being written, and the caller may change its dictionary.
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, extra = jnp.zeros((512, 512)), {"n": [0]}
    with Checkpointer(tmp_path, keep=20) as checkpoints:
        for n in range(1, 7):
            extra["n"][0] = n
            checkpoints.save(n, {"x": x}, extra)
            extra["n"][0] = -1
            for _ in range(10):
                x = step(x)
    for n in range(1, 7):
        read, told = restore(tmp_path, abstract({"x": x}), step=n)
        assert jnp.all(read["x"] == 10 * (n - 1)) and told == {"n": [n]}


RESHARD = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from minllm.checkpoint import Checkpointer, restore
    folder, out = sys.argv[1:]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"w": P("data", "model"), "b": P(("model", "data")), "r": P(), "k": P("data")}
    tree = {"w": jnp.arange(64.0).reshape(8, 8) / 7, "b": jnp.arange(16, dtype=jnp.bfloat16) / 3,
            "r": jnp.arange(5), "k": jax.random.split(jax.random.key(5), 8)}
    on = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
    with Checkpointer(folder) as c:
        if c.latest() is None:  # first: eight devices save
            c.save(1, jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs))
        else:                   # later: eight devices, sharded otherwise, read what one device saved
            read, _ = c.restore(jax.tree.map(on, tree, specs | {"w": P("model"), "k": P()}))
            assert read["w"].sharding.spec == P("model") and len(read["w"].addressable_shards[0].data) == 4
            c.save(3, read)
    np.savez(out, **{n: np.asarray(jax.random.key_data(x) if n == "k" else x.astype(jnp.float32)) for n, x in tree.items()})
"""


def test_eight_devices_to_one_and_back(tmp_path):
    def eight():
        process = run(RESHARD, tmp_path, tmp_path / "tree.npz", devices=8, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err

    eight()
    expected = {n: jnp.asarray(x) for n, x in np.load(tmp_path / "tree.npz").items()}
    expected |= {"b": expected["b"].astype(jnp.bfloat16), "r": expected["r"].astype(jnp.int32)}
    expected["k"] = jax.random.wrap_key_data(expected["k"])
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    asked = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), expected)
    with Checkpointer(tmp_path) as checkpoints:
        read, _ = checkpoints.restore(asked)
        assert same(read, expected) and read["w"].sharding == one
        checkpoints.save(2, read)
    eight()
    assert same(restore(tmp_path, asked, step=3)[0], expected)


def test_a_run_moves_between_meshes_bitwise(tmp_path):
    """V15: the whole state of a run, saved on 2 x 4, loads on 8 x 1 and on one device."""
    run = lambda **mesh: Run(model=Model(args=dict(D=16, layers=2, heads=4, kv_heads=2, hidden=32, scaling=None)), batch=8, average=0.9,
                             data=Data(length=16), mesh=Mesh(**mesh))  # fmt: skip
    first = build(run(data=1, fsdp=2, tensor=4), 32, jax.devices())
    state = first.init(jax.random.key(3))
    with Checkpointer(tmp_path) as c:
        c.save(1, state)
    raw = lambda a: jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    for other in (build(run(data=1, fsdp=8), 32, jax.devices()), build(run(data=1), 32, jax.devices()[:1])):
        found, _ = restore(tmp_path, other.state)
        for a, b, want in zip(*map(jax.tree.leaves, (found, state, other.state)), strict=True):
            np.testing.assert_array_equal(raw(a), raw(b))
            assert want.sharding is None or a.sharding.is_equivalent_to(want.sharding, a.ndim)


def test_a_mesh_of_this_process(tmp_path):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(4.0)})
    read, _ = restore(tmp_path, {"x": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)})
    assert read["x"].sharding == sharding


SAVE_FOREVER = """
    import sys, jax, jax.numpy as jnp
    from minllm.checkpoint import Checkpointer
    c = Checkpointer(sys.argv[1], keep=2)
    print("open", flush=True)
    n = c.latest() or 0
    while True:
        n += 1
        c.save(n, {f"w{i}": jnp.full((128, 128), n + i, jnp.float32) for i in range(20)}, {"step": n})
        if n % 2:  # every other save is waited for, and told
            c.wait()
            print(n, flush=True)
"""


def test_a_killed_save_leaves_the_last_good_one(tmp_path):
    random, asked, told, left = np.random.default_rng(0), abstract({f"w{i}": jnp.zeros((128, 128)) for i in range(20)}), 0, 0
    for _ in range(4):
        process = run(SAVE_FOREVER, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout.readline() == "open\n"
        time.sleep(random.uniform(0.1, 0.9))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.communicate()[0].split()
        told = int(lines[-1]) if lines else told
        left += any("tmp" in p.name or "deleted" in p.name for p in (tmp_path / "checkpoints").iterdir())
        newest = latest(tmp_path)
        assert newest is None if told == 0 and newest is None else newest >= told
        for step in steps(tmp_path):
            read, extra = restore(tmp_path, asked, step)
            assert extra == {"step": step} and all(jnp.all(read[f"w{i}"] == step + i) for i in range(20))
    assert told > 0 and left > 0  # it got somewhere, and a kill did hit a save
    with Checkpointer(tmp_path, keep=2):
        assert all(p.name.isdecimal() for p in (tmp_path / "checkpoints").iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount; test_a_save_that_fails covers the handling")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def noise(seed):
    return {f"w{i}": jax.random.normal(jax.random.key(seed * 10 + i), (64, 1024)) for i in range(4)}  # 1 MB that does not compress


@pytest.mark.parametrize("save_async", [True, False])
def test_a_full_disk_keeps_the_last_good_checkpoint(small_disk, save_async, capfd):
    with Checkpointer(small_disk, keep=5, save_async=save_async) as checkpoints:
        with pytest.raises(SaveError) as caught:
            for step in range(1, 6):
                checkpoints.save(step, noise(step))
        good = checkpoints.latest()
        failed, message = good + 1, str(caught.value)
        assert message.startswith(f"checkpoint {failed} was not saved in {small_disk}/checkpoints: no space left on the disk (")
        assert message.endswith(f" the state has 1.0 MB); the last good checkpoint is step {good}") and "\n" not in message
        assert same(checkpoints.restore(abstract(noise(0)))[0], noise(good))
        left = sorted(p.name for p in (small_disk / "checkpoints").iterdir())
        assert left == [str(step) for step in range(1, failed)]  # what was written in vain is gone
        shutil.rmtree(small_disk / "checkpoints" / "1")
        small = {"x": jnp.ones(3)}
        assert checkpoints.save(failed + 1, small)  # and the writer goes on when there is room
    assert same(restore(small_disk, abstract(small))[0], small)
    assert "Traceback" not in capfd.readouterr().err


def test_a_save_that_fails(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, noise(1))
        checkpoints.wait()
        (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()

        def fails():
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

        monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", fails)
        checkpoints._pending, checkpoints._saved[2] = (2, 10**6), None
        with pytest.raises(SaveError, match=r"checkpoint 2 was not saved .* no space left .*; the last good checkpoint is step 1"):
            checkpoints.wait()
        monkeypatch.undo()
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
        assert checkpoints.save(2, noise(2))
    assert steps(tmp_path) == [1, 2]


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"checkpoints cannot be written in .*: Not a directory; give a run folder that can be written"):
        Checkpointer(tmp_path / "file")
    locked = tmp_path / "locked"
    locked.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", locked], capture_output=True).returncode
    if not mounted:
        locked.chmod(0o500)
    try:
        if mounted or os.geteuid():  # root writes into any folder
            with pytest.raises(SaveError, match=r"cannot be written in .*: (Read-only file system|Permission denied); give a run folder"):
                Checkpointer(locked)
    finally:
        if mounted:
            subprocess.run(["umount", locked], check=True)


def test_other_files_are_let_alone(tmp_path):
    place = tmp_path / "checkpoints"
    (place / "notes").mkdir(parents=True)
    (place / "9.orbax-checkpoint-tmp").mkdir()
    (place / "7.deleted").mkdir()
    assert steps(tmp_path) == []  # reading cleans nothing: another process may be writing
    assert len(list(place.iterdir())) == 3
    Checkpointer(tmp_path).close()
    assert [p.name for p in place.iterdir()] == ["notes"]


def test_extra_is_plain_json(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(5, {"x": jnp.zeros(1)}, {"a": 1}, metric=0.5)
    assert json.loads((tmp_path / "checkpoints/5/extra/extra.json").read_text()) == {"extra": {"a": 1}, "metric": 0.5, "keys": {}}
