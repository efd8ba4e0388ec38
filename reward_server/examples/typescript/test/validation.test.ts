import assert from "node:assert/strict";
import { test } from "node:test";

import { type DeepPartial, ScoreRequest, type TokenRange } from "../gen/rlhf/reward/v1/reward.js";
import { violations } from "../src/validation.js";

const SAMPLE = { sampleId: "a", groupId: "g" };

function wrongFields(request: DeepPartial<ScoreRequest>): string[] {
  return violations(ScoreRequest.fromPartial({ runId: "r", samples: [SAMPLE], ...request }), 4).map(
    (each) => each.field,
  );
}

function wrongRanges(completionTokenIds: number[], sampledRanges: TokenRange[]): string[] {
  return wrongFields({ samples: [{ ...SAMPLE, completionTokenIds, sampledRanges }] });
}

test("a well-formed request has no violations", () => {
  assert.deepEqual(wrongFields({}), []);
  assert.deepEqual(wrongFields({ runId: "é".repeat(128), samples: [{ ...SAMPLE, sampleId: "é".repeat(128) }] }), []);
});

test("run_id is required and has a limit in bytes", () => {
  assert.deepEqual(wrongFields({ runId: "" }), ["run_id"]);
  assert.deepEqual(wrongFields({ runId: "é".repeat(129) }), ["run_id"]);
});

test("a call holds from one sample to max_samples, and the description names both numbers", () => {
  assert.deepEqual(wrongFields({ samples: [] }), ["samples"]);
  const samples = ["a", "b", "c", "d", "e"].map((sampleId) => ({ ...SAMPLE, sampleId }));
  assert.deepEqual(wrongFields({ samples: samples.slice(0, 4) }), []);
  assert.deepEqual(violations(ScoreRequest.fromPartial({ runId: "r", samples }), 4), [
    { field: "samples", description: "5 samples; max_samples is 4" },
  ]);
});

test("ids of samples are required, short and different", () => {
  const samples = [SAMPLE, { sampleId: "a".repeat(257), groupId: "g" }, { sampleId: "", groupId: "" }, SAMPLE];
  assert.deepEqual(wrongFields({ samples }), [
    "samples[1].sample_id",
    "samples[2].sample_id",
    "samples[2].group_id",
    "samples[3].sample_id",
  ]);
});

test("sampled ranges ascend, do not overlap, and lie within the tokens", () => {
  const tokens = [7, 8, 9];
  const path = "samples[0].sampled_ranges";
  assert.deepEqual(
    wrongRanges(tokens, [
      { first: 0, pastLast: 1 },
      { first: 1, pastLast: 3 },
    ]),
    [],
  );
  assert.deepEqual(
    wrongRanges(tokens, [
      { first: 0, pastLast: 2 },
      { first: 1, pastLast: 3 },
    ]),
    [`${path}[1].first`],
  );
  assert.deepEqual(
    wrongRanges(tokens, [
      { first: 2, pastLast: 3 },
      { first: 0, pastLast: 1 },
    ]),
    [`${path}[1].first`],
  );
  assert.deepEqual(wrongRanges(tokens, [{ first: 1, pastLast: 1 }]), [`${path}[0].past_last`]);
  assert.deepEqual(wrongRanges(tokens, [{ first: 0, pastLast: 4 }]), [`${path}[0].past_last`]);
  assert.deepEqual(wrongRanges([], [{ first: 0, pastLast: 1 }]), [`${path}[0].past_last`]);
});

test("of many mistakes the first eight are told", () => {
  assert.equal(wrongFields({ runId: "", samples: Array(4).fill({ sampledRanges: Array(9).fill({}) }) }).length, 8);
});
