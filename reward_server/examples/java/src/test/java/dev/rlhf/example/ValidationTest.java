package dev.rlhf.example;

import static org.junit.jupiter.api.Assertions.assertEquals;

import com.google.rpc.BadRequest.FieldViolation;
import dev.rlhf.reward.v1.Sample;
import dev.rlhf.reward.v1.ScoreRequest;
import dev.rlhf.reward.v1.TokenRange;
import java.util.List;
import org.junit.jupiter.api.Test;

class ValidationTest {
  private static final int MAX_SAMPLES = 4;

  private static List<FieldViolation> violations(ScoreRequest.Builder request) {
    return Validation.violations(request.build(), MAX_SAMPLES).getFieldViolationsList();
  }

  private static List<String> wrongFields(ScoreRequest.Builder request) {
    return violations(request).stream().map(FieldViolation::getField).toList();
  }

  private static ScoreRequest.Builder request(String... sampleIds) {
    ScoreRequest.Builder request = ScoreRequest.newBuilder().setRunId("r");
    for (String id : sampleIds) {
      request.addSamples(Sample.newBuilder().setSampleId(id).setGroupId("g"));
    }
    return request;
  }

  /** The wrong fields, below sampled_ranges, of a sample of three tokens with the ranges [first, past_last). */
  private static List<String> wrongRanges(int... ends) {
    Sample.Builder sample = Sample.newBuilder().setSampleId("a").setGroupId("g");
    sample.addAllCompletionTokenIds(List.of(7, 8, 9));
    for (int index = 0; index < ends.length; index += 2) {
      sample.addSampledRanges(TokenRange.newBuilder().setFirst(ends[index]).setPastLast(ends[index + 1]));
    }
    return wrongFields(request().addSamples(sample)).stream()
        .map(field -> field.replace("samples[0].sampled_ranges", ""))
        .toList();
  }

  @Test
  void aWellFormedRequestHasNoViolations() {
    assertEquals(List.of(), wrongFields(request("a")));
    assertEquals(List.of(), wrongFields(request("é".repeat(128)).setRunId("é".repeat(128))));
  }

  @Test
  void runIdIsRequiredAndHasALimitInBytes() {
    assertEquals(List.of("run_id"), wrongFields(request("a").setRunId("")));
    assertEquals(List.of("run_id"), wrongFields(request("a").setRunId("é".repeat(129))));
  }

  @Test
  void aCallHoldsFromOneSampleToMaxSamplesAndTheDescriptionNamesBothNumbers() {
    assertEquals(List.of("samples"), wrongFields(request()));
    assertEquals(List.of(), wrongFields(request("a", "b", "c", "d")));
    FieldViolation violation = violations(request("a", "b", "c", "d", "e")).get(0);
    assertEquals("samples", violation.getField());
    assertEquals("5 samples; max_samples is 4", violation.getDescription());
  }

  @Test
  void idsOfSamplesAreRequiredShortAndDifferent() {
    ScoreRequest.Builder request = request("a", "a".repeat(257), "", "a");
    request.getSamplesBuilder(2).clearGroupId();
    assertEquals(
        List.of("samples[1].sample_id", "samples[2].sample_id", "samples[2].group_id", "samples[3].sample_id"),
        wrongFields(request));
  }

  @Test
  void sampledRangesAscendDoNotOverlapAndLieWithinTheTokens() {
    assertEquals(List.of(), wrongRanges(0, 1, 1, 3));
    assertEquals(List.of("[1].first"), wrongRanges(0, 2, 1, 3));
    assertEquals(List.of("[1].first"), wrongRanges(2, 3, 0, 1));
    assertEquals(List.of("[0].past_last"), wrongRanges(1, 1));
    assertEquals(List.of("[0].past_last"), wrongRanges(0, 4));
    // 4294967295, the largest number of the wire.
    assertEquals(List.of("[0].past_last"), wrongRanges(0, -1));
    ScoreRequest.Builder withoutTokens = request("a");
    withoutTokens.getSamplesBuilder(0).addSampledRanges(TokenRange.newBuilder().setPastLast(1));
    assertEquals(List.of("samples[0].sampled_ranges[0].past_last"), wrongFields(withoutTokens));
  }

  @Test
  void ofManyMistakesTheFirstEightAreTold() {
    ScoreRequest.Builder request = ScoreRequest.newBuilder();
    for (int count = 0; count < MAX_SAMPLES; count++) {
      request.addSamplesBuilder().addSampledRangesBuilder();
    }
    assertEquals(8, wrongFields(request).size());
  }
}
