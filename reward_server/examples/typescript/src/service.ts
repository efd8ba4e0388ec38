import { setImmediate } from "node:timers/promises";

import type { sendUnaryData, ServerUnaryCall } from "@grpc/grpc-js";

import {
  GetRewardInfoResponse,
  type RewardServiceServer,
  type Sample,
  type SampleResult,
  Scope,
  type ScoreRequest,
  type ScoreResponse,
} from "../gen/rlhf/reward/v1/reward.js";
import { callerGone, invalidFields, toStatus, unknownReward } from "./failures.js";
import { Memory } from "./memory.js";
import { COLUMN, NAME, type Reward, VERSION } from "./reward.js";
import { failed, fingerprint, judge, type Outcome } from "./sample.js";
import { violations } from "./validation.js";

export const MAX_REQUEST_BYTES = 4 * 1024 * 1024;
const MAX_SAMPLES = 256;
const MAX_CONCURRENT_CALLS = 64;
const REMEMBERED_SAMPLES = 65_536;

/** RewardService with one reward, under its name and as the default. */
export function rewardService(reward: Reward): RewardServiceServer {
  const memory = new Memory<{ content: string; outcome: Outcome }>(REMEMBERED_SAMPLES);

  async function score(call: ServerUnaryCall<ScoreRequest, ScoreResponse>): Promise<ScoreResponse> {
    const request = call.request;
    const mistakes = violations(request, MAX_SAMPLES);
    if (mistakes.length > 0) throw invalidFields(mistakes);
    checkName(request.reward);
    const jsonKeys = new Set(request.jsonMetadataKeys);
    const results: SampleResult[] = [];
    for (const sample of request.samples) {
      // Everything runs on one thread: without this pause a cancellation, and any other call, would have to wait.
      await setImmediate();
      if (call.cancelled || Date.now() >= Number(call.getDeadline())) throw callerGone();
      results.push({ sampleId: sample.sampleId, outcome: outcomeOf(request.runId, sample, jsonKeys) });
    }
    return { results };
  }

  /** The first answer again where the sample is remembered, a new one otherwise. */
  function outcomeOf(runId: string, sample: Sample, jsonKeys: ReadonlySet<string>): Outcome {
    // Ids are unique within a run only.
    const key = JSON.stringify([runId, sample.sampleId]);
    const content = fingerprint(sample, jsonKeys);
    const known = memory.get(key);
    if (known === undefined) {
      const outcome = judge(sample, jsonKeys, reward);
      memory.set(key, { content, outcome });
      return outcome;
    }
    if (known.content !== content) {
      return failed("SAMPLE_ID_CLASH", "this sample_id came with other content before");
    }
    return known.outcome;
  }

  async function getRewardInfo(name: string): Promise<GetRewardInfoResponse> {
    checkName(name);
    return GetRewardInfoResponse.fromPartial({
      name: NAME,
      version: VERSION,
      maxSamples: MAX_SAMPLES,
      maxRequestBytes: MAX_REQUEST_BYTES,
      maxConcurrentCalls: MAX_CONCURRENT_CALLS,
      scope: Scope.SCOPE_SAMPLE,
      requiredMetadata: [COLUMN],
    });
  }

  return {
    score: (call, callback) => answer(score(call), callback),
    getRewardInfo: (call, callback) => answer(getRewardInfo(call.request.reward), callback),
  };
}

function checkName(name: string): void {
  if (name !== "" && name !== NAME) throw unknownReward(name, NAME);
}

/** Answers a call. grpc-js does not wait for promises: one that was rejected unseen would end the process. */
function answer<Response>(response: Promise<Response>, callback: sendUnaryData<Response>): void {
  response.then(
    (value) => callback(null, value),
    (error: unknown) => callback(toStatus(error)),
  );
}
