"""Feeds an engine with conversations: a session's next turn is sent some time after the answer to its last one."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from perfsim.serving.driver import Drivable, Progress, in_blocks, of_adapter
from perfsim.serving.request import Request
from perfsim.serving.timing import nanosecond
from perfsim.traffic import SessionChunk, SessionSource

_PROGRESS_EVERY = 4096


class _Session:
    """One conversation under way: `turn` is the next one, rows of the chunk are `row` and up."""

    __slots__ = ("adapter", "chunk", "cut", "ends", "key", "keys", "number", "row", "turn", "turns")

    def __init__(self, chunk: SessionChunk, index: int, *, number: int, key: int) -> None:
        self.chunk = chunk
        self.number = number
        self.row = int(chunk.first[index])
        self.turns = int(chunk.turns[index])
        self.cut = bool(chunk.cut[index])
        self.turn = 0
        self.key = key
        self.adapter = -1 if chunk.adapter is None else int(chunk.adapter[index])
        self.keys: list[int] = []
        self.ends: list[int] = []
        if chunk.prefix_id is not None:
            self.keys, self.ends = [int(chunk.prefix_id[index])], [chunk.prefix_tokens]


class Sessions:
    """Open loop: sessions arrive at given times. Closed loop: a user's next session follows the end of the last one.

    The keys of a turn cover its whole context and its own answer: key 0 the system prompt, key i what turn i added,
    question and answer. So turn i + 1 finds everything up to the last full block of turn i's K/V, in which the answer's
    last token is missing, as in vLLM, that hashes generated blocks too. A session ends early with a rejected turn.
    """

    def __init__(self, source: SessionSource, *, ingress: float, egress: float, block_size: int) -> None:
        self._sessions = _in_turn(source)
        self._users = source.concurrency
        self._think_time = source.think_time_s
        self._ingress, self._egress, self._block_size = ingress, egress, block_size
        self._due: list[tuple[int, int, Request]] = []  # the next turns, by nanosecond and session
        self._open: dict[int, _Session] = {}
        self._engine: Drivable | None = None
        self.sent = 0
        self.begun = 0
        self.cut = 0  # sessions that lost turns to the context limit or to a rejection

    def on_finish(self, request: Request, at: float) -> None:
        """The engine's hook: the answer, or the rejection, reaches the client, who goes on or ends the session."""
        session = self._open[request.session]
        at += self._egress
        rejected = request.finish < 0.0
        if session.turn < session.turns and not rejected:
            self._push(session, at + float(session.chunk.pause_s[session.row + session.turn - 1]))
            return
        self.cut += session.cut or rejected
        del self._open[request.session]
        if self._users is not None:
            self._begin(at + self._think_time)

    def run(self, engine: Drivable, *, progress: Progress | None = None) -> int:
        """Serve all sessions of the source; returns how many requests there were."""
        self._engine = engine
        for _ in range(self._users or 1):
            self._begin(0.0)
        while self._due:
            _, number, request = self._due[0]
            engine.advance(request.queued)
            if self._due[0][2] is not request:
                continue  # a completion on the way made an earlier turn due
            heappop(self._due)
            if self._users is None and self._open[number].turn == 1:
                self._begin(0.0)
            request.index = self.sent
            self.sent += 1
            engine.submit(request)
            if progress is not None and request.index % _PROGRESS_EVERY == 0:
                progress(request.index, request.arrival)
            if not self._due:
                engine.advance(float("inf"))  # until a completion makes the next turn due, or to the end
        engine.drain()
        return self.sent

    def notes(self) -> tuple[str, ...]:
        """What to know about the sessions that were served."""
        if not self.cut:
            return ()
        return (f"{self.cut:,} of {self.begun:,} sessions ended early: at the context limit, or with a lost turn",)

    def _begin(self, at: float) -> None:
        """The next session's first turn becomes due, at `at` in a closed loop."""
        following = next(self._sessions, None)
        if following is None:
            return
        session, start = following
        self.begun += 1
        self._open[session.number] = session
        self._push(session, start if self._users is None else at)

    def _push(self, session: _Session, at: float) -> None:
        chunk, row = session.chunk, session.row + session.turn
        prompt, output = int(chunk.prompt_tokens[row]), int(chunk.output_tokens[row])
        keys = [*session.keys, session.key - session.turn]
        # The K/V of the last token are not computed: the next turn does that.
        ends = [*session.ends, prompt + output - 1]
        session.keys, session.ends = keys, ends
        session.turn += 1
        request = Request(0, at, at + self._ingress, prompt, output)
        request.session, request.adapter = session.number, session.adapter
        names, request.ends = in_blocks(keys, ends, self._block_size)
        request.keys = of_adapter(names, session.adapter)
        heappush(self._due, (nanosecond(request.queued), session.number, request))
        if self._engine is not None:
            self._engine.until = min(self._engine.until, request.queued)


def _in_turn(source: SessionSource) -> Iterator[tuple[_Session, float]]:
    """Sessions in order, and when they start."""
    number, key = 0, -1  # keys that sessions share are the system prompts' numbers, from 0 up; those of turns go down
    for chunk in source.chunks:
        for index, start in enumerate(chunk.start_s.tolist()):
            session = _Session(chunk, index, number=number, key=key)
            yield session, start
            number += 1
            key -= session.turns
