package dev.rlhf.example;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.ByteString;
import com.google.protobuf.UnknownFieldSet;
import dev.rlhf.reward.v1.ChatMessage;
import dev.rlhf.reward.v1.ContentPart;
import dev.rlhf.reward.v1.Failed;
import dev.rlhf.reward.v1.Sample;
import dev.rlhf.reward.v1.SampleResult;
import java.util.Map;
import java.util.Set;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class SamplesTest {
  private static final Sample SAMPLE = Sample.newBuilder().setCompletion("42").putMetadata("answer", "42").build();
  private static final Map<String, Double> NO_COMPONENTS = Map.of();

  /** The code of a sample that failed, or else "SCORED". */
  private static String codeOf(Sample.Builder sample, String... jsonKeys) {
    SampleResult result = Samples.judge(sample.build(), Set.of(jsonKeys), new AnswerReward());
    return result.hasScored() ? "SCORED" : result.getFailed().getCode();
  }

  private static Sample.Builder withMessage(ChatMessage.Builder message) {
    return SAMPLE.toBuilder().addMessages(message.setRole("user"));
  }

  private static String fingerprint(Sample.Builder sample, String... jsonKeys) {
    return Samples.fingerprint(sample.build(), Set.of(jsonKeys));
  }

  @Test
  void aRowWithoutTheColumnFailsAndTheMessageNamesTheColumn() {
    Failed failed = Samples.judge(Sample.getDefaultInstance(), Set.of(), new AnswerReward()).getFailed();
    assertEquals("MISSING_METADATA", failed.getCode());
    assertTrue(failed.getMessage().contains("\"answer\""));
  }

  @Test
  void aColumnThatIsNoJsonWhereTheCallSaysSoFailsWhetherOrNotTheRewardUsesIt() {
    Sample.Builder sample = SAMPLE.toBuilder().putMetadata("row", "nope");
    assertEquals("INVALID_METADATA", codeOf(sample, "row"));
    assertEquals("SCORED", codeOf(sample, "answer", "absent"));
    assertEquals("INVALID_METADATA", codeOf(SAMPLE.toBuilder().putMetadata("answer", "nope"), "answer"));
  }

  @Test
  void aMessageOfAFailureStaysWithinItsBound() {
    String word = "😀".repeat(5000);
    Sample sample = SAMPLE.toBuilder().putMetadata(word, word).build();
    Failed failed = Samples.judge(sample, Set.of(word), new AnswerReward()).getFailed();
    assertTrue(failed.getMessageBytes().size() <= 1024);
  }

  @Test
  void aPartOfAnUnknownKindFailsTheSample() {
    UnknownFieldSet.Field image = UnknownFieldSet.Field.newBuilder().addLengthDelimited(ByteString.EMPTY).build();
    ContentPart.Builder newer =
        ContentPart.newBuilder().setUnknownFields(UnknownFieldSet.newBuilder().addField(2, image).build());
    assertEquals("UNKNOWN_CONTENT", codeOf(withMessage(ChatMessage.newBuilder().addParts(newer))));
    ContentPart.Builder empty = ContentPart.newBuilder().setText("");
    assertEquals("SCORED", codeOf(withMessage(ChatMessage.newBuilder().addParts(empty))));
  }

  @ParameterizedTest
  @ValueSource(strings = {"nope", "null", "[]", "1", "\"{}\"", " ", "{} {}"})
  void theRestOfATurnThatIsNoJsonObjectFailsTheSample(String extraJson) {
    assertEquals("INVALID_METADATA", codeOf(withMessage(ChatMessage.newBuilder().setExtraJson(extraJson))));
  }

  @ParameterizedTest
  @ValueSource(strings = {"", "{}", "{\"name\": \"search\"}"})
  void theRestOfATurnMayBeAJsonObjectOrNothing(String extraJson) {
    assertEquals("SCORED", codeOf(withMessage(ChatMessage.newBuilder().setExtraJson(extraJson))));
  }

  @ParameterizedTest
  @ValueSource(doubles = {Double.NaN, Double.POSITIVE_INFINITY, Double.NEGATIVE_INFINITY})
  void aRewardThatIsNotFiniteIsNoScore(double wrong) {
    Reward wrongReward = (completion, reference) -> new Reward.Judgement(wrong, NO_COMPONENTS);
    Reward wrongPart = (completion, reference) -> new Reward.Judgement(0, Map.of("part", wrong));
    assertEquals("NOT_FINITE", Samples.judge(SAMPLE, Set.of(), wrongReward).getFailed().getCode());
    assertEquals("NOT_FINITE", Samples.judge(SAMPLE, Set.of(), wrongPart).getFailed().getCode());
  }

  @Test
  void theFingerprintTellsContentsApartAndNothingElse() {
    Sample.Builder sample = Sample.newBuilder().setCompletion("42").putMetadata("a", "1").putMetadata("b", "2");
    String expected = fingerprint(sample);

    assertEquals(expected, fingerprint(sample.clone().setGroupId("other").setGroupSize(7)));
    assertEquals(expected, fingerprint(sample.clone().clearMetadata().putMetadata("b", "2").putMetadata("a", "1")));
    assertEquals(expected, fingerprint(sample, "absent"));

    assertNotEquals(expected, fingerprint(sample.clone().setCompletion("43")));
    assertNotEquals(expected, fingerprint(sample.clone().setPrompt("?")));
    assertNotEquals(expected, fingerprint(sample.clone().addCompletionTokenIds(1)));
    assertNotEquals(expected, fingerprint(sample.clone().removeMetadata("b")));
    assertNotEquals(expected, fingerprint(sample, "a"));
  }
}
