import assert from "node:assert/strict";
import { test } from "node:test";

import { type DeepPartial, Sample } from "../gen/rlhf/reward/v1/reward.js";
import { answerReward } from "../src/reward.js";
import { fingerprint, judge } from "../src/sample.js";

const NONE = new Set<string>();
const ANSWER = new Map([["answer", "42"]]);

function codeOf(sample: DeepPartial<Sample>, jsonKeys: Iterable<string> = []): string {
  const outcome = judge(Sample.fromPartial({ metadata: ANSWER, ...sample }), new Set(jsonKeys), answerReward);
  return outcome.$case === "failed" ? outcome.value.code : outcome.$case;
}

test("a row without the column fails, and the message names the column", () => {
  const outcome = judge(Sample.fromPartial({ completion: "42" }), NONE, answerReward);
  assert.ok(outcome.$case === "failed");
  assert.equal(outcome.value.code, "MISSING_METADATA");
  assert.match(outcome.value.message, /"answer"/);
});

test("a column that is no JSON where the call says so fails, whether or not the reward uses it", () => {
  assert.equal(codeOf({ metadata: new Map([["answer", "nope"]]) }, ["answer"]), "INVALID_METADATA");
  assert.equal(codeOf({ metadata: new Map([...ANSWER, ["row", "nope"]]) }, ["row"]), "INVALID_METADATA");
  assert.equal(codeOf({ metadata: new Map([...ANSWER, ["row", "nope"]]) }, ["answer", "absent"]), "scored");
});

test("the message of a failure stays within 1 KiB", () => {
  for (const key of ["語".repeat(5000), "\u0000".repeat(5000)]) {
    const outcome = judge(Sample.fromPartial({ metadata: new Map([[key, "nope"]]) }), new Set([key]), answerReward);
    assert.ok(outcome.$case === "failed" && Buffer.byteLength(outcome.value.message) <= 1024);
  }
});

test("a row's own column of an unlucky name is a column like any other", () => {
  assert.equal(codeOf({ metadata: new Map([...ANSWER, ["__proto__", "nope"]]) }, ["__proto__"]), "INVALID_METADATA");
});

test("a part of an unknown kind fails the sample", () => {
  // Field 2, which ContentPart does not have yet, as a newer client would send it.
  const bytes = Sample.encode(Sample.fromPartial({ messages: [{ role: "user", parts: [{}] }] })).finish();
  const part = bytes.lastIndexOf(0x12);
  const newer = Buffer.concat([bytes.subarray(0, part), Buffer.from([0x12, 2, 0x12, 0])]);
  newer[1]! += 2; // the message is longer by the part's content
  assert.equal(codeOf(Sample.decode(newer)), "UNKNOWN_CONTENT");
  assert.equal(codeOf({ messages: [{ role: "user", parts: [{ kind: { $case: "text", value: "" } }] }] }), "scored");
});

test("the rest of a turn is a JSON object or nothing", () => {
  for (const extraJson of ["nope", "null", "[]", "1", '"{}"']) {
    assert.equal(codeOf({ messages: [{ role: "tool", extraJson }] }), "INVALID_METADATA", extraJson);
  }
  for (const extraJson of ["", "{}", '{"name": "search"}']) {
    assert.equal(codeOf({ messages: [{ role: "tool", extraJson }] }), "scored", extraJson);
  }
});

test("a reward that is not finite is no score", () => {
  const sample = Sample.fromPartial({ metadata: ANSWER });
  for (const wrong of [NaN, Infinity, -Infinity]) {
    const outcomes = [
      judge(sample, NONE, () => ({ reward: wrong, components: new Map() })),
      judge(sample, NONE, () => ({ reward: 0, components: new Map([["part", wrong]]) })),
    ];
    for (const outcome of outcomes) assert.ok(outcome.$case === "failed" && outcome.value.code === "NOT_FINITE");
  }
});

test("the fingerprint tells contents apart, and nothing else", () => {
  const sample = Sample.fromPartial({
    completion: "42",
    metadata: new Map([
      ["a", "1"],
      ["b", "2"],
    ]),
  });
  const same = [
    { ...sample, groupId: "other", groupSize: 7 },
    {
      ...sample,
      metadata: new Map([
        ["b", "2"],
        ["a", "1"],
      ]),
    },
  ];
  for (const other of same) assert.equal(fingerprint(other, NONE), fingerprint(sample, NONE));
  assert.equal(fingerprint(sample, new Set(["absent"])), fingerprint(sample, NONE));
  const different = [
    { ...sample, completion: "43" },
    { ...sample, prompt: "?" },
    { ...sample, completionTokenIds: [1] },
    { ...sample, metadata: new Map([["a", "1"]]) },
  ];
  for (const other of different) assert.notEqual(fingerprint(other, NONE), fingerprint(sample, NONE));
  assert.notEqual(fingerprint(sample, new Set(["a"])), fingerprint(sample, NONE));
});
