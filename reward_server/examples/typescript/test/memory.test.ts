import assert from "node:assert/strict";
import { test } from "node:test";

import { Memory } from "../src/memory.js";

test("beyond the bound the least recently used is forgotten", () => {
  const memory = new Memory<number>(2);
  memory.set("a", 1);
  memory.set("b", 2);
  assert.equal(memory.get("a"), 1);
  memory.set("c", 3);
  assert.deepEqual(
    ["a", "b", "c"].map((key) => memory.get(key)),
    [1, undefined, 3],
  );
});

test("setting a key again takes no room", () => {
  const memory = new Memory<number>(2);
  for (const key of ["a", "b", "b", "b"]) memory.set(key, 1);
  assert.equal(memory.get("a"), 1);
});
