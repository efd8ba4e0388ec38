import assert from "node:assert/strict";
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { createServer, type AddressInfo } from "node:net";
import { createInterface } from "node:readline";
import { test, type TestContext } from "node:test";
import { fileURLToPath } from "node:url";

import { Client, credentials } from "@grpc/grpc-js";
import { service as healthService } from "grpc-health-check";

const MAIN = fileURLToPath(new URL("../src/main.js", import.meta.url));

function start(t: TestContext, listen: string): ChildProcess {
  const child = spawn(process.execPath, [MAIN], { env: { LISTEN: listen }, stdio: ["ignore", "pipe", "pipe"] });
  t.after(() => child.kill("SIGKILL"));
  return child;
}

async function address(child: ChildProcess): Promise<string> {
  const [line] = (await once(createInterface(child.stdout!), "line")) as [string];
  assert.match(line, /^listening on 127\.0\.0\.1:[1-9]\d*$/);
  return line.slice("listening on ".length);
}

test("SIGTERM tells those who watch the health, and ends with status 0", async (t) => {
  const child = start(t, "127.0.0.1:0");
  const client = new Client(await address(child), credentials.createInsecure());
  t.after(() => client.close());
  const { path, requestSerialize, responseDeserialize } = healthService["Watch"]!;
  const watch = client.makeServerStreamRequest(path, requestSerialize, responseDeserialize, {
    service: "rlhf.reward.v1.RewardService",
  });
  watch.on("error", () => undefined); // the cancellation below
  assert.deepEqual((await once(watch, "data"))[0], { status: "SERVING" });
  child.kill("SIGTERM");
  assert.deepEqual((await once(watch, "data"))[0], { status: "NOT_SERVING" });
  watch.cancel();
  assert.deepEqual(await once(child, "exit"), [0, null]);
});

test("a port that is taken is an error", async (t) => {
  const taken = createServer().listen(0, "127.0.0.1");
  t.after(() => taken.close());
  await once(taken, "listening");
  const child = start(t, `127.0.0.1:${(taken.address() as AddressInfo).port}`);
  const [code] = await once(child, "exit");
  assert.equal(code, 1);
});
