#!/usr/bin/env python3
"""How long guests stand still for a transaction over many disks.

usage: transactions.py QBLOCKD FOLDER [DISKS...]

For each number of disks: that many images of 1 MiB with some data are opened, and transactions take snapshots of all of them, with and
without a state directory. The daemon logs how long guests waited, and for what; PARTS=1 shows that.
"""

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

ROUNDS = 5


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
    units = {"s": 1000.0, "ms": 1.0, "µs": 0.001}
    held = [float(n) * units[u] for n, u in re.findall(r"guests waited ([0-9.]+)(s|ms|µs)", log.read())]
    return held, [second * 1000 for second in took]


def main():
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
