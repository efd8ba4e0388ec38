// Every status but OK that this server answers by itself, with the google.rpc details that the contract asks for.

import { Metadata, type StatusObject, status } from "@grpc/grpc-js";

import { BadRequest, ErrorInfo, Status } from "../gen/google/rpc/errors.js";
import type { Violation } from "./validation.js";

/** A status about the whole call; handlers throw it. */
export class CallFailure extends Error {
  constructor(
    readonly code: status,
    readonly reason: string,
    message: string,
    readonly violations: Violation[] = [],
  ) {
    super(message);
  }
}

export function invalidFields(violations: Violation[]): CallFailure {
  const message = violations.map(({ field, description }) => `${field}: ${description}`).join("; ");
  return new CallFailure(status.INVALID_ARGUMENT, "INVALID_FIELD", message, violations);
}

export function unknownReward(name: string, only: string): CallFailure {
  const description = `${quote(name)} is not served here, only ${quote(only)} is`;
  return new CallFailure(status.NOT_FOUND, "NOT_FOUND", `reward: ${description}`, [{ field: "reward", description }]);
}

/** For the log of a proxy at most: who asked has given up. */
export function callerGone(): CallFailure {
  return new CallFailure(status.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "cancelled, or not done by the deadline");
}

/** A fault of ours; what it was is for the log alone. */
function internal(error: unknown): CallFailure {
  console.error(error);
  return new CallFailure(status.INTERNAL, "INTERNAL", "the server failed; its log says why");
}

/** The status that the error of a handler becomes. */
export function toStatus(error: unknown): Partial<StatusObject> {
  const { code, message, reason, violations } = error instanceof CallFailure ? error : internal(error);
  const details = [pack("ErrorInfo", ErrorInfo.encode({ reason, domain: "rlhf-services" }).finish())];
  if (violations.length > 0) {
    details.push(pack("BadRequest", BadRequest.encode({ fieldViolations: violations }).finish()));
  }
  const metadata = new Metadata();
  metadata.set("grpc-status-details-bin", Buffer.from(Status.encode({ code, message, details }).finish()));
  return { code, details: message, metadata };
}

/**
 * As much of a caller's text as a message may repeat: the contract bounds messages, and so does gRPC. What slice leaves
 * of a surrogate pair is escaped, for gRPC could not send it.
 */
export function quote(text: string): string {
  return JSON.stringify(text.slice(0, 100));
}

function pack(type: string, value: Uint8Array): Status["details"][number] {
  return { typeUrl: `type.googleapis.com/google.rpc.${type}`, value: Buffer.from(value) };
}
