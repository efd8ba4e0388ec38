import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { Sample } from "../gen/rlhf/reward/v1/reward.js";
import { answerReward, trim } from "../src/reward.js";
import { judge } from "../src/sample.js";

interface Vector {
  id: string;
  completion: string;
  metadata: Record<string, string>;
  json_metadata_keys: string[];
  outcome: "scored" | "failed";
  code?: string;
  reward?: number;
  components?: Record<string, number>;
}

// The same file for all six languages; it lies outside this folder.
const GOLDEN = new URL("../../../../../tests/reward_server/examples/golden/vectors.json", import.meta.url);

const rewardOf = (completion: string, reference: string) => answerReward(completion, reference).reward;

test("a match, a full stop and the length add up", () => {
  assert.equal(rewardOf("42", "42"), 1);
  assert.equal(rewardOf("42!", "42"), 1.25);
  assert.equal(rewardOf("43", "42"), 0);
  assert.deepEqual(
    answerReward(`42.${" ".repeat(77)}`, "42").components,
    new Map([
      ["match", 1],
      ["format", 0.25],
      ["length", -0.0625],
    ]),
  );
});

test("the length counts code points and costs one at most", () => {
  assert.equal(rewardOf("😀".repeat(64), "42"), 0);
  assert.equal(rewardOf("😀".repeat(65), "42"), -1 / 256);
  assert.equal(rewardOf("a".repeat(5000), "42"), -1);
});

test("only the four white spaces are trimmed", () => {
  assert.equal(trim(" \t\r\n42 \n"), "42");
  assert.equal(trim(" \n "), "");
  assert.equal(trim("\u00a042\ufeff"), "\u00a042\ufeff");
});

test("every golden vector comes out to the last bit", () => {
  const vectors = JSON.parse(readFileSync(GOLDEN, "utf8")) as Vector[];
  assert.ok(vectors.length >= 200);
  for (const vector of vectors) {
    const sample = Sample.fromPartial({
      completion: vector.completion,
      metadata: new Map(Object.entries(vector.metadata)),
    });
    const outcome = judge(sample, new Set(vector.json_metadata_keys), answerReward);
    assert.equal(outcome.$case, vector.outcome, vector.id);
    if (outcome.$case === "failed") {
      assert.equal(outcome.value.code, vector.code, vector.id);
    } else {
      assert.equal(outcome.value.reward, vector.reward, vector.id);
      assert.deepEqual(Object.fromEntries(outcome.value.components), vector.components, vector.id);
    }
  }
});
