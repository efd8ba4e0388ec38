package dev.rlhf.example;

import com.google.protobuf.Any;
import com.google.rpc.BadRequest;
import com.google.rpc.BadRequest.FieldViolation;
import com.google.rpc.Code;
import com.google.rpc.ErrorInfo;
import com.google.rpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.util.stream.Collectors;

/** Every status but OK that this server answers by itself, with the google.rpc details that the contract asks for. */
final class Failures {
  private static final int SHOWN_CODE_POINTS = 100;

  private Failures() {}

  static StatusRuntimeException invalidFields(BadRequest violations) {
    return withFields(Code.INVALID_ARGUMENT, "INVALID_FIELD", violations);
  }

  static StatusRuntimeException unknownReward(String name, String only) {
    String description = "\"%s\" is not served here, only \"%s\" is".formatted(shorten(name), only);
    FieldViolation.Builder violation = FieldViolation.newBuilder().setField("reward").setDescription(description);
    return withFields(
        Code.NOT_FOUND, "NOT_FOUND", BadRequest.newBuilder().addFieldViolations(violation).build());
  }

  /** A fault of ours: what it was is for the log alone. */
  static StatusRuntimeException internal() {
    return StatusProto.toStatusRuntimeException(
        status(Code.INTERNAL, "INTERNAL", "the server failed; its log says why").build());
  }

  /** As much of a caller's text as a message may repeat: the contract bounds messages, and so does gRPC. */
  static String shorten(String text) {
    // By code points, since half of a surrogate pair could not be sent.
    boolean fits = text.codePointCount(0, text.length()) <= SHOWN_CODE_POINTS;
    return fits ? text : text.substring(0, text.offsetByCodePoints(0, SHOWN_CODE_POINTS));
  }

  private static StatusRuntimeException withFields(Code code, String reason, BadRequest violations) {
    String message =
        violations.getFieldViolationsList().stream()
            .map(violation -> violation.getField() + ": " + violation.getDescription())
            .collect(Collectors.joining("; "));
    return StatusProto.toStatusRuntimeException(
        status(code, reason, message).addDetails(Any.pack(violations)).build());
  }

  private static Status.Builder status(Code code, String reason, String message) {
    ErrorInfo info = ErrorInfo.newBuilder().setDomain("rlhf-services").setReason(reason).build();
    return Status.newBuilder().setCode(code.getNumber()).setMessage(message).addDetails(Any.pack(info));
  }
}
