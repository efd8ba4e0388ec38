package dev.rlhf.example;

import java.util.Map;

/**
 * Whether a completion gives the reference answer, ends as a sentence does, and is short. Nothing of gRPC is in here:
 * replace it by your own.
 */
final class AnswerReward implements Reward {
  /** What clients ask for it by. */
  static final String NAME = "answer";

  /** The column of the prompt's row that holds the reference answer. */
  static final String COLUMN = "answer";

  /** Names this reward's scores: a trainer pins it, so change it whenever the score of any sample could change. */
  static final String VERSION = "1";

  private static final int FREE_LENGTH = 64;
  private static final double PENALTY_SPAN = 256;

  @Override
  public Judgement judge(String completion, String reference) {
    String text = trim(completion);
    boolean ended = text.endsWith(".") || text.endsWith("!") || text.endsWith("?");
    String answer = ended ? trim(text.substring(0, text.length() - 1)) : text;
    double match = answer.equals(trim(reference)) ? 1 : 0;
    double format = ended ? 0.25 : 0;
    // Code points, of which String.length() counts those above U+FFFF twice.
    int points = completion.codePointCount(0, completion.length());
    double length = -Math.min(1, Math.max(0, points - FREE_LENGTH) / PENALTY_SPAN);
    // In this order: another would round differently in the last bit.
    return new Judgement(match + format + length, Map.of("match", match, "format", format, "length", length));
  }

  /** The text without the white space at its ends; String.trim and String.strip know more than the rule's four. */
  static String trim(String text) {
    int start = 0;
    int end = text.length();
    while (start < end && isSpace(text.charAt(start))) {
      start++;
    }
    while (end > start && isSpace(text.charAt(end - 1))) {
      end--;
    }
    return text.substring(start, end);
  }

  private static boolean isSpace(char character) {
    return character == ' ' || character == '\t' || character == '\n' || character == '\r';
  }
}
