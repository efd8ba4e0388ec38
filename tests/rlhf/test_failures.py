from __future__ import annotations

import grpc
import pytest
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from rlhf import failures
from rlhf.failures import FieldViolation, RpcFailure, from_rpc_error, is_transient, to_status
from tests.rlhf.conftest import Serve, failure_of

Code = grpc.StatusCode

MADE = {
    "invalid_argument": failures.invalid_argument("sampling.top_p", "must be in (0, 1], is 2"),
    "invalid_arguments": failures.invalid_arguments(
        [FieldViolation("run_id", "required"), FieldViolation("samples[3].sample_id", "required")]
    ),
    "not_found": failures.not_found("model", "model 'x'"),
    "weights_behind": failures.weights_behind("version 3 is asked for, 2 is live"),
    "weights_ahead": failures.weights_ahead("version 1 is asked for, 2 is live"),
    "other_run": failures.other_run("another run is live"),
    "failed_precondition": failures.failed_precondition("NO_CHAT_TEMPLATE", "the tokenizer has none"),
    "aborted": failures.aborted("STALE_VERSION", "11 is not above 12"),
    "overloaded": failures.overloaded("1024 requests wait", 1.25),
    "too_large": failures.too_large("no room for 5 GB"),
    "unavailable": failures.unavailable("loading"),
    "unavailable_until": failures.unavailable("loading", 2.5),
    "data_loss": failures.data_loss("tensor 'h.0' does not have its hash"),
    "permission_denied": failures.permission_denied("not below the root"),
    "internal": failures.internal("a fault"),
    "with_metadata": RpcFailure(Code.ABORTED, "why", reason="BUSY", metadata={"update_id": "u-1"}),
}
CODES = {
    "invalid_argument": Code.INVALID_ARGUMENT,
    "invalid_arguments": Code.INVALID_ARGUMENT,
    "not_found": Code.NOT_FOUND,
    "weights_behind": Code.FAILED_PRECONDITION,
    "weights_ahead": Code.FAILED_PRECONDITION,
    "other_run": Code.FAILED_PRECONDITION,
    "failed_precondition": Code.FAILED_PRECONDITION,
    "aborted": Code.ABORTED,
    "overloaded": Code.RESOURCE_EXHAUSTED,
    "too_large": Code.RESOURCE_EXHAUSTED,
    "unavailable": Code.UNAVAILABLE,
    "unavailable_until": Code.UNAVAILABLE,
    "data_loss": Code.DATA_LOSS,
    "permission_denied": Code.PERMISSION_DENIED,
    "internal": Code.INTERNAL,
    "with_metadata": Code.ABORTED,
}
TRANSIENT = {"overloaded", "unavailable", "unavailable_until"}


@pytest.mark.parametrize("name", MADE)
async def test_a_failure_arrives_as_it_was_raised(serve: Serve, name: str) -> None:
    async with serve({name: lambda: MADE[name]}) as served:
        received = from_rpc_error(await failure_of(served.stub.unary_unary({"raise": name})))

    assert received.code is CODES[name]
    assert vars(received) == vars(MADE[name])
    assert is_transient(received) == (name in TRANSIENT)


@pytest.mark.parametrize("name", ["invalid_arguments", "overloaded", "too_large"])
async def test_a_huge_failure_is_cut_and_keeps_its_code(serve: Serve, name: str) -> None:
    text = "ü%\n" * 5_000
    huge = {
        "invalid_arguments": failures.invalid_arguments([FieldViolation(text, text)] * 100),
        "overloaded": failures.overloaded(text, 1.0),
        "too_large": RpcFailure(Code.RESOURCE_EXHAUSTED, text, reason="A" * 9999, metadata={"k": text, text: "v"}),
    }[name]
    async with serve({name: lambda: huge}) as served:
        received = from_rpc_error(await failure_of(served.stub.unary_unary({"raise": name})))

    assert received.code is huge.code
    assert received.message.endswith("...")
    assert received.retry_after == huge.retry_after
    assert bool(received.violations) == bool(huge.violations)


@given(
    message=st.text(st.characters(codec=None), max_size=5000),
    violations=st.lists(
        st.builds(FieldViolation, st.text(st.characters(codec=None)), st.text(st.characters(codec=None))), max_size=50
    ),
    metadata=st.dictionaries(st.text(), st.text(max_size=2000), max_size=5),
    retry_after=st.none() | st.floats(-1, 1e9),
)
def test_any_failure_fits_into_the_trailers(
    message: str, violations: list[FieldViolation], metadata: dict[str, str], retry_after: float | None
) -> None:
    failure = RpcFailure(
        Code.ABORTED, message, reason="X", violations=violations, retry_after=retry_after, metadata=metadata
    )

    _, sent, ((_, details),) = to_status(failure)

    assert len(sent.encode()) <= failures.MAX_MESSAGE_BYTES
    assert failures.MAX_MESSAGE_BYTES + len(details) * 4 / 3 < 7500
    assert status_pb2.Status.FromString(details).message == sent


@pytest.mark.parametrize(
    "trailers",
    [
        None,
        grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xffno protobuf")),
        grpc.aio.Metadata(
            (
                "grpc-status-details-bin",
                status_pb2.Status(
                    code=10,
                    details=[{"type_url": "type.googleapis.com/google.rpc.ErrorInfo", "value": b"\xff"}],  # type: ignore[list-item]
                ).SerializeToString(),
            )
        ),
    ],
)
def test_an_error_without_readable_details_keeps_code_and_message(trailers: grpc.aio.Metadata | None) -> None:
    error = grpc.aio.AioRpcError(Code.ABORTED, grpc.aio.Metadata(), trailers, details="why")

    failure = from_rpc_error(error)

    assert (failure.code, failure.message, failure.reason) == (Code.ABORTED, "why", "")


def test_only_calls_that_may_succeed_later_are_transient() -> None:
    assert {code for code in Code if is_transient(RpcFailure(code, ""))} == {
        Code.UNAVAILABLE,
        Code.CANCELLED,
        Code.DEADLINE_EXCEEDED,
    }
    assert not is_transient(ValueError("not of gRPC"))


def test_an_invalid_request_needs_a_violation() -> None:
    with pytest.raises(ValueError, match="valid"):
        failures.invalid_arguments([])
