package dev.rlhf.example;

import com.google.protobuf.CodedOutputStream;
import dev.rlhf.reward.v1.ChatMessage;
import dev.rlhf.reward.v1.ContentPart;
import dev.rlhf.reward.v1.Failed;
import dev.rlhf.reward.v1.Sample;
import dev.rlhf.reward.v1.SampleResult;
import dev.rlhf.reward.v1.Scored;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.stream.DoubleStream;
import tools.jackson.core.JacksonException;
import tools.jackson.databind.JsonNode;
import tools.jackson.databind.json.JsonMapper;

/** One sample: what the contract asks of it before the reward sees it, and what becomes of it. */
final class Samples {
  private static final JsonMapper JSON = new JsonMapper();

  private Samples() {}

  /** Judges the sample. What is wrong with it alone is its FAILED, and no matter of the call. */
  static SampleResult judge(Sample sample, Set<String> jsonKeys, Reward reward) {
    try {
      for (int index = 0; index < sample.getMessagesCount(); index++) {
        checkMessage(sample.getMessages(index), "messages[" + index + "]");
      }
      Reward.Judgement judgement = reward.judge(sample.getCompletion(), reference(sample.getMetadataMap(), jsonKeys));
      if (!isFinite(judgement)) {
        throw new Unjudgeable("NOT_FINITE", "the reward or one of its components is NaN or infinite");
      }
      Scored.Builder scored = Scored.newBuilder().setReward(judgement.reward());
      scored.putAllComponents(judgement.components());
      return SampleResult.newBuilder().setSampleId(sample.getSampleId()).setScored(scored).build();
    } catch (Unjudgeable failure) {
      return failed(sample, failure.code, failure.getMessage());
    }
  }

  static SampleResult failed(Sample sample, String code, String message) {
    Failed.Builder failed = Failed.newBuilder().setCode(code).setMessage(message);
    return SampleResult.newBuilder().setSampleId(sample.getSampleId()).setFailed(failed).build();
  }

  /** A digest of all that a score may depend on: the sample without its group, and which of its metadata is JSON. */
  static String fingerprint(Sample sample, Set<String> jsonKeys) {
    Sample content = sample.toBuilder().clearGroupId().clearGroupSize().build();
    Map<String, Boolean> isJson = new TreeMap<>();
    sample.getMetadataMap().keySet().forEach(key -> isJson.put(key, jsonKeys.contains(key)));
    try {
      MessageDigest digest = MessageDigest.getInstance("SHA-256");
      digest.update(isJson.values().toString().getBytes(StandardCharsets.US_ASCII));
      byte[] bytes = new byte[content.getSerializedSize()];
      CodedOutputStream output = CodedOutputStream.newInstance(bytes);
      // Equal maps may hold their entries in different orders.
      output.useDeterministicSerialization();
      content.writeTo(output);
      return HexFormat.of().formatHex(digest.digest(bytes));
    } catch (NoSuchAlgorithmException error) {
      throw new AssertionError("every Java platform has SHA-256", error);
    } catch (IOException error) {
      throw new UncheckedIOException(error);
    }
  }

  private static void checkMessage(ChatMessage message, String path) throws Unjudgeable {
    for (ContentPart part : message.getPartsList()) {
      // A kind that came after this server was built is no kind to it.
      if (part.getKindCase() == ContentPart.KindCase.KIND_NOT_SET) {
        throw new Unjudgeable("UNKNOWN_CONTENT", path + " has a part of a kind that is not known here");
      }
    }
    if (!message.getExtraJson().isEmpty() && !parse(message.getExtraJson(), path + ".extra_json").isObject()) {
      throw new Unjudgeable("INVALID_METADATA", path + ".extra_json is not a JSON object");
    }
  }

  /** The reference answer in the row. The other columns of JSON are checked too, so that no mistake stays hidden. */
  private static String reference(Map<String, String> metadata, Set<String> jsonKeys) throws Unjudgeable {
    String reference = metadata.get(AnswerReward.COLUMN);
    for (Map.Entry<String, String> entry : metadata.entrySet()) {
      if (!jsonKeys.contains(entry.getKey())) {
        continue;
      }
      JsonNode value = parse(entry.getValue(), "the column \"" + Failures.shorten(entry.getKey()) + "\"");
      if (entry.getKey().equals(AnswerReward.COLUMN)) {
        // JSON null says what an absent key says: the row has no value.
        reference = value.isNull() ? null : value.isString() ? value.stringValue() : entry.getValue();
      }
    }
    if (reference == null) {
      throw new Unjudgeable("MISSING_METADATA", "the row has no value in the column \"" + AnswerReward.COLUMN + "\"");
    }
    return reference;
  }

  private static JsonNode parse(String text, String what) throws Unjudgeable {
    String cause = "it is empty";
    try {
      JsonNode value = JSON.readTree(text);
      if (!value.isMissingNode()) {
        return value;
      }
    } catch (JacksonException error) {
      cause = Failures.shorten(error.getOriginalMessage());
    }
    throw new Unjudgeable("INVALID_METADATA", what + " cannot be read as JSON: " + cause);
  }

  private static boolean isFinite(Reward.Judgement judgement) {
    DoubleStream components = judgement.components().values().stream().mapToDouble(Double::doubleValue);
    return Double.isFinite(judgement.reward()) && components.allMatch(Double::isFinite);
  }

  private static final class Unjudgeable extends Exception {
    private final String code;

    Unjudgeable(String code, String message) {
      super(message);
      this.code = code;
    }
  }
}
