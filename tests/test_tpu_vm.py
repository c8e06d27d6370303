"""scripts/tpu_vm.sh against a gcloud that is a shell script: two hosts are two folders, and commands sent to them run here."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GCLOUD = r"""#!/usr/bin/env bash
# $FAKE/state: the queued resource's states to come, one a line, the last one stays. $FAKE/calls: what was asked of gcloud.
set -u
echo "$*" >> "$FAKE/calls"
case "$*" in
    "config get compute/zone") echo here-1 ;;
    *"queued-resources create"*) printf 'WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n' > "$FAKE/state"; mkdir -p "$FAKE/w0" "$FAKE/w1" ;;
    *"queued-resources describe"*)
        [ -f "$FAKE/state" ] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
        head -n 1 "$FAKE/state"
        [ "$(wc -l < "$FAKE/state")" -le 1 ] || sed -i 1d "$FAKE/state" ;;
    *"queued-resources delete"*) rm -rf "$FAKE/state" "$FAKE/w0" "$FAKE/w1" ;;
    *"tpu-vm scp"*) for w in w0 w1; do cp "$5" "$FAKE/$w/minllm.tar.gz"; done ;;
    *"tpu-vm ssh"*)
        [ -d "$FAKE/w0" ] || { echo "no such host" >&2; exit 255; }
        for w in w0 w1; do
            (cd "$FAKE/$w" && HOME=$FAKE/$w bash -c "hostname() { echo $w; }; ${!#//scripts\/run/$FAKE/run}") || exit
        done ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""
# Stands for the training: goes on until it is told how to end, or by SIGTERM.
RUN = r"""#!/usr/bin/env bash
[ "$*" != "train --help" ] || exit 0
printf '<%s>' "$@"; echo
trap 'echo saved; exit 0' TERM
while [ ! -s "$FAKE/end" ]; do sleep 0.05; done
exit "$(cat "$FAKE/end")"
"""


@pytest.fixture
def cloud(tmp_path):
    """tpu(*arguments) -> a finished call of the script; tpu.calls(word) the calls of gcloud with that word."""
    for name, text in (("bin/gcloud", GCLOUD), ("run", RUN), ("bin/python3.12", "#!/bin/sh\n")):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"FAKE": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TPU_VM_PERIOD": "0.1"}

    class Cloud:
        folder = tmp_path

        def start(self, *arguments):
            command = [str(ROOT / "scripts/tpu_vm.sh"), *arguments]
            return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path)

        def __call__(self, *arguments, code=0):
            process = self.start(*arguments)
            text = process.communicate(timeout=60)[0]
            assert process.returncode == code, text
            return text

        def calls(self, word):
            file = tmp_path / "calls"
            return [line for line in file.read_text().splitlines() if word in line] if file.exists() else []

        def wait(self, condition):
            began = time.monotonic()
            while not condition():
                assert time.monotonic() - began < 30
                time.sleep(0.05)

    cloud = Cloud()
    yield cloud
    for pid in tmp_path.glob("w*/minllm/logs/*.pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


CREATE = ("create", "tpu-a", "--type", "v6e-16", "--spot")


def test_creating_waits_and_happens_once(cloud):
    text = cloud(*CREATE)
    assert "PROVISIONING" in text and text.endswith("tpu-a is there\n")
    assert "is there" in cloud(*CREATE)
    (call,) = cloud.calls("queued-resources create")
    assert "--accelerator-type v6e-16 --runtime-version v2-alpha-tpuv6e --spot" in call and "--zone here-1" in call
    (cloud.folder / "state").write_text("SUSPENDED\n")  # preempted
    cloud(*CREATE)
    assert len(cloud.calls("queued-resources create")) == 2 and len(cloud.calls("queued-resources delete")) == 1


def test_a_run_from_its_creation_to_its_end(cloud):
    """Twice each command: the second does no harm."""
    cloud(*CREATE)
    for _ in range(2):
        cloud("setup", "tpu-a")
    for host in ("w0", "w1"):
        assert (cloud.folder / host / "minllm/minllm/train.py").read_bytes() == (ROOT / "minllm/train.py").read_bytes()
    arguments = ("--bucket", "gs://b/", "--", "--config", "configs/a b.yaml", "model.args={D: 4, name: 'x'}")
    cloud("run", "tpu-a", *arguments)
    assert "w0: tpu-a runs already" in cloud("run", "tpu-a", *arguments)
    logs = cloud("logs", "tpu-a")
    for host in ("w0", "w1"):
        assert (f"{host}: <train><--cluster><--config><configs/a b.yaml><model.args={{D: 4, name: 'x'}}>"
                "<checkpoints.folder=gs://b/tpu-a><compilation_cache=gs://b/tpu-a/programs>") in logs  # fmt: skip
    status = cloud("status", "tpu-a")
    assert "tpu-a: ACTIVE" in status and "w1: <train>" in status
    cloud("stop", "tpu-a", "--run-only")
    assert all((cloud.folder / host / "minllm/logs/tpu-a.log").read_text().endswith("saved\n") for host in ("w0", "w1"))
    assert "w0: ended with 0" in cloud("status", "tpu-a")
    for _ in range(2):
        cloud("stop", "tpu-a")
    assert len(cloud.calls("queued-resources delete")) == 1


def test_a_kept_run_survives_preemptions_and_lost_hosts(cloud):
    cloud(*CREATE)
    cloud("setup", "tpu-a")
    process = cloud.start("run", "tpu-a", "--keep", "--type", "v6e-16", "--spot", "--", "steps=3")
    log = cloud.folder / "w1/minllm/logs/tpu-a.log"
    cloud.wait(lambda: log.exists() and "steps=3" in log.read_text())
    for pid in cloud.folder.glob("w*/minllm/logs/*.pid"):  # preempted: hosts and disks are gone
        os.killpg(int(pid.read_text()), signal.SIGKILL)
    (cloud.folder / "state").write_text("SUSPENDED\n")
    cloud.wait(lambda: len(cloud.calls("queued-resources create")) == 2 and log.exists() and "steps=3" in log.read_text())
    (cloud.folder / "end").write_text("75")  # a process was lost
    cloud.wait(lambda: all((cloud.folder / w / "minllm/logs/tpu-a.exit").exists() for w in ("w0", "w1")))
    (cloud.folder / "end").write_text("")
    cloud.wait(lambda: log.read_text().count("steps=3") == 2)
    (cloud.folder / "end").write_text("0")
    text = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and "the run is over" in text and "was lost" in text and "preempted?" in text


def test_a_kept_run_that_fails_by_itself_is_not_started_again(cloud):
    cloud(*CREATE)
    cloud("setup", "tpu-a")
    (cloud.folder / "end").write_text("1")
    text = cloud("run", "tpu-a", "--keep", "--type", "v6e-16", "--", "steps=3", code=1)
    assert "the run failed (exit statuses: 1 1" in text


def test_a_dry_run_says_what_it_would_do_and_does_nothing(cloud):
    text = "".join(cloud(command, "tpu-a", "--type", "v5e-16", "--slices", "2", "--dry-run", *more)
                   for command, *more in (("create",), ("setup",), ("run", "--", "steps=3"), ("status",), ("stop",)))  # fmt: skip
    assert "--node-count 2 --node-prefix tpu-a --accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite" in text
    assert "tpu-vm ssh tpu-a-0" in text and "tpu-vm ssh tpu-a-1" in text and "queued-resources delete tpu-a" in text
    assert cloud.calls("") == []


@pytest.mark.parametrize(("arguments", "message"), [
    (("fly", "a"), "there is no command 'fly'; choose from: create setup run status logs stop"),
    (("create",), "give the TPU a name"), (("create", "A_b"), "the name 'A_b' must be lower-case"),
    (("create", "a"), "give --type, such as"), (("create", "a", "--type", "v9-8"), "the type 'v9-8' is unknown; known are v4-N"),
    (("create", "a", "--type", "tpu7x-8"), "it needs GKE"), (("create", "a", "--typ", "v4-8"), "there is no option '--typ'"),
    (("create", "a", "--type"), "--type needs a value"), (("create", "a", "--slices", "0"), "--slices is '0'"),
    (("run", "a"), "nothing to run"), (("run", "a", "--bucket", "b"), "--bucket is 'b'; it must begin with gs://"),
])  # fmt: skip
def test_bad_input(cloud, arguments, message):
    assert message in cloud(*arguments, code=2)
    assert not cloud.calls("create") and not cloud.calls("ssh")
