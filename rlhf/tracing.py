"""Traces over all processes, with --otlp-endpoint; without it everything here returns at once, and nothing is imported.

A span carries what log lines carry (run id, step, request id), counts and versions: never a text, a token or a secret.
W3C Trace Context travels in the metadata of calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.extras import brought_by

if TYPE_CHECKING:
    import grpc

Attribute = str | int | float | bool


class TraceContext(Protocol):
    """Who a span is, for its children and for links to it."""


class Span(Protocol):
    """Begun when it is made; as a context it is what spans made inside are children of, and then it ends."""

    @property
    def context(self) -> TraceContext | None:
        """Who it is; None = nothing is traced."""
        ...

    def __enter__(self) -> Span: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Tracer(Protocol):
    """What makes spans while traces are on; see the functions below."""

    def span(
        self,
        name: str,
        *,
        root: bool,
        parent: TraceContext | None,
        links: Sequence[TraceContext],
        attributes: Mapping[str, Attribute],
    ) -> Span:
        """See `span`."""
        ...

    def server_span(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Span:
        """See `server_span`."""
        ...

    def here(self) -> TraceContext | None:
        """See `here`."""
        ...

    def continuing(self, context: TraceContext) -> contextlib.AbstractContextManager[None]:
        """See `continuing`."""
        ...

    def annotate(self, attributes: Mapping[str, Attribute]) -> None:
        """See `annotate`."""
        ...

    def answered(self, code: grpc.StatusCode) -> None:
        """See `answered`."""
        ...

    def exemplar(self) -> dict[str, str] | None:
        """See `exemplar`."""
        ...

    def client_interceptors(self) -> Sequence[grpc.aio.ClientInterceptor]:
        """See `client_interceptors`."""
        ...


class _NoSpan:
    context: TraceContext | None = None

    def __enter__(self) -> _NoSpan:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


_NO_SPAN = _NoSpan()
_tracer: Tracer | None = None


@contextlib.contextmanager
def exporting(endpoint: str | None, *, service: str) -> Iterator[None]:
    """Send this process's spans to an OTLP receiver while inside; None = off.

    `service` names the process in traces. Raises CredentialsError; without the extra "tracing" the process ends.
    """
    global _tracer
    if endpoint is None:
        yield
        return
    with brought_by("tracing"):
        from rlhf.otlp import OtlpTracer
    with contextlib.closing(OtlpTracer(endpoint, service=service)) as tracer:
        _tracer = tracer
        try:
            yield
        finally:
            _tracer = None


def span(
    name: str,
    *,
    root: bool = False,
    parent: TraceContext | None = None,
    links: Sequence[TraceContext | None] = (),
    **attributes: Attribute,
) -> Span:
    """A child of the span around, of `parent`, or with root of none; `links` are spans that it has to do with."""
    if _tracer is None:
        return _NO_SPAN
    known = [link for link in links if link is not None]
    return _tracer.span(name, root=root, parent=parent, links=known, attributes=attributes)


def server_span(method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Span:
    """Of a call ("service/method") that is answered inside: a child of the caller's span, if its metadata name one."""
    # Probes would bury everything else.
    if _tracer is None or method.startswith("grpc."):
        return _NO_SPAN
    return _tracer.server_span(method, metadata)


def here() -> TraceContext | None:
    """The span around, for work that is done elsewhere; None = there is none."""
    return None if _tracer is None else _tracer.here()


def continuing(context: TraceContext | None) -> contextlib.AbstractContextManager[None]:
    """Spans made inside are children of what `here` told; None = leave it as it is."""
    if _tracer is None or context is None:
        return contextlib.nullcontext()
    return _tracer.continuing(context)


def annotate(**attributes: Attribute) -> None:
    """Add to the span around."""
    if _tracer is not None:
        _tracer.annotate(attributes)


def answered(code: grpc.StatusCode) -> None:
    """Note how the call ended whose server span is around."""
    if _tracer is not None:
        _tracer.answered(code)


def exemplar() -> dict[str, str] | None:
    """What leads from a histogram's bucket to the trace around; None = it is not traced."""
    return None if _tracer is None else _tracer.exemplar()


def client_interceptors() -> Sequence[grpc.aio.ClientInterceptor]:
    """For a channel: a span for each call that is made inside one, and who that is in the call's metadata."""
    return () if _tracer is None else _tracer.client_interceptors()
