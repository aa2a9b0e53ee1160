"""Proves the link on a lab that is up: link_probe.py in dom0 and guests, and libxenvchan at either end.

`python -m tests.xen.link_run PV_GUEST PVH_GUEST [--victim NAME] [--unpack]`: the guests are there. The packages are
installed, or `--unpack` puts this tree's code beside them. A victim is a PV guest that is saved, restored and
destroyed; it is created if it is not there. Writes the figures as JSON to standard output; the exit code is 0 when
all is well.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from .channel import PATIENCE, ChannelError, Machine, Running
from .images import FOLDER, ROOT, update_lists
from .lab import Lab

HERE: Final = Path(__file__).resolve().parent
PEER: Final = FOLDER / "vchan_peer"
UNPACKED: Final = "/run/link"
MEGABYTES: Final = 8
TRIPS: Final = 100
STREAM_BYTES: Final = 4 << 20
PROMPT_S: Final = 5.0
"""So soon the other end of a process that was killed has to know. The lab is slow: on hardware it is at once."""
LINE_S: Final = 90.0

Hear = Callable[[str], None]


class Probe:
    """A link_probe.py that runs in a machine; its words, line by line."""

    def __init__(self, machine: Machine, path: str, words: Sequence[str], hear: Hear) -> None:
        self.machine, self._hear = machine, hear
        command = ["env", f"PYTHONPATH={path}", "python3", "/run/link_probe.py", *words]
        self.running: Running = machine.start(*command, limit=1200)

    def next(self, *expected: str, timeout: float = LINE_S) -> dict[str, Any]:
        """Return its next line. AssertionError unless it is one of the expected kinds."""
        line = self.running.read_line(timeout)
        self._hear(f"{self.machine.name}: {line}")
        said: dict[str, Any] = json.loads(line)
        assert said["what"] in expected, f"{self.machine.name} said {line}, not {' or '.join(expected)}"
        return said

    def kill(self) -> float:
        """Kill it with signal 9, and return the moment."""
        at = time.monotonic()
        self.running.signal(9)
        return at

    def close(self) -> None:
        """Kill it if it still runs."""
        self.running.close()


# ------------------------------------------------------------------------------------------------------ preparation


def build_peer(say: Hear) -> Path:
    """Compile vchan_peer.c, which has libxenvchan inside."""
    if not Path("/usr/include/libxenvchan.h").exists():
        say("installing from Debian: libxen-dev")
        update_lists(say)
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", "libxen-dev"], check=True)
    PEER.parent.mkdir(parents=True, exist_ok=True)
    libraries = ("xenvchan", "xengnttab", "xenevtchn", "xenstore", "xentoolcore", "xentoollog", "pthread")
    words = ["gcc", "-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(PEER)]
    subprocess.run(
        [*words, str(HERE / "vchan_peer.c"), *(f"-l{library}" for library in libraries)],
        check=True,
    )
    return PEER


def unpack(machine: Machine, package: str) -> str:
    """Put this tree's code of a package into a machine; return the folder for PYTHONPATH."""
    folder = ROOT / ("sharearea" if package == "sharearea" else "guest-agent/sharearea_agent")
    extension = Path(sysconfig.get_path("platlib")) / package / "_native.abi3.so"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", dereference=True) as tar:
        tar.add(folder, package, filter=lambda info: None if "__pycache__" in info.name else info)
        tar.add(extension, f"{package}/_native.abi3.so")
    machine.run(f"rm -rf {UNPACKED} && mkdir -p {UNPACKED} && tar -C {UNPACKED} -xz", data=content.getvalue())
    return UNPACKED


# ---------------------------------------------------------------------------------------------------------- the run


class LinkRun:
    """The steps of the proof, in the order in which run() takes them."""

    def __init__(self, lab: Lab, pv: str, pvh: str, path: str = "", hear: Hear = lambda _: None) -> None:
        self.lab, self.pv, self.pvh, self.path, self.hear = lab, pv, pvh, path, hear
        self.figures: dict[str, Any] = {}
        self._probes: list[Probe] = []

    def run(self, victim: str = "", only: str = "") -> dict[str, Any]:
        """Take all steps, or one; return the figures.

        Raises ChannelError or AssertionError if something is not as promised.
        """
        both = (self.pv, self.pvh)
        try:
            for machine in (self.lab.dom0, *(self.lab.guest(name) for name in both)):
                self.equip(machine)
            for step in ("links", "strangers", "rights", "flood", "life"):
                if only not in ("", step):
                    continue
                if step in ("links", "strangers"):
                    for name in dict.fromkeys(both):
                        getattr(self, step)(name)
                elif step == "rights":
                    self.rights(self.pv)
                elif step == "flood":
                    self.flood(*both)
                elif victim:
                    self.life(victim)
        finally:
            for probe in self._probes:
                probe.close()
        return self.figures

    def equip(self, machine: Machine) -> None:
        """Put the programs of both ends into a machine."""
        machine.put("/run/link_probe.py", HERE / "link_probe.py")
        machine.put("/run/vchan_peer", PEER, mode=0o755)

    def _probe(self, machine: Machine, *words: str) -> Probe:
        probe = Probe(machine, self.path, words, self.hear)
        self._probes.append(probe)
        return probe

    def _agent(self, name: str) -> Probe:
        agent = self._probe(self.lab.guest(name), "agent")
        agent.next("published")
        return agent

    def _broker(self, megabytes: int = 1, trips: int = 5) -> Probe:
        broker = self._probe(self.lab.dom0, "broker", str(megabytes), str(trips))
        broker.next("listening")
        return broker

    def _exchange(self, broker: Probe, agent: Probe | None, name: str, kind: str = "") -> None:
        """Round trips, bytes there, bytes back: all of them the right ones."""
        arrived = broker.next("arrived")
        assert arrived["name"] == name, arrived
        assert re.fullmatch(r"[0-9a-f-]{36}", arrived["uuid"]), arrived
        assert arrived["target"] > 0, arrived
        trips = broker.next("trips")
        grants = broker.next("grants")
        data = broker.next("data")
        assert data["bad"] == 0, data
        if agent is not None:
            agent.next("accepted")
            said = agent.next("granted")
            assert (said["size"], said["hash"]) == (grants["size"], grants["hash"])
        if kind:
            self.figures[f"{kind}_round_trip_ms"] = round(trips["seconds"] / trips["trips"] * 1000, 2)
            self.figures[f"{kind}_frames_to_guest_mb_s"] = _rate(grants["size"], grants["seconds"])
            self.figures[f"{kind}_frames_from_guest_mb_s"] = _rate(data["size"], data["seconds"])

    def _prompt(self, what: str, killed: float, probe: Probe, *expected: str) -> None:
        probe.next(*expected, timeout=PROMPT_S * 4)
        seconds = time.monotonic() - killed
        self.figures[what] = max(round(seconds, 2), self.figures.get(what, 0))
        assert seconds < PROMPT_S * PATIENCE, f"{what}: {seconds:.1f} s"

    def links(self, name: str) -> None:
        """Connect, exchange, kill each end in turn, and find one another again."""
        broker = self._broker(MEGABYTES, TRIPS)
        agent = self._agent(name)
        self._exchange(broker, agent, name, self.lab.guests[name].kind)
        # The agent is killed: its broker knows, and finds the next one by the watch.
        self._prompt("agent_killed_s", agent.kill(), broker, "closed")
        agent.close()
        agent = self._agent(name)
        self._exchange(broker, agent, name)
        # The broker is killed: the agent knows, and offers rings that the next broker finds as it starts.
        self._prompt("broker_killed_s", broker.kill(), agent, "closed")
        broker.close()
        agent.next("published")
        broker = self._broker()
        self._exchange(broker, agent, name)
        # The broker ends as it should.
        broker.running.end_input()
        broker.next("turns")
        agent.next("closed")
        agent.next("published")
        # Killed, too, before anybody connected: the node is there, and leads nowhere.
        agent.kill()
        agent.close()
        broker = self._broker()
        broker.next("unreachable")
        agent = self._agent(name)
        self._exchange(broker, agent, name)
        broker.close()
        agent.close()

    def strangers(self, name: str, labels: Sequence[str] = (), stream_bytes: int = STREAM_BYTES) -> None:
        """Either end of a vchan by libxenvchan, the other ours, both ways, in rings of all kinds; and by it alone.

        `labels`: those of the pairs that are wanted (default: all).
        """
        guest, dom0 = self.lab.guest(name), self.lab.dom0
        domid = self.lab.domid(name)
        for machine in (guest, dom0):
            machine.run(f"dd if=/dev/urandom of=/run/out bs=65536 count={stream_bytes >> 16} 2>/dev/null")
        ours = f"env PYTHONPATH={self.path} python3 /run/link_probe.py"
        theirs = "/run/vchan_peer"
        kind = self.lab.guests[name].kind
        for number, (label, server, client, orders) in enumerate(
            (
                ("ours_ours", ours, ours, ""),
                ("ours_libxenvchan", ours, theirs, ""),
                ("libxenvchan_ours", theirs, ours, ""),
                ("libxenvchan_libxenvchan", theirs, theirs, ""),
                ("ours_libxenvchan_small", ours, theirs, "10 11"),
                ("libxenvchan_ours_small", theirs, ours, "2048 1024"),
                ("ours_libxenvchan_mixed", ours, theirs, "20 12"),
                ("libxenvchan_ours_mixed", theirs, ours, "1024 1048576"),
            )
        ):
            if labels and label not in labels:
                continue
            node = f"data/link{number}"  # libxenvchan has room for 64 characters in all
            size = stream_bytes if not orders else stream_bytes // 4
            cut = f"head -c {size} /run/out >/run/send &&"
            serving = guest.start("/bin/sh", "-c", f"{cut} {server} serve 0 {node} /run/send {size} /run/in {orders}")
            self.lab.wait(
                f"{node} in xenstore", partial(_is_there, dom0, f"/local/domain/{domid}/{node}/event-channel")
            )
            connect = f"{cut} {client} connect {domid} /local/domain/{domid}/{node} /run/send {size} /run/in"
            done = dom0.try_run(connect, timeout=120)
            self.hear(f"{kind} {label}: client {done.code} {done.out.strip()} {done.err.strip()}")
            served = serving.wait(60)
            self.hear(f"{kind} {label}: server {served.code} {served.out.strip()} {served.err.strip()}")
            assert (done.code, served.code) == (0, 0), label
            sums = [m.run("cd /run && sha256sum send in").split()[::2] for m in (guest, dom0)]
            assert sums[0] == sums[1][::-1], f"{label}: bytes differ"
            seconds = max(json.loads(said.out.splitlines()[-1])["seconds"] for said in (done, served))
            if not orders:
                self.figures[f"{kind}_{label}_mb_s"] = _rate(2 * size, seconds)

    def rights(self, name: str) -> None:
        """What says who a domain is, it cannot write."""
        probe = self._probe(self.lab.guest(name), "store")
        for _ in range(7):
            said = probe.next("refused")
            assert said["code"] == "EACCES", said
        assert probe.next("wrote")["path"] == "data/sharearea/probe"
        probe.close()

    def flood(self, loud: str, other: str) -> None:
        """A domain that writes odd values as fast as it can keeps the broker from no other, and itself not for long."""
        broker = self._broker()
        probe = self._probe(self.lab.guest(loud), "flood", "8")
        agent = self._agent(other)
        said = broker.next("arrived", "unreachable")
        while said["what"] != "arrived":
            said = broker.next("arrived", "unreachable")
        assert said["name"] == other
        for step in ("trips", "grants", "data"):
            said = broker.next(step, "unreachable")
            while said["what"] == "unreachable":
                said = broker.next(step, "unreachable")
        flooded = probe.next("flooded")
        probe.close()
        self.figures["flood_writes"] = flooded["writes"]
        mine = self._agent(loud)
        said = broker.next("arrived", "unreachable")
        while said["what"] != "arrived":
            said = broker.next("arrived", "unreachable")
        assert said["name"] == loud
        for probe in (broker, agent, mine):
            probe.close()

    def life(self, name: str) -> None:
        """A guest is saved and restored under a new number, and then destroyed: both ends know what is void."""
        if name not in self.lab.guests:
            self.lab.create(name, "pv")
        guest, dom0 = self.lab.guest(name), self.lab.dom0
        if self.path:
            unpack(guest, "sharearea_agent")
        self.equip(guest)
        broker = self._broker()
        # Its words go to a file: the channel to it does not live through this.
        command = f"env PYTHONPATH={self.path} python3 /run/link_probe.py agent >/run/agent.log 2>&1"
        guest.run(f"setsid sh -c '{command}' </dev/null >/dev/null 2>&1 &")
        self._exchange(broker, None, name)
        old = self.lab.domid(name)
        self.lab.save(name)
        assert broker.next("gone")["domid"] == old
        broker.next("closed")
        self.lab.restore(name)
        new = self.lab.domid(name)
        assert new != old
        self._exchange(broker, None, name)
        log = guest.run("cat /run/agent.log")
        self.hear(f"{name}: {log}")
        words = [json.loads(line)["what"] for line in log.splitlines()]
        assert words.count("restored") == 1, log
        assert words.count("published") == 2, log
        at = time.monotonic()
        self.lab.destroy(name)
        assert broker.next("gone")["domid"] == new
        self.figures["destroyed_s"] = round(time.monotonic() - at, 2)
        broker.next("closed")
        zombies = [line for line in dom0.run("xl list").splitlines() if re.match(r"\(null\)", line)]
        assert not zombies, zombies
        broker.close()


def _is_there(dom0: Machine, path: str) -> bool:
    return dom0.try_run(f"xenstore-read {path}").code == 0


def _rate(size: int, seconds: float) -> float:
    return round(size / 1e6 / max(seconds, 1e-6), 1)


def main() -> int:
    """Run it by hand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pv")
    parser.add_argument("pvh")
    parser.add_argument("--victim", default="")
    parser.add_argument("--unpack", action="store_true")
    parser.add_argument("--only", default="", help="one step: links, strangers, rights, flood or life")
    options = parser.parse_args()

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    lab = Lab.attach(say)
    build_peer(say)
    path = ""
    if options.unpack:
        path = unpack(lab.dom0, "sharearea")
        for name in (options.pv, options.pvh):
            unpack(lab.guest(name), "sharearea_agent")
    run = LinkRun(lab, options.pv, options.pvh, path, say)
    try:
        run.run(options.victim, options.only)
    except (ChannelError, AssertionError) as error:
        say(f"link_run: {error}")
        return 1
    finally:
        sys.stdout.write(json.dumps(run.figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
