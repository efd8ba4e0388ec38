import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { promisify } from "node:util";

import {
  credentials,
  Metadata,
  Server,
  ServerCredentials,
  type ServerUnaryCall,
  type ServiceError,
  status,
} from "@grpc/grpc-js";

import { BadRequest, ErrorInfo, Status } from "../gen/google/rpc/errors.js";
import {
  type DeepPartial,
  GetRewardInfoResponse,
  RewardServiceClient,
  RewardServiceService,
  type Sample,
  Scope,
  ScoreRequest,
  ScoreResponse,
} from "../gen/rlhf/reward/v1/reward.js";
import { answerReward, type Judgement } from "../src/reward.js";
import { rewardService } from "../src/service.js";

const server = new Server();
let client: RewardServiceClient;

before(async () => {
  const faulty = (completion: string, reference: string): Judgement => {
    if (completion === "fault") throw new Error("a secret of the server");
    return answerReward(completion, reference);
  };
  server.addService(RewardServiceService, rewardService(faulty));
  const port = await promisify(server.bindAsync.bind(server))("127.0.0.1:0", ServerCredentials.createInsecure());
  client = new RewardServiceClient(`127.0.0.1:${port}`, credentials.createInsecure());
});

after(() => {
  client.close();
  server.forceShutdown();
});

/** So that a call without an answer fails its test instead of holding it up. */
const patience = () => ({ deadline: Date.now() + 30_000 });

function score(request: DeepPartial<ScoreRequest>): Promise<ScoreResponse> {
  return new Promise((resolve, reject) => {
    client.score(ScoreRequest.fromPartial(request), new Metadata(), patience(), (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

function info(reward: string): Promise<GetRewardInfoResponse> {
  return new Promise((resolve, reject) => {
    client.getRewardInfo({ reward }, new Metadata(), patience(), (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

function sample(sampleId: string, completion: string, answer = "42"): DeepPartial<Sample> {
  return { sampleId, groupId: "g", completion, metadata: new Map([["answer", answer]]) };
}

/** What the call's error says: its code, its reason, and the paths of the wrong fields. */
async function failureOf(call: Promise<unknown>) {
  const error = await call.then(
    () => assert.fail("the call succeeded"),
    (error: ServiceError) => error,
  );
  const { details } = Status.decode(error.metadata.get("grpc-status-details-bin")[0] as Buffer);
  const [info, request] = details;
  assert.equal(info?.typeUrl, "type.googleapis.com/google.rpc.ErrorInfo");
  const { reason, domain } = ErrorInfo.decode(info.value);
  assert.equal(domain, "rlhf-services");
  const paths = request && BadRequest.decode(request.value).fieldViolations.map((each) => each.field);
  return { code: error.code, message: error.details, reason, paths };
}

test("each sample is answered under its id", async () => {
  const samples = [sample("a", "42."), sample("b", "43"), sample("c", "\ufeff42"), { sampleId: "d", groupId: "g" }];
  const { results } = await score({ runId: "each", samples });
  assert.deepEqual(
    results.map((each) => each.sampleId),
    ["a", "b", "c", "d"],
  );
  assert.deepEqual(
    results.map(({ outcome }) => (outcome?.$case === "scored" ? outcome.value.reward : outcome?.$case)),
    [1.25, 0, 0, "failed"],
  );
});

test("the same sample gets the same answer, and its id with other content fails", async () => {
  const ask = async (runId: string, completion: string) => {
    const { results } = await score({ runId, samples: [sample("a", completion)] });
    const outcome = results[0]?.outcome;
    return outcome?.$case === "failed" ? outcome.value.code : outcome?.$case;
  };
  assert.equal(await ask("repeat", "42"), "scored");
  assert.equal(await ask("repeat", "43"), "SAMPLE_ID_CLASH");
  assert.equal(await ask("repeat", "42"), "scored");
  assert.equal(await ask("another run", "43"), "scored");
});

test("the reward is described under its name and as the default", async () => {
  const described = await info("answer");
  assert.deepEqual(await info(""), described);
  assert.deepEqual(
    described,
    GetRewardInfoResponse.fromPartial({
      name: "answer",
      version: described.version,
      maxSamples: 256,
      maxRequestBytes: 4194304,
      maxConcurrentCalls: 64,
      scope: Scope.SCOPE_SAMPLE,
      requiredMetadata: ["answer"],
    }),
  );
  assert.notEqual(described.version, "");
});

test("another reward's name is not found", async () => {
  const calls = [
    () => info("other"),
    () => info(`a${"😀".repeat(5000)}`),
    () => score({ reward: "other", runId: "r", samples: [sample("a", "42")] }),
  ];
  for (const call of calls) {
    const failure = await failureOf(call());
    assert.deepEqual([failure.code, failure.reason, failure.paths], [status.NOT_FOUND, "NOT_FOUND", ["reward"]]);
  }
});

test("a malformed request is refused with the paths of its wrong fields", async () => {
  const failure = await failureOf(score({ samples: [sample("a", "42"), sample("a", "42")] }));
  assert.deepEqual(
    [failure.code, failure.reason, failure.paths],
    [status.INVALID_ARGUMENT, "INVALID_FIELD", ["run_id", "samples[1].sample_id"]],
  );
});

test("a fault of the reward is INTERNAL, keeps its cause to itself, and ends nothing else", async (t) => {
  const log = t.mock.method(console, "error", () => undefined);
  const failure = await failureOf(score({ runId: "fault", samples: [sample("a", "fault")] }));
  assert.deepEqual([failure.code, failure.reason, failure.paths], [status.INTERNAL, "INTERNAL", undefined]);
  assert.doesNotMatch(failure.message, /secret/);
  assert.equal(log.mock.callCount(), 1);
  assert.equal((await score({ runId: "fault", samples: [sample("b", "42")] })).results.length, 1);
});

test("a call whose caller is gone stops between two samples", async () => {
  let judged = 0;
  const service = rewardService((completion, reference) => {
    judged++;
    return answerReward(completion, reference);
  });
  const request = ScoreRequest.fromPartial({ runId: "gone", samples: ["a", "b", "c"].map((id) => sample(id, "42")) });
  const ask = (call: object) =>
    new Promise((resolve) => service.score(call as ServerUnaryCall<ScoreRequest, ScoreResponse>, resolve));

  await ask({ request, cancelled: false, getDeadline: () => Date.now() - 1 });
  assert.equal(judged, 0);
  const failure = await ask({
    request,
    get cancelled() {
      return judged === 2;
    },
    getDeadline: () => Infinity,
  });
  assert.equal(judged, 2);
  assert.equal((failure as ServiceError).code, status.DEADLINE_EXCEEDED);
});
