// The process: listen, serve, drain.

import { readFileSync } from "node:fs";

import { fromBinary, toBinary } from "@bufbuild/protobuf";
import { FileDescriptorProtoSchema, FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";
import { Server, ServerCredentials } from "@grpc/grpc-js";
import { ReflectionService } from "@grpc/reflection";
import { HealthImplementation } from "grpc-health-check";

import { RewardServiceService } from "../gen/rlhf/reward/v1/reward.js";
import { answerReward } from "./reward.js";
import { MAX_REQUEST_BYTES, rewardService } from "./service.js";

const GRACE_MS = 10_000;
const HEALTH_NAMES = ["", "rlhf.reward.v1.RewardService"];

const listen = process.env["LISTEN"] || "127.0.0.1:50052";
const server = new Server({ "grpc.max_receive_message_length": MAX_REQUEST_BYTES });
const health = new HealthImplementation(Object.fromEntries(HEALTH_NAMES.map((name) => [name, "SERVING"])));
health.addToServer(server);
reflection("reward.binpb", "health.binpb").addToServer(server);
server.addService(RewardServiceService, rewardService(answerReward));

server.bindAsync(listen, ServerCredentials.createInsecure(), (error, port) => {
  if (error !== null) {
    console.error(`cannot listen on ${listen}: ${error.message}`);
    process.exit(1);
  }
  console.log(`listening on ${listen.slice(0, listen.lastIndexOf(":"))}:${port}`);
});
// Once: a second signal ends the process at once.
process.once("SIGTERM", drain).once("SIGINT", drain);

function drain(): void {
  for (const name of HEALTH_NAMES) health.setStatus(name, "NOT_SERVING");
  server.tryShutdown(() => process.exit(0));
  // An open health Watch never ends by itself, and would hold up the process for ever.
  setTimeout(() => server.forceShutdown(), GRACE_MS);
}

/** Server reflection over the descriptors that the build wrote to gen/. Those of proto-loader lack `optional`. */
function reflection(...files: string[]): ReflectionService {
  const fileDescriptorProtos = files.flatMap((file) => {
    const bytes = readFileSync(new URL(`../../gen/${file}`, import.meta.url));
    return fromBinary(FileDescriptorSetSchema, bytes).file.map((descriptor) =>
      Buffer.from(toBinary(FileDescriptorProtoSchema, descriptor)),
    );
  });
  // It reads nothing but the descriptors, under any name.
  return new ReflectionService({
    all: { format: "Protocol Buffer 3 EnumDescriptorProto", type: {}, fileDescriptorProtos },
  });
}
