"""A run is stuck or broken: which rank is the odd one, and what does its user read about it?"""

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

ENDED_BY = {signal.SIGINT: "interrupted (SIGINT)", signal.SIGTERM: "told to end (SIGTERM)"}
"""Complaints of ranks that a signal ends, which is no failure."""


@dataclass
class RankState:
    """What one rank last told the others about itself."""

    rank: int
    host: str
    pid: int
    launcher_pid: int
    step: int = 0
    phase: str = "start"
    seconds_in_phase: float = 0.0
    num_marks: int = 0
    """Phases begun so far: a rank with more of them is further on."""
    told_at: float = 0.0
    """Unix time by the rank's own clock."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Collectives entered so far, by process group; the name of a group lists its ranks."""
    stack: list[str] = field(default_factory=list)
    """Where the main thread is, innermost call last."""
    error: str = ""
    """One line on the exception that ended this rank's main thread."""
    error_from_peer: bool = False
    """Whether communication broke, which another rank may have caused."""
    traceback: str = ""
    complaint: str = ""
    """Why this rank raised the alarm; empty where another did."""
    heard_alarm: bool = False
    finished: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankState":
        return cls(**json.loads(text))

    @property
    def place(self) -> str:
        return "the end of training" if self.finished else f"step {self.step}, phase {self.phase}"


@dataclass(frozen=True)
class Verdict:
    odd_ranks: tuple[int, ...]
    headline: str
    ended_by: int = 0
    """The signal that asked for the end; 0 for a failure."""


def judge(states: Sequence[RankState], now: float) -> Verdict:
    """Name the ranks that made the others stop, by the strongest evidence there is.

    A rank that broke by itself or no longer speaks is the cause, and where there are both all are named:
    either may have brought about the other (a rank whose peer ran out of memory can freeze with it). Else
    it is one that others wait for in a collective; else nobody stands out.
    """
    broken = [state for state in states if state.error and not state.error_from_peer]
    silent = [
        state
        for state in states
        if not (state.heard_alarm or state.finished or state in broken)
    ]
    if broken or silent:
        errors = {state.rank: f"failed at {state.place}: {state.error}" for state in broken}
        who = [f"{ranks} {what}" for what, ranks in _together(errors)]
        who += [
            f"rank {state.rank} has been silent for {now - state.told_at:.0f} s (killed, frozen or"
            f" aborted), last seen at {state.place}"
            for state in silent
        ]
        return Verdict(tuple(state.rank for state in broken + silent), "; ".join(who))

    complaints = {state.complaint for state in states if state.complaint}
    if complaints and complaints <= set(ENDED_BY.values()):
        number = next(number for number, words in ENDED_BY.items() if words in complaints)
        return Verdict((), f"{ENDED_BY[number]} at {states[0].place}", number)

    absent = _absent_from_collectives(states)
    if absent:
        who = "; ".join(
            f"rank {state.rank} at {state.place} has not joined {what}" for state, what in absent
        )
        return Verdict(tuple(state.rank for state, _ in absent), who)

    astray = _minority_by_progress(states)
    if astray:
        others = next(state for state in states if state not in astray)
        who = "; ".join(
            f"rank {state.rank} is at {state.place}, the others wait at {others.place} although all"
            " have entered equally many collectives: it has skipped one, or entered one too many"
            for state in astray
        )
        return Verdict(tuple(state.rank for state in astray), who)

    who = "; ".join(
        f"rank {state.rank} at {state.place}: {state.complaint}"
        for state in states
        if state.complaint
    )
    return Verdict((), f"no rank stands out: {who}")


def render(states: Sequence[RankState], verdict: Verdict, now: float) -> str:
    """The whole report: the verdict, one line a rank, then tracebacks or the stacks of odd ranks."""
    lines = [f"The run has stopped: {verdict.headline}", ""]
    for state in states:
        mark = ">" if state.rank in verdict.odd_ranks else " "
        note = f" ({state.complaint})" if state.complaint else ""
        lines.append(
            f"{mark} rank {state.rank} on {state.host} (pid {state.pid}): {state.place} for"
            f" {state.seconds_in_phase:.1f} s, last word {now - state.told_at:.1f} s ago{note}"
        )
    shown = [s for s in states if s.rank in verdict.odd_ranks] or list(states)[:1]
    last_words = {}
    for state in shown:
        title = "raised" if state.traceback else "was last seen at"
        body = state.traceback.splitlines() if state.traceback else state.stack
        last_words[state.rank] = "\n    ".join([title, *body])
    for words, who in _together(last_words):
        lines += ["", f"{who} {words}"]
    return "\n".join(lines)


def _together(words: Mapping[int, str]) -> list[tuple[str, str]]:
    """What ranks have to say and who says it: `rank 3`, or `ranks 0, 1, 2` where it is the same."""
    ranks: dict[str, list[int]] = {}
    for rank, text in words.items():
        ranks.setdefault(text, []).append(rank)
    return [
        (text, f"rank{'s' if len(group) > 1 else ''} {', '.join(map(str, group))}")
        for text, group in ranks.items()
    ]


def _absent_from_collectives(states: Sequence[RankState]) -> list[tuple[RankState, str]]:
    """Ranks that have entered fewer collectives of a group than another member, with the group."""
    absent = {}
    for group in sorted({name for state in states for name in state.collectives}):
        members = [state for state in states if group in state.collectives]
        most = max(state.collectives[group] for state in members)
        for state in members:
            count = state.collectives[group]
            if count < most:
                what = f"collective {count + 1} of {group}"
                absent.setdefault(state.rank, (state, what))
    return list(absent.values())


def _minority_by_progress(states: Sequence[RankState]) -> list[RankState]:
    """The ranks at another point than most; of two halves, those ahead. None where all are level."""
    by_progress: dict[int, list[RankState]] = {}
    for state in states:
        by_progress.setdefault(state.num_marks, []).append(state)
    most = max(by_progress, key=lambda marks: (len(by_progress[marks]), -marks))
    return [state for state in states if state.num_marks != most]
