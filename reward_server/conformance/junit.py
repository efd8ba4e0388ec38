"""A run as JUnit XML, which CI systems show."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from reward_server.conformance.report import Report
from reward_server.conformance.runner import Verdict

# XML 1.0 can't hold these, not even escaped.
_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: Report) -> str:
    """One test case for each case; known failures and those that are not applicable are skipped ones."""
    outcome = report.outcome
    failures = outcome.count(Verdict.FAILED) + len(outcome.stale)
    skipped = outcome.count(Verdict.NOT_APPLICABLE) + outcome.count(Verdict.KNOWN_FAILURE)
    tests = len(outcome.results) + len(outcome.stale)
    seconds = sum(each.seconds for each in outcome.results)
    counts = {
        "name": "reward-conformance",
        "tests": str(tests),
        "failures": str(failures),
        "errors": "0",
        "skipped": str(skipped),
        "time": f"{seconds:.3f}",
    }
    suites = ElementTree.Element("testsuites", {key: counts[key] for key in counts if key != "skipped"})
    suite = ElementTree.SubElement(suites, "testsuite", counts)
    for each in outcome.results:
        theme, _, name = each.case.id.partition("/")
        attributes = {"classname": f"reward-conformance.{theme}", "name": name, "time": f"{each.seconds:.3f}"}
        entry = ElementTree.SubElement(suite, "testcase", attributes)
        if each.verdict is Verdict.FAILED:
            attributes = {"message": _clean(each.why), "type": each.case.level.value}
            failure = ElementTree.SubElement(entry, "failure", attributes)
            failure.text = _clean("\n".join(f"{name}: {text}" for name, text in report.details(each)))
        elif each.verdict is not Verdict.PASSED:
            ElementTree.SubElement(entry, "skipped", {"message": _clean(f"{each.verdict.value}: {each.why}")})
    for line in outcome.stale:
        attributes = {"classname": "reward-conformance.known-failures", "name": line, "time": "0.000"}
        entry = ElementTree.SubElement(suite, "testcase", attributes)
        ElementTree.SubElement(entry, "failure", {"message": f"stale known failure: {line}", "type": "stale"})
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
