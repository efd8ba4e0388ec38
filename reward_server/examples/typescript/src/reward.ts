// The reward itself, and nothing of gRPC: replace this file by your own.

/** What clients ask for it by. */
export const NAME = "answer";

/** The column of the prompt's row that holds the reference answer. */
export const COLUMN = "answer";

/** Names this reward's scores: a trainer pins it, so change it whenever the score of any sample could change. */
export const VERSION = "1";

export interface Judgement {
  reward: number;
  components: Map<string, number>;
}

export type Reward = (completion: string, reference: string) => Judgement;

const FREE_LENGTH = 64;
const PENALTY_SPAN = 256;

/** Whether a completion gives the reference answer, ends as a sentence does, and is short. */
export const answerReward: Reward = (completion, reference) => {
  const text = trim(completion);
  const ended = /[.!?]$/.test(text);
  const answer = ended ? trim(text.slice(0, -1)) : text;
  const match = answer === trim(reference) ? 1 : 0;
  const format = ended ? 0.25 : 0;
  const length = -Math.min(1, Math.max(0, codePoints(completion) - FREE_LENGTH) / PENALTY_SPAN);
  const components = new Map(Object.entries({ match, format, length }));
  // In this order: another would round differently in the last bit.
  return { reward: match + format + length, components };
};

/** `text` without the white space at its ends. String.trim knows many more white spaces than the rule's four. */
export function trim(text: string): string {
  let start = 0;
  let end = text.length;
  // Not a regular expression: at long runs of spaces inside the text, that one for the end takes quadratic time.
  while (start < end && " \t\n\r".includes(text.charAt(start))) start++;
  while (end > start && " \t\n\r".includes(text.charAt(end - 1))) end--;
  return text.slice(start, end);
}

/** Code points, of which String.length counts those above U+FFFF twice. */
function codePoints(text: string): number {
  let count = 0;
  for (const _ of text) count++;
  return count;
}
