"""The columns of a sample's row."""

from __future__ import annotations

from reward_server.conformance.case import Level, NotApplicable, case
from reward_server.conformance.cases.content import expect_failed
from reward_server.conformance.compare import expect_alike
from reward_server.conformance.session import Session

_KEY = "conformance_column"


@case(
    "metadata/missing",
    Level.MUST,
    "Metadata keys that every sample needs. A sample without one gets FAILED with the code MISSING_METADATA.",
)
async def missing(session: Session) -> None:
    """A sample without a required column is MISSING_METADATA."""
    for key in _required(session):
        (sample,) = session.samples(1)
        del sample.metadata[key]
        await expect_failed(session, sample, "MISSING_METADATA", f"a sample without {key!r}")


@case(
    "metadata/null",
    Level.MUST,
    "A key that is absent, and JSON null, mean that the row has no value.",
    explained_by=("metadata/missing",),
)
async def null(session: Session) -> None:
    """A required column that is JSON null is MISSING_METADATA."""
    for key in _required(session):
        (sample,) = session.samples(1)
        sample.metadata[key] = "null"
        await expect_failed(session, sample, "MISSING_METADATA", f"null as {key!r}", json_metadata_keys=[key])


@case(
    "metadata/not-json",
    Level.MUST,
    "A value that is not JSON under a key of json_metadata_keys = FAILED with the code INVALID_METADATA.",
)
async def not_json(session: Session) -> None:
    """A value under a key of json_metadata_keys that is not JSON is INVALID_METADATA."""
    for text in ("{", "", "plain text", "NaN"):
        (sample,) = session.samples(1)
        sample.metadata[_KEY] = text
        what = f"{text!r} under a key of json_metadata_keys"
        await expect_failed(session, sample, "INVALID_METADATA", what, json_metadata_keys=[_KEY])


@case(
    "metadata/plain-text",
    Level.MUST,
    "Keys of Sample.metadata whose values are JSON text in this call; values under other keys are plain strings.",
    explained_by=("metadata/extra-columns",),
)
async def plain_text(session: Session) -> None:
    """A value that looks like JSON gone wrong is no mistake under any other key."""
    samples = session.unit()
    expected = await session.judge(samples)
    with_text = session.renamed(samples)
    for sample in with_text:
        sample.metadata[_KEY] = "{"
    expect_alike(expected, await session.judge(with_text), "with a text that is not JSON", session.last)


@case("metadata/unused-json-key", Level.MUST, "A key that no sample has is no mistake.")
async def unused_json_key(session: Session) -> None:
    """A key of json_metadata_keys that no sample has changes nothing."""
    samples = session.unit()
    expected = await session.judge(samples)
    results = await session.judge(session.renamed(samples), json_metadata_keys=[_KEY])
    expect_alike(expected, results, "with a key of json_metadata_keys that no sample has", session.last)


@case("metadata/extra-columns", Level.MUST, "The other columns of the prompt's row in the data; MAY be empty.")
async def extra_columns(session: Session) -> None:
    """Columns that the server does not know, JSON or not, change nothing."""
    samples = session.unit()
    expected = await session.judge(samples)
    extended = session.renamed(samples)
    for sample in extended:
        sample.metadata[_KEY] = '{"nested": [1, 2.5, null, "é"]}'
        sample.metadata[f"{_KEY}_text"] = "text"
    results = await session.judge(extended, json_metadata_keys=[_KEY])
    expect_alike(expected, results, "with columns that the server does not know", session.last)


def _required(session: Session) -> list[str]:
    if not session.info.required_metadata:
        raise NotApplicable("the server needs no metadata")
    return list(session.info.required_metadata)
