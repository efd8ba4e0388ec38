package dev.rlhf.example;

import java.util.Map;

/** What a completion is worth, given the reference answer. It is called by several threads at a time. */
interface Reward {
  /** The reward, higher is better, and the numbers that it is made of. */
  record Judgement(double reward, Map<String, Double> components) {}

  Judgement judge(String completion, String reference);
}
