"""A session takes a step: by itself (`Step`), or beside others of its peer (`Steps`).

Invariant: a session takes one step at a time, and either has taken it whole or has lost its cache. A step's outputs
depend on its own session only: one that fails beside others is computed again alone, so an error reaches the client
whose step it was and nobody else. Padding is neither computed nor cached: rows are told apart by the mask, and their
padding's outputs are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.models.attention.packing import PackedBatch, Segment
from corolla.models.attention.passes import piece_of
from corolla.models.lora import AdapterRows
from corolla.models.prompts import DeepRows
from corolla.models.span import Span
from corolla.server.block_server import (
    BlockServer,
    check_hidden,
    check_lengths,
    malformed,
)
from corolla.server.memory import check_memory, working_bytes
from corolla.server.scheduler.execution import PASS_TOKENS, Kind, Request
from corolla.server.sessions.session import Client, Session
from corolla.wire.frames import Packet
from corolla.wire.messages import Output, Step

STACKED_BYTES = 2**28
DECODE_TOKENS = 8  # a step of so few tokens a row is generation (speculation included), not a prompt


def ready(session: Session | None) -> Session:
    """The session, if it can take a step now. Raises `RequestRefused`."""
    if session is None or session.evicted:
        raise RequestRefused("The session's cache is gone; replay it.", code="evicted")
    if session.step is not None:
        raise malformed("name", "The session has not answered the step before.")
    return session


class StepRequest(Request):
    """One step of a session: what is asked, how far it has come, and what has come of it."""

    passes = True
    session: Session

    def __init__(
        self,
        server: BlockServer,
        session: Session,
        hidden: Tensor,
        *,
        position: int,
        reserve: int = 0,
        order: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        """`hidden` [R, T, H] stands at column `position`; `mask` bool [R, position + T], `positions` [R, T];
        `lengths` as in `Step`.

        The cached rows are continued in `order`; `reserve` is how many tokens a row may reach in the present call.
        """
        self.rows, self.count = int(hidden.shape[0]), int(hidden.shape[1])
        super().__init__(Kind.DECODE if self.count <= DECODE_TOKENS else Kind.PREFILL, session.peer, session)
        stacks = session.span.stackable and self.count == 1 and session.stacks_from(position)
        stacks = stacks and (mask is None or bool(mask.all()))
        # Of families that cannot be packed, steps of one token may be stacked; nothing else shares a pass.
        self.group = session.span if session.span.packable or stacks else None
        self.room = max(reserve, position + self.count)
        self.segments: list[Segment] = []  # of the pass at hand
        self._server = server
        self._hidden = hidden
        self._position = position
        self._order = order
        self._mask = mask
        self._positions = positions
        self._lengths = lengths
        self._arranged = False
        self._at = 0  # tokens that have been through the blocks

    @classmethod
    def of(
        cls, server: BlockServer, client: Client, message: Step, tensors: dict[str, Tensor]
    ) -> StepRequest:
        """A `Step` of the client's session. Raises `RequestRefused` where that takes none now."""
        return cls(
            server,
            ready(client.session),
            tensors["hidden"],
            position=message.position,
            reserve=message.reserve,
            order=tensors.get("rows"),
            mask=tensors.get("mask"),
            positions=tensors.get("positions"),
            lengths=tensors.get("lengths"),
        )

    def check(self) -> None:
        """See `handlers.Answered`."""
        check_hidden(self._hidden, self.session.span)
        self._check_fits()
        rows, tokens = self.rows, min(_columns(PASS_TOKENS, self.rows), self.count)
        total = self.session.before + self._position + self.count
        needed = working_bytes(self.session.span, rows=rows, tokens=tokens, total=total, with_gradients=False)
        check_memory(needed, rows=rows, tokens=tokens, limit=self._server.working_bytes)

    def _check_fits(self) -> None:
        """Everything that depends on the session's state. Raises `RequestRefused`."""
        session, position, order, mask = self.session, self._position, self._order, self._mask
        if self._lengths is not None:
            check_lengths(self._lengths, self.count)
        if position > session.length:
            raise malformed(
                "position", f"The session holds {session.length} tokens; a step cannot begin at {position}."
            )
        if order is not None and (int(order.min()) < 0 or int(order.max()) >= session.rows):
            raise malformed("rows", f"The session holds rows 0 to {session.rows - 1}.")
        expected = session.rows if order is None else int(order.shape[0])
        if session.length and self.rows != expected:
            raise malformed("hidden", f"The session has {expected} rows.")
        if mask is not None and int(mask.shape[1]) != position + self.count:
            raise malformed("mask", f"The mask must cover all {position + self.count} tokens.")
        if not session.same_past(mask, position, order):
            raise RequestRefused(
                "The mask says of earlier tokens what it did not say when they were computed; replay the session.",
                code="evicted",
                field="mask",
            )
        if not session.reaches(position, order):
            raise RequestRefused(
                f"What blocks need to go back to token {position} is not kept; replay the session.",
                code="evicted",
                field="position",
            )

    def reserve_now(self) -> bool:
        """Whether the session has room for it, or was given it without waiting."""
        return self.session.reserve_now(self.rows, self.room, position=self._position, order=self._order)

    async def run(self) -> Packet:
        """The outputs."""
        session = self.session
        with session.taking(self):
            await session.reserve(self.rows, self.room, "reserve", position=self._position, order=self._order)
            with session.in_use():
                self._server.engine.enqueue([self])
                output: Tensor = await self.done
        self._server.counters.inference += self.rows * self.count
        return Packet(Output(), {"hidden": output})

    # --- on the compute thread ------------------------------------------------------------------------------

    @cached_property
    def _places(self) -> Tensor | None:
        """Where each packed token stands in the flattened [R × T]; None when there is no padding."""
        if self._mask is None or not self.session.span.packable:
            return None
        real = self._mask[:, self._position :].reshape(-1)
        return None if bool(real.all()) else real.nonzero().flatten()

    @cached_property
    def _total(self) -> int:
        return self.rows * self.count if self._places is None else len(self._places)

    @property
    def tokens_left(self) -> int:
        """See `Request`."""
        return self._total - self._at

    @property
    def behind(self) -> int:
        """See `Request`."""
        return self.rows * (self.session.before + self._position) + self._at

    @cached_property
    def _inputs(self) -> Tensor:
        """[n, H] of the tokens that are not padding."""
        return self._packed(self._hidden.reshape(self.rows * self.count, -1))

    @cached_property
    def _ids(self) -> Tensor:
        """Their position ids, int64 [n]."""
        ids = self._positions
        if ids is None:
            ids = torch.arange(self._position, self._position + self.count).repeat(self.rows)
        return self._packed(ids.reshape(-1)) + self.session.before

    def _packed(self, flat: Tensor) -> Tensor:
        return flat if self._places is None else flat[self._places]

    @cached_property
    def _outputs(self) -> Tensor:
        inputs = self._inputs if self.session.span.packable else self._hidden
        return inputs.new_empty(*inputs.shape[:-1], self.session.span.width_behind)

    @cached_property
    def _row_ends(self) -> list[int]:
        """The packed token behind each row's last one."""
        if self._places is None or self._mask is None:
            return [self.count * (row + 1) for row in range(self.rows)]
        ends: list[int] = self._mask[:, self._position :].sum(1).cumsum(0).tolist()
        return ends

    def run_pass(self, parts: Sequence[tuple[StepRequest, int]]) -> list[BaseException | None]:
        """See `Request`."""
        try:
            _run(parts)
        except Exception as error:
            for step, _ in parts:
                step.undo()
            if len(parts) == 1:
                return [error]
            # Each by itself, but for those that were taken in a company before the one that failed.
            return [one[0].run_pass([one])[0] if one[0].tokens_left else None for one in parts]
        return [None] * len(parts)

    def begin(self) -> None:
        """Have the session's rows as the step continues them, before its first tokens."""
        if not self._arranged:
            self.session.rearrange(self.rows, self._position, self._order)
            self._arranged = True

    @property
    def _alone(self) -> bool:
        """Whether its pages were reserved as if nobody shared them; rows beside others, or behind a prefix, do."""
        return self.rows == 1 and not self.session.before

    def load(self, count: int, begin: int) -> tuple[Tensor, Tensor]:
        """Inputs [n, H] and ids [n] of the next `count` tokens; `segments` are these, from packed token `begin` on."""
        self.begin()
        first, last, start = self._at, self._at + count, 0
        self.segments = []
        for row, end in enumerate(self._row_ends):
            here, stop = max(first, start), min(last, end)
            if here < stop:
                cached = self.session.block_tables[row]
                room = self.session.before + self.room
                if (
                    self._alone and count > DECODE_TOKENS
                ):  # a prompt's attention reads all of it in each block
                    cached.bring_together(room)
                self.segments.append(Segment(begin + here - first, stop - here, cached, room))
            start = end
        return self._inputs[first:last], self._ids[first:last]

    def undo(self) -> None:
        """Take back what a pass that failed has cached."""
        for one in self.segments:
            if one.prepared and one.sequence is not None:
                one.sequence.truncate(one.past)

    def store(self, output: Tensor) -> None:
        """The pass's outputs [n, H] for the tokens loaded last."""
        self._outputs[self._at : self._at + len(output)] = output
        self._at += len(output)
        for one in self.segments:
            if one.sequence is not None:
                one.sequence.trim()

    @cached_property
    def _pass_ends(self) -> list[int]:
        """The columns at which passes end that are to be computed by themselves."""
        if self._lengths is None or not self.session.span.steps_differ:
            return [self.count]
        ends: list[int] = self._lengths.cumsum(0).tolist()
        return ends

    def begin_plain(self) -> None:
        """`begin`, and a snapshot where one is due, for a family that cannot be packed."""
        self.begin()
        column = self._at // self.rows
        # Where steps differ, whoever goes back to one token behind a snapshot must see whether a pass begins there.
        if not (column and self.session.span.steps_differ) or column in self._pass_ends:
            self.session.remember(self.rows, turn=not column and self.count > 1)

    def load_stacked(self) -> tuple[Tensor, Tensor]:
        """Its new tokens [R, 1, H] and their position ids [R, 1], for a pass over steps of one token."""
        span = self.session.span
        self.begin_plain()
        # A copy, since it is kept, and a message holds others' too.
        hidden = self._hidden.to(span.device, span.dtype, copy=True)
        return hidden, self._ids.view(self.rows, 1).to(span.device)

    def store_stacked(self, output: Tensor) -> None:
        """What that pass gave, [R, 1, H]."""
        self._outputs.copy_(output)
        self._at = self.rows

    def run_plain(self, tokens: int) -> None:
        """The next columns, of about so many tokens, for a family that cannot be packed."""
        self.begin_plain()
        session, device = self.session, self.session.span.device
        begin = self._at // self.rows
        left = next(end for end in self._pass_ends if end > begin) - begin
        end = begin + piece_of(left, _columns(tokens, self.rows))
        mask, positions = self._mask, self._positions
        with torch.inference_mode():
            output = session.span.forward(
                self._hidden[:, begin:end].to(device, session.span.dtype),
                mask=None if mask is None else mask[:, : self._position + end].to(device),
                positions=None if positions is None else positions[:, begin:end].to(device),
                cache=session.plain,
                prompts=session.prompts,
                prefix=session.prefix,
                lora=session.lora,
                targets=session.targets,
            )
        self._outputs[:, begin:end] = output
        self._at = self.rows * end

    def result(self) -> Tensor:
        """Outputs [R, T, H] on the CPU, in the dtype of the inputs; the session has taken the step."""
        self.begin()  # of nothing but padding
        session = self.session
        session.rows, session.length = self.rows, self._position + self.count
        session.mask = None if self._mask is None or bool(self._mask.all()) else self._mask
        if self._places is None:
            return self._outputs.view(self.rows, self.count, -1)
        whole = self._hidden.new_zeros(self.rows * self.count, self._outputs.shape[-1])
        whole[self._places] = self._outputs
        return whole.view(self.rows, self.count, -1)


def _columns(tokens: int, rows: int) -> int:
    """Tokens a row, of so many in all."""
    return max(1, tokens // rows)


def _run(parts: Sequence[tuple[StepRequest, int]]) -> None:
    """The next tokens of steps of one span through it, together where the family allows it."""
    session = parts[0][0].session
    span, pool = session.span, session.pool
    if not span.packable:
        step, count = parts[0]
        if len(parts) > 1 or (step.group is not None and span.compile() is not None):
            _run_stacked(span, [step for step, _ in parts])
        else:
            step.run_plain(count)
        return
    loaded, total = [], 0
    for step, count in parts:
        loaded.append(step.load(count, total))
        total += count
    if not total:
        return
    alone = len(loaded) == 1
    hidden = loaded[0][0] if alone else torch.cat([inputs for inputs, _ in loaded])
    ids = loaded[0][1] if alone else torch.cat([own for _, own in loaded])
    with torch.inference_mode():
        output = span.forward_packed(
            hidden.to(span.device, span.dtype),
            PackedBatch([one for step, _ in parts for one in step.segments], pool),
            positions=ids.to(span.device),
            deep=_deep_rows(parts),
            adapters=_adapter_rows(parts, total),
        ).to("cpu", hidden.dtype)
    for (step, _), own in zip(parts, torch.split(output, [count for _, count in parts]), strict=True):
        step.store(own)


def _run_stacked(span: Span, steps: Sequence[StepRequest]) -> None:
    """Steps of one token, as many together as have no more than `STACKED_BYTES` of states, which a pass copies."""
    most, left = STACKED_BYTES // max(1, span.cache_bytes[1]), list(steps)
    while left:
        company = [left.pop(0)]
        while left and sum(one.rows for one in company) + left[0].rows <= most:
            company.append(left.pop(0))
        with torch.inference_mode():
            hidden, positions = zip(*(one.load_stacked() for one in company), strict=True)
            outputs = span.forward_stacked(hidden, [one.session.plain for one in company], positions)
        for step, own in zip(company, outputs, strict=True):
            step.store_stacked(own)


def _deep_rows(parts: Sequence[tuple[StepRequest, int]]) -> DeepRows | None:
    """The deep prompts of those sessions that have some. A prompt is never padding: it counts real tokens."""
    places, prompts = [], []
    for step, _ in parts:
        own = step.session.prompts
        if own is not None:
            for one in step.segments:
                places.append((one.begin, one.past, one.count))
                prompts.append(own)
    return DeepRows.of(places, prompts) if places else None


def _adapter_rows(parts: Sequence[tuple[StepRequest, int]], total: int) -> AdapterRows | None:
    """The adapters of those sessions that have some."""
    own = [
        (step.session.adapter, [range(one.begin, one.end) for one in step.segments])
        for step, _ in parts
        if step.session.adapter is not None
    ]
    return AdapterRows(own, total) if own else None
