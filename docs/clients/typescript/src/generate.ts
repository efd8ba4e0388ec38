// Completes a prompt with Generate, and once more with StreamGenerate: node dist/src/generate.js PROMPT.
import { readFileSync } from "node:fs";
import { credentials, Metadata, status, type ServiceError } from "@grpc/grpc-js";
import {
  type GenerateResponse,
  GenerateRequest,
  PolicyServiceClient,
  type StreamGenerateResponse,
} from "../gen/rlhf/policy/v1/policy.js";

// Spreads calls over all addresses of the name, and makes a call again that no replica has begun to answer.
const serviceConfig = {
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [
    {
      name: [{ service: "rlhf.policy.v1.PolicyService" }],
      retryPolicy: {
        maxAttempts: 5,
        initialBackoff: "0.2s",
        maxBackoff: "5s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
};

const { TARGET = "", CA_FILE = "", TOKEN_FILE = "", DEADLINE_SECONDS = "60" } = process.env;
const authorization = `Bearer ${readFileSync(TOKEN_FILE, "utf8").trim()}`;
const token = credentials.createFromMetadataGenerator((_, done) => {
  const metadata = new Metadata();
  metadata.set("authorization", authorization);
  done(null, metadata);
});
const channel = credentials.combineChannelCredentials(credentials.createSsl(readFileSync(CA_FILE)), token);
const policy = new PolicyServiceClient(TARGET, channel, { "grpc.service_config": JSON.stringify(serviceConfig) });
const deadline = () => new Date(Date.now() + 1000 * Number(DEADLINE_SECONDS));
const request = GenerateRequest.fromPartial({
  prompt: { kind: { $case: "text", value: process.argv[2] ?? "" } },
  sampling: { temperature: 0, maxNewTokens: 16 },
});

try {
  const answer = await new Promise<GenerateResponse>((resolve, reject) => {
    policy.generate(request, new Metadata(), { deadline: deadline() }, (error, answer) =>
      error ? reject(error) : resolve(answer),
    );
  });
  console.log(answer.completions[0]?.text);
  const stream = policy.streamGenerate({ request, streamInterval: undefined }, { deadline: deadline() });
  for await (const message of stream as AsyncIterable<StreamGenerateResponse>) {
    process.stdout.write(message.delta?.text ?? "");
  }
  console.log();
} catch (error) {
  const { code, details } = error as ServiceError;
  console.error(`${status[code]}: ${details}`);
  process.exitCode = 1;
} finally {
  policy.close();
}
