package dev.rlhf.example;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import dev.rlhf.reward.v1.Sample;
import dev.rlhf.reward.v1.SampleResult;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.junit.jupiter.api.Test;
import tools.jackson.databind.JsonNode;
import tools.jackson.databind.json.JsonMapper;

class AnswerRewardTest {
  // The same file for all six languages; it lies outside this folder, from which Maven runs the tests.
  private static final Path GOLDEN = Path.of("../../../tests/reward_server/examples/golden/vectors.json");

  private final Reward reward = new AnswerReward();

  private double rewardOf(String completion, String reference) {
    return reward.judge(completion, reference).reward();
  }

  @Test
  void aMatchAFullStopAndTheLengthAddUp() {
    assertEquals(1, rewardOf("42", "42"));
    assertEquals(1.25, rewardOf("42!", "42"));
    assertEquals(0, rewardOf("43", "42"), 0);
    assertEquals(
        Map.of("match", 1.0, "format", 0.25, "length", -0.0625),
        reward.judge("42." + " ".repeat(77), "42").components());
  }

  @Test
  void theLengthCountsCodePointsAndCostsOneAtMost() {
    assertEquals(0, rewardOf("😀".repeat(64), "42"), 0);
    assertEquals(-1 / 256.0, rewardOf("😀".repeat(65), "42"));
    assertEquals(-1, rewardOf("a".repeat(5000), "42"));
  }

  @Test
  void onlyTheFourWhiteSpacesAreTrimmed() {
    assertEquals("42", AnswerReward.trim(" \t\r\n42 \n"));
    assertEquals("", AnswerReward.trim(" \n "));
    assertEquals("\u00a042\u000b", AnswerReward.trim("\u00a042\u000b"));
  }

  @Test
  void everyGoldenVectorComesOutToTheLastBit() {
    List<JsonNode> vectors = List.copyOf(new JsonMapper().readTree(GOLDEN).values());
    assertTrue(vectors.size() >= 200);
    for (JsonNode vector : vectors) {
      String id = vector.get("id").stringValue();
      Sample.Builder sample = Sample.newBuilder().setCompletion(vector.get("completion").stringValue());
      for (var entry : vector.get("metadata").properties()) {
        sample.putMetadata(entry.getKey(), entry.getValue().stringValue());
      }
      Set<String> jsonKeys = new HashSet<>();
      vector.get("json_metadata_keys").forEach(key -> jsonKeys.add(key.stringValue()));

      SampleResult result = Samples.judge(sample.build(), jsonKeys, reward);

      if (vector.get("outcome").stringValue().equals("failed")) {
        assertEquals(vector.get("code").stringValue(), result.getFailed().getCode(), id);
      } else {
        Map<String, Double> components = new HashMap<>();
        for (var entry : vector.get("components").properties()) {
          components.put(entry.getKey(), entry.getValue().doubleValue());
        }
        assertTrue(result.hasScored(), id);
        assertEquals(vector.get("reward").doubleValue(), result.getScored().getReward(), id);
        assertEquals(components, result.getScored().getComponentsMap(), id);
      }
    }
  }
}
