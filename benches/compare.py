#!/usr/bin/env python3
"""Measures qblockd beside qemu-storage-daemon in the same run and prints ratios.

    cargo build --release && benches/compare.py [snapshot] [settle] [nbd] [cow] [qmp] [backup] [slow_target]
        [--sizes 64G,1T] [--rounds 3]

Both daemons get the same command line, the same kind of image and the same requests, in turn (A B A B ...), because
machines drift. Figures are medians; the ratio says how much better qblockd is (above 1: better). Needs qemu-utils and fio.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = {
    "qblockd": os.path.join(ROOT, "target", "release", "qblockd"),
    "QSD": "qemu-storage-daemon",
}
SECTIONS = ["snapshot", "settle", "nbd", "cow", "qmp", "backup", "slow_target"]


class Qmp:
    """A raw QMP client: one request, one reply."""

    def __init__(self, path):
        deadline = time.monotonic() + 10
        while True:
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.reader = self.socket.makefile("rb")
        self.events = []
        self.reader.readline()
        self.run("qmp_capabilities")

    def run(self, command, **arguments):
        request = {"execute": command}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.socket.sendall(json.dumps(request).encode())
        while True:
            reply = json.loads(self.reader.readline())
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise RuntimeError(f"{command}: {reply['error']}")
            self.events.append(reply)

    def wait_for(self, event, wanted):
        """Waits for an event whose data are as wanted, unless it has come already."""
        while not any(seen["event"] == event and wanted(seen["data"]) for seen in self.events):
            self.events.append(json.loads(self.reader.readline()))


@contextlib.contextmanager
def daemon(program, image, directory):
    """Serves `image` over NBD and QMP; yields (Qmp, NBD URI, process id)."""
    qmp, nbd = os.path.join(directory, "qmp.sock"), os.path.join(directory, "nbd.sock")
    process = subprocess.Popen([
        PROGRAMS[program],
        "--chardev", f"socket,id=m,path={qmp},server=on,wait=off", "--monitor", "chardev=m",
        "--blockdev", f"driver=file,filename={image},node-name=file",
        "--blockdev", "driver=qcow2,file=file,node-name=disk",
        "--nbd-server", f"addr.type=unix,addr.path={nbd}",
        "--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on",
    ])
    try:
        client = Qmp(qmp)
        yield client, f"nbd+unix:///disk?socket={nbd}", process.pid
        client.run("quit")
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def table(title, rows, better):
    """Rows of (name, {program: [figures]}); `better` is 'lower' or 'higher'."""
    print(f"\n## {title}\n")
    print("| what | qblockd | QSD | ratio |\n|---|---|---|---|")
    for name, figures in rows:
        ours, theirs = (statistics.median(figures[program]) for program in ("qblockd", "QSD"))
        ratio = theirs / ours if better == "lower" else ours / theirs
        print(f"| {name} | {ours:.6g} | {theirs:.6g} | {ratio:.2f}x |", flush=True)


def create(image, size, *options):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, image, size], check=True)


def bench_snapshot(args, directory):
    rows, alone = [], []
    for size in args.sizes.split(","):
        programs = [name for name in PROGRAMS if name == "qblockd" or size not in args.alone.split(",")]
        figures, stalls = {}, {}
        for _ in range(args.rounds):
            for program in programs:
                image = os.path.join(directory, "snapshot.qcow2")
                create(image, size, "-o", "preallocation=metadata")
                with daemon(program, image, directory) as (qmp, uri, _):
                    times, longest = snapshot_round(program, qmp, uri, image)
                for verb, seconds in times.items():
                    figures.setdefault(verb, {name: [] for name in programs})[program].append(seconds)
                for verb, seconds in longest.items():
                    stalls.setdefault(verb, {name: [] for name in programs})[program].append(seconds)
                os.unlink(image)
        for verb, by_program in figures.items():
            rows_of = rows if all(len(by_program.get(name, [])) for name in PROGRAMS) else alone
            rows_of.append((f"{verb}, {size} fully mapped", by_program))
        for verb, by_program in stalls.items():
            rows_of = rows if all(len(by_program.get(name, [])) for name in PROGRAMS) else alone
            rows_of.append((f"longest 4 KiB write during {verb}, {size}", by_program))
    table("Internal snapshots, seconds", rows, "lower")
    print("\n## What has no peer in QSD, or takes it minutes, seconds\n\n| what | qblockd |\n|---|---|")
    for name, figures in alone:
        print(f"| {name} | {statistics.median(figures['qblockd']):.6g} |", flush=True)


def snapshot_round(program, qmp, uri, image):
    """Creates, deletes, creates, reverts and settles; answers the time and the longest write of each."""
    times, longest = {}, {}

    def step(verb, action):
        probe.longest = 0.0
        start = time.monotonic()
        action()
        times[verb] = time.monotonic() - start
        # A write that began in the command may end behind it.
        time.sleep(0.02)
        longest[verb] = probe.longest

    with Probe(uri) as probe:
        # Probe's first writes find tables that are not in memory yet; those of the commands are looked at.
        time.sleep(0.2)
        name = {"device": "disk", "name": "s"}
        step("create", lambda: qmp.run("blockdev-snapshot-internal-sync", **name))
        if program == "qblockd":
            step("revert, unsettled", lambda: qmp.run("x-blockdev-snapshot-revert", **name))
            step("settling", lambda: wait_settled(qmp))
            step("revert, settled", lambda: qmp.run("x-blockdev-snapshot-revert", **name))
        step("delete", lambda: qmp.run("blockdev-snapshot-delete-internal-sync", **name))
    return times, longest


def unsettled(qmp):
    """L2 tables whose refcounts are still to be written."""
    nodes = qmp.run("query-named-block-nodes")
    return sum(node.get("x-unsettled-tables", 0) for node in nodes)


def wait_settled(qmp):
    while unsettled(qmp):
        time.sleep(0.01)


def bench_settle(args, directory):
    """Latency of guest writes while qblockd brings refcounts up to date.

    Two baselines: writes without a snapshot, in place, and writes behind a snapshot that is settled, which copy what
    the snapshot shares. In 1 GiB most writes copy; in 16 MiB all is copied soon.
    """
    for size in args.settle_sizes.split(","):
        image = os.path.join(directory, "settle.qcow2")
        create(image, size, "-o", "preallocation=metadata")
        with daemon("qblockd", image, directory) as (qmp, uri, pid):
            for region in ("1g", "16m"):
                settle_rounds(args, size, region, (qmp, uri, pid))
        os.unlink(image)


def settle_rounds(args, size, region, server):
    qmp, uri, pid = server
    name = {"device": "disk", "name": "s"}
    states = {"no snapshot": [], "settled snapshot": [], "settling": []}
    left = []
    histogram(uri, region)
    for _ in range(2 * args.rounds):
        states["no snapshot"].append(histogram(uri, region))
        qmp.run("blockdev-snapshot-internal-sync", **name)
        wait_settled(qmp)
        states["settled snapshot"].append(histogram(uri, region))
        qmp.run("blockdev-snapshot-delete-internal-sync", **name)
        wait_settled(qmp)
        # Settling gives way only to a guest that is busy: the snapshot comes when requests have begun.
        states["settling"].append(histogram(uri, region, pid, lambda: qmp.run("blockdev-snapshot-internal-sync", **name)))
        left.append(unsettled(qmp))
        wait_settled(qmp)
        qmp.run("blockdev-snapshot-delete-internal-sync", **name)
        wait_settled(qmp)
    print(f"\n## 4k randwrite, depth 1, to {region} of {size} fully mapped, us; {min(left)} tables unsettled at the end\n")
    print("| | p50 | p99 | p99.9 | longest |\n|---|---|---|---|---|")
    for state, rounds in states.items():
        figures = [[percentile(bins, share) for bins in rounds] for share in (0.5, 0.99, 0.999, 1)]
        print(f"| {state} | " + " | ".join(f"{statistics.median(figure):.4g}" for figure in figures) + " |")
    for state in ("no snapshot", "settled snapshot"):
        pairs = zip(states["settling"], states[state])
        ratio = statistics.median(percentile(busy, 0.99) / percentile(idle, 0.99) for busy, idle in pairs)
        print(f"\np99 while settling beside {state}: {ratio:.2f}x", flush=True)


def histogram(uri, region, pid=None, action=None):
    """A second of 4 KiB writes: how many took how many ns. `action` is done when the writes that count begin."""
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=1",
        "--time_based", "--runtime=1", f"--size={region}", "--randrepeat=0", "--output-format=json+",
    ]
    before = cpu_seconds(pid) if action else None
    process = subprocess.Popen(command + (["--ramp_time=1"] if action else []), stdout=subprocess.PIPE, text=True)
    if action:
        while cpu_seconds(pid) < before + 0.06:
            time.sleep(0.01)
        time.sleep(0.93)
        action()
    text = process.communicate()[0]
    bins = json.loads(text[text.index("{"):])["jobs"][0]["write"]["clat_ns"]["bins"]
    return {int(time): count for time, count in bins.items()}


def percentile(bins, share):
    """The time in us that so many of the requests took at most."""
    wanted, seen = share * sum(bins.values()), 0
    for nanoseconds in sorted(bins):
        seen += bins[nanoseconds]
        if seen >= wanted:
            break
    return nanoseconds / 1000


class Probe:
    """Writes 4 KiB over NBD again and again, each time to another place, and keeps the longest time it took."""

    def __init__(self, uri):
        name, self.path = re.fullmatch(r"nbd\+unix:///(.*)\?socket=(.*)", uri).groups()
        self.name, self.longest, self.stop = name.encode(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self.loop)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()

    def loop(self):
        with socket.socket(socket.AF_UNIX) as nbd:
            nbd.connect(self.path)
            take = lambda length: nbd.recv(length, socket.MSG_WAITALL)
            take(18)
            # Fixed newstyle without zeroes, then the plain option: no reply but size and flags.
            nbd.sendall((3).to_bytes(4, "big"))
            nbd.sendall(b"IHAVEOPT" + (1).to_bytes(4, "big") + len(self.name).to_bytes(4, "big") + self.name)
            size = int.from_bytes(take(10)[:8], "big")
            head = (0x25609513).to_bytes(4, "big")
            at = 0
            while not self.stop.is_set():
                # A stride that no table divides, so that the writes meet many L2 tables.
                at = (at + 77_777 * 4096) % (size - 4096)
                start = time.monotonic()
                write = (1).to_bytes(4, "big") + bytes(8) + at.to_bytes(8, "big") + (4096).to_bytes(4, "big")
                nbd.sendall(head + write + bytes(4096))
                take(16)
                self.longest = max(self.longest, time.monotonic() - start)
                time.sleep(0.001)
            nbd.sendall(head + bytes(2) + (2).to_bytes(2, "big") + bytes(20))


def cpu_seconds(pid):
    """What the process has used so far, in user and kernel mode."""
    with open(f"/proc/{pid}/stat") as stat:
        user, system = stat.read().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def fio(uri, pid, mode, depth, seconds):
    """4 KiB requests: operations per second, the 99th percentile and the server's processor time of one, both in us."""
    before = cpu_seconds(pid)
    done = subprocess.run([
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={mode}", "--bs=4k", f"--iodepth={depth}",
        "--time_based", f"--runtime={seconds}", "--size=1g", "--randrepeat=1", "--output-format=json",
    ], check=True, capture_output=True, text=True)
    used = cpu_seconds(pid) - before
    text = done.stdout
    job = json.loads(text[text.index("{"):])["jobs"][0]["read" if "read" in mode else "write"]
    return job["iops"], job["clat_ns"]["percentile"]["99.000000"] / 1000, used * 1e6 / job["total_ios"]


def write_out(image):
    """Writes the image back: that of what came before would otherwise meet the first figures."""
    with open(image) as file:
        os.fsync(file)


def bench_nbd(args, directory):
    cases = [(mode, depth, True) for mode in ("randread", "randwrite") for depth in (1, 32)]
    cases += [("randwrite", depth, False) for depth in (1, 32)]
    tables = {"operations per second": [], "99th percentile, us": [], "processor time of the server, us per operation": []}
    full = os.path.join(directory, "full.qcow2")
    create(full, "1G")
    # One image for both, filled cluster by cluster: what a write costs in the kernel depends on the size of the pages
    # that the file has in the page cache, which comes from how it was filled.
    subprocess.run([
        "qemu-img", "bench", "-w", "-f", "qcow2", "-t", "writeback", "--pattern", "7",
        "-s", "64k", "-S", "64k", "-c", "16384", full,
    ], check=True, stdout=subprocess.DEVNULL)
    for mode, depth, filled in cases:
        figures = {title: {program: [] for program in PROGRAMS} for title in tables}
        for _ in range(args.rounds):
            for program in PROGRAMS:
                image = full if filled else os.path.join(directory, "empty.qcow2")
                if not filled:
                    create(image, "1G")
                write_out(image)
                with daemon(program, image, directory) as (_, uri, pid):
                    measured = fio(uri, pid, mode, depth, args.seconds)
                for title, figure in zip(tables, measured):
                    figures[title][program].append(figure)
        for title, rows in tables.items():
            rows.append((f"4k {mode}, depth {depth}{'' if filled else ', allocating'}", figures[title]))
    for title, rows in tables.items():
        table(f"NBD, {title}", rows, "higher" if "operations per second" in title else "lower")


def bytes_written(pid):
    """What the process has given to write calls so far."""
    with open(f"/proc/{pid}/io") as io:
        return next(int(line.split()[1]) for line in io if line.startswith("wchar:"))


def bench_cow(args, directory):
    """Small random writes over a backing file that is full: what copy on write costs, with subclusters and without."""
    requests = 10000
    base = os.path.join(directory, "base.raw")
    with open(base, "wb") as file:
        for _ in range(1024):
            file.write(os.urandom(4096) * 256)
    cases = [
        ("clusters of 64 KiB", "cluster_size=64k"),
        ("clusters of 64 KiB, extended L2 entries", "cluster_size=64k,extended_l2=on"),
        ("clusters of 128 KiB, extended L2 entries", "cluster_size=128k,extended_l2=on"),
    ]
    tables = {"seconds": [], "MiB written by the server": [], "MiB of the image": []}
    for name, options in cases:
        figures = {title: {program: [] for program in PROGRAMS} for title in tables}
        for _ in range(args.rounds):
            for program in PROGRAMS:
                image = os.path.join(directory, "over.qcow2")
                create(image, "1G", "-b", base, "-F", "raw", "-o", options)
                with daemon(program, image, directory) as (_, uri, pid):
                    before, start = bytes_written(pid), time.monotonic()
                    subprocess.run([
                        "fio", "--name=cow", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=16",
                        "--size=1g", f"--io_size={requests * 4096}", "--randrepeat=1", "--end_fsync=1",
                    ], check=True, stdout=subprocess.DEVNULL)
                    seconds, written = time.monotonic() - start, bytes_written(pid) - before
                allocated = os.stat(image).st_blocks * 512
                for title, figure in zip(tables, (seconds, written / 2**20, allocated / 2**20)):
                    figures[title][program].append(figure)
                os.unlink(image)
        for title, rows in tables.items():
            rows.append((f"{requests} writes of 4 KiB, {name}", figures[title]))
    os.unlink(base)
    for title, rows in tables.items():
        table(f"Copy on write over a full backing file, {title}", rows, "lower")


def bench_qmp(args, directory):
    figures = {program: [] for program in PROGRAMS}
    for _ in range(args.rounds):
        for program in PROGRAMS:
            image = os.path.join(directory, "qmp.qcow2")
            create(image, "1G")
            with daemon(program, image, directory) as (qmp, _, _):
                count, start = 5000, time.monotonic()
                for _ in range(count):
                    qmp.run("query-version")
                figures[program].append(count / (time.monotonic() - start))
            os.unlink(image)
    table("QMP, commands per second", [("query-version, one client", figures)], "higher")


def copied_with(program, image, to, durable):
    """Seconds that blockdev-backup takes until its job is concluded, `to` being (format, target).

    The job of qblockd makes the target durable, unless that is told not to flush; that of QSD does not.
    """
    target_format, target = to
    with daemon(program, image, os.path.dirname(target)) as (qmp, _, _):
        subprocess.run(["qemu-img", "create", "-q", "-f", target_format, target, "4G"], check=True)
        cache = {"no-flush": not durable}
        qmp.run("blockdev-add", **{
            "driver": target_format, "node-name": "target", "cache": cache,
            "file": {"driver": "file", "filename": target, "cache": cache},
        })
        qmp.events.clear()
        start = time.monotonic()
        qmp.run("blockdev-backup", device="disk", target="target", sync="full", job_id="job", auto_dismiss=False)
        qmp.wait_for("JOB_STATUS_CHANGE", lambda data: data["status"] == "concluded")
        if durable and program == "QSD":
            write_out(target)
        seconds = time.monotonic() - start
        job = qmp.run("query-jobs")[0]
        if "error" in job:
            raise RuntimeError(job["error"])
        qmp.run("job-dismiss", id="job")
        return seconds


def copied_by(command, image, target, durable):
    """Seconds that a program takes, with the writing back of the target if that is wanted."""
    start = time.monotonic()
    subprocess.run([*command, image, target], check=True, stdout=subprocess.DEVNULL)
    if durable:
        write_out(target)
    return time.monotonic() - start


def backup_source(image, piece):
    """A disk of 4 GiB with noise at the beginning of each MiB of its first half."""
    raw = image + ".raw"
    with open(raw, "wb") as file:
        file.truncate(4 << 30)
        for index in range(2048):
            file.seek(index << 20)
            file.write(os.urandom(piece))
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, image], check=True)
    os.unlink(raw)
    write_out(image)


def read_in(image):
    """Has all of an image in the page cache."""
    with open(image, "rb") as file:
        while file.read(1 << 20):
            pass


def bench_backup(args, directory):
    """2 GiB of noise in a disk of 4 GiB, and a sparse disk, copied by a job and by programs that need the disk alone.

    Done against done, where nobody has made anything durable, and durable against durable. The source is in the page cache, the target
    is new. One after another, again and again.
    """
    source, target = os.path.join(directory, "source.qcow2"), os.path.join(directory, "target")
    for content, piece in (("2 GiB of noise", 1 << 20), ("64 KiB of noise in each of 2048 MiB", 64 << 10)):
        backup_source(source, piece)
        for durable in (False, True):
            ways = {"cp": lambda: copied_by(["cp"], source, target, durable)}
            for to in ("qcow2", "raw"):
                convert = ["qemu-img", "convert", "-O", to]
                ways[f"qemu-img convert to {to}"] = lambda c=convert: copied_by(c, source, target, durable)
                for program in PROGRAMS:
                    ways[f"{program} to {to}"] = lambda p=program, t=(to, target): copied_with(p, source, t, durable)
            figures = {name: [] for name in ways}
            for _ in range(args.rounds):
                for name, way in ways.items():
                    read_in(source)
                    figures[name].append(way())
                    os.unlink(target)
            title = "durable" if durable else "done, not durable"
            print(f"\n## Copies, {content}: {title}, seconds (median, shortest)\n")
            backup_table(figures)
        os.unlink(source)


def backup_table(figures):
    others = ("QSD to {}", "cp", "qemu-img convert to {}")
    titles = [name.format("the same") for name in others]
    print("| to | qblockd | " + " | ".join(titles) + " | QSD / qblockd | qblockd / cp |\n|" + "---|" * 7)
    for to in ("qcow2", "raw"):
        columns = [figures[name.format(to)] for name in ("qblockd to {}", *others)]
        medians = [statistics.median(column) for column in columns]
        cells = [f"{median:.3f}, {min(column):.3f}" for median, column in zip(medians, columns)]
        ours, qsd, cp = medians[:3]
        print(f"| {to} | " + " | ".join(cells) + f" | {qsd / ours:.2f}x | {ours / cp:.2f}x |", flush=True)


def bench_slow_target(args, directory):
    """A guest's 4 KiB writes while its disk is copied to a target that takes 100 ms for each request."""
    for depth in (1, 16):
        tables = {"operations per second": [], "99th percentile, us": []}
        for copying in (False, True):
            figures = {title: {program: [] for program in PROGRAMS} for title in tables}
            for _ in range(args.rounds):
                for program in PROGRAMS:
                    image = os.path.join(directory, "slow.qcow2")
                    create(image, "1G")
                    subprocess.run([
                        "qemu-img", "bench", "-w", "-f", "qcow2", "-t", "writeback", "--pattern", "7",
                        "-s", "64k", "-S", "64k", "-c", "16384", image,
                    ], check=True, stdout=subprocess.DEVNULL)
                    write_out(image)
                    with daemon(program, image, directory) as (qmp, uri, pid):
                        if copying:
                            qmp.run("blockdev-add", **{
                                "driver": "null-co", "node-name": "target", "size": 1 << 30,
                                "latency-ns": 100_000_000, "read-zeroes": False,
                            })
                            # Slow enough to last, so that guests meet what has not been copied.
                            backup = {"device": "disk", "target": "target", "sync": "full", "speed": 1 << 20}
                            qmp.run("blockdev-backup", job_id="job", **backup)
                        measured = fio(uri, pid, "randwrite", depth, args.seconds)
                        if copying:
                            with contextlib.suppress(RuntimeError):
                                qmp.run("block-job-cancel", device="job", force=True)
                    for title, figure in zip(tables, measured):
                        figures[title][program].append(figure)
                    os.unlink(image)
            for title, rows in tables.items():
                rows.append(("beside a backup" if copying else "alone", figures[title]))
        for title, rows in tables.items():
            better = "higher" if "operations" in title else "lower"
            table(f"4k randwrite, depth {depth}, {title}", rows, better)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--sizes", default="1G,64G,1T")
    parser.add_argument("--alone", default="16T", help="sizes at which only qblockd is measured")
    parser.add_argument("--settle-sizes", default="1T")
    parser.add_argument("--directory", help="where images are made; 16T needs a file system with files of that size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    args = parser.parse_args()
    sections = args.sections or SECTIONS
    version = subprocess.run([PROGRAMS["QSD"], "--version"], check=True, capture_output=True, text=True).stdout
    print(f"{os.cpu_count()} cores; {version.splitlines()[0]}; {args.rounds} rounds, medians")
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        for section in sections:
            globals()[f"bench_{section}"](args, directory)


if __name__ == "__main__":
    sys.exit(main())
