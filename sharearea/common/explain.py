"""What each reason code of the catalogue means, and what to do about it. Pure data, for `why` and `stats`.

A test fails when a code of the catalogue or a verdict of the protocol has no entry here, or an entry has no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .events import EVENTS
from .wire import Verdict


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a code means, and what to do; `remedy` says so too where nothing is to be done."""

    meaning: str
    remedy: str


_BY_ITSELF: Final = "nothing: it passes by itself"
_PEER: Final = (
    "see peer.strike in the broker's log; update the agent, or look at what else speaks on the broker's socket"
)

EXPLANATIONS: Final[dict[str, Explanation]] = {
    code: Explanation(meaning, remedy)
    for code, meaning, remedy in (
        # ----------------------------------------------------------- what the broker says of a file
        ("known", "another domain brought this content already: it is shared, or will be", "nothing"),
        ("wanted", "the broker takes the file and waits for the fingerprints of its pages", _BY_ITSELF),
        (
            "too-small",
            "the file is smaller than min_file_bytes: its bookkeeping would cost more than it saves",
            "lower min_file_bytes of the pool if it is to share all the same",
        ),
        ("too-large", "the file is larger than max_file_bytes", "raise max_file_bytes of the pool"),
        (
            "excluded",
            "a glob of exclude, or of the built-in list of ciphers, keys and secrets, matches the path",
            "take it out of exclude; default_exclude = false drops the built-in list (see docs/threat-model.md)",
        ),
        ("not-included", "no glob of include matches the path", "add a glob to include of the pool"),
        (
            "quota-files",
            "the domain reports max_files files already",
            "raise max_files, or give the agent fewer folders",
        ),
        (
            "quota-bytes",
            "the files that the domain reports reach max_bytes",
            "raise max_bytes, or give it fewer folders",
        ),
        (
            "table-full",
            "the pool's table of fingerprints has max_pages pages and no room for another",
            "raise max_pages of the pool and restart the broker",
        ),
        ("not-reported", "the domain asked for a file that it has not reported, or not any more", _BY_ITSELF),
        (
            "nothing-shared",
            "no page of the file is in the area: fewer than k domains hold its pages, or they are on their way",
            "wait until another domain of the pool has the same file in its page cache",
        ),
        (
            "store-full",
            "the store cannot grow: store_max_bytes or its disk is full; nothing more is published or granted",
            "raise store_max_bytes or free the disk of state_dir; it is tried again every 30 s",
        ),
        (
            "root-mismatch",
            "the fingerprints that the agent sent do not add up to the file root that it announced",
            "look for peer.strike in the broker's log: the agent is faulty or lies; update or remove it",
        ),
        (
            "grant-budget",
            "the table of grants, or the domain's part of it, has no room for the pages of this file",
            "raise max_grants, max_grants_per_domain or Xen's gnttab_max_frames (see sharearea check)",
        ),
        (
            "detached",
            "the operator has detached the domain or the file",
            "sharearea reattach DOMAIN, or in the guest sharearea-agent reattach",
        ),
        (
            "report-only",
            'the pool has mode = "report": it only counts what sharing would bring',
            'write mode = "share"',
        ),
        (
            "not-resident",
            "no page of the file is in the guest's page cache, and the area has not got it from another guest",
            "nothing: it is reported when somebody reads it",
        ),
        # ------------------------------------------------------ what the agent leaves out when it looks
        (
            "not-world-readable",
            "not everybody in the guest may read the file, and what is shared everybody could",
            "chmod o+r the file; on xen world_readable = false in agent.toml reports such files too",
        ),
        (
            "other-file-system",
            "another file system is mounted there, and the agent stays on those of its folders",
            "name the mount point in folders, or write one_file_system = false in agent.toml",
        ),
        # ------------------------------------------------------- why a program got the plain file
        (
            "no-broker",
            "the agent has no connection to a broker, or is refused",
            "sharearea-agent status in the guest says why",
        ),
        (
            "not-designated",
            "the agent does not know it: outside of its folders, too small, excluded, or not seen yet",
            "add its folder to folders in agent.toml; sharearea-agent status says whether a scan is under way",
        ),
        (
            "not-offered",
            "none of its pages is in the area: fewer than k domains hold them, or publishing goes on or is paused",
            "wait for another domain with the same file in its page cache; sharearea pools shows pauses",
        ),
        (
            "lease-refused",
            "somebody has the file open for writing or mapped writable, or the agent may not take leases",
            "close it there (fuser -v FILE); the agent needs root or CAP_LEASE",
        ),
        (
            "lease-broken",
            "somebody opened the file for writing while it was being shared",
            "nothing: it is shared again when the writer is done",
        ),
        ("changed", "the file is not the one that was reported", "nothing: it is looked at again"),
        ("deleted", "the file is gone, or another one has its name", "nothing: the new one is reported by itself"),
        ("moving", "its pages are being moved into another segment", _BY_ITSELF),
        ("closed", "the program closed the file, or went, before it was shared", "nothing"),
        ("withdrawn", "the broker asked for the grants back", _BY_ITSELF),
        (
            "bytes-differed",
            "the program found other bytes in the area than in the file; the file stays plain until it changes",
            "report it, with file.mismatch of the agent's log: this must not be",
        ),
        (
            "no-room",
            "the program has no room for more mappings",
            "raise vm.max_map_count in the guest, or share fewer or larger files",
        ),
        (
            "suspending",
            "the guest is about to be suspended",
            "nothing: it shares again when it goes on",
        ),
        (
            "user-mappings-off",
            "in this kind of guest a suspend would lose shared pages under mapped files, so they are off",
            "allow_user_mappings = true, if sharearea detach comes before every save and migration",
        ),
        (
            "no-shim",
            "the program does not know of shared pages, and its guest is one of Xen",
            "nothing: there the guest view does this job (docs/view.md); sharearea-agent exec is for `local`",
        ),
        ("no-grant-device", "the guest has no /dev/xen/gntdev", "modprobe xen-gntdev in the guest"),
        ("denied", "the broker gave no grants for the file", "look at files.refused, stage grant, in the broker's log"),
        # ------------------------------------------------------------- why a domain may not share
        ("disabled", "sharing is switched off", "write enabled = true under [broker]"),
        (
            "unknown-backend",
            "the domain came by a way that the rules do not speak of",
            "give broker and agent the same backend",
        ),
        (
            "bad-name",
            "the domain has no name that it could be known by",
            "change name in agent.toml; on xen name the domain with xl rename",
        ),
        ("no-guest", "dom0 is no guest, and only guests share", "stop the agent there"),
        (
            "no-matching-rule",
            "no rule of any pool fits this domain's name, uid, uuid and label together",
            "add it to domains of a pool; the line domain.refused says what to write",
        ),
        (
            "no-pool",
            "there is no pool, or the rule that fits names one that is not there",
            "write [pools.NAME] with a domains list",
        ),
        (
            "policy-error",
            "the broker failed while it decided, and so denied",
            "report it, with the line from the broker's log",
        ),
        (
            "protocol-version",
            "broker and agent speak no common version of the protocol",
            "install the same version on both sides",
        ),
        (
            "struck-out",
            "it was caught three times with pages that were not what it reported, and is barred for a while",
            "see peer.strike in the broker's log: memory errors in the guest, or an agent that lies",
        ),
        ("already-connected", "another agent is connected under this name", "stop it, or give the two different names"),
        ("still-leaving", "what the domain reported before is still being forgotten", "nothing: the agent tries again"),
        ("pool-full", "the pool has max_domains domains already", "raise max_domains of the pool"),
        ("malformed", "the peer sent something that the protocol does not allow", _PEER),
        ("no-hello", "the peer connected and did not introduce itself in time", _PEER),
        (
            "no-answer",
            "the agent did not answer in time",
            "look whether the guest is stopped or short of memory; the agent connects again",
        ),
        ("area-lost", "the sharing area went away and there is a new one", "nothing: the agent connects again at once"),
        (
            "page-mismatch",
            "pages that it delivered did not have the fingerprints that it reported",
            "memory errors in the guest, or an agent that lies",
        ),
        # --------------------------------------------------------------- why a pool publishes nothing
        (
            "area-full",
            "the area has reached max_area_bytes, or the host gives no more memory for it",
            "raise max_area_bytes or free memory on the host; it is tried again every 30 s",
        ),
        # ------------------------------------------------- why programs went back to the plain files
        ("broker", "the broker asked for it", "files.withdrawn in the broker's log says why"),
        ("writer", "somebody opens the file for writing", "nothing: it is shared again when the writer is done"),
        ("more-offered", "more of the file's pages are on offer: it is attached again with them", _BY_ITSELF),
        ("other-area", "the broker came back with another area", _BY_ITSELF),
        ("other-key", "the broker came back with another key: everything is fingerprinted again", _BY_ITSELF),
        (
            "unknown-grant",
            "the broker does not know the grant: it came back with another area, or waited in vain",
            _BY_ITSELF,
        ),
        ("operator", "the operator detached it", "sharearea reattach DOMAIN"),
        # ----------------------------------------------------------------- why grants were taken back
        (
            "grace-over",
            "the domain's agent was gone for longer than the grace time",
            "start the agent; raise grace if restarts take longer",
        ),
        ("not-held", "the agent came back without these files", "nothing"),
        (
            "grants-failed",
            "entries could not be written into the table of grants",
            "see grants.failed in the broker's log",
        ),
        # ----------------------------------------------------------- how a pool came to an empty area
        ("no-earlier-area", "there was no area before", "nothing"),
        (
            "segment-size-changed",
            "segment_bytes is another one than the area's",
            "nothing: the new area has the new size",
        ),
        (
            "table-too-small",
            "the earlier area has more pages or owners than the table takes",
            "raise max_pages if that was not meant",
        ),
        (
            "segments-not-kept",
            "no service manager kept the segments for the broker",
            "run it with the systemd unit of deploy/systemd (fd store)",
        ),
        ("segment-refused", "a kept segment was not what the store says of it", "nothing: the area was begun anew"),
        (
            "bytes-differ",
            "bytes of the area are not what the index says",
            "report it with the broker's log; test the host's memory",
        ),
        ("area-gone", "the area domain is not there any more", "nothing, if it was destroyed on purpose"),
        ("area-replaced", "the area domain is another one than before", "nothing, if it was destroyed on purpose"),
        ("segments-missing", "the area domain lacks segments that the store knows", "nothing: the area was begun anew"),
        # ------------------------------------------------------------------- why memory targets moved
        ("taken", "the domain gave up memory and its target was lowered by it", "nothing"),
        ("kept", "the domain's target stays as it is", "nothing"),
        ("let-go", "the domain holds less of the area than before, so memory was given back to it", "nothing"),
        (
            "short",
            "the domain ran short of memory, so some was given back",
            "raise reclaim_headroom if it happens often",
        ),
        (
            "silent",
            "the domain's agent has not reported, so all of its memory was given back",
            "look whether the agent runs",
        ),
        # ------------------------------------------------------------- invariants that do not hold
        (
            "mappings-differ",
            "owners and mappings of the area do not add up to the same",
            "report it, with the broker's log",
        ),
        (
            "grants-differ",
            "owners and entries of the table of grants do not add up to the same",
            "report it, with the broker's log",
        ),
        ("slots-beyond-area", "more slots are in use than the area has", "report it, with the broker's log"),
    )
}


STATES: Final[dict[str, Explanation]] = {
    code: Explanation(meaning, remedy)
    for code, meaning, remedy in (
        ("shared", "it is shared", "nothing"),
        ("broker-not-running", "no broker answers", "start it: systemctl start sharearea, or sharearea broker"),
        ("agent-not-running", "no agent answers there", "start it in the guest: systemctl start sharearea-agent"),
        ("domain-unknown", "no agent has come under this name since the broker started", "start the agent there"),
        ("no-domains", "no domain is connected", "start the agents"),
        ("agent-gone", "the domain's agent is gone; its grants are kept for the grace time", "start the agent again"),
        ("barred", EXPLANATIONS["struck-out"].meaning, EXPLANATIONS["struck-out"].remedy),
        (
            "strikes",
            "the domain has been caught with pages that were not what it reported",
            EXPLANATIONS["page-mismatch"].remedy,
        ),
        ("paused", "nothing is published for a while", "see what the pause says; publishing is tried again every 30 s"),
        ("reporting", "the agent is still reporting", _BY_ITSELF),
        (
            "nothing-reported",
            "the agent is connected and has reported no file",
            "look at folders in agent.toml and at sharearea-agent status; only what is in the page cache is reported",
        ),
        (
            "alone",
            "fewer domains than k are connected in the pool, and what k domains hold is all that is shared",
            "start another guest of the pool",
        ),
        (
            "nothing-in-common",
            "no page of the domain is held by k domains",
            "nothing, if the guests really differ; guests of the same template have most pages in common",
        ),
        (
            "one-holder",
            "fewer than k domains hold this content",
            "wait until another guest of the pool has the same file in its page cache, or its version really differs",
        ),
        ("zero-pages", "all of its pages are zeros: they are counted apart and never shared", "nothing"),
        ("publishing", "its pages are wanted in the area and on their way", _BY_ITSELF),
        (
            "undelivered",
            "no agent that holds it could deliver its bytes: they left the page cache, or changed",
            "nothing: it is tried again",
        ),
        (
            "no-consumer",
            "its pages are in the area, and no program of this domain has asked for them",
            "start it with sharearea-agent exec (on xen the guest view does that), or use sharearea_agent.open_shared",
        ),
        (
            "text-stays",
            "executable text of the file stays the guest's own: Xen's grants cannot be executed",
            "nothing",
        ),
        (
            "partly",
            "some of its pages are in the area, and others are not",
            "nothing: what k domains hold is put there",
        ),
        (
            "not-dropped",
            "programs map its pages, but the guest has not given up its own copies",
            "drop = true in agent.toml; pages that are dirty or mapped otherwise stay",
        ),
        (
            "not-reported-by-any",
            "no domain reports this path; the rules of the pools would let it in",
            "ask its agent: sharearea why --agent SOCKET PATH, or in the guest sharearea-agent why PATH",
        ),
        (
            "special",
            "it is no regular file, or it is the agent's own cache, or its folder is not everybody's to enter",
            "nothing",
        ),
        ("unreadable", "the agent cannot open the file", "run the agent as root"),
        ("not-seen-yet", "the agent has not looked at the file yet, or not told the broker", _BY_ITSELF),
    )
}
"""What `why` names besides reason codes: states of a file or a domain in which nobody refused anything."""


def codes() -> set[str]:
    """Return every reason code of the catalogue of events, and of the protocol's verdicts."""
    return {reason for kind in EVENTS.values() for reason in kind.reasons} | {verdict.code for verdict in Verdict}
