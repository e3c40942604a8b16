#!/usr/bin/env python3
"""How long commands hold guests, while a guest writes as fast as it can.

    cargo build --release && benches/stalls.py [--seconds 2] [--rounds 5] [--size 4G] [--directory FOLDER] [VERB...]

fio writes to a qcow2 disk over NBD, 16 requests at once, with a flush now and then, while commands are run and one more client
writes 4 KiB again and again: the longest of its writes around each command is what the table shows, in ms. "nothing" is a time
without any command: what the disk and the file system do to a guest by themselves. Both daemons get the same; what only qblockd has is
left out for QSD. Needs qemu-utils and fio.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time

from compare import PROGRAMS, Probe, create, daemon

LOADS = {"1 MiB writes": ["--rw=write", "--bs=1m"], "4 KiB random writes": ["--rw=randwrite", "--bs=4k"]}


@contextlib.contextmanager
def load(uri, options, size):
    """A guest that writes until it is stopped."""
    fio = subprocess.Popen(
        ["fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", *options, "--iodepth=16", f"--size={size}",
         "--time_based", "--runtime=3600", "--fsync=256", "--randrepeat=0"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        fio.terminate()
        fio.wait()


class Verbs:
    """The commands. Each leaves the disk so that it can be run again."""

    def __init__(self, qmp, image):
        self.qmp, self.image, self.overlays = qmp, image, 0

    def nothing(self):
        time.sleep(0.3)
        yield "nothing"

    def snapshot(self):
        name = {"device": "disk", "name": "s"}
        self.qmp.run("blockdev-snapshot-internal-sync", **name)
        yield "blockdev-snapshot-internal-sync"
        self.qmp.run("blockdev-snapshot-delete-internal-sync", **name)
        yield "blockdev-snapshot-delete-internal-sync"

    def revert(self):
        name = {"device": "disk", "name": "r"}
        self.qmp.run("blockdev-snapshot-internal-sync", **name)
        yield None
        self.qmp.run("x-blockdev-snapshot-revert", **name)
        yield "x-blockdev-snapshot-revert"
        self.qmp.run("blockdev-snapshot-delete-internal-sync", **name)
        yield None

    def backup(self):
        target = {"driver": "null-co", "node-name": "target", "size": self.size(), "read-zeroes": False}
        self.qmp.run("blockdev-add", **target)
        yield None
        self.qmp.run("blockdev-backup", device="disk", target="target", sync="full", job_id="job", speed=1 << 20)
        yield "blockdev-backup begins"
        self.qmp.run("job-cancel", id="job")
        while self.qmp.run("query-jobs"):
            time.sleep(0.005)
        yield "blockdev-backup ends"
        self.qmp.run("blockdev-del", node_name="target")

    def reopen(self):
        for zeroes in ("on", "off"):
            self.qmp.run("blockdev-reopen", options=[
                {"driver": "qcow2", "node-name": "disk", "file": "file", "detect-zeroes": zeroes},
            ])
            yield "blockdev-reopen"

    def resize(self):
        self.qmp.run("block_resize", node_name="disk", size=self.size() + (1 << 20))
        yield "block_resize"

    def overlay(self):
        """Last: it stays."""
        self.overlays += 1
        name = f"overlay{self.overlays}"
        path = f"{self.image}.{name}"
        create(path, str(self.size()))
        file = {"driver": "file", "filename": path}
        self.qmp.run("blockdev-add", **{"driver": "qcow2", "node-name": name, "backing": None, "file": file})
        yield None
        self.qmp.run("blockdev-snapshot", node="disk", overlay=name)
        yield "blockdev-snapshot"

    def size(self):
        nodes = {node["node-name"]: node for node in self.qmp.run("query-named-block-nodes", flat=True)}
        return nodes["disk"]["image"]["virtual-size"]


VERBS = ["nothing", "snapshot", "revert", "backup", "reopen", "resize", "overlay"]


def measure(args, program, options, directory):
    """The longest write around each command, by what it is."""
    image, longest = os.path.join(directory, "stalls.qcow2"), {}
    create(image, args.size)
    with daemon(program, image, directory) as (qmp, uri, _), Probe(uri) as probe, load(uri, options, args.size):
        time.sleep(args.seconds)
        verbs = Verbs(qmp, image)
        for verb in args.verbs or VERBS:
            for _ in range(1 if verb == "overlay" else args.rounds):
                probe.longest = 0.0
                try:
                    for name in getattr(verbs, verb)():
                        # A write that began in the command may end behind it.
                        time.sleep(0.05)
                        if name:
                            longest.setdefault(name, []).append(probe.longest * 1000)
                        probe.longest = 0.0
                except RuntimeError as error:
                    print(f"{program}: {error}", file=sys.stderr)
                    break
    for file in os.listdir(directory):
        if file.startswith("stalls.qcow2"):
            os.unlink(os.path.join(directory, file))
    return longest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verbs", nargs="*", choices=[*VERBS, []])
    parser.add_argument("--directory", help="where images are made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="how long the guest writes first")
    parser.add_argument("--size", default="4G")
    parser.add_argument("--qblockd", help="another build of it")
    args = parser.parse_args()
    if args.qblockd:
        PROGRAMS["qblockd"] = args.qblockd
    print(f"{os.cpu_count()} cores; {args.rounds} rounds; the longest 4 KiB write around each command, ms: median (worst)")
    for title, options in LOADS.items():
        figures = {}
        for program in PROGRAMS:
            with tempfile.TemporaryDirectory(dir=args.directory) as directory:
                figures[program] = measure(args, program, options, directory)
        print(f"\n## Beside {title}\n\n| what | qblockd | QSD |\n|---|---|---|")
        for name in figures["qblockd"]:
            cells = (figures[program].get(name) for program in ("qblockd", "QSD"))
            text = (f"{statistics.median(cell):.1f} ({max(cell):.1f})" if cell else "-" for cell in cells)
            print(f"| {name} | {' | '.join(text)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
