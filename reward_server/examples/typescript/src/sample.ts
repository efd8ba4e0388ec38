// One sample: what the contract asks of it before the reward sees it, and what becomes of it.

import { createHash } from "node:crypto";

import { type ChatMessage, Sample, type SampleResult } from "../gen/rlhf/reward/v1/reward.js";
import { quote } from "./failures.js";
import { COLUMN, type Reward, trim } from "./reward.js";

/** What is final. A reward that may come later answers { $case: "pending" }, which must never be remembered. */
export type Outcome = Extract<SampleResult["outcome"], { $case: "scored" | "failed" }>;

/** Judges the sample. What is wrong with it alone is its FAILED, and no matter of the call. */
export function judge(sample: Sample, jsonKeys: ReadonlySet<string>, reward: Reward): Outcome {
  try {
    sample.messages.forEach(checkMessage);
    const value = reward(sample.completion, reference(sample.metadata, jsonKeys));
    if (![value.reward, ...value.components.values()].every(Number.isFinite)) {
      return failed("NOT_FINITE", "the reward or one of its components is NaN or infinite");
    }
    return { $case: "scored", value: { ...value, tokenRewards: [] } };
  } catch (error) {
    if (error instanceof Unjudgeable) return failed(error.code, error.message);
    throw error;
  }
}

export function failed(code: string, message: string): Outcome {
  return { $case: "failed", value: { code, message } };
}

/** A digest of all that a score may depend on: the sample without its group, and which of its metadata is JSON. */
export function fingerprint(sample: Sample, jsonKeys: ReadonlySet<string>): string {
  // Equal maps may come in different orders.
  const metadata = [...sample.metadata].sort(([a], [b]) => (a < b ? -1 : 1));
  const content = Sample.encode({ ...sample, groupId: "", groupSize: 0, metadata: new Map(metadata) }).finish();
  const json = metadata.map(([key]) => key).filter((key) => jsonKeys.has(key));
  return createHash("sha256").update(JSON.stringify(json)).update(content).digest("base64");
}

class Unjudgeable extends Error {
  constructor(
    readonly code: string,
    message: string,
  ) {
    super(message);
  }
}

function checkMessage(message: ChatMessage, index: number): void {
  // A kind that came after this server was built is dropped on decoding, so an unset one is all that is left of it.
  if (message.parts.some((part) => part.kind === undefined)) {
    throw new Unjudgeable("UNKNOWN_CONTENT", `messages[${index}] has a part of a kind that is not known here`);
  }
  if (message.extraJson !== "") {
    const extra = parse(message.extraJson, `messages[${index}].extra_json`);
    if (typeof extra !== "object" || extra === null || Array.isArray(extra)) {
      throw new Unjudgeable("INVALID_METADATA", `messages[${index}].extra_json is not a JSON object`);
    }
  }
}

/** The reference answer in the row. The other columns of JSON are checked as well, so that no mistake stays hidden. */
function reference(metadata: Sample["metadata"], jsonKeys: ReadonlySet<string>): string {
  const parsed = new Map<string, unknown>();
  for (const [key, text] of metadata) {
    if (jsonKeys.has(key)) parsed.set(key, parse(text, `the column ${quote(key)}`));
  }
  const text = metadata.get(COLUMN);
  const value = parsed.has(COLUMN) ? parsed.get(COLUMN) : text;
  // JSON null says what an absent key says: the row has no value.
  if (text === undefined || value === null) {
    throw new Unjudgeable("MISSING_METADATA", `the row has no value in the column "${COLUMN}"`);
  }
  return typeof value === "string" ? value : trim(text);
}

function parse(text: string, what: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    throw new Unjudgeable("INVALID_METADATA", `${what} is not JSON`);
  }
}
