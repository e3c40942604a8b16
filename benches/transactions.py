#!/usr/bin/env python3
"""How long guests stand still for a transaction over many disks.

usage: transactions.py QBLOCKD FOLDER [DISKS...]
       transactions.py --mixes QBLOCKD FOLDER [DISKS...]

For each number of disks: that many images of 1 MiB with some data are opened, and transactions take snapshots of all of them, with and
without a state directory. The daemon logs how long guests waited, and for what; PARTS=1 shows that.

With --mixes the first three disks have 1 GiB, and guests that write to them over NBD as fast as they can; one more client of each
writes 4 KiB again and again. For each mix of actions: how long guests waited by the daemon's log, and the longest of those writes around
the transaction. "nothing" is a time without a transaction. MIXES=a+b tries some of them. Needs fio.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from compare import Probe

ROUNDS = int(os.environ.get("ROUNDS", 5))
# Disks that guests write to in mixes.
BUSY = 3


class Qmp:
    def __init__(self, path):
        for _ in range(1000):
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect(path)
                break
            except OSError:
                time.sleep(0.01)
        self.reader = self.socket.makefile("r")
        self.reader.readline()
        self.run("qmp_capabilities")

    def run(self, command, **arguments):
        message = {"execute": command, "arguments": arguments}
        self.socket.sendall(json.dumps(message).encode())
        while True:
            answer = json.loads(self.reader.readline())
            if "event" not in answer:
                break
        if "error" in answer:
            raise RuntimeError(f"{command}: {answer}")
        return answer["return"]


def measure(daemon, folder, disks, journaled):
    state = ["--state-dir", "state"] if journaled else []
    log = open(os.path.join(folder, "log"), "w+")
    process = subprocess.Popen(
        [daemon, "--qmp", "unix:qmp.sock", *state],
        cwd=folder,
        stderr=log,
        env={**os.environ, "RUST_LOG": "warn,qblockd::transaction=info"},
    )
    qmp = Qmp(os.path.join(folder, "qmp.sock"))
    for disk in range(disks):
        file = {"driver": "file", "filename": f"{disk}.qcow2"}
        qmp.run("blockdev-add", **{"driver": "qcow2", "node-name": f"d{disk}", "file": file})
    took = []
    for number in range(ROUNDS):
        kind = "blockdev-snapshot-internal-sync"
        actions = [{"type": kind, "data": {"device": f"d{disk}", "name": f"s{number}"}} for disk in range(disks)]
        begin = time.monotonic()
        qmp.run("transaction", actions=actions)
        took.append(time.monotonic() - begin)
    qmp.run("quit")
    process.wait()
    log.seek(0)
    if os.environ.get("PARTS"):
        print(log.read(), file=sys.stderr)
        log.seek(0)
    return waited(log.read()), [second * 1000 for second in took]


def snapshot(disk, number):
    return {"type": "blockdev-snapshot-internal-sync", "data": {"device": f"d{disk}", "name": f"s{number}"}}


def revert(disk, number):
    return {"type": "x-blockdev-snapshot-revert", "data": {"device": f"d{disk}", "name": "r"}}


def overlay(disk, number):
    file = f"{disk}-{number}.overlay.qcow2"
    return {"type": "blockdev-snapshot-sync", "data": {"device": f"d{disk}", "snapshot-file": file}}


def backup(disk, number):
    data = {"device": f"d{disk}", "target": f"t{disk}", "sync": "full", "speed": 1 << 20, "job-id": f"j{disk}"}
    return {"type": "blockdev-backup", "data": data}


# What happens to which disk: to the first, the second, ..., and from the beginning again.
MIXES = {
    "nothing": [],
    "snapshots": [[snapshot]],
    "overlays": [[overlay]],
    "backups": [[backup]],
    "reverts": [[revert]],
    "overlays, backups": [[overlay], [backup]],
    "snapshots, backups": [[snapshot, backup]],
    "snapshots, overlays": [[snapshot], [overlay]],
    "snapshots and overlays of the same disks": [[snapshot, overlay]],
    "all but reverts": [[snapshot], [overlay], [backup]],
    "one revert, snapshots": [[revert]] + [[snapshot]] * 9999,
    "one revert, overlays, backups": [[revert]] + [[overlay], [backup]] * 9999,
    "dry run, all but reverts": [[snapshot], [overlay], [backup]],
    "dry run, reverts": [[revert]],
}


def waited(log):
    """The times in ms that the daemon says."""
    units = {"s": 1000.0, "ms": 1.0, "µs": 0.001}
    return [float(n) * units[u] for n, u in re.findall(r"guests waited ([0-9.]+)(s|ms|µs)", log)]


@contextlib.contextmanager
def writing(command):
    """A guest that writes until it is stopped, and not less."""
    fio = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
        if fio.poll() is not None:
            raise RuntimeError("fio has ended")
    finally:
        fio.terminate()
        fio.wait()


@contextlib.contextmanager
def mixed_daemon(daemon, folder, disks, log):
    """The disks as drives, the busy ones exported and written to; yields QMP and what measures."""
    drives = [text for disk in range(disks) for text in ("--drive", f"id=d{disk},file={disk}.qcow2,format=qcow2")]
    process = subprocess.Popen(
        [daemon, "--qmp", "unix:qmp.sock", "--state-dir", "state", "--nbd-server", "addr.type=unix,addr.path=nbd.sock", *drives],
        cwd=folder, stderr=log, env={**os.environ, "RUST_LOG": "warn,qblockd::transaction=info"},
    )
    try:
        qmp = Qmp(os.path.join(folder, "qmp.sock"))
        nbd = os.path.join(folder, "nbd.sock")
        load = ["--rw=randwrite", "--bs=64k", "--iodepth=16", "--size=1g", "--time_based", "--runtime=3600", "--fsync=256"]
        with contextlib.ExitStack() as guests:
            probes = []
            for disk in range(min(BUSY, disks)):
                uri = f"nbd+unix:///d{disk}?socket={nbd}"
                probes.append(guests.enter_context(Probe(uri)))
                guests.enter_context(writing(["fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", *load]))
            yield qmp, probes
        qmp.run("quit")
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()


def end_jobs(qmp):
    """Cancels the jobs that have not ended by themselves, and waits for all."""
    while jobs := qmp.run("query-jobs"):
        for job in jobs:
            with contextlib.suppress(RuntimeError):
                qmp.run("job-cancel", id=job["id"])
        time.sleep(0.01)


def measure_mix(daemon, folder, disks, mix):
    longest, took = [], []
    acts = MIXES[mix]
    with open(os.path.join(folder, "log"), "w+") as log:
        with mixed_daemon(daemon, folder, disks, log) as (qmp, probes):
            if any(revert in of_disk for of_disk in acts):
                qmp.run("transaction", actions=[
                    {"type": "blockdev-snapshot-internal-sync", "data": {"device": f"d{disk}", "name": "r"}} for disk in range(disks)
                ])
            time.sleep(1)
            for number in range(ROUNDS):
                acts_of = lambda disk: acts[disk % len(acts)] if acts else []
                actions = [act(disk, number) for disk in range(disks) for act in acts_of(disk)]
                copied = [disk for disk in range(disks) if backup in acts_of(disk)]
                for disk in copied:
                    qmp.run("blockdev-add", **{"driver": "null-co", "node-name": f"t{disk}", "size": size_of(disk), "read-zeroes": False})
                begun = len(waited(open(log.name).read()))
                for probe in probes:
                    probe.longest = 0.0
                begin = time.monotonic()
                if actions:
                    qmp.run("transaction", actions=actions, **({"x-dry-run": True} if "dry run" in mix else {}))
                else:
                    time.sleep(0.3)
                took.append((time.monotonic() - begin) * 1000)
                # A write that began in the transaction may end behind it.
                time.sleep(0.1)
                longest.append(max(probe.longest for probe in probes) * 1000)
                end_jobs(qmp)
                for disk in copied:
                    qmp.run("blockdev-del", **{"node-name": f"t{disk}"})
                time.sleep(0.3)
        log.seek(0)
        text = log.read()
    if os.environ.get("PARTS"):
        print(text, file=sys.stderr)
    return waited(text)[-ROUNDS:], longest, took


def size_of(disk):
    return 1 << 30 if disk < BUSY else 1 << 20


def mixes(daemon, root, counts):
    show = lambda figures: f"{statistics.median(figures):.1f} ({max(figures):.1f})" if figures else "-"
    print("| disks | mix | guests waited by the log, ms: median (worst) | longest write | command |")
    print("|---|---|---|---|---|")
    chosen = os.environ.get("MIXES")
    for disks in counts:
        for mix in MIXES:
            if chosen and mix not in chosen.split("+"):
                continue
            folder = tempfile.mkdtemp(dir=root)
            try:
                for disk in range(disks):
                    image = os.path.join(folder, f"{disk}.qcow2")
                    if disk <= BUSY:
                        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(size_of(disk))], check=True)
                        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 256k", image], check=True, stdout=subprocess.DEVNULL)
                    else:
                        shutil.copy(os.path.join(folder, f"{BUSY}.qcow2"), image)
                held, longest, took = measure_mix(daemon, folder, disks, mix)
                print(f"| {disks} | {mix} | {show(held)} | {show(longest)} | {show(took)} |", flush=True)
            finally:
                shutil.rmtree(folder)


def main():
    if sys.argv[1] == "--mixes":
        counts = [int(text) for text in sys.argv[4:]] or [3, 100]
        mixes(os.path.abspath(sys.argv[2]), sys.argv[3], counts)
        return
    daemon, root = os.path.abspath(sys.argv[1]), sys.argv[2]
    print("| disks | journal | guests waited, median (worst) | command, median |")
    print("|---|---|---|---|")
    for disks in [int(text) for text in sys.argv[3:]] or [1, 3, 100, 1000]:
        for journaled in [False, True]:
            folder = tempfile.mkdtemp(dir=root)
            try:
                first = os.path.join(folder, "0.qcow2")
                subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", first, "1M"], check=True)
                subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 256k", first], check=True, stdout=subprocess.DEVNULL)
                for disk in range(1, disks):
                    shutil.copy(first, os.path.join(folder, f"{disk}.qcow2"))
                os.sync()
                held, took = measure(daemon, folder, disks, journaled)
                name = "yes" if journaled else "no"
                print(
                    f"| {disks} | {name} | {statistics.median(held):.1f} ms ({max(held):.1f} ms) "
                    f"| {statistics.median(took):.0f} ms |",
                    flush=True,
                )
            finally:
                shutil.rmtree(folder)


main()
