package dev.rlhf.example;

import com.google.rpc.BadRequest;
import com.google.rpc.BadRequest.FieldViolation;
import dev.rlhf.reward.v1.Sample;
import dev.rlhf.reward.v1.ScoreRequest;
import dev.rlhf.reward.v1.TokenRange;
import java.util.HashMap;
import java.util.Map;

/** What a request must be. Everything here is the caller's mistake, and refuses the whole call. */
final class Validation {
  private static final int MAX_ID_BYTES = 256;
  // Enough to see the pattern; more could make the trailing metadata too large to arrive.
  private static final int MAX_VIOLATIONS = 8;

  private final BadRequest.Builder found = BadRequest.newBuilder();

  private Validation() {}

  /** The first mistakes of a request, each with its path as reward.proto writes it; none if it is well formed. */
  static BadRequest violations(ScoreRequest request, int maxSamples) {
    Validation validation = new Validation();
    validation.check(request, maxSamples);
    return validation.found.build();
  }

  private void check(ScoreRequest request, int maxSamples) {
    checkId("run_id", request.getRunIdBytes().size());
    int count = request.getSamplesCount();
    if (count == 0) {
      add("samples", "at least one sample is required");
    } else if (count > maxSamples) {
      add("samples", "%d samples; max_samples is %d", count, maxSamples);
      return;
    }
    Map<String, Integer> indexes = new HashMap<>();
    for (int index = 0; index < count; index++) {
      Sample sample = request.getSamples(index);
      String path = "samples[" + index + "]";
      checkId(path + ".sample_id", sample.getSampleIdBytes().size());
      Integer first = indexes.putIfAbsent(sample.getSampleId(), index);
      if (first != null && !sample.getSampleId().isEmpty()) {
        add(path + ".sample_id", "the same as samples[%d].sample_id", first);
      }
      if (sample.getGroupId().isEmpty()) {
        add(path + ".group_id", "required");
      }
      checkRanges(path + ".sampled_ranges", sample);
    }
  }

  private void checkId(String path, int bytes) {
    if (bytes == 0) {
      add(path, "required");
    } else if (bytes > MAX_ID_BYTES) {
      add(path, "%d bytes; the limit is %d", bytes, MAX_ID_BYTES);
    }
  }

  private void checkRanges(String path, Sample sample) {
    long tokens = sample.getCompletionTokenIdsCount();
    long end = 0;
    for (int index = 0; index < sample.getSampledRangesCount(); index++) {
      TokenRange range = sample.getSampledRanges(index);
      // Java has no unsigned int: those of the wire above 2^31 - 1 would come out negative.
      long first = Integer.toUnsignedLong(range.getFirst());
      long pastLast = Integer.toUnsignedLong(range.getPastLast());
      if (first < end) {
        add(path + "[" + index + "].first", "%d is below %d, where the range before ends", first, end);
      }
      if (pastLast <= first) {
        add(path + "[" + index + "].past_last", "%d is not above first, %d", pastLast, first);
      } else if (pastLast > tokens) {
        add(path + "[" + index + "].past_last", "%d is beyond %d completion_token_ids", pastLast, tokens);
      }
      end = Math.max(end, pastLast);
    }
  }

  private void add(String path, String description, Object... values) {
    if (found.getFieldViolationsCount() < MAX_VIOLATIONS) {
      found.addFieldViolations(
          FieldViolation.newBuilder().setField(path).setDescription(description.formatted(values)));
    }
  }
}
