// What a request must be. Everything here is the caller's mistake, and refuses the whole call.

import type { Sample, ScoreRequest } from "../gen/rlhf/reward/v1/reward.js";

/** A wrong field: its path as reward.proto writes it, and what is wrong with it. */
export interface Violation {
  field: string;
  description: string;
}

const MAX_ID_BYTES = 256;
// Enough to see the pattern; more could make the trailing metadata too large to arrive.
const MAX_VIOLATIONS = 8;

/** The first mistakes of a request; none if it is well formed. */
export function violations(request: ScoreRequest, maxSamples: number): Violation[] {
  const found: Violation[] = [];
  for (const violation of all(request, maxSamples)) {
    if (found.push(violation) === MAX_VIOLATIONS) break;
  }
  return found;
}

function* all({ runId, samples }: ScoreRequest, maxSamples: number): Generator<Violation> {
  yield* id("run_id", runId);
  if (samples.length === 0) {
    yield { field: "samples", description: "at least one sample is required" };
  } else if (samples.length > maxSamples) {
    yield { field: "samples", description: `${samples.length} samples; max_samples is ${maxSamples}` };
    return;
  }
  const seen = new Map<string, number>();
  for (const [index, sample] of samples.entries()) {
    const path = `samples[${index}]`;
    yield* id(`${path}.sample_id`, sample.sampleId);
    const first = seen.get(sample.sampleId);
    if (first === undefined) {
      seen.set(sample.sampleId, index);
    } else if (sample.sampleId !== "") {
      yield { field: `${path}.sample_id`, description: `the same as samples[${first}].sample_id` };
    }
    if (sample.groupId === "") yield { field: `${path}.group_id`, description: "required" };
    yield* ranges(`${path}.sampled_ranges`, sample);
  }
}

function* id(field: string, value: string): Generator<Violation> {
  const bytes = Buffer.byteLength(value);
  if (bytes === 0) yield { field, description: "required" };
  if (bytes > MAX_ID_BYTES) yield { field, description: `${bytes} bytes; the limit is ${MAX_ID_BYTES}` };
}

function* ranges(path: string, sample: Sample): Generator<Violation> {
  const tokens = sample.completionTokenIds.length;
  let end = 0;
  for (const [index, { first, pastLast }] of sample.sampledRanges.entries()) {
    if (first < end) {
      yield { field: `${path}[${index}].first`, description: `${first} is below ${end}, where the range before ends` };
    }
    if (pastLast <= first) {
      yield { field: `${path}[${index}].past_last`, description: `${pastLast} is not above first, ${first}` };
    } else if (pastLast > tokens) {
      yield {
        field: `${path}[${index}].past_last`,
        description: `${pastLast} is beyond ${tokens} completion_token_ids`,
      };
    }
    end = Math.max(end, pastLast);
  }
}
